// flashmoe_lab._native: the kernels as Python sees them. Results go into arrays that the caller
// gives; whoever is here holds no GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>

#include "bound.h"
#include "call.h"
#include "isa.h"
#include "linear.h"
#include "router.h"
#include "scratch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {

void bind_block(nb::module_& module);
void bind_read_pool(nb::module_& module);  // bind_read_pool.cpp

namespace {

Kind kind_named(const std::string& name) {
  if (name == "float32") return Kind::f32;
  if (name == "float16") return Kind::f16;
  if (name == "bfloat16") return Kind::bf16;
  throw std::invalid_argument("type is '" + name + "'; known are float32, float16, bfloat16");
}

// Floats of a caller, packed; `size` numbers where it is known.
float* floats(const Buffer& buffer, int64_t size, const char* name) {
  if (!buffer.is_floats() || !buffer.packed() || buffer.size() != size)
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(size) +
                                " packed float32 numbers; it has " + std::to_string(buffer.size()) +
                                " of type '" + buffer.type() + "'");
  return buffer.at<float>();
}

// One part of a matrix or of a stack of matrices.
struct Part {
  std::shared_ptr<Buffer> buffer;
  int64_t stride = 0;  // from matrix to matrix

  Part(nb::handle object, int64_t slots, int64_t rows, int64_t nbytes, const char* name)
      : buffer(std::make_shared<Buffer>(object.ptr())) {
    const int axis = slots ? 1 : 0;
    const bool fits = buffer->ndim() == axis + 2 && buffer->packed(axis) &&
                      (!slots || buffer->shape(0) == slots) && buffer->shape(axis) == rows &&
                      buffer->shape(axis + 1) * buffer->itemsize() == nbytes;
    if (!fits) throw std::invalid_argument(std::string(name) + " does not fit the other parts");
    if (slots) stride = buffer->stride(0);
  }
};

BoundMatrix make_matrix(nb::handle weight, nb::handle scales, nb::handle biases, int bits,
                        int group, const std::string& kind, bool stacked) {
  BoundMatrix out;
  Matrix& m = out.stack.first;
  m.bits = bits;
  m.group = group;
  m.kind = kind_named(kind);
  Buffer shape(weight.ptr());
  const int axis = stacked ? 1 : 0;
  require(shape.ndim() == axis + 2, "weight must have two axes, or three for a stack");
  const int64_t slots = stacked ? shape.shape(0) : 0;
  m.rows = shape.shape(axis);
  m.cols = shape.shape(axis + 1);
  require(m.cols > 0, "weight must have columns");
  if (bits) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8,
          "bits must be 2, 3, 4, 5, 6 or 8");
    require(group == 32 || group == 64 || group == 128, "group size must be 32, 64 or 128");
    m.cols = m.cols * 32 / bits;
    require(m.cols > 0 && m.cols % group == 0, "columns must be a whole number of groups");
  }
  const auto hold = [&](nb::handle object, int64_t nbytes, const char* name, int64_t& stride) {
    Part part(object, slots, m.rows, nbytes, name);
    out.held.push_back(part.buffer);
    stride = part.stride;
    return part.buffer->at<const uint8_t>();
  };
  m.weight = hold(weight, m.row_nbytes(), "weight", out.stack.weight_stride);
  if (bits) {
    const int64_t nbytes = m.groups() * nbytes_of(m.kind);
    m.scales = hold(scales, nbytes, "scales", out.stack.scales_stride);
    m.biases = hold(biases, nbytes, "biases", out.stack.biases_stride);
  }
  out.stack.count = slots;
  return out;
}

