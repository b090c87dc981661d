#include "settings.h"

#include <pthread.h>

#include <new>

namespace flashmoe {
namespace {

alignas(std::shared_mutex) unsigned char one_memory[sizeof(std::shared_mutex)];

}  // namespace

std::shared_mutex& settings() {
  static std::shared_mutex* one = [] {
    // A child of fork has none of the threads that may hold it.
    pthread_atfork(nullptr, nullptr, [] { new (one_memory) std::shared_mutex; });
    return new (one_memory) std::shared_mutex;
  }();
  return *one;
}

}  // namespace flashmoe
