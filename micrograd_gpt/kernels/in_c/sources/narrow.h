/* Products of a few rows with weights of 8 or 16 bits; see narrow.c. */

#pragma once
#include "threads.h"

/* What numbers are: of weights, and of keys and values. Python knows these numbers too. */
enum { FLOAT32, BFLOAT16, INT8, FLOAT16 };

#define GROUP 64 /* int8 numbers of a row that share a scale; arrays/int8.py has the same */

/* y = x @ weight.T + bias for a few rows of x: bound by reading the weights. */
typedef struct {
  Int kind, n, k, m;
  const float *x;      /* (n, k), whose numbers fit the weights' type if it is bfloat16 */
  const void *weight;  /* (m, k), of this kind; rows without gaps */
  const float *scales; /* of int8: (m, k / GROUP rounded up), what each group is multiplied by */
  const void *bias;    /* (m) or NULL: of 16 bits beside such weights, else float32 */
  float *y;            /* (n, m) */
} NarrowRows;
int few_narrow_rows(const NarrowRows *f);
