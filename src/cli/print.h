#pragma once

#include <string>
#include <string_view>

namespace circlet {

// Columns that a text may take: COLUMNS, else the terminal's; 0 where neither is known, as in a file or a pipe.
int Columns();

// To standard output, as the locale can show it: where LC_ALL, LC_CTYPE or LANG name a character set that is not UTF-8,
// such as C, frames, bars and signs are ASCII. With none of them set the text goes out as it is.
void Print(std::string_view text);

}  // namespace circlet
