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

/* The nearest float16, and of two the even one; infinity from 65520 on. Below 2^-14 its steps are
   those that floats have from 0.5 on. */
INLINE uint16_t to_float16(float x) {
  Float given = {.number = x}, size = {given.bits & 0x7fffffff};
  Float small = {.number = size.number + 0.5f};
  uint32_t normal = (size.bits - (112u << 23) + 0xfff + ((size.bits >> 13) & 1)) >> 13;
  uint32_t nearest = size.bits < 113u << 23 ? small.bits - (126u << 23) : normal;
  nearest = size.bits < 143u << 23 ? nearest : 0x7c00;
  nearest |= size.bits > 0x7f800000 ? 0x200 : 0; /* NaN */
  return (given.bits >> 16 & 0x8000) | nearest;
}

/* Two numbers as the processor multiplies them: the first in the lower half. */
INLINE uint32_t pair(uint16_t first, uint16_t second) { return first | (uint32_t)second << 16; }
