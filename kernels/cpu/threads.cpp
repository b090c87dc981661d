#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

namespace flashmoe {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 2000;  // some tens of microseconds: the next call of a layer comes sooner

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local bool working = false;  // within a body

// A part of a job's indices. A cache line of its own, because every thread counts up in its own.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

class Pool {
 public:
  explicit Pool(int workers) : ranges_(workers + 1) {
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this, i] { serve(i + 1); });
    } catch (const std::system_error&) {
      // The system gives no more: those that there are do the work.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      stop_ = true;
      ticket_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int64_t count, const std::function<void(int64_t)>& body) {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      body_ = &body;
      const auto parts = static_cast<int64_t>(ranges_.size());
      for (int64_t i = 0; i < parts; ++i) {
        ranges_[i].next.store(i * count / parts, std::memory_order_relaxed);
        ranges_[i].end = (i + 1) * count / parts;
      }
      open_ = true;
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(body, 0);
    {
      // Who has not come by now is not waited for: a sleeping thread wakes late.
      std::lock_guard<std::mutex> hold(mutex_);
      open_ = false;
    }
    while (inside_.load(std::memory_order_acquire)) pause();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // A thread goes through its own part in order, so that what a body asks memory for in advance is
  // its own, and then helps with the others'. What a body throws is kept for the caller, and the
  // rest is left undone.
  void work(const std::function<void(int64_t)>& body, size_t own) noexcept {
    try {
      for (size_t n = 0; n < ranges_.size(); ++n) {
        Range& range = ranges_[(own + n) % ranges_.size()];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          body(i);
      }
    } catch (...) {
      for (Range& range : ranges_) range.next.store(range.end, std::memory_order_relaxed);
      std::lock_guard<std::mutex> hold(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void serve(size_t own) {
    working = true;
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && ticket_.load(std::memory_order_acquire) == seen; ++i) pause();
      std::unique_lock<std::mutex> hold(mutex_);
      wake_.wait(hold, [&] { return ticket_.load(std::memory_order_relaxed) != seen; });
      seen = ticket_.load(std::memory_order_relaxed);
      if (stop_) return;
      if (!open_) continue;
      inside_.fetch_add(1, std::memory_order_relaxed);
      const auto& body = *body_;
      hold.unlock();
      work(body, own);
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // jobs handed out so far
  std::atomic<int> inside_{0};       // workers on the job in hand
  bool open_ = false, stop_ = false;
  const std::function<void(int64_t)>* body_ = nullptr;
  std::vector<Range> ranges_;  // one a thread, the caller's first
  std::exception_ptr error_;  // the first of the job in hand
};

struct Working {
  Working() { working = true; }
  ~Working() { working = false; }
};

struct Owner {
  std::mutex mutex;
  Pool* pool = nullptr;
  std::atomic<int> wanted{0};
  std::atomic<int> available{0};  // asked once: a hit is to cost no system call
};

alignas(Owner) unsigned char one_memory[sizeof(Owner)];

// Never destroyed: at exit its threads sleep, and a daemon thread may still call.
Owner* owner() {
  static Owner* one = [] {
    // A child of fork has none of the threads: it leaves the old pool behind and starts anew, with
    // as many as were asked for.
    pthread_atfork(nullptr, nullptr, [] {
      const int wanted = one->wanted.load();
      (new (one_memory) Owner)->wanted.store(wanted);
    });
    return new (one_memory) Owner;
  }();
  return one;
}

}  // namespace

int available_threads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

int threads() {
  if (const int wanted = owner()->wanted.load()) return wanted;
  if (const int known = owner()->available.load()) return known;
  owner()->available.store(available_threads());
  return owner()->available.load();
}

void set_threads(int count) {
  if (count < 1 || count > kMaxThreads)
    throw std::invalid_argument("threads is " + std::to_string(count) + "; it must be 1 to " +
                                std::to_string(kMaxThreads));
  std::lock_guard<std::mutex> hold(owner()->mutex);
  owner()->wanted.store(count);
  delete owner()->pool;
  owner()->pool = nullptr;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  std::unique_lock<std::mutex> hold(owner()->mutex, std::defer_lock);
  if (count < 2 || working || threads() == 1 || !hold.try_lock()) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  if (!owner()->pool) owner()->pool = new Pool(threads() - 1);
  const Working here;
  owner()->pool->run(count, body);
}

}  // namespace flashmoe
