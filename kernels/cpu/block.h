// A whole layer in two calls: all that comes before the experts are known, and all that follows.
// The arithmetic is that of the stages one by one, to the bit.
#pragma once

#include "attention.h"
#include "delta_net.h"
#include "experts.h"

namespace flashmoe {

struct Norm {
  const float* weight = nullptr;
  float eps = 0;
};

struct Block {
  Norm input_norm, post_norm;
  const DeltaNet* delta = nullptr;  // one of the two
  const Attention* attention = nullptr;
  Matrix router;
  bool normalise = true;
  SharedExpert shared;

  int64_t hidden() const { return router.cols; }
};

// What a sequence carries for this layer, written in place.
struct Memory {
  float *conv = nullptr, *recurrent = nullptr;
  float *keys = nullptr, *values = nullptr;
  int64_t position = 0, size = 0;
};

// Where results go: [tokens, hidden] but logits [tokens, experts], experts and weights [tokens, k].
struct Before {
  float *stream, *normed, *shared, *logits, *weights;
  int32_t* experts;
};

// Norm, mixer, residual, norm, router, shared expert.
void run_before(const Block& block, const float* x, int64_t tokens, int64_t k,
                const Memory& memory, const Before& out);

// out = stream + experts(normed) + shared; slots [tokens, k] say where each pair's expert lies.
void run_after(const ExpertStacks& stacks, const float* normed, const float* stream,
               const float* shared, int64_t tokens, int64_t k, const int64_t* slots,
               const float* weights, float* out);

}  // namespace flashmoe
