/* Causal attention of bfloat16 by AMX, as attention.c's: one head at a time, and in a head SIDE
   queries, a strip, at a time, which meet SIDE keys, a panel, at a time (see tiles.h).

   Scores, softmax and all sums are float32. Weights and the gradients of scores are rounded to
   bfloat16 where another product takes them. */

#include "half.h"
#include "layers.h"
#include "matmul.h"
#include "tiles.h"

#ifdef HAS_TILES

#define SQUARE (SIDE * SIDE) /* numbers where a strip meets a panel */
#define BLOCK 4              /* strips whose queries add to the gradients of keys together */

/* The purposes of scratch() here. */
enum { QUERIES, KEYS, VALUES, SCORES, WEIGHTS, GRADS, KEYS_ACROSS, VALUES_ACROSS, DSCORES,
       DSCORES_ACROSS, QUERIES_ACROSS, GRADS_ACROSS, SUMS };

static uint16_t *half_scratch(int purpose, Int count) {
  return (uint16_t *)scratch(purpose, count / 2);
}

static const uint16_t *head_of(const void *x, Strides s, Int batch, Int head) {
  return (const uint16_t *)x + batch * s.batch + head * s.head;
}

/* The square (SIDE, SIDE) of a strip @ a panel. */
INLINE void square_of(Int steps, const uint16_t *strip, const uint16_t *panel, float *square) {
  clear_sums();
  multiply_strip_and_panel(steps, strip, panel);
  store_sums(square, SIDE);
}

/* square += a strip @ a panel */
INLINE void add_to_square(Int steps, const uint16_t *strip, const uint16_t *panel, float *square) {
  load_sums(square, SIDE);
  multiply_strip_and_panel(steps, strip, panel);
  store_sums(square, SIDE);
}

/* to[j] = factor * from[j], rounded */
INLINE void put_narrow(uint16_t *restrict to, const float *restrict from, Int n, float factor) {
#pragma omp simd
  for (Int j = 0; j < n; j++) to[j] = to_bfloat16(factor * from[j]);
}

/* ------------------------------------------------------------------------------------- forward */

/* Row r of `panels` squares of scores, of which n count, becomes a row of a strip of weights, which
   are still to be divided by their sum. */
INLINE void softmax_row(float *scores, Int r, Int n, Int panels, float scale, uint16_t *weights,
                        float *total, float *log_total) {
  float most[SIDE], sums[SIDE] = {0};
  for (Int q = 0; q < SIDE; q++) most[q] = -INFINITY;
  for (Int j = n; j < panels * SIDE; j++)
    scores[j / SIDE * SQUARE + r * SIDE + j % SIDE] = -INFINITY;
  for (Int j = 0; j < panels; j++) {
    float *x = scores + j * SQUARE + r * SIDE;
#pragma omp simd
    for (Int q = 0; q < SIDE; q++) {
      x[q] *= scale;
      most[q] = x[q] > most[q] ? x[q] : most[q];
    }
  }
  float largest = largest_of(most, SIDE);
  for (Int j = 0; j < panels; j++) {
    const float *x = scores + j * SQUARE + r * SIDE;
    uint16_t *w = weights + j * SQUARE + r * SIDE;
#pragma omp simd
    for (Int q = 0; q < SIDE; q++) {
      float e = exp_of(x[q] - largest);
      sums[q] += e;
      w[q] = to_bfloat16(e);
    }
  }
  *total = sum_of(sums, SIDE);
  *log_total = largest + logf(*total);
}

typedef struct {
  Int deep, key_deep; /* the head size and the number of keys, with the zeros up to whole steps */
  const uint16_t *queries, *keys, *values;
  float *scores;
  uint16_t *weights;
} ForwardHead;

