#include "scratch.h"

#include <cstdlib>
#include <new>

namespace flashmoe {
namespace {

constexpr int64_t kAlwaysKept = 1 << 20;
constexpr int kLooseUses = 256;  // in a row, of an eighth or less: a few tokens of decoding

struct Memory {
  void* at = nullptr;
  int64_t nbytes = 0;
  int loose = 0;
  ~Memory() { std::free(at); }
};

Memory* pieces() {
  static thread_local Memory all[static_cast<int>(Piece::count)];
  return all;
}

}  // namespace

void* scratch(Piece piece, int64_t nbytes) {
  Memory& memory = pieces()[static_cast<int>(piece)];
  const bool loose = memory.nbytes > kAlwaysKept && nbytes <= memory.nbytes / 8;
  memory.loose = loose ? memory.loose + 1 : 0;
  if (memory.nbytes < nbytes || memory.loose > kLooseUses) {
    std::free(memory.at);
    memory.at = nullptr;
    memory.nbytes = 0;
    memory.loose = 0;
    const int64_t size = (nbytes + nbytes / 4 + 4095) / 4096 * 4096;
    if (posix_memalign(&memory.at, 4096, size)) throw std::bad_alloc();
    memory.nbytes = size;
  }
  return memory.at;
}

int64_t scratch_nbytes() {
  int64_t total = 0;
  for (int i = 0; i < static_cast<int>(Piece::count); ++i) total += pieces()[i].nbytes;
  return total;
}

}  // namespace flashmoe
