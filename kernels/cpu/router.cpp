#include "router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace flashmoe {

void route(const float* logits, int64_t tokens, int64_t count, int64_t k, bool normalise,
           int32_t* experts, float* weights) {
  static thread_local std::vector<float> p;
  static thread_local std::vector<int32_t> order;
  p.resize(count);
  order.resize(count);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = logits + t * count;
    kernels().softmax(row, count, p.data());
    std::iota(order.begin(), order.end(), 0);
    // NaN goes last: an order must be one whatever the numbers are.
    const auto before = [&](int32_t a, int32_t b) {
      const bool no_a = std::isnan(row[a]), no_b = std::isnan(row[b]);
      if (no_a || no_b) return no_a == no_b ? a < b : no_b;
      return row[a] != row[b] ? row[a] > row[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    float total = 0;
    for (int64_t i = 0; i < k; ++i) {
      experts[t * k + i] = order[i];
      weights[t * k + i] = p[order[i]];
      total += p[order[i]];
    }
    if (normalise)
      for (int64_t i = 0; i < k; ++i) weights[t * k + i] /= total;
  }
}

}  // namespace flashmoe