/* The strip of queries from i0 on. */
static void forward_strip(const Attention *a, const ForwardHead *h, Int batch, Int head, Int i0) {
  Int rows = min(SIDE, a->queries - i0), seen = a->keys - a->queries + i0 + 1; /* by its first */
  Int panels = (seen + rows - 1 + SIDE - 1) / SIDE;
  float *log_total = a->log_total + (batch * a->heads + head) * a->queries + i0;
  float scale = 1 / sqrtf(a->d), total[SIDE], mixed[SQUARE] __attribute__((aligned(64)));
  for (Int j = 0; j < panels; j++)
    square_of(h->deep / STEP, h->queries + i0 * h->deep, h->keys + j * SIDE * h->deep,
              h->scores + j * SQUARE);
  for (Int r = 0; r < rows; r++)
    softmax_row(h->scores, r, seen + r, panels, scale, h->weights, &total[r], &log_total[r]);
  for (Int c = 0; c < a->d; c += SIDE) {
    square_of(panels, h->weights, h->values + c * h->key_deep, mixed);
    for (Int r = 0; r < rows; r++) {
      Int place = ((batch * a->queries + i0 + r) * a->heads + head) * a->d + c;
      put_narrow((uint16_t *)a->out + place, mixed + r * SIDE, min(SIDE, a->d - c), 1 / total[r]);
    }
  }
}

static void forward_task(const void *arguments, Int part, Int parts) {
  (void)parts;
  const Attention *a = arguments;
  Int batch = part / a->heads, head = part % a->heads;
  Int deep = round_up(a->d, STEP), key_deep = round_up(a->keys, STEP);
  uint16_t *queries = half_scratch(QUERIES, round_up(a->queries, SIDE) * deep);
  uint16_t *keys = half_scratch(KEYS, key_deep * deep);
  uint16_t *values = half_scratch(VALUES, key_deep * deep);
  uint16_t *weights = half_scratch(WEIGHTS, key_deep * SIDE);
  float *scores = scratch(SCORES, key_deep * SIDE);
  if (!queries || !keys || !values || !weights || !scores) return;
  pack_strips(head_of(a->q, a->q_strides, batch, head), a->q_strides.token, 1, a->queries, a->d,
              queries);
  pack_panels(head_of(a->k, a->k_strides, batch, head), 1, a->k_strides.token, a->d, a->keys, keys);
  pack_panels(head_of(a->v, a->v_strides, batch, head), a->v_strides.token, 1, a->keys, a->d,
              values);
  ForwardHead h = {deep, key_deep, queries, keys, values, scores, weights};
  open_tiles();
  for (Int i0 = 0; i0 < a->queries; i0 += SIDE) forward_strip(a, &h, batch, head, i0);
  _tile_release();
}

/* q, k, v and out are of bfloat16. */
int attention_forward_bfloat16(const Attention *a) {
  return run_parts(forward_task, a, a->batches * a->heads);
}

/* ------------------------------------------------------------------------------------ backward */

typedef struct {
  Attention forward; /* of as many queries as keys */
  const uint16_t *grad; /* (B, T, H, D), as out */
  uint16_t *dq, *dk, *dv;
  Strides dq_strides, dk_strides, dv_strides;
} HalfAttentionBackward;

/* What a head's products take. A strip or panel is as deep as the products with it are: the head
   size, the number of keys, or that of a block of queries. */
typedef struct {
  Int t, d, deep, t_deep;
  const uint16_t *queries, *grads, *keys_across, *values_across; /* scores, dweights: by d */
  const uint16_t *keys;                                          /* dq: by keys */
  uint16_t *dscores;                                             /* a strip */
  uint16_t *queries_across, *grads_across;                       /* dk, dv: by a block's queries */
  uint16_t *weights_panels, *dscores_panels;
  float *dk, *dv; /* (d, t) in squares: those of one panel of keys follow one another */
  float along[SIDE * BLOCK], log_total[SIDE * BLOCK]; /* of a block's queries */
} BackwardHead;

/* Scores and dweights of SIDE queries, the first of which sees the first n of SIDE keys, become
   weights and dscores, which are rounded; both as panels, and the latter as a strip, too. */
INLINE void backward_square(float *scores, const float *dweights, Int n, Int rows,
                            const float *along, const float *log_total, float scale,
                            uint16_t *dscores, uint16_t *weights_panel, uint16_t *dscores_panel) {
  uint16_t weights[SQUARE];
  for (Int r = 0; r < SIDE; r++) {
    Int seen = r < rows ? n + r : 0;
    float *x = scores + r * SIDE;
    const float *dw = dweights + r * SIDE;
    uint16_t *w = weights + r * SIDE, *ds = dscores + r * SIDE;
    float sum = along[r], log_sum = log_total[r];
    for (Int q = 0; q < SIDE; q++) x[q] *= scale; /* rounded here, as the forward rounds it */
#pragma omp simd
    for (Int q = 0; q < SIDE; q++) {
      float weight = exp_of(x[q] - log_sum), dscore = weight * (dw[q] - sum) * scale;
      w[q] = q < seen ? to_bfloat16(weight) : 0;
      ds[q] = q < seen ? to_bfloat16(dscore) : 0;
    }
  }
  for (Int r = 0; r < SIDE; r += 2) {
    Int place = r / 2 * 16, x = r * SIDE, y = x + SIDE;
    pack_two_rows(0, weights, x, y, (uint32_t *)weights_panel + place);
    pack_two_rows(0, dscores, x, y, (uint32_t *)dscores_panel + place);
  }
}

