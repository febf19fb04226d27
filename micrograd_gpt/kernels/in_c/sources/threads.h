/* Threads that share the parts of a task; see threads.c. */

#pragma once
#include "vectors.h"

typedef void (*Task)(const void *arguments, Int part, Int parts);

/* Call task(arguments, part, parts) for part 0 … parts - 1, on all threads; returns once all ended.
   Which thread does which part is left to chance, so each part must write to places of its own. */
void run_parts(Task task, const void *arguments, Int parts);

/* How many threads there are, the caller's included. */
Int thread_count(void);

/* Part i of 0 … n - 1 cut into `parts`, each a multiple of `step` long except at the end. The part
   starts at *first and ends before the result. */
Int cut(Int n, Int parts, Int step, Int i, Int *first);

/* This thread's own memory for one purpose (0 … SCRATCHES - 1): room for `count` floats, aligned to
   64 bytes. It is not cleared: it holds whatever the last use left there. */
float *scratch(int purpose, Int count);
#define SCRATCHES 10
