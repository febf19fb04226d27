/* Threads that share the parts of a task; see threads.c. */

#pragma once
#include "vectors.h"

typedef void (*Task)(const void *arguments, Int part, Int parts);

/* What run_parts and every function that Python calls return. */
enum { DONE, OUT_OF_MEMORY };

/* Call task(arguments, part, parts) for part 0 … parts - 1, on all threads; returns once all ended.
   Which thread does which part is left to chance, so each part must write to places of its own.
   OUT_OF_MEMORY if scratch() failed in a part: the results are then incomplete. */
int run_parts(Task task, const void *arguments, Int parts);

/* How many threads there are, the caller's included. */
Int thread_count(void);
#define MOST_THREADS 256

/* How many cores this process may use, by its affinity and its control group's share of time. */
Int cores_available(void);

/* The bytes of a core's second-level cache, or a guess where the system does not say. */
Int second_level_cache(void);

/* Part i of 0 … n - 1 cut into `parts`, each a multiple of `step` long except at the end. The part
   starts at *first and ends before the result. */
Int cut(Int n, Int parts, Int step, Int i, Int *first);

/* This thread's own memory for one purpose (0 … SCRATCHES - 1): room for `count` floats, aligned to
   64 bytes. It is not cleared: it holds whatever the last use left there. NULL where there is not
   enough memory: the part then returns at once, and run_parts reports it. */
float *scratch(int purpose, Int count);
#define SCRATCHES 13
