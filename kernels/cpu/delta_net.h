// The mixer of a linear-attention layer: projections, convolution, delta rule, gated norm.
#pragma once

#include "matrix.h"

namespace flashmoe {

struct DeltaNet {
  Matrix qkv, z, b, a, out;
  const float* taps = nullptr;     // [kernel, channels]
  const float* a_log = nullptr;    // [v_heads]
  const float* dt_bias = nullptr;  // [v_heads]
  const float* norm = nullptr;     // [v_dim]
  float eps = 0;                   // of the norm
  int64_t kernel = 0, k_heads = 0, k_dim = 0, v_heads = 0, v_dim = 0;

  int64_t channels() const { return 2 * k_heads * k_dim + v_heads * v_dim; }
};

// x [tokens, hidden] -> out [tokens, hidden]. conv [kernel - 1, channels] and recurrent
// [v_heads, v_dim, k_dim] move on in place.
void delta_net(const DeltaNet& d, const float* x, int64_t tokens, float* conv, float* recurrent,
               float* out);

}  // namespace flashmoe
