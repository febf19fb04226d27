/* Matrix products of bfloat16, whose sums are float32; and conversions, of float16 too.

   Both factors are packed, as matmul.c packs float32's, in one of three ways, the best that the
   processor has; the first is in tiles.c:

   TILES    AMX multiplies (16, 32) @ (32, 16) in one instruction, and has 8 registers for matrices
   PAIRS    an instruction of avx512_bf16 multiplies two numbers a lane, and adds both products
   WIDENED  blocks become float32 while they are packed, and are multiplied as such

   AMD's processors multiply pairs at twice the rate of float32, Intel's at half of it: there the way
   is TILES or WIDENED.

   For the first two, b's rows are packed in pairs: the numbers of rows 2p and 2p + 1 that stand in
   one column make one word of 32 bits. These instructions take numbers below 2^-126 for 0. */

#include "bfloat16.h"
#include "half.h"
#include "matmul.h"
#include "tiles.h"

#ifdef HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { WIDENED, PAIRS, TILES };
enum { PACKED_A, PACKED_B, SUMS, TOTALS }; /* the purposes of scratch() here */

/* -------------------------------------------------------------------- what the processor can do */

#ifdef HAS_TILES
/* Whether the system lets this process use the registers for matrices, which it has to be asked. */
static int may_use_tiles(void) {
  enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* Linux's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#endif

static int best_way(void) {
#ifdef HAS_TILES
  if (may_use_tiles()) return TILES;
#endif
#ifdef HAS_PAIRS
  if (!__builtin_cpu_is("intel")) return PAIRS;
#endif
  return WIDENED;
}

static _Atomic int highest = TILES;

/* How products are computed now. */
static int way(void) {
  static _Atomic int best = -1; /* kept, since asking takes a while */
  if (best < 0) best = best_way();
  return best < highest ? best : highest;
}

/* Use no way above `most` from now on. Returns the one that is used. */
int bfloat16_products(Int most) {
  highest = most;
  return way();
}

int bfloat16_by_tiles(void) { return way() == TILES; }
int bfloat16_by_pairs(void) { return way() == PAIRS; }

/* -------------------------------------------------------------------------------------- packing */

#define PACKED_ROWS 96 /* of a, packed together: a multiple of every way's rows */

/* How a way cuts a product: sums for rows × columns of c at a time, from packed blocks of a and b
   that are at most `depth` deep, a multiple of `step`. `size` is a packed number's, in bytes. */
typedef struct {
  Int rows, columns, depth, step, size;
} Cutting;

static Cutting cutting_of(int way) {
  if (way == TILES) return (Cutting){.rows = 32, .columns = 32}; /* tiles.c knows the rest */
  if (way == PAIRS) return (Cutting){ROWS, COLUMNS, 1536, 2, 2};
  return (Cutting){ROWS, COLUMNS, 384, 1, 4};
}

/* pairs[i] is (x[i], y[i]) */
INLINE void interleave(const uint16_t *x, const uint16_t *y, Int n, uint32_t *pairs) {
#pragma omp simd
  for (Int i = 0; i < n; i++) pairs[i] = pair(x[i], y[i]);
}

/* b (k, width) as rows of `columns` pairs, zeros where b has no number; `deep` >= k is even. */
static void pack_pairs(const uint16_t *b, Int b_row, Int b_column, Int k, Int width, Int deep,
                       Int columns, uint32_t *packed) {
  Int rows = 0, whole = k / 2; /* pairs: done, and in b */
  if (width < columns || whole < deep / 2) memset(packed, 0, deep / 2 * columns * sizeof *packed);
  if (b_column == 1) {
    for (; rows < whole; rows++)
      interleave(b + 2 * rows * b_row, b + (2 * rows + 1) * b_row, width, packed + rows * columns);
  } else if (b_row == 1 && b_column % 2 == 0 && width == columns) {
    rows = whole / LANES * LANES; /* a column's pairs lie in memory as they are packed */
    for (Int q = 0; q < columns; q += LANES)
      for (Int p = 0; p < rows; p += LANES)
        transpose_block((const float *)(b + 2 * p + q * b_column), b_column / 2, columns,
                        (float *)packed + p * columns + q);
  }
  for (Int p = rows; 2 * p < k; p++)
    for (Int q = 0; q < width; q++) {
      const uint16_t *first = b + 2 * p * b_row + q * b_column;
      packed[p * columns + q] = pair(*first, 2 * p + 1 < k ? first[b_row] : 0);
    }
}

#ifdef HAS_PAIRS
/* The pairs of LANES numbers from x on and as many from y on, rounded. */
INLINE __m512i rounded_pairs(const float *x, const float *y) {
  __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
  __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(y)));
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

