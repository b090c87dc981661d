// The kernels of one instruction set, over its lanes; included once in each isa_*.cpp.
#include "math.inl.h"
#include "row.inl.h"
#include "product_exact.inl.h"
#include "product_integer.inl.h"
#include "product.inl.h"
#include "ops.inl.h"
#include "memory.inl.h"

constexpr Kernels make_kernels() {
  return {row_nbytes, prepare,  product,  dequantize, rms_norm, swiglu,     sigmoid_scale,
          accumulate, softmax,  convolve, unit,       delta_step, attend,
          read_words};
}
