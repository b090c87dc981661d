// Compiled with AVX-512 F, BW, DQ and VL.
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
#include "lanes_avx512.h"
#include "all.inl.h"
}  // namespace
const Kernels kernels_avx512 = make_kernels();
}  // namespace flashmoe
#endif
