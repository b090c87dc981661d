// Products of codes with activations of 16 bits: exact sums within a span, one float step for each.
//
//   y = sum over spans of scale * x_scale * (sum code * value) + bias * x_sum
//
// Codes are split into fields as they lie: the low and high parts of every byte or 16-bit word, with
// activations stored in the same order, so that nothing is moved. A 32-bit lane adds up neighbours.
// With VNNI a value is two signed digits of eight bits, each multiplied with unsigned codes; else
// codes are widened to 16 bits. The sums are the same.

constexpr int kIntegerRows = 4;
constexpr int kIntegerTokens = 4;
constexpr int64_t kIntegerColumns = 1024;  // unpacked at a time for many tokens

template <int bits>
struct Unit {
  static constexpr int fields = fields_of(bits), columns = unit_of(bits);
  static constexpr int nbytes = columns * bits / 8;
  static constexpr int width = (has_digits ? 8 : 16) / fields;  // bits of a field

  // One field after another: codes as bytes, or as 16-bit words.
  struct Parts {
    Bytes of[fields];
  };
  static Parts parts(const uint8_t* p) {
    Parts out;
    if constexpr (bits == 2 || bits == 4)
      split(held(load_bytes(p)), out);
    else
      split(unpack<bits>(p), out);
    return out;
  }
  template <int f = 0>
  static void split(const Bytes& raw, Parts& out) {
    if constexpr (f < fields) {
      if constexpr (has_digits)
        out.of[f] = byte_field<f * width, width>(raw);
      else
        out.of[f] = field<f * width, width>(raw);
      split<f + 1>(raw, out);
    }
  }
  static Parts stored(const void* p) {
    Parts out;
    for (int f = 0; f < fields; ++f)
      out.of[f] = held(load_bytes(static_cast<const uint8_t*>(p) + 64 * f));
    return out;
  }

  // Lanes of the sums of code * value. Fields are counted by the compiler: of a loop it would make
  // arrays in memory.
  static I dots(const Parts& codes, const int16_t* x) {
    const auto* values = reinterpret_cast<const uint8_t*>(x);
    if constexpr (!has_digits) return words(codes, values, no_ints());
    const I high = bytes(codes, values, no_ints());
    return bytes(codes, values + 64 * fields, times_256(high));
  }
  template <int f = 0>
  static I bytes(const Parts& codes, const uint8_t* values, const I& total) {
    if constexpr (f == fields) return total;
    else return bytes<f + 1>(codes, values,
                             dot_bytes(codes.of[f], load_bytes(values + 64 * f), total));
  }
  template <int f = 0>
  static I words(const Parts& codes, const uint8_t* values, const I& total) {
    if constexpr (f == fields) return total;
    else return words<f + 1>(codes, values,
                             dot(codes.of[f], load_bytes(values + 64 * f), total));
  }
};

// The biases' part of a product: 16 lanes over the spans.
inline F bias_sum(const float* biases, const float* sums, int64_t room) {
  F total = zero();
  for (int64_t i = 0; i < room; i += 16) total = fma(load(biases + i), load(sums + i), total);
  return total;
}

template <int bits, int span>
struct Integer {
  using U = Unit<bits>;
  static constexpr int spans = U::columns / span;  // of a unit
  static constexpr int64_t stored_nbytes = kIntegerColumns / U::columns * U::fields * 64;

  static void one(const Matrix& m, const Row& x, int64_t first, int64_t last, float* y) {
    const int64_t room = span_room(m), whole = m.cols / U::columns;
    auto* scales = static_cast<float*>(scratch(Piece::numbers, 8 * room));
    const auto* values = static_cast<const int16_t*>(x.values);
    for (int64_t r = first; r < last; ++r) {
      ask_for_row(m, r + rows_ahead(m));
      const F bias = row_scales(m, x, r, scales, scales + room);
      const uint8_t* codes = m.weight + r * m.row_nbytes();
      F total = zero();
      for (int64_t u = 0; u < whole; ++u) {
        const I part = U::dots(U::parts(codes + U::nbytes * u), values + U::columns * u);
        total = fma(floats(part), spread<spans>(scales + spans * u), total);
      }
      if (m.cols % U::columns) {
        uint8_t rest[64] = {};
        std::memcpy(rest, codes + U::nbytes * whole, m.cols % U::columns / 8 * bits);
        const I part = U::dots(U::parts(rest), values + U::columns * whole);
        total = fma(floats(part), spread<spans>(scales + spans * whole), total);
      }
      y[r - first] = sum(add(total, bias));
    }
  }

  static F row_scales(const Matrix& m, const Row& x, int64_t r, float* scales, float* biases) {
    const bool usual = m.kind == Kind::bf16 && m.group == span && m.groups() % 16 == 0;
    return usual ? whole_scales(m, x, r, scales) : any_scales(m, x, r, scales, biases);
  }

  // A row's scales times the activations', and the biases' part of its product.
  static F any_scales(const Matrix& m, const Row& x, int64_t r, float* scales, float* biases) {
    const int64_t room = span_room(m);
    spread_numbers(m, m.scales, r, scales);
    spread_numbers(m, m.biases, r, biases);
    for (int64_t i = 0; i < room; i += 16)
      store(scales + i, mul(load(scales + i), load(x.scales + i)));
    return bias_sum(biases, x.sums, room);
  }

