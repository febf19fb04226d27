/* A few tokens through every block of GPT-2, as in decoding.

   It calls the same kernels in the same order as the blocks of gpt2.py. Called from here, each
   follows the last at once; called from Python, a token of GPT-2 124M took a fifth longer. */

#include "layers.h"
#include "matmul.h"

/* Weights of linear layers lie in memory as (out, in), without gaps. */
typedef struct {
  const float *ln_1_weight, *ln_1_bias, *c_attn_weight, *c_attn_bias;
  const float *attn_c_proj_weight, *attn_c_proj_bias, *ln_2_weight, *ln_2_bias;
  const float *c_fc_weight, *c_fc_bias, *mlp_c_proj_weight, *mlp_c_proj_bias;
} Block;

typedef struct {
  Int rows, tokens, width, heads, layers;
  float eps;
  const Block *blocks;
  float *cache; /* (layers, 2, rows, heads, capacity, head size) */
  Int layer_stride, value_stride, row_stride, head_stride; /* of the cache */
  const Int *lengths;                                      /* how many tokens each row holds */
  float *x;    /* (rows, tokens, width): the residual stream, changed in place */
  float *room; /* rows × tokens × (6 width + heads + 2) floats */
} Decode;

static int linear(const Decode *d, const float *weight, const float *bias, Int k, Int m,
                   const float *x, float *y) {
  return few_rows(&(FewRows){d->rows * d->tokens, k, m, x, weight, bias, y});
}

/* Normalise d->x; the statistics, which no backward needs, take 2 floats a row. */
static int normalize(const Decode *d, const float *weight, const float *bias, float *y,
                     float *statistics) {
  Int n = d->rows * d->tokens;
  return layer_norm_forward(
      &(LayerNorm){n, d->width, d->x, weight, bias, d->eps, y, statistics, statistics + n});
}

/* Write the new keys and values into the cache, after what it holds. */
static void remember(const Decode *d, const float *qkv, float *keys) {
  Int size = d->width / d->heads;
  for (Int row = 0; row < d->rows; row++)
    for (Int token = 0; token < d->tokens; token++)
      for (Int head = 0; head < d->heads; head++) {
        const float *new = qkv + (row * d->tokens + token) * 3 * d->width + head * size;
        float *key =
            keys + row * d->row_stride + head * d->head_stride + (d->lengths[row] + token) * size;
        memcpy(key, new + d->width, size * sizeof(float));
        memcpy(key + d->value_stride, new + 2 * d->width, size * sizeof(float));
      }
}

/* Rows of equal length go together, others one by one. */
static int attend(const Decode *d, const float *qkv, const float *keys, float *mixed,
                  float *log_total) {
  Int width = d->width, size = width / d->heads, together = d->rows;
  for (Int row = 1; row < d->rows; row++)
    if (d->lengths[row] != d->lengths[0]) together = 1;
  Strides q = {d->tokens * 3 * width, size, 3 * width}, kv = {d->row_stride, d->head_stride, size};
  for (Int row = 0; row < d->rows; row += together) {
    const float *k = keys + row * d->row_stride;
    Attention a = {together, d->heads, d->tokens, d->lengths[row] + d->tokens, size,
                   qkv + row * q.batch, k, k + d->value_stride, q, kv, kv,
                   mixed + row * d->tokens * width, log_total};
    if (attention_forward(&a)) return OUT_OF_MEMORY;
  }
  return DONE;
}

/* OUT_OF_MEMORY leaves new keys and values in the cache, beyond what it is said to hold. */
int decode(const Decode *d) {
  Int n = d->rows * d->tokens, width = d->width;
  float *branch = d->room;          /* (n, width): a branch's normalised input, its output */
  float *wide = branch + n * width; /* (n, 3 width) queries, keys, values; (n, 4 width) the MLP's */
  float *mixed = wide + n * 4 * width; /* (n, width) */
  float *unused = mixed + n * width;   /* LayerNorm's statistics, attention's log totals */
  for (Int i = 0; i < d->layers; i++) {
    const Block *b = &d->blocks[i];
    float *keys = d->cache + i * d->layer_stride;

    if (normalize(d, b->ln_1_weight, b->ln_1_bias, branch, unused) ||
        linear(d, b->c_attn_weight, b->c_attn_bias, width, 3 * width, branch, wide))
      return OUT_OF_MEMORY;
    remember(d, wide, keys);
    if (attend(d, wide, keys, mixed, unused) ||
        linear(d, b->attn_c_proj_weight, b->attn_c_proj_bias, width, width, mixed, branch) ||
        add(&(Add){n * width, d->x, branch, d->x}))
      return OUT_OF_MEMORY;

    if (normalize(d, b->ln_2_weight, b->ln_2_bias, branch, unused) ||
        linear(d, b->c_fc_weight, b->c_fc_bias, width, 4 * width, branch, wide) ||
        gelu_forward(&(Gelu){4 * n * width, NULL, wide, wide}) ||
        linear(d, b->mlp_c_proj_weight, b->mlp_c_proj_bias, 4 * width, width, wide, branch) ||
        add(&(Add){n * width, d->x, branch, d->x}))
      return OUT_OF_MEMORY;
  }
  return DONE;
}
