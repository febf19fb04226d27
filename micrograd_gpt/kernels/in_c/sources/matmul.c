/* Matrix products, cut into pieces whose numbers stay in the caches.

   After Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication". A part of b,
   DEPTH rows of it, is packed in the order it will be read, and stays in the second-level cache
   while all of a passes by, ROWS rows at a time. Those rows stay in the first-level cache, and a
   tile of c stays in registers for DEPTH steps. */

#include "matmul.h"
#include "few_rows.h"
#include "narrow.h"

#define DEPTH 384 /* whole groups of int8 */
#define MOST_COLUMNS 1024 /* of b, packed together */
#define SAME_PLACE 1024 /* floats: rows this far apart share few places of the first-level cache */
#define STRIPS 16 /* of ROWS rows each, packed together, so that a is read in whole cache lines */

enum { PACKED_A, PACKED_B, TOTALS }; /* the purposes of scratch() here */

/* Reading b takes most of the time, so the next rows (or columns) are fetched ahead. */
void pack_columns(const float *b, Int b_row, Int b_column, Int k, Int width, Int columns,
                  float *packed) {
  Int done = 0;
  if (width == columns && b_column == 1) {
    for (; done < k; done++) {
      const float *row = b + done * b_row;
      for (Int q = 0; q < columns; q += 16) __builtin_prefetch(row + columns + q);
      memcpy(packed + done * columns, row, sizeof(float) * columns);
    }
  } else if (width == columns && b_row == 1) {
    done = k / LANES * LANES;
    for (Int q = 0; q < columns; q += LANES)
      for (Int p = 0; p < done; p += LANES) {
        const float *block = b + p + q * b_column;
        for (int i = 0; i < LANES; i++) __builtin_prefetch(block + (i + LANES) * b_column);
        transpose_block(block, b_column, columns, packed + p * columns + q);
      }
  }
  for (Int p = done; p < k; p++)
    for (Int q = 0; q < columns; q++)
      packed[p * columns + q] = q < width ? b[p * b_row + q * b_column] : 0;
}

/* Number (row, column) of a narrow b. */
INLINE float narrow_at(int kind, const Product *p, Int row, Int column) {
  Int at = column * p->b_column + row;
  if (kind == FLOAT16) return from_float16(((const uint16_t *)p->b)[at]);
  return ((const int8_t *)p->b)[at] * p->scales[column * groups_of(p->k) + row / GROUP];
}

/* LANES numbers of a column of it, from (row, column) on, which share a scale; the same numbers of
   the next rows are fetched ahead. */
INLINE vec narrow_vector(int kind, const Product *p, Int row, Int column) {
  Int at = column * p->b_column + row;
  if (kind == FLOAT16) {
    const uint16_t *halves = (const uint16_t *)p->b + at;
    __builtin_prefetch(halves + 4 * LANES);
    return floats_of_float16(halves);
  }
  const int8_t *integers = (const int8_t *)p->b + at;
  __builtin_prefetch(integers + 4 * LANES);
  return floats_of(integers) * p->scales[column * groups_of(p->k) + row / GROUP];
}

/* As pack_columns, for the part (k, width) of a narrow b that begins at (row, column): squares of
   LANES × LANES numbers become floats and are transposed in the nearest cache. */
INLINE void widen_columns(int kind, const Product *p, Int row, Int column, Int k, Int width,
                          float *packed) {
  Int whole = k / LANES * LANES, whole_columns = width / LANES * LANES;
  for (Int q = 0; q < whole_columns; q += LANES)
    for (Int r = 0; r < whole; r += LANES) {
      vec square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = narrow_vector(kind, p, row + r, column + q + i);
      transpose_block((const float *)square, LANES, COLUMNS, packed + r * COLUMNS + q);
    }
  for (Int q = 0; q < COLUMNS; q++)
    for (Int r = q < whole_columns ? whole : 0; r < k; r++)
      packed[r * COLUMNS + q] = q < width ? narrow_at(kind, p, row + r, column + q) : 0;
}

/* The part (k, width) of b that begins at (row, column), of at most COLUMNS columns. */
static void pack_part_of_b(const Product *p, Int row, Int column, Int k, Int width, float *packed) {
  Int at = row * p->b_row + column * p->b_column;
  if (p->b_kind == FLOAT16)
    widen_columns(FLOAT16, p, row, column, k, width, packed);
  else if (p->b_kind == INT8)
    widen_columns(INT8, p, row, column, k, width, packed);
  else
    pack_columns((const float *)p->b + at, p->b_row, p->b_column, k, width, COLUMNS, packed);
}

