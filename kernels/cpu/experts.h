// SwiGLU experts: the routed ones, straight from the memory that they were read into, and the
// shared one.
#pragma once

#include <vector>

#include "matrix.h"

namespace flashmoe {

// The same matrix of many experts: one every few bytes.
struct Stack {
  Matrix first;
  int64_t count = 0, weight_stride = 0, scales_stride = 0, biases_stride = 0;

  Matrix operator[](int64_t slot) const {
    return first.moved(slot * weight_stride, slot * scales_stride, slot * biases_stride);
  }
};

struct ExpertStacks {
  Stack gate, up, down;
};

// out [pairs, hidden]: pair p is token tokens[p] of x [count, hidden] through the expert in
// slots[p]; pairs of one slot stand together.
void expert_mlp(const ExpertStacks& stacks, const float* x, int64_t count, const int64_t* tokens,
                const int64_t* slots, int64_t pairs, float* out);

// out [count, hidden] = sum over ranks of weights[t, rank] * y[t * k + rank]
void weighted_sum(const float* y, const float* weights, int64_t count, int64_t k, int64_t hidden,
                  float* out);

struct SharedExpert {
  Matrix gate, up, down, scalar_gate;
};

// sigmoid(scalar_gate(x)) * down(silu(gate(x)) * up(x))
void shared_expert(const SharedExpert& e, const float* x, int64_t count, float* out);

}  // namespace flashmoe