void bind_matrix(nb::module_& module) {
  nb::class_<BoundMatrix>(module, "Matrix")
      .def("__init__",
           [](BoundMatrix* self, nb::handle weight, nb::handle scales, nb::handle biases, int bits,
              int group, const std::string& kind, bool stacked) {
             new (self)
                 BoundMatrix(make_matrix(weight, scales, biases, bits, group, kind, stacked));
           },
           "weight"_a, "scales"_a.none(), "biases"_a.none(), "bits"_a, "group_size"_a, "kind"_a,
           "stacked"_a = false)
      .def_prop_ro("rows", [](const BoundMatrix& m) { return m.matrix().rows; })
      .def_prop_ro("columns", [](const BoundMatrix& m) { return m.matrix().cols; })
      .def("product",
           [](const BoundMatrix& m, nb::handle x, int64_t tokens, nb::handle out) {
             Buffer in(x.ptr()), result(out.ptr(), true);
             const float* from = floats(in, tokens * m.matrix().cols, "x");
             float* to = floats(result, tokens * m.matrix().rows, "out");
             const Call call;
             linear(m.matrix(), from, tokens, to);
           })
      .def("dequantize", [](const BoundMatrix& m, const std::vector<int64_t>& rows,
                            nb::handle out) {
        Buffer result(out.ptr(), true);
        const int64_t cols = m.matrix().cols, count = static_cast<int64_t>(rows.size());
        float* to = floats(result, count * cols, "out");
        for (int64_t row : rows)
          require(row >= 0 && row < m.matrix().rows, "a row is outside of the matrix");
        const Call call;
        for (int64_t i = 0; i < count; ++i)
          kernels().dequantize(m.matrix(), rows[i], to + i * cols);
      });
}

void bind_experts(nb::module_& module) {
  module.def("expert_mlp", [](const BoundMatrix& gate, const BoundMatrix& up,
                              const BoundMatrix& down, nb::handle x, int64_t count,
                              nb::handle tokens, nb::handle slots, nb::handle out) {
    Buffer in(x.ptr()), token(tokens.ptr()), slot(slots.ptr()), result(out.ptr(), true);
    const Matrix &g = gate.matrix(), &d = down.matrix();
    const ExpertStacks stacks = stacks_of(gate, up, down);
    require(token.itemsize() == 8 && token.packed() && slot.itemsize() == 8 && slot.packed() &&
              token.size() == slot.size(),
          "tokens and slots must be packed int64 numbers, as many of each");
    const int64_t pairs = token.size();
    const auto *t = token.at<const int64_t>(), *s = slot.at<const int64_t>();
    for (int64_t i = 0; i < pairs; ++i)
      require(t[i] >= 0 && t[i] < count, "a token number is out of range");
    check_slots(stacks, s, pairs);
    const float* from = floats(in, count * g.cols, "x");
    float* to = floats(result, pairs * d.rows, "out");
    const Call call;
    expert_mlp(stacks, from, count, t, s, pairs, to);
  });
  module.def("weighted_sum", [](nb::handle y, nb::handle weights, int64_t count, int64_t k,
                                nb::handle out) {
    Buffer in(y.ptr()), weight(weights.ptr()), result(out.ptr(), true);
    const int64_t hidden = count ? result.size() / count : 0;
    const float *from = floats(in, count * k * hidden, "y"),
                *w = floats(weight, count * k, "weights");
    float* to = floats(result, count * hidden, "out");
    const Call call;
    weighted_sum(from, w, count, k, hidden, to);
  });
  nb::class_<BoundSharedExpert>(module, "SharedExpert")
      .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&,
                    const BoundMatrix&>())
      .def("__call__", [](const BoundSharedExpert& e, nb::handle x, int64_t count,
                          nb::handle out) {
        Buffer in(x.ptr()), result(out.ptr(), true);
        const float* from = floats(in, count * e.parts.gate.cols, "x");
        float* to = floats(result, count * e.parts.down.rows, "out");
        const Call call;
        shared_expert(e.parts, from, count, to);
      });
}

