#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "settings.h"

namespace flashmoe {
namespace {

struct Built {
  const char* name;
  const Kernels* kernels;
};

std::vector<Built> available() {
  std::vector<Built> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // not every compiler knows the name f16c
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
  if (vnni) found.push_back({"avx512_vnni", &kernels_avx512_vnni});
  if (avx512) found.push_back({"avx512", &kernels_avx512});
  if (avx2) found.push_back({"avx2", &kernels_avx2});
#elif defined(__aarch64__)
  found.push_back({"neon", &kernels_neon});
#endif
  found.push_back({"portable", &kernels_portable});
  return found;
}

const std::vector<Built>& built() {
  static const std::vector<Built> found = available();
  return found;
}

const Built* find(const std::string& name, const char* what) {
  for (const Built& one : built())
    if (name == one.name) return &one;
  std::string known;
  for (const Built& one : built()) known += (known.empty() ? "" : ", ") + std::string(one.name);
  throw std::invalid_argument(std::string(what) + " is '" + name + "'; this machine has " + known);
}

std::atomic<const Built*>& chosen() {
  static std::atomic<const Built*> current = [] {
    const char* wish = std::getenv("FLASHMOE_ISA");
    return wish && *wish ? find(wish, "FLASHMOE_ISA") : &built().front();
  }();
  return current;
}

}  // namespace

const std::vector<std::string>& isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Built& one : built()) all.push_back(one.name);
    return all;
  }();
  return names;
}

std::string isa() { return chosen().load()->name; }

void set_isa(const std::string& name) {
  const Built* wanted = find(name, "isa");
  std::unique_lock hold(settings());
  chosen().store(wanted);
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

}  // namespace flashmoe
