// The Python face of ReadPool: arrays in, arrays out, nothing of Python per read.
#include <nanobind/ndarray.h>
#include <nanobind/stl/unique_ptr.h>

#include <cstring>
#include <memory>
#include <stdexcept>

#include "read_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

template <typename T>
using Table = nb::ndarray<const T, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Keeps `owner`, whose memory is being written, until nothing writes there any more.
class Ticket {
 public:
  Ticket(std::shared_ptr<Batch> batch, nb::object owner)
      : batch_(std::move(batch)), owner_(std::move(owner)) {}
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  ~Ticket() {
    if (batch_->home.here()) wait();
  }

  bool done() const { return batch_->done(); }

  void wait() {
    if (batch_->done()) return;
    nb::gil_scoped_release release;
    batch_->wait();
  }

  nb::object landed(size_t least) {
    std::vector<int64_t> found;
    {
      nb::gil_scoped_release release;
      found = batch_->landed(least);
    }
    nb::list numbers;
    for (int64_t number : found) numbers.append(number);
    return numbers;
  }

  nb::ndarray<nb::numpy, int64_t, nb::ndim<2>> records() {
    wait();
    const std::vector<Record>& records = batch_->records();
    constexpr size_t columns = sizeof(Record) / sizeof(int64_t);
    auto* values = new int64_t[records.size() * columns];
    std::memcpy(values, records.data(), records.size() * sizeof(Record));
    nb::capsule free(values, [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
    return {values, {records.size(), columns}, free};
  }

 private:
  std::shared_ptr<Batch> batch_;
  nb::object owner_;
};

struct BoundPool {
  std::shared_ptr<ReadPool> pool;

  explicit BoundPool(int threads) : pool(left_behind_in_children(new ReadPool(threads))) {}
  void close() {
    if (pool->home.here()) pool->close();
  }
};

std::vector<FileBlock> blocks_of(const Table<int64_t>& blocks, const Table<uint64_t>& segments) {
  if (blocks.shape(1) != 3 || segments.shape(1) != 2) {
    throw std::invalid_argument(
        "blocks are [n, 3]: fd, offset, segments; "
        "segments are [m, 2]: address, nbytes");
  }
  std::vector<FileBlock> found(blocks.shape(0));
  size_t next = 0;
  for (size_t row = 0; row < found.size(); ++row) {
    FileBlock& block = found[row];
    block.fd = int(blocks(row, 0));
    block.offset = blocks(row, 1);
    for (int64_t n = 0; n < blocks(row, 2); ++n, ++next) {
      if (next >= segments.shape(0)) throw std::invalid_argument("segments are too few");
      block.segments.push_back(
          {reinterpret_cast<char*>(uintptr_t(segments(next, 0))), size_t(segments(next, 1))});
    }
  }
  return found;
}

std::unique_ptr<Ticket> submit(BoundPool& bound, const Table<int64_t>& blocks,
                               const Table<uint64_t>& segments, nb::object owner, int64_t split,
                               bool direct, bool staged) {
  if (split < 1) throw std::invalid_argument("split must be 1 or more");
  std::vector<FileBlock> asked = blocks_of(blocks, segments);
  std::shared_ptr<Batch> batch;
  {
    nb::gil_scoped_release release;
    batch = bound.pool->submit(std::move(asked), {split, direct, staged});
  }
  return std::make_unique<Ticket>(std::move(batch), std::move(owner));
}

}  // namespace

void bind_read_pool(nb::module_& module) {
  nb::class_<Ticket>(module, "ReadTicket", "The reads of one submission.")
      .def_prop_ro("done", &Ticket::done)
      .def("wait", &Ticket::wait, "Wait until every piece has ended, well or not.")
      .def("landed", &Ticket::landed, "least"_a = 1,
           "Blocks read whole since the last call; waits for `least`, empty when no more come.")
      .def("records", &Ticket::records,
           "int64 [pieces, 8]: block, offset, nbytes, got, errno, start_ns, end_ns, thread.");
  nb::class_<BoundPool>(module, "ReadPool", "Threads that read ranges of files into memory.")
      .def(nb::init<int>(), "threads"_a)
      .def("submit", &submit, "blocks"_a, "segments"_a, "owner"_a.none(), "split"_a, "direct"_a,
           "staged"_a)
      .def("close", &BoundPool::close, nb::call_guard<nb::gil_scoped_release>(),
           "Finish what was submitted and end the threads; in a child of fork, nothing.");
}

}  // namespace flashmoe
