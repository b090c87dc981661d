// What reads a sequence's memory: one step of the delta rule, attention over a block of keys.

// Reads and does nothing: what any kernel here is measured against.
uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64_t all = 0;
  for (int64_t i = 0; i < count; ++i) all ^= words[i];
  return all;
}

inline float inner(const float* a, const float* b, int64_t size) {
  F total = zero();
  for (int64_t i = 0; i < size; i += 16)
    total = fma(load_some(a + i, size - i), load_some(b + i, size - i), total);
  return sum(total);
}

// S *= decay; S += beta * (v - S k) k'; out = S q, a row of S at a time. What q sees of the new part
// is its product with k, so that one pass over a row gives both sums.
void delta_step(const float* q, const float* k, const float* v, float decay, float beta,
                int64_t first, int64_t last, int64_t dk, float* state, float* out) {
  const float both = inner(q, k, dk);
  const F fade = all(decay);
  for (int64_t r = first; r < last; ++r) {
    float* row = state + r * dk;
    F seen = zero(), asked = zero();
    for (int64_t i = 0; i < dk; i += 16) {
      const F faded = mul(load_some(row + i, dk - i), fade);
      seen = fma(faded, load_some(k + i, dk - i), seen);
      asked = fma(faded, load_some(q + i, dk - i), asked);
    }
    const float change = (v[r] - sum(seen)) * beta;
    const F times = all(change);
    for (int64_t i = 0; i < dk; i += 16)
      store_some(row + i, dk - i,
                 fma(times, load_some(k + i, dk - i), mul(load_some(row + i, dk - i), fade)));
    out[r] = sum(asked) + change * both;
  }
}

constexpr int kQueries = 8;

// p [kQueries, length] times values into out [queries, out_stride], 16 columns at a time.
inline void mix(const float* p, int64_t stride, int64_t queries, const float* values,
                int64_t length, int64_t dim, float* out, int64_t out_stride) {
  for (int64_t c = 0; c < dim; c += 16) {
    F total[kQueries];
    for (int j = 0; j < kQueries; ++j) total[j] = zero();
    for (int64_t i = 0; i < length; ++i) {
      const F v = load_some(values + i * dim + c, dim - c);
      for (int j = 0; j < kQueries; ++j) total[j] = fma(all(p[j * stride + i]), v, total[j]);
    }
    for (int64_t j = 0; j < queries; ++j) store_some(out + j * out_stride + c, dim - c, total[j]);
  }
}

// Attention of some queries [queries, dim] over a block of keys and values [length, dim].
//   scores: room for queries * (length rounded up to 16) floats, and for kQueries rows at least.
//   out: [queries, dim + 2]: the unnormalised sum, the largest score, the sum of exponentials.
void attend(const float* q, int64_t queries, int64_t dim, const float* keys, const float* values,
            int64_t length, float* scores, float* out) {
  const int64_t stride = padded(length, 16);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t c = 0; c < dim; c += 16) __builtin_prefetch(values + i * dim + c, 0, 2);
    for (int64_t j = 0; j < queries; ++j)
      scores[j * stride + i] = inner(q + j * dim, keys + i * dim, dim);
  }
  for (int64_t first = 0; first < queries; first += kQueries) {
    const int64_t some = smaller(kQueries, queries - first);
    float* p = scores + first * stride;
    for (int64_t j = 0; j < some; ++j) {
      float* result = out + (first + j) * (dim + 2);
      result[dim] = largest_of(p + j * stride, length);
      result[dim + 1] = exponentials(p + j * stride, length, result[dim], p + j * stride);
    }
    mix(p, stride, some, values, length, dim, out + first * (dim + 2), dim + 2);
  }
}
