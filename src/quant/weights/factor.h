#pragma once

// The triangular factor that rounding needs: A = L^T L with L lower triangular (the Cholesky factor of the reversed
// matrix). With e the errors of a row's columns, e^T A e = sum_i (L e)_i^2, and (L e)_i holds no error behind column i:
// when columns are rounded in order, each term is made as small as the grid allows, given the columns before.

#include <cstdint>
#include <span>

namespace circlet::weights {

// Replaces the lower half of a [n,n], row-major and positive definite, by L; what stands above the diagonal means
// nothing afterwards. Uses Threads() threads; the same bits for any number. Returns -1, or the first row (from the last
// one up) whose pivot is not positive: a is no positive definite matrix then, and is left half done.
int64_t Factorize(std::span<double> a, int64_t n);
int64_t Factorize(std::span<float> a, int64_t n);

// Solves x A = b for `rows` rows of b [rows,n] in place, given L.
void SolveWithFactor(std::span<const double> l, int64_t n, std::span<double> b, int64_t rows);
void SolveWithFactor(std::span<const float> l, int64_t n, std::span<float> b, int64_t rows);

}  // namespace circlet::weights
