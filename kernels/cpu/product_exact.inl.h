// Products in float32: w = code * scale + bias in one rounding, then one fused sum of 16 lanes for
// each row and token, in the order of the columns. One token and many take the same steps.

constexpr int kExactRows = 4;
constexpr int kExactTokens = 4;
constexpr int64_t kExactBlocks = 8;  // of 64 columns, dequantised at a time for many tokens

// One row of a matrix, decoded 64 columns at a time.
template <int bits, int span>
struct CodeRow {
  const uint8_t *codes, *scales, *biases;
  Kind kind;
  int halves;        // 1 where two blocks share a scale
  int64_t groups;
  uint8_t rest[64];  // the last block's codes where it is not whole

  void open(const Matrix& m, int64_t row) {
    codes = m.weight + row * m.row_nbytes();
    kind = m.kind;
    halves = m.group == 128;
    groups = m.groups();
    scales = m.scales + row * groups * nbytes_of(kind);
    biases = m.biases + row * groups * nbytes_of(kind);
    if (m.cols % 64) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, codes + m.cols / 64 * 8 * bits, m.cols % 64 / 8 * bits);
    }
  }
  void block(int64_t b, F* w) const { decode(codes + 8 * bits * b, b, w); }
  void last(int64_t b, F* w) const { decode(rest, b, w); }

  // A block's scale or bias in all lanes, or those of its two spans in eight lanes each.
  F number(const uint8_t* numbers, int64_t b) const {
    if constexpr (span == 64) return all(number_at(kind, numbers, b >> halves));
    float two[16] = {number_at(kind, numbers, 2 * b)};
    if (2 * b + 1 < groups) two[1] = number_at(kind, numbers, 2 * b + 1);
    return spread<2>(two);
  }

  void decode(const uint8_t* p, int64_t b, F* w) const {
    const Bytes raw = held(unpack<bits>(p));
    const F scale = number(scales, b), bias = number(biases, b);
    if constexpr (has_table && bits <= 4 && span == 64) {
      const F table = code_table(scale, bias);
      w[0] = look_up<0>(raw, table);
      w[1] = look_up<1>(raw, table);
      w[2] = look_up<2>(raw, table);
      w[3] = look_up<3>(raw, table);
    } else {
      w[0] = fma(byte_floats<0, bits>(raw), scale, bias);
      w[1] = fma(byte_floats<1, bits>(raw), scale, bias);
      w[2] = fma(byte_floats<2, bits>(raw), scale, bias);
      w[3] = fma(byte_floats<3, bits>(raw), scale, bias);
    }
  }
};

template <Kind kind>
struct NumberRow {
  const uint8_t* numbers;
  int64_t left;

  void open(const Matrix& m, int64_t row) {
    numbers = m.weight + row * m.row_nbytes();
    left = m.cols % 64;
  }
  void block(int64_t b, F* w) const {
    for (int k = 0; k < 4; ++k) w[k] = load_numbers(kind, numbers, 64 * b + 16 * k);
  }
  void last(int64_t b, F* w) const {
    for (int k = 0; k < 4; ++k) {
      const int64_t count = left - 16 * k;
      w[k] = count > 0 ? load_numbers(kind, numbers, 64 * b + 16 * k, count) : zero();
    }
  }
};

inline F four(const F* w, const float* x, F total) {
  for (int k = 0; k < 4; ++k) total = fma(w[k], load(x + 16 * k), total);
  return total;
}

template <class RowOf>
void exact_one(const Matrix& m, const float* x, int64_t first, int64_t last, float* y) {
  const int64_t whole = m.cols / 64;
  for (int64_t r = first; r < last; r += kExactRows) {
    RowOf row[kExactRows];
    F total[kExactRows];
    for (int i = 0; i < kExactRows; ++i) {
      row[i].open(m, smaller(r + i, last - 1));
      ask_for_row(m, r + i + rows_ahead(m));
      total[i] = zero();
    }
    for (int64_t b = 0; b < whole; ++b)
      for (int i = 0; i < kExactRows; ++i) {
        F w[4];
        row[i].block(b, w);
        total[i] = four(w, x + 64 * b, total[i]);
      }
    for (int i = 0; i < kExactRows; ++i) {
      if (m.cols % 64) {
        F w[4];
        row[i].last(whole, w);
        total[i] = four(w, x + 64 * whole, total[i]);
      }
      if (r + i < last) y[r + i - first] = sum(total[i]);
    }
  }
}

