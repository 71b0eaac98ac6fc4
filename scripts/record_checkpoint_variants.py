#!/usr/bin/env python3
"""Records what transformers computes on edited copies of a small checkpoint.

    scripts/record_checkpoint_variants.py > tests/data/golden/checkpoint_variants.json

Each variant is a list of edits of tests/data/golden/tiny_e2b/model (or of the tokenizer files of examples/tiny-gemma4).
Beside the edits stand float32 logits of transformers, or that it refuses or leaves weights at random; then `refused` is
a part of the error that circlet gives. `says` are parts of circlet's report. tests/checkpoint_variants_test.cc applies
the same edits and compares. Needs torch, safetensors, transformers 5.24.
"""
import json, lzma, os, pathlib, shutil, struct, sys, tempfile

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
import numpy as np
import torch
import transformers
from safetensors.torch import load

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/data/golden/tiny_e2b/model"
TOKENIZER = ROOT / "examples/tiny-gemma4"
SAMPLES = load(lzma.decompress((ROOT / "tests/data/golden/tiny_e2b/inputs.safetensors.xz").read_bytes()))
TEXT = "model.language_model."
HEAD, EMBED = "lm_head.weight", TEXT + "embed_tokens.weight"

VARIANTS, TOKENIZERS = [], []


def variant(name, config=(), tensors=(), **more):
    VARIANTS.append({"name": name, "config": list(config), "tensors": list(tensors), **more})


def put(path, value):
    return {"op": "add", "path": path, "value": value}


def drop(path):
    return {"op": "remove", "path": path}


def ropes(full, sliding, partial=0.25):
    return {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": partial, "rope_theta": full},
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding}}


# ---- names -----------------------------------------------------------------------------------------------------------
variant("as saved", pictures=True)
variant("names without model.", tensors=[["prefix", "model.", ""]], pictures=True)
variant("text saved as Gemma4ForCausalLM", config=[put("/architectures", ["Gemma4ForCausalLM"]), put("/model_type", "gemma4_text")],
        tensors=[["drop", "vision"], ["prefix", TEXT, "model."]], flatten=True)
variant("text saved as Gemma4TextModel", config=[put("/architectures", ["Gemma4TextModel"]), put("/model_type", "gemma4_text")],
        tensors=[["drop", "vision"], ["prefix", TEXT, ""]], flatten=True)
variant("architectures Gemma4Model", config=[put("/architectures", ["Gemma4Model"])], tensors=[["prefix", "model.", ""]])
variant("doubled model. in text names", tensors=[["prefix", TEXT, TEXT + "model."]], pictures=True)
variant("language_model.model.model.", tensors=[["prefix", TEXT, "language_model.model.model."]], pictures=True)
variant("language_model.model.", tensors=[["prefix", TEXT, "language_model.model."]],
        refused='holds')
variant("PEFT prefix", tensors=[["prefix", "", "base_model.model."]], refused='merge the adapter')
variant("unmerged adapter", tensors=[["replace", "q_proj.weight", "q_proj.base_layer.weight"]], refused='q_proj.base_layer.weight')
# ---- which of tied tensors is stored ---------------------------------------------------------------------------------
variant("head beside its equal", tensors=[["copy", EMBED, HEAD]])
variant("head that differs, tied by config", tensors=[["copy", EMBED, HEAD], ["reverse", HEAD]],
        says=["lm_head.weight differs from"])
variant("equal head in float32", tensors=[["copy", EMBED, HEAD], ["cast", HEAD, "F32"]])
variant("differing head in float32", tensors=[["copy", EMBED, HEAD], ["reverse", HEAD], ["cast", HEAD, "F32"]],
        says=["lm_head.weight differs from"])
variant("head only", tensors=[["replace", EMBED, HEAD]], pictures=True)
variant("neither head nor table", tensors=[["drop", "embed_tokens.weight"]], refused="embed_tokens.weight")
variant("head of another size", tensors=[["zeros", HEAD, "BF16", [8, 64]]], refused="lm_head.weight")
UNTIED = [["copy", EMBED, HEAD], ["reverse", HEAD]]
variant("untied", config=[put("/tie_word_embeddings", False), put("/text_config/tie_word_embeddings", False)], tensors=UNTIED)
variant("untied by the top alone", config=[put("/tie_word_embeddings", False)], tensors=UNTIED)
variant("untied by the text alone", config=[put("/text_config/tie_word_embeddings", False)], tensors=UNTIED)
variant("untied by the text, nothing at the top", config=[drop("/tie_word_embeddings"), put("/text_config/tie_word_embeddings", False)],
        tensors=UNTIED)
