/* Products of a few rows; see few_rows.c, and narrow.c for narrower weights. */

#pragma once
#include "matmul.h"
#include "narrow.h"

#define MOST_ROWS 16 /* that are few */

/* y = x @ weight.T + bias for at most MOST_ROWS rows of x: bound by reading the weights. */
typedef struct {
  Int n, k, m;
  const float *x, *weight, *bias; /* x (n, k), weight (m, k), bias (m) or NULL; rows without gaps */
  float *y;                       /* (n, m) */
} FewRows;
int few_rows(const FewRows *f);

/* A kind of weights beside those of narrow.h: pairs of bfloat16, each as long as a float, which are
   multiplied as they are, where bfloat16_by_pairs(). */
enum { BFLOAT16_PAIRS = FLOAT16 + 1 };

/* Some rows of weights: each has k numbers, without gaps. */
typedef struct {
  const void *numbers;
  Int k;
  const float *scales; /* of int8: (…, k / GROUP rounded up) */
} Weights;

/* x (n, k), or pairs, in slices: see few_rows.c. It lies in this thread's scratch; NULL where there is
   not enough memory. */
float *packed_in_slices(int purpose, Int n, Int k, const float *x);

/* sums[r][j] = x[r] * weight[j] for n packed rows of x and LANES rows of weights, of which `whole`
   numbers, a multiple of LANES, are multiplied. */
void sum_slices(int kind, Int n, const float *x, Weights weights, Int whole, vec (*sums)[LANES]);
