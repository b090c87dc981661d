// What products keep of a row: activations in the order in which codes are unpacked, and a matrix's
// scales and biases as floats, one a span of 32 or 64 columns.

// The integer form works on units: 64 bytes of 2- or 4-bit codes, or 64 codes unpacked to bytes.
// Codes lie in fields of every byte, or of every 16-bit word where products of bytes are missing.
// Digits of spans of 64 always come in units of 256: smaller ones are taken together and crossed,
// so that every register has the same four spans, and one step is enough for them.
constexpr bool crossed(int bits, int span) { return has_digits && bits != 2 && span == 64; }
constexpr int unit_of(int bits, int span) {
  return bits == 2 || crossed(bits, span) ? 256 : bits == 4 ? 128 : 64;
}
constexpr int fields_of(int bits, int span) { return unit_of(bits, span) / (has_digits ? 64 : 32); }

// 64 digits to their fields, which come in sets of `packed`: one of a set has every `packed`th digit
// of the set's part, and that is the same byte of every word (x86 has the low one first; no other
// machine here has digits).
template <int fields, int packed>
inline void place_digits(const int8_t* digits, int8_t* out) {
  using Word = std::conditional_t<packed == 4, uint32_t, uint16_t>;
  constexpr int each = 64 / fields;
  if constexpr (packed == 1) {
    for (int f = 0; f < fields; ++f) std::memcpy(out + 64 * f, digits + each * f, each);
  } else {
    Word words[64 / sizeof(Word)];
    std::memcpy(words, digits, 64);
    for (int f = 0; f < fields; ++f)
      for (int i = 0; i < each; ++i)
        out[64 * f + i] = static_cast<int8_t>(words[f / packed * each + i] >> 8 * (f % packed));
  }
}

// 64 numbers, those of a unit from column `within` on, in the order of its fields: numbers of 16
// bits, or all the unit's high digits and then all its low ones.
// `packed` codes lie in a byte.
template <int fields, int packed>
inline void place_words(const int16_t* words, int64_t within, void* unit) {
  const int64_t at = within / fields;
  if constexpr (has_digits) {
    int8_t high[64], low[64];
    for (int i = 0; i < 64; ++i) {
      high[i] = static_cast<int8_t>((words[i] + 128) >> 8);
      low[i] = static_cast<int8_t>(words[i]);
    }
    auto* out = static_cast<int8_t*>(unit) + at;
    place_digits<fields, packed>(high, out);
    place_digits<fields, packed>(low, out + 64 * fields);
  } else {
    constexpr int each = 64 / fields;
    auto* out = static_cast<int16_t*>(unit) + at;
    for (int f = 0; f < fields; ++f)
      for (int i = 0; i < each; ++i) out[32 * f + i] = words[fields * i + f];
  }
}

inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Spans of a row with room for whole registers to be read.
inline int64_t span_room(const Matrix& m) {
  return padded(padded(m.cols, 256) / m.span(), 16) + 16;
}
inline int64_t value_room(const Matrix& m) { return padded(m.cols, 256); }

int64_t row_nbytes(const Matrix& m, bool integer) {
  return integer ? 2 * value_room(m) + 8 * span_room(m) : 4 * value_room(m);
}