/* As pack_pairs, where b is of float32, which is rounded. */
static void pack_rounded_pairs(const float *b, Int b_row, Int b_column, Int k, Int width, Int deep,
                               Int columns, uint32_t *packed) {
  Int rows = 0, whole = k / 2;
  if (width < columns || whole < deep / 2) memset(packed, 0, deep / 2 * columns * sizeof *packed);
  if (b_column == 1 && width == columns) {
    for (; rows < whole; rows++)
      for (Int q = 0; q < columns; q += LANES)
        _mm512_store_si512(packed + rows * columns + q,
                           rounded_pairs(b + 2 * rows * b_row + q, b + (2 * rows + 1) * b_row + q));
  } else if (b_row == 1 && width == columns) {
    rows = whole / LANES * LANES; /* a column's pairs lie in memory side by side */
    for (Int q = 0; q < columns; q += LANES)
      for (Int p = 0; p < rows; p += LANES) {
        __m512i across[LANES];
        for (Int i = 0; i < LANES; i++) {
          const float *x = b + 2 * p + (q + i) * b_column;
          __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + LANES);
          across[i] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        }
        transpose_block((const float *)across, LANES, columns, (float *)packed + p * columns + q);
      }
  }
  for (Int p = rows; 2 * p < k; p++)
    for (Int q = 0; q < width; q++) {
      const float *first = b + 2 * p * b_row + q * b_column;
      packed[p * columns + q] =
          pair(to_bfloat16(*first), 2 * p + 1 < k ? to_bfloat16(first[b_row]) : 0);
    }
}
#endif

/* b (k, width) of float32 as rows of `columns` floats, which have only the digits of a bfloat16. */
static void round_columns(const float *b, Int b_row, Int b_column, Int k, Int width, Int columns,
                          float *packed) {
  pack_columns(b, b_row, b_column, k, width, columns, packed);
#pragma omp simd
  for (Int i = 0; i < k * columns; i++) packed[i] = from_bfloat16(to_bfloat16(packed[i]));
}

/* packed[i][p] = a[i][p] for LANES rows of a and 2 LANES of its columns, which have no gaps. */
INLINE void pack_across(const uint16_t *a, Int a_column, Int deep, uint16_t *packed) {
  uint32_t pairs[LANES * LANES];
  for (Int p = 0; p < LANES; p++)
    interleave(a + 2 * p * a_column, a + (2 * p + 1) * a_column, LANES, pairs + p * LANES);
  transpose_block((const float *)pairs, LANES, deep / 2, (float *)packed);
}