variant("untied by the text, no head stored", config=[drop("/tie_word_embeddings"), put("/text_config/tie_word_embeddings", False)])
variant("untied without a head", config=[put("/tie_word_embeddings", False)], refused="lm_head.weight")
variant("no tie flag at all", config=[drop("/tie_word_embeddings"), drop("/text_config/tie_word_embeddings")])
# ---- rotary embeddings -----------------------------------------------------------------------------------------------
variant("rope_scaling instead of rope_parameters", config=[drop("/text_config/rope_parameters"), put("/text_config/rope_scaling", ropes(5e5, 2e4))])
variant("rope_scaling beside rope_parameters", config=[put("/text_config/rope_scaling", ropes(5e5, 2e4, 0.5))])
variant("rope_scaling null", config=[put("/text_config/rope_scaling", None)], like="as saved")
variant("rope_scaling empty", config=[put("/text_config/rope_scaling", {})], refused="rope_scaling")
variant("rope_scaling flat", config=[put("/text_config/rope_scaling", {"rope_type": "linear", "factor": 8.0})], refused="rope_scaling")
variant("rope_parameters flat", config=[put("/text_config/rope_parameters", {"rope_type": "default", "rope_theta": 1e4})], refused="rope_parameters")
variant("rope types by their old key", config=[
    put("/text_config/rope_parameters/full_attention", {"type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 3e5}),
    put("/text_config/rope_parameters/sliding_attention", {"type": "default", "rope_theta": 2e4})])
variant("rope factor", config=[put("/text_config/rope_parameters/full_attention/factor", 8.0)])
variant("rope default with a partial factor", config=[put("/text_config/rope_parameters/sliding_attention/partial_rotary_factor", 0.5)])
variant("rope_theta in text_config", config=[put("/text_config/rope_theta", 5e3)])
variant("rope_theta missing, in text_config", config=[drop("/text_config/rope_parameters/sliding_attention/rope_theta"),
        put("/text_config/rope_theta", 5e3)])
variant("rope_theta missing", config=[drop("/text_config/rope_parameters/sliding_attention/rope_theta")], refused="rope_theta")
variant("no rope_parameters", config=[drop("/text_config/rope_parameters")])
variant("linear rope", config=[put("/text_config/rope_parameters/sliding_attention", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})])
variant("yarn rope", config=[put("/text_config/rope_parameters/full_attention", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})],
        refused="yarn")
variant("vision rope_scaling", config=[put("/vision_config/rope_scaling", {"rope_type": "axial", "rope_theta": 1000.0})], pictures=True)
variant("vision rope_scaling without a base", config=[put("/vision_config/rope_scaling", {"rope_type": "default"})], pictures=True)
variant("vision rope_scaling empty", config=[put("/vision_config/rope_scaling", {}), put("/vision_config/rope_parameters/rope_theta", 50.0)], pictures=True)
variant("vision rope_theta beside", config=[put("/vision_config/rope_parameters", {"type": "axial"}), put("/vision_config/rope_theta", 30.0)], pictures=True)
variant("vision rope_theta alone", config=[drop("/vision_config/rope_parameters"), put("/vision_config/rope_theta", 30.0)], pictures=True)
# ---- files -----------------------------------------------------------------------------------------------------------
variant("metadata null", tensors=[["null_metadata"]])
variant("float8 tensor of the audio tower", tensors=[["zeros", "model.audio_tower.layers.0.weight", "F8_E4M3", [8]]])
variant("4-bit tensor of nobody", tensors=[["zeros", "model.language_model.stray", "F4", [8]]], says=["model.language_model.stray"])
variant("float64 norms", tensors=[["cast", "norm.weight", "F64"]])
variant("float8 tensor that is needed", tensors=[["drop", TEXT + "norm.weight"], ["zeros", TEXT + "norm.weight", "F8_E4M3", [64]]],
        refused="F8_E4M3")
variant("shards", shards=3, pictures=True)
variant("index lists a tied head that is nowhere", shards=2, index=[put("/weight_map/lm_head.weight", "model-2.safetensors")])
variant("index leaves a tensor out", shards=2, index=[drop("/weight_map/" + TEXT + "layers.3.mlp.up_proj.weight")])
variant("index names the wrong shard", shards=2, index=[put("/weight_map/" + TEXT + "embed_tokens.weight", "model-2.safetensors")])
variant("./ in shard names", shards=2, shard_prefix="./")
variant("index lists a tensor that is needed and nowhere", tensors=[["drop", TEXT + "norm.weight"]], shards=2,
        index=[put("/weight_map/" + TEXT + "norm.weight", "model-2.safetensors")], refused="model.language_model.norm.weight")
