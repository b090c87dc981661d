// Products of codes with activations of 16 bits: exact sums within a span, one float step for each.
//
//   y = sum over spans of scale * x_scale * (sum code * value) + bias * x_sum
//
// Codes are split into fields as they lie: the low and high parts of every byte or 16-bit word, with
// activations stored in the same order, so that nothing is moved. A 32-bit lane adds up neighbours.
// With VNNI a value is two signed digits of eight bits, each multiplied with unsigned codes; else
// codes are widened to 16 bits. The sums are the same.

constexpr int kIntegerRows = 4;  // that share the loads of activations where tokens are many

template <int bits, int span>
struct Unit {
  static constexpr int fields = fields_of(bits, span), columns = unit_of(bits, span);
  static constexpr int nbytes = columns * bits / 8, value_nbytes = 2 * columns;
  static constexpr int width = bits == 2 || bits == 4 ? bits : 8;  // of a field
  static constexpr int spans = columns / span, count = 16 / spans;  // units to 16 scales

  // One field after another: codes as bytes, or as 16-bit words.
  struct Parts {
    Bytes of[fields];
  };
  static Parts parts(const uint8_t* p) {
    Parts out;
    if constexpr (crossed(bits, span)) {
      cross(p, out);
    } else if constexpr (bits == 2 || bits == 4) {
      split<0, fields>(held(load_bytes(p)), out);
    } else {
      split<0, fields>(unpack<bits>(p), out);
    }
    return out;
  }
  // Field by field a quarter of each span: of two registers of 4 bits, or of four of bytes.
  static void cross(const uint8_t* p, Parts& out) {
    if constexpr (bits == 4) {
      const Bytes a = load_bytes(p), b = load_bytes(p + 64);
      split<0, 2>(held(quarters<0>(a, b)), out);
      split<2, 4>(held(quarters<1>(a, b)), out);
    } else {
      const Bytes a = unpack<bits>(p), b = unpack<bits>(p + 8 * bits);
      const Bytes c = unpack<bits>(p + 16 * bits), d = unpack<bits>(p + 24 * bits);
      const Bytes ab[] = {quarters<0>(a, b), quarters<1>(a, b)};
      const Bytes cd[] = {quarters<0>(c, d), quarters<1>(c, d)};
      out = {{quarters<0>(ab[0], cd[0]), quarters<0>(ab[1], cd[1]), quarters<1>(ab[0], cd[0]),
              quarters<1>(ab[1], cd[1])}};
    }
  }
  template <int f, int end, int shift = 0>
  static void split(const Bytes& raw, Parts& out) {
    if constexpr (f < end) {
      if constexpr (has_digits)
        out.of[f] = byte_field<shift, width>(raw);
      else
        out.of[f] = field<shift, width>(raw);
      split<f + 1, end, shift + width>(raw, out);
    }
  }

  // Lanes of the sums of code * value. Fields are counted by the compiler: of a loop it would make
  // arrays in memory.
  static I dots(const Parts& codes, const uint8_t* values) {
    if constexpr (!has_digits) return words(codes, values, no_ints());
    return both_digits(bytes(codes, values, no_ints()),
                       bytes(codes, values + 64 * fields, no_ints()));
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

  // The same for two rows, with activations loaded once.
  static void dots(const Parts& a, const Parts& b, const uint8_t* values, I* out) {
    I high[2] = {no_ints(), no_ints()}, low[2] = {no_ints(), no_ints()};
    both_rows(a, b, values, high, low);
    for (int i = 0; i < 2; ++i) out[i] = both_digits(high[i], low[i]);
  }
  template <int f = 0>
  static void both_rows(const Parts& a, const Parts& b, const uint8_t* values, I* high, I* low) {
    if constexpr (f < fields) {
      const Bytes first = held(load_bytes(values + 64 * f));
      const Bytes second = held(load_bytes(values + 64 * (fields + f)));
      high[0] = dot_bytes(a.of[f], first, high[0]);
      high[1] = dot_bytes(b.of[f], first, high[1]);
      low[0] = dot_bytes(a.of[f], second, low[0]);
      low[1] = dot_bytes(b.of[f], second, low[1]);
      both_rows<f + 1>(a, b, values, high, low);
    }
  }

  // The same for rows of unpacked codes, `stride` bytes apart, with activations loaded once.
  static void dots(const uint8_t* codes, int64_t stride, const uint8_t* values, I* out) {
    I high[kIntegerRows];
    for (int i = 0; i < kIntegerRows; ++i) high[i] = out[i] = no_ints();
    for (int f = 0; f < fields; ++f) {
      const Bytes first = held(load_bytes(values + 64 * f));
      if constexpr (has_digits) {
        const Bytes second = held(load_bytes(values + 64 * (fields + f)));
        for (int i = 0; i < kIntegerRows; ++i) {
          const Bytes code = held(load_bytes(codes + i * stride + 64 * f));
          high[i] = dot_bytes(code, first, high[i]);
          out[i] = dot_bytes(code, second, out[i]);
        }
      } else {
        for (int i = 0; i < kIntegerRows; ++i)
          out[i] = dot(load_bytes(codes + i * stride + 64 * f), first, out[i]);
      }
    }
    if constexpr (has_digits)
      for (int i = 0; i < kIntegerRows; ++i) out[i] = both_digits(high[i], out[i]);
  }
};

template <int bits, int span>
struct Integer {
  using U = Unit<bits, span>;

