// Plain C++ for every machine.
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
#include "lanes_portable.h"
#include "all.inl.h"
}  // namespace
const Kernels kernels_portable = make_kernels();
}  // namespace flashmoe