variant("a shard is missing", shards=2, index=[put("/weight_map/extra", "model-9.safetensors")], refused="model-9.safetensors")
variant("no vision tensors", tensors=[["drop", "vision"]], says=["no vision tensors"])
variant("half of the vision tensors", tensors=[["drop", "vision_tower.encoder.layers.1."]], refused="vision_tower")
variant("half of the vision tensors, text only", tensors=[["drop", "vision_tower.encoder.layers.1."]], arguments=["--text-only"])
variant("text only", arguments=["--text-only"], says=["--text-only"])
# ---- keys ------------------------------------------------------------------------------------------------------------
variant("use_bidirectional_attention vision", config=[put("/text_config/use_bidirectional_attention", "vision")])
variant("use_bidirectional_attention vision with a picture", config=[put("/text_config/use_bidirectional_attention", "vision")],
        pictures=True)
VISION = "model.vision_tower."
variant("built like the dense 31B, with a window shorter than the picture",
        config=[put("/text_config/" + key, value) for key, value in {
            "use_bidirectional_attention": "vision", "sliding_window": 4, "num_hidden_layers": 3, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
            "per_layer_config": {"2": {"head_dim": 32}}}.items()]
        + [put("/vision_config/use_clipped_linears", False), put("/vision_config/standardize", True)],
        tensors=[["drop", TEXT + f"layers.{i}."] for i in range(3, 7)]
        + [["drop", "per_layer"], ["drop", TEXT + "layers.2.self_attn.v_proj."], ["drop", "put_m"],
           ["copy", VISION + "encoder.layers.0.input_layernorm.weight", VISION + "std_scale"],
           ["copy", VISION + "encoder.layers.1.input_layernorm.weight", VISION + "std_bias"]], pictures=True)
variant("use_bidirectional_attention all", config=[put("/text_config/use_bidirectional_attention", "all")],
        refused="use_bidirectional_attention")
variant("keys that nobody knows", config=[put("/text_config/new_thing", 7), put("/other", "x")], says=["text_config.new_thing", "other"])
variant("quantization_config", config=[put("/quantization_config", {"quant_method": "compressed-tensors"})],
        refused="compressed-tensors")
variant("quantization_config in text_config", config=[put("/text_config/quantization_config", {"quant_method": "gptq"})],
        refused="gptq")
variant("published head sizes", config=[drop("/text_config/per_layer_config"), put("/text_config/global_head_dim", 32)])
variant("layer_types null", config=[put("/text_config/layer_types", None)], refused="num_kv_shared_layers")
variant("softcap absent", config=[drop("/text_config/final_logit_softcapping")])
variant("softcap an integer", config=[put("/text_config/final_logit_softcapping", 30)], like="as saved")
variant("eps absent", config=[drop("/text_config/rms_norm_eps")])
variant("torch_dtype", config=[drop("/dtype"), put("/torch_dtype", "bfloat16")])
variant("architectures absent", config=[drop("/architectures")])
variant("audio tower stored", tensors=[["zeros", "model.audio_tower.output_proj.bias", "BF16", [8]]])
variant("K and V of shared layers stored", tensors=[["copy", TEXT + "layers.2.self_attn.k_proj.weight", TEXT + "layers.6.self_attn.k_proj.weight"]],
        says=["layers.6.self_attn.k_proj.weight"])
variant("a layer too many stored", tensors=[["copy", TEXT + "layers.0.layer_scalar", TEXT + "layers.7.layer_scalar"]],
        says=["layers.7.layer_scalar"])


# ---- edits -----------------------------------------------------------------------------------------------------------
def patch(tree, edits):
    for edit in edits:
        *parents, key = edit["path"].split("/")[1:]
        node = tree
        for parent in parents:
            node = node[parent]
        if edit["op"] == "remove":
            del node[key]
        elif key == "-":
            node.append(edit["value"])
        else:
            node[key] = edit["value"]
    return tree


def read_tensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
            for name, entry in header.items()}


def write_tensors(path, tensors, null_metadata):
    header, data = ({"__metadata__": None} if null_metadata else {"__metadata__": {"format": "pt"}}), b""
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def cast(tensor, dtype):
    assert tensor[0] == "BF16"
    values = (np.frombuffer(tensor[2], np.uint16).astype(np.uint32) << 16).view(np.float32)
    return dtype, tensor[1], values.astype({"F32": np.float32, "F64": np.float64}[dtype]).tobytes()