  static int64_t units(const Matrix& m) { return (m.cols + U::columns - 1) / U::columns; }

  // The codes of unit u, copied to `rest` where the row ends within it.
  static const uint8_t* codes_at(const Matrix& m, int64_t r, int64_t u, uint8_t* rest) {
    const uint8_t* p = m.weight + r * m.row_nbytes() + U::nbytes * u;
    const int64_t left = m.row_nbytes() - U::nbytes * u;
    if (left >= U::nbytes) return p;
    std::memset(rest, 0, U::nbytes);
    std::memcpy(rest, p, left);
    return rest;
  }

  static void one(const Matrix& m, const Row& x, int64_t first, int64_t last, float* y) {
    const bool usual = m.kind == Kind::bf16 && m.group == span && m.groups() % 16 == 0;
    if constexpr (has_digits && bits != 8) {  // bytes are read faster as one stream than as two
      if (usual)
        for (; last - first >= 16; first += 16, y += 16) sixteen(m, x, first, y);
    }
    (usual ? one_by_one<true> : one_by_one<false>)(m, x, first, last, y);
  }

  static void sixteen(const Matrix& m, const Row& x, int64_t r, float* y) {
    F totals[16];
    for (int64_t i = 0; i < 16; i += 2) pair(m, x, r + i, totals + i);
    store(y, sums(totals));
  }

  // Sixteen lanes of each of two rows' products with x, for which activations are loaded once. The
  // codes of later rows are asked for on the way, a little at each step.
  static void pair(const Matrix& m, const Row& x, int64_t r, F* out) {
    const int64_t row_codes = m.row_nbytes(), row_scales = 2 * m.groups(), all_units = units(m);
    const int64_t ahead = rows_ahead(m);
    const uint8_t* codes = m.weight + r * row_codes;
    const uint8_t *scales = m.scales + r * row_scales, *biases = m.biases + r * row_scales;
    const auto* values = static_cast<const uint8_t*>(x.values);
    ask_for(scales + ahead * row_scales, 2 * row_scales);
    ask_for(biases + ahead * row_scales, 2 * row_scales);
    F total[2] = {zero(), zero()}, bias[2] = {zero(), zero()};
    for (int64_t u = 0, s = 0; u < all_units; u += U::count, s += 16) {
      for (int i = 0; i < 2; ++i)
        ask_for(codes + (ahead + i) * row_codes, U::count * U::nbytes);
      const F scale = load(x.scales + s), sum = load(x.sums + s);
      const auto scales_of = [&](int i) {
        return Scales(mul(load_bf16(scales + i * row_scales + 2 * s), scale));
      };
      const Scales some[2] = {scales_of(0), scales_of(1)};
      for (int i = 0; i < 2; ++i)
        bias[i] = fma(load_bf16(biases + i * row_scales + 2 * s), sum, bias[i]);
      for (int j = 0; j < U::count; ++j, codes += U::nbytes, values += U::value_nbytes) {
        I part[2];
        U::dots(U::parts(codes), U::parts(codes + row_codes), values, part);
        for (int i = 0; i < 2; ++i)
          total[i] = fma(floats(part[i]), some[i].template of<U::spans>(j), total[i]);
      }
    }
    for (int i = 0; i < 2; ++i) out[i] = add(total[i], bias[i]);
  }

