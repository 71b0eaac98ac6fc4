#pragma once

#include "circlet/base/communicator.h"

// MPI is a module of its own, circlet_mpi.so beside the program: its libraries cost start-up time and memory, and a
// program that linked them would not start where they are not installed.

namespace circlet {

inline constexpr char kMpiModule[] = "circlet_mpi.so";
inline constexpr char kConnectMpi[] = "CircletConnectMpi";  // the module's one symbol, a ConnectMpi
using ConnectMpi = Communicator*();                         // the caller owns the result; throws Error

}  // namespace circlet
