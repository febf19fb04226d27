/* Causal attention, one head at a time, and in a head one strip of queries at a time: of the T × T
   weights, each thread holds at most STRIP × T at any moment.

   A strip's products run only over the keys that its queries may see: above the diagonal nothing is
   computed except in the tiles that the diagonal cuts.

   The backward computes the scores as the forward did, to the last bit: dot_products() of rows_of()
   the queries and panels_across() the keys. Of large scores another order of sums is off by more
   than 1, and the exponential of that is no longer a small error. */

#include "half.h"
#include "layers.h"
#include "matmul.h"

#define STRIP (12 * ROWS) /* queries at a time */

/* The purposes of scratch() here. */
enum { KEYS, KEYS_ACROSS, VALUES, QUERIES, QUERY_ROWS, GRAD, GRAD_ROWS, SCORES, DSCORES, TILES,
       WIDE_QUERIES, WIDE_KEYS, WIDE_VALUES };

static const float *head_of(const float *x, Strides s, Int batch, Int head) {
  return x + batch * s.batch + head * s.head;
}

/* The rows of a head, (n, d), as floats: those of bfloat16 are copied, to `rows` of NULL where there
   is no memory for them. */
typedef struct {
  const float *rows;
  Int stride;
} Head;

static Head wide_head(int purpose, const void *x, Strides s, int narrow, Int batch, Int head, Int n,
                      Int d) {
  if (!narrow) return (Head){head_of(x, s, batch, head), s.token};
  const uint16_t *from = (const uint16_t *)x + batch * s.batch + head * s.head;
  float *rows = scratch(purpose, n * d);
  for (Int i = 0; i < n && rows; i++)
#pragma omp simd
    for (Int c = 0; c < d; c++) rows[i * d + c] = from_bfloat16(from[i * s.token + c]);
  return (Head){rows, d};
}

static Head queries_of(const Attention *a, Int batch, Int head) {
  return wide_head(WIDE_QUERIES, a->q, a->q_strides, a->narrow_q, batch, head, a->queries, a->d);
}

static Head keys_of(const Attention *a, Int batch, Int head) {
  return wide_head(WIDE_KEYS, a->k, a->k_strides, a->narrow_kv, batch, head, a->keys, a->d);
}

static Head values_of(const Attention *a, Int batch, Int head) {
  return wide_head(WIDE_VALUES, a->v, a->v_strides, a->narrow_kv, batch, head, a->keys, a->d);
}

/* x (n, d) packed as multiply_tile's right factor, in panels of `columns` of its columns. */
INLINE float *panels(int purpose, const float *x, Int stride, Int n, Int d, Int columns) {
  float *packed = scratch(purpose, n * round_up(d, columns));
  for (Int c = 0; c < d && packed; c += columns)
    pack_columns(x + c, stride, 1, n, min(columns, d - c), columns, packed + c * n);
  return packed;
}

/* x (n, d) transposed and packed likewise, in panels of COLUMNS of its rows. */
INLINE float *panels_across(int purpose, const float *x, Int stride, Int n, Int d) {
  float *packed = scratch(purpose, round_up(n, COLUMNS) * d);
  for (Int j = 0; j < n && packed; j += COLUMNS)
    pack_columns(x + j * stride, 1, stride, d, min(COLUMNS, n - j), COLUMNS, packed + j * d);
  return packed;
}

/* x (rows, d) times `factor`, without gaps, and rows of zeros up to a multiple of ROWS. */
INLINE float *rows_of(int purpose, const float *x, Int stride, Int rows, Int d, float factor) {
  float *copy = scratch(purpose, STRIP * d);
  if (!copy) return NULL;
  for (Int i = 0; i < rows; i++)
    for (Int c = 0; c < d; c++) copy[i * d + c] = factor * x[i * stride + c];
  memset(copy + rows * d, 0, (round_up(rows, ROWS) - rows) * d * sizeof(float));
  return copy;
}

/* result[i, j] = x[i] · y[j] for ROWS rows of x and the first n of y, which is packed across. */
INLINE void dot_products(const float *x, const float *y, Int n, Int d, float *result, Int width) {
  for (Int j = 0; j < n; j += COLUMNS)
    multiply_tile(VECTORS, d, x, d, 1, y + j * d, result + j, width, 0);
}

/* ------------------------------------------------------------------------------------- forward */

/* Scores x[0] … x[n-1] become exp(score - the largest); zeros follow, up to a multiple of LANES and
   up to x[end-1]. It works in whole registers: a row has room for them, and what they hold beyond n
   adds nothing. */
INLINE void softmax_row(float *x, Int n, Int end, float *total, float *log_total) {
  Int whole = round_up(n, LANES);
  for (Int j = n; j < whole; j++) x[j] = -INFINITY;
  float largest = largest_of(x, whole), sum = 0;
  SIMD_SUM(sum)
  for (Int j = 0; j < whole; j++) sum += x[j] = exp_of(x[j] - largest);
  for (Int j = n; j < whole || j < end; j++) x[j] = 0;
  *total = sum;
  *log_total = largest + logf(sum);
}