  // With `usual`, scales and biases are sixteen bf16 numbers after another, one a span.
  template <bool usual>
  static void one_by_one(const Matrix& m, const Row& x, int64_t first, int64_t last, float* y) {
    const int64_t room = span_room(m), row_scales = 2 * m.groups(), all_units = units(m);
    auto* numbers = static_cast<float*>(scratch(Piece::numbers, 8 * room));
    const auto* values = static_cast<const uint8_t*>(x.values);
    for (int64_t r = first; r < last; ++r) {
      ask_for_row(m, r + rows_ahead(m));
      const uint8_t *scales = m.scales + r * row_scales, *biases = m.biases + r * row_scales;
      if (!usual) {
        spread_numbers(m, m.scales, r, numbers);
        spread_numbers(m, m.biases, r, numbers + room);
      }
      F total = zero(), bias = zero();
      for (int64_t u = 0, i = 0; u < all_units; u += U::count, i += 16) {
        const F scale = usual ? load_bf16(scales + 2 * i) : load(numbers + i);
        const F offset = usual ? load_bf16(biases + 2 * i) : load(numbers + room + i);
        bias = fma(offset, load(x.sums + i), bias);
        const Scales both(mul(scale, load(x.scales + i)));
        const auto step = [&](const uint8_t* codes, int j) __attribute__((always_inline)) {
          const I part = U::dots(U::parts(codes), values + U::value_nbytes * (u + j));
          total = fma(floats(part), both.template of<U::spans>(j), total);
        };
        if (usual) {
          const uint8_t* codes = m.weight + r * m.row_nbytes() + U::nbytes * u;
          for (int j = 0; j < U::count; ++j) step(codes + U::nbytes * j, j);
        } else {
          uint8_t rest[U::nbytes];
          for (int j = 0; j < smaller(U::count, all_units - u); ++j)
            step(codes_at(m, r, u + j, rest), j);
        }
      }
      y[r - first] = sum(add(total, bias));
    }
  }

  // Some rows of a matrix, ready for many tokens.
  struct Rows {
    int64_t room, units;
    float *scales, *biases;  // [kIntegerRows, room]
    uint8_t* codes;          // [kIntegerRows, units, fields * 64]

    explicit Rows(const Matrix& m) : room(span_room(m)), units(Integer::units(m)) {
      scales = static_cast<float*>(scratch(Piece::numbers, 8 * kIntegerRows * room));
      biases = scales + kIntegerRows * room;
      codes = static_cast<uint8_t*>(scratch(Piece::weights, kIntegerRows * stride()));
    }
    int64_t stride() const { return units * U::fields * 64; }

    void open(const Matrix& m, int64_t r, int i) {
      spread_numbers(m, m.scales, r, scales + i * room);
      spread_numbers(m, m.biases, r, biases + i * room);
      uint8_t rest[U::nbytes], *out = codes + i * stride();
      for (int64_t u = 0; u < units; ++u, out += 64 * U::fields) {
        const auto parts = U::parts(codes_at(m, r, u, rest));
        for (int f = 0; f < U::fields; ++f) store_bytes(out + 64 * f, parts.of[f]);
      }
    }

    // Sixteen lanes of each row's product with x.
    void times(const Row& x, F* out) const {
      const auto* values = static_cast<const uint8_t*>(x.values);
      F total[kIntegerRows], bias[kIntegerRows];
      for (int i = 0; i < kIntegerRows; ++i) total[i] = bias[i] = zero();
      for (int64_t u = 0, s = 0; u < units; u += U::count, s += 16) {
        const F scale = load(x.scales + s), sum = load(x.sums + s);
        const auto both = [&](int i) { return Scales(mul(load(scales + i * room + s), scale)); };
        const Scales some[kIntegerRows] = {both(0), both(1), both(2), both(3)};
        for (int i = 0; i < kIntegerRows; ++i)
          bias[i] = fma(load(biases + i * room + s), sum, bias[i]);
        const int end = static_cast<int>(smaller(U::count, units - u));
        for (int j = 0; j < end; ++j) {
          I part[kIntegerRows];
          U::dots(codes + U::fields * 64 * (u + j), stride(),
                  values + U::value_nbytes * (u + j), part);
          for (int i = 0; i < kIntegerRows; ++i)
            total[i] = fma(floats(part[i]), some[i].template of<U::spans>(j), total[i]);
        }
      }
      for (int i = 0; i < kIntegerRows; ++i) out[i] = add(total[i], bias[i]);
    }
  };

  static void many(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last,
                   float* y, int64_t y_stride) {
    Rows rows(m);
    for (int64_t r = first; r < last; r += kIntegerRows) {
      const int64_t count = smaller(kIntegerRows, last - r);
      for (int i = 0; i < kIntegerRows; ++i) rows.open(m, smaller(r + i, last - 1), i);
      for (int64_t t = 0; t < tokens; t += 4) {
        F totals[4 * kIntegerRows];
        float found[4 * kIntegerRows];
        for (int64_t j = 0; j < 4; ++j)
          if (t + j < tokens) rows.times(x[t + j], totals + j * kIntegerRows);
        store(found, sums(totals));
        for (int64_t j = 0; j < smaller(4, tokens - t); ++j)
          std::memcpy(y + (t + j) * y_stride + r - first, found + j * kIntegerRows, 4 * count);
      }
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