/* a (n, k) row after row, each filled up to `deep` numbers with zeros, and `rows` of them. */
static void pack_half_rows(const uint16_t *a, Int a_row, Int a_column, Int n, Int k, Int rows,
                           Int deep, uint16_t *packed) {
  Int done_rows = 0, done_columns = 0;
  if (n < rows || k < deep) memset(packed, 0, rows * deep * sizeof *packed);
  if (a_column == 1) {
    for (; done_rows < n; done_rows++)
      memcpy(packed + done_rows * deep, a + done_rows * a_row, k * sizeof *packed);
  } else if (a_row == 1 && deep % 2 == 0) {
    done_columns = k / (2 * LANES) * (2 * LANES);
    for (; done_rows + LANES <= n; done_rows += LANES)
      for (Int p = 0; p < done_columns; p += 2 * LANES)
        pack_across(a + done_rows + p * a_column, a_column, deep, packed + done_rows * deep + p);
    for (Int i = 0; i < done_rows; i++)
      for (Int p = done_columns; p < k; p++) packed[i * deep + p] = a[i + p * a_column];
  }
  for (Int i = done_rows; i < n; i++)
    for (Int p = 0; p < k; p++) packed[i * deep + p] = a[i * a_row + p * a_column];
}

/* wide[p][i] = x[i][p] for LANES rows of x, whose numbers have no gaps, and as many columns. */
INLINE void widen_across(const uint16_t *x, Int stride, float *wide, Int columns) {
  float rows[LANES * LANES];
  for (Int i = 0; i < LANES; i++)
    for (Int p = 0; p < LANES; p++) rows[i * LANES + p] = from_bfloat16(x[i * stride + p]);
  transpose_block(rows, LANES, columns, wide);
}

/* x (n, m) as float32, row after row of `columns` numbers; where x has no number, zeros. */
static void widen(const uint16_t *x, Int x_row, Int x_column, Int n, Int m, Int rows, Int columns,
                  float *wide) {
  Int done_rows = 0, done_columns = 0;
  if (n < rows || m < columns) memset(wide, 0, rows * columns * sizeof *wide);
  if (x_column == 1) {
    for (; done_rows < n; done_rows++)
#pragma omp simd
      for (Int j = 0; j < m; j++)
        wide[done_rows * columns + j] = from_bfloat16(x[done_rows * x_row + j]);
  } else if (x_row == 1) {
    done_columns = m / LANES * LANES;
    for (; done_rows + LANES <= n; done_rows += LANES)
      for (Int j = 0; j < done_columns; j += LANES)
        widen_across(x + done_rows + j * x_column, x_column, wide + done_rows * columns + j,
                     columns);
    for (Int i = 0; i < done_rows; i++)
      for (Int j = done_columns; j < m; j++)
        wide[i * columns + j] = from_bfloat16(x[i + j * x_column]);
  }
  for (Int i = done_rows; i < n; i++)
    for (Int j = 0; j < m; j++)
      wide[i * columns + j] = from_bfloat16(x[i * x_row + j * x_column]);
}

/* ----------------------------------------------------------------------------- tiles of products */

#ifdef HAS_PAIRS
/* c (ROWS, COLUMNS) = a (ROWS, deep) @ b (deep, COLUMNS) */
static void multiply_pairs(Int deep, const uint16_t *a, const uint32_t *b, float *c) {
  __m512 sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_setzero_ps();
  for (Int p = 0; p < deep / 2; p++) {
    __m512i row[VECTORS];
    for (int j = 0; j < VECTORS; j++) row[j] = _mm512_load_si512(b + p * COLUMNS + j * LANES);
    for (int i = 0; i < ROWS; i++) {
      int32_t both;
      memcpy(&both, a + i * deep + 2 * p, sizeof both);
      __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
      for (int j = 0; j < VECTORS; j++)
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], factor, (__m512bh)row[j]);
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++)
      _mm512_storeu_ps(c + i * COLUMNS + j * LANES, sums[i][j]);
}
#endif

static void multiply_packed(int way, Int deep, const void *a, const void *b, float *c) {
#ifdef HAS_PAIRS
  if (way == PAIRS) return multiply_pairs(deep, a, b, c);
#endif
  (void)way;
  multiply_tile(VECTORS, deep, a, deep, 1, b, c, COLUMNS, 0);
}

/* ------------------------------------------------------------------------------------- products */

/* How many columns of b are packed together: as many as fill most of the second-level cache. */
static Int columns_together(Cutting cutting) {
  Int columns = second_level_cache() / 8 * 5 / (cutting.depth * cutting.size);
  return round_up(min(columns, 1024), cutting.columns);
}

