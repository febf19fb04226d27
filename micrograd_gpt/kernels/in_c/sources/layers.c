/* Addition, LayerNorm, GELU, cross-entropy and the embedding's gradient; where there are both, each
   forward beside its backward.

   functional.py derives the formulas. The threads share the rows (or elements). */

#include "half.h"
#include "layers.h"

enum { TOTALS }; /* the purpose of scratch() here */

#define FEW_ELEMENTS 16384 /* with fewer, waking another thread does not pay */

static Int parts_for(Int elements) { return elements < FEW_ELEMENTS ? 1 : thread_count(); }

/* ------------------------------------------------------------------------------------- addition */

static void add_task(const void *arguments, Int part, Int parts) {
  const Add *s = arguments;
  Int first, end = cut(s->size, parts, LANES, part, &first);
#pragma omp simd
  for (Int i = first; i < end; i++) s->out[i] = s->a[i] + s->b[i];
}

int add(const Add *a) { return run_parts(add_task, a, parts_for(a->size)); }

/* ----------------------------------------------------------------------------------- layer norm */

/* The mean's rounding error is a mean itself, and is added to it. Without this, a row of equal
   numbers would differ from its mean, and LayerNorm would make that difference large. */
static float mean_of(const float *x, Int n) {
  float mean = sum_of(x, n) / n, rest = 0;
  SIMD_SUM(rest)
  for (Int i = 0; i < n; i++) rest += x[i] - mean;
  return mean + rest / n;
}

static void layer_norm_task(const void *arguments, Int part, Int parts) {
  const LayerNorm *l = arguments;
  Int row, end = cut(l->n, parts, 1, part, &row);
  for (; row < end; row++) {
    const float *x = l->x + row * l->width;
    float *y = l->y + row * l->width;
    float mean = mean_of(x, l->width), squares = 0;
    SIMD_SUM(squares)
    for (Int i = 0; i < l->width; i++) {
      y[i] = x[i] - mean;
      squares += y[i] * y[i];
    }
    float rstd = 1 / sqrtf(squares / l->width + l->eps);
    for (Int i = 0; i < l->width; i++) y[i] = y[i] * rstd * l->weight[i] + l->bias[i];
    l->mean[row] = mean;
    l->rstd[row] = rstd;
  }
}

int layer_norm_forward(const LayerNorm *l) {
  return run_parts(layer_norm_task, l, parts_for(l->n * l->width));
}

typedef struct {
  Int n, width, parts;
  const float *grad, *x, *weight, *mean, *rstd;
  float *dx, *dweights, *dbiases; /* dweights, dbiases (parts, width): sums over each part's rows */
} LayerNormBackward;

/* Row `row` of dx; adds what the row has to the sums. */
INLINE void layer_norm_backward_row(const LayerNormBackward *l, Int row, float *dweight,
                                    float *dbias) {
  Int width = l->width;
  const float *grad = l->grad + row * width, *x = l->x + row * width;
  float *dx = l->dx + row * width;
  float mean = l->mean[row], rstd = l->rstd[row], along_1 = 0, along_n = 0;
#pragma omp simd reduction(+ : along_1, along_n)
  for (Int i = 0; i < width; i++) {
    float normed = (x[i] - mean) * rstd, dnormed = grad[i] * l->weight[i];
    dbias[i] += grad[i];
    dweight[i] += grad[i] * normed;
    along_1 += dnormed;
    along_n += dnormed * normed;
  }
  along_1 /= width;
  along_n /= width;
  for (Int i = 0; i < width; i++) {
    float normed = (x[i] - mean) * rstd, dnormed = grad[i] * l->weight[i];
    dx[i] = (dnormed - along_1 - normed * along_n) * rstd;
  }
}

static void layer_norm_backward_task(const void *arguments, Int part, Int parts) {
  const LayerNormBackward *l = arguments;
  Int row, width = l->width, end = cut(l->n, parts, 1, part, &row);
  float *dweight = l->dweights + part * width, *dbias = l->dbiases + part * width;
  double *totals = (double *)scratch(TOTALS, 4 * width); /* of dweight, then of dbias */
  if (!totals) return;
  memset(totals, 0, 2 * width * sizeof(double));
  while (row < end) {
    memset(dweight, 0, width * sizeof(float));
    memset(dbias, 0, width * sizeof(float));
    for (Int last = min(row + ROWS_IN_FLOAT, end); row < last; row++)
      layer_norm_backward_row(l, row, dweight, dbias);
    add_to_totals(totals, dweight, width);
    add_to_totals(totals + width, dbias, width);
  }
  round_totals(dweight, totals, width);
  round_totals(dbias, totals + width, width);
}

int layer_norm_backward(const LayerNormBackward *l) {
  return run_parts(layer_norm_backward_task, l, l->parts);
}

/* ----------------------------------------------------------------------------------------- gelu */

#define GELU_IS_STRAIGHT 20.0f /* from this |x| on its slope is 1 or 0; x * x could overflow */

