#include "scratch.h"

#include <cstdlib>
#include <new>

namespace flashmoe {
namespace {

struct Memory {
  void* at = nullptr;
  int64_t nbytes = 0;
  ~Memory() { std::free(at); }
};

}  // namespace

void* scratch(Piece piece, int64_t nbytes) {
  static thread_local Memory pieces[static_cast<int>(Piece::count)];
  Memory& memory = pieces[static_cast<int>(piece)];
  if (memory.nbytes < nbytes) {
    std::free(memory.at);
    memory.at = nullptr;
    memory.nbytes = 0;
    const int64_t size = (nbytes + nbytes / 4 + 4095) / 4096 * 4096;
    if (posix_memalign(&memory.at, 4096, size)) throw std::bad_alloc();
    memory.nbytes = size;
  }
  return memory.at;
}

}  // namespace flashmoe
