// Weights as Python hands them over: the kernels' structures together with what keeps their memory
// alive.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
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
    if (!buffer->is_floats() || !buffer->packed() || buffer->size() != size)
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

inline void require(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

struct BoundSharedExpert : Holder {
  SharedExpert parts;

  int64_t hidden() const { return parts.gate.cols; }

  BoundSharedExpert(const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down,
                    const BoundMatrix& scalar_gate) {
    for (const BoundMatrix* m : {&gate, &up, &down, &scalar_gate})
      held.insert(held.end(), m->held.begin(), m->held.end());
    parts = {gate.matrix(), up.matrix(), down.matrix(), scalar_gate.matrix()};
    const Matrix &g = parts.gate, &u = parts.up, &d = parts.down, &s = parts.scalar_gate;
    require(u.rows == g.rows && u.cols == g.cols && d.rows == g.cols && d.cols == g.rows &&
                s.rows == 1 && s.cols == g.cols,
            "the matrices of a shared expert do not fit together");
  }
};

// The stacks of gate, up and down. One preparation of x serves gate and up.
inline ExpertStacks stacks_of(const BoundMatrix& gate, const BoundMatrix& up,
                              const BoundMatrix& down) {
  const Matrix &g = gate.matrix(), &u = up.matrix(), &d = down.matrix();
  require(u.rows == g.rows && u.cols == g.cols && u.bits == g.bits && u.span() == g.span() &&
              d.rows == g.cols && d.cols == g.rows,
          "the matrices of an expert do not fit together");
  return {gate.stack, up.stack, down.stack};
}

inline void check_slots(const ExpertStacks& stacks, const int64_t* slots, int64_t count) {
  const int64_t there = std::min({stacks.gate.count, stacks.up.count, stacks.down.count});
  for (int64_t i = 0; i < count; ++i)
    require(slots[i] >= 0 && slots[i] < there, "a slot number is out of range");
}

struct BoundDeltaNet : Holder {
  DeltaNet parts;

  int64_t hidden() const { return parts.qkv.cols; }

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
    require(kernel >= 1 && k_heads >= 1 && k_dim >= 1 && v_heads >= 1 && v_dim >= 1 &&
                v_heads % k_heads == 0,
            "the value heads of a GatedDeltaNet must be a multiple of its key heads");
    parts.taps = hold(taps, kernel * parts.channels(), "conv1d");
    parts.a_log = hold(a_log, v_heads, "A_log");
    parts.dt_bias = hold(dt_bias, v_heads, "dt_bias");
    parts.norm = hold(norm, v_dim, "norm");
    require(parts.qkv.rows == parts.channels() && parts.z.rows == v_heads * v_dim &&
                parts.out.cols == v_heads * v_dim && parts.a.rows == v_heads &&
                parts.b.rows == v_heads,
            "the matrices of a GatedDeltaNet do not fit its heads");
    require(parts.z.cols == hidden() && parts.b.cols == hidden() && parts.a.cols == hidden() &&
                parts.out.rows == hidden(),
            "the matrices of a GatedDeltaNet do not fit together");
  }
};

struct BoundAttention : Holder {
  Attention parts;

  int64_t hidden() const { return parts.q.cols; }

  BoundAttention(const BoundMatrix& q, const BoundMatrix& k, const BoundMatrix& v,
                 const BoundMatrix& out, nanobind::handle q_norm, nanobind::handle k_norm,
                 float eps, double rope_theta, int64_t heads, int64_t kv_heads, int64_t dim,
                 int64_t rotary_dim) {
    for (const BoundMatrix* m : {&q, &k, &v, &out})
      held.insert(held.end(), m->held.begin(), m->held.end());
    parts.q = q.matrix(), parts.k = k.matrix(), parts.v = v.matrix(), parts.out = out.matrix();
    require(heads >= 1 && kv_heads >= 1 && dim >= 1 && heads % kv_heads == 0,
            "the heads of an attention must be a multiple of its key heads");
    require(rotary_dim >= 0 && rotary_dim <= dim && rotary_dim % 2 == 0,
            "the rotary part of a head must be even and no larger than the head");
    parts.q_norm = hold(q_norm, dim, "q_norm");
    parts.k_norm = hold(k_norm, dim, "k_norm");
    parts.eps = eps, parts.rope_theta = rope_theta;
    parts.heads = heads, parts.kv_heads = kv_heads, parts.dim = dim, parts.rotary_dim = rotary_dim;
    require(parts.q.rows == 2 * heads * dim && parts.k.rows == kv_heads * dim &&
                parts.v.rows == kv_heads * dim && parts.out.cols == heads * dim,
            "the matrices of an attention do not fit its heads");
    require(parts.k.cols == hidden() && parts.v.cols == hidden() && parts.out.rows == hidden(),
            "the matrices of an attention do not fit together");
  }
};

// The size of a buffer of keys [kv_heads, size, dim]; throws where the new tokens do not fit.
inline int64_t key_room(const Buffer& keys, int64_t position, int64_t tokens) {
  require(keys.ndim() == 3 && position >= 0 && tokens >= 0 && position <= keys.shape(1) - tokens,
          "the key buffer has no room for the new tokens");
  return keys.shape(1);
}

}  // namespace flashmoe
