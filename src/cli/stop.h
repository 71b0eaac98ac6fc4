#pragma once

#include <string>

namespace circlet {

// From the first call on, Ctrl-C (SIGINT) and SIGTERM end the program at once with 130 and 143, behind this text on
// stderr; "" for none. A signal that the program was started without (nohup, &) stays without effect. What has been
// written needs no care: a run may be killed anywhere.
void TellWhenStopped(std::string text);

// From the first call on, the first Ctrl-C (SIGINT) or SIGTERM only makes this true, so that what was made so far can
// be told; the second ends the program.
bool StopAsked();

// This process's command line for a shell, without `dropped` and with `added` at its end unless it is there.
std::string CommandLine(const std::string& dropped, const std::string& added);

// This process's command line without what decides no byte of a result: where it goes, and how the run is made.
std::string RepeatableCommand();

}  // namespace circlet
