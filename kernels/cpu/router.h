// From the router's logits to experts and weights.
#pragma once

#include <cstdint>

namespace flashmoe {

// The k largest of logits [tokens, count], the largest first and the lower number at a tie; weights
// are their probabilities, divided by their sum where `normalise`.
void route(const float* logits, int64_t tokens, int64_t count, int64_t k, bool normalise,
           int32_t* experts, float* weights);

}  // namespace flashmoe