/* Strip s of the block of queries from i0 on: its weights, dscores, and dq. */
static void backward_strip(const HalfAttentionBackward *b, BackwardHead *h, Int batch, Int head,
                           Int i0, Int s) {
  Int i = i0 + s * SIDE, rows = min(SIDE, h->t - i), steps = h->deep / STEP;
  float scale = 1 / sqrtf(h->d);
  float scores[SQUARE] __attribute__((aligned(64))), dweights[SQUARE] __attribute__((aligned(64)));
  for (Int j = 0; j <= i; j += SIDE) {
    Int place = (j * BLOCK + s * SIDE) * STEP;
    square_of(steps, h->queries + i * h->deep, h->keys_across + j * h->deep, scores);
    square_of(steps, h->grads + i * h->deep, h->values_across + j * h->deep, dweights);
    backward_square(scores, dweights, i - j + 1, rows, h->along + s * SIDE,
                    h->log_total + s * SIDE, scale, h->dscores + j * SIDE,
                    h->weights_panels + place, h->dscores_panels + place);
  }
  for (Int c = 0; c < h->d; c += SIDE) {
    square_of(i / SIDE + 1, h->dscores, h->keys + c * h->t_deep, scores);
    uint16_t *dq = b->dq + batch * b->dq_strides.batch + head * b->dq_strides.head;
    for (Int r = 0; r < rows; r++)
      put_narrow(dq + (i + r) * b->dq_strides.token + c, scores + r * SIDE, min(SIDE, h->d - c), 1);
  }
}

/* What the queries of a block, `rows` from i0 on, add to dk and dv. A key after the first of them
   only meets the strips that see it. */
static void add_to_keys(BackwardHead *h, Int i0, Int rows) {
  Int deep = round_up(rows, STEP);
  for (Int j = 0; j < i0 + rows; j += SIDE)
    for (Int c = 0; c < h->d; c += SIDE) {
      Int first = j > i0 ? j - i0 : 0, steps = (deep - first) / STEP;
      Int across = c * deep + first * SIDE, panel = (j * BLOCK + first) * STEP;
      Int square = j * h->deep + c * SIDE;
      add_to_square(steps, h->queries_across + across, h->dscores_panels + panel, h->dk + square);
      add_to_square(steps, h->grads_across + across, h->weights_panels + panel, h->dv + square);
    }
}

/* sums (d, t), in squares, go to an array (t, d). */
static void store_across(const BackwardHead *h, const float *sums, uint16_t *to, Int stride) {
  float across[SQUARE];
  for (Int j = 0; j < h->t; j += SIDE)
    for (Int c = 0; c < h->d; c += SIDE) {
      const float *square = sums + j * h->deep + c * SIDE;
      for (Int x = 0; x < SIDE; x += LANES)
        for (Int y = 0; y < SIDE; y += LANES)
          transpose_block(square + x * SIDE + y, SIDE, SIDE, across + y * SIDE + x);
      for (Int r = 0; r < min(SIDE, h->t - j); r++)
        put_narrow(to + (j + r) * stride + c, across + r * SIDE, min(SIDE, h->d - c), 1);
    }
}

