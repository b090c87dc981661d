// Products with weights over all threads, and the mode that says which form they take.
#pragma once

#include "kernels.h"

namespace flashmoe {

// In integer mode, matrices of codes with at least `kIntegerColumns` columns take activations of 16
// bits; narrower ones stay exact, because they cost little and small models are compared closely.
constexpr int64_t kIntegerMinColumns = 1024;
bool integer_mode();
void set_integer_mode(bool on);
bool takes_integers(const Matrix& m);

// Rows x [tokens, cols] prepared for matrices of m's form; `memory` holds tokens * row_nbytes.
int64_t prepared_nbytes(const Matrix& m, int64_t tokens);
void prepare_rows(const Matrix& m, const float* x, int64_t tokens, void* memory, Row* rows);

// y [tokens, rows] = x W^T
void linear(const Matrix& m, const float* x, int64_t tokens, float* y);

// Several matrices of one form with the same x; each its own y.
void linear(const Matrix* const* ms, float* const* ys, int count, const float* x, int64_t tokens);

// Rows of a matrix that one thread takes at a time.
int64_t share_of_rows(const Matrix& m, int64_t tokens);

// product() in pieces of tokens whose activations stay in the core's cache.
void product_rows(const Matrix& m, const Row* x, int64_t tokens, int64_t first, int64_t last,
                  float* y, int64_t y_stride);

}  // namespace flashmoe
