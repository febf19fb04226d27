/* Products with weights of int8, of any number of rows.

   AMX multiplies (16, 64) @ (64, 16) integers of 8 bits in one instruction. 64 weights are a group,
   and lie in memory as the instruction wants them. Each number of x becomes an integer of 31 bits,
   which counts 2^-30ths of the first power of two above its row's largest number, and that integer
   four digits of 8 bits, each from -128 to 127. So sums within a group are exact, and what x loses
   is less than what float32 loses of the largest number of its row.

   Two registers hold the digits of ROWS_OF_X rows: lanes 0-7 of the first the highest digit of each
   row, lanes 8-15 the third, and the second register the second digits and the lowest. With a
   group's weights of 16 columns in a third, two products give the sums of each digit. 256 times
   those of the first register and those of the second make integers of 29 bits: a sum of upper
   halves of x for each row and column, and one of lower halves. Scaled, these are added up in 16
   vectors, one for each column: as many as there are without the few that all this takes. Half as
   many rows fill one register, in the same order, and need one product. Other processors, few rows,
   and numbers too large or too small for it take the ways of narrow.c and matmul.c. */

#include "bfloat16.h"
#include "matmul.h"
#include "narrow.h"

#ifdef HAS_TILES
#define ROWS_OF_X 8
#define TILE 16       /* columns of y, and the lanes of a register */
#define ENOUGH_ROWS 3 /* with fewer, reading the weights takes all the time */
#define ROWS_TOGETHER 32 /* that share a reading of the weights: with more, those of y that are
                            written side by side displace one another from the caches */

enum { DIGITS, UNITS }; /* the purposes of scratch() here */

typedef int8_t Digits[2 * TILE][GROUP] __attribute__((aligned(64)));

/* Some rows of a product, and their numbers as tiles want them. */
typedef struct {
  const NarrowRows *f;
  Digits *digits; /* of each ROWS_OF_X rows, group after group; in a tile, words of four numbers */
  float *units;   /* of each row: what its integers count; 0 where x cannot be had so */
} Digitised;

/* The room; a task of one part, so that run_parts reports a lack of memory. */
static void allocate_task(const void *arguments, Int part, Int parts) {
  Digitised *x = (Digitised *)arguments;
  Int rows = round_up(x->f->n, ROWS_OF_X), blocks = rows / ROWS_OF_X * groups_of(x->f->k);
  x->digits = (Digits *)scratch(DIGITS, blocks * sizeof(Digits) / sizeof(float));
  x->units = scratch(UNITS, rows);
}

/* For how many rows there are lanes where `rows` are multiplied together; they fill this half of
   the registers, or both. */
INLINE Int lanes_for(Int rows) { return rows <= ROWS_OF_X / 2 ? ROWS_OF_X / 2 : ROWS_OF_X; }

