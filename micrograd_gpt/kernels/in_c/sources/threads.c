/* A handful of threads that wait for work.

   Only microseconds pass between two tasks of a training step, and waking a sleeping thread takes
   longer than that. So a thread without work looks for more for a moment before it falls asleep.
   Where there are fewer cores than threads it falls asleep at once: awake, it would keep a core
   from those that have work. */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define PATIENCE 200e-6 /* seconds that a thread without work stays awake */
#define CACHE_LINE 64 /* bytes */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the variables below */
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static pthread_cond_t left = PTHREAD_COND_INITIALIZER; /* nobody helps any more */
static _Atomic Int threads = 1; /* how many may work, the caller's included */
static Int started = 0; /* how many were started */
static Int helping = 0; /* how many are in the task now */
static Int asleep = 0;  /* how many wait to be woken */
static Task task;       /* NULL while none is open */
static const void *arguments;
static Int parts;
static int failed; /* a helper lacked memory for the task */
static atomic_int each_has_a_core; /* there are no more threads than cores */
static atomic_llong taken[MOST_THREADS]; /* how many of each thread's own parts anyone has taken */
static atomic_llong tasks_opened; /* read without the lock, by threads that are still awake */

static pthread_mutex_t one_task = PTHREAD_MUTEX_INITIALIZER; /* held from opening to closing */

/* What each thread has of its own, freed when it ends. It is not _Thread_local: where a thread has
   no memory for such variables, the system ends the process. */
typedef struct {
  int within;       /* the thread is in a part */
  int lacks_memory; /* scratch() failed in a part of it */
  float *memory[SCRATCHES];
  Int room[SCRATCHES];
} Own;

static pthread_key_t own_key;
static int has_key;
static pthread_once_t key_made = PTHREAD_ONCE_INIT;

/* Memory that begins at a cache line, or NULL. */
#ifdef _WIN32
static void *allocate_aligned(Int bytes) { return _aligned_malloc(bytes, CACHE_LINE); }
static void free_aligned(void *memory) { _aligned_free(memory); }
#else
static void *allocate_aligned(Int bytes) {
  void *memory = NULL;
  return posix_memalign(&memory, CACHE_LINE, bytes) ? NULL : memory;
}
static void free_aligned(void *memory) { free(memory); }
#endif

static void free_own(void *of_thread) {
  Own *own = of_thread;
  for (int i = 0; i < SCRATCHES; i++) free_aligned(own->memory[i]);
  free(own);
}

static void make_key(void) { has_key = !pthread_key_create(&own_key, free_own); }

