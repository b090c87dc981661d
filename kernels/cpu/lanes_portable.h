// Sixteen float lanes and 64 bytes of codes in plain C++: the form that every machine has.
struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

template <class Op>
inline F each(Op op) {
  F out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}

constexpr bool many_registers = false;  // whether 16 sums stay in them

inline F zero() { return each([](int) { return 0.0f; }); }
inline F all(float x) { return each([=](int) { return x; }); }
inline F load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, const F& a) { std::memcpy(p, a.v, sizeof a.v); }
inline F add(const F& a, const F& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(const F& a, const F& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(const F& a, const F& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(const F& a, const F& b, const F& c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F max(const F& a, const F& b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(const F& a, const F& b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F abs(const F& a) { return each([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; }); }
inline F root(const F& a) { return each([&](int i) { return std::sqrt(a.v[i]); }); }
inline F round(const F& a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
// 2^n for whole n in [-126, 127]
inline F power(const F& n) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  });
}
inline float sum(const F& a) {
  float s[16];
  std::memcpy(s, a.v, sizeof s);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}
// sum() of sixteen registers, each in a lane of its own.
inline F sums(const F* a) {
  float each[16];
  for (int i = 0; i < 16; ++i) each[i] = sum(a[i]);
  return load(each);
}
inline float largest(const F& a) {
  float best = a.v[0];
  for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
// p[lane * count / 16]
template <int count>
inline F spread(const float* p) {
  return each([=](int i) { return p[i * count / 16]; });
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
inline F load_f32(const void* p) {
  F out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline F load_bf16(const void* p) {
  uint16_t half[16];
  std::memcpy(half, p, sizeof half);
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  });
}
inline F load_f16(const void* p) {
  uint16_t half[16];
  std::memcpy(half, p, sizeof half);
  return each([&](int i) { return half_to_float(half[i]); });
}

// 64 bytes, seen as 32 words of 16 bits or 16 of 32.
struct Bytes {
  uint8_t v[64];
};
inline Bytes load_bytes(const void* p) {
  Bytes out;
  std::memcpy(out.v, p, 64);
  return out;
}
template <int bits>
inline Bytes unpack(const uint8_t* p) {
  Bytes out;
  for (int q = 0; q < 8; ++q) {
    const uint64_t codes = spread_codes<bits>(eight_codes<bits>(p, q));
    std::memcpy(out.v + 8 * q, &codes, 8);
  }
  return out;
}
// The k-th byte of every 32-bit word, as floats.
template <int k, int bits>
inline F byte_floats(const Bytes& b) {
  return each([&](int i) { return static_cast<float>(b.v[4 * i + k]); });
}
// The field at `shift` of every 16-bit word, as 16-bit words.
template <int shift, int bits>
inline Bytes field(const Bytes& b) {
  Bytes out;
  for (int i = 0; i < 32; ++i) {
    uint16_t w;
    std::memcpy(&w, b.v + 2 * i, 2);
    w = static_cast<uint16_t>(w >> shift & ((1 << bits) - 1));
    std::memcpy(out.v + 2 * i, &w, 2);
  }
  return out;
}
inline const Bytes& held(const Bytes& b) { return b; }
inline void store_bytes(void* p, const Bytes& b) { std::memcpy(p, b.v, 64); }
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
inline I no_ints() { return I{}; }
// c + a * b of 16-bit words, the two of each 32-bit lane added up
inline I dot(const Bytes& a, const Bytes& x, const I& c) {
  int16_t w[32], b[32];
  std::memcpy(w, a.v, 64);
  std::memcpy(b, x.v, 64);
  I out;
  for (int i = 0; i < 16; ++i)
    out.v[i] = c.v[i] + w[2 * i] * b[2 * i] + w[2 * i + 1] * b[2 * i + 1];
  return out;
}
inline F floats(const I& a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
// Whole numbers to int16.
inline void store_words(int16_t* p, const F& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(a.v[i]);
}

constexpr bool has_table = false;
inline F code_table(const F& scale, const F&) { return scale; }
template <int k>
inline F look_up(const Bytes&, const F& table) {
  return table;
}
