#!/usr/bin/env python3
"""Records tests/data/rounding/problems.json.xz: small matrices, moments and what the rounding methods make of them; and
tests/data/rounding/layer.safetensors.xz: the same of all linears of a layer of examples/tiny-gemma4.

    python3 scripts/record_rounding.py tests/data/rounding/problems.json.xz
    python3 scripts/record_rounding.py tests/data/rounding/layer.safetensors.xz examples/tiny-gemma4

Needs NumPy (1.26 was used), and for the layer torch, transformers (5.24) and safetensors. Everything is float64 and in the form of the textbooks, which is not the program's: GPTQ with
the Cholesky factor of the inverse, descent with a gradient that is kept up to date.
"""
import json, lzma, sys
import numpy as np


def grids(low, high, qmin, qmax, symmetric):
    """Scales in float32, as a file holds them, and zero points."""
    low, high = np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)
    if symmetric:
        scale = np.maximum(np.maximum(-low, high) / np.float32(qmax), np.float32(1e-8))
        return scale.astype(np.float64), np.zeros(len(scale))
    scale = np.maximum((high - low) / np.float32(qmax - qmin), np.float32(1e-8))
    return scale.astype(np.float64), np.clip(np.rint(qmin - low / scale), qmin, qmax).astype(np.float64)


def snap(x, s, z, qmin, qmax):
    return np.clip(np.rint(x / s + z), qmin, qmax)


def damped(h, damping):
    mean = np.mean(np.diag(h))
    return h + (damping * mean if mean > 0 else 1.0) * np.eye(len(h))


def loss(e, h):
    return np.einsum("ri,ij,rj->r", e, h, e)


def gptq(t, hd, s, z, qmin, qmax):
    u = np.linalg.cholesky(np.linalg.inv(hd)).T  # inv(H) = U^T U
    w, codes = t.copy(), np.zeros_like(t)
    for i in range(t.shape[1]):
        codes[:, i] = snap(w[:, i], s, z, qmin, qmax)
        err = (w[:, i] - s * (codes[:, i] - z)) / u[i, i]
        w[:, i + 1:] -= np.outer(err, u[i, i + 1:])
    return codes


def descend(codes, t, hd, s, z, qmin, qmax):
    q = s[:, None] * (codes - z[:, None])
    g = (q - t) @ hd
    for j in range(t.shape[1]):
        new = snap(q[:, j] - g[:, j] / hd[j, j], s, z, qmin, qmax)
        d = s * (new - codes[:, j])
        codes[:, j] = new
        q[:, j] += d
        g += np.outer(d, hd[j])
    return codes


def refit(codes, t, hd, s, z):
    u = codes - z[:, None]
    top, bottom = np.einsum("ri,ij,rj->r", u, hd, t), np.einsum("ri,ij,rj->r", u, hd, u)
    best = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), s).astype(np.float32).astype(np.float64)
    return np.where(best > 1e-8, best, s)


def solve(w, t, h, o):
    qmin, qmax = o["qmin"], o["qmax"]
    low, high = w.min(1), w.max(1)
    order = np.argsort(-np.diag(h), kind="stable") if o["order"] else np.arange(len(h))
    hd, d = damped(h, o["damping"])[order][:, order], np.diag(h)[order]
    w, t = w[:, order], t[:, order]
    widest = grids(low, high, qmin, qmax, o["symmetric"])
    s, z = widest
    nearest = snap(t, s[:, None], z[:, None], qmin, qmax)
    nearest_loss = loss(s[:, None] * (nearest - z[:, None]) - t, hd)
    if o["range"] != "minmax":
        weight = d if o["range"] == "moments" else np.ones_like(d)
        best = None
        for p in [1.0] + list(np.linspace(o["lowest"], 1, o["factors"])[:-1]):
            p32 = np.float32(p)
            gs, gz = grids(low.astype(np.float32) * p32, high.astype(np.float32) * p32, qmin, qmax, o["symmetric"])
            e = gs[:, None] * (snap(w, gs[:, None], gz[:, None], qmin, qmax) - gz[:, None]) - w
            c = (weight * e * e).sum(1)
            if best is None:
                best, s, z = c, gs, gz
            else:
                s, z, best = np.where(c < best, gs, s), np.where(c < best, gz, z), np.minimum(c, best)
    codes = gptq(t, hd, s, z, qmin, qmax) if o["compensate"] else snap(t, s[:, None], z[:, None], qmin, qmax)
    for i in range(o["refits"] + 1):
        for _ in range(o["passes"]):
            codes = descend(codes, t, hd, s, z, qmin, qmax)
        if i < o["refits"]:
            s = refit(codes, t, hd, s, z)
    total = loss(s[:, None] * (codes - z[:, None]) - t, hd)
    keep = total < nearest_loss
    codes = np.where(keep[:, None], codes, nearest)
    s, z = np.where(keep, s, widest[0]), np.where(keep, z, widest[1])
    back = np.argsort(order, kind="stable")
    return codes[:, back], s, z, np.where(keep, total, nearest_loss), nearest_loss


