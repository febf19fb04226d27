/* A few rows times a matrix of bfloat16 or float16, or of int8 with a scale for each group of numbers.

   Decoding reads every weight once a token, so memory sets the pace, and a weight of half or a
   quarter of the bytes takes half or a quarter of the time. Weights become floats in registers, or,
   where many rows share them, in the nearest cache (few_rows.c). Several rows of bfloat16 meet them
   as they are, where the processor multiplies pairs or has AMX tiles (both take subnormal numbers
   for 0), and so do those of int8 where it has tiles (int8.c). All sums are float32's. */

#include "narrow.h"
#include "bfloat16.h"
#include "few_rows.h"
#include "half.h"

#define TOGETHER 4 /* how many rows of x, at most, share one reading of the weights */

#define STEP (2 * LANES)
enum { ARRANGED, PACKED, ACROSS, WIDE_X, WIDE_Y, HALF_X }; /* the purposes of scratch() here */

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

typedef struct {
  vec first, second;
} Pair;

/* STEP weights as floats, from number `at` on; those of int8 are yet to be scaled. Of bfloat16 the
   even ones come first, as arranged() puts x: they are the lower halves of words of 32 bits, the
   odd ones the upper halves, and a float is a bfloat16 above 16 zeros. */
INLINE Pair weights_at(int kind, const void *weights, Int at) {
  if (kind == INT8) {
    const int8_t *narrow = (const int8_t *)weights + at;
    return (Pair){floats_of(narrow), floats_of(narrow + LANES)};
  }
  const uint16_t *half = (const uint16_t *)weights + at;
  if (kind == FLOAT16) return (Pair){floats_of_float16(half), floats_of_float16(half + LANES)};
  words both = *(const words *)half;
  return (Pair){(vec)(both << 16), (vec)(both & 0xffff0000)};
}

INLINE float half_at(int kind, const void *numbers, Int at) {
  uint16_t half = ((const uint16_t *)numbers)[at];
  return kind == FLOAT16 ? from_float16(half) : from_bfloat16(half);
}

INLINE float weight_at(int kind, const void *weights, Int at) {
  return kind == INT8 ? ((const int8_t *)weights)[at] : half_at(kind, weights, at);
}

/* The rows of x in the order in which weights_at gives weights; NULL if there is no memory. */
static const float *arranged(const NarrowRows *f) {
  if (f->kind != BFLOAT16) return f->x;
  float *copy = scratch(ARRANGED, f->n * f->k);
  for (Int r = 0; r < f->n && copy; r++)
    for (Int p = 0; p < f->k / STEP * STEP; p += STEP) {
      const float *from = f->x + r * f->k + p;
      float *to = copy + r * f->k + p;
      for (Int i = 0; i < LANES; i++) to[i] = from[2 * i], to[LANES + i] = from[2 * i + 1];
    }
  return copy;
}

INLINE float scale_at(int kind, const NarrowRows *f, Int column, Int at) {
  return kind == INT8 ? f->scales[column * groups_of(f->k) + at / GROUP] : 1;
}

/* Memory is asked early for what will be read; the processor itself looks no further than to the end
   of a page. How many bytes ahead, and into which cache, was found by trying. */
INLINE void fetch_ahead(int kind, const void *weights, Int at) {
#if defined(__CLZERO__) && LANES == 16 /* AMD's Zen 4 and later ones */
  __builtin_prefetch((const char *)weights + (kind == INT8 ? at + 8192 : 2 * at + 2048), 0, 2);
#else
  __builtin_prefetch((const char *)weights + (kind == INT8 ? at + 4096 : 2 * at + 2048));
#endif
}

INLINE void add_products(Pair *sum, Pair w, const float *x) {
  sum->first += w.first * *(const vec *)x;
  sum->second += w.second * *(const vec *)(x + LANES);
}

/* sum[r] += x[r] * w for numbers p … p + n - 1 of a column of weights, n <= GROUP. The sum is
   scaled, not the numbers. */
