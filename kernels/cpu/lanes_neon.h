// Sixteen float lanes and 64 bytes of codes in four NEON registers each.
struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
struct Bytes {
  uint8x16_t v[4];
};

template <class Out, class Op>
inline Out four_of(Op op) {
  return Out{{op(0), op(1), op(2), op(3)}};
}
template <class Op>
inline F each(Op op) {
  return four_of<F>(op);
}

inline F all(float x) { return each([=](int) { return vdupq_n_f32(x); }); }
constexpr bool many_registers = false;  // whether 16 sums stay in them

inline F zero() { return all(0.0f); }
inline F load(const float* p) { return each([=](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store(float* p, const F& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F add(const F& a, const F& b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F sub(const F& a, const F& b) {
  return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F mul(const F& a, const F& b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F div(const F& a, const F& b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F fma(const F& a, const F& b, const F& c) {
  return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// As on x86 the second operand is taken where one is NaN, which exp relies on.
inline F max(const F& a, const F& b) {
  return each([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline F min(const F& a, const F& b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline F abs(const F& a) { return each([&](int i) { return vabsq_f32(a.v[i]); }); }
inline F root(const F& a) { return each([&](int i) { return vsqrtq_f32(a.v[i]); }); }
inline F round(const F& a) { return each([&](int i) { return vrndnq_f32(a.v[i]); }); }
inline F power(const F& n) {
  return each([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
  });
}
inline float sum(const F& a) {
  const float32x4_t s = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
// sum() of sixteen registers, each in a lane of its own.
inline F sums(const F* a) {
  float each[16];
  for (int i = 0; i < 16; ++i) each[i] = sum(a[i]);
  return load(each);
}
inline float largest(const F& a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
template <int count>
inline F spread(const float* p) {
  if constexpr (count == 8)
    return each([=](int i) {
      return vcombine_f32(vdup_n_f32(p[2 * i]), vdup_n_f32(p[2 * i + 1]));
    });
  return each([=](int i) { return vdupq_n_f32(p[i * count / 4]); });
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
  return each([=](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + 4 * i), 16));
  });
}
inline F load_f16(const void* p) {
  const auto* half = static_cast<const uint16_t*>(p);
  return each([=](int i) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i)));
  });
}

inline Bytes load_bytes(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  return four_of<Bytes>([=](int i) { return vld1q_u8(at + 16 * i); });
}
inline const Bytes& held(const Bytes& b) { return b; }
inline void store_bytes(void* p, const Bytes& b) {
  for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, b.v[i]);
}
template <int bits>
inline Bytes unpack(const uint8_t* p) {
  if constexpr (bits == 8) return load_bytes(p);
  return four_of<Bytes>([=](int i) {
    const uint64_t low = spread_codes<bits>(eight_codes<bits>(p, 2 * i));
    const uint64_t high = spread_codes<bits>(eight_codes<bits>(p, 2 * i + 1));
    return vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(low), vcreate_u64(high)));
  });
}
template <int k, int bits>
inline F byte_floats(const Bytes& b) {
  return each([&](int i) {
    const uint32x4_t word = vreinterpretq_u32_u8(b.v[i]);
    const uint32x4_t byte = vshlq_u32(word, vdupq_n_s32(-8 * k));
    return vcvtq_f32_u32(vandq_u32(byte, vdupq_n_u32(255)));
  });
}
template <int shift, int bits>
inline Bytes field(const Bytes& b) {
  return four_of<Bytes>([&](int i) {
    const uint16x8_t word = vshlq_u16(vreinterpretq_u16_u8(b.v[i]), vdupq_n_s16(-shift));
    return vreinterpretq_u8_u16(vandq_u16(word, vdupq_n_u16((1 << bits) - 1)));
  });
}
constexpr bool has_digits = false;  // codes of 8 bits do not fit the signed product of bytes
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
inline I no_ints() {
  return four_of<I>([](int) { return vdupq_n_s32(0); });
}
inline I dot(const Bytes& a, const Bytes& b, const I& c) {
  return four_of<I>([&](int i) {
    const int16x8_t x = vreinterpretq_s16_u8(a.v[i]), y = vreinterpretq_s16_u8(b.v[i]);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    const int32x4_t high = vmull_high_s16(x, y);
    return vaddq_s32(c.v[i], vpaddq_s32(low, high));
  });
}
inline F floats(const I& a) { return each([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
inline void store_words(int16_t* p, const F& a) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vqmovn_s32(vcvtnq_s32_f32(a.v[i])));
}

constexpr bool has_table = false;
inline F code_table(const F& scale, const F&) { return scale; }
template <int k>
inline F look_up(const Bytes&, const F& table) {
  return table;
}
