#include "read_pool.h"

#include <pthread.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "clock.h"

namespace flashmoe {
namespace {

constexpr size_t MAX_SEGMENTS = 1024;       // IOV_MAX on Linux and macOS
constexpr int64_t AT_ONCE_BYTES = 1 << 20;  // copying more than this is work for threads
constexpr size_t STAGING_BYTES = 1 << 20;   // the copy out of it should find it in the L2 cache

int64_t total_nbytes(const FileBlock& block) {
  int64_t total = 0;
  for (const Segment& segment : block.segments) total += int64_t(segment.nbytes);
  return total;
}

// Bytes start to stop of the segments as if they were one.
std::vector<iovec> cut(const std::vector<Segment>& segments, int64_t start, int64_t stop) {
  std::vector<iovec> parts;
  int64_t begin = 0;
  for (const Segment& segment : segments) {
    int64_t low = std::max(start - begin, int64_t(0));
    int64_t high = std::min(stop - begin, int64_t(segment.nbytes));
    if (low < high) parts.push_back({segment.address + low, size_t(high - low)});
    begin += int64_t(segment.nbytes);
  }
  return parts;
}

bool aligned(int64_t value) { return value % ALIGNMENT == 0; }

bool aligned(const std::vector<iovec>& parts) {
  return std::all_of(parts.begin(), parts.end(), [](const iovec& part) {
    return aligned(int64_t(reinterpret_cast<uintptr_t>(part.iov_base))) &&
           aligned(int64_t(part.iov_len));
  });
}

// Fills the parts from the file. Returns the bytes got, fewer than `wanted` at the file's end or
// with `error` set. A short read is resumed at the last multiple of `step`, since O_DIRECT cannot
// begin in between.
int64_t fill(int fd, std::vector<iovec> parts, int64_t offset, int64_t wanted, int64_t step,
             int64_t& error) {
  int64_t got = 0;
  size_t first = 0;
  while (true) {
    int count = int(std::min(parts.size() - first, MAX_SEGMENTS));
    ssize_t read = preadv(fd, &parts[first], count, offset + got);
    if (read < 0) {
      if (errno == EINTR) continue;
      error = errno;
      return got;
    }
    int64_t whole = read - read % step;
    if (got + read >= wanted || whole == 0) return got + read;
    got += whole;
    for (int64_t skip = whole; skip > 0;) {
      iovec& part = parts[first];
      int64_t used = std::min(skip, int64_t(part.iov_len));
      part.iov_base = static_cast<char*>(part.iov_base) + used;
      part.iov_len -= size_t(used);
      skip -= used;
      if (part.iov_len == 0) ++first;
    }
  }
}

// Whether the page cache held all of it; never waits for the device.
bool fill_from_cache(int fd, const std::vector<iovec>& parts, int64_t offset, int64_t wanted) {
#ifdef RWF_NOWAIT
  if (parts.size() > MAX_SEGMENTS) return false;
  return preadv2(fd, parts.data(), int(parts.size()), offset, RWF_NOWAIT) == wanted;
#else
  (void)fd, (void)parts, (void)offset, (void)wanted;
  return false;
#endif
}

void scatter(const char* source, const std::vector<iovec>& parts) {
  for (const iovec& part : parts) {
    std::memcpy(part.iov_base, source, part.iov_len);
    source += part.iov_len;
  }
}

// getpid without the system call, of which every wait would make several.
pid_t this_process() {
  static std::atomic<pid_t> known{getpid()};
  static const int told = pthread_atfork(nullptr, nullptr, [] { known.store(getpid()); });
  return told == 0 ? known.load() : getpid();
}

char* page_of(std::vector<char>& staging) {
  if (staging.empty()) staging.resize(STAGING_BYTES + ALIGNMENT);
  uintptr_t address = reinterpret_cast<uintptr_t>(staging.data());
  return staging.data() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
}

}  // namespace

Home::Home() : pid_(this_process()) {}
bool Home::here() const { return this_process() == pid_; }
void Home::require() const {
  if (!here())
    throw std::runtime_error("the reader belongs to process " + std::to_string(pid_) +
                             ", which this one was forked from; open another one here");
}

Batch::Batch(std::vector<FileBlock> blocks, Way way) : blocks_(std::move(blocks)), way_(way) {
  pieces_left_.resize(blocks_.size());
  for (size_t number = 0; number < blocks_.size(); ++number) {
    const FileBlock& block = blocks_[number];
    int64_t nbytes = total_nbytes(block);
    int64_t pages = (nbytes + ALIGNMENT - 1) / ALIGNMENT;
    int64_t start = 0;
    for (int64_t n = 1; n <= way_.split; ++n) {
      int64_t stop = std::min(nbytes, pages * n / way_.split * ALIGNMENT);
      if (start == stop) continue;
      records_.push_back({int64_t(number), block.offset + start, stop - start, 0, 0, 0, 0, 0});
      ++pieces_left_[number];
      start = stop;
    }
  }
  left_ = records_.size();
}

std::vector<size_t> Batch::read_at_once(int thread) {
  int64_t total = 0;
  for (const Record& record : records_) total += record.nbytes;
  std::vector<size_t> left;
  for (size_t piece = 0; piece < records_.size(); ++piece) {
    Record record = records_[piece];
    const FileBlock& block = blocks_[size_t(record.block)];
    const int64_t begin = record.offset - block.offset;
    record.thread = thread;
    record.start_ns = now_ns();
    if (way_.direct || way_.staged || total > AT_ONCE_BYTES ||
        !fill_from_cache(block.fd, cut(block.segments, begin, begin + record.nbytes), record.offset,
                         record.nbytes)) {
      left.push_back(piece);
      continue;
    }
    record.got = record.nbytes;
    record.end_ns = now_ns();
    records_[piece] = record;
    end(record);
  }
  return left;
}

bool Batch::done() const {
  home.require();
  std::lock_guard lock(mutex_);
  return left_ == 0;
}

void Batch::wait() {
  home.require();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return left_ == 0; });
}

