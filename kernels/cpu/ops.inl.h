// Everything that is no product with weights: norms, gates, convolution, softmax.

inline float sum_of_squares(const float* x, int64_t size) {
  F total = zero();
  for (int64_t i = 0; i < size; i += 16) {
    const F v = load_some(x + i, size - i);
    total = fma(v, v, total);
  }
  return sum(total);
}

void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
  const float mean = sum_of_squares(x, size) / static_cast<float>(size);
  const F scale = all(1.0f / std::sqrt(mean + eps));
  map(x, weight, size, out, [=](F v, F w) { return mul(mul(v, scale), w); });
}

void unit(const float* x, int64_t size, float eps, float scale, float* out) {
  const F times = all(scale / std::sqrt(sum_of_squares(x, size) + eps));
  map(x, size, out, [=](F v) { return mul(v, times); });
}

void swiglu(const float* gate, const float* up, int64_t size, float* out) {
  map(gate, up, size, out, [](F g, F u) { return mul(silu(g), u); });
}

void sigmoid_scale(const float* gate, const float* x, int64_t size, float* out) {
  map(gate, x, size, out, [](F g, F v) { return mul(sigmoid(g), v); });
}

void accumulate(const float* x, float weight, int64_t size, float* out) {
  map(x, out, size, out, [=](F v, F o) { return fma(all(weight), v, o); });
}

// Exponentials of x - top into out, and their sum.
inline float exponentials(const float* x, int64_t size, float top, float* out) {
  F total = zero();
  for (int64_t i = 0; i < size; i += 16) {
    store_some(out + i, size - i, exp(sub(load_some(x + i, size - i), all(top))));
    total = add(total, load_some(out + i, size - i));
  }
  return sum(total);
}

inline float largest_of(const float* x, int64_t size) {
  F top = all(x[0]);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) top = max(top, load(x + i));
  float best = largest(top);
  for (; i < size; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

void softmax(const float* x, int64_t size, float* out) {
  const F total = all(exponentials(x, size, largest_of(x, size), out));
  map(out, size, out, [=](F v) { return div(v, total); });
}

void convolve(const float* const* rows, const float* taps, int64_t stride, int64_t kernel,
              int64_t size, float* out) {
  for (int64_t c = 0; c < size; c += 16) {
    F total = zero();
    for (int64_t k = 0; k < kernel; ++k)
      total = fma(load_some(rows[k] + c, size - c), load_some(taps + k * stride + c, size - c),
                  total);
    store_some(out + c, size - c, silu(total));
  }
}
