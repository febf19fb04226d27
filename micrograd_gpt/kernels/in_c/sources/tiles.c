/* Products of bfloat16 by AMX: one instruction multiplies (16, 32) @ (32, 16), both in registers that
   hold matrices, and adds to a third.

   Four registers hold the sums of 32 rows and columns; the other four hold factors, and each is used
   twice. A block of the left factor is packed and stays in the second-level cache, beside as many
   panels of the right factor as there is room for. Both are read from memory along their rows: it is
   several times slower to read a few numbers of each row. */

#include "tiles.h"

#ifdef HAS_TILES
#include "half.h"
#include "matmul.h"

enum { PACKED_A, PACKED_B, SUMS }; /* the purposes of scratch() here */
#define MOST_DEPTH 1024           /* of what is packed together */

/* -------------------------------------------------------------------------------------- packing */

/* Where the number (i, p) of a (n, deep) stands once it is packed. */
INLINE Int place_in_strips(Int i, Int p, Int deep) {
  return i / SIDE * SIDE * deep + p / STEP * SIDE * STEP + i % SIDE * STEP + p % STEP;
}

/* Where the pair (p, q) and (p + 1, q) of b (deep, m) stands, counted in pairs. */
INLINE Int place_in_panels(Int p, Int q, Int deep) {
  Int step = (q / SIDE * deep + p / STEP * STEP) * SIDE, half = q % SIDE / 16 * 16 * STEP;
  return (step + half) / 2 + p % STEP / 2 * 16 + q % 16;
}

/* 16 rows and STEP columns of a, whose columns have no gaps. */
INLINE void pack_across(const uint16_t *a, Int a_column, uint16_t *packed) {
  uint32_t pairs[LANES * LANES];
  for (Int p = 0; p < LANES; p++) {
    const uint16_t *x = a + 2 * p * a_column, *y = x + a_column;
#pragma omp simd
    for (Int i = 0; i < LANES; i++) pairs[p * LANES + i] = pair(x[i], y[i]);
  }
  transpose_block((const float *)pairs, LANES, STEP / 2, (float *)packed);
}

void pack_strips(const uint16_t *a, Int a_row, Int a_column, Int n, Int k, uint16_t *packed) {
  Int deep = round_up(k, STEP), done_rows = 0, done = k / STEP * STEP;
  if (n % SIDE || k < deep) memset(packed, 0, round_up(n, SIDE) * deep * sizeof *packed);
  if (a_column == 1) {
    for (; done_rows < n; done_rows++)
      for (Int p = 0; p < done; p += STEP)
        memcpy(packed + place_in_strips(done_rows, p, deep), a + done_rows * a_row + p, 2 * STEP);
  } else if (a_row == 1) {
    done_rows = n / LANES * LANES;
    for (Int p = 0; p < done; p += STEP) /* memory is read fastest along its rows */
      for (Int i = 0; i < done_rows; i += LANES)
        pack_across(a + i + p * a_column, a_column, packed + place_in_strips(i, p, deep));
  }
  for (Int i = 0; i < n; i++)
    for (Int p = i < done_rows ? done : 0; p < k; p++)
      packed[place_in_strips(i, p, deep)] = a[i * a_row + p * a_column];
}

/* The bfloat16 at place i of b, which is of bfloat16, or wide, as in halves_at. */
INLINE uint16_t half_at(int wide, const void *b, Int i) {
  return wide ? to_bfloat16(((const float *)b)[i]) : ((const uint16_t *)b)[i];
}

/* The pairs of STEP numbers of LANES columns, from place `at` of b on; a column has no gaps. */
INLINE void pack_columns_across(int wide, const void *b, Int at, Int b_column, uint32_t *packed) {
  uint16_t rounded[LANES * STEP] __attribute__((aligned(64)));
  if (!wide) { /* a column's pairs lie in memory as they are packed */
    transpose_block((const float *)((const uint16_t *)b + at), b_column / 2, LANES,
                    (float *)packed);
    return;
  }
  for (Int i = 0; i < LANES * STEP; i += 16)
    _mm256_store_si256((__m256i *)(rounded + i),
                       halves_at(1, b, at + i / STEP * b_column + i % STEP));
  transpose_block((const float *)rounded, STEP / 2, LANES, (float *)packed);
}

