// exp, sigmoid and silu in lanes, and walking over vectors whose length is no multiple of 16.

inline F exp(F x) {
  x = max(all(-87.3f), min(all(88.0f), x));
  const F n = round(mul(x, all(1.44269504f)));
  F r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), all(1.0f));
  return mul(p, power(n));
}
inline F sigmoid(F x) { return div(all(1.0f), add(all(1.0f), exp(sub(zero(), x)))); }
// Below -88 exp ends, and an x that goes on would grow again. A NaN stays one.
inline F silu(F x) { return mul(max(all(-88.0f), x), sigmoid(x)); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The numbers at p that there are, zeros for the rest.
inline F load_some(const float* p, int64_t count) {
  if (count >= 16) return load(p);
  float some[16] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load(some);
}
inline void store_some(float* p, int64_t count, F a) {
  if (count >= 16) return store(p, a);
  float some[16];
  store(some, a);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// out[i] = op(i-th lanes of each input)
template <class Op>
inline void map(const float* x, int64_t size, float* out, Op op) {
  for (int64_t i = 0; i < size; i += 16)
    store_some(out + i, size - i, op(load_some(x + i, size - i)));
}
template <class Op>
inline void map(const float* x, const float* y, int64_t size, float* out, Op op) {
  for (int64_t i = 0; i < size; i += 16)
    store_some(out + i, size - i, op(load_some(x + i, size - i), load_some(y + i, size - i)));
}

// One number's worth of 16, of any kind.
inline F load_numbers(Kind kind, const uint8_t* p, int64_t index) {
  if (kind == Kind::f32) return load_f32(p + 4 * index);
  return kind == Kind::bf16 ? load_bf16(p + 2 * index) : load_f16(p + 2 * index);
}
inline F load_numbers(Kind kind, const uint8_t* p, int64_t index, int64_t count) {
  if (count >= 16) return load_numbers(kind, p, index);
  uint8_t some[64] = {};
  const int64_t size = nbytes_of(kind);
  std::memcpy(some, p + size * index, size * count);
  return load_numbers(kind, some, 0);
}
