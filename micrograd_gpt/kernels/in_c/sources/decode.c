/* A few tokens through every block of GPT-2, as in decoding, or a whole prompt in bfloat16.

   It calls the same kernels in the same order as the blocks of gpt2.py. Called from here, each
   follows the last at once; called from Python, a token of GPT-2 124M took a fifth longer.

   Numbers are computed in float32, whatever the weights are held in. Beside weights of bfloat16 the
   branches of a block are rounded where gpt2.py's are, and keys and values are kept in bfloat16. */

#include "bfloat16.h"
#include "few_rows.h"
#include "half.h"
#include "layers.h"
#include "narrow.h"

/* A linear layer: its weights lie in memory as (out, in), without gaps. */
typedef struct {
  const void *weight, *bias; /* as NarrowRows has them */
  const float *scales;       /* of int8 */
} Linear;

typedef struct {
  const float *ln_1_weight, *ln_1_bias;
  Linear c_attn, attn_c_proj;
  const float *ln_2_weight, *ln_2_bias;
  Linear c_fc, mlp_c_proj;
} Block;

typedef struct {
  Int kind; /* of the weights */
  Int rows, tokens, width, heads, layers;
  float eps;
  const Block *blocks;
  void *cache; /* (layers, 2, rows, heads, capacity, head size): bfloat16 beside such weights */
  Int layer_stride, value_stride, row_stride, head_stride; /* of the cache */
  const Int *lengths;                                      /* how many tokens each row holds */
  float *x;    /* (rows, tokens, width): the residual stream, changed in place */
  float *room; /* rows × tokens × (6 width + heads + 2) floats */
} Decode;

/* Round to bfloat16 what gpt2.py keeps in it. */
static void round_branch(const Decode *d, float *x, Int n) {
  if (d->kind != BFLOAT16) return;
#pragma omp simd
  for (Int i = 0; i < n; i++) x[i] = from_bfloat16(to_bfloat16(x[i]));
}

/* x is rounded in place. */
static int linear(const Decode *d, const Linear *l, Int k, Int m, float *x, float *y) {
  Int n = d->rows * d->tokens;
  if (d->kind == FLOAT32) return few_rows(&(FewRows){n, k, m, x, l->weight, l->bias, y});
  round_branch(d, x, n * k);
  NarrowRows rows = {d->kind, n, k, m, x, l->weight, l->scales, l->bias, y};
  if (d->kind == INT8) return multiply_int8(&rows);
  if (few_narrow_rows(&rows)) return OUT_OF_MEMORY;
  round_branch(d, y, n * m);
  return DONE;
}

/* Normalise d->x into y; the statistics, which no backward needs, take 2 floats a row. */
static int normalize(const Decode *d, const float *weight, const float *bias, float *y,
                     float *statistics) {
  Int n = d->rows * d->tokens;
  return layer_norm_forward(
      &(LayerNorm){n, d->width, d->x, weight, bias, d->eps, y, statistics, statistics + n});
}

/* Where the keys of a layer begin; and number `at` from there on. */
static char *keys_of(const Decode *d, Int layer, Int at) {
  Int size = d->kind == BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
  return (char *)d->cache + (layer * d->layer_stride + at) * size;
}

/* Copy a head's key or value into the cache. */
static void keep(const Decode *d, const float *x, Int n, void *place) {
  uint16_t *narrow = place;
  if (d->kind == BFLOAT16)
    for (Int i = 0; i < n; i++) narrow[i] = to_bfloat16(x[i]);
  else
    memcpy(place, x, n * sizeof(float));
}

/* Write the new keys and values into the cache, after what it holds. */
static void remember(const Decode *d, const float *qkv, Int layer) {
  Int size = d->width / d->heads;
  for (Int row = 0; row < d->rows; row++)
    for (Int token = 0; token < d->tokens; token++)
      for (Int head = 0; head < d->heads; head++) {
        const float *new = qkv + (row * d->tokens + token) * 3 * d->width + head * size;
        Int at =
            row * d->row_stride + head * d->head_stride + (d->lengths[row] + token) * size;
        keep(d, new + d->width, size, keys_of(d, layer, at));
        keep(d, new + 2 * d->width, size, keys_of(d, layer, at + d->value_stride));
      }
}