/* Strips of ROWS rows of a (n, k), each stored column after column; missing rows are zeros. */
static void pack_rows(const float *a, Int a_row, Int a_column, Int n, Int k, float *packed) {
  Int whole = a_row == 1 && a_column >= ROWS + 2 ? n / ROWS * ROWS : 0;
  for (Int p = 0; p < k; p++) /* all strips together, since a's columns have no gaps */
    for (Int i = 0; i < whole; i += ROWS) {
      float *strip = packed + i * k + p * ROWS;
      /* Two extra numbers make it one register; the next step writes over them. */
      if (p + 1 < k)
        memcpy(strip, a + i + p * a_column, (ROWS + 2) * sizeof(float));
      else
        for (Int q = 0; q < ROWS; q++) strip[q] = a[i + q + p * a_column];
    }
  for (Int i = whole; i < n; i += ROWS) {
    Int rows = min(ROWS, n - i);
    for (Int p = 0; p < k; p++)
      for (Int q = 0; q < ROWS; q++)
        packed[i * k + p * ROWS + q] = q < rows ? a[(i + q) * a_row + p * a_column] : 0;
  }
}

static void tile_of_rows(Int k, const float *a, Int a_row, const float *b, float *c, Int c_row,
                         int add) {
  multiply_tile(VECTORS, k, a, a_row, 1, b, c, c_row, add);
}

static void tile_of_packed_rows(Int k, const float *a, const float *b, float *c, Int c_row,
                                int add) {
  multiply_tile(VECTORS, k, a, 1, ROWS, b, c, c_row, add);
}

/* c (n, m) = a (n, k) @ b, or += with `add`; b is packed, and a packed or as it is. */
static void multiply_strip(Int n, Int m, Int k, const float *a, Int a_row, int a_is_packed,
                           const float *b, const float *bias, float *c, Int c_row, int add) {
  float apart[ROWS * COLUMNS];
  for (Int j = 0; j < m; j += COLUMNS) {
    int whole = n == ROWS && m - j >= COLUMNS;
    float *tile = whole ? c + j : apart;

    Int tile_row = whole ? c_row : COLUMNS;
    if (a_is_packed)
      tile_of_packed_rows(k, a, b + j * k, tile, tile_row, add && whole);
    else
      tile_of_rows(k, a, a_row, b + j * k, tile, tile_row, add && whole);
    Int width = min(COLUMNS, m - j);
    for (Int i = 0; i < n && !whole; i++)
      for (Int q = 0; q < width; q++)
        c[i * c_row + j + q] = tile[i * COLUMNS + q] + (add ? c[i * c_row + j + q] : 0);
    for (Int i = 0; i < n && bias; i++)
      for (Int q = 0; q < width; q++) c[i * c_row + j + q] += bias[j + q];
  }
}

/* How many columns of b are packed together: as many as fill, DEPTH rows deep, about half of the
   second-level cache. */
static Int columns_together(void) {
  Int columns = second_level_cache() / 2 / (DEPTH * sizeof(float));
  return min(round_up(columns, COLUMNS), MOST_COLUMNS);
}

void multiply_part(const Product *p, Int first_row, Int end_row, Int first_column, Int end_column) {
  float *packed_a = scratch(PACKED_A, STRIPS * ROWS * DEPTH);
  Int together = columns_together();
  float *packed_b = scratch(PACKED_B, together * DEPTH);
  if (!packed_a || !packed_b) return;
  for (Int j0 = first_column; j0 < end_column; j0 += together) {
    Int width = min(together, end_column - j0);
    for (Int p0 = 0; p0 < p->k; p0 += DEPTH) {
      Int depth = min(DEPTH, p->k - p0);
      for (Int j = 0; j < width; j += COLUMNS)
        pack_part_of_b(p, p0, j0 + j, depth, min(COLUMNS, width - j), packed_b + j * depth);
      const float *bias = p->bias && p0 + depth == p->k ? p->bias + j0 : NULL;
      for (Int i0 = first_row; i0 < end_row; i0 += STRIPS * ROWS) {
        Int height = min(STRIPS * ROWS, end_row - i0);
        const float *a = p->a + i0 * p->a_row + p0 * p->a_column;
        int pack = p->a_column != 1 || height % ROWS || p->a_row % SAME_PLACE == 0;
        if (pack) pack_rows(a, p->a_row, p->a_column, height, depth, packed_a);

        for (Int i = 0; i < height; i += ROWS)
          multiply_strip(min(ROWS, height - i), width, depth,
                         pack ? packed_a + i * depth : a + i * p->a_row, p->a_row, pack, packed_b,
                         bias, p->c + (i0 + i) * p->c_row + j0, p->c_row, p->adds || p0 > 0);
      }
    }
  }
}

