/* The optimizer: every number of every parameter in one pass over memory. */

#include "threads.h"

#define CHUNK 65536 /* elements a thread takes at a time */

/* The array that chunk i is in, counted through all arrays; *first is its first element there. */
static Int find_chunk(Int i, const Int *sizes, Int *first) {
  Int array = 0;
  for (Int chunks; i >= (chunks = (sizes[array] + CHUNK - 1) / CHUNK); array++) i -= chunks;
  *first = i * CHUNK;
  return array;
}

static Int count_chunks(Int arrays, const Int *sizes) {
  Int chunks = 0;
  for (Int i = 0; i < arrays; i++) chunks += (sizes[i] + CHUNK - 1) / CHUNK;
  return chunks;
}

/* ------------------------------------------------------------------------------- gradient norm */

typedef struct {
  Int count; /* arrays */
  const Int *sizes;
  const float *const *arrays;
  double *sums; /* one for each chunk */
} Squares;

/* In double, where no square of a float overflows or vanishes. */
static double squares(const float *x, Int n) {
  double sum = 0;
  SIMD_SUM(sum)
  for (Int i = 0; i < n; i++) sum += (double)x[i] * x[i];
  return sum;
}

static void squares_task(const void *arguments, Int i, Int chunks) {
  (void)chunks;
  const Squares *s = arguments;
  Int first, array = find_chunk(i, s->sizes, &first);
  s->sums[i] = squares(s->arrays[array] + first, min(CHUNK, s->sizes[array] - first));
}

int sum_of_squares(const Squares *s) {
  return run_parts(squares_task, s, count_chunks(s->count, s->sizes));
}

typedef struct {
  Int count; /* arrays */
  const Int *sizes;
  float *const *arrays;
  float factor;
} Scaling;

static void scale_task(const void *arguments, Int i, Int chunks) {
  (void)chunks;
  const Scaling *s = arguments;
  Int first, array = find_chunk(i, s->sizes, &first), size = min(CHUNK, s->sizes[array] - first);
  float *x = s->arrays[array] + first, factor = s->factor;
  for (Int j = 0; j < size; j++) x[j] *= factor;
}

int scale(const Scaling *s) { return run_parts(scale_task, s, count_chunks(s->count, s->sizes)); }

/* --------------------------------------------------------------------------------------- AdamW */

typedef struct {
  Int count;        /* arrays */
  const Int *sizes; /* elements of each */
  float *const *p;
  const float *const *grad;
  float *const *m, *const *v;
  const float *kept;                /* 1 - learning rate × weight decay, for each array */
  float beta1, rest1, beta2, rest2; /* rest: 1 - beta, too inexact in float32 */
  float rate, eps;
} AdamW;

static void adamw_task(const void *arguments, Int i, Int chunks) {
  (void)chunks;
  const AdamW *a = arguments;
  Int first, array = find_chunk(i, a->sizes, &first), size = min(CHUNK, a->sizes[array] - first);
  float *restrict p = a->p[array] + first;
  float *restrict m = a->m[array] + first;
  float *restrict v = a->v[array] + first;
  const float *restrict grad = a->grad[array] + first;
  AdamW h = *a;
  float kept = a->kept[array];
  for (Int j = 0; j < size; j++) {
    m[j] = h.beta1 * m[j] + h.rest1 * grad[j];
    v[j] = h.beta2 * v[j] + h.rest2 * grad[j] * grad[j];
    p[j] = kept * p[j] - h.rate * m[j] / (sqrtf(v[j]) + h.eps);
  }
}

int adamw_update(const AdamW *a) {
  return run_parts(adamw_task, a, count_chunks(a->count, a->sizes));
}