/* Where a block of a product lies: `deep` numbers from p0 on, and the columns from j0 on. */
typedef struct {
  int way, first, complete; /* nothing is summed yet; everything is, once this is added */
  Cutting cutting;
  Int p0, depth, deep, j0, width; /* deep: with the zeros up to a whole step */
  char *packed_a, *packed_b;
  float *sums;
  Int sums_row;
} Block;

static void pack_block_of_b(const HalfProduct *p, const Block *block) {
  Int columns = block->cutting.columns, depth = block->depth, deep = block->deep;
  for (Int j = 0; j < block->width; j += columns) {
    Int at = block->p0 * p->b_row + (block->j0 + j) * p->b_column;
    const uint16_t *narrow = (const uint16_t *)p->b + at;
    const float *wide = (const float *)p->b + at;
    void *packed = block->packed_b + j * deep * block->cutting.size;
    Int width = min(columns, block->width - j);
    if (block->way == WIDENED && p->b_is_wide)
      round_columns(wide, p->b_row, p->b_column, depth, width, columns, packed);
    else if (block->way == WIDENED)
      widen(narrow, p->b_row, p->b_column, depth, width, deep, columns, packed);
#ifdef HAS_PAIRS
    else if (p->b_is_wide)
      pack_rounded_pairs(wide, p->b_row, p->b_column, depth, width, deep, columns, packed);
#endif
    else
      pack_pairs(narrow, p->b_row, p->b_column, depth, width, deep, columns, packed);
  }
}

static void pack_block_of_a(const HalfProduct *p, const Block *block, Int row, Int n) {
  const uint16_t *a = p->a + row * p->a_row + block->p0 * p->a_column;
  Int rows = round_up(n, block->cutting.rows);
  void *packed = block->packed_a;
  if (block->way == WIDENED)
    widen(a, p->a_row, p->a_column, n, block->depth, rows, block->deep, packed);
  else
    pack_half_rows(a, p->a_row, p->a_column, n, block->depth, rows, block->deep, packed);
}

/* A row of a tile goes to `narrow` numbers, after `sums` and `bias` are added, or else to `wide`
   ones, to which it is added unless it is their `first`. What there is not, is NULL. */
INLINE void put_row(Int n, const float *restrict row, float *restrict wide, int first,
                    const float *restrict sums, const uint16_t *restrict bias,
                    uint16_t *restrict narrow) {
#pragma omp simd
  for (Int j = 0; j < n; j++) {
    float sum = row[j];
    if (wide && !first) sum += wide[j];
    if (sums) sum += sums[j];
    if (bias) sum += from_bfloat16(bias[j]);
    if (wide) wide[j] = sum;
    if (narrow) narrow[j] = to_bfloat16(sum);
  }
}

/* Row i of a tile of c at (row, j) of a block; the compiler makes a loop for each case. */
INLINE void put_tile_row(const HalfProduct *p, const Block *block, Int row, Int j, Int i, Int n,
                         const float *from) {
  const uint16_t *bias = p->bias && block->complete ? p->bias + block->j0 + j : NULL;
  float *sums = block->sums ? block->sums + i * block->sums_row + j : NULL;
  if (p->c_is_narrow && block->complete) {
    uint16_t *narrow = (uint16_t *)p->c + row * p->c_row + block->j0 + j;
    if (block->first)
      put_row(n, from, NULL, 0, NULL, bias, narrow);
    else
      put_row(n, from, NULL, 0, sums, bias, narrow);
  } else if (block->first) {
    put_row(n, from, sums, 1, NULL, bias, NULL);
  } else {
    put_row(n, from, sums, 0, NULL, bias, NULL);
  }
}

