// Eight codes at a time in a 64-bit word: what every instruction set can do.



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
