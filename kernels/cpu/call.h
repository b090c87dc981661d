// One call of the kernels from Python: it holds no GIL, and settings stay as they are to its end.
#pragma once

#include <nanobind/nanobind.h>

#include <shared_mutex>

#include "isa.h"
#include "settings.h"

namespace flashmoe {

struct Call {
  nanobind::gil_scoped_release free;  // first: a thread that waits for settings holds no GIL
  std::shared_lock<std::shared_mutex> as_set{settings()};

  Call() { kernels(); }  // a wrong FLASHMOE_ISA is said here, not amid the work
};

}  // namespace flashmoe
