// What the checks share: numbers at random, memory with nothing after it, and the sets to check.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace flashmoe {

struct Set {
  const char* name;
  const Kernels* kernels;
};
#if defined(__aarch64__)
inline const Set kSets[] = {{"neon", &kernels_neon}, {"portable", &kernels_portable}};
#else
inline const Set kSets[] = {{"portable", &kernels_portable}};
#endif

inline double uniform() { return std::rand() / (RAND_MAX + 1.0) - 0.5; }

inline std::vector<float> numbers(int64_t count, double scale = 1) {
  std::vector<float> all(count);
  for (float& one : all) one = static_cast<float>(scale * uniform());
  return all;
}

// A copy whose last byte is a page's last, before a page that nobody may touch: who reads beyond
// it crashes.
class AtTheEnd {
 public:
  AtTheEnd(const void* from, size_t nbytes) {
    const size_t page = sysconf(_SC_PAGESIZE), whole = (nbytes + page - 1) / page * page;
    size_ = whole + page;
    start_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + whole, page, PROT_NONE)) std::abort();
    data_ = start_ + whole - nbytes;
    std::memcpy(data_, from, nbytes);
  }
  template <class T>
  explicit AtTheEnd(const std::vector<T>& all) : AtTheEnd(all.data(), all.size() * sizeof(T)) {}
  ~AtTheEnd() { munmap(start_, size_); }
  AtTheEnd(const AtTheEnd&) = delete;
  AtTheEnd& operator=(const AtTheEnd&) = delete;

  float* floats() const { return reinterpret_cast<float*>(data_); }
  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(data_); }

 private:
  size_t size_;
  char *start_, *data_;
};

// The error of numbers, relative to the root of the mean square of what is right.
class Error {
 public:
  void add(double found, double truth) {
    wrong_ += (found - truth) * (found - truth);
    right_ += truth * truth;
  }
  double value() const { return std::sqrt(wrong_ / right_); }

 private:
  double wrong_ = 0, right_ = 0;
};

}  // namespace flashmoe
