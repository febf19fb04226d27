/* Matrix products; see matmul.c. */

#pragma once
#include "threads.h"

/* Registers hold a tile of ROWS × COLUMNS sums, COLUMNS being a few vectors. */
#define ROWS 6
#if LANES == 8
#define VECTORS 2 /* AVX has 16 registers, the others 32 */
#else
#define VECTORS 4
#endif
#define COLUMNS (VECTORS * LANES)

/* c = a @ b + bias for a (n, k), b (k, m), c (n, m) and bias (m) or NULL. Element (i, j) of a is
   a[i * a_row + j * a_column]; the elements of a row of c have no gaps. A product that `adds` adds
   to the numbers of c. A b of float16, or of int8 with scales, has columns without gaps, and becomes
   floats while it is packed. */
typedef struct {
  Int n, k, m;
  const float *a;
  Int a_row, a_column;
  const void *b;
  Int b_row, b_column;
  const float *bias;
  float *c;
  Int c_row, adds, b_kind; /* FLOAT32, FLOAT16 or INT8, as in narrow.h */
  const float *scales;     /* of int8: (m, k / GROUP rounded up), what each group is multiplied by */
} Product;
int matmul(const Product *p);

/* Rows first_row … end_row - 1 and columns first_column … end_column - 1 of c, on this thread. */
void multiply_part(const Product *p, Int first_row, Int end_row, Int first_column, Int end_column);

/* Copies b (k, width), width <= columns, row by row to `packed`, each row filled up to `columns`
   with zeros. */
void pack_columns(const float *b, Int b_row, Int b_column, Int k, Int width, Int columns,
                  float *packed);

/* packed[p][q] = b[q][p] for a square of LANES × LANES numbers of 32 bits, whatever
   they are; b may lie at any even address. */
INLINE void transpose_block(const float *b, Int stride, Int columns, float *packed) {
  vec rows[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = *(const loose_vec *)(b + i * stride);
#ifdef __clang__ /* it has no shuffle by a vector of places, but finds one for this loop */
  for (int p = 0; p < LANES; p++)
    for (int i = 0; i < LANES; i++) packed[p * columns + i] = rows[i][p];
#else
  /* In each round, rows i and i + step exchange every second run of `step` numbers. */
  const places lanes = lane_numbers();
#pragma GCC unroll 4 /* so that `upper` and `lower` are constants and not computed */
  for (int step = LANES / 2; step; step /= 2) {
    /* Places below LANES mean a number of `row`, others one of `other`. */
    places second = (lanes & step) != 0; /* all bits are set, or none */
    places upper = lanes + (second & (LANES - step)), lower = upper + step;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & step)) {
        vec row = rows[i], other = rows[i + step];
        rows[i] = __builtin_shuffle(row, other, upper);
        rows[i + step] = __builtin_shuffle(row, other, lower);
      }
  }
  for (int i = 0; i < LANES; i++) *(vec *)(packed + i * columns) = rows[i];
#endif
}

/* The sum of the lanes of rows[i] in lane i, for LANES rows, which change. */
INLINE vec sums_of_lanes(vec *rows) {
#ifdef __clang__
  float across[LANES * LANES];
  transpose_block((const float *)rows, LANES, LANES, across);
  for (int i = 1; i < LANES; i++) *(vec *)across += *(const vec *)(across + i * LANES);
  return *(const vec *)across;
#else
  /* In each round two rows become one: its lanes whose number has the bit `step` belong to the
     second, the others to the first, and each is the sum of two that had the same owner. */
  const places lanes = lane_numbers();
#pragma GCC unroll 4
  for (int step = LANES / 2; step; step /= 2) {
    places here = lanes + (((lanes & step) != 0) & LANES), there = here ^ step;
#pragma GCC unroll 8
    for (int i = 0; i < step; i++) {
      vec row = rows[i], other = rows[i + step];
      rows[i] = __builtin_shuffle(row, other, here) + __builtin_shuffle(row, other, there);
    }
  }
  return rows[0];
#endif
}

/* c (ROWS, columns) = a (ROWS, k) @ b (k, columns), or += with `add`. b is packed, and its columns
   fill `vectors` registers. When `vectors` is a constant, all loops but the one over k have a
   constant length, and the compiler keeps `sums` in registers. */
INLINE void multiply_tile(int vectors, Int k, const float *a, Int a_row, Int a_column,
                          const float *b, float *c, Int c_row, int add) {
  vec sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < vectors; j++) {
      __builtin_prefetch(c + i * c_row + j * LANES, 1);
      sums[i][j] = (vec){0};
    }
  for (Int p = 0; p < k; p++) {
    vec row[VECTORS];
    for (int j = 0; j < vectors; j++) row[j] = *(const vec *)(b + (p * vectors + j) * LANES);
    for (int i = 0; i < ROWS; i++) {
      float factor = a[i * a_row + p * a_column];
      for (int j = 0; j < vectors; j++) sums[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < vectors; j++) {
      vec *place = (vec *)(c + i * c_row + j * LANES);
      if (add) sums[i][j] += *place;
      *place = sums[i][j];
    }
}