/* What this thread has of its own, or NULL where there is no memory for it. */
static Own *get_own(void) {
  pthread_once(&key_made, make_key);
  Own *own = has_key ? pthread_getspecific(own_key) : NULL;
  if (own || !has_key) return own;
  own = calloc(1, sizeof *own);
  if (own && pthread_setspecific(own_key, own)) {
    free(own);
    return NULL;
  }
  return own;
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* The outcome of the parts that this thread did. */
static int outcome_of(Own *own) {
  int lacked = own->lacks_memory;
  if (!own->within) own->lacks_memory = 0; /* else the part that this is within reports it, too */
  return lacked ? OUT_OF_MEMORY : DONE;
}

/* Do this thread's own parts, then what is left of the others'. A thread's own parts are the same
   rows in every task, and so are still in its core's cache. */
static int do_parts(Own *own, Task task, const void *arguments, Int parts, Int sharers, Int me) {
  own->within = 1;
  for (Int turn = 0; turn < sharers; turn++) {
    Int owner = (me + turn) % sharers, first, end = cut(parts, sharers, 1, owner, &first);
    for (Int i; (i = first + atomic_fetch_add(&taken[owner], 1)) < end;) task(arguments, i, parts);
  }
  own->within = 0;
  return outcome_of(own);
}

/* Wait awake until a task is opened after number `seen`, or for PATIENCE. Another thread that wants
   the core gets it at once, and meanwhile our patience ends. */
static void look_for_work(Int seen) {
  double start = seconds();
  while (atomic_load(&tasks_opened) == seen && seconds() - start < PATIENCE) sched_yield();
}

static void *help(void *number) {
  Int me = (intptr_t)number, seen = 0;
  Own *own = get_own();
  while (own) { /* without it the others do all parts */
    if (each_has_a_core) look_for_work(seen);
    pthread_mutex_lock(&lock);
    asleep++;
    while (atomic_load(&tasks_opened) == seen) pthread_cond_wait(&opened, &lock);
    asleep--;
    seen = atomic_load(&tasks_opened);
    if (task && me < threads) { /* the task may be closed again already */
      Task mine = task;
      const void *its_arguments = arguments;
      Int its_parts = parts, sharers = threads;
      helping++;
      pthread_mutex_unlock(&lock);
      int outcome = do_parts(own, mine, its_arguments, its_parts, sharers, me);
      pthread_mutex_lock(&lock);
      if (outcome != DONE) failed = 1;
      if (!--helping) pthread_cond_signal(&left);
    }
    pthread_mutex_unlock(&lock);
  }
  return NULL;
}

static int one_after_another(Own *own, Task task, const void *arguments, Int parts) {
  for (Int i = 0; i < parts; i++) task(arguments, i, parts);
  return outcome_of(own);
}

/* Returns once nobody is in the task any more, with the lock held, as it is called. */
static void wait_for_helpers(void) {
  for (double start = seconds(); helping && seconds() - start < PATIENCE;) {
    pthread_mutex_unlock(&lock);
    sched_yield();
    pthread_mutex_lock(&lock);
  }
  while (helping) pthread_cond_wait(&left, &lock);
}

int run_parts(Task new_task, const void *new_arguments, Int new_parts) {
  Own *own = get_own();
  if (!own) return OUT_OF_MEMORY;
  /* Within a part, or while another caller's task runs, do all parts on this thread. */
  if (new_parts <= 1 || threads <= 1 || own->within || pthread_mutex_trylock(&one_task))
    return one_after_another(own, new_task, new_arguments, new_parts);
  pthread_mutex_lock(&lock);
  task = new_task, arguments = new_arguments, parts = new_parts, failed = 0;
  for (Int i = 0; i < threads; i++) atomic_store(&taken[i], 0);
  atomic_fetch_add(&tasks_opened, 1);
  if (asleep) pthread_cond_broadcast(&opened);
  pthread_mutex_unlock(&lock);
  int outcome = do_parts(own, new_task, new_arguments, new_parts, threads, 0);
  pthread_mutex_lock(&lock);
  task = NULL; /* closed: nobody joins any more */
  wait_for_helpers();
  if (failed) outcome = OUT_OF_MEMORY;
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&one_task);
  return outcome;
}

Int thread_count(void) { return threads; }

/* A forked child has none of its parent's threads. */
static void forget_threads(void) {
  pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t unsignalled = PTHREAD_COND_INITIALIZER;
  lock = one_task = unlocked, opened = left = unsignalled;
  started = helping = asleep = 0, task = NULL;
  atomic_store(&threads, 1);
}

/* Use `count` threads from now on, the caller's included. Returns how many there are. */
Int use_threads(Int count) {
  static int prepared = 0;
  pthread_mutex_lock(&one_task);
  pthread_mutex_lock(&lock);
  if (!prepared) prepared = !pthread_atfork(NULL, NULL, forget_threads);
  for (; started < min(count, MOST_THREADS) - 1; started++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(started + 1))) break;
    pthread_detach(thread);
  }
  threads = min(count, started + 1);
  atomic_store(&each_has_a_core, threads <= cores_available());
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&one_task);
  return threads;
}

/* The same, but at most one thread for each core that this process may use. */
Int use_cores(Int count) { return use_threads(min(count, cores_available())); }

Int cut(Int n, Int parts, Int step, Int i, Int *first) {
  Int size = round_up((n + parts - 1) / parts, step);
  *first = min(i * size, n);
  return min(*first + size, n);
}

/* Replace a scratch by a larger one. What it holds need not be kept, so the old one goes first. */
static void enlarge(Own *own, int purpose, Int count) {
  Int room = round_up(count + 1, 16); /* a part may be empty: then 0, too, is a success */
  free_aligned(own->memory[purpose]);
  own->memory[purpose] = allocate_aligned(room * sizeof(float));
  own->room[purpose] = own->memory[purpose] ? room : 0;
}

float *scratch(int purpose, Int count) {
  Own *own = get_own();
  if (!own) return NULL; /* never: run_parts has got it */
  if (!own->memory[purpose] || count > own->room[purpose]) enlarge(own, purpose, count);
  if (!own->memory[purpose]) own->lacks_memory = 1;
  return own->memory[purpose];
}
