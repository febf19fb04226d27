/* Products of a few rows with weights of 8 or 16 bits; see narrow.c. */

#pragma once
#include "half.h"
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

/* What numbers are: of weights, and of keys and values. Python knows these numbers too. */
enum { FLOAT32, BFLOAT16, INT8, FLOAT16 };

#define GROUP 64 /* int8 numbers of a row that share a scale; arrays/int8.py has the same */

INLINE Int groups_of(Int k) { return (k + GROUP - 1) / GROUP; }

/* LANES integers from `x` on as floats. Of GCC's own vectors these conversions are slow. */
INLINE vec floats_of(const int8_t *x) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
  vec wide;
  for (int i = 0; i < LANES; i++) wide[i] = x[i];
  return wide;
#endif
}

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#define HAS_FLOAT16 1 /* an instruction that makes floats of it */
#else
#define HAS_FLOAT16 0
#endif

/* The same of float16: for its instruction, too, compilers have no vectors. */
INLINE vec floats_of_float16(const uint16_t *x) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
  vec wide;
  for (int i = 0; i < LANES; i++) wide[i] = from_float16(x[i]);
  return wide;
#endif
}

/* The same of bfloat16, which is the upper half of a float. */
INLINE vec floats_of_bfloat16(const uint16_t *x) {
#if defined(__AVX512F__)
  __m256i halves = _mm256_loadu_si256((const __m256i *)x);
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
  __m128i halves = _mm_loadu_si128((const __m128i *)x);
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  vec wide;
  for (int i = 0; i < LANES; i++) wide[i] = from_bfloat16(x[i]);
  return wide;
#endif
}

/* LANES numbers of a narrow kind from number `at` on; those of int8 are yet to be scaled. */
INLINE vec floats_at(int kind, const void *numbers, Int at) {
  if (kind == INT8) return floats_of((const int8_t *)numbers + at);
  const uint16_t *halves = (const uint16_t *)numbers + at;
  return kind == FLOAT16 ? floats_of_float16(halves) : floats_of_bfloat16(halves);
}

/* y = x @ weight.T + bias for a few rows of x, at most few_rows.h's MOST_ROWS. */
typedef struct {
  Int kind, n, k, m;
  const float *x;      /* (n, k), whose numbers fit the weights' type if it is bfloat16 */
  const void *weight;  /* (m, k), of this kind; rows without gaps */
  const float *scales; /* of int8: (m, k / GROUP rounded up), what each group is multiplied by */
  const void *bias;    /* (m) or NULL: of 16 bits beside such weights, else float32 */
  float *y;            /* (n, m) */
  const uint16_t *half_x; /* instead of x and y: the same in the weights' 16 bits; else NULL */
  uint16_t *half_y;
} NarrowRows;
int few_narrow_rows(const NarrowRows *f);

/* The same of int8, and of any number of rows; see int8.c. */
int multiply_int8(const NarrowRows *f);