#define MUCH_TO_PACK 262144 /* numbers: packing more costs more than moving rows among cores */

/* Whether to cut c's rows for the threads, or its columns: whichever makes each thread pack less.
   While b is small, the longer side is cut: that is mostly the rows, and a thread's own are often
   still in its core's cache from the last task. */
static int cut_rows(const Product *p, Int parts) {
  Int b = p->k * p->m, a = p->a_column == 1 ? 0 : p->k * p->n;
  if (b < MUCH_TO_PACK || p->m < parts * COLUMNS) return p->n >= p->m;
  return b + a / parts < b / parts + a;
}

/* Part i of `parts` of a product. */
static void multiply_slice(const Product *p, Int i, Int parts) {
  Int first, end;
  if (cut_rows(p, parts)) {
    end = cut(p->n, parts, ROWS, i, &first);
    multiply_part(p, first, end, 0, p->m);
  } else {
    end = cut(p->m, parts, COLUMNS, i, &first);
    multiply_part(p, 0, p->n, first, end);
  }
}

#define FEW_PRODUCTS 300000 /* with fewer multiplications, waking another thread does not pay */

static Int parts_for(const Product *p) {
  return p->n * p->k * p->m < FEW_PRODUCTS ? 1 : thread_count();
}

static void multiply_task(const void *product, Int part, Int parts) {
  multiply_slice(product, part, parts);
}

int matmul(const Product *p) { return run_parts(multiply_task, p, parts_for(p)); }

/* -------------------------------------------------------------------- a linear layer's backward */

typedef struct {
  Product dx, dweight;
  const float *grad; /* (n, m), its rows without gaps */
  float *dbias;      /* (m) */
  Int n, m;
} LinearBackward;

/* sums[j] = the sum of x[row * stride + j] over the rows */
static void sum_rows(const float *x, Int stride, Int rows, Int columns, float *sums) {
  double *totals = (double *)scratch(TOTALS, 2 * columns);
  if (!totals) return;
  memset(totals, 0, columns * sizeof(double));
  for (Int first = 0; first < rows; first += ROWS_IN_FLOAT) {
    memset(sums, 0, columns * sizeof(float));
    for (Int row = first; row < min(first + ROWS_IN_FLOAT, rows); row++)
      add_scaled(sums, 1, x + row * stride, columns);
    add_to_totals(totals, sums, columns);
  }
  round_totals(sums, totals, columns);
}

/* Parts 2i and 2i + 1 are slice i of dx and of dweight, so that a thread keeps its own rows. */
static void linear_backward_task(const void *arguments, Int part, Int parts) {
  const LinearBackward *l = arguments;
  Int i = part / 2, slices = parts / 2;
  if (part % 2 == 0) {
    multiply_slice(&l->dx, i, slices);
    return;
  }
  multiply_slice(&l->dweight, i, slices);
  Int first, end = cut(l->m, slices, COLUMNS, i, &first);
  sum_rows(l->grad + first, l->m, l->n, end - first, l->dbias + first);
}

/* dx = grad @ weight.T, dweight = x.T @ grad, and dbias is the sums of grad's columns. */
int linear_backward(const LinearBackward *l) {
  Int dx_parts = parts_for(&l->dx), dweight_parts = parts_for(&l->dweight);
  Int slices = dx_parts > dweight_parts ? dx_parts : dweight_parts;
  return run_parts(linear_backward_task, l, 2 * slices);
}

/* ------------------------------------------------------------- few rows, as in decoding a token */

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

/* sums[r][i] += x (rows, SLICE)[r] * weight (SIDE, k)[i] for `length` numbers, a multiple of LANES.
   Meanwhile the first so many `places` of what is ahead are fetched. */
INLINE void add_products(int rows, int places, Int length, Int k, const float *x,
                         const float *weight, Ahead ahead, vec (*sums)[LANES]) {
  vec sum[ROWS][SIDE];
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < SIDE; i++) sum[r][i] = sums[r][i];
  for (Int p = 0; p < length; p += LANES, ahead.from += ahead.step) {
    vec here[SIDE];
    for (int i = 0; i < SIDE; i++) here[i] = *(const vec *)(weight + i * k + p);
    for (int i = 0; i < places; i++) __builtin_prefetch(ahead.from + i * ahead.apart, 0, 2);
    for (int r = 0; r < rows; r++) {
      vec row = *(const vec *)(x + r * SLICE + p);
      for (int i = 0; i < SIDE; i++) sum[r][i] += here[i] * row;
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < SIDE; i++) sums[r][i] = sum[r][i];
}

