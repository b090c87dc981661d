// The choice of a product's form: integer or exact, the bits and the span.

using Product = void (*)(const Matrix&, const Row*, int64_t, int64_t, int64_t, float*, int64_t);

template <int bits>
Product code_product(const Matrix& m, bool as_integer) {
  if (m.span() == 32) return as_integer ? integer<bits, 32> : exact<CodeRow<bits, 32>>;
  return as_integer ? integer<bits, 64> : exact<CodeRow<bits, 64>>;
}

inline Product find_product(const Matrix& m, bool as_integer) {
  switch (m.bits) {
    case 2: return code_product<2>(m, as_integer);
    case 3: return code_product<3>(m, as_integer);
    case 4: return code_product<4>(m, as_integer);
    case 5: return code_product<5>(m, as_integer);
    case 6: return code_product<6>(m, as_integer);
    case 8: return code_product<8>(m, as_integer);
  }
  switch (m.kind) {
    case Kind::f16: return exact<NumberRow<Kind::f16>>;
    case Kind::bf16: return exact<NumberRow<Kind::bf16>>;
    default: return exact<NumberRow<Kind::f32>>;
  }
}

void product(const Matrix& m, bool as_integer, const Row* x, int64_t tokens, int64_t first,
             int64_t last, float* y, int64_t y_stride) {
  find_product(m, as_integer)(m, x, tokens, first, last, y, y_stride);
}

template <int bits>
void dequantize_codes(const Matrix& m, int64_t row, float* out) {
  if (m.span() == 32) return decode_row<CodeRow<bits, 32>>(m, row, out);
  decode_row<CodeRow<bits, 64>>(m, row, out);
}

void dequantize(const Matrix& m, int64_t row, float* out) {
  switch (m.bits) {
    case 2: return dequantize_codes<2>(m, row, out);
    case 3: return dequantize_codes<3>(m, row, out);
    case 4: return dequantize_codes<4>(m, row, out);
    case 5: return dequantize_codes<5>(m, row, out);
    case 6: return dequantize_codes<6>(m, row, out);
    case 8: return dequantize_codes<8>(m, row, out);
  }
  switch (m.kind) {
    case Kind::f16: return decode_row<NumberRow<Kind::f16>>(m, row, out);
    case Kind::bf16: return decode_row<NumberRow<Kind::bf16>>(m, row, out);
    default: return decode_row<NumberRow<Kind::f32>>(m, row, out);
  }
}
