// What products keep of a row: activations in the order in which codes are unpacked, and a matrix's
// scales and biases as floats, one a span of 32 or 64 columns.

// The integer form works on units: 64 bytes of 2- or 4-bit codes, or 64 codes unpacked to bytes.
inline int64_t unit_of(int bits) { return bits == 2 ? 256 : bits == 4 ? 128 : 64; }
inline int64_t fields_of(int bits) { return bits == 2 ? 8 : bits == 4 ? 4 : 2; }

inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Spans of a row with room for whole registers to be read.
inline int64_t span_room(const Matrix& m) {
  return padded(padded(m.cols, 256) / m.span(), 16) + 16;
}
inline int64_t value_room(const Matrix& m) { return padded(m.cols, 256); }

int64_t row_nbytes(const Matrix& m, bool integer) {
  return integer ? 2 * value_room(m) + 8 * span_room(m) : 4 * value_room(m);
}

// Sixteen bits for the largest of each 64 columns, so an error of 1.5e-5 of it at most.
Row prepare_integer(const Matrix& m, const float* x, void* memory) {
  auto* values = static_cast<int16_t*>(memory);
  auto* scales = reinterpret_cast<float*>(values + value_room(m));
  float* sums = scales + span_room(m);
  std::memset(memory, 0, row_nbytes(m, true));
  const int64_t unit = unit_of(m.bits), fields = fields_of(m.bits), span = m.span();
  for (int64_t start = 0; start < m.cols; start += 64) {
    const int64_t count = smaller(64, m.cols - start);
    F v[4], top = zero(), poison = zero();
    for (int k = 0; k < 4; ++k) {
      v[k] = load_some(x + start + 16 * k, count > 16 * k ? count - 16 * k : 0);
      top = max(top, abs(v[k]));
      poison = add(poison, mul(v[k], zero()));  // NaN where a value is NaN or infinite
    }
    const float largest_value = largest(top), scale = largest_value / 32767.0f;
    const F inverse = all(largest_value > 1e-30f ? 32767.0f / largest_value : 0.0f);
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
    const int64_t within = start % unit;
    for (int64_t i = 0; i < 64; ++i) {
      const int64_t place = within + i;
      out[place % fields * 32 + place / fields] = words[i];
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