// Sixteen bits for the largest of each 64 columns, so an error of 1.5e-5 of it at most. The high
// digit of kLargest, rounded to nearest, is 127.
constexpr float kLargest = 32639.0f;
Row prepare_integer(const Matrix& m, const float* x, void* memory) {
  auto* values = static_cast<int16_t*>(memory);
  auto* scales = reinterpret_cast<float*>(values + value_room(m));
  float* sums = scales + span_room(m);
  std::memset(memory, 0, row_nbytes(m, true));
  const int64_t span = m.span(), unit = unit_of(m.bits, span), fields = fields_of(m.bits, span);
  for (int64_t start = 0; start < m.cols; start += 64) {
    const int64_t count = smaller(64, m.cols - start);
    F v[4], top = zero(), poison = zero();
    for (int k = 0; k < 4; ++k) {
      v[k] = load_some(x + start + 16 * k, count > 16 * k ? count - 16 * k : 0);
      top = max(top, abs(v[k]));
      poison = add(poison, mul(v[k], zero()));  // NaN where a value is NaN or infinite
    }
    const float largest_value = largest(top), scale = largest_value / kLargest;
    const F inverse = all(largest_value > 1e-30f ? kLargest / largest_value : 0.0f);
    float whole[64];
    int16_t words[64];
    for (int k = 0; k < 4; ++k) {
      const F rounded = round(mul(v[k], inverse));
      store(whole + 16 * k, rounded);
      store_words(words + 16 * k, rounded);
    }
    for (int64_t s = 0; s < 64 / span; ++s) {
      const int64_t at = start / span + s;
      F total = poison;
      for (int64_t i = 0; i < span; i += 16) total = add(total, load(whole + s * span + i));
      scales[at] = scale;
      sums[at] = scale * sum(total);
    }
    int16_t* out = values + start / unit * unit;
    const int packed = m.bits == 2 ? 4 : m.bits == 4 ? 2 : 1;
    switch (10 * fields + packed) {
      case 11: place_words<1, 1>(words, start % unit, out); break;
      case 21: place_words<2, 1>(words, start % unit, out); break;
      case 41: place_words<4, 1>(words, start % unit, out); break;
      case 22: place_words<2, 2>(words, start % unit, out); break;
      case 42: place_words<4, 2>(words, start % unit, out); break;
      case 44: place_words<4, 4>(words, start % unit, out); break;
      default: place_words<8, 4>(words, start % unit, out);
    }
  }
  return {values, scales, sums};
}

Row prepare_exact(const Matrix& m, const float* x, void* memory) {
  auto* values = static_cast<float*>(memory);
  const int64_t whole = m.cols / 64 * 64, room = value_room(m);
  if (!m.bits) {
    std::memcpy(values, x, 4 * m.cols);
    std::memset(values + m.cols, 0, 4 * (room - m.cols));
    return {values, nullptr, nullptr};
  }
  std::memset(values + whole, 0, 4 * (room - whole));
  for (int64_t start = 0; start < m.cols; start += 64) {
    float* out = values + start;
    const float* in = x + start;
    const int64_t count = smaller(64, m.cols - start);
    if (count == 64) {
      for (int k = 0; k < 4; ++k)
        for (int j = 0; j < 16; ++j) out[16 * k + j] = in[4 * j + k];
    } else {
      for (int64_t i = 0; i < count; ++i) out[16 * (i % 4) + i / 4] = in[i];
    }
  }
  return {values, nullptr, nullptr};
}

Row prepare(const Matrix& m, bool integer, const float* x, void* memory) {
  return integer ? prepare_integer(m, x, memory) : prepare_exact(m, x, memory);
}

// Ask for a row some kilobytes before its turn, into the second-level cache. While codes are unpacked
// too few loads are under way to keep memory busy. One row by itself is asked for all at once: line
// by line, or into the first level, it comes no sooner. Two at a time are asked for on the way.
inline int64_t rows_ahead(const Matrix& m) { return 8192 / m.row_nbytes() + 1; }

inline void ask_for(const uint8_t* p, int64_t nbytes) {
  asm volatile("");  // GCC drops calls of a function that only prefetches
  for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

inline void ask_for_row(const Matrix& m, int64_t row) {
  if (!m.bits || m.bits == 8) return;  // the processor asks for these by itself, and better
  ask_for(m.weight + row * m.row_nbytes(), m.row_nbytes());
  const int64_t nbytes = m.groups() * nbytes_of(m.kind);
  ask_for(m.scales + row * nbytes, nbytes);
  ask_for(m.biases + row * nbytes, nbytes);
}

// A row's scales or biases, one a span, zeros after them.
inline void spread_numbers(const Matrix& m, const uint8_t* numbers, int64_t row, float* out) {
  const int64_t groups = m.groups(), times = m.group / m.span(), room = span_room(m);
  const uint8_t* p = numbers + row * groups * nbytes_of(m.kind);
  if (times == 1) {
    for (int64_t i = 0; i < groups; i += 16)
      store(out + i, load_numbers(m.kind, p, i, groups - i));
  } else {
    for (int64_t i = 0; i < groups; i += 16) {
      float some[16];
      store(some, load_numbers(m.kind, p, i, groups - i));
      for (int64_t j = 0; j < smaller(16, groups - i); ++j)
        out[2 * (i + j)] = out[2 * (i + j) + 1] = some[j];
    }
  }
  for (int64_t i = groups * times; i < room; ++i) out[i] = 0.0f;
}
