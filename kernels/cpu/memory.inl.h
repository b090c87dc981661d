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

constexpr int kTile = 4;

// inner() of each of four vectors with each of four others, every number loaded once: lane
// 4 * m + n is a[m] with b[n]. With `whole`, size is a multiple of 16.
template <bool whole>
inline F inner_tile(const float* const* a, const float* const* b, int64_t size) {
  F total[kTile * kTile];
  for (F& one : total) one = zero();
  for (int64_t i = 0; i < size; i += 16) {
    F other[kTile];
    for (int n = 0; n < kTile; ++n)
      other[n] = whole ? load(b[n] + i) : load_some(b[n] + i, size - i);
    for (int m = 0; m < kTile; ++m) {
      const F one = whole ? load(a[m] + i) : load_some(a[m] + i, size - i);
      for (int n = 0; n < kTile; ++n)
        total[kTile * m + n] = fma(one, other[n], total[kTile * m + n]);
    }
  }
  return sums(total);
}

// Products of queries with keys into scores [queries and up to three more, stride]. Values are
// asked for little by little: they come next, and more at a time would hold up the keys.
template <bool whole>
inline void score(const float* q, int64_t queries, int64_t dim, const float* keys,
                  const float* values, int64_t length, float* scores, int64_t stride) {
  for (int64_t i = 0; i < length; i += kTile)
    for (int64_t j = 0; j < queries; j += kTile) {
      const float *some[kTile], *with[kTile];
      for (int n = 0; n < kTile; ++n) {
        some[n] = q + smaller(j + n, queries - 1) * dim;
        with[n] = keys + smaller(i + n, length - 1) * dim;
      }
      const int64_t row = i + j / kTile;
      if (j < kTile * kTile && row < length)
        ask_for(reinterpret_cast<const uint8_t*>(values + row * dim), 4 * dim);
      float found[kTile * kTile];
      store(found, inner_tile<whole>(some, with, dim));
      for (int m = 0; m < kTile; ++m)
        std::memcpy(scores + (j + m) * stride + i, found + kTile * m, kTile * sizeof(float));
    }
}

// p [count, stride] times 16 columns of values, from column c on; a line of `next` a value.
template <int count, bool whole>
inline void mix_columns(const float* p, int64_t stride, int64_t queries, const float* values,
                        int64_t length, int64_t dim, int64_t c, const float* next, float* out) {
  F total[count];
  for (F& one : total) one = zero();
  for (int64_t i = 0; i < length; ++i) {
    const float* at = values + i * dim + c;
    __builtin_prefetch(next + c * length + 16 * i, 0, 2);
    const F v = whole ? load(at) : load_some(at, dim - c);
    for (int j = 0; j < count; ++j) total[j] = fma(all(p[j * stride + i]), v, total[j]);
  }
  for (int64_t j = 0; j < queries; ++j) store_some(out + j * (dim + 2) + c, dim - c, total[j]);
}

// The softmax of scores p without its division, times all columns of values.
template <int count>
inline void mix(float* p, int64_t stride, int64_t queries, const float* values, int64_t length,
                int64_t dim, const float* next, float* out) {
  for (int64_t j = 0; j < queries; ++j) {
    float *one = p + j * stride, *ends = out + j * (dim + 2) + dim;
    ends[0] = largest_of(one, length);
    ends[1] = exponentials(one, length, ends[0], one);
  }
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16)
    mix_columns<count, true>(p, stride, queries, values, length, dim, c, next, out);
  if (c < dim) mix_columns<count, false>(p, stride, queries, values, length, dim, c, next, out);
}

void attend(const float* q, int64_t queries, int64_t dim, const float* keys, const float* values,
            int64_t length, const float* next, float* scores, float* out) {
  const int64_t stride = padded(length, 16);
  if (dim % 16)
    score<false>(q, queries, dim, keys, values, length, scores, stride);
  else
    score<true>(q, queries, dim, keys, values, length, scores, stride);
  const int64_t count = many_registers && queries > 4 ? 16 : 4;
  for (int64_t j = 0; j < queries; j += count)
    (count == 16 ? mix<16> : mix<4>)(scores + j * stride, stride, smaller(count, queries - j),
                                     values, length, dim, next, out + j * (dim + 2));
}