INLINE void forward_head(int vectors, const Attention *a, Int batch, Int head) {
  Int d = a->d, columns = vectors * LANES, past = a->keys - a->queries;
  Int wide = round_up(d, columns), width = round_up(a->keys, COLUMNS);
  Head q = queries_of(a, batch, head), k = keys_of(a, batch, head), v = values_of(a, batch, head);
  if (!q.rows || !k.rows || !v.rows) return;
  const float *keys = panels_across(KEYS_ACROSS, k.rows, k.stride, a->keys, d);
  const float *values = panels(VALUES, v.rows, v.stride, a->keys, d, columns);
  float *log_total = a->log_total + (batch * a->heads + head) * a->queries;
  float *scores = scratch(SCORES, ROWS * width), *mixed = scratch(TILES, ROWS * wide);
  float scale = 1 / sqrtf(d), total[ROWS];
  if (!keys || !values || !scores || !mixed) return;
  for (Int i0 = 0; i0 < a->queries; i0 += ROWS) {
    Int rows = min(ROWS, a->queries - i0), seen = past + i0 + rows;
    const float *x = rows_of(QUERY_ROWS, q.rows + i0 * q.stride, q.stride, rows, d, scale);
    if (!x) return;
    dot_products(x, keys, seen, d, scores, width);
    for (Int i = 0; i < rows; i++)
      softmax_row(scores + i * width, past + i0 + i + 1, seen, &total[i], &log_total[i0 + i]);
    for (Int c = 0; c < d; c += columns)
      multiply_tile(vectors, seen, scores, width, 1, values + c * a->keys, mixed + c, wide, 0);
    for (Int i = 0; i < rows; i++) {
      float *out = (float *)a->out + ((batch * a->queries + i0 + i) * a->heads + head) * d;
      for (Int c = 0; c < d; c++) out[c] = mixed[i * wide + c] / total[i];
    }
  }
}

/* The same for a few queries after many keys, which packing would take longer than using. */
static void forward_few(const Attention *a, Int batch, Int head) {
  Int d = a->d;
  Head q = queries_of(a, batch, head), k = keys_of(a, batch, head), v = values_of(a, batch, head);
  float *scores = scratch(SCORES, round_up(a->keys, LANES)), scale = 1 / sqrtf(d), total;
  if (!scores || !q.rows || !k.rows || !v.rows) return;
  for (Int i = 0; i < a->queries; i++) {
    const float *query = q.rows + i * q.stride;
    float *out = (float *)a->out + ((batch * a->queries + i) * a->heads + head) * d;
    Int seen = a->keys - a->queries + i + 1;
    for (Int j = 0; j < seen; j++) scores[j] = scale * dot(query, k.rows + j * k.stride, d);
    softmax_row(scores, seen, seen, &total,
                &a->log_total[(batch * a->heads + head) * a->queries + i]);
    memset(out, 0, d * sizeof(float));
    for (Int j = 0; j < seen; j++)
      add_scaled(out, scores[j] / total, v.rows + j * v.stride, d);
  }
}

static void forward_task(const void *arguments, Int part, Int parts) {
  (void)parts;
  const Attention *a = arguments;
  Int batch = part / a->heads, head = part % a->heads;
  if (a->queries <= FEW_QUERIES && a->queries < a->keys) /* a backward has as many keys */
    forward_few(a, batch, head);
  else if (a->d <= COLUMNS / 2)
    forward_head(VECTORS / 2, a, batch, head);
  else
    forward_head(VECTORS, a, batch, head);
}

int attention_forward(const Attention *a) {
  return run_parts(forward_task, a, a->batches * a->heads);
}

/* ------------------------------------------------------------------------------------ backward */

typedef struct {
  Attention forward;
  const float *grad; /* (B, T, H, D), as out */
  float *dq, *dk, *dv;
  Strides dq_strides, dk_strides, dv_strides;
} AttentionBackward;

/* A strip's scores become weights and its dweights dscores, row by row: zero where not seen. */
INLINE void backward_rows(Int rows, Int first, Int end, Int d, const float *grad, const float *out,
                          Int stride, const float *log_total, float *weights, float *dscores,
                          Int width) {
  for (Int i = 0; i < round_up(rows, ROWS); i++) {
    Int n = i < rows ? first + i + 1 : 0; /* keys that query i sees */
    float *w = weights + i * width, *dw = dscores + i * width;
    float along = n ? dot(grad + i * d, out + i * stride, d) : 0, log_sum = n ? log_total[i] : 0;
    for (Int j = 0; j < round_up(n, LANES); j++) { /* whole registers; there is room for them */
      w[j] = exp_of(w[j] - log_sum);
      dw[j] = w[j] * (dw[j] - along);
    }
    for (Int j = n; j < end; j++) w[j] = dw[j] = 0;
  }
}

/* sums (end, d) += w.T @ x for the weights w (rows, end) of the queries from `first` on, and their
   rows x, which are packed. A key after the first query only meets the queries that see it. */
