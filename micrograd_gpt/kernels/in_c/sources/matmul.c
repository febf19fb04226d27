/* Matrix products, cut into pieces whose numbers stay in the caches.

   After Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication". A part of b,
   DEPTH rows of it, is packed in the order it will be read, and stays in the second-level cache
   while all of a passes by, ROWS rows at a time. Those rows stay in the first-level cache, and a
   tile of c stays in registers for DEPTH steps. */

#include "matmul.h"
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
  __builtin_prefetch((const char *)p->b + (at + 4 * LANES) * (kind == INT8 ? 1 : 2));
  vec numbers = floats_at(kind, p->b, at);
  if (kind == INT8) numbers *= p->scales[column * groups_of(p->k) + row / GROUP];
  return numbers;
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
