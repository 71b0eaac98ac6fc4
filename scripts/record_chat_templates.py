#!/usr/bin/env python3
"""Records what transformers renders of tests/data/chat_templates, for the tests to compare with.

    scripts/record_chat_templates.py     # needs transformers 5.24 and jinja2; writes expected.json.xz there

Every conversation of conversations.jsonl goes through every template (*.jinja) and through the one of
examples/tiny-gemma4, whose ids are recorded too; every template of snippets.txt is rendered without variables. What the
reference refuses is recorded as null.
"""
import json
import lzma
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"
import jinja2
import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data/chat_templates"
EXAMPLE = ROOT / "examples/tiny-gemma4"
tokenizer = transformers.AutoTokenizer.from_pretrained(str(EXAMPLE))


def render(line, template=None, tokenize=False):
    arguments = {key: value for key, value in line.items() if key not in ("type", "messages", "chat_template_kwargs")}
    arguments |= line.get("chat_template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(line["messages"], chat_template=template, tokenize=tokenize,
                                             return_dict=False, **arguments)
    except Exception:
        return None


def render_snippet(text):
    try:
        return _compile_jinja_template(text).render()
    except Exception:
        return None


lines = [json.loads(line) for line in (DATA / "conversations.jsonl").read_text(encoding="utf-8").splitlines()]
expected = {
    "transformers": transformers.__version__,
    "jinja2": jinja2.__version__,
    "example": [render(line) for line in lines],
    "example_ids": [render(line, tokenize=True) for line in lines],
    "templates": {path.name: [render(line, path.read_text(encoding="utf-8")) for line in lines]
                  for path in sorted(DATA.glob("*.jinja"))},
    "snippets": [render_snippet(text)
                 for text in (DATA / "snippets.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n----\n")],
}
packed = lzma.compress(json.dumps(expected, ensure_ascii=False).encode(), preset=9)
(DATA / "expected.json.xz").write_bytes(packed)
for name, texts in [("example", expected["example"]), *expected["templates"].items(), ("snippets", expected["snippets"])]:
    print(f"{name}: {len(texts)} rendered, {sum(text is None for text in texts)} of them refused")
