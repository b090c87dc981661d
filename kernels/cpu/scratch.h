// Memory of one thread that is used again by the next call: nothing is allocated once it has grown.
// Room that many tokens needed goes back after some uses by few.
#pragma once

#include <cstdint>

namespace flashmoe {

// Who uses a piece; two pieces in use at a time must differ.
enum class Piece { weights, sums, rows, numbers, hidden, stage, products, count };

// At least `nbytes` of 64-byte aligned memory; its content is whatever was left there.
void* scratch(Piece piece, int64_t nbytes);

// What the calling thread holds now.
int64_t scratch_nbytes();

}  // namespace flashmoe