/* What the integers of a row of x count; 0 where that is no normal float or the row not finite. */
static float unit_of(const float *x, Int k) {
  const Float *numbers = (const Float *)x;
  uint32_t largest = 0; /* infinity is above all numbers, and NaN above it */
  for (Int i = 0; i < k; i++) {
    uint32_t size = numbers[i].bits & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  uint32_t exponent = largest >> 23; /* 2^-30 times 2^(exponent - 126) */
  return exponent < 30 || exponent > 254 ? 0 : (Float){(exponent - 29) << 23}.number;
}

/* Digits of `length` numbers of each of `rows` rows of x. */
static void digitise(const float *x, Int k, Int rows, Int length, const float *units,
                     Digits *packed) {
  Digits digits;
  Int lanes = lanes_for(rows);
  memset(digits, 0, sizeof digits);
  for (Int r = 0; r < rows; r++) {
    float per_unit = 1 / units[r];
    for (Int i = 0; i < length; i++) {
      /* Each digit above 127 becomes negative, and the next one more. */
      uint32_t whole = (int32_t)rintf(x[r * k + i] * per_unit);
      uint32_t balanced = (whole + 0x808080) ^ 0x808080;
      digits[r][i] = balanced >> 24;
      digits[lanes + r][i] = balanced >> 8;
      digits[2 * lanes + r][i] = balanced >> 16;
      digits[3 * lanes + r][i] = balanced;
    }
  }
  for (Int lane = 0; lane < 4 * lanes; lane += TILE)
    transpose_block((const float *)digits[lane], TILE, TILE, (float *)(*packed)[lane]);
}

static void digitise_task(const void *arguments, Int part, Int parts) {
  const Digitised *x = arguments;
  Int k = x->f->k, groups = groups_of(k), first, end = cut(x->f->n, parts, ROWS_OF_X, part, &first);
  for (Int row = first; row < end; row += ROWS_OF_X) {
    Int rows = min(ROWS_OF_X, end - row), usable = 1;
    for (Int r = row; r < row + rows; r++) {
      x->units[r] = unit_of(x->f->x + r * k, k);
      usable = usable && x->units[r];
    }
    for (Int g = 0; g < groups && usable; g++)
      digitise(x->f->x + row * k + g * GROUP, k, rows, min(GROUP, k - g * GROUP), x->units + row,
               x->digits + row / ROWS_OF_X * groups + g);
  }
}

/* ------------------------------------------------------------------------------------- products */

/* Register 0, or 0 and 1 where there are digits for `both`, = a group's weights of TILE columns,
   `stride` bytes apart, times digits. */
INLINE void multiply_group(const int8_t *weights, Int stride, int both, const Digits *digits) {
  __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are memory's */
  _tile_loadd(4, weights, stride);
  _tile_zero(0);
  _tile_loadd(6, (*digits)[0], GROUP);
  _tile_dpbssd(0, 4, 6);
  if (!both) return;
  _tile_zero(1);
  _tile_loadd(7, (*digits)[TILE], GROUP);
  _tile_dpbssd(1, 4, 7);
}

/* sums[i] += 256 times `first` of column i and `second` of it, times its scale; scales lie `apart`.
   Meanwhile weights are fetched, a place at a time: while many are on their way, nothing else is
   read. */
INLINE void add_sums(const float *scales, Int apart, const int32_t *first, const int32_t *second,
                     const int8_t *ahead, Int places, Int k, __m512 sums[TILE]) {
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++) {
    if (i < places) __builtin_prefetch(ahead + i * k, 0, 2);
    __m512i upper = _mm512_slli_epi32(_mm512_load_si512(first + i * TILE), 8);
    __m512i both = _mm512_add_epi32(upper, _mm512_loadu_si512(second + i * TILE));
    __m512 scale = _mm512_set1_ps(scales[i * apart]);
    sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, sums[i]);
  }
}

/* totals (TILE, TILE): of TILE columns from `column` on the sums of the upper halves of as many rows
   as there are `lanes` for, then of their lower halves, then what means nothing. A group's sums
   leave the registers when the next group needs these: a store of what is being computed would
   wait. Meanwhile the weights of `places` columns are fetched that are ahead. */
static void multiply_columns(const NarrowRows *f, Int lanes, const Digits *digits, Int column,
                             const int8_t *ahead, Int places, float *totals) {
  const int8_t *weights = (const int8_t *)f->weight;
  Int groups = groups_of(f->k), whole = f->k / GROUP;
  int both = lanes == ROWS_OF_X;
  const float *scales = f->scales + column * groups;
  int32_t parts[2 * TILE * TILE] __attribute__((aligned(64)));
  int32_t *second = parts + (both ? TILE * TILE : TILE / 2);
  int8_t last[TILE][GROUP] __attribute__((aligned(64)));
  __m512 sums[TILE];
  float across[TILE * TILE] __attribute__((aligned(64)));
#pragma GCC unroll 16 /* every loop over sums, or the compiler leaves these in memory */
  for (int i = 0; i < TILE; i++) sums[i] = _mm512_setzero_ps();
  for (Int g = 0; g <= groups; g++) {
    if (g) {
      _tile_stored(0, parts, 4 * TILE);
      if (both) _tile_stored(1, second, 4 * TILE);
    }
    if (g < whole) {
      multiply_group(weights + column * f->k + g * GROUP, f->k, both, digits + g);
    } else if (g < groups) {
      for (Int i = 0; i < TILE; i++) /* the digits after the last are 0 */
        memcpy(last[i], weights + (column + i) * f->k + g * GROUP, f->k - g * GROUP);
      multiply_group(last[0], GROUP, both, digits + g);
    }
    __asm__ volatile("" ::: "memory");
    if (g)
      add_sums(scales + g - 1, groups, parts, second, ahead + (g - 1) * GROUP, places, f->k, sums);
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++) _mm512_store_ps(across + i * TILE, sums[i]);
  transpose_block(across, TILE, TILE, totals);
}

