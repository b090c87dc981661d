// Products in one instruction set against plain double loops, without Python: for a machine that is
// emulated. Prints the largest relative error of each form; exits 1 where one is too large.
//
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -static -I kernels/cpu
//     kernels/check/products.cpp kernels/cpu/isa_{neon,portable}.cpp kernels/cpu/scratch.cpp
//   qemu-aarch64 ./a.out
#include <algorithm>

#include "check.h"
#include "scratch.h"

using namespace flashmoe;

namespace {

// Numbers as a checkpoint has them, and what they are.
struct Stored {
  std::vector<uint8_t> bytes;
  std::vector<double> values;
};

Stored stored(const std::vector<float>& all, Kind kind) {
  Stored out;
  for (const float one : all) {
    uint32_t bits;
    std::memcpy(&bits, &one, 4);
    float value = one;
    if (kind == Kind::bf16) bits &= 0xffff0000;
    if (kind == Kind::f16) {  // none is too small or too large for it
      bits &= 0xffffe000;
      if ((bits >> 23 & 255) < 113) bits = 0;
    }
    std::memcpy(&value, &bits, 4);
    const uint16_t half = kind == Kind::bf16 ? bits >> 16
                          : bits ? (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10))
                                 : 0;
    const auto* p = kind == Kind::f32 ? reinterpret_cast<const uint8_t*>(&bits)
                                      : reinterpret_cast<const uint8_t*>(&half);
    out.bytes.insert(out.bytes.end(), p, p + nbytes_of(kind));
    out.values.push_back(value);
  }
  return out;
}

int code_at(const std::vector<uint8_t>& stream, int64_t row_nbytes, int64_t row, int64_t i,
            int bits) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = i * bits + b;
    code |= (stream[row * row_nbytes + bit / 8] >> (bit % 8) & 1) << b;
  }
  return code;
}

// Of a product, and of the matrix when it is dequantised.
double error(const Kernels& k, Matrix m, bool integer, int64_t tokens) {
  const int64_t rows = m.rows, cols = m.cols, groups = m.bits ? m.groups() : 0;
  std::vector<uint8_t> codes(m.bits ? rows * m.row_nbytes() : 0);
  for (uint8_t& one : codes) one = static_cast<uint8_t>(std::rand());
  std::vector<float> some = numbers(rows * groups, 1.0 / (1 << m.bits)), offsets = some;
  for (float& one : offsets) one *= -(1 << m.bits) / 2.0f;
  const Stored scales = stored(some, m.kind), biases = stored(offsets, m.kind);
  const Stored plain = stored(numbers(m.bits ? 0 : rows * cols), m.kind);
  const AtTheEnd weight(m.bits ? codes : plain.bytes), s(scales.bytes), b(biases.bytes);
  m.weight = weight.bytes(), m.scales = s.bytes(), m.biases = b.bytes();
  std::vector<double> truth(rows * cols);
  for (int64_t n = 0; n < rows * cols; ++n) {
    const int64_t r = n / cols, i = n % cols, g = m.bits ? r * groups + i / m.group : 0;
    truth[n] = m.bits ? code_at(codes, m.row_nbytes(), r, i, m.bits) * scales.values[g] +
                            biases.values[g]
                      : plain.values[n];
  }

  const AtTheEnd x(numbers(tokens * cols));
  const int64_t nbytes = (k.row_nbytes(m, integer) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(scratch(Piece::rows, tokens * nbytes));
  std::vector<Row> prepared(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    prepared[t] = k.prepare(m, integer, x.floats() + t * cols, memory + t * nbytes);
  std::vector<float> y(tokens * rows), row(cols);
  k.product(m, integer, prepared.data(), tokens, 0, 2, y.data(), rows);  // as two threads share it
  k.product(m, integer, prepared.data(), tokens, 2, rows, y.data() + 2, rows);

  Error product, matrix;
  for (int64_t r = 0; r < rows; ++r) {
    k.dequantize(m, r, row.data());
    for (int64_t i = 0; i < cols; ++i) matrix.add(row[i], truth[r * cols + i]);
    for (int64_t t = 0; t < tokens; ++t) {
      double right = 0;
      for (int64_t i = 0; i < cols; ++i) right += truth[r * cols + i] * x.floats()[t * cols + i];
      product.add(y[t * rows + r], right);
    }
  }
  return std::max(product.value(), matrix.value());
}

bool check(const Set& set, Matrix m, bool integer) {
  const char* kinds[] = {"f32", "f16", "bf16"};
  double worst = 0;
  const int64_t unit = m.bits ? m.group : 8;
  for (int64_t cols : {unit, 256 + unit, int64_t(1024), int64_t(2048)})
    for (int64_t tokens : {1, 6}) {
      m.rows = 7, m.cols = cols;
      worst = std::fmax(worst, error(*set.kernels, m, integer, tokens));
    }
  const bool fine = worst < (integer ? 3e-4 : 2e-6);
  std::printf("%s %d bits, group %3d, %s, %s: %.1e%s\n", set.name, m.bits, m.group,
              kinds[static_cast<int>(m.kind)], integer ? "integer" : "exact", worst,
              fine ? "" : "  WRONG");
  return fine;
}

}  // namespace

int main() {
  bool good = true;
  for (const Set& set : kSets)
    for (Kind kind : {Kind::f32, Kind::f16, Kind::bf16}) {
      Matrix m;
      m.kind = kind;
      good &= check(set, m, false);
      for (int bits : {2, 3, 4, 5, 6, 8})
        for (int group : {32, 64, 128})
          for (bool integer : {false, true}) {
            m.bits = bits, m.group = group;
            good &= check(set, m, integer);
          }
    }
  return good ? 0 : 1;
}
