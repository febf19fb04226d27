/* Products of a few rows, as in decoding: one row for each sample, beam or guess. Every weight is read
   once for all of them, and memory sets the pace. Here are those of float32; narrow.c has other
   weights, and takes the slices from here. */

#include "few_rows.h"
#include "bfloat16.h"

enum { PACKED }; /* the purpose of scratch() here */

#if LANES == 8
#define SIDE 2 /* AVX has 16 registers, the others 32 */
#else
#define SIDE 4
#endif

/* -------------------------------------------------------------------- up to four rows, in one pass */

#define TOGETHER 4 /* how many rows of x, at most, share one reading of the weights */

#define COLUMNS_APART (LANES / SIDE) /* those that are read at the same time */
#define BYTES_AHEAD 2048 /* found by trying */

/* sums[r][i * COLUMNS_APART] = x (rows, k)[r] * weight[i * COLUMNS_APART] for `side` columns, of
   whose numbers `whole` are multiplied. The sums fill up to 16 registers (8 with AVX). Memory is read
   fastest at several places at a time, each of them in a page of its own. */
INLINE void add_columns(int rows, int side, Int whole, Int k, const float *x, const float *weight,
                        vec (*sums)[LANES]) {
  vec sum[TOGETHER][SIDE] = {0};
  for (Int p = 0; p < whole; p += LANES) {
    vec here[SIDE];
    for (int i = 0; i < side; i++) {
      const float *from = weight + i * COLUMNS_APART * k + p;
      here[i] = *(const vec *)from;
      __builtin_prefetch((const char *)from + BYTES_AHEAD, 0, 2);
    }
    for (int r = 0; r < rows; r++) {
      vec row = *(const vec *)(x + r * k + p);
      for (int i = 0; i < side; i++) sum[r][i] += here[i] * row;
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < side; i++) sums[r][i * COLUMNS_APART] = sum[r][i];
}

/* y (rows, columns) = x (rows, k) @ weight (columns, k).T for at most LANES columns. While the
   weights are read, nothing else is done: adding up the lanes of each sum, and the last k % LANES
   products, come afterwards. */
INLINE void dots(int rows, Int columns, Int k, const float *x, const float *weight, float *y,
                 Int m) {
  vec sums[TOGETHER][LANES] = {0};
  Int whole = k / LANES * LANES, steps = columns == LANES ? COLUMNS_APART : columns;
  for (Int j = 0; j < steps; j++) {
    vec(*place)[LANES] = (vec(*)[LANES])(sums[0] + j);
    if (columns == LANES)
      add_columns(rows, SIDE, whole, k, x, weight + j * k, place);
    else
      add_columns(rows, 1, whole, k, x, weight + j * k, place);
  }
  for (int r = 0; r < rows; r++) {
    vec total = sums_of_lanes(sums[r]);
    for (Int j = 0; j < columns; j++) y[r * m + j] = total[j];
    for (Int j = 0; j < columns && whole < k; j++)
      y[r * m + j] += dot(x + r * k + whole, weight + j * k + whole, k - whole);
  }
}

static void dots_of_rows(Int rows, Int columns, Int k, const float *x, const float *weight,
                         float *y, Int m) {
  switch (rows) {
    case 1: dots(1, columns, k, x, weight, y, m); break;
    case 2: dots(2, columns, k, x, weight, y, m); break;
    case 3: dots(3, columns, k, x, weight, y, m); break;
    default: dots(4, columns, k, x, weight, y, m);
  }
}

/* ------------------------------------------------------------ more rows, and weights in slices

   With more rows than share one reading of the weights, weights and x are cut into slices, which stay
   in the nearest caches: SLICE numbers of SIDE rows of weights, which lie APART, and of all rows of
   x, which are packed slice after slice. Their sums, a vector for each of MOST_ROWS rows and LANES
   columns, stay there too, and registers hold those of a group of at most ROWS rows and SIDE
   columns. What is read fastest was found by trying, on a Zen 4 of AMD's and on a Xeon. */

#ifdef __CLZERO__ /* AMD's processors have this instruction, Intel's do not */
#define SLICE 384         /* whole groups of int8 */
#define LARGE_BLOCK 40000 /* bytes */
#define APART (LANES / SIDE)
#define NEXT_SIDE 1
#else
#define SLICE 192
#define LARGE_BLOCK 110000
#define APART 1
#define NEXT_SIDE SIDE
#endif

float *packed_in_slices(int purpose, Int n, Int k, const float *x) {
  float *packed = scratch(purpose, n * round_up(k, SLICE));
  for (Int p = 0; p < k && packed; p += SLICE)
    for (Int r = 0; r < n; r++)
      memcpy(packed + (p / SLICE * n + r) * SLICE, x + r * k + p,
             min(SLICE, k - p) * sizeof(float));
  return packed;
}

INLINE Int size_of(int kind) {
  return kind == INT8 ? 1 : kind == FLOAT16 || kind == BFLOAT16 ? 2 : 4;
}

/* The rows of weights from this one and this number on, the first of a group. */
INLINE Weights weights_from(int kind, Weights w, Int row, Int number) {
  const char *numbers = (const char *)w.numbers + (row * w.k + number) * size_of(kind);
  if (kind != INT8) return (Weights){numbers, w.k, NULL};
  return (Weights){numbers, w.k, w.scales + row * groups_of(w.k) + number / GROUP};
}

/* LANES of these weights as floats, or as pairs. */
INLINE vec vector_of(int kind, Weights w, Int row, Int number) {
  Int at = row * w.k + number;
  if (size_of(kind) == sizeof(float)) return held(*(const loose_vec *)((const float *)w.numbers + at));
  vec wide = floats_at(kind, w.numbers, at);
  if (kind == INT8) wide *= w.scales[row * groups_of(w.k) + number / GROUP];
  return wide;
}

/* Where weights lie that come later. In each step SIDE places, `apart` bytes from one another, are
   fetched into the second-level cache, and the next step's lie `step` bytes further on. */
typedef struct {
  const char *from;
  Int apart, step;
} Ahead;

/* What is fetched while side number `side` is multiplied from number p on, for a slice, of LANES rows
   of weights of which `whole` numbers are multiplied.

   A processor that sees several places at a time move evenly through memory fetches most of what
   follows by itself. So SIDE places move through the next block, each along LANES / SIDE rows. Of
   long rows that would be too early: then it is the next slice of the same rows. */

INLINE Ahead ahead_of(int kind, Weights w, Int whole, Int p, Int side) {
  Int size = size_of(kind), row = w.k * size;
  const char *here = (const char *)w.numbers, *after = here + LANES * row;
  if (LANES * row < LARGE_BLOCK) {
    Int done = p * (LANES / SIDE) + min(SLICE, whole - p) * side;
    return (Ahead){after + done * size, LANES / SIDE * row, LANES * size};
  }
  const char *next = p + SLICE < whole ? here + (p + SLICE) * size : after;
  return (Ahead){next + side * NEXT_SIDE * row, APART * row, LANES * size};
}

/* sum + a * b; of BFLOAT16_PAIRS the products of both numbers in each lane. */
INLINE vec multiply_add(int kind, vec a, vec b, vec sum) {
#ifdef HAS_PAIRS
  if (kind == BFLOAT16_PAIRS) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  (void)kind;
  return sum + a * b;
}

/* sums[r][i * APART] += x (rows, SLICE)[r] * weights[i * APART] for SIDE rows of weights, of which
   `length` numbers, a multiple of LANES, are multiplied. Meanwhile the first so many `places` of what
   is ahead are fetched. */
INLINE void add_products(int kind, int rows, int places, Int length, const float *x, Weights weights,
                         Ahead ahead, vec (*sums)[LANES]) {
  vec sum[ROWS][SIDE];
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < SIDE; i++) sum[r][i] = sums[r][i * APART];
  for (Int p = 0; p < length; p += LANES, ahead.from += ahead.step) {
    vec here[SIDE];
    for (int i = 0; i < SIDE; i++) here[i] = vector_of(kind, weights, i * APART, p);
    for (int i = 0; i < places; i++) __builtin_prefetch(ahead.from + i * ahead.apart, 0, 2);
    for (int r = 0; r < rows; r++) {
      vec row = held(*(const vec *)(x + r * SLICE + p));
      for (int i = 0; i < SIDE; i++) sum[r][i] = multiply_add(kind, here[i], row, sum[r][i]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < SIDE; i++) sums[r][i * APART] = sum[r][i];
}

INLINE void add_products_of_rows(int kind, Int rows, int places, Int length, const float *x,
                                 Weights weights, Ahead ahead, vec (*sums)[LANES]) {
  switch (rows) {
    case 1: add_products(kind, 1, places, length, x, weights, ahead, sums); break;
    case 2: add_products(kind, 2, places, length, x, weights, ahead, sums); break;
    case 3: add_products(kind, 3, places, length, x, weights, ahead, sums); break;
    case 4: add_products(kind, 4, places, length, x, weights, ahead, sums); break;
    case 5: add_products(kind, 5, places, length, x, weights, ahead, sums); break;
    default: add_products(kind, ROWS, places, length, x, weights, ahead, sums);
  }
}

/* The rows of x are taken in groups that are as equal as they can be. Each group fetches some of the
   places: asked for all at once, they would keep the first group waiting, and memory would be idle
   while the others work. */
INLINE void add_groups(int kind, Int rows, Int length, const float *x, Weights weights, Ahead ahead,
                       vec (*sums)[LANES]) {
  Int groups = (rows + ROWS - 1) / ROWS;
  for (Int i = 0, first = 0, end; i < groups; i++, first = end) {
    end = rows * (i + 1) / groups;
    Int n = end - first, places = SIDE * (i + 1) / groups - SIDE * i / groups;
    const float *part = x + first * SLICE;
    vec(*of)[LANES] = sums + first;
    switch (places) {
      case 0: add_products_of_rows(kind, n, 0, length, part, weights, ahead, of); break;
      case 1: add_products_of_rows(kind, n, 1, length, part, weights, ahead, of); break;
      case 2: add_products_of_rows(kind, n, 2, length, part, weights, ahead, of); break;
      default: add_products_of_rows(kind, n, SIDE, length, part, weights, ahead, of);
    }
    ahead.from += places * ahead.apart;
  }
}

static void add_float32(Int rows, Int length, const float *x, Weights weights, Ahead ahead,
                        vec (*sums)[LANES]) {
  add_groups(FLOAT32, rows, length, x, weights, ahead, sums);
}

/* Narrower weights become floats in registers for one group, if an instruction does it, and for
   several in the nearest cache, once for all. */
INLINE void add_widened(int kind, Int rows, Int length, const float *x, Weights weights, Ahead ahead,
                        vec (*sums)[LANES]) {
  float wide[SIDE * SLICE] __attribute__((aligned(64)));
  if (rows <= ROWS && (HAS_FLOAT16 || kind != FLOAT16)) {
    add_products_of_rows(kind, rows, SIDE, length, x, weights, ahead, sums);
    return;
  }
  for (Int i = 0; i < SIDE; i++)
    for (Int p = 0; p < length; p += LANES)
      *(vec *)(wide + i * SLICE + p) = vector_of(kind, weights, i * APART, p);
  add_float32(rows, length, x, (Weights){wide, SLICE / APART, NULL}, ahead, sums);
}

INLINE void sum_slices_of(int kind, Int n, const float *x, Weights weights, Int whole,
                          vec (*sums)[LANES]) {
  memset(sums, 0, n * sizeof *sums);
  for (Int p = 0; p < whole; p += SLICE, x += n * SLICE) {
    Int length = min(SLICE, whole - p);
    for (Int side = 0; side < LANES / SIDE; side++) {
      Int first = side * NEXT_SIDE;
      Weights from = weights_from(kind, weights, first, p);
      Ahead ahead = ahead_of(kind, weights, whole, p, side);
      vec(*of)[LANES] = (vec(*)[LANES])(sums[0] + first);
      if (kind == FLOAT32)
        add_float32(n, length, x, from, ahead, of);
      else if (kind == BFLOAT16_PAIRS)
        add_groups(BFLOAT16_PAIRS, n, length, x, from, ahead, of);
      else
        add_widened(kind, n, length, x, from, ahead, of);
    }
  }
}

void sum_slices(int kind, Int n, const float *x, Weights weights, Int whole, vec (*sums)[LANES]) {
  switch (kind) {
    case FLOAT32: sum_slices_of(FLOAT32, n, x, weights, whole, sums); break;
    case BFLOAT16: sum_slices_of(BFLOAT16, n, x, weights, whole, sums); break;
    case INT8: sum_slices_of(INT8, n, x, weights, whole, sums); break;
    case FLOAT16: sum_slices_of(FLOAT16, n, x, weights, whole, sums); break;
    default: sum_slices_of(BFLOAT16_PAIRS, n, x, weights, whole, sums);
  }
}

/* y (n, LANES) = x (n, k) @ weight (LANES, k).T; `packed` is x in slices. */
static void dots_in_slices(Int n, Int k, const float *x, const float *packed, const float *weight,
                           float *y, Int m) {
  vec sums[MOST_ROWS][LANES] __attribute__((aligned(64)));
  Int whole = k / LANES * LANES;
  sum_slices(FLOAT32, n, packed, (Weights){weight, k, NULL}, whole, sums);
  for (Int r = 0; r < n; r++) {
    *(vec *)(y + r * m) = sums_of_lanes(sums[r]);
    for (Int j = 0; j < LANES && whole < k; j++)
      y[r * m + j] += dot(x + r * k + whole, weight + j * k + whole, k - whole);
  }
}

/* ----------------------------------------------------------------------------------- all of them */

#define IN_NEAREST_CACHE 4096 /* floats of x that stay in it while weights pass by */

typedef struct {
  const FewRows *f;
  float *packed; /* x, slice after slice; NULL: few rows, which stay in cache, need it not */
} PackedRows;

/* Columns first … end - 1 of y. While x stays in the first-level cache, memory sets the pace and
   is read fastest in one stream. */
static void few_rows_columns(const PackedRows *rows, Int first, Int end) {
  const FewRows *f = rows->f;
  for (Int j = first; j < end; j += LANES) {
    const float *weight = f->weight + j * f->k;
    if (rows->packed && end - j >= LANES) {
      dots_in_slices(f->n, f->k, f->x, rows->packed, weight, f->y + j, f->m);
      continue;
    }
    for (Int r = 0; r < f->n; r += TOGETHER)
      dots_of_rows(min(TOGETHER, f->n - r), min(LANES, end - j), f->k, f->x + r * f->k, weight,
                   f->y + r * f->m + j, f->m);
  }
  for (Int r = 0; r < f->n && f->bias; r++)
    add_scaled(f->y + r * f->m + first, 1, f->bias + first, end - first);
}

/* Sets `packed`, as the only part may; a task, so that run_parts reports a lack of memory. */
static void pack_task(const void *arguments, Int part, Int parts) {
  PackedRows *rows = (PackedRows *)arguments;
  rows->packed = packed_in_slices(PACKED, rows->f->n, rows->f->k, rows->f->x);
}

#define FEW_WEIGHTS 20000 /* with fewer, waking another thread does not pay */

static Int few_rows_parts(const FewRows *f) {
  return f->k * f->m < FEW_WEIGHTS ? 1 : 4 * thread_count();
}

static void few_rows_task(const void *arguments, Int part, Int parts) {
  const PackedRows *rows = arguments;
  Int first, end = cut(rows->f->m, parts, LANES, part, &first);
  few_rows_columns(rows, first, end);
}

int few_rows(const FewRows *f) {
  PackedRows rows = {f, NULL};
  int stay_in_cache = f->n <= TOGETHER && f->n * f->k <= IN_NEAREST_CACHE;
  if (!stay_in_cache && run_parts(pack_task, &rows, 1)) return OUT_OF_MEMORY;
  return run_parts(few_rows_task, &rows, few_rows_parts(f));
}
