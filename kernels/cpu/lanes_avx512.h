// Sixteen float lanes and 64 bytes of codes in one AVX-512 register each.
using F = __m512;
using I = __m512i;
using Bytes = __m512i;

constexpr bool many_registers = true;  // whether 16 sums stay in them

inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F root(F a) { return _mm512_sqrt_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline F power(F n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
inline float sum(F a) {
  __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
// sum() of sixteen registers, in the same order, each in a lane of its own.
template <int distance>
inline F fold(F a, F b) {
  constexpr __mmask16 upper =
      distance == 8 ? 0xff00 : distance == 4 ? 0xf0f0 : distance == 2 ? 0xcccc : 0xaaaa;
  const F kept = _mm512_mask_blend_ps(upper, a, b), other = _mm512_mask_blend_ps(upper, b, a);
  if constexpr (distance == 8) return add(kept, _mm512_shuffle_f32x4(other, other, 0x4e));
  if constexpr (distance == 4) return add(kept, _mm512_shuffle_f32x4(other, other, 0xb1));
  return add(kept, _mm512_permute_ps(other, distance == 2 ? 0x4e : 0xb1));
}
template <int distance = 8>
inline F sums(const F* a) {
  F half[distance];
  for (int i = 0; i < distance; ++i) half[i] = fold<distance>(a[i], a[i + distance]);
  if constexpr (distance == 1)
    return half[0];
  else
    return sums<distance / 2>(half);
}
inline float largest(F a) { return _mm512_reduce_max_ps(a); }
template <int count>
inline F spread(const float* p) {
  if constexpr (count == 1) {
    return _mm512_set1_ps(*p);
  } else {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    constexpr int shift = count == 2 ? 3 : count == 4 ? 2 : 1;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), load(p));
  }
}
// Sixteen scales, of which a unit of codes takes `count`, each for as many lanes.
struct Scales {
  F each;
  explicit Scales(F a) : each(a) {}
  template <int count>
  F of(int unit) const {
    constexpr int shift = count == 1 ? 4 : count == 2 ? 3 : count == 4 ? 2 : 1;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first = _mm512_srli_epi32(lane, shift);
    return _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(count * unit)), each);
  }
};
inline F load_f32(const void* p) { return _mm512_loadu_ps(p); }
inline F load_bf16(const void* p) {
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline F load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
// Compilers would rather load again than keep a register; loads are what is scarce here.
inline Bytes held(Bytes b) {
  asm("" : "+v"(b));
  return b;
}
inline void store_bytes(void* p, Bytes b) { _mm512_storeu_si512(p, b); }

#ifdef __AVX512VBMI__
// For each of 64 codes the bytes of its group of eight, then the bits themselves.
template <int bits>
struct Places {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint8_t shifts[64];
  constexpr Places() : bytes(), shifts() {
    for (int q = 0; q < 8; ++q)
      for (int i = 0; i < 8; ++i) {
        bytes[8 * q + i] = static_cast<uint8_t>(q * bits + i);
        shifts[8 * q + i] = static_cast<uint8_t>(bits * i);
      }
  }
};
template <int bits>
constexpr Places<bits> places{};

template <int bits>
inline Bytes unpack(const uint8_t* p) {
  if constexpr (bits == 8) {
    return load_bytes(p);
  } else {
    const __mmask64 some = (1ull << 8 * bits) - 1;
    Bytes raw = _mm512_maskz_loadu_epi8(some, p);
    if constexpr (bits == 4)
      raw = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    raw = _mm512_permutexvar_epi8(_mm512_load_si512(places<bits>.bytes), raw);
    raw = _mm512_multishift_epi64_epi8(_mm512_load_si512(places<bits>.shifts), raw);
    return _mm512_and_si512(raw, _mm512_set1_epi8((1 << bits) - 1));
  }
}
#else
template <int bits>
inline Bytes unpack(const uint8_t* p) {
  if constexpr (bits == 8) return load_bytes(p);
  constexpr uint64_t mask = 0x0101010101010101ull * ((1 << bits) - 1);
  uint64_t w[8];
  for (int q = 0; q < 8; ++q) w[q] = _pdep_u64(eight_codes<bits>(p, q), mask);
  return _mm512_set_epi64(w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]);
}
#endif

template <int k, int bits>
inline F byte_floats(Bytes b) {
  const __m512i word = k ? _mm512_srli_epi32(b, 8 * k) : b;
  if constexpr (bits <= 4) {  // a look-up reads the low four bits only
    const F numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(word, numbers);
  }
  const __m512i code = k == 3 ? word : _mm512_and_si512(word, _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(code);
}
// The sixteen values that codes of up to four bits can have in one group.
constexpr bool has_table = true;
inline F code_table(F scale, F bias) {
  const F numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_fmadd_ps(numbers, scale, bias);
}
template <int k>
inline F look_up(Bytes b, F table) {
  return _mm512_permutexvar_ps(k ? _mm512_srli_epi32(b, 8 * k) : b, table);
}
template <int shift, int bits>
inline Bytes field(Bytes b) {
  const __m512i word = shift ? _mm512_srli_epi16(b, shift) : b;
  if constexpr (shift + bits == 16) return word;
  return _mm512_and_si512(word, _mm512_set1_epi16((1 << bits) - 1));
}
// c + a * b of bytes, the four of each 32-bit lane added up: codes are unsigned, digits signed
#ifdef __AVX512VNNI__
constexpr bool has_digits = true;
inline I dot_bytes(Bytes a, Bytes b, I c) { return _mm512_dpbusd_epi32(c, a, b); }
#else
constexpr bool has_digits = false;
inline I dot_bytes(Bytes, Bytes, I c) { return c; }
#endif
inline I both_digits(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
// Quarters 0 and 2, or 1 and 3, of two registers.
template <int first>
inline Bytes quarters(Bytes a, Bytes b) {
  return _mm512_shuffle_i32x4(a, b, first ? 0xdd : 0x88);
}
template <int shift, int bits>
inline Bytes byte_field(Bytes b) {
  if constexpr (bits == 8) return b;
  return _mm512_and_si512(shift ? _mm512_srli_epi16(b, shift) : b,
                          _mm512_set1_epi8((1 << bits) - 1));
}
inline I no_ints() { return _mm512_setzero_si512(); }
inline I dot(Bytes a, Bytes b, I c) {
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(c, a, b);
#else
  return _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
#endif
}
inline F floats(I a) { return _mm512_cvtepi32_ps(a); }
inline void store_words(int16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}