INLINE void add_group(int kind, int rows, const NarrowRows *f, const float *x, Int column, Int p,
                      Int n, Pair *sum) {
  Pair part[TOGETHER] = {0};
#pragma GCC unroll 16
  for (Int q = p; q < p + n; q += STEP) {
    Pair w = weights_at(kind, f->weight, column * f->k + q);
    if (kind != INT8 || q % 64 == 0) fetch_ahead(kind, f->weight, column * f->k + q);
    for (int r = 0; r < rows; r++)
      add_products(kind == INT8 ? &part[r] : &sum[r], w, x + r * f->k + q);
  }
  float scale = scale_at(kind, f, column, p);
  for (int r = 0; r < rows && kind == INT8; r++) {
    sum[r].first += scale * part[r].first;
    sum[r].second += scale * part[r].second;
  }
}

/* sum[r] = x[r] * w for numbers 0 … whole - 1. A sum of its own for each half of a Pair: each
   addition waits for the one before it. */
INLINE void sum_column(int kind, int rows, const NarrowRows *f, const float *x, Int column,
                       Int whole, vec *total) {
  Int groups = whole / GROUP * GROUP;
  Pair sum[TOGETHER] = {0};
  for (Int p = 0; p < groups; p += GROUP) add_group(kind, rows, f, x, column, p, GROUP, sum);
  if (groups < whole) add_group(kind, rows, f, x, column, groups, whole - groups, sum);
  for (int r = 0; r < rows; r++) total[r] = sum[r].first + sum[r].second;
}

#define COLUMNS_APART (LANES / TOGETHER) /* those that are read at the same time */

/* The same for TOGETHER columns, which share each reading of x. They lie COLUMNS_APART: memory is
   read fastest at several places at a time, each of them in a page of its own. */
INLINE void add_columns(int kind, int rows, const NarrowRows *f, const float *x, Int column,
                        Int whole, vec sum[TOGETHER][TOGETHER]) {
  for (Int p = 0; p < whole; p += STEP)
    for (int i = 0; i < TOGETHER; i++) {
      Int here = column + i * COLUMNS_APART;
      Pair w = weights_at(kind, f->weight, here * f->k + p);
      if (kind != INT8 || p % 64 == 0) fetch_ahead(kind, f->weight, here * f->k + p);
      if (kind == INT8) {
        float scale = scale_at(kind, f, here, p);
        w = (Pair){scale * w.first, scale * w.second};
      }
      for (int r = 0; r < rows; r++) {
        sum[i][r] += w.first * *(const vec *)(x + r * f->k + p);
        sum[i][r] += w.second * *(const vec *)(x + r * f->k + p + LANES);
      }
    }
}

/* The products of the last numbers of a row, which fill no register. */
INLINE float rest(int kind, const NarrowRows *f, const float *x, Int column, Int whole) {
  float sum = 0;
  for (Int p = whole; p < f->k; p++)
    sum += x[p] * weight_at(kind, f->weight, column * f->k + p) * scale_at(kind, f, column, p);
  return sum;
}

/* y[row …, column …] for `rows` <= TOGETHER rows and `columns` <= LANES columns. While weights are
   read, nothing else is done: adding up the lanes of each sum comes afterwards. */
INLINE void dots(int kind, int rows, int side_by_side, const NarrowRows *f, const float *x, Int row,
                 Int column, Int columns) {
  vec sums[TOGETHER][LANES];
  Int whole = f->k / STEP * STEP, side = side_by_side ? TOGETHER : 1;
  x += row * f->k;
  for (Int j = 0; j < columns / side; j++) {
    vec sum[TOGETHER][TOGETHER] = {0};
    if (side_by_side)
      add_columns(kind, rows, f, x, column + j, whole, sum);
    else
      sum_column(kind, rows, f, x, column + j, whole, sum[0]);
    for (int i = 0; i < side; i++)
      for (int r = 0; r < rows; r++) sums[r][j + i * COLUMNS_APART] = sum[i][r];
  }
  for (int r = 0; r < rows; r++) {
    float *y = f->y + (row + r) * f->m + column;
    for (Int j = columns; j < LANES; j++) sums[r][j] = (vec){0};
    vec total = sums_of_lanes(sums[r]);
    for (Int j = 0; j < columns; j++) y[j] = total[j];
    for (Int j = 0; j < columns && whole < f->k; j++)
      y[j] += rest(kind, f, f->x + (row + r) * f->k, column + j, whole);
  }
}