def main(path):
    rng, problems = np.random.default_rng(20), []
    base = dict(qmin=0, qmax=15, dtype="uint4", symmetric=False, range="moments", factors=25, lowest=0.4, damping=0.05,
                order=True, compensate=True, passes=2, refits=1, target=False)
    variants = [dict(), dict(range="minmax", passes=0, refits=0), dict(range="mse", passes=0, refits=0),
                dict(passes=0, refits=0), dict(compensate=False, passes=4, refits=0), dict(order=False, passes=1, refits=2),
                dict(damping=0.3), dict(qmax=7), dict(dtype="uint8", qmax=255), dict(dtype="int8", qmin=-128, qmax=127,
                symmetric=True), dict(dtype="int4", qmin=-8, qmax=7, symmetric=True), dict(target=True),
                dict(target=True, qmax=7, damping=0.1)]
    for n, variant in enumerate(variants):
        for rows, columns, positions, kind in [(7, 24, 60, "plain"), (5, 40, 25, "outlier"), (3, 33, 90, "dead")]:
            o = dict(base, **variant)
            x = np.round(rng.standard_normal((positions, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal(
                (columns, columns))) * 64) / 64
            if kind == "outlier":
                x[:, 3] *= 50
            if kind == "dead":
                x[:, [2, 17]] = 0
            w = (rng.standard_normal((rows, columns)) * 0.1).astype(np.float32)
            if kind == "dead":
                w[1] = 0
            x = x.astype(np.float32)
            h = x.astype(np.float64).T @ x.astype(np.float64)
            w64, t, entry = w.astype(np.float64), w.astype(np.float64), dict(options=o)
            if o["target"]:
                xf = (x + 0.25 * np.round(rng.standard_normal(x.shape) * 64) / 64).astype(np.float32)
                a = ((xf.astype(np.float64) - x) @ w64.T).astype(np.float32)  # W (x_f - x), [positions, rows]
                entry["change_rows"] = a.tolist()
                t = w64 + np.linalg.solve(damped(h, 0.3), (x.T.astype(np.float64) @ a)).T
            codes, s, z, total, nearest = solve(w64, t, h, o)
            entry.update(weight=w.tolist(), x=x.tolist(), codes=codes.astype(int).tolist(), scale=s.tolist(),
                         zero_point=z.astype(int).tolist(), loss=total.tolist(), nearest_loss=nearest.tolist())
            if o["target"]:
                entry["target"] = t.tolist()
            problems.append(entry)
    text = json.dumps(problems).encode()
    with lzma.open(path, "wb", preset=9) as f:
        f.write(text)
    print(len(problems), "problems,", len(text), "bytes")


def layer(path, model, index=3, positions=192):
    """Inputs of the linears in float, and what the default method makes of the weights at 4 bits."""
    import torch
    from safetensors.numpy import save
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    net = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, inputs, weights, hooks = AutoTokenizer.from_pretrained(model), {}, {}, []
    prefix = f"model.language_model.layers.{index}."
    for name, module in net.named_modules():
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear):
            short = name[len(prefix):]
            weights[short] = module.weight.detach().numpy().astype(np.float32)
            hooks.append(module.register_forward_hook(
                lambda _, given, __, short=short: inputs.setdefault(short, []).append(given[0][0].detach().numpy())))
    texts = [json.loads(line) for line in open(f"{model}/eval/calib.jsonl")]
    for text in [each["text"] for each in texts if "text" in each][:32]:
        net(input_ids=tokenizer(text, return_tensors="pt").input_ids)
        if sum(len(x) for x in inputs["mlp.down_proj"]) >= positions:
            break
    o = dict(qmin=0, qmax=15, symmetric=False, range="moments", factors=25, lowest=0.4, damping=0.05, order=True,
             compensate=True, passes=2, refits=1)
    data = {}
    for name, w in weights.items():
        x = np.concatenate(inputs[name])[:positions].astype(np.float16)
        h = x.astype(np.float64).T @ x.astype(np.float64)
        codes, s, z, total, nearest = solve(w.astype(np.float64), w.astype(np.float64), h, o)
        data[name + ".codes"] = np.ascontiguousarray(codes.astype(np.uint8))
        data[name + ".scale"] = s.astype(np.float32)
        data[name + ".loss"] = np.array([total.sum(), nearest.sum()])
        same = [other for other in data if other.endswith(".x") and np.array_equal(data[other], x)]
        if not same:
            data[name + ".x"] = x
        print(name, w.shape, f"{total.sum() / nearest.sum():.3f} of the nearest codes' loss", same)
    with lzma.open(path, "wb", preset=9) as f:
        f.write(save(data))


layer(*sys.argv[1:]) if len(sys.argv) > 2 else main(sys.argv[1])