  // The same for the usual form, in whole registers.
  static F whole_scales(const Matrix& m, const Row& x, int64_t r, float* scales) {
    const int64_t groups = m.groups();
    const uint8_t *s = m.scales + 2 * r * groups, *b = m.biases + 2 * r * groups;
    F total = zero();
    for (int64_t i = 0; i < groups; i += 16) {
      store(scales + i, mul(load_bf16(s + 2 * i), load(x.scales + i)));
      total = fma(load_bf16(b + 2 * i), load(x.sums + i), total);
    }
    return total;
  }

  // Words w [kIntegerRows, kIntegerColumns] and scales [tokens, rows, ...] for some units.
  static void tile(const uint8_t* w, const int16_t* const* x, const float* scales,
                   int64_t scale_stride, int64_t units, F* totals) {
    F total[kIntegerTokens][kIntegerRows];
    for (int t = 0; t < kIntegerTokens; ++t)
      for (int i = 0; i < kIntegerRows; ++i) total[t][i] = totals[t * kIntegerRows + i];
    for (int64_t u = 0; u < units; ++u) {
      for (int i = 0; i < kIntegerRows; ++i) {
        const auto codes = U::stored(w + i * stored_nbytes + u * U::fields * 64);
        for (int t = 0; t < kIntegerTokens; ++t) {
          const I part = U::dots(codes, x[t] + u * U::columns);
          const float* scale = scales + (t * kIntegerRows + i) * scale_stride + u * spans;
          total[t][i] = fma(floats(part), spread<spans>(scale), total[t][i]);
        }
      }
    }
    for (int t = 0; t < kIntegerTokens; ++t)
      for (int i = 0; i < kIntegerRows; ++i) totals[t * kIntegerRows + i] = total[t][i];
  }

  // Units [u, u + count) of a row as words.
  static void unpack_row(const Matrix& m, int64_t r, int64_t u, int64_t count, uint8_t* out) {
    const uint8_t* codes = m.weight + r * m.row_nbytes();
    const int64_t whole = m.cols / U::columns;
    for (int64_t j = 0; j < count; ++j, ++u, out += 64 * U::fields) {
      uint8_t rest[64] = {};
      const uint8_t* p = codes + U::nbytes * u;
      if (u >= whole) {
        std::memcpy(rest, p, m.cols % U::columns / 8 * bits);
        p = rest;
      }
      const auto codes = U::parts(p);
      for (int f = 0; f < U::fields; ++f) store_bytes(out + 64 * f, codes.of[f]);
    }
  }

  static void many(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last,
                   float* y, int64_t y_stride) {
    constexpr int64_t chunk = kIntegerColumns / U::columns;  // units
    constexpr int64_t chunk_spans = kIntegerColumns / span, scale_stride = chunk_spans + 16;
    constexpr int64_t tile_sums = kIntegerTokens * kIntegerRows;
    const int64_t room = span_room(m), units = (m.cols + U::columns - 1) / U::columns;
    const int64_t tiles = (tokens + kIntegerTokens - 1) / kIntegerTokens;
    auto* scales = static_cast<float*>(
        scratch(Piece::numbers, 4 * (2 * kIntegerRows * room + tile_sums * scale_stride)));
    float* biases = scales + kIntegerRows * room;
    float* both = biases + kIntegerRows * room;
    auto* words =
        static_cast<uint8_t*>(scratch(Piece::weights, kIntegerRows * stored_nbytes));
    auto* totals = static_cast<F*>(scratch(Piece::sums, tiles * tile_sums * sizeof(F)));
    for (int64_t r = first; r < last; r += kIntegerRows) {
      for (int i = 0; i < kIntegerRows; ++i) {
        spread_numbers(m, m.scales, smaller(r + i, last - 1), scales + i * room);
        spread_numbers(m, m.biases, smaller(r + i, last - 1), biases + i * room);
      }
      for (int64_t i = 0; i < tiles * tile_sums; ++i) totals[i] = zero();
      for (int64_t u = 0; u < units; u += chunk) {
        const int64_t count = smaller(chunk, units - u);
        for (int i = 0; i < kIntegerRows; ++i)
          unpack_row(m, smaller(r + i, last - 1), u, count, words + i * stored_nbytes);
        for (int64_t b = 0; b < tiles; ++b) {
          const int16_t* at[kIntegerTokens];
          for (int t = 0; t < kIntegerTokens; ++t) {
            const Row& row = x[smaller(b * kIntegerTokens + t, tokens - 1)];
            at[t] = static_cast<const int16_t*>(row.values) + u * U::columns;
            for (int i = 0; i < kIntegerRows; ++i)
              for (int64_t s = 0; s < count * spans; s += 16)
                store(both + (t * kIntegerRows + i) * scale_stride + s,
                      mul(load(scales + i * room + u * spans + s),
                          load(row.scales + u * spans + s)));
          }
          tile(words, at, both, scale_stride, count, totals + b * tile_sums);
        }
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int i = 0; i < kIntegerRows && r + i < last; ++i)
          y[t * y_stride + r + i - first] =
              sum(add(totals[t * kIntegerRows + i],
                      bias_sum(biases + i * room, x[t].sums, room)));
    }
  }
};

template <int bits, int span>
void integer(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last, float* y,
             int64_t y_stride) {
  if (tokens == 1)
    Integer<bits, span>::one(m, *x, first, last, y);
  else
    Integer<bits, span>::many(m, x, tokens, first, last, y, y_stride);
}