/* Rows row … row + n - 1 of c, whose part of a is packed; their sums begin at block->sums. */
static void multiply_block(const HalfProduct *p, const Block *block, Int row, Int n) {
  Int rows = block->cutting.rows, columns = block->cutting.columns;
  Int bytes = block->deep * block->cutting.size; /* of a packed row or column */
  float tile[1024] __attribute__((aligned(64)));
  for (Int i = 0; i < n; i += rows)
    for (Int j = 0; j < block->width; j += columns) {
      Int width = min(columns, block->width - j);
      multiply_packed(block->way, block->deep, block->packed_a + i * bytes,
                      block->packed_b + j * bytes, tile);
      for (Int r = i; r < min(i + rows, n); r++)
        if (width == COLUMNS) /* a constant makes short loops of vectors */
          put_tile_row(p, block, row + r, j, r, COLUMNS, tile + (r - i) * columns);
        else
          put_tile_row(p, block, row + r, j, r, width, tile + (r - i) * columns);
    }
}

/* The columns of c from block->j0 on, in rows first_row … end_row - 1. */
static void multiply_columns(const HalfProduct *p, Block *block, Int first_row, Int end_row) {
  float *sums = p->c_is_narrow ? block->sums : (float *)p->c + first_row * p->c_row + block->j0;
  for (block->p0 = 0; block->p0 < p->k; block->p0 += block->depth) {
    block->depth = min(block->cutting.depth, p->k - block->p0);
    block->deep = round_up(block->depth, block->cutting.step);
    block->first = block->p0 == 0 && !p->adds, block->complete = block->p0 + block->depth == p->k;
    pack_block_of_b(p, block);
    for (Int row = first_row; row < end_row; row += PACKED_ROWS) {
      Int n = min(PACKED_ROWS, end_row - row);
      pack_block_of_a(p, block, row, n);
      block->sums = sums ? sums + (row - first_row) * block->sums_row : NULL;
      multiply_block(p, block, row, n);
    }
  }
  if (p->c_is_narrow) block->sums = sums;
}

/* Rows first_row … end_row - 1 and columns first_column … end_column - 1 of c, on this thread. */
static void multiply_half_part(const HalfProduct *p, Int first_row, Int end_row, Int first_column,
                               Int end_column) {
  Block block = {.way = way(), .cutting = cutting_of(way())};
  if (first_row >= end_row || first_column >= end_column) return;
#ifdef HAS_TILES
  if (block.way == TILES)
    return multiply_part_by_tiles(p, first_row, end_row, first_column, end_column);
#endif
  Int together = equal_parts(end_column - first_column, columns_together(block.cutting),
                             block.cutting.columns);
  block.cutting.depth = equal_parts(p->k, block.cutting.depth, block.cutting.step);
  Int words = round_up(block.cutting.depth * block.cutting.size, 4) / 4;
  block.packed_a = (char *)scratch(PACKED_A, PACKED_ROWS * words);
  block.packed_b = (char *)scratch(PACKED_B, together * words);
  if (!block.packed_a || !block.packed_b) return;
  block.sums_row = p->c_is_narrow ? together : p->c_row;
  if (p->c_is_narrow && p->k > block.cutting.depth) {
    block.sums = scratch(SUMS, (end_row - first_row) * together);
    if (!block.sums) return;
  }
  for (block.j0 = first_column; block.j0 < end_column; block.j0 += together) {
    block.width = min(together, end_column - block.j0);
    multiply_columns(p, &block, first_row, end_row);
  }
}

/* Part i of `parts` of a product. The longer side of c is cut: of the factors, the larger one is
   then packed once, and the other once a part. */
static void multiply_half_slice(const HalfProduct *p, Int i, Int parts) {
  Int first, end, rows = p->n >= p->m;
  Cutting cutting = cutting_of(way());
  end = cut(rows ? p->n : p->m, parts, rows ? cutting.rows : cutting.columns, i, &first);
  if (rows)
    multiply_half_part(p, first, end, 0, p->m);
  else
    multiply_half_part(p, 0, p->n, first, end);
}

