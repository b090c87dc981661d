// Sixteen float lanes and 64 bytes of codes in two AVX2 registers each.
struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
using Bytes = I;

constexpr bool many_registers = false;  // whether 16 sums stay in them

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F root(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline F round(F x) {
  constexpr int way = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, way), _mm256_round_ps(x.b, way)};
}
inline __m256 power(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline F power(F n) { return {power(n.a), power(n.b)}; }
inline float sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
// sum() of sixteen registers, each in a lane of its own.
inline F sums(const F* a) {
  float each[16];
  for (int i = 0; i < 16; ++i) each[i] = sum(a[i]);
  return load(each);
}
inline float largest(F x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
template <int count>
inline F spread(const float* p) {
  if constexpr (count == 1) {
    return all(*p);
  } else {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    constexpr int shift = count == 2 ? 3 : count == 4 ? 2 : 1;
    const __m256 some = _mm256_loadu_ps(p);
    const __m256i first = _mm256_srli_epi32(lane, shift);
    const __m256i second = _mm256_add_epi32(first, _mm256_set1_epi32(count / 2));
    return {_mm256_permutevar8x32_ps(some, first), _mm256_permutevar8x32_ps(some, second)};
  }
}
inline __m256 load_bf16_8(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
// Sixteen scales, of which a unit of codes takes `count`, each for as many lanes.
struct Scales {
  float each[32];  // a whole register is read from the last one on
  explicit Scales(const F& a) { store(each, a), store(each + 16, a); }
  template <int count>
  F of(int unit) const {
    return spread<count>(each + count * unit);
  }
};
inline F load_f32(const void* p) { return load(static_cast<const float*>(p)); }
inline F load_bf16(const void* p) {
  const auto* half = static_cast<const uint16_t*>(p);
  return {load_bf16_8(half), load_bf16_8(half + 8)};
}
inline __m256 load_f16_8(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_f16(const void* p) {
  const auto* half = static_cast<const uint16_t*>(p);
  return {load_f16_8(half), load_f16_8(half + 8)};
}

inline Bytes load_bytes(const void* p) {
  const auto* at = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Bytes held(Bytes b) { return b; }
inline void store_bytes(void* p, Bytes b) {
  auto* at = static_cast<__m256i*>(p);
  _mm256_storeu_si256(at, b.a);
  _mm256_storeu_si256(at + 1, b.b);
}
template <int bits>
inline Bytes unpack(const uint8_t* p) {
  if constexpr (bits == 8) return load_bytes(p);
  constexpr uint64_t mask = 0x0101010101010101ull * ((1 << bits) - 1);
  uint64_t w[8];
  for (int q = 0; q < 8; ++q) w[q] = _pdep_u64(eight_codes<bits>(p, q), mask);
  return {_mm256_set_epi64x(w[3], w[2], w[1], w[0]), _mm256_set_epi64x(w[7], w[6], w[5], w[4])};
}
template <int k>
inline __m256 byte_floats(__m256i b) {
  const __m256i word = k ? _mm256_srli_epi32(b, 8 * k) : b;
  return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(255)));
}
template <int k, int bits>
inline F byte_floats(Bytes b) {
  return {byte_floats<k>(b.a), byte_floats<k>(b.b)};
}
template <int shift, int bits>
inline Bytes field(Bytes b) {
  const __m256i mask = _mm256_set1_epi16((1 << bits) - 1);
  return {_mm256_and_si256(_mm256_srli_epi16(b.a, shift), mask),
          _mm256_and_si256(_mm256_srli_epi16(b.b, shift), mask)};
}
constexpr bool has_digits = false;  // products of bytes that are exact
inline I dot_bytes(const Bytes&, const Bytes&, const I& c) { return c; }
inline I both_digits(const I&, const I& low) { return low; }
template <int first>
inline Bytes quarters(const Bytes& a, const Bytes&) {
  return a;
}
template <int shift, int bits>
inline Bytes byte_field(const Bytes& b) {
  return b;
}
inline I no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I dot(Bytes a, Bytes x, I c) {
  return {_mm256_add_epi32(c.a, _mm256_madd_epi16(a.a, x.a)),
          _mm256_add_epi32(c.b, _mm256_madd_epi16(a.b, x.b))};
}
inline F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_words(int16_t* p, F x) {
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}

constexpr bool has_table = false;
inline F code_table(const F& scale, const F&) { return scale; }
template <int k>
inline F look_up(const Bytes&, const F& table) {
  return table;
}
