// flashmoe_lab._native: a whole layer.
#include <nanobind/nanobind.h>

#include <optional>
#include <type_traits>

#include "block.h"
#include "bound.h"
#include "call.h"
#include "clock.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace flashmoe {
namespace {

// A layer with what keeps its parts alive. The mixer is a Python object of one of two classes.
struct BoundBlock : Holder {
  Block parts;
  nb::object mixer;

  BoundBlock(nb::handle input_norm, float input_eps, nb::object mixer_, nb::handle post_norm,
             float post_eps, const BoundMatrix& router, bool normalise,
             const BoundSharedExpert& shared)
      : mixer(mixer_) {
    if (nb::isinstance<BoundDeltaNet>(mixer))
      parts.delta = &nb::cast<BoundDeltaNet&>(mixer).parts;
    else
      parts.attention = &nb::cast<BoundAttention&>(mixer).parts;
    for (const Holder* one : {static_cast<const Holder*>(&router),
                              static_cast<const Holder*>(&shared)})
      held.insert(held.end(), one->held.begin(), one->held.end());
    parts.router = router.matrix();
    parts.normalise = normalise;
    parts.shared = shared.parts;
    const Matrix& out = parts.delta ? parts.delta->out : parts.attention->out;
    require(out.rows == parts.hidden() && shared.hidden() == parts.hidden(),
            "the parts of a layer do not fit together");
    parts.input_norm = {hold(input_norm, parts.hidden(), "input_norm"), input_eps};
    parts.post_norm = {hold(post_norm, parts.hidden(), "post_norm"), post_eps};
  }
};

template <class T = float>
T* numbers(const Buffer& buffer, int64_t size, const char* name) {
  constexpr bool floats = std::is_same_v<T, float>;
  const bool right = floats ? buffer.is_floats() : buffer.itemsize() == sizeof(T);
  if (!right || !buffer.packed() || buffer.size() != size)
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(size) +
                                " packed " + (floats ? "float32" : "whole") + " numbers; it has " +
                                std::to_string(buffer.size()) + " of type '" + buffer.type() + "'");
  return buffer.at<T>();
}

// int64 [4] where calls say when it was known which experts are wanted, when it had been asked where
// they are, when they were there and when all was done, in ns of `time.perf_counter_ns`; or None.
class Moments {
 public:
  explicit Moments(nb::handle array) {
    if (array.is_none()) return;
    buffer_.emplace(array.ptr(), true);
    at_ = numbers<int64_t>(*buffer_, 4, "moments");
  }
  void routed() {
    const int64_t ns = now_ns();
    set(0, ns), set(1, ns), set(2, 0), set(3, 0);
  }
  void fetched() { set(2, now_ns()); }
  void done() { set(3, now_ns()); }

 private:
  void set(int moment, int64_t ns) {
    if (at_) at_[moment] = ns;
  }

  std::optional<Buffer> buffer_;
  int64_t* at_ = nullptr;
};

void before(const BoundBlock& block, nb::handle x, int64_t tokens, int64_t k, int64_t position,
            nb::handle first, nb::handle second, nb::handle stream, nb::handle normed,
            nb::handle shared, nb::handle logits, nb::handle experts, nb::handle weights,
            nb::handle moments) {
  const Block& b = block.parts;
  const int64_t size = tokens * b.hidden();
  if (k < 1 || k > b.router.rows) throw std::invalid_argument("k is out of range");
  Buffer in(x.ptr()), m1(first.ptr(), true), m2(second.ptr(), true), s(stream.ptr(), true),
      n(normed.ptr(), true), sh(shared.ptr(), true), l(logits.ptr(), true),
      e(experts.ptr(), true), w(weights.ptr(), true);
  Memory memory;
  memory.position = position;
  if (b.delta) {
    const DeltaNet& d = *b.delta;
    memory.conv = numbers(m1, (d.kernel - 1) * d.channels(), "conv");
    memory.recurrent = numbers(m2, d.v_heads * d.v_dim * d.k_dim, "recurrent");
  } else {
    const Attention& a = *b.attention;
    memory.size = key_room(m1, position, tokens);
    memory.keys = numbers(m1, a.kv_heads * memory.size * a.dim, "keys");
    memory.values = numbers(m2, a.kv_heads * memory.size * a.dim, "values");
  }
  const Before out{numbers(s, size, "stream"),
                   numbers(n, size, "normed"),
                   numbers(sh, size, "shared"),
                   numbers(l, tokens * b.router.rows, "logits"),
                   numbers(w, tokens * k, "weights"),
                   numbers<int32_t>(e, tokens * k, "experts")};
  const float* from = numbers(in, size, "x");
  Moments when(moments);
  {
    const Call call;
    run_before(b, from, tokens, k, memory, out);
  }
  when.routed();
}

void after(const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down,
           nb::handle normed, nb::handle stream, nb::handle shared, nb::handle slots,
           nb::handle weights, nb::handle out, nb::handle moments) {
  Buffer n(normed.ptr()), s(stream.ptr()), sh(shared.ptr()), at(slots.ptr()), w(weights.ptr()),
      o(out.ptr(), true);
  if (at.ndim() != 2) throw std::invalid_argument("slots must be [tokens, k]");
  const int64_t tokens = at.shape(0), k = at.shape(1), size = tokens * gate.matrix().cols;
  const auto* place = numbers<const int64_t>(at, tokens * k, "slots");
  const ExpertStacks stacks = stacks_of(gate, up, down);
  check_slots(stacks, place, tokens * k);
  const float *from = numbers(n, size, "normed"), *x = numbers(s, size, "stream"),
              *y = numbers(sh, size, "shared"), *weight = numbers(w, tokens * k, "weights");
  float* to = numbers(o, size, "out");
  Moments when(moments);
  when.fetched();
  {
    const Call call;
    run_after(stacks, from, x, y, tokens, k, place, weight, to);
  }
  when.done();
}

}  // namespace

void bind_block(nb::module_& module) {
  nb::class_<BoundBlock>(module, "Block")
      .def(nb::init<nb::handle, float, nb::object, nb::handle, float, const BoundMatrix&, bool,
                    const BoundSharedExpert&>())
      .def("before", &before, "x"_a, "tokens"_a, "k"_a, "position"_a, "first"_a, "second"_a,
           "stream"_a, "normed"_a, "shared"_a, "logits"_a, "experts"_a, "weights"_a,
           "moments"_a.none() = nb::none());
  module.def("after", &after, "gate"_a, "up"_a, "down"_a, "normed"_a, "stream"_a, "shared"_a,
             "slots"_a, "weights"_a, "out"_a, "moments"_a.none() = nb::none());
}

}  // namespace flashmoe