INLINE void dots_of_rows(int kind, Int rows, int side_by_side, const NarrowRows *f, const float *x,
                         Int row, Int column, Int columns) {
  switch (rows) {
    case 1: dots(kind, 1, side_by_side, f, x, row, column, columns); break;
    case 2: dots(kind, 2, side_by_side, f, x, row, column, columns); break;
    case 3: dots(kind, 3, side_by_side, f, x, row, column, columns); break;
    default: dots(kind, 4, side_by_side, f, x, row, column, columns);
  }
}

/* ------------------------------------------------------------ more rows, and weights in slices */

#define ENOUGH_ROWS 3 /* for pairs and tiles: with fewer, ordinary vectors are as quick */

/* Whether bfloat16's pairs are multiplied as they are: rows of weights begin with a pair. */
static int meets_pairs(const NarrowRows *f) {
  return f->kind == BFLOAT16 && f->n >= ENOUGH_ROWS && f->k % 2 == 0 && bfloat16_by_pairs();
}

/* The rows of x in slices, with `pairs` as such; NULL where there is not enough memory. */
static const float *packed_rows(const NarrowRows *f, int pairs) {
  if (!pairs) return packed_in_slices(PACKED, f->n, f->k, f->x);
  const uint16_t *halves = f->half_x;
  if (!halves) {
    uint16_t *narrow = (uint16_t *)scratch(HALF_X, f->n * f->k / 2);
    if (!narrow) return NULL;
#pragma omp simd
    for (Int i = 0; i < f->n * f->k; i++) narrow[i] = to_bfloat16(f->x[i]);
    halves = narrow;
  }
  return packed_in_slices(PACKED, f->n, f->k / 2, (const float *)halves);
}

/* LANES columns of y; `packed` is x in slices, perhaps of pairs. */
INLINE void dots_in_slices(int kind, int pairs, const NarrowRows *f, const float *packed,
                           Int column) {
  vec sums[MOST_ROWS][LANES] __attribute__((aligned(64)));
  Int step = pairs ? STEP : LANES, whole = f->k / step * step;
  const char *weight = (const char *)f->weight + column * f->k * (kind == INT8 ? 1 : 2);
  const float *scales = kind == INT8 ? f->scales + column * groups_of(f->k) : NULL;
  if (pairs)
    sum_slices(BFLOAT16_PAIRS, f->n, packed, (Weights){weight, f->k / 2, NULL}, whole / 2, sums);
  else
    sum_slices(kind, f->n, packed, (Weights){weight, f->k, scales}, whole, sums);
  for (Int r = 0; r < f->n; r++) {
    float *y = f->y + r * f->m + column;
    *(vec *)y = sums_of_lanes(sums[r]);
    for (Int j = 0; j < LANES && whole < f->k; j++)
      y[j] += rest(kind, f, f->x + r * f->k, column + j, whole);
  }
}

/* ------------------------------------------------------------------ several rows, and AMX tiles */

#ifdef HAS_TILES
#define TILE 16      /* rows of weights, and at most as many of x */
#define TILE_STEP 32 /* numbers of each row that are multiplied in one step: a tile */

/* The rows of x as tiles want them: word [p][r] is the pair of numbers 2p and 2p + 1 of row r, whose
   upper halves are all of them. */
