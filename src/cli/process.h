#pragma once

namespace circlet {

// How the process waits, takes memory and meets signals. First of all in main: it may start the program anew, with
// another environment.
void PrepareProcess(char** argv);

// Brings what was printed to standard output; throws Error when it cannot be written.
void FlushOutput();

}  // namespace circlet
