// Compiled with AVX2, FMA, F16C and BMI2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "scratch.h"

// Every name below is this file's own: a function that two files share would be compiled with the
// flags of one of them and run on machines that lack them.
namespace flashmoe {
namespace {
#include "codes.inl.h"
#include "lanes_avx2.h"
#include "all.inl.h"
}  // namespace
const Kernels kernels_avx2 = make_kernels();
}  // namespace flashmoe
#endif