INLINE void add_products_of_rows(Int rows, int places, Int length, Int k, const float *x,
                                 const float *weight, Ahead ahead, vec (*sums)[LANES]) {
  switch (rows) {
    case 1: add_products(1, places, length, k, x, weight, ahead, sums); break;
    case 2: add_products(2, places, length, k, x, weight, ahead, sums); break;
    case 3: add_products(3, places, length, k, x, weight, ahead, sums); break;
    case 4: add_products(4, places, length, k, x, weight, ahead, sums); break;
    case 5: add_products(5, places, length, k, x, weight, ahead, sums); break;
    default: add_products(ROWS, places, length, k, x, weight, ahead, sums);
  }
}

/* The rows of x are taken in groups that are as equal as they can be. Each group fetches some of the
   places: asked for all at once, they would keep the first group waiting, and memory would be idle
   while the others work. */
void add_side(Int rows, Int length, Int k, const float *x, const float *weight, Ahead ahead,
              vec (*sums)[LANES]) {
  Int groups = (rows + ROWS - 1) / ROWS;
  for (Int i = 0, first = 0, end; i < groups; i++, first = end) {
    end = rows * (i + 1) / groups;
    Int n = end - first, places = SIDE * (i + 1) / groups - SIDE * i / groups;
    const float *part = x + first * SLICE;
    switch (places) {
      case 0: add_products_of_rows(n, 0, length, k, part, weight, ahead, sums + first); break;
      case 1: add_products_of_rows(n, 1, length, k, part, weight, ahead, sums + first); break;
      case 2: add_products_of_rows(n, 2, length, k, part, weight, ahead, sums + first); break;
      default: add_products_of_rows(n, SIDE, length, k, part, weight, ahead, sums + first);
    }
    ahead.from += places * ahead.apart;
  }
}

/* y (rows, LANES) = x (rows, k) @ weight (LANES, k).T for at most SOME_ROWS rows; of each slice of
   `packed`, row after row lies SLICE numbers apart, and slices lie packed_slice apart. */
static void dots_in_slices(Int rows, Int k, const float *x, const float *packed, Int packed_slice,
                           const float *weight, float *y, Int m) {
  vec sums[SOME_ROWS][LANES] __attribute__((aligned(64)));
  memset(sums, 0, rows * sizeof *sums);
  Int whole = k / LANES * LANES;
  for (Int p = 0; p < whole; p += SLICE, packed += packed_slice) {
    Int length = min(SLICE, whole - p);
    for (Int j = 0; j < LANES; j += SIDE) {
      Ahead ahead = ahead_of(weight, k, sizeof *weight, whole, p, j);
      add_side(rows, length, k, packed, weight + j * k + p, ahead, (vec(*)[LANES])(sums[0] + j));
    }
  }
  for (Int r = 0; r < rows; r++) {
    vec total = sums_of_lanes(sums[r]);
    *(vec *)(y + r * m) = total;
    for (Int j = 0; j < LANES && whole < k; j++)
      y[r * m + j] += dot(x + r * k + whole, weight + j * k + whole, k - whole);
  }
}

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
    int in_slices = rows->packed && end - j >= LANES;
    Int step = in_slices ? SOME_ROWS : TOGETHER;
    for (Int r = 0; r < f->n; r += step) {
      const float *x = f->x + r * f->k;
      float *y = f->y + r * f->m + j;
      Int n = min(step, f->n - r);
      if (in_slices)
        dots_in_slices(n, f->k, x, rows->packed + r * SLICE, f->n * SLICE, weight, y, f->m);
      else
        dots_of_rows(n, min(LANES, end - j), f->k, x, weight, y, f->m);
    }
  }
  for (Int r = 0; r < f->n && f->bias; r++)
    add_scaled(f->y + r * f->m + first, 1, f->bias + first, end - first);
}

float *packed_in_slices(int purpose, Int n, Int k, const float *x) {
  float *packed = scratch(purpose, n * round_up(k, SLICE));
  for (Int p = 0; p < k && packed; p += SLICE)
    for (Int r = 0; r < n; r++)
      memcpy(packed + (p / SLICE * n + r) * SLICE, x + r * k + p,
             min(SLICE, k - p) * sizeof(float));
  return packed;
}

/* Sets `packed`, as the only part may; a task, so that run_parts reports a lack of memory. */
static void pack_task(const void *arguments, Int part, Int parts) {
  PackedRows *rows = (PackedRows *)arguments;
  rows->packed = packed_in_slices(PACKED_A, rows->f->n, rows->f->k, rows->f->x);
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