def edit_tensors(tensors, edits):
    null_metadata = False
    for op, *args in edits:
        if op == "prefix":
            tensors = {args[1] + name[len(args[0]):] if name.startswith(args[0]) else name: t for name, t in tensors.items()}
        elif op == "replace":
            tensors = {name.replace(args[0], args[1]): t for name, t in tensors.items()}
        elif op == "drop":
            tensors = {name: t for name, t in tensors.items() if args[0] not in name}
        elif op == "copy":
            tensors[args[1]] = tensors[args[0]]
        elif op == "reverse":
            dtype, shape, raw = tensors[args[0]]
            row = len(raw) // shape[0]
            tensors[args[0]] = dtype, shape, b"".join(raw[i * row:(i + 1) * row] for i in reversed(range(shape[0])))
        elif op == "zeros":
            bits = {"BF16": 16, "F8_E4M3": 8, "F4": 4}[args[1]]
            tensors[args[0]] = args[1], args[2], bytes(int(np.prod(args[2])) * bits // 8)
        elif op == "cast":
            tensors = {name: cast(t, args[1]) if args[0] in name else t for name, t in tensors.items()}
        elif op == "null_metadata":
            null_metadata = True
        else:
            raise ValueError(op)
    return tensors, null_metadata


def make(v, directory):
    config = json.loads((MODEL / "config.json").read_text())
    if v.get("flatten"):
        config = {**config["text_config"], "architectures": config["architectures"]}
    (directory / "config.json").write_text(json.dumps(patch(config, v["config"])))
    tensors, null_metadata = edit_tensors(read_tensors(MODEL / "model.safetensors"), v["tensors"])
    count = v.get("shards", 1)
    if count == 1:
        write_tensors(directory / "model.safetensors", tensors, null_metadata)
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(count):
        part = {name: tensors[name] for i, name in enumerate(names) if i * count // len(names) == shard}
        write_tensors(directory / f"model-{shard + 1}.safetensors", part, null_metadata)
        weight_map.update({name: v.get("shard_prefix", "") + f"model-{shard + 1}.safetensors" for name in part})
    index = patch({"metadata": {"total_size": 0}, "weight_map": weight_map}, v.get("index", []))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- what transformers makes of it -----------------------------------------------------------------------------------
def figures(logits):
    flat = logits.double().reshape(-1)
    return {"values": [round(float(x), 7) for x in flat[:: flat.numel() // 16][:16]], "norm": float(flat.norm())}


def reference(v, directory):
    config = json.loads((directory / "config.json").read_text())
    text = config.get("model_type") == "gemma4_text"
    cls = transformers.Gemma4ForCausalLM if text else transformers.Gemma4ForConditionalGeneration
    try:
        model, info = cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        model.eval()
        missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
        if "no vision tensors" in v["name"] or "--text-only" in v.get("arguments", []):
            missing = [name for name in missing if "vision" not in name]
        if missing:
            return {"transformers": f"leaves {len(missing)} tensors at random, such as {missing[0]}"}
        result = {}
        with torch.no_grad():
            result["text"] = figures(model(input_ids=SAMPLES["eval.0.input_ids"]).logits)
            if v.get("pictures"):
                sample = {key.split(".", 2)[2]: t for key, t in SAMPLES.items() if key.startswith("eval.1.")}
                sample["mm_token_type_ids"] = (sample["input_ids"] == config["image_token_id"]).long()
                result["picture"] = figures(model(**sample).logits)
        return result
    except Exception as error:
        return {"transformers": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}".replace(str(directory), "DIRECTORY")}


# ---- tokens ----------------------------------------------------------------------------------------------------------
TEXTS = ["say <my_tok> and more", "a <my_tok><my_tok>b  <my_tok>  c", "foobar of a_foobar is\n\n<my_tok>\n x", "two words or <my_tok", "<|image|>x<none>y"]


def tokenizer_variant(name, tokenizer=(), config=(), files=None):
    TOKENIZERS.append({"name": name, "tokenizer": list(tokenizer), "config": list(config), "files": files or {}})


def added(content, token_id=None, **flags):
    token = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False, **flags}
    return token if token_id is None else {"id": token_id, **token}


tokenizer_variant("as saved")
tokenizer_variant("tokens of add_tokens", [put("/added_tokens/-", added("<my_tok>", 2048, normalized=True)),
                                           put("/added_tokens/-", added("foobar", 2049, normalized=True))])
tokenizer_variant("normalized token with a blank", [put("/added_tokens/-", added("two words", 2048, normalized=True))])
tokenizer_variant("token with a blank", [put("/added_tokens/-", added("two words", 2048))])
tokenizer_variant("lstrip and rstrip", [put("/added_tokens/-", added("<my_tok>", 2048, lstrip=True, rstrip=True, special=True))])
tokenizer_variant("lstrip", [put("/added_tokens/-", added("<my_tok>", 2048, lstrip=True))])
tokenizer_variant("rstrip", [put("/added_tokens/-", added("<my_tok>", 2048, rstrip=True))])
tokenizer_variant("normalized lstrip and rstrip", [put("/added_tokens/-", added("<my_tok>", 2048, lstrip=True, rstrip=True, normalized=True))])
tokenizer_variant("a prefix of another token", [put("/added_tokens/-", added("<my", 2048, normalized=True)),
                                                put("/added_tokens/-", added("<my_tok>", 2049))])
tokenizer_variant("added_tokens_decoder", config=[put("/added_tokens_decoder", {"2048": added("<my_tok>", special=True), "2049": added("foobar", normalized=True)})])
tokenizer_variant("special_tokens_map.json", files={"special_tokens_map.json": {"additional_special_tokens": ["<my_tok>"], "eos_token": "<eos>"}})
tokenizer_variant("special_tokens_map.json with objects", files={"special_tokens_map.json": {
    "extra_special_tokens": [{"content": "<my_tok>", "lstrip": True, "normalized": False}], "boi_token": added("<|image>")}})
tokenizer_variant("special_tokens_map.json with a named token", files={"special_tokens_map.json": {"my_token": "<my_tok>"}})
tokenizer_variant("special_tokens_map.json beside added_tokens_decoder", config=[put("/added_tokens_decoder", {"2048": added("foobar")})],
                  files={"special_tokens_map.json": {"extra_special_tokens": ["<my_tok>"]}, "added_tokens.json": {"<my_tok>": 2049}})
tokenizer_variant("special_tokens_map.json renames the unknown token", files={"special_tokens_map.json": {"eos_token": "<my_tok>"}})
tokenizer_variant("added_tokens.json", files={"added_tokens.json": {"<my_tok>": 2048, "foobar": 2049}})
tokenizer_variant("added_tokens.json of a special token", config=[put("/extra_special_tokens", ["<|video|>", "<my_tok>"])],
                  files={"added_tokens.json": {"<my_tok>": 2048}})
tokenizer_variant("extra_special_tokens", config=[put("/extra_special_tokens", ["<|video|>", "<my_tok>", "<none>"])])
tokenizer_variant("extra_special_tokens as a mapping", config=[put("/extra_special_tokens", {"my_token": "<my_tok>"})])
tokenizer_variant("additional_special_tokens", config=[drop("/extra_special_tokens"), put("/additional_special_tokens", ["<|video|>", "<my_tok>"])])
tokenizer_variant("a named token", config=[put("/my_token", "<my_tok>")])
tokenizer_variant("model_specific_special_tokens", config=[put("/model_specific_special_tokens", {"my_token": "<my_tok>"})])


def make_tokenizer(v, directory):
    shutil.copy(TOKENIZER / "config.json", directory)
    (directory / "tokenizer.json").write_text(json.dumps(patch(json.loads((TOKENIZER / "tokenizer.json").read_text()), v["tokenizer"])))
    (directory / "tokenizer_config.json").write_text(json.dumps(patch(json.loads((TOKENIZER / "tokenizer_config.json").read_text()), v["config"])))
    for name, content in v["files"].items():
        (directory / name).write_text(json.dumps(content))


def tokenize(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


def main():
    for v in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            make(v, pathlib.Path(folder))
            result = reference(v, pathlib.Path(folder))
        print(v["name"], "|", result.get("transformers") or f"norm {result['text']['norm']:.4f}", "| REFUSED" if v.get("refused") else "",
              file=sys.stderr)
        v.update(result)
    for v in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            make_tokenizer(v, pathlib.Path(folder))
            v["ids"] = tokenize(pathlib.Path(folder))
        print(v["name"], "|", v["ids"], file=sys.stderr)
    print("{" + ",\n".join(f'"{kind}": [\n' + ",\n".join(json.dumps(v) for v in list) + "]"
                           for kind, list in (("variants", VARIANTS), ("tokenizers", TOKENIZERS)))
          + f',\n"texts": {json.dumps(TEXTS)}}}')


if __name__ == "__main__":
    main()
