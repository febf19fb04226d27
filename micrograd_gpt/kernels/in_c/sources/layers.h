/* The forwards of layers.c and attention.c, which decode.c puts together. */

#pragma once
#include "threads.h"

typedef struct {
  Int size;
  const float *a, *b;
  float *out; /* may be a or b */
} Add;
int add(const Add *a);

typedef struct {
  Int n, width;
  const float *x, *weight, *bias;
  float eps;
  float *y, *mean, *rstd;
} LayerNorm;
int layer_norm_forward(const LayerNorm *l);

typedef struct {
  Int size;
  const void *grad, *x;
  void *result;
  Int narrow; /* all three are bfloat16, else float32 */
} Gelu;
int gelu_forward(const Gelu *g);

#define GELU_SCALE 0.7978845608f /* sqrt(2 / pi) */
#define GELU_CUBIC 0.044715f

/* 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u being GELU's inner polynomial. */
INLINE float gelu_gate(float x) {
  return 1 / (1 + exp_of(-2 * GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
}

/* How far apart batches, heads and tokens of a (B, H, T, D) array are; D must have no gaps. */
typedef struct {
  Int batch, head, token;
} Strides;

typedef struct {
  Int batches, heads, queries, keys, d; /* the last query stands at the last key */
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  void *out;        /* (B, T, H, D) without gaps: float32; by tiles bfloat16, as q, k and v are */
  float *log_total; /* (B, H, T): the log of each softmax's denominator */
  Int narrow_q, narrow_kv; /* whether q, and k and v, are bfloat16: of the forward alone */
} Attention;
int attention_forward(const Attention *a);
int attention_forward_bfloat16(const Attention *a); /* where bfloat16_by_tiles() */
#define FEW_QUERIES 4 /* at most this many, in decoding, go one by one (as kernels.py knows) */
