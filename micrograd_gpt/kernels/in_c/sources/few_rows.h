/* Products of 5 to 16 rows, of float32 (matmul.c) and of narrower weights (narrow.c). */

#pragma once
#include "matmul.h"

/* With more rows than share one reading of the weights, weights and x are cut into slices, which stay
   in the first-level cache: SLICE numbers of SIDE rows of weights, and of all rows of x, which are
   packed slice after slice. Their sums, a vector for each of SOME_ROWS rows and LANES columns, stay
   there too, and registers hold those of a group of at most ROWS rows and SIDE columns. */
#define SOME_ROWS 16
#define SLICE 256
#if LANES == 8
#define SIDE 2 /* AVX has 16 registers, the others 32 */
#else
#define SIDE 4
#endif

/* x (n, k) slice after slice: each has its numbers of row after row, SLICE apart. It lies in this
   thread's scratch; NULL where there is not enough memory. */
float *packed_in_slices(int purpose, Int n, Int k, const float *x);

/* Where weights are that come later: so many places (1, 2 or SIDE), `apart` bytes from one another, are
   fetched into the second-level cache in each step, and each step's lie `step` bytes further on. */
typedef struct {
  const char *from;
  Int places, apart, step;
} Ahead;

/* sums[r][i] += x (rows, SLICE)[r] * weight (SIDE, k)[i] for `length` numbers, a multiple of LANES, of
   which each step takes LANES. */
void add_side(Int rows, Int length, Int k, const float *x, const float *weight, Ahead ahead,
              vec (*sums)[LANES]);
