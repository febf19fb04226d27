/* Vectors of floats as wide as the processor's registers, and a few loops over floats.

   `vec` is a vector type of GCC and Clang: v + w and v * w work lane by lane, on any processor. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16 /* floats in a register */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t places __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* v, held in a register, where a compiler may read it from memory again for each instruction that
   uses it: AMD's Zen 4 reads one vector of 64 bytes a cycle, Intel's processors two. */
INLINE vec held(vec v) {
#ifdef __CLZERO__ /* AMD's processors have this instruction, Intel's do not */
  __asm__("" : "+v"(v));
#endif
  return v;
}
#define SIMD_SUM(s) _Pragma(STRING(omp simd reduction(+ : s)))
#define STRING(x) #x

typedef int64_t Int;

/* 0, 1, … LANES - 1. Of a vector that a loop fills, GCC makes instructions for each lane, not a
   constant. */
INLINE places lane_numbers(void) {
  static const int32_t numbers[16] __attribute__((aligned(64))) = {0, 1, 2,  3,  4,  5,  6,  7,
                                                                   8, 9, 10, 11, 12, 13, 14, 15};
  return *(const places *)numbers;
}

INLINE Int min(Int a, Int b) { return a < b ? a : b; }
INLINE Int round_up(Int x, Int step) { return (x + step - 1) / step * step; }

/* The length of the parts of n that are as few as `longest` allows, and as equal as `step` does. */
INLINE Int equal_parts(Int n, Int longest, Int step) {
  Int parts = (n + longest - 1) / longest;
  return round_up((n + parts - 1) / parts, step);
}

/* exp(x), with a relative error of about 1e-7; 0 for all x below -87, infinity above 88.4. With
   x = n ln 2 + r it is 2^n e^r, and for |r| <= ln 2 / 2 a Taylor series gives e^r. There is no
   branch, so the compiler computes a whole register at once. NaN gives NaN. */
INLINE float exp_of(float x) {
  x = x < -87 ? -88 : x; /* at -88 n is -127, and 2^n 0 */
  x = x > 89 ? 89 : x;   /* at 89 n is 128, and 2^n infinity */
  /* Numbers near 1.5 × 2^23 have no fraction: the sum is rounded, and its lowest bits are n. */
  union {
    float number;
    uint32_t bits;
  } rounded = {x * 1.44269504f + 0x1.8p23f};
  float n = rounded.number - 0x1.8p23f;
  float r = x - n * 0.693359375f; /* ln 2 in two parts: n times the first is exact */
  r += n * 2.12194440e-4f;
  float e = 1.f / 5040;
  e = e * r + 1.f / 720;
  e = e * r + 1.f / 120;
  e = e * r + 1.f / 24;
  e = e * r + 1.f / 6;
  e = e * r + 0.5f;
  e = e * r + 1;
  e = e * r + 1;
  union {
    uint32_t bits;
    float number;
  } power = {(rounded.bits + 127) << 23}; /* 2^n */
  return e * power.number;
}

INLINE float sum_of(const float *x, Int n) {
  float sum = 0;
  SIMD_SUM(sum)
  for (Int i = 0; i < n; i++) sum += x[i];
  return sum;
}

INLINE float dot(const float *x, const float *y, Int n) {
  float sum = 0;
  SIMD_SUM(sum)
  for (Int i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

/* The largest of x[0] … x[n-1]; a NaN among them may be passed over. */
INLINE float largest_of(const float *x, Int n) {
  float largest[LANES], result = x[0];
  Int whole = n / LANES * LANES;
  for (int lane = 0; lane < LANES; lane++) largest[lane] = x[0];
  for (Int i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++)
      largest[lane] = x[i + lane] > largest[lane] ? x[i + lane] : largest[lane];
  for (Int i = whole; i < n; i++) result = x[i] > result ? x[i] : result;
  for (int lane = 0; lane < LANES; lane++) result = largest[lane] > result ? largest[lane] : result;
  return result;
}

/* y += factor * x */
INLINE void add_scaled(float *y, float factor, const float *x, Int n) {
  for (Int i = 0; i < n; i++) y[i] += factor * x[i];
}

/* A sum over many rows is made of sums of so many rows each, which go to a total in double. A float
   that grew over all rows would lose more and more of each number that is added. */
#define ROWS_IN_FLOAT 64

/* totals += sums */
INLINE void add_to_totals(double *totals, const float *sums, Int n) {
  for (Int i = 0; i < n; i++) totals[i] += sums[i];
}

INLINE void round_totals(float *sums, const double *totals, Int n) {
  for (Int i = 0; i < n; i++) sums[i] = totals[i];
}
