#include "experts.h"

#include <algorithm>

#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace flashmoe {
namespace {

// Pairs [first, last) that share a slot.
struct Run {
  int64_t slot, first, last;
};

// Rows [row, ...) of one run's matrices.
struct Task {
  int64_t run, row;
};

void split(std::vector<Task>& tasks, const std::vector<Run>& runs, const Matrix& m) {
  tasks.clear();
  for (size_t i = 0; i < runs.size(); ++i)
    for (int64_t r = 0; r < m.rows; r += share_of_rows(m, runs[i].last - runs[i].first))
      tasks.push_back({static_cast<int64_t>(i), r});
}

}  // namespace

void expert_mlp(const ExpertStacks& stacks, const float* x, int64_t count, const int64_t* tokens,
                const int64_t* slots, int64_t pairs, float* out) {
  if (pairs < 1) return;
  static thread_local std::vector<Row> rows, pair_rows;
  static thread_local std::vector<Run> runs;
  static thread_local std::vector<Task> tasks;
  const Matrix &gate = stacks.gate.first, &down = stacks.down.first;
  const int64_t ffn = gate.rows, hidden_nbytes = prepared_nbytes(down, 1);

  rows.resize(count);
  pair_rows.resize(pairs);
  prepare_rows(gate, x, count, scratch(Piece::rows, prepared_nbytes(gate, count)), rows.data());
  runs.clear();
  for (int64_t p = 0; p < pairs; ++p) {
    pair_rows[p] = rows[tokens[p]];
    if (runs.empty() || runs.back().slot != slots[p]) runs.push_back({slots[p], p, p});
    runs.back().last = p + 1;
  }
  // gate and up into one row of 2 * ffn, then the hidden values over the first half
  auto* both = static_cast<float*>(scratch(Piece::hidden, 8 * pairs * ffn));
  auto* prepared = static_cast<char*>(scratch(Piece::stage, pairs * hidden_nbytes));
  const Row* in = pair_rows.data();
  const Run* run = runs.data();

  split(tasks, runs, gate);
  const Task* task = tasks.data();
  parallel_for(static_cast<int64_t>(tasks.size()), [&, in, run, task](int64_t n) {
    const Run& some = run[task[n].run];
    const int64_t of = some.last - some.first, first = task[n].row;
    const int64_t last = std::min(ffn, first + share_of_rows(gate, of));
    float* at = both + some.first * 2 * ffn;
    product_rows(stacks.gate[some.slot], in + some.first, of, first, last, at + first, 2 * ffn);
    product_rows(stacks.up[some.slot], in + some.first, of, first, last, at + ffn + first,
                 2 * ffn);
    for (int64_t t = 0; t < of; ++t) {
      float* g = at + t * 2 * ffn + first;
      kernels().swiglu(g, g + ffn, last - first, g);
    }
  });

  Row* mids = pair_rows.data();
  const bool integer = takes_integers(down);
  const auto prepare = [&, mids](int64_t p) {
    mids[p] = kernels().prepare(down, integer, both + p * 2 * ffn, prepared + p * hidden_nbytes);
  };
  if (pairs * ffn < 65536)
    for (int64_t p = 0; p < pairs; ++p) prepare(p);
  else
    parallel_for(pairs, prepare);

  split(tasks, runs, down);
  task = tasks.data();
  parallel_for(static_cast<int64_t>(tasks.size()), [&, mids, run, task](int64_t n) {
    const Run& some = run[task[n].run];
    const int64_t of = some.last - some.first, first = task[n].row;
    const int64_t last = std::min(down.rows, first + share_of_rows(down, of));
    product_rows(stacks.down[some.slot], mids + some.first, of, first, last,
                 out + some.first * down.rows + first, down.rows);
  });
}

void weighted_sum(const float* y, const float* weights, int64_t count, int64_t k, int64_t hidden,
                  float* out) {
  const auto one = [&](int64_t t) {
    std::fill(out + t * hidden, out + (t + 1) * hidden, 0.0f);
    for (int64_t rank = 0; rank < k; ++rank)
      kernels().accumulate(y + (t * k + rank) * hidden, weights[t * k + rank], hidden,
                           out + t * hidden);
  };
  if (count < 16)
    for (int64_t t = 0; t < count; ++t) one(t);
  else
    parallel_for(count, one);
}

void shared_expert(const SharedExpert& e, const float* x, int64_t count, float* out) {
  const int64_t ffn = e.gate.rows, hidden = e.down.rows;
  auto* both = static_cast<float*>(scratch(Piece::hidden, 4 * count * (2 * ffn + 1)));
  float *up = both + count * ffn, *scalar = up + count * ffn;
  const Matrix* ms[] = {&e.gate, &e.up, &e.scalar_gate};
  float* ys[] = {both, up, scalar};
  linear(ms, ys, 3, x, count);
  kernels().swiglu(both, up, count * ffn, both);
  linear(e.down, both, count, out);
  for (int64_t t = 0; t < count; ++t) {
    static thread_local std::vector<float> gate;
    gate.assign(hidden, scalar[t]);
    kernels().sigmoid_scale(gate.data(), out + t * hidden, hidden, out + t * hidden);
  }
}

}  // namespace flashmoe
