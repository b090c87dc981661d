// The mixer of a full-attention layer: projections, norms, rotation, attention, output gate.
#pragma once

#include "matrix.h"

namespace flashmoe {

struct Attention {
  Matrix q, k, v, out;
  const float* q_norm = nullptr;  // [dim]
  const float* k_norm = nullptr;  // [dim]
  float eps = 0;
  double rope_theta = 0;
  int64_t heads = 0, kv_heads = 0, dim = 0, rotary_dim = 0;
};

// x [tokens, hidden] -> out [tokens, hidden]. The first token stands at `position`; keys and values
// [kv_heads, size, dim] have room for position + tokens and take the new ones.
void attention(const Attention& a, const float* x, int64_t tokens, int64_t position, float* keys,
               float* values, int64_t size, float* out);

}  // namespace flashmoe
