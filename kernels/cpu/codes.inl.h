// Eight codes at a time in a 64-bit word, and one number at a time: what every instruction set does.



// Codes 8q to 8q+7 of 64 packed in 8 * bits bytes, in the low bits; nothing outside is read.
template <int bits>
inline uint64_t eight_codes(const uint8_t* p, int q) {
  const int start = q * bits;
  uint64_t word;
  if (start + 8 <= 8 * bits) {
    std::memcpy(&word, p + start, 8);
    return word;
  }
  std::memcpy(&word, p + 8 * bits - 8, 8);
  return word >> 8 * (start - (8 * bits - 8));
}

// One code a byte.
template <int bits>
inline uint64_t spread_codes(uint64_t word) {
  if (bits == 8) return word;
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out |= (word >> (bits * i) & ((1u << bits) - 1)) << 8 * i;
  return out;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {  // subnormal: a whole number of 2^-24
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// One scale or bias.
inline float number_at(Kind kind, const uint8_t* p, int64_t index) {
  float out;
  if (kind == Kind::f32) {
    std::memcpy(&out, p + 4 * index, 4);
    return out;
  }
  uint16_t half;
  std::memcpy(&half, p + 2 * index, 2);
  if (kind == Kind::f16) return half_to_float(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&out, &bits, 4);
  return out;
}
