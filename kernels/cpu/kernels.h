// What every instruction set provides: loops over one thread's share, on plain pointers.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace flashmoe {

// One row of activations, prepared for products with matrices of one form.
//   exact:   values float, in the order in which codes are unpacked, padded with zeros.
//   integer: values int16 in that order; scales one a span; sums of scale * value over each span.
struct Row {
  const void* values = nullptr;
  const float* scales = nullptr;
  const float* sums = nullptr;
};

constexpr int kQueries = 16;  // that attention takes at a time, a lane each

struct Kernels {
  // Room that a prepared row takes, in bytes: values, scales and sums one after another.
  int64_t (*row_nbytes)(const Matrix&, bool integer);
  // Prepare x [cols] in `memory` (64-byte aligned).
  Row (*prepare)(const Matrix&, bool integer, const float* x, void* memory);
  // y[t * y_stride + r - first] for rows r in [first, last) and each prepared row t.
  void (*product)(const Matrix&, bool integer, const Row* x, int64_t tokens, int64_t first,
                  int64_t last, float* y, int64_t y_stride);
  // Dequantise a row of the matrix to float.
  void (*dequantize)(const Matrix&, int64_t row, float* out);

  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* out);
  // silu(gate) * up
  void (*swiglu)(const float* gate, const float* up, int64_t size, float* out);
  // sigmoid(gate) * x
  void (*sigmoid_scale)(const float* gate, const float* x, int64_t size, float* out);
  // out += weight * x
  void (*accumulate)(const float* x, float weight, int64_t size, float* out);
  void (*softmax)(const float* x, int64_t size, float* out);
  // One tap after another, then silu: out[c] = silu(sum_k rows[k][c] * taps[k * stride + c]).
  void (*convolve)(const float* const* rows, const float* taps, int64_t stride, int64_t kernel,
                   int64_t size, float* out);
  // x / sqrt(sum x^2 + eps) * scale
  void (*unit)(const float* x, int64_t size, float eps, float scale, float* out);
  // One token of the delta rule for rows [first, last) of a head's S [Dv, Dk].
  void (*delta_step)(const float* q, const float* k, const float* v, float decay, float beta,
                     int64_t first, int64_t last, int64_t dk, float* state, float* out);
  // Attention of up to sixteen queries q [dim, 16] over one block of keys and values [length, dim],
  // of which query j sees lengths[j]: out [queries, dim + 2] is the unnormalised sum, the largest
  // score and the sum of exponentials, of no meaning where a query sees none. scores: room for
  // 16 * length floats; next: as many keys that may come next.
  void (*attend)(const float* q, int64_t queries, int64_t dim, const float* keys,
                 const float* values, const int64_t* lengths, int64_t length, const float* next,
                 float* scores, float* out);
  // The words combined by xor: a plain read of memory.
  uint64_t (*read_words)(const uint64_t* words, int64_t count);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

}  // namespace flashmoe
