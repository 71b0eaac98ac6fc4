#!/usr/bin/env python3
"""Writes src/preprocess/jinja/case_tables.h: what Python's str.upper() and str.lower() do to single characters.

    scripts/make_case_tables.py > src/preprocess/jinja/case_tables.h
"""
import sys
import unicodedata


def rows(method):
    """[first, last, stride, delta] of the characters that become one other character, and those that become several."""
    ranges, special = [], []
    for code in [*range(0x80, 0xD800), *range(0xE000, 0x110000)]:
        changed = getattr(chr(code), method)()
        if changed == chr(code):
            continue
        if len(changed) > 1:
            special.append((code, [ord(c) for c in changed]))
            continue
        delta = ord(changed) - code
        last = ranges[-1] if ranges else None
        if last and last[3] == delta and last[0] == last[1] and code - last[1] in (1, 2):
            last[1], last[2] = code, code - last[1]
        elif last and last[3] == delta and code - last[1] == last[2]:
            last[1] = code
        else:
            ranges.append([code, code, 1, delta])
    return ranges, special


def table(lines):
    text, row = "", "   "
    for line in lines:
        if len(row) + len(line) + 1 > 120:
            text, row = text + row + "\n", "   "
        row += " " + line
    return text + row + "};\n"


print(f"""#pragma once

// Written by scripts/make_case_tables.py with Python {sys.version_info.major}.{sys.version_info.minor}, Unicode {unicodedata.unidata_version}.
// clang-format off

#include <cstdint>

namespace circlet::jinja {{

// Every `stride`-th character from `first` to `last` becomes the one `delta` further on.
struct CaseRange {{
  uint32_t first, last;
  int32_t stride, delta;
}};

// A character that becomes several; 0 = no more.
struct CaseSpecial {{
  uint32_t from, to[3];
}};
""")
for method, name in (("upper", "Upper"), ("lower", "Lower")):
    ranges, special = rows(method)
    print(f"inline constexpr CaseRange k{name}[] = {{")
    print(table([f"{{{a}, {b}, {s}, {d}}}," for a, b, s, d in ranges]))
    print(f"inline constexpr CaseSpecial k{name}Special[] = {{")
    print(table([f"{{{code}, {{{', '.join(map(str, (to + [0, 0])[:3]))}}}}}," for code, to in special]))
print("}  // namespace circlet::jinja")