/* Attention by tiles, which read and write bfloat16; `wide` are queries still in float32. `half` has
   room for twice the numbers of the result, or once where the queries are narrow. */
static int attend_by_tiles(Attention a, const float *wide, uint16_t *half) {
  Int width = a.heads * a.d, tokens = a.batches * a.queries, n = tokens * width;
  float *out = a.out;
  if (wide) {
    uint16_t *queries = half + n;
    for (Int token = 0; token < tokens; token++)
#pragma omp simd
      for (Int i = 0; i < width; i++)
        queries[token * width + i] = to_bfloat16(wide[token * a.q_strides.token + i]);
    a.q = queries;
    a.q_strides = (Strides){a.queries * width, a.d, width};
  }
  a.out = half;
  if (attention_forward_bfloat16(&a)) return OUT_OF_MEMORY;
#pragma omp simd
  for (Int i = 0; i < n; i++) out[i] = from_bfloat16(half[i]);
  return DONE;
}

/* Rows of equal length go together, others one by one; `half` is room as attend_by_tiles says. */
static int attend(const Decode *d, const void *qkv, int is_narrow, Int layer, float *mixed,
                  float *log_total, uint16_t *half) {
  Int width = d->width, size = width / d->heads, together = d->rows;
  for (Int row = 1; row < d->rows; row++)
    if (d->lengths[row] != d->lengths[0]) together = 1;
  Strides q = {d->tokens * 3 * width, size, 3 * width}, kv = {d->row_stride, d->head_stride, size};
  for (Int row = 0; row < d->rows; row += together) {
    Int first = row * d->row_stride;
    Attention a = {together, d->heads, d->tokens, d->lengths[row] + d->tokens, size,
                   (const char *)qkv + row * q.batch * (is_narrow ? 2 : 4), keys_of(d, layer, first),
                   keys_of(d, layer, first + d->value_stride), q, kv, kv,
                   mixed + row * d->tokens * width, log_total, is_narrow, d->kind == BFLOAT16};
    int few = a.queries <= FEW_QUERIES && a.queries < a.keys;
    int by_tiles = d->kind == BFLOAT16 && !few && bfloat16_by_tiles();
    if (by_tiles ? attend_by_tiles(a, is_narrow ? NULL : a.q, half) : attention_forward(&a))
      return OUT_OF_MEMORY;
  }
  return DONE;
}

/* ---------------------------------------------------------------------- many tokens in bfloat16 */

/* The keys and values of (row, head) number `part` of `parts`. */
typedef struct {
  const Decode *d;
  const uint16_t *qkv;
  Int layer;
} NarrowKeys;

static void remember_task(const void *arguments, Int part, Int parts) {
  const NarrowKeys *n = arguments;
  const Decode *d = n->d;
  (void)parts;
  Int size = d->width / d->heads, row = part / d->heads, head = part % d->heads;
  uint16_t *keys = (uint16_t *)d->cache + n->layer * d->layer_stride + row * d->row_stride +
                   head * d->head_stride + d->lengths[row] * size;
  for (Int token = 0; token < d->tokens; token++) {
    const uint16_t *new = n->qkv + (row * d->tokens + token) * 3 * d->width + head * size;
    memcpy(keys + token * size, new + d->width, size * sizeof *keys);
    memcpy(keys + d->value_stride + token * size, new + 2 * d->width, size * sizeof *keys);
  }
}

/* What is done to n numbers: `narrow` becomes its GELU, or is added to `wide`. */
typedef struct {
  Int n;
  uint16_t *narrow;
  float *wide;
} Numbers;

static void narrow_gelu_task(const void *arguments, Int part, Int parts) {
  const Numbers *n = arguments;
  Int first, end = cut(n->n, parts, LANES, part, &first);
#pragma omp simd
  for (Int i = first; i < end; i++) {
    float x = from_bfloat16(n->narrow[i]);
    n->narrow[i] = to_bfloat16(x * gelu_gate(x));
  }
}

static void add_narrow_task(const void *arguments, Int part, Int parts) {
  const Numbers *n = arguments;
  Int first, end = cut(n->n, parts, LANES, part, &first);
#pragma omp simd
  for (Int i = first; i < end; i++) n->wide[i] += from_bfloat16(n->narrow[i]);
}

