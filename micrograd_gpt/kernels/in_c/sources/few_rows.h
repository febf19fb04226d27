/* Products of 5 to 16 rows, of float32 (matmul.c) and of narrower weights (narrow.c). */

#pragma once
#include "matmul.h"

/* With more rows than share one reading of the weights, weights and x are cut into slices, which stay
   in the first-level cache: SLICE numbers of SIDE rows of weights, and of all rows of x, which are
   packed slice after slice. Their sums, a vector for each of SOME_ROWS rows and LANES columns, stay
   there too, and registers hold those of a group of at most ROWS rows and SIDE columns. */
#define SOME_ROWS 16
#define SLICE 192
#if LANES == 8
#define SIDE 2 /* AVX has 16 registers, the others 32 */
#else
#define SIDE 4
#endif

/* x (n, k) slice after slice: each has its numbers of row after row, SLICE apart. It lies in this
   thread's scratch; NULL where there is not enough memory. */
float *packed_in_slices(int purpose, Int n, Int k, const float *x);

/* Where weights lie that come later. In each step SIDE places, `apart` bytes from one another, are
   fetched into the second-level cache, and the next step's lie `step` bytes further on. */
typedef struct {
  const char *from;
  Int apart, step;
} Ahead;

/* What is fetched while rows j … j + SIDE - 1 are multiplied from number p on, for a slice. They are
   of a block of LANES rows, each of k numbers of `size` bytes, of which `whole` are multiplied.

   A processor that sees several places at a time move evenly through memory fetches most of what
   follows by itself. So SIDE places move through the next block, each along LANES / SIDE rows. Of
   long rows that would be too early: then it is the next slice of the same rows. */
#define LARGE_BLOCK 110000 /* bytes, found by trying */

INLINE Ahead ahead_of(const void *block, Int k, Int size, Int whole, Int p, Int j) {
  const char *here = (const char *)block, *after = here + LANES * k * size;
  if (LANES * k * size < LARGE_BLOCK) {
    Int done = p * (LANES / SIDE) + min(SLICE, whole - p) * (j / SIDE);
    return (Ahead){after + done * size, LANES / SIDE * k * size, LANES * size};
  }
  const char *next = p + SLICE < whole ? here + (p + SLICE) * size : after;
  return (Ahead){next + j * k * size, k * size, LANES * size};
}

/* sums[r][i] += x (rows, SLICE)[r] * weight (SIDE, k)[i] for `length` numbers, a multiple of LANES, of
   which each step takes LANES. */
void add_side(Int rows, Int length, Int k, const float *x, const float *weight, Ahead ahead,
              vec (*sums)[LANES]);