/* Packs what a head's products take, or returns 0 where there is no memory for it. */
static int pack_head(const HalfAttentionBackward *b, BackwardHead *h, Int batch, Int head) {
  const Attention *a = &b->forward;
  Int size = round_up(h->t, SIDE) * h->deep, token = a->heads * h->d;
  const uint16_t *q = head_of(a->q, a->q_strides, batch, head);
  const uint16_t *k = head_of(a->k, a->k_strides, batch, head);
  const uint16_t *v = head_of(a->v, a->v_strides, batch, head);
  uint16_t *queries = half_scratch(QUERIES, size), *grads = half_scratch(GRADS, size);
  uint16_t *keys_across = half_scratch(KEYS_ACROSS, size), *keys = half_scratch(KEYS, size);
  uint16_t *values_across = half_scratch(VALUES_ACROSS, size);
  h->dscores = half_scratch(DSCORES, h->t_deep * SIDE);
  h->queries_across = half_scratch(QUERIES_ACROSS, BLOCK * SIDE * h->deep);
  h->grads_across = half_scratch(GRADS_ACROSS, BLOCK * SIDE * h->deep);
  h->weights_panels = half_scratch(WEIGHTS, h->t_deep * BLOCK * SIDE);
  h->dscores_panels = half_scratch(DSCORES_ACROSS, h->t_deep * BLOCK * SIDE);
  h->dk = scratch(SUMS, 2 * size);
  if (!queries || !grads || !keys_across || !values_across || !keys || !h->dscores) return 0;
  if (!h->queries_across || !h->grads_across || !h->weights_panels || !h->dscores_panels) return 0;
  if (!h->dk) return 0;
  h->dv = h->dk + size;
  memset(h->dk, 0, 2 * size * sizeof(float));
  pack_strips(q, a->q_strides.token, 1, h->t, h->d, queries);
  pack_strips(b->grad + batch * h->t * token + head * h->d, token, 1, h->t, h->d, grads);
  pack_panels(k, 1, a->k_strides.token, h->d, h->t, keys_across);
  pack_panels(v, 1, a->v_strides.token, h->d, h->t, values_across);
  pack_panels(k, a->k_strides.token, 1, h->t, h->d, keys);
  h->queries = queries, h->grads = grads, h->keys = keys;
  h->keys_across = keys_across, h->values_across = values_across;
  return 1;
}

/* The queries of a block, `rows` from i0 on. */
static void backward_block(const HalfAttentionBackward *b, BackwardHead *h, Int batch, Int head,
                           Int i0, Int rows) {
  const Attention *a = &b->forward;
  Int token = a->heads * h->d, place = (batch * h->t + i0) * token + head * h->d;
  const uint16_t *q = head_of(a->q, a->q_strides, batch, head) + i0 * a->q_strides.token;
  const uint16_t *grad = b->grad + place, *out = (const uint16_t *)a->out + place;
  for (Int r = 0; r < rows; r++) {
    float sum = 0;
    SIMD_SUM(sum)
    for (Int c = 0; c < h->d; c++)
      sum += from_bfloat16(grad[r * token + c]) * from_bfloat16(out[r * token + c]);
    h->along[r] = sum;
    h->log_total[r] = a->log_total[(batch * a->heads + head) * h->t + i0 + r];
  }
  pack_strips(q, 1, a->q_strides.token, h->d, rows, h->queries_across);
  pack_strips(grad, 1, token, h->d, rows, h->grads_across);
  for (Int s = 0; s * SIDE < rows; s++) backward_strip(b, h, batch, head, i0, s);
  add_to_keys(h, i0, rows);
}

static void backward_task(const void *arguments, Int part, Int parts) {
  (void)parts;
  const HalfAttentionBackward *b = arguments;
  const Attention *a = &b->forward;
  Int batch = part / a->heads, head = part % a->heads;
  BackwardHead h = {.t = a->queries, .d = a->d};
  h.deep = round_up(h.d, STEP), h.t_deep = round_up(h.t, STEP);
  if (!pack_head(b, &h, batch, head)) return;
  open_tiles();
  for (Int i0 = 0; i0 < h.t; i0 += BLOCK * SIDE)
    backward_block(b, &h, batch, head, i0, min(BLOCK * SIDE, h.t - i0));
  _tile_release();
  Strides dk = b->dk_strides, dv = b->dv_strides;
  store_across(&h, h.dk, b->dk + batch * dk.batch + head * dk.head, dk.token);
  store_across(&h, h.dv, b->dv + batch * dv.batch + head * dv.head, dv.token);
}

/* All arrays but log_total are of bfloat16. */
int attention_backward_bfloat16(const HalfAttentionBackward *b) {
  return run_parts(backward_task, b, b->forward.batches * b->forward.heads);
}
#else

int attention_forward_bfloat16(const Attention *a) { /* decode.c never calls it */
  (void)a;
  return OUT_OF_MEMORY;
}
#endif
