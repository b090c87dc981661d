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

// Products of `count` keys with sixteen queries, each in a lane of its own: q [dim, 16] to scores
// [count, 16]. Values are asked for little by little: they come next, and more at a time would hold
// up the keys.
template <int count>
inline void score(const float* q, int64_t dim, const float* keys, const float* values,
                  float* scores) {
  F total[count];
  for (F& one : total) one = zero();
  for (int64_t d = 0; d < dim; ++d) {
    const F one = load(q + kQueries * d);
    for (int i = 0; i < count; ++i) total[i] = fma(all(keys[i * dim + d]), one, total[i]);
    if (d % 16 == 0)
      for (int i = 0; i < count; ++i) __builtin_prefetch(values + i * dim + d, 0, 2);
  }
  for (int i = 0; i < count; ++i) store(scores + kQueries * i, total[i]);
}

// The softmax of scores [length, 16] without its division, in place; lane j has lengths[j] of them
// and zeros after those. The largest score and the sum of every lane go to `ends`.
inline void soften(float* scores, const int64_t* lengths, int64_t length, F* ends) {
  int64_t shortest = length;
  for (int j = 0; j < kQueries; ++j) shortest = smaller(shortest, lengths[j]);
  const auto put = [&](float value) {
    for (int64_t i = shortest > 0 ? shortest : 0; i < length; ++i)
      for (int j = 0; j < kQueries; ++j)
        if (i >= lengths[j]) scores[kQueries * i + j] = value;
  };
  put(-std::numeric_limits<float>::infinity());
  F top = load(scores), total = zero();
  for (int64_t i = 1; i < length; ++i) top = max(top, load(scores + kQueries * i));
  for (int64_t i = 0; i < length; ++i)
    store(scores + kQueries * i, exp(sub(load(scores + kQueries * i), top)));
  put(0.0f);
  for (int64_t i = 0; i < length; ++i) total = add(total, load(scores + kQueries * i));
  ends[0] = top, ends[1] = total;
}

// p [length, 16], from lane j on, times 16 columns of values, from column c on; a line of `next` a
// value.
template <int count, bool whole>
inline void mix_columns(const float* p, int64_t queries, const float* values, int64_t length,
                        int64_t dim, int64_t c, const float* next, float* out) {
  F total[count];
  for (F& one : total) one = zero();
  for (int64_t i = 0; i < length; ++i) {
    const float* at = values + i * dim + c;
    __builtin_prefetch(next + c * length + 16 * i, 0, 2);
    const F v = whole ? load(at) : load_some(at, dim - c);
    for (int j = 0; j < count; ++j) total[j] = fma(all(p[kQueries * i + j]), v, total[j]);
  }
  for (int64_t j = 0; j < queries; ++j) store_some(out + j * (dim + 2) + c, dim - c, total[j]);
}

template <int count>
inline void mix(const float* p, int64_t queries, const float* values, int64_t length, int64_t dim,
                const float* next, float* out) {
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16)
    mix_columns<count, true>(p, queries, values, length, dim, c, next, out);
  if (c < dim) mix_columns<count, false>(p, queries, values, length, dim, c, next, out);
}

void attend(const float* q, int64_t queries, int64_t dim, const float* keys, const float* values,
            const int64_t* lengths, int64_t length, const float* next, float* scores, float* out) {
  constexpr int some = many_registers ? 8 : 4;
  int64_t i = 0;
  for (; i + some <= length; i += some)
    score<some>(q, dim, keys + i * dim, values + i * dim, scores + kQueries * i);
  for (; i < length; ++i)
    score<1>(q, dim, keys + i * dim, values + i * dim, scores + kQueries * i);
  F ends[2];
  float found[2 * kQueries];
  soften(scores, lengths, length, ends);
  for (int k = 0; k < 2; ++k) store(found + kQueries * k, ends[k]);
  const int64_t count = many_registers && queries > 4 ? 16 : 4;
  for (int64_t j = 0; j < queries; j += count)
    (count == 16 ? mix<16> : mix<4>)(scores + j, smaller(count, queries - j), values, length, dim,
                                     next, out + j * (dim + 2));
  for (int64_t j = 0; j < queries; ++j)
    for (int k = 0; k < 2; ++k) out[j * (dim + 2) + dim + k] = found[kQueries * k + j];
}
