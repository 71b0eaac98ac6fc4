#!/usr/bin/env python3
"""Record the token ids of 3,000 texts.

  record_texts.py gemma3_tokenizer.json PROSE.txt... > texts.jsonl

A line a text, {"text": ..., "ids": [...]}: what the `tokenizers` library (0.23) gives, without special tokens in front.
A third are pieces of the prose, cut anywhere; a third are characters of all of Unicode's planes, digits, blanks and
line ends at random; a third are code, markup, special tokens and names in between. It made
tests/data/golden/preprocess/texts.jsonl.xz out of tests/data/real_text/heldout.txt and
examples/tiny-gemma4/eval/heldout.txt.
"""
import json
import random
import sys

from tokenizers import Tokenizer

random.seed(3)
tokenizer = Tokenizer.from_file(sys.argv[1])
prose = "".join(open(path, encoding="utf-8").read() for path in sys.argv[2:])
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
          (0x2000, 0x206F), (0x2190, 0x21FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F),
          (0x1F300, 0x1FAFF), (0xE0020, 0xE007F), (0x300, 0x36F)]
WORDS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused7>", "<pad>", "</s>", "[multimodal]",
         "def f(x):\n\treturn x", "int main() {", "}", " // ", "https://example.org/a?b=c&d=%20", "<table>", "</td>", "\\frac{1}{2}",
         '{"name": "get_weather", "arguments": {"city": "Köln"}}', "0x7fff", "3.14159", "1,000,000", "e-mail@example.org",
         "don't", "naïve", "ﬁ", "İstanbul", "ß", "\u00a0", "\u200d", "\ufeff", "\r\n", "\n\n\n", "\t\t", "        ",
         "한국어", "العربية", "हिन्दी", "日本語", "👩‍👩‍👧", "🇩🇪"]


def cut():
    at = random.randrange(len(prose) - 60)
    return prose[at:at + random.randint(1, 60)]


def characters():
    text = ""
    for _ in range(random.randint(1, 16)):
        low, high = random.choice(RANGES)
        text += chr(random.randint(low, high)) * random.choice([1, 1, 1, 2, 5])
        text += random.choice(["", "", " ", "  ", "\n", "\t", "7", "42"])
    return text


def words():
    return "".join(random.choice(WORDS) + random.choice(["", " ", "\n"]) for _ in range(random.randint(1, 6)))


for number in range(3000):
    text = (cut, characters, words)[number % 3]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    print(json.dumps({"text": text, "ids": ids}, ensure_ascii=False, separators=(",", ":")))
