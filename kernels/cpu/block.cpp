#include "block.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "router.h"
#include "scratch.h"
#include "threads.h"

namespace flashmoe {
namespace {

void norm_rows(const Norm& norm, const float* x, int64_t tokens, int64_t size, float* out) {
  for (int64_t t = 0; t < tokens; ++t)
    kernels().rms_norm(x + t * size, norm.weight, size, norm.eps, out + t * size);
}

void add(const float* a, const float* b, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = a[i] + b[i];
}

}  // namespace

void run_before(const Block& block, const float* x, int64_t tokens, int64_t k,
                const Memory& memory, const Before& out) {
  const int64_t hidden = block.hidden(), size = tokens * hidden;
  norm_rows(block.input_norm, x, tokens, hidden, out.normed);
  if (block.delta)
    delta_net(*block.delta, out.normed, tokens, memory.conv, memory.recurrent, out.stream);
  else
    attention(*block.attention, out.normed, tokens, memory.position, memory.keys, memory.values,
              memory.size, out.stream);
  add(x, out.stream, size, out.stream);
  norm_rows(block.post_norm, out.stream, tokens, hidden, out.normed);
  linear(block.router, out.normed, tokens, out.logits);
  route(out.logits, tokens, block.router.rows, k, block.normalise, out.experts, out.weights);
  shared_expert(block.shared, out.normed, tokens, out.shared);
}

void run_after(const ExpertStacks& stacks, const float* normed, const float* stream,
               const float* shared, int64_t tokens, int64_t k, const int64_t* slots,
               const float* weights, float* out) {
  static thread_local std::vector<int64_t> order, pair_tokens, pair_slots;
  const int64_t pairs = tokens * k, hidden = stacks.down.first.rows;
  order.resize(pairs);
  pair_tokens.resize(pairs);
  pair_slots.resize(pairs);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [=](int64_t a, int64_t b) { return slots[a] < slots[b]; });
  for (int64_t p = 0; p < pairs; ++p) {
    pair_tokens[p] = order[p] / k;
    pair_slots[p] = slots[order[p]];
  }
  auto* products = static_cast<float*>(scratch(Piece::products, 8 * pairs * hidden));
  float* by_rank = products + pairs * hidden;
  expert_mlp(stacks, normed, tokens, pair_tokens.data(), pair_slots.data(), pairs, products);
  for (int64_t p = 0; p < pairs; ++p)
    std::copy_n(products + p * hidden, hidden, by_rank + order[p] * hidden);
  weighted_sum(by_rank, weights, tokens, k, hidden, out);
  add(stream, out, tokens * hidden, out);
  add(out, shared, tokens * hidden, out);
}

}  // namespace flashmoe