static int narrow_linear(Int n, const Linear *l, Int k, Int m, const uint16_t *x, uint16_t *y) {
  return matmul_bfloat16(
      &(HalfProduct){n, k, m, x, k, 1, l->weight, 1, k, l->bias, y, m, 1});
}

static int narrowed(Int n, float *wide, uint16_t *narrow) {
  return convert_bfloat16(&(Conversion){n, 1, wide, narrow});
}

/* The same block, of which all that linear layers read and write is bfloat16 in memory, too. */
static int prompt_block(const Decode *d, Int i) {
  const Block *b = &d->blocks[i];
  Int n = d->rows * d->tokens, width = d->width, parts = thread_count();
  float *mixed = d->room, *unused = mixed + n * width;         /* (n, width), and as in decode() */
  uint16_t *branch = (uint16_t *)(unused + n * (d->heads + 2)); /* (n, width) */
  uint16_t *wide = branch + n * width;                          /* (n, 3 width), (n, 4 width) */
  Numbers branches = {n * width, branch, d->x}, hidden = {4 * n * width, wide, NULL};

  if (normalize(d, b->ln_1_weight, b->ln_1_bias, mixed, unused) ||
      narrowed(n * width, mixed, branch) ||
      narrow_linear(n, &b->c_attn, width, 3 * width, branch, wide) ||
      run_parts(remember_task, &(NarrowKeys){d, wide, i}, d->rows * d->heads) ||
      attend(d, wide, 1, i, mixed, unused, branch) || narrowed(n * width, mixed, wide) ||
      narrow_linear(n, &b->attn_c_proj, width, width, wide, branch) ||
      run_parts(add_narrow_task, &branches, parts))
    return OUT_OF_MEMORY;

  if (normalize(d, b->ln_2_weight, b->ln_2_bias, mixed, unused) ||
      narrowed(n * width, mixed, branch) ||
      narrow_linear(n, &b->c_fc, width, 4 * width, branch, wide) ||
      run_parts(narrow_gelu_task, &hidden, parts) ||
      narrow_linear(n, &b->mlp_c_proj, 4 * width, width, wide, branch) ||
      run_parts(add_narrow_task, &branches, parts))
    return OUT_OF_MEMORY;
  return DONE;
}

/* As decode(), for weights of bfloat16 and any number of tokens. */
int read_prompt(const Decode *d) {
  for (Int i = 0; i < d->layers; i++)
    if (prompt_block(d, i)) return OUT_OF_MEMORY;
  return DONE;
}

/* ---------------------------------------------------------------------------------- few tokens */

/* OUT_OF_MEMORY leaves new keys and values in the cache, beyond what it is said to hold. */
int decode(const Decode *d) {
  Int n = d->rows * d->tokens, width = d->width;
  float *branch = d->room;          /* (n, width): a branch's normalised input, its output */
  float *wide = branch + n * width; /* (n, 3 width) queries, keys, values; (n, 4 width) the MLP's */
  float *mixed = wide + n * 4 * width; /* (n, width) */
  float *unused = mixed + n * width;   /* LayerNorm's statistics, attention's log totals */
  for (Int i = 0; i < d->layers; i++) {
    const Block *b = &d->blocks[i];

    if (normalize(d, b->ln_1_weight, b->ln_1_bias, branch, unused) ||
        linear(d, &b->c_attn, width, 3 * width, branch, wide))
      return OUT_OF_MEMORY;
    remember(d, wide, i);
    if (attend(d, wide, 0, i, mixed, unused, (uint16_t *)branch) ||
        linear(d, &b->attn_c_proj, width, width, mixed, branch) ||
        add(&(Add){n * width, d->x, branch, d->x}))
      return OUT_OF_MEMORY;

    if (normalize(d, b->ln_2_weight, b->ln_2_bias, branch, unused) ||
        linear(d, &b->c_fc, width, 4 * width, branch, wide) ||
        gelu_forward(&(Gelu){4 * n * width, NULL, wide, wide}) ||
        linear(d, &b->mlp_c_proj, 4 * width, width, wide, branch) ||
        add(&(Add){n * width, d->x, branch, d->x}))
      return OUT_OF_MEMORY;
  }
  return DONE;
}