/* A number of bfloat16, or else of float32; `narrow` is a constant for the compiler. */
INLINE float number_at(int narrow, const void *x, Int i) {
  return narrow ? from_bfloat16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void put_number(int narrow, void *x, Int i, float number) {
  if (narrow)
    ((uint16_t *)x)[i] = to_bfloat16(number);
  else
    ((float *)x)[i] = number;
}

INLINE void gelu_of(int narrow, const Gelu *g, Int first, Int end) {
#pragma omp simd
  for (Int i = first; i < end; i++) {
    float x = number_at(narrow, g->x, i);
    put_number(narrow, g->result, i, x * gelu_gate(x));
  }
}

static void gelu_task(const void *arguments, Int part, Int parts) {
  const Gelu *g = arguments;
  Int first, end = cut(g->size, parts, LANES, part, &first);
  if (g->narrow)
    gelu_of(1, g, first, end);
  else
    gelu_of(0, g, first, end);
}

int gelu_forward(const Gelu *g) { return run_parts(gelu_task, g, parts_for(g->size)); }

INLINE void gelu_gradient_of(int narrow, const Gelu *g, Int first, Int end) {
#pragma omp simd
  for (Int i = first; i < end; i++) {
    float x = number_at(narrow, g->x, i);
    x = x > GELU_IS_STRAIGHT ? GELU_IS_STRAIGHT : x < -GELU_IS_STRAIGHT ? -GELU_IS_STRAIGHT : x;
    float gate = gelu_gate(x);
    float inner = 2 * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x);
    float slope = gate + x * gate * (1 - gate) * inner;
    put_number(narrow, g->result, i, number_at(narrow, g->grad, i) * slope);
  }
}

static void gelu_backward_task(const void *arguments, Int part, Int parts) {
  const Gelu *g = arguments;
  Int first, end = cut(g->size, parts, LANES, part, &first);
  if (g->narrow)
    gelu_gradient_of(1, g, first, end);
  else
    gelu_gradient_of(0, g, first, end);
}

int gelu_backward(const Gelu *g) { return run_parts(gelu_backward_task, g, parts_for(g->size)); }

/* -------------------------------------------------------------------------------- cross-entropy */

typedef struct {
  Int n, vocab_size;
  const float *logits;
  const int64_t *targets; /* below 0: the row is ignored */
  float scale;
  float *losses, *dlogits; /* dlogits may be logits */
  Int narrow;              /* dlogits become bfloat16, in the first half of each row */
} CrossEntropy;

/* A row of floats becomes bfloat16, in its own first half: numbers that are read already. */
static void narrow_in_place(float *row, Int n) {
  uint16_t some[256];
  for (Int first = 0; first < n; first += 256) {
    Int count = min(256, n - first);
#pragma omp simd
    for (Int i = 0; i < count; i++) some[i] = to_bfloat16(row[first + i]);
    memcpy((char *)row + first * sizeof *some, some, count * sizeof *some);
  }
}

static void cross_entropy_task(const void *arguments, Int part, Int parts) {
  const CrossEntropy *c = arguments;
  Int row, end = cut(c->n, parts, 1, part, &row);
  for (; row < end; row++) {
    const float *logits = c->logits + row * c->vocab_size;
    float *dlogits = c->dlogits + row * c->vocab_size;
    Int target = c->targets[row];
    c->losses[row] = 0;
    if (target < 0) {
      memset(dlogits, 0, c->vocab_size * sizeof(float));
      continue;
    }
    float largest = largest_of(logits, c->vocab_size), at_target = logits[target] - largest,
          total = 0;
    SIMD_SUM(total)
    for (Int i = 0; i < c->vocab_size; i++) total += dlogits[i] = exp_of(logits[i] - largest);
    float factor = c->scale / total;
    for (Int i = 0; i < c->vocab_size; i++) dlogits[i] *= factor;
    dlogits[target] -= c->scale;
    if (c->narrow) narrow_in_place(dlogits, c->vocab_size);
    c->losses[row] = logf(total) - at_target;
  }
}

int cross_entropy_forward(const CrossEntropy *c) {
  return run_parts(cross_entropy_task, c, parts_for(c->n * c->vocab_size));
}

/* ------------------------------------------------------------------------------------ embedding */

typedef struct {
  Int n, width;
  const float *grad;
  const int64_t *ids;
  float *dweight;
} Embedding;

/* Each thread adds its columns of every row, so no two threads add to one place, and the order of
   every sum stays the same. */
static void embedding_task(const void *arguments, Int part, Int parts) {
  const Embedding *e = arguments;
  Int first, end = cut(e->width, parts, LANES, part, &first);
  for (Int row = 0; row < e->n; row++)
    add_scaled(e->dweight + e->ids[row] * e->width + first, 1, e->grad + row * e->width + first,
               end - first);
}

int embedding_backward(const Embedding *e) {
  return run_parts(embedding_task, e, parts_for(e->n * e->width));
}
