/* A handful of threads that wait for work.

   Only microseconds pass between two tasks of a training step, and waking a sleeping thread takes
   longer than that. So a thread without work looks for more for a moment before it falls asleep. */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define MOST_THREADS 256
#define PATIENCE 200e-6 /* seconds that a thread without work stays awake */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the variables below */
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static Int threads = 1; /* how many may work, the caller's included */
static Int started = 0; /* how many were started */
static Int helping = 0; /* how many are in the task now */
static Int asleep = 0;  /* how many wait to be woken */
static Task task;       /* NULL while none is open */
static const void *arguments;
static Int parts;
static atomic_llong taken[MOST_THREADS]; /* how many of each thread's own parts anyone has taken */
static atomic_llong tasks_opened; /* read without the lock, by threads that are still awake */

static pthread_mutex_t one_task = PTHREAD_MUTEX_INITIALIZER; /* held from opening to closing */
static _Thread_local int within = 0;                         /* this thread is in a part */

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Do this thread's own parts, then what is left of the others'. A thread's own parts are the same
   rows in every task, and so are still in its core's cache. */
static void do_parts(Task task, const void *arguments, Int parts, Int sharers, Int me) {
  within = 1;
  for (Int turn = 0; turn < sharers; turn++) {
    Int owner = (me + turn) % sharers, first, end = cut(parts, sharers, 1, owner, &first);
    for (Int i; (i = first + atomic_fetch_add(&taken[owner], 1)) < end;) task(arguments, i, parts);
  }
  within = 0;
}

static void *help(void *number) {
  Int me = (intptr_t)number, seen = 0;
  for (;;) {
    for (double start = seconds(); atomic_load(&tasks_opened) == seen;)
      if (seconds() - start > PATIENCE) break;
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
      do_parts(mine, its_arguments, its_parts, sharers, me);
      pthread_mutex_lock(&lock);
      helping--;
    }
    pthread_mutex_unlock(&lock);
  }
  return NULL;
}

static void one_after_another(Task task, const void *arguments, Int parts) {
  for (Int i = 0; i < parts; i++) task(arguments, i, parts);
}

void run_parts(Task new_task, const void *new_arguments, Int new_parts) {
  /* Within a part, or while another caller's task runs, do all parts on this thread. */
  if (new_parts <= 1 || threads <= 1 || within || pthread_mutex_trylock(&one_task)) {
    one_after_another(new_task, new_arguments, new_parts);
    return;
  }
  pthread_mutex_lock(&lock);
  task = new_task, arguments = new_arguments, parts = new_parts;
  for (Int i = 0; i < threads; i++) atomic_store(&taken[i], 0);
  atomic_fetch_add(&tasks_opened, 1);
  if (asleep) pthread_cond_broadcast(&opened);
  pthread_mutex_unlock(&lock);
  do_parts(new_task, new_arguments, new_parts, threads, 0);
  pthread_mutex_lock(&lock);
  task = NULL; /* closed: nobody joins any more */
  while (helping) {
    pthread_mutex_unlock(&lock);
    sched_yield();
    pthread_mutex_lock(&lock);
  }
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&one_task);
}

Int thread_count(void) { return threads; }

/* A forked child has none of its parent's threads. */
static void forget_threads(void) {
  pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t unsignalled = PTHREAD_COND_INITIALIZER;
  lock = one_task = unlocked, opened = unsignalled;
  threads = 1, started = helping = asleep = 0, task = NULL;
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
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&one_task);
  return threads;
}

Int cut(Int n, Int parts, Int step, Int i, Int *first) {
  Int size = round_up((n + parts - 1) / parts, step);
  *first = min(i * size, n);
  return min(*first + size, n);
}

typedef struct {
  float *memory[SCRATCHES];
  Int room[SCRATCHES];
} Scratches;

static pthread_key_t scratches_key; /* each thread has its own, freed when it ends */
static pthread_once_t key_made = PTHREAD_ONCE_INIT;

static void free_scratches(void *of_thread) {
  Scratches *s = of_thread;
  for (int i = 0; i < SCRATCHES; i++) free(s->memory[i]);
  free(s);
}

static void make_key(void) {
  if (pthread_key_create(&scratches_key, free_scratches)) abort();
}

float *scratch(int purpose, Int count) {
  pthread_once(&key_made, make_key);
  Scratches *s = pthread_getspecific(scratches_key);
  if (!s) {
    s = calloc(1, sizeof *s);
    if (!s || pthread_setspecific(scratches_key, s)) abort();
  }
  if (count > s->room[purpose]) {
    free(s->memory[purpose]);
    s->room[purpose] = round_up(count, 16);
    if (posix_memalign((void **)&s->memory[purpose], 64, s->room[purpose] * sizeof(float))) abort();
  }
  return s->memory[purpose];
}