std::vector<int64_t> Batch::landed(size_t least) {
  home.require();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return left_ == 0 || landed_.size() - given_ >= least; });
  std::vector<int64_t> found(landed_.begin() + int64_t(given_), landed_.end());
  given_ = landed_.size();
  return found;
}

void Batch::run(size_t piece, int thread, std::vector<char>& staging) {
  Record record = records_[piece];
  record.thread = thread;
  record.start_ns = now_ns();
  read(record, staging);
  record.end_ns = now_ns();
  records_[piece] = record;
  end(record);
}

void Batch::read(Record& record, std::vector<char>& staging) const {
  const FileBlock& block = blocks_[size_t(record.block)];
  int64_t begin = record.offset - block.offset;
  std::vector<iovec> parts = cut(block.segments, begin, begin + record.nbytes);
  bool straight = !way_.staged && aligned(record.offset) && aligned(parts);
  if (!way_.direct || straight) {
    int64_t step = way_.direct ? ALIGNMENT : 1;
    record.got = fill(block.fd, std::move(parts), record.offset, record.nbytes, step, record.error);
    return;
  }
  char* page = page_of(staging);
  while (record.got < record.nbytes && !record.error) {
    int64_t skip = (record.offset + record.got) % ALIGNMENT;
    int64_t part = std::min(record.nbytes - record.got, int64_t(STAGING_BYTES) - skip);
    int64_t reach = (skip + part + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    int64_t count = fill(block.fd, {{page, size_t(reach)}}, record.offset + record.got - skip,
                         skip + part, ALIGNMENT, record.error) -
                    skip;
    if (count < part) {
      record.got += std::max(count, int64_t(0));
      return;
    }
    int64_t from = begin + record.got;
    scatter(page + skip, cut(block.segments, from, from + part));
    record.got += part;
  }
}

void Batch::end(const Record& record) {
  std::lock_guard lock(mutex_);
  int& left = pieces_left_[size_t(record.block)];
  if (record.got < record.nbytes) {
    left = -1;
  } else if (left > 0 && --left == 0) {
    landed_.push_back(record.block);
  }
  --left_;
  // Under the lock: a waiter that sees the end may destroy the batch.
  changed_.notify_all();
}

ReadPool::ReadPool(int threads) {
  for (int thread = 0; thread < threads; ++thread) {
    threads_.emplace_back([this, thread] { work(thread); });
  }
}

std::shared_ptr<Batch> ReadPool::submit(std::vector<FileBlock> blocks, Way way) {
  home.require();
  const auto batch = left_behind_in_children(new Batch(std::move(blocks), way));
  const std::vector<size_t> left = batch->read_at_once(int(threads_.size()));
  {
    std::lock_guard lock(mutex_);
    if (closing_) throw std::invalid_argument("the reader is closed; open another one");
    for (size_t piece : left) tasks_.push_back({batch, piece});
  }
  for (size_t n = 0; n < std::min(left.size(), threads_.size()); ++n) wake_.notify_one();
  return batch;
}

void ReadPool::close() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void ReadPool::work(int thread) {
  std::vector<char> staging;
  while (true) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task.batch->run(task.piece, thread, staging);
  }
}

}  // namespace flashmoe
