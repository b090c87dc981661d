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

// inner() of each of some vectors with each of others, every number loaded once.
inline void inner_tile(const float* const* a, const float* const* b, int64_t size,
                       float (*out)[kTile]) {
  F total[kTile][kTile];
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < kTile; ++n) total[m][n] = zero();
  const auto step = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    F other[kTile];
    for (int n = 0; n < kTile; ++n) other[n] = load_at(b[n] + i);
    for (int m = 0; m < kTile; ++m) {
      const F one = load_at(a[m] + i);
      for (int n = 0; n < kTile; ++n) total[m][n] = fma(one, other[n], total[m][n]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) step(i, [](const float* p) { return load(p); });
  if (i < size) step(i, [&](const float* p) { return load_some(p, size - i); });
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < kTile; ++n) out[m][n] = sum(total[m][n]);
}

constexpr int kQueries = 8;

// p [kQueries, length] times `width` registers' worth of columns of values, from column c on.
template <int width>
inline void mix_columns(const float* p, int64_t stride, int64_t queries, const float* values,
                        int64_t length, int64_t dim, int64_t c, float* out, int64_t out_stride) {
  F total[kQueries][width];
  for (int j = 0; j < kQueries; ++j)
    for (int w = 0; w < width; ++w) total[j][w] = zero();
  for (int64_t i = 0; i < length; ++i) {
    const float* at = values + i * dim + c;
    F v[width];
    for (int w = 0; w < width; ++w) v[w] = width > 1 ? load(at + 16 * w) : load_some(at, dim - c);
    for (int j = 0; j < kQueries; ++j) {
      const F times = all(p[j * stride + i]);
      for (int w = 0; w < width; ++w) total[j][w] = fma(times, v[w], total[j][w]);
    }
  }
  for (int64_t j = 0; j < queries; ++j)
    for (int w = 0; w < width; ++w)
      store_some(out + j * out_stride + c + 16 * w, dim - c - 16 * w, total[j][w]);
}

// The same for all columns, into out [queries, out_stride].
inline void mix(const float* p, int64_t stride, int64_t queries, const float* values,
                int64_t length, int64_t dim, float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + 32 <= dim; c += 32)
    mix_columns<2>(p, stride, queries, values, length, dim, c, out, out_stride);
  for (; c < dim; c += 16)
    mix_columns<1>(p, stride, queries, values, length, dim, c, out, out_stride);
}

// Attention of some queries [queries, dim] over a block of keys and values [length, dim].
//   scores: room for queries * (length rounded up to 16) floats, and for kQueries rows at least.
//   out: [queries, dim + 2]: the unnormalised sum, the largest score, the sum of exponentials.
void attend(const float* q, int64_t queries, int64_t dim, const float* keys, const float* values,
            int64_t length, float* scores, float* out) {
  const int64_t stride = padded(length, 16);
  for (int64_t i = 0; i < length; i += kTile) {
    for (int64_t c = 0; c < kTile * dim; c += 16) __builtin_prefetch(values + i * dim + c, 0, 2);
    for (int64_t j = 0; j < queries; j += kTile) {
      const float *some[kTile], *with[kTile];
      for (int n = 0; n < kTile; ++n) {
        some[n] = q + smaller(j + n, queries - 1) * dim;
        with[n] = keys + smaller(i + n, length - 1) * dim;
      }
      float found[kTile][kTile];
      inner_tile(some, with, dim, found);
      for (int64_t m = 0; m < smaller(kTile, queries - j); ++m)
        for (int64_t n = 0; n < smaller(kTile, length - i); ++n)
          scores[(j + m) * stride + i + n] = found[m][n];
    }
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
