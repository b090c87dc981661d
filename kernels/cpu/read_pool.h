// ReadPool: threads that read byte ranges of files into given memory, many at once.
//
// It is what storage/reader.py uses where it is built. It knows file numbers, offsets and
// addresses; it opens nothing, and knows no layers, experts or slots.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace flashmoe {

// Memory that a part of a block is read into.
struct Segment {
  char* address;
  size_t nbytes;
};

// One contiguous range of a file; its bytes fill its segments in order.
struct FileBlock {
  int fd;
  int64_t offset;
  std::vector<Segment> segments;
};

// One piece as it was read. Times are of the clock that Python's perf_counter_ns reads.
struct Record {
  int64_t block;  // its number in the batch
  int64_t offset;
  int64_t nbytes;  // asked
  int64_t got;     // fewer than asked: the file ended, or `error` stopped it
  int64_t error;   // errno, or 0
  int64_t start_ns;
  int64_t end_ns;
  int64_t thread;  // 0 to threads - 1; `threads` is the one that submitted
};

struct Way {
  int64_t split;  // pieces of a block, at multiples of ALIGNMENT
  bool direct;    // the files were opened with O_DIRECT
  bool staged;    // never let the device write into the segments themselves
};

constexpr int64_t ALIGNMENT = 4096;  // what O_DIRECT asks of offsets, lengths and addresses

// Where something was made. A child of fork has none of its parent's threads, and finds locks and
// conditions as they happened to be: it may use nothing of a pool, nor even destroy it.
class Home {
 public:
  Home();
  bool here() const;
  // Throws elsewhere.
  void require() const;

 private:
  pid_t pid_;
};

// Owns something with a home; a child's copy is never destroyed.
template <typename T>
std::shared_ptr<T> left_behind_in_children(T* made) {
  return std::shared_ptr<T>(made, [](T* one) {
    if (one->home.here()) delete one;
  });
}

// The reads of one submission. Its memory must stay until `wait` has returned.
class Batch {
 public:
  Batch(std::vector<FileBlock> blocks, Way way);

  const Home home;

  bool done() const;
  void wait();
  // Numbers of blocks that have been read whole since the last call: waits for `least` of them,
  // or until there will be no more. Empty once all have been given.
  std::vector<int64_t> landed(size_t least);
  // Valid once `done`.
  const std::vector<Record>& records() const { return records_; }

 private:
  friend class ReadPool;
  // Small pieces that the page cache holds are read here and now: waking a thread takes longer.
  // Returns the numbers of the others.
  std::vector<size_t> read_at_once(int thread);
  void run(size_t piece, int thread, std::vector<char>& staging);
  void read(Record& record, std::vector<char>& staging) const;
  void end(const Record& record);

  std::vector<FileBlock> blocks_;
  Way way_;
  std::vector<Record> records_;   // one a piece
  std::vector<int> pieces_left_;  // of each block; -1 once one has failed
  std::vector<int64_t> landed_;
  size_t given_ = 0;
  size_t left_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
};

class ReadPool {
 public:
  explicit ReadPool(int threads);
  ~ReadPool() { close(); }

  const Home home;

  std::shared_ptr<Batch> submit(std::vector<FileBlock> blocks, Way way);
  // Finish what was submitted and end the threads; twice is fine.
  void close();

 private:
  struct Task {
    std::shared_ptr<Batch> batch;
    size_t piece;
  };
  void work(int thread);

  std::deque<Task> tasks_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace flashmoe
