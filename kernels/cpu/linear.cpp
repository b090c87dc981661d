#include "linear.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "settings.h"
#include "threads.h"

namespace flashmoe {
namespace {

std::atomic<bool> integer_on{false};
constexpr int64_t kShare = 1 << 17;      // multiplications that are worth handing to a thread
constexpr int64_t kTokensAtOnce = 48;

bool same_form(const Matrix& a, const Matrix& b) {
  return a.bits == b.bits && a.span() == b.span() && a.cols == b.cols &&
         takes_integers(a) == takes_integers(b);
}

}  // namespace

bool integer_mode() { return integer_on.load(std::memory_order_relaxed); }
void set_integer_mode(bool on) {
  std::unique_lock hold(settings());
  integer_on.store(on);
}
bool takes_integers(const Matrix& m) {
  return m.bits && m.cols >= kIntegerMinColumns && integer_mode();
}

int64_t prepared_nbytes(const Matrix& m, int64_t tokens) {
  return tokens * ((kernels().row_nbytes(m, takes_integers(m)) + 63) / 64 * 64);
}

void prepare_rows(const Matrix& m, const float* x, int64_t tokens, void* memory, Row* rows) {
  const Kernels& k = kernels();
  const bool integer = takes_integers(m);
  const int64_t nbytes = prepared_nbytes(m, 1);
  const auto one = [&](int64_t t) {
    rows[t] = k.prepare(m, integer, x + t * m.cols, static_cast<char*>(memory) + t * nbytes);
  };
  if (tokens < 8)
    for (int64_t t = 0; t < tokens; ++t) one(t);
  else
    parallel_for(tokens, one);
}

int64_t share_of_rows(const Matrix& m, int64_t tokens) {
  const int64_t share = kShare / (m.cols * std::min<int64_t>(tokens, 16)) + 1;
  return std::max<int64_t>((share + 15) / 16 * 16, tokens > 1 ? 32 : 16);
}

void product_rows(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last,
                  float* y, int64_t y_stride) {
  const bool integer = takes_integers(m);
  for (int64_t t = 0; t < tokens; t += kTokensAtOnce)
    kernels().product(m, integer, x + t, std::min(kTokensAtOnce, tokens - t), first, last,
                      y + t * y_stride, y_stride);
}

void linear(const Matrix* const* ms, float* const* ys, int count, const float* x, int64_t tokens) {
  static thread_local std::vector<Row> rows;
  struct Task {
    int matrix;
    int64_t first;
  };
  static thread_local std::vector<Task> tasks;
  if (tokens < 1) return;
  rows.resize(tokens);
  for (int i = 0; i < count;) {
    int end = i + 1;
    while (end < count && same_form(*ms[i], *ms[end])) ++end;
    void* memory = scratch(Piece::rows, prepared_nbytes(*ms[i], tokens));
    prepare_rows(*ms[i], x, tokens, memory, rows.data());
    tasks.clear();
    for (int j = i; j < end; ++j)
      for (int64_t r = 0; r < ms[j]->rows; r += share_of_rows(*ms[j], tokens))
        tasks.push_back({j, r});
    const Row* prepared = rows.data();
    const Task* all = tasks.data();
    parallel_for(static_cast<int64_t>(tasks.size()), [=](int64_t n) {
      const Matrix& m = *ms[all[n].matrix];
      const int64_t first = all[n].first;
      const int64_t last = std::min(m.rows, first + share_of_rows(m, tokens));
      product_rows(m, prepared, tokens, first, last, ys[all[n].matrix] + first, m.rows);
    });
    i = end;
  }
}

void linear(const Matrix& m, const float* x, int64_t tokens, float* y) {
  const Matrix* one = &m;
  linear(&one, &y, 1, x, tokens);
}

}  // namespace flashmoe
