// AArch64: NEON is part of the baseline.
#if defined(__aarch64__)
#include <arm_neon.h>

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
#include "lanes_neon.h"
#include "all.inl.h"
}  // namespace
const Kernels kernels_neon = make_kernels();
}  // namespace flashmoe
#endif
