/* Matrix products of bfloat16, and conversions; see bfloat16.c. */

#pragma once
#include "threads.h"

/* c = a @ b + bias for a (n, k), b (k, m), c (n, m) and bias (m) or NULL, as Product's, but of
   bfloat16, and c either of float32 or narrow: of bfloat16. */
typedef struct {
  Int n, k, m;
  const uint16_t *a;
  Int a_row, a_column;
  const uint16_t *b;
  Int b_row, b_column;
  const uint16_t *bias;
  void *c;
  Int c_row, c_is_narrow;
} HalfProduct;
int matmul_bfloat16(const HalfProduct *p);

typedef struct {
  Int size, to_narrow; /* from wide to narrow numbers, else from narrow to wide ones */
  float *wide;
  uint16_t *narrow;
} Conversion;
int convert_bfloat16(const Conversion *c);