INLINE void add_to_keys(int vectors, const float *w, Int width, Int rows, Int first, Int end, Int d,
                        const float *x, float *sums, Int wide) {
  Int columns = vectors * LANES;
  for (Int j = 0; j < end; j += ROWS) {
    Int from = j > first ? j - first : 0;
    for (Int c = 0; c < d; c += columns)
      multiply_tile(vectors, rows - from, w + from * width + j, 1, width,
                    x + c * rows + from * columns, sums + j * wide + c, wide, 1);
  }
}

INLINE void store(float *to, Int stride, const float *from, Int wide, Int rows, Int d,
                  float factor) {
  for (Int i = 0; i < rows; i++)
    for (Int c = 0; c < d; c++) to[i * stride + c] = factor * from[i * wide + c];
}

INLINE void backward_head(int vectors, const AttentionBackward *b, Int batch, Int head) {
  const Attention *a = &b->forward;
  Int t = a->queries, d = a->d, columns = vectors * LANES, together = a->heads * d;
  Int wide = round_up(d, columns), width = round_up(t, COLUMNS) + ROWS;
  const float *q = head_of(a->q, a->q_strides, batch, head);
  const float *k = head_of(a->k, a->k_strides, batch, head);
  const float *v = head_of(a->v, a->v_strides, batch, head);
  const float *out = (const float *)a->out + batch * t * together + head * d;
  const float *grad = b->grad + batch * t * together + head * d;
  const float *log_total = a->log_total + (batch * a->heads + head) * t;
  const float *keys_across = panels_across(KEYS_ACROSS, k, a->k_strides.token, t, d);
  const float *values_across = panels_across(VALUES, v, a->v_strides.token, t, d);
  const float *keys = panels(KEYS, k, a->k_strides.token, t, d, columns);
  float *weights = scratch(SCORES, STRIP * width), *dscores = scratch(DSCORES, STRIP * width);
  float *sums = scratch(TILES, (2 * round_up(t, ROWS) + ROWS) * wide);
  if (!keys_across || !values_across || !keys || !weights || !dscores || !sums) return;
  float *dk = sums, *dv = dk + round_up(t, ROWS) * wide, *tile = dv + round_up(t, ROWS) * wide;
  memset(sums, 0, 2 * round_up(t, ROWS) * wide * sizeof(float));
  float scale = 1 / sqrtf(d);
  for (Int i0 = 0; i0 < t; i0 += STRIP) {
    Int rows = min(STRIP, t - i0), end = i0 + rows;
    const float *q_strip = q + i0 * a->q_strides.token, *grad_strip = grad + i0 * together;
    const float *x = rows_of(QUERY_ROWS, q_strip, a->q_strides.token, rows, d, scale);
    const float *g = rows_of(GRAD_ROWS, grad_strip, together, rows, d, 1);
    if (!x || !g) return;
    for (Int i = 0; i < rows; i += ROWS) {
      Int seen = min(i0 + i + ROWS, end);
      dot_products(x + i * d, keys_across, seen, d, weights + i * width, width);
      dot_products(g + i * d, values_across, seen, d, dscores + i * width, width);
    }
    backward_rows(rows, i0, round_up(end, ROWS), d, g, out + i0 * together, together,
                  log_total + i0, weights, dscores, width);
    for (Int i = 0; i < rows; i += ROWS) {
      Int here = min(ROWS, rows - i);
      for (Int c = 0; c < d; c += columns)
        multiply_tile(vectors, i0 + i + here, dscores + i * width, width, 1, keys + c * t, tile + c,
                      wide, 0);
      store(b->dq + batch * b->dq_strides.batch + head * b->dq_strides.head +
                (i0 + i) * b->dq_strides.token,
            b->dq_strides.token, tile, wide, here, d, scale);
    }
    const float *grads = panels(GRAD, grad_strip, together, rows, d, columns);
    const float *queries = panels(QUERIES, x, d, rows, d, columns);
    if (!grads || !queries) return;
    add_to_keys(vectors, weights, width, rows, i0, end, d, grads, dv, wide);
    add_to_keys(vectors, dscores, width, rows, i0, end, d, queries, dk, wide);
  }
  store(b->dk + batch * b->dk_strides.batch + head * b->dk_strides.head, b->dk_strides.token, dk,
        wide, t, d, 1);
  store(b->dv + batch * b->dv_strides.batch + head * b->dv_strides.head, b->dv_strides.token, dv,
        wide, t, d, 1);
}

static void backward_task(const void *arguments, Int part, Int parts) {
  (void)parts;
  const AttentionBackward *b = arguments;
  Int batch = part / b->forward.heads, head = part % b->forward.heads;
  if (b->forward.d <= COLUMNS / 2)
    backward_head(VECTORS / 2, b, batch, head);
  else
    backward_head(VECTORS, b, batch, head);
}

int attention_backward(const AttentionBackward *b) {
  return run_parts(backward_task, b, b->forward.batches * b->forward.heads);
}