void bind_mixers(nb::module_& module) {
  nb::class_<BoundDeltaNet>(module, "DeltaNet")
      .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&,
                    const BoundMatrix&, const BoundMatrix&, nb::handle, nb::handle, nb::handle,
                    nb::handle, float, int64_t, int64_t, int64_t, int64_t, int64_t>())
      .def("__call__", [](const BoundDeltaNet& d, nb::handle x, int64_t tokens, nb::handle conv,
                          nb::handle recurrent, nb::handle out) {
        Buffer in(x.ptr()), c(conv.ptr(), true), r(recurrent.ptr(), true), o(out.ptr(), true);
        const DeltaNet& p = d.parts;
        const float* from = floats(in, tokens * p.qkv.cols, "x");
        float* inputs = floats(c, (p.kernel - 1) * p.channels(), "conv");
        float* state = floats(r, p.v_heads * p.v_dim * p.k_dim, "recurrent");
        float* to = floats(o, tokens * p.out.rows, "out");
        const Call call;
        delta_net(p, from, tokens, inputs, state, to);
      });
  nb::class_<BoundAttention>(module, "Attention")
      .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&,
                    const BoundMatrix&, nb::handle, nb::handle, float, double, int64_t, int64_t,
                    int64_t, int64_t>())
      .def("__call__", [](const BoundAttention& a, nb::handle x, int64_t tokens, int64_t position,
                          nb::handle keys, nb::handle values, nb::handle out) {
        Buffer in(x.ptr()), k(keys.ptr(), true), v(values.ptr(), true), o(out.ptr(), true);
        const Attention& p = a.parts;
        const int64_t size = key_room(k, position, tokens), room = p.kv_heads * size * p.dim;
        const float* from = floats(in, tokens * p.q.cols, "x");
        float *all_keys = floats(k, room, "keys"), *all_values = floats(v, room, "values");
        float* to = floats(o, tokens * p.out.rows, "out");
        const Call call;
        attention(p, from, tokens, position, all_keys, all_values, size, to);
      });
}

void bind_small(nb::module_& module) {
  module.def("read", [](nb::handle array) {
    Buffer all(array.ptr());
    const int64_t words = all.size() * all.itemsize() / 8, share = 1 << 17;
    const auto* from = all.at<const uint64_t>();
    std::atomic<uint64_t> result{0};
    const Call call;
    parallel_for((words + share - 1) / share, [&](int64_t i) {
      result ^= kernels().read_words(from + i * share, std::min(share, words - i * share));
    });
    return result.load();
  });
  module.def("rms_norm", [](nb::handle x, nb::handle weight, float eps, nb::handle out) {
    Buffer in(x.ptr()), w(weight.ptr()), result(out.ptr(), true);
    const int64_t size = w.size();
    require(size > 0, "weight must have columns");
    const int64_t rows = in.size() / size;
    const float *from = floats(in, rows * size, "x"), *scale = floats(w, size, "weight");
    float* to = floats(result, rows * size, "out");
    const Call call;
    for (int64_t i = 0; i < rows; ++i)
      kernels().rms_norm(from + i * size, scale, size, eps, to + i * size);
  });
  module.def("route", [](nb::handle logits, int64_t tokens, int64_t k, bool normalise,
                         nb::handle experts, nb::handle weights) {
    Buffer in(logits.ptr()), e(experts.ptr(), true), w(weights.ptr(), true);
    const int64_t count = tokens ? in.size() / tokens : 0;
    require(k >= 1 && (k <= count || !tokens) && e.itemsize() == 4 && e.size() == tokens * k &&
                e.packed(),
          "experts must be tokens x k packed int32 numbers");
    const float* from = floats(in, tokens * count, "logits");
    float* to = floats(w, tokens * k, "weights");
    const Call call;
    route(from, tokens, count, k, normalise, e.at<int32_t>(), to);
  });
}

}  // namespace
}  // namespace flashmoe

NB_MODULE(_native, module) {
  using namespace flashmoe;
  module.def("isa", &isa);
  module.def("isas", &isas);
  module.def("set_isa", &set_isa, nb::call_guard<nb::gil_scoped_release>());
  module.def("threads", &threads);
  module.def("set_threads", &set_threads, nb::call_guard<nb::gil_scoped_release>());
  module.def("available_threads", &available_threads);
  module.def("scratch_nbytes", &scratch_nbytes);
  module.def("integer", &integer_mode);
  module.def("set_integer", &set_integer_mode, nb::call_guard<nb::gil_scoped_release>());
  bind_matrix(module);
  bind_experts(module);
  bind_mixers(module);
  bind_small(module);
  bind_block(module);
  bind_read_pool(module);
}