INLINE void pack_panels_of(int wide, const void *b, Int b_row, Int b_column, Int k, Int m,
                           uint16_t *packed) {
  uint32_t *pairs = (uint32_t *)packed;
  Int deep = round_up(k, STEP), done = 0, done_columns = 0;
  if (m % SIDE || k < deep) memset(packed, 0, round_up(m, SIDE) * deep * sizeof *packed);
  if (b_column == 1) {
    done = k / 2 * 2, done_columns = m / SIDE * SIDE;
    for (Int p = 0; p < done; p += 2) /* memory is read fastest along its rows */
      for (Int q = 0; q < done_columns; q += SIDE)
        pack_two_rows(wide, b, p * b_row + q, (p + 1) * b_row + q,
                      pairs + place_in_panels(p, q, deep));
  } else if (b_row == 1 && (wide || b_column % 2 == 0)) {
    done = k / STEP * STEP, done_columns = m / LANES * LANES;
    for (Int q = 0; q < done_columns; q += LANES)
      for (Int p = 0; p < done; p += STEP)
        pack_columns_across(wide, b, p + q * b_column, b_column,
                            pairs + place_in_panels(p, q, deep));
  }
  for (Int q = 0; q < m; q++)
    for (Int p = q < done_columns ? done : 0; p < k; p += 2) {
      Int first = p * b_row + q * b_column;
      pairs[place_in_panels(p, q, deep)] =
          pair(half_at(wide, b, first), p + 1 < k ? half_at(wide, b, first + b_row) : 0);
    }
}

void pack_panels(const uint16_t *b, Int b_row, Int b_column, Int k, Int m, uint16_t *packed) {
  pack_panels_of(0, b, b_row, b_column, k, m, packed);
}

/* The same where b is of float32, which is rounded. */
static void pack_rounded_panels(const float *b, Int b_row, Int b_column, Int k, Int m,
                                uint16_t *packed) {
  pack_panels_of(1, b, b_row, b_column, k, m, packed);
}

/* ------------------------------------------------------------------------------------- products */

/* Where a block of a product lies: `depth` numbers from p0 on, and `rows` rows from i0 on. */
typedef struct {
  Int i0, rows, p0, depth, steps, columns; /* columns: how many of b are packed together */
  int add, complete; /* to what is summed already; everything is, once this is added */
  uint16_t *strips, *panels;
  float *sums; /* of `rows` rows, panel after panel, where c cannot hold them until all are added */
} Block;

/* 16 numbers of bfloat16 as float32. */
INLINE __m512 widened(const uint16_t *x) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
  return (__m512)_mm512_slli_epi32(words, 16);
}

/* A row of at most 16 sums goes to c at (row, column), with the bias where all is summed. */
INLINE void put_row(const HalfProduct *p, const Block *block, Int row, Int column, Int n,
                    const float *restrict sums) {
  const uint16_t *bias = p->bias && block->complete ? p->bias + column : NULL;
  Int place = row * p->c_row + column;
  if (p->c_is_narrow && n == 16) {
    __m512 all = _mm512_loadu_ps(sums);
    if (bias) all = _mm512_add_ps(all, widened(bias));
    _mm256_storeu_si256((__m256i *)((uint16_t *)p->c + place), (__m256i)_mm512_cvtneps_pbh(all));
    return;
  }
  for (Int j = 0; j < n; j++) {
    float sum = sums[j] + (bias ? from_bfloat16(bias[j]) : 0);
    if (p->c_is_narrow)
      ((uint16_t *)p->c)[place + j] = to_bfloat16(sum);
    else
      ((float *)p->c)[place + j] = sum + (block->add ? ((float *)p->c)[place + j] : 0);
  }
}

/* A register's sums go to c from (row, column) on, where there are so many rows and columns. They
   pass through few cache lines, the same for each register: while stores are on their way, loads
   from lines at the same places of other pages wait. */
INLINE void put_quarter(int register_, const HalfProduct *p, const Block *block, Int row,
                        Int column, Int rows, Int columns) {
  float sums[16 * 16] __attribute__((aligned(64)));
  if (rows <= 0 || columns <= 0) return;
  store_quarter(register_, sums, 16);
  for (Int r = 0; r < min(16, rows); r++)
    if (columns >= 16) /* a constant makes a vector of a loop */
      put_row(p, block, row + r, column, 16, sums + r * 16);
    else
      put_row(p, block, row + r, column, columns, sums + r * 16);
}

