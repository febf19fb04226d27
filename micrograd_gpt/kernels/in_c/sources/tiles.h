/* Products of bfloat16 by AMX, whose registers hold matrices; see tiles.c. */

#pragma once
#include "bfloat16.h"

#ifdef HAS_TILES

/* Both factors of a product are packed as the registers want them, SIDE rows of the left one, a
   strip, and SIDE columns of the right one, a panel, together. For every STEP numbers of the depth
   two registers follow one another in memory: 16 rows of STEP numbers each, and 16 more; or 16
   columns' STEP / 2 pairs, and 16 more's. */
#define SIDE 32
#define STEP 32

/* Strips of a (n, k); zeros where a has no number. */
void pack_strips(const uint16_t *a, Int a_row, Int a_column, Int n, Int k, uint16_t *packed);

/* Panels of b (k, m); zeros where b has no number. */
void pack_panels(const uint16_t *b, Int b_row, Int b_column, Int k, Int m, uint16_t *packed);

/* The 16 bfloat16 from place i of b on, which is of bfloat16, or wide: of float32, and rounded. `wide`
   is a constant for the compiler. */
INLINE __m256i halves_at(int wide, const void *b, Int i) {
  if (wide) return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps((const float *)b + i));
  return _mm256_loadu_si256((const __m256i *)((const uint16_t *)b + i));
}

/* The pairs of SIDE numbers from x on and as many from y on, places in two rows of b, as in a
   panel. */
INLINE void pack_two_rows(int wide, const void *b, Int x, Int y, uint32_t *packed) {
  for (Int half = 0; half < 2; half++) {
    __m512i first = _mm512_cvtepu16_epi32(halves_at(wide, b, x + half * 16));
    __m512i second = _mm512_cvtepu16_epi32(halves_at(wide, b, y + half * 16));
    _mm512_storeu_si512(packed + half * 8 * STEP,
                        _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
}

/* The sums of a strip @ a panel, `steps` deep, are now in four registers: 0 and 1 hold the first 16
   rows, 2 and 3 the others. */
INLINE void multiply_strip_and_panel(Int steps, const uint16_t *strip, const uint16_t *panel) {
  __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are memory's */
  for (Int i = 0; i < steps; i++, strip += SIDE * STEP, panel += SIDE * STEP) {
    _tile_loadd(4, strip, 64);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + 16 * STEP, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, strip + 16 * STEP, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/* The four registers become 0, or the sums (SIDE, SIDE), whose rows lie `stride` numbers apart. */
INLINE void clear_sums(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

INLINE void load_sums(const float *sums, Int stride) {
  __asm__ volatile("" ::: "memory");
  _tile_loadd(0, sums, 4 * stride);
  _tile_loadd(1, sums + 16, 4 * stride);
  _tile_loadd(2, sums + 16 * stride, 4 * stride);
  _tile_loadd(3, sums + 16 * stride + 16, 4 * stride);
}

/* One register's sums (16, 16) go to memory. */
INLINE void store_quarter(int register_, float *sums, Int stride) {
  switch (register_) { /* the instruction holds the register's number */
    case 0: _tile_stored(0, sums, 4 * stride); break;
    case 1: _tile_stored(1, sums, 4 * stride); break;
    case 2: _tile_stored(2, sums, 4 * stride); break;
    default: _tile_stored(3, sums, 4 * stride);
  }
  __asm__ volatile("" ::: "memory");
}

INLINE void store_sums(float *sums, Int stride) {
  store_quarter(0, sums, stride);
  store_quarter(1, sums + 16, stride);
  store_quarter(2, sums + 16 * stride, stride);
  store_quarter(3, sums + 16 * stride + 16, stride);
}

/* Rows first_row … end_row - 1 and columns first_column … end_column - 1 of c, on this thread. */
void multiply_part_by_tiles(const HalfProduct *p, Int first_row, Int end_row, Int first_column,
                            Int end_column);
#endif
