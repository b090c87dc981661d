// Weights as Python hands them over: the kernels' structures together with what keeps their memory
// alive.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "delta_net.h"
#include "experts.h"

namespace flashmoe {

struct Holder {
  std::vector<std::shared_ptr<Buffer>> held;

  const float* hold(nanobind::handle object, int64_t size, const char* name) {
    auto buffer = std::make_shared<Buffer>(object.ptr());
    if (buffer->itemsize() != 4 || !buffer->packed() || buffer->size() != size)
      throw std::invalid_argument(std::string(name) + " must be " + std::to_string(size) +
                                  " packed float32 numbers");
    held.push_back(buffer);
    return buffer->at<const float>();
  }
};

struct BoundMatrix : Holder {
  Stack stack;
  const Matrix& matrix() const { return stack.first; }
};

struct BoundSharedExpert : Holder {
  SharedExpert parts;

  BoundSharedExpert(const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down,
                    const BoundMatrix& scalar_gate) {
    for (const BoundMatrix* m : {&gate, &up, &down, &scalar_gate})
      held.insert(held.end(), m->held.begin(), m->held.end());
    parts = {gate.matrix(), up.matrix(), down.matrix(), scalar_gate.matrix()};
  }
};

struct BoundDeltaNet : Holder {
  DeltaNet parts;

  BoundDeltaNet(const BoundMatrix& qkv, const BoundMatrix& z, const BoundMatrix& b,
                const BoundMatrix& a, const BoundMatrix& out, nanobind::handle taps,
                nanobind::handle a_log, nanobind::handle dt_bias, nanobind::handle norm, float eps,
                int64_t kernel, int64_t k_heads, int64_t k_dim, int64_t v_heads, int64_t v_dim) {
    for (const BoundMatrix* m : {&qkv, &z, &b, &a, &out})
      held.insert(held.end(), m->held.begin(), m->held.end());
    parts.qkv = qkv.matrix(), parts.z = z.matrix(), parts.b = b.matrix(), parts.a = a.matrix();
    parts.out = out.matrix();
    parts.eps = eps, parts.kernel = kernel;
    parts.k_heads = k_heads, parts.k_dim = k_dim, parts.v_heads = v_heads, parts.v_dim = v_dim;
    parts.taps = hold(taps, kernel * parts.channels(), "conv1d");
    parts.a_log = hold(a_log, v_heads, "A_log");
    parts.dt_bias = hold(dt_bias, v_heads, "dt_bias");
    parts.norm = hold(norm, v_dim, "norm");
    if (parts.qkv.rows != parts.channels() || parts.z.rows != v_heads * v_dim ||
        parts.out.cols != v_heads * v_dim || parts.a.rows != v_heads || parts.b.rows != v_heads)
      throw std::invalid_argument("the matrices of a GatedDeltaNet do not fit its heads");
  }
};

struct BoundAttention : Holder {
  Attention parts;

  BoundAttention(const BoundMatrix& q, const BoundMatrix& k, const BoundMatrix& v,
                 const BoundMatrix& out, nanobind::handle q_norm, nanobind::handle k_norm,
                 float eps, double rope_theta, int64_t heads, int64_t kv_heads, int64_t dim,
                 int64_t rotary_dim) {
    for (const BoundMatrix* m : {&q, &k, &v, &out})
      held.insert(held.end(), m->held.begin(), m->held.end());
    parts.q = q.matrix(), parts.k = k.matrix(), parts.v = v.matrix(), parts.out = out.matrix();
    parts.q_norm = hold(q_norm, dim, "q_norm");
    parts.k_norm = hold(k_norm, dim, "k_norm");
    parts.eps = eps, parts.rope_theta = rope_theta;
    parts.heads = heads, parts.kv_heads = kv_heads, parts.dim = dim, parts.rotary_dim = rotary_dim;
    if (parts.q.rows != 2 * heads * dim || parts.k.rows != kv_heads * dim ||
        parts.v.rows != kv_heads * dim || parts.out.cols != heads * dim)
      throw std::invalid_argument("the matrices of an attention do not fit its heads");
  }
};

}  // namespace flashmoe
