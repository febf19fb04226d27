/* Numbers of 16 bits: bfloat16 and float16. */

#pragma once
#include "vectors.h"

typedef union {
  uint32_t bits;
  float number;
} Float;

/* bfloat16 is the upper half of a float32. */
INLINE float from_bfloat16(uint16_t x) { return (Float){(uint32_t)x << 16}.number; }

/* The nearest bfloat16, and of two the even one. Adding to a NaN's bits could make it infinite, so
   it is cut off and keeps one of them. */
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits = (Float){.number = x}.bits;
  uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest;
}

/* float16 has 5 bits of exponent, which count from 15: where float32 has 8, which count from 127.
   Below the smallest normal number, 2^-14, the bits are a fraction of it: they are put behind the
   1 of a float of that size, from which it is then taken away. No float32 is subnormal on the way,
   as processors are slow with those. */
INLINE float from_float16(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, size = (uint32_t)(x & 0x7fff) << 13;
  Float wide = {size + (112u << 23)}, small = {size + (113u << 23)};
  small.number -= 0x1p-14f;
  wide.bits = size < 1u << 23 ? small.bits : wide.bits;
  wide.bits |= sign | (size >= 31u << 23 ? 0xffu << 23 : 0); /* infinity and NaN stay so */
  return wide.number;
}