/* y of these rows in columns column + from … column + TILE - 1. */
INLINE void put_results(const Digitised *x, Int row, Int rows, Int column, Int from,
                        const float *totals) {
  const float *bias = (const float *)x->f->bias;
  for (Int r = 0; r < rows; r++) {
    float *y = x->f->y + (row + r) * x->f->m + column, unit = x->units[row + r];
    const float *upper = totals + r * TILE, *lower = upper + lanes_for(rows) * TILE;
    for (Int i = from; i < TILE; i++) {
      float sum = unit * 65536 * upper[i] + unit * lower[i];
      y[i] = bias ? sum + bias[column + i] : sum;
    }
  }
}

/* ROWS_OF_X rows of y in TILE columns, which at the end of y begin before those that are missing.
   Each block of rows fetches some of the columns that come next. */
static void multiply_block(const Digitised *x, Int row, Int first) {
  const NarrowRows *f = x->f;
  float totals[TILE * TILE] __attribute__((aligned(64)));
  Int column = min(first, f->m - TILE), rows = min(ROWS_OF_X, f->n - row);
  Int from = TILE * row / f->n, end = TILE * (row + rows) / f->n;
  const int8_t *ahead = (const int8_t *)f->weight + (column + TILE + from) * f->k;
  multiply_columns(f, lanes_for(rows), x->digits + row / ROWS_OF_X * groups_of(f->k), column, ahead,
                   end - from, totals);
  if (column == first)
    put_results(x, row, rows, column, 0, totals); /* a constant makes a vector of a loop */
  else
    put_results(x, row, rows, column, first - column, totals);
}

static void multiply_task(const void *arguments, Int part, Int parts) {
  const Digitised *x = arguments;
  Int first, end = cut(x->f->m, parts, TILE, part, &first);
  open_tiles();
  for (Int j = first; j < end; j += TILE)
    for (Int row = 0; row < x->f->n; row += ROWS_OF_X) multiply_block(x, row, j);
  _tile_release();
}

#define FEW_WEIGHTS 20000 /* with fewer, waking another thread does not pay */

/* DONE, OUT_OF_MEMORY, or that x cannot be had in digits. */
enum { NOT_IN_DIGITS = OUT_OF_MEMORY + 1 };

static int multiply_by_tiles(const NarrowRows *f) {
  Digitised x = {.f = f};
  if (run_parts(allocate_task, &x, 1)) return OUT_OF_MEMORY;
  Int threads = f->k * f->m < FEW_WEIGHTS ? 1 : thread_count();
  if (run_parts(digitise_task, &x, f->n <= TILE ? 1 : threads)) return OUT_OF_MEMORY;
  for (Int r = 0; r < f->n; r++)
    if (!x.units[r]) return NOT_IN_DIGITS;
  return run_parts(multiply_task, &x, threads > 1 ? 4 * threads : 1);
}
#endif

/* --------------------------------------------------------------------------------- in every way */

/* Weights become floats: beside few rows in registers or slices, else while they are packed. */
static int multiply_widened(const NarrowRows *f) {
  if (f->n <= 16) return few_narrow_rows(f);
  return matmul(&(Product){f->n, f->k, f->m, f->x, f->k, 1, f->weight, 1, f->k, f->bias, f->y,
                           f->m, 0, INT8, f->scales});
}

int multiply_int8(const NarrowRows *f) {
#ifdef HAS_TILES
  if (f->n >= ENOUGH_ROWS && f->m >= TILE && bfloat16_by_tiles()) {
    int failed = DONE;
    for (Int row = 0; row < f->n && failed != OUT_OF_MEMORY; row += ROWS_TOGETHER) {
      NarrowRows some = *f;
      some.n = min(ROWS_TOGETHER, f->n - row), some.x += row * f->k, some.y += row * f->m;
      failed = multiply_by_tiles(&some);
      if (failed == NOT_IN_DIGITS) failed = multiply_widened(&some);
    }
    return failed;
  }
#endif
  return multiply_widened(f);
}
