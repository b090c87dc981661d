// A small pool of threads that sleeps when there is nothing to do.
#pragma once

#include <cstdint>
#include <functional>

namespace flashmoe {

// Threads that work on one call, the caller among them.
int threads();
void set_threads(int count);

// Processors that this process may run on.
int available_threads();

// Runs body(i) for every i in [0, count), a part of neighbours to each thread, in order; who is done
// with its part helps with the others'. Returns when all are done. What a body computes must depend
// on i alone, never on the thread. A call from within a body, or while another thread uses the pool,
// runs in the calling thread. What a body throws comes out here, once no thread is in a body any
// more; other bodies may then not have run.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace flashmoe
