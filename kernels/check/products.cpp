// Products in one instruction set against plain double loops, without Python: for a machine that is
// emulated. Prints the largest relative error of each form; exits 1 where one is too large.
//
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -static -I kernels/cpu
//     kernels/check/products.cpp kernels/cpu/isa_{neon,portable}.cpp kernels/cpu/scratch.cpp
//   qemu-aarch64 ./a.out
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace flashmoe;

namespace {

double uniform() { return std::rand() / (RAND_MAX + 1.0) - 0.5; }

int code_at(const std::vector<uint8_t>& stream, int64_t row_nbytes, int64_t row,
            int64_t i, int bits) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = i * bits + b;
    code |= (stream[row * row_nbytes + bit / 8] >> (bit % 8) & 1) << b;
  }
  return code;
}

// The error of one product, relative to the root of the mean square of what is right.
double error(const Kernels& k, int bits, int group, bool integer, int64_t cols, int64_t tokens) {
  const int64_t rows = 7, groups = cols / group;
  std::vector<uint8_t> codes(rows * cols / 8 * bits);
  for (uint8_t& one : codes) one = static_cast<uint8_t>(std::rand());
  std::vector<float> scales(rows * groups), biases(rows * groups), x(tokens * cols);
  for (float& one : scales) one = static_cast<float>(uniform() / (1 << bits));
  for (size_t i = 0; i < biases.size(); ++i) biases[i] = -scales[i] * (1 << bits) / 2;
  for (float& one : x) one = static_cast<float>(uniform());

  Matrix m;
  m.weight = codes.data();
  m.scales = reinterpret_cast<const uint8_t*>(scales.data());
  m.biases = reinterpret_cast<const uint8_t*>(biases.data());
  m.rows = rows, m.cols = cols, m.bits = bits, m.group = group;
  const int64_t nbytes = (k.row_nbytes(m, integer) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, tokens * nbytes);
  std::vector<Row> prepared(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    prepared[t] = k.prepare(m, integer, &x[t * cols], static_cast<char*>(memory) + t * nbytes);
  std::vector<float> y(tokens * rows);
  k.product(m, integer, prepared.data(), tokens, 0, rows, y.data(), rows);
  std::free(memory);

  double wrong = 0, right = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double truth = 0;
      for (int64_t i = 0; i < cols; ++i) {
        const int64_t g = r * groups + i / group;
        truth += (code_at(codes, m.row_nbytes(), r, i, bits) * double(scales[g]) + biases[g]) *
                 x[t * cols + i];
      }
      wrong += (y[t * rows + r] - truth) * (y[t * rows + r] - truth);
      right += truth * truth;
    }
  return std::sqrt(wrong / right);
}

}  // namespace

int main() {
#if defined(__aarch64__)
  const Kernels* sets[] = {&kernels_neon, &kernels_portable};
#else
  const Kernels* sets[] = {&kernels_portable};
#endif
  bool good = true;
  for (const Kernels* k : sets)
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (int group : {32, 64, 128})
        for (bool integer : {false, true}) {
          double worst = 0;
          for (int64_t cols : {int64_t(group), int64_t(256 + group), int64_t(1024)})
            for (int64_t tokens : {int64_t(1), int64_t(6)})
              worst = std::fmax(worst, error(*k, bits, group, integer, cols, tokens));
          const bool fine = worst < (integer ? 3e-4 : 2e-6);
          good = good && fine;
          std::printf("%s %d bits, group %3d, %s: %.1e%s\n", k == sets[0] ? "best" : "portable",
                      bits, group, integer ? "integer" : "exact", worst, fine ? "" : "  WRONG");
        }
  return good ? 0 : 1;
}
