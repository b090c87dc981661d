// Nanoseconds of the clock that Python's perf_counter_ns reads, for moments told beside its own.
#pragma once

#include <time.h>

#include <cstdint>

namespace flashmoe {

inline int64_t now_ns() {
  timespec now;
#ifdef __APPLE__
  clock_gettime(CLOCK_UPTIME_RAW, &now);
#else
  clock_gettime(CLOCK_MONOTONIC, &now);
#endif
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

}  // namespace flashmoe
