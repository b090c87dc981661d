#include "delta_net.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace flashmoe {
namespace {

constexpr float kEps = 1e-6f;  // of the l2 norms of q and k

// What the projections gave, for all tokens.
struct Inputs {
  const float *qkv, *z, *b, *a;
};

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// One key head with its value heads, token after token. `mixed` [tokens, v_heads * v_dim].
void run_head(const DeltaNet& d, const Inputs& in, int64_t tokens, const float* conv,
              float* recurrent, int64_t head, float* mixed) {
  const Kernels& k = kernels();
  const int64_t channels = d.channels(), keys = d.k_heads * d.k_dim, ratio = d.v_heads / d.k_heads;
  auto* work = static_cast<float*>(
      scratch(Piece::numbers, 4 * (2 * d.k_dim + 2 * ratio * d.v_dim + 64)));
  float *q = work, *key = q + d.k_dim, *v = key + d.k_dim, *gated = v + ratio * d.v_dim;
  const int64_t at_v = 2 * keys + head * ratio * d.v_dim;
  std::vector<const float*> rows(d.kernel);
  const auto convolved = [&](int64_t t, int64_t channel, int64_t size, float* out) {
    for (int64_t i = 0; i < d.kernel; ++i) {
      const int64_t from = t + i - (d.kernel - 1);  // before the first token lies the state
      rows[i] = (from < 0 ? conv + (from + d.kernel - 1) * channels : in.qkv + from * channels) +
                channel;
    }
    k.convolve(rows.data(), d.taps + channel, channels, d.kernel, size, out);
  };
  for (int64_t t = 0; t < tokens; ++t) {
    convolved(t, head * d.k_dim, d.k_dim, q);
    convolved(t, keys + head * d.k_dim, d.k_dim, key);
    convolved(t, at_v, ratio * d.v_dim, v);
    k.unit(q, d.k_dim, kEps, 1.0f / std::sqrt(static_cast<float>(d.k_dim)), q);
    k.unit(key, d.k_dim, kEps, 1.0f, key);
    for (int64_t j = 0; j < ratio; ++j) {
      const int64_t h = head * ratio + j;
      const float rate = softplus(in.a[t * d.v_heads + h] + d.dt_bias[h]);
      const float decay = std::exp(-std::exp(d.a_log[h]) * rate);
      const float beta = 1.0f / (1.0f + std::exp(-in.b[t * d.v_heads + h]));
      float* out = mixed + (t * d.v_heads + h) * d.v_dim;
      k.delta_step(q, key, v + j * d.v_dim, decay, beta, 0, d.v_dim, d.k_dim,
                   recurrent + h * d.v_dim * d.k_dim, out);
      k.rms_norm(out, d.norm, d.v_dim, d.eps, gated);
      k.swiglu(in.z + (t * d.v_heads + h) * d.v_dim, gated, d.v_dim, out);
    }
  }
}

// The last inputs of the convolution become its state.
void keep_inputs(const DeltaNet& d, const float* qkv, int64_t tokens, float* conv) {
  const int64_t channels = d.channels(), kept = d.kernel - 1;
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t from = tokens + i - kept;
    const float* row = from < 0 ? conv + (from + kept) * channels : qkv + from * channels;
    std::memmove(conv + i * channels, row, 4 * channels);
  }
}

}  // namespace

void delta_net(const DeltaNet& d, const float* x, int64_t tokens, float* conv, float* recurrent,
               float* out) {
  const int64_t width = d.v_heads * d.v_dim, channels = d.channels();
  auto* work = static_cast<float*>(
      scratch(Piece::hidden, 4 * tokens * (channels + 2 * width + 2 * d.v_heads)));
  float *qkv = work, *z = qkv + tokens * channels, *b = z + tokens * width;
  float *a = b + tokens * d.v_heads, *mixed = a + tokens * d.v_heads;
  const Matrix* ms[] = {&d.qkv, &d.z, &d.b, &d.a};
  float* ys[] = {qkv, z, b, a};
  linear(ms, ys, 4, x, tokens);
  const Inputs in{qkv, z, b, a};
  parallel_for(d.k_heads, [&](int64_t head) {
    run_head(d, in, tokens, conv, recurrent, head, mixed);
  });
  keep_inputs(d, qkv, tokens, conv);
  linear(d.out, mixed, tokens, out);
}

}  // namespace flashmoe