#define FEW_PRODUCTS 1000000 /* with fewer multiplications, waking another thread does not pay */

static Int parts_for(const HalfProduct *p) {
  return p->n * p->k * p->m < FEW_PRODUCTS ? 1 : thread_count();
}

static void product_task(const void *product, Int part, Int parts) {
  multiply_half_slice(product, part, parts);
}

int matmul_bfloat16(const HalfProduct *p) { return run_parts(product_task, p, parts_for(p)); }

/* -------------------------------------------------------------------- a linear layer's backward */

typedef struct {
  HalfProduct dx, dweight;
  const uint16_t *grad; /* (n, m), its rows without gaps */
  float *dbias;         /* (m) */
  Int n, m;
} HalfLinearBackward;

/* sums[j] = the sum of x[row * stride + j] over the rows */
static void sum_half_rows(const uint16_t *x, Int stride, Int rows, Int columns, float *sums) {
  double *totals = (double *)scratch(TOTALS, 2 * columns);
  if (!totals) return;
  memset(totals, 0, columns * sizeof(double));
  for (Int first = 0; first < rows; first += ROWS_IN_FLOAT) {
    memset(sums, 0, columns * sizeof(float));
    for (Int row = first; row < min(first + ROWS_IN_FLOAT, rows); row++)
#pragma omp simd
      for (Int j = 0; j < columns; j++) sums[j] += from_bfloat16(x[row * stride + j]);
    add_to_totals(totals, sums, columns);
  }
  round_totals(sums, totals, columns);
}

/* As matmul.c's: parts 2i and 2i + 1 are slice i of dx and of dweight. */
static void backward_task(const void *arguments, Int part, Int parts) {
  const HalfLinearBackward *l = arguments;
  Int i = part / 2, slices = parts / 2;
  if (part % 2 == 0) {
    multiply_half_slice(&l->dx, i, slices);
    return;
  }
  multiply_half_slice(&l->dweight, i, slices);
  Int first, end = cut(l->m, slices, COLUMNS, i, &first);
  sum_half_rows(l->grad + first, l->m, l->n, end - first, l->dbias + first);
}

/* dx = grad @ weight.T, dweight = x.T @ grad, and dbias is the sums of grad's columns. */
int linear_backward_bfloat16(const HalfLinearBackward *l) {
  Int dx_parts = parts_for(&l->dx), dweight_parts = parts_for(&l->dweight);
  return run_parts(backward_task, l, 2 * (dx_parts > dweight_parts ? dx_parts : dweight_parts));
}

/* ---------------------------------------------------------------------------------- conversions */

static void convert_task(const void *arguments, Int part, Int parts) {
  const Conversion *c = arguments;
  Int first, end = cut(c->size, parts, LANES, part, &first);
  if (c->to_narrow)
#pragma omp simd
    for (Int i = first; i < end; i++) c->narrow[i] = to_bfloat16(c->wide[i]);
  else
#pragma omp simd
    for (Int i = first; i < end; i++) c->wide[i] = from_bfloat16(c->narrow[i]);
}

#define FEW_NUMBERS 65536 /* with fewer, waking another thread does not pay */

int convert_bfloat16(const Conversion *c) {
  return run_parts(convert_task, c, c->size < FEW_NUMBERS ? 1 : thread_count());
}

static void convert_float16_task(const void *arguments, Int part, Int parts) {
  const Conversion *c = arguments;
  Int first, end = cut(c->size, parts, LANES, part, &first);
  if (c->to_narrow)
#pragma omp simd
    for (Int i = first; i < end; i++) c->narrow[i] = to_float16(c->wide[i]);
  else
#pragma omp simd
    for (Int i = first; i < end; i++) c->wide[i] = from_float16(c->narrow[i]);
}

int convert_float16(const Conversion *c) {
  return run_parts(convert_float16_task, c, c->size < FEW_NUMBERS ? 1 : thread_count());
}
