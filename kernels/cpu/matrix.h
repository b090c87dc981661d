// A weight matrix as it lies in memory: it owns nothing.
#pragma once

#include <cstdint>

namespace flashmoe {

enum class Kind { f32, f16, bf16 };

inline int64_t nbytes_of(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

// y = x W^T with W [rows, cols], its rows one after another. With bits, `weight` holds codes, a
// little-endian stream of bits, and w = code * scale + bias with one scale and bias for each
// `group` columns; without, it holds numbers of `kind`.
struct Matrix {
  const uint8_t* weight = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* biases = nullptr;
  int64_t rows = 0, cols = 0;
  int bits = 0, group = 0;
  Kind kind = Kind::f32;  // of the numbers, or of scales and biases

  int64_t row_nbytes() const { return bits ? cols / 8 * bits : cols * nbytes_of(kind); }
  int64_t groups() const { return cols / group; }
  // Columns that share a scale as the kernels see them: they work on 64 columns at a time.
  int span() const { return group < 64 ? group : 64; }
  // The same matrix of another expert.
  Matrix moved(int64_t weight_nbytes, int64_t scales_nbytes, int64_t biases_nbytes) const {
    Matrix other = *this;
    other.weight += weight_nbytes;
    if (bits) other.scales += scales_nbytes, other.biases += biases_nbytes;
    return other;
  }
};

}  // namespace flashmoe