static const uint32_t *pairs_across(const NarrowRows *f) {
  Int whole = f->k / TILE_STEP * TILE_STEP;
  uint32_t *pairs = (uint32_t *)scratch(ACROSS, whole / 2 * TILE), block[TILE * TILE] = {0};
  for (Int p = 0; p < whole / 2 && pairs; p += TILE) {
    for (Int r = 0; r < f->n; r++) {
      const Float *x = (const Float *)(f->x + r * f->k + 2 * p);
#pragma omp simd
      for (Int i = 0; i < TILE; i++)
        block[r * TILE + i] = x[2 * i].bits >> 16 | (x[2 * i + 1].bits & 0xffff0000);
    }
    transpose_block((const float *)block, TILE, TILE, (float *)pairs + p * TILE);
  }
  return pairs;
}

/* sums (TILE, TILE) = weights (TILE, whole) @ x.T. Memory is slower than tiles, so that two sums for
   each result, or a fetch ahead, only stand in the way of the processor's own fetching. */
static void multiply_tiles(const uint16_t *weights, Int k, Int whole, const uint32_t *x,
                           float *sums) {
  __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are memory's */
  _tile_zero(0);
  for (Int p = 0; p < whole; p += TILE_STEP) {
    _tile_loadd(6, weights + p, 2 * k);
    _tile_loadd(4, x + p / 2 * TILE, 64);
    _tile_dpbf16ps(0, 6, 4);
  }
  _tile_stored(0, sums, 64);
  __asm__ volatile("" ::: "memory");
}

static int meets_tiles(const NarrowRows *f) {
  return f->kind == BFLOAT16 && f->n >= ENOUGH_ROWS && f->n <= TILE && f->k >= TILE_STEP &&
         bfloat16_by_tiles();
}

/* Columns first … of y, as many as fill tiles before `end`; x are pairs. Returns where they end. */
static Int tile_columns(const NarrowRows *f, const uint32_t *x, Int first, Int end) {
  float sums[TILE * TILE] __attribute__((aligned(64))), across[TILE * TILE];
  Int whole = f->k / TILE_STEP * TILE_STEP, j = first;
  open_tiles();
  for (; j + TILE <= end; j += TILE) {
    multiply_tiles((const uint16_t *)f->weight + j * f->k, f->k, whole, x, sums);
    transpose_block(sums, TILE, TILE, across);
    for (Int r = 0; r < f->n; r++) {
      float *y = f->y + r * f->m + j;
      memcpy(y, across + r * TILE, TILE * sizeof *y);
      for (Int i = 0; i < TILE && whole < f->k; i++)
        y[i] += rest(BFLOAT16, f, f->x + r * f->k, j + i, whole);
    }
  }
  _tile_release();
  return j;
}
#endif

/* ----------------------------------------------------------------------------------- all of them */

#define IN_NEAREST_CACHE 4096 /* floats of x that stay in it while weights pass by */

/* x in the forms that the parts of a product read; NULL where they do not read one. */
typedef struct {
  NarrowRows *f;
  const float *arranged, *packed;
  int in_pairs; /* packed is of pairs */
  const uint32_t *pairs;
} Prepared;

/* Numbers of 16 bits become float32. */
static const float *widened(int kind, const uint16_t *x, Int n) {
  float *wide = scratch(WIDE_X, n);
  if (wide && kind == FLOAT16)
    for (Int i = 0; i < n; i++) wide[i] = from_float16(x[i]);
  else if (wide)
    for (Int i = 0; i < n; i++) wide[i] = from_bfloat16(x[i]);
  return wide;
}

/* A task of one part, so that run_parts reports a lack of memory. */
static void prepare_task(const void *arguments, Int part, Int parts) {
  Prepared *x = (Prepared *)arguments;
  NarrowRows *f = x->f;
  if (f->half_x) f->x = widened(f->kind, f->half_x, f->n * f->k);
  if (!f->x) return;
  Int columns = f->m; /* that tiles leave over */
#ifdef HAS_TILES
  if (meets_tiles(f)) x->pairs = pairs_across(f), columns %= TILE;
#endif
  x->in_pairs = meets_pairs(f);
  int in_slices = columns >= LANES && (f->n > TOGETHER || x->in_pairs);
  if (in_slices) x->packed = packed_rows(f, x->in_pairs);
  if (columns && !(in_slices && columns % LANES == 0)) x->arranged = arranged(f);
}

