// What is no product with weights, in one instruction set against plain double loops: attention,
// the delta rule, convolution, norms and gates. Built and run as products.cpp is.
#include <algorithm>

#include "check.h"

using namespace flashmoe;

namespace {

double dot(const float* a, const float* b, int64_t size) {
  double all = 0;
  for (int64_t i = 0; i < size; ++i) all += double(a[i]) * b[i];
  return all;
}
double silu(double x) { return x / (1 + std::exp(-x)); }

double attention(const Kernels& k, int64_t queries, int64_t dim, int64_t length) {
  const AtTheEnd q(numbers(kQueries * dim, 8 / std::sqrt(double(dim))));
  const AtTheEnd keys(numbers(length * dim, 4)), values(numbers(length * dim));
  std::vector<float> scores(kQueries * length), out(queries * (dim + 2)), one(dim);
  int64_t lengths[kQueries];
  for (int64_t j = 0; j < kQueries; ++j) lengths[j] = length - std::min<int64_t>(j, length - 1) / 2;
  k.attend(q.floats(), queries, dim, keys.floats(), values.floats(), lengths, length,
           keys.floats(), scores.data(), out.data());
  Error error;
  for (int64_t j = 0; j < queries; ++j) {
    const float* found = &out[j * (dim + 2)];
    for (int64_t i = 0; i < dim; ++i) one[i] = q.floats()[kQueries * i + j];
    std::vector<double> p(lengths[j]);
    for (int64_t i = 0; i < lengths[j]; ++i) p[i] = dot(one.data(), keys.floats() + i * dim, dim);
    const double top = *std::max_element(p.begin(), p.end());
    double total = 0;
    for (double& one : p) total += one = std::exp(one - top);
    for (int64_t c = 0; c < dim; ++c) {
      double right = 0;
      for (int64_t i = 0; i < lengths[j]; ++i) right += p[i] * values.floats()[i * dim + c];
      error.add(found[c], right);
    }
    error.add(found[dim], top);
    error.add(found[dim + 1], total);
  }
  return error.value();
}

double delta_rule(const Kernels& k, int64_t dk, int64_t dv) {
  const AtTheEnd q(numbers(dk)), key(numbers(dk)), v(numbers(dv)), state(numbers(dv * dk));
  const std::vector<float> before(state.floats(), state.floats() + dv * dk);
  std::vector<float> out(dv);
  const float decay = 0.9f, beta = 0.4f;
  k.delta_step(q.floats(), key.floats(), v.floats(), decay, beta, 0, dv, dk, state.floats(),
               out.data());
  Error error;
  for (int64_t r = 0; r < dv; ++r) {
    const double change =
        (v.floats()[r] - decay * dot(&before[r * dk], key.floats(), dk)) * beta;
    double asked = 0;
    for (int64_t i = 0; i < dk; ++i) {
      const double right = before[r * dk + i] * double(decay) + change * key.floats()[i];
      error.add(state.floats()[r * dk + i], right);
      asked += right * q.floats()[i];
    }
    error.add(out[r], asked);
  }
  return error.value();
}

double convolution(const Kernels& k, int64_t size) {
  const AtTheEnd x(numbers(4 * size, 4)), taps(numbers(4 * size));
  const float* rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = x.floats() + i * size;
  std::vector<float> out(size);
  k.convolve(rows, taps.floats(), size, 4, size, out.data());
  Error error;
  for (int64_t c = 0; c < size; ++c) {
    double right = 0;
    for (int i = 0; i < 4; ++i) right += double(rows[i][c]) * taps.floats()[i * size + c];
    error.add(out[c], silu(right));
  }
  return error.value();
}

double norms(const Kernels& k, int64_t size) {
  const AtTheEnd x(numbers(size)), w(numbers(size));
  std::vector<float> normed(size), unit(size);
  k.rms_norm(x.floats(), w.floats(), size, 1e-6f, normed.data());
  k.unit(x.floats(), size, 1e-6f, 0.5f, unit.data());
  const double squares = dot(x.floats(), x.floats(), size);
  Error error;
  for (int64_t i = 0; i < size; ++i) {
    error.add(normed[i], x.floats()[i] / std::sqrt(squares / size + 1e-6) * w.floats()[i]);
    error.add(unit[i], x.floats()[i] / std::sqrt(squares + 1e-6) * 0.5);
  }
  return error.value();
}

double gates(const Kernels& k, int64_t size) {
  const AtTheEnd gate(numbers(size, 40)), x(numbers(size)), sum(numbers(size));
  const std::vector<float> before(sum.floats(), sum.floats() + size);
  std::vector<float> swiglu(size), sigmoid(size), softmax(size);
  k.swiglu(gate.floats(), x.floats(), size, swiglu.data());
  k.sigmoid_scale(gate.floats(), x.floats(), size, sigmoid.data());
  k.softmax(gate.floats(), size, softmax.data());
  k.accumulate(x.floats(), 0.3f, size, sum.floats());
  const double top = *std::max_element(gate.floats(), gate.floats() + size);
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += std::exp(gate.floats()[i] - top);
  Error error;
  for (int64_t i = 0; i < size; ++i) {
    const double g = gate.floats()[i], one = x.floats()[i];
    error.add(swiglu[i], silu(g) * one);
    error.add(sigmoid[i], one / (1 + std::exp(-g)));
    error.add(softmax[i], std::exp(g - top) / total);
    error.add(sum.floats()[i], before[i] + double(0.3f) * one);
  }
  return error.value();
}

// Far from zero exp ends; a NaN comes through.
bool extremes(const Kernels& k) {
  const float gate[] = {-1e30f, -100.0f, 100.0f, std::nanf("")}, ones[] = {1, 1, 1, 1};
  float out[4];
  k.swiglu(gate, ones, 4, out);
  return std::fabs(out[0]) < 1e-30f && std::fabs(out[1]) < 1e-30f && out[2] == 100.0f &&
         std::isnan(out[3]);
}

bool fine(const Set& set, const char* what, double error) {
  const bool good = error < 2e-6;
  std::printf("%s %s: %.1e%s\n", set.name, what, error, good ? "" : "  WRONG");
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (const Set& set : kSets) {
    const Kernels& k = *set.kernels;
    double worst[5] = {};
    for (int64_t queries : {1, 3, 4, 9, 16})
      for (int64_t dim : {16, 44, 64, 256})
        for (int64_t length : {1, 17, 100, 256})
          worst[0] = std::fmax(worst[0], attention(k, queries, dim, length));
    for (int64_t size : {8, 16, 44, 128, 1004}) {
      worst[1] = std::fmax(worst[1], delta_rule(k, size, 24));
      worst[2] = std::fmax(worst[2], convolution(k, size));
      worst[3] = std::fmax(worst[3], norms(k, size));
      worst[4] = std::fmax(worst[4], gates(k, size));
    }
    const char* names[] = {"attention", "delta rule", "convolution", "norms", "gates"};
    for (int i = 0; i < 5; ++i) good &= fine(set, names[i], worst[i]);
    if (!extremes(k)) good = false, std::printf("%s extremes  WRONG\n", set.name);
  }
  return good ? 0 : 1;
}
