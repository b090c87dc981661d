#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace flashmoe {
namespace {

// Keys are taken in blocks that begin at multiples of this, whoever computes them and whatever
// comes with them, and blocks are put together in order: so a row's bits never change.
constexpr int64_t kBlock = 256;

// Halves i and i + rotary_dim / 2 of a head are a pair; cosines and sines [rotary_dim / 2].
void rotate(float* x, int64_t half, const float* cosines, const float* sines) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

// Normalise and rotate a token's queries and its key, put key and value in their place.
void place(const Attention& a, int64_t position, float* q, float* k, const float* v, float* keys,
           float* values, int64_t size) {
  const Kernels& kernel = kernels();
  const int64_t half = a.rotary_dim / 2;
  std::vector<float> angles(2 * half);
  for (int64_t i = 0; i < half; ++i) {
    const double angle = position * std::pow(a.rope_theta, -static_cast<double>(i) / half);
    angles[i] = static_cast<float>(std::cos(angle));
    angles[half + i] = static_cast<float>(std::sin(angle));
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
  for (int64_t h = 0; h < a.heads; ++h) {
    float* one = q + h * 2 * a.dim;  // its gate lies beside it
    kernel.rms_norm(one, a.q_norm, a.dim, a.eps, one);
    rotate(one, half, angles.data(), angles.data() + half);
    for (int64_t i = 0; i < a.dim; ++i) one[i] *= scale;
  }
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    const int64_t to = (h * size + position) * a.dim;
    kernel.rms_norm(k + h * a.dim, a.k_norm, a.dim, a.eps, keys + to);
    rotate(keys + to, half, angles.data(), angles.data() + half);
    std::memcpy(values + to, v + h * a.dim, 4 * a.dim);
  }
}

// One block's part is [dim + 2]: a sum, the largest score in it and the sum of exponentials.
void merge(float* total, const float* part, int64_t dim) {
  const float top = std::max(total[dim], part[dim]);
  const float keep = std::exp(total[dim] - top), add = std::exp(part[dim] - top);
  for (int64_t i = 0; i < dim; ++i) total[i] = total[i] * keep + part[i] * add;
  total[dim] = top;
  total[dim + 1] = total[dim + 1] * keep + part[dim + 1] * add;
}

}  // namespace

void attention(const Attention& a, const float* x, int64_t tokens, int64_t position, float* keys,
               float* values, int64_t size, float* out) {
  const int64_t dim = a.dim, group = a.heads / a.kv_heads, kv = a.kv_heads * dim;
  const int64_t blocks = (position + tokens + kBlock - 1) / kBlock, part = kQueries * (dim + 2);
  auto* work = static_cast<float*>(
      scratch(Piece::hidden, 4 * tokens * (3 * a.heads * dim + 2 * kv)));
  float *q = work, *k = q + tokens * 2 * a.heads * dim, *v = k + tokens * kv;
  float* mixed = v + tokens * kv;
  const Matrix* ms[] = {&a.q, &a.k, &a.v};
  float* ys[] = {q, k, v};
  linear(ms, ys, 3, x, tokens);
  parallel_for(tokens, [&](int64_t t) {
    place(a, position + t, q + t * 2 * a.heads * dim, k + t * kv, v + t * kv, keys, values, size);
  });

  // A task is a key head, sixteen of its queries, token by token, and some of their blocks: a few by
  // themselves where there are few tokens, else all of them.
  const bool few = tokens < 8;
  const int64_t sixteens = (tokens * group + kQueries - 1) / kQueries;
  const int64_t fair = blocks * a.kv_heads * sixteens / (4 * threads());
  const int64_t run = few ? std::clamp<int64_t>(fair, 1, 8) : blocks;
  const int64_t runs = (blocks + run - 1) / run, kept = few ? blocks : 1;
  auto* parts = static_cast<float*>(
      scratch(Piece::stage, 4 * a.kv_heads * sixteens * kept * part));
  parallel_for(a.kv_heads * sixteens * runs, [&](int64_t n) {
    const int64_t head = n / runs / sixteens, begin = n / runs % sixteens * kQueries;
    const int64_t queries = std::min<int64_t>(kQueries, tokens * group - begin);
    const int64_t end = position + (begin + queries - 1) / group + 1;  // keys of the last query
    auto* memory = static_cast<float*>(
        scratch(Piece::numbers, 4 * (kQueries * (dim + kBlock) + part)));
    float *lanes = memory, *extra = lanes + kQueries * dim, *scores = extra + part;
    for (int64_t j = 0; j < kQueries; ++j) {  // what is beyond the last query is that one again
      const int64_t one = begin + std::min(j, queries - 1);
      const float* from = q + (one / group * a.heads + head * group + one % group) * 2 * dim;
      for (int64_t i = 0; i < dim; ++i) lanes[kQueries * i + j] = from[i];
    }
    float* total = parts + n / runs * kept * part;
    const int64_t first = n % runs * run;
    const int64_t last = std::min(first + run, (end + kBlock - 1) / kBlock);
    for (int64_t b = first; b < last; ++b) {
      int64_t lengths[kQueries];
      for (int64_t j = 0; j < kQueries; ++j)
        lengths[j] = position + (begin + std::min(j, queries - 1)) / group + 1 - b * kBlock;
      const int64_t from = (head * size + b * kBlock) * dim;
      // Also beyond `last`: there the thread's next task begins.
      const float* next = keys + from + ((b + 1) * kBlock < end ? kBlock * dim : 0);
      float* out = few ? total + b * part : b ? extra : total;
      kernels().attend(lanes, queries, dim, keys + from, values + from, lengths,
                       std::min(kBlock, end - b * kBlock), next, scores, out);
      if (out == extra)
        for (int64_t j = 0; j < queries; ++j)
          if (lengths[j] > 0) merge(total + j * (dim + 2), extra + j * (dim + 2), dim);
    }
  });
  parallel_for(tokens * a.heads, [&](int64_t n) {
    const int64_t t = n / a.heads, h = n % a.heads, used = (position + t) / kBlock + 1;
    const int64_t one = t * group + h % group;
    float* first = parts + (h / group * sixteens + one / kQueries) * kept * part +
                   one % kQueries * (dim + 2);
    for (int64_t b = 1; b < std::min(kept, used); ++b) merge(first, first + b * part, dim);
    float* to = mixed + n * dim;
    for (int64_t i = 0; i < dim; ++i) to[i] = first[i] / first[dim + 1];
    kernels().sigmoid_scale(q + n * 2 * dim + dim, to, dim, to);
  });
  linear(a.out, mixed, tokens, out);
}

}  // namespace flashmoe