INLINE void add_bias(const NarrowRows *f, Int first, Int end) {
  for (Int r = 0; r < f->n && f->bias; r++)
    for (Int j = first; j < end; j++)
      f->y[r * f->m + j] +=
          f->kind == INT8 ? ((const float *)f->bias)[j] : half_at(f->kind, f->bias, j);
}

/* Columns first … end - 1 of y; see few_rows_columns of few_rows.c. */
INLINE void narrow_columns(int kind, const Prepared *x, Int first, Int end) {
  const NarrowRows *f = x->f;
  /* Columns side by side need more registers, and of int8 a scale for each weight. */
  int in_one_stream = f->n * f->k <= IN_NEAREST_CACHE && !(kind == FLOAT16 && LANES == 16);
  Int start = first;
#ifdef HAS_TILES
  if (x->pairs) start = tile_columns(f, x->pairs, first, end);
#endif
  for (Int j = start; j < end; j += LANES) {
    Int columns = min(LANES, end - j);
    if (x->packed && columns == LANES) {
      if (kind == BFLOAT16 && x->in_pairs)
        dots_in_slices(kind, 1, f, x->packed, j);
      else
        dots_in_slices(kind, 0, f, x->packed, j);
      continue;
    }
    for (Int r = 0; r < f->n; r += TOGETHER) {
      Int rows = min(TOGETHER, f->n - r);
      if (in_one_stream || columns < LANES)
        dots_of_rows(kind, rows, 0, f, x->arranged, r, j, columns);
      else
        dots_of_rows(kind, rows, 1, f, x->arranged, r, j, LANES);
    }
  }
  add_bias(f, first, end);
}

#define COLUMNS_OF_PART 32 /* a multiple of it: they fill vectors of any width, and tiles */

static void columns_of_kind(const Prepared *x, Int first, Int end) {
  if (x->f->kind == INT8)
    narrow_columns(INT8, x, first, end);
  else if (x->f->kind == FLOAT16)
    narrow_columns(FLOAT16, x, first, end);
  else
    narrow_columns(BFLOAT16, x, first, end);
}

#define COLUMNS_AT_ONCE 256 /* whose float32 results stay in the nearest cache */

/* Columns first … end - 1 of half_y, some at a time as the product of their own weights. */
static void half_columns(const Prepared *x, Int first, Int end) {
  const NarrowRows *f = x->f;
  float *wide = scratch(WIDE_Y, f->n * COLUMNS_AT_ONCE);
  for (Int j = first; j < end && wide; j += COLUMNS_AT_ONCE) {
    NarrowRows some = *f;
    Prepared same = *x;
    same.f = &some, some.y = wide, some.m = min(COLUMNS_AT_ONCE, end - j);
    some.weight = (const uint16_t *)f->weight + j * f->k;
    if (f->bias) some.bias = (const uint16_t *)f->bias + j;
    columns_of_kind(&same, 0, some.m);
    for (Int r = 0; r < f->n; r++)
      for (Int i = 0; i < some.m; i++) {
        float y = wide[r * some.m + i];
        f->half_y[r * f->m + j + i] = f->kind == FLOAT16 ? to_float16(y) : to_bfloat16(y);
      }
  }
}

static void narrow_task(const void *arguments, Int part, Int parts) {
  const Prepared *x = arguments;
  Int first, end = cut(x->f->m, parts, COLUMNS_OF_PART, part, &first);
  if (x->f->half_y)
    half_columns(x, first, end);
  else
    columns_of_kind(x, first, end);
}

#define FEW_WEIGHTS 20000 /* with fewer, waking another thread does not pay */

int few_narrow_rows(const NarrowRows *f) {
  NarrowRows own = *f;
  Prepared x = {.f = &own};
  if (run_parts(prepare_task, &x, 1)) return OUT_OF_MEMORY;
  return run_parts(narrow_task, &x, f->k * f->m < FEW_WEIGHTS ? 1 : 4 * thread_count());
}
