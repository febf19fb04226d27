/* Matrix products of bfloat16, and conversions; see bfloat16.c. */

#pragma once
#include "threads.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_PAIRS
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AMX_TILE__) && defined(__linux__) && defined(__x86_64__)
#define HAS_TILES
#include <immintrin.h>

/* All 8 registers for matrices hold 16 rows of 64 bytes. The shape is a constant: of a variable,
   compilers may leave out what they do not know to be read. */
INLINE void open_tiles(void) {
  static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&shape);
}
#endif

/* Whether products are computed by AMX tiles now; or by instructions for pairs. */
int bfloat16_by_tiles(void);
int bfloat16_by_pairs(void);

/* c = a @ b + bias for a (n, k), b (k, m), c (n, m) and bias (m) or NULL, as Product's, but of
   bfloat16, and c either of float32 or narrow: of bfloat16. A product that `adds` adds to the
   numbers of c, which is of float32. A b that is wide is of float32, and is rounded. */
typedef struct {
  Int n, k, m;
  const uint16_t *a;
  Int a_row, a_column;
  const void *b;
  Int b_row, b_column;
  const uint16_t *bias;
  void *c;
  Int c_row, c_is_narrow, adds, b_is_wide;
} HalfProduct;
int matmul_bfloat16(const HalfProduct *p);

typedef struct {
  Int size, to_narrow; /* from wide to narrow numbers, else from narrow to wide ones */
  float *wide;
  uint16_t *narrow;
} Conversion;
int convert_bfloat16(const Conversion *c);
int convert_float16(const Conversion *c);