/* c at (block->i0 + i, column), at most SIDE rows and columns; or the sums, if not complete. */
static void multiply_strip(const HalfProduct *p, const Block *block, Int i, const uint16_t *panel,
                           Int column, Int columns, float *sums) {
  Int rows = min(SIDE, block->rows - i), row = block->i0 + i;
  int into_c = !p->c_is_narrow && !p->bias && rows == SIDE && columns == SIDE;
  float *place = into_c ? (float *)p->c + row * p->c_row + column : sums;
  Int stride = into_c ? p->c_row : SIDE;
  if (place && block->add)
    load_sums(place, stride);
  else
    clear_sums();
  multiply_strip_and_panel(block->steps, block->strips + i * block->steps * STEP, panel);
  if (into_c || (p->c_is_narrow && !block->complete)) {
    store_sums(place, stride);
  } else {
    put_quarter(0, p, block, row, column, rows, columns);
    put_quarter(1, p, block, row, column + 16, rows, columns - 16);
    put_quarter(2, p, block, row + 16, column, rows - 16, columns);
    put_quarter(3, p, block, row + 16, column + 16, rows - 16, columns - 16);
  }
}

/* Columns first … end - 1 of c in the rows and depth of a block. */
static void multiply_block(const HalfProduct *p, Block *block, Int first, Int end) {
  Int deep = block->steps * STEP, strips = round_up(block->rows, SIDE) / SIDE;
  pack_strips(p->a + block->i0 * p->a_row + block->p0 * p->a_column, p->a_row, p->a_column,
              block->rows, block->depth, block->strips);
  float *sums = block->sums;
  for (Int j0 = first; j0 < end; j0 += block->columns) {
    Int columns = min(block->columns, end - j0), at = block->p0 * p->b_row + j0 * p->b_column;
    if (p->b_is_wide)
      pack_rounded_panels((const float *)p->b + at, p->b_row, p->b_column, block->depth, columns,
                          block->panels);
    else
      pack_panels((const uint16_t *)p->b + at, p->b_row, p->b_column, block->depth, columns,
                  block->panels);
    for (Int i = 0; i < strips; i++)
      for (Int j = 0; j < columns; j += SIDE) {
        multiply_strip(p, block, i * SIDE, block->panels + j * deep, j0 + j,
                       min(SIDE, columns - j), sums);
        if (sums) sums += SIDE * SIDE;
      }
  }
}

/* The largest multiple of SIDE up to n, or SIDE. */
static Int whole_sides(Int n) { return n < SIDE ? SIDE : n / SIDE * SIDE; }

void multiply_part_by_tiles(const HalfProduct *p, Int first_row, Int end_row, Int first_column,
                            Int end_column) {
  Int deep = equal_parts(p->k, MOST_DEPTH, STEP), rows = end_row - first_row;
  Int cached = second_level_cache() / (deep * sizeof *p->a); /* rows or columns as deep */
  Int together = equal_parts(rows, whole_sides(cached / 8 * 3), SIDE);
  Int columns = end_column - first_column;
  Block block = {.columns = min(whole_sides(cached / 4), round_up(columns, SIDE))};
  block.strips = (uint16_t *)scratch(PACKED_A, together * deep / 2);
  block.panels = (uint16_t *)scratch(PACKED_B, block.columns * deep / 2);
  if (!block.strips || !block.panels) return;
  if (p->c_is_narrow && p->k > deep) {
    block.sums = scratch(SUMS, together * round_up(columns, SIDE));
    if (!block.sums) return;
  }
  open_tiles();
  for (block.i0 = first_row; block.i0 < end_row; block.i0 += together)
    for (block.p0 = 0; block.p0 < p->k; block.p0 += deep) {
      block.rows = min(together, end_row - block.i0);
      block.depth = min(deep, p->k - block.p0);
      block.steps = round_up(block.depth, STEP) / STEP;
      block.add = p->adds || block.p0 > 0, block.complete = block.p0 + block.depth == p->k;
      multiply_block(p, &block, first_column, end_column);
    }
  _tile_release();
}
#endif
