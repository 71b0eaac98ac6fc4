#include "base/mpi.h"

#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"

namespace circlet {
namespace {

void Must(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  Fail("{}: {}; has another process of the run ended?", call, std::string_view(text, static_cast<size_t>(length)));
}

class MpiWorld final : public Communicator {
 public:
  MpiWorld() {
    int provided = 0;  // only the main thread calls MPI
    Must(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    // The default ends the process with texts of its own.
    Must(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    Must(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
    Must(MPI_Comm_size(MPI_COMM_WORLD, &size_), "MPI_Comm_size");
  }
  ~MpiWorld() override { MPI_Finalize(); }

  int Rank() const override { return rank_; }
  int Size() const override { return size_; }

  std::vector<std::string> AllGather(const std::string& mine) override {
    const uint64_t my_bytes = mine.size();
    std::vector<uint64_t> bytes(static_cast<size_t>(size_));
    Must(MPI_Allgather(&my_bytes, 1, MPI_UINT64_T, bytes.data(), 1, MPI_UINT64_T, MPI_COMM_WORLD), "MPI_Allgather");
    std::vector<std::string> all(bytes.size());
    all[rank_] = mine;
    for (int root = 0; root < size_; ++root) {
      all[root].resize(bytes[root]);
      Broadcast(all[root], root);
    }
    return all;
  }

  void Barrier() override { Must(MPI_Barrier(MPI_COMM_WORLD), "MPI_Barrier"); }

  [[noreturn]] void Abort(int exit_code) override {
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::_Exit(exit_code);
  }

 private:
  static void Broadcast(std::string& message, int root) {
    constexpr size_t kPieceBytes = size_t{1} << 20;  // MPI counts in int
    for (size_t at = 0; at < message.size(); at += kPieceBytes) {
      const size_t bytes = std::min(kPieceBytes, message.size() - at);
      Must(MPI_Bcast(message.data() + at, static_cast<int>(bytes), MPI_BYTE, root, MPI_COMM_WORLD), "MPI_Bcast");
    }
  }

  int rank_ = 0, size_ = 1;
};

}  // namespace
}  // namespace circlet

extern "C" circlet::Communicator* CircletConnectMpi() { return new circlet::MpiWorld; }