// Rows w [kExactRows, stride] and tokens x, `blocks` of 64 columns on.
inline void exact_tile(const float* w, int64_t stride, const float* const* x, int64_t blocks,
                       F* totals) {
  F total[kExactTokens][kExactRows];
  for (int t = 0; t < kExactTokens; ++t)
    for (int i = 0; i < kExactRows; ++i) total[t][i] = totals[t * kExactRows + i];
  for (int64_t c = 0; c < 64 * blocks; c += 16) {
    F some[kExactRows];
    for (int i = 0; i < kExactRows; ++i) some[i] = load(w + i * stride + c);
    for (int t = 0; t < kExactTokens; ++t) {
      const F value = load(x[t] + c);
      for (int i = 0; i < kExactRows; ++i) total[t][i] = fma(some[i], value, total[t][i]);
    }
  }
  for (int t = 0; t < kExactTokens; ++t)
    for (int i = 0; i < kExactRows; ++i) totals[t * kExactRows + i] = total[t][i];
}

template <class RowOf>
void exact_many(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last,
                float* y, int64_t y_stride) {
  const int64_t whole = m.cols / 64, blocks = (m.cols + 63) / 64;
  constexpr int64_t stride = 64 * kExactBlocks;
  auto* weights = static_cast<float*>(scratch(Piece::weights, 4 * kExactRows * stride));
  const int64_t tiles = (tokens + kExactTokens - 1) / kExactTokens;
  const int64_t tile_sums = kExactTokens * kExactRows;
  auto* totals = static_cast<F*>(scratch(Piece::sums, tiles * tile_sums * sizeof(F)));
  for (int64_t r = first; r < last; r += kExactRows) {
    RowOf row[kExactRows];
    for (int i = 0; i < kExactRows; ++i)
      row[i].open(m, smaller(r + i, last - 1));
    for (int64_t i = 0; i < tiles * tile_sums; ++i) totals[i] = zero();
    for (int64_t b = 0; b < blocks; b += kExactBlocks) {
      const int64_t count = smaller(kExactBlocks, blocks - b);
      for (int i = 0; i < kExactRows; ++i)
        for (int64_t j = 0; j < count; ++j) {
          F w[4];
          b + j < whole ? row[i].block(b + j, w) : row[i].last(b + j, w);
          for (int k = 0; k < 4; ++k) store(weights + i * stride + 64 * j + 16 * k, w[k]);
        }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* at[kExactTokens];
        for (int t = 0; t < kExactTokens; ++t) {
          const int64_t token = smaller(tile * kExactTokens + t, tokens - 1);
          at[t] = static_cast<const float*>(x[token].values) + 64 * b;
        }
        exact_tile(weights, stride, at, count, totals + tile * tile_sums);
      }
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int i = 0; i < kExactRows && r + i < last; ++i)
        y[t * y_stride + r + i - first] = sum(totals[t * kExactRows + i]);
  }
}

template <class RowOf>
void exact(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last, float* y,
           int64_t y_stride) {
  if (tokens == 1)
    exact_one<RowOf>(m, static_cast<const float*>(x->values), first, last, y);
  else
    exact_many<RowOf>(m, x, tokens, first, last, y, y_stride);
}

template <class RowOf>
void decode_row(const Matrix& m, int64_t r, float* out) {
  RowOf row;
  row.open(m, r);
  for (int64_t b = 0; 64 * b < m.cols; ++b) {
    F w[4];
    float some[4][16];
    64 * b + 64 <= m.cols ? row.block(b, w) : row.last(b, w);
    for (int k = 0; k < 4; ++k) store(some[k], w[k]);
    for (int64_t i = 0; i < smaller(64, m.cols - 64 * b); ++i)
      out[64 * b + i] = m.bits ? some[i % 4][i / 4] : some[i / 16][i % 16];
  }
}
