/* How many cores this process may use: a container or a batch job often has a part of a machine.
   And how large their caches are. */

#define _GNU_SOURCE /* for sched_getaffinity */
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "threads.h"

/* The cores that the system lets this process run on. */
static Int cores_allowed(void) {
#ifdef __linux__
  cpu_set_t allowed;
  if (!sched_getaffinity(0, sizeof allowed, &allowed)) return CPU_COUNT(&allowed);
#endif
#ifdef _SC_NPROCESSORS_ONLN
  Int online = sysconf(_SC_NPROCESSORS_ONLN);
  if (online > 0) return online;
#endif
  return MOST_THREADS;
}

static double number_in(const char *path) {
  double number = 0;
  FILE *file = fopen(path, "r");
  if (file && fscanf(file, "%lf", &number) != 1) number = 0;
  if (file) fclose(file);
  return number;
}

/* The limit in a file cpu.max: microseconds of work in a period, or "max", and the period. */
static double limit_in(const char *path) {
  double work, period, limit = 0;
  FILE *file = fopen(path, "r");
  if (file && fscanf(file, "%lf %lf", &work, &period) == 2 && period > 0) limit = work / period;
  if (file) fclose(file);
  return limit;
}

/* How many cores' time Linux grants this process's control group; 0 where there is no limit. */
static double time_granted(void) {
  char line[4096], group[4096] = "/", path[4200];
  FILE *file = fopen("/proc/self/cgroup", "r");
  while (file && fgets(line, sizeof line, file)) sscanf(line, "0::%4095[^\n]", group);
  if (file) fclose(file);
  snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", group);
  double limit = limit_in(path);
  if (limit > 0) return limit;
  double work = number_in("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"); /* in version 1; -1: no limit */
  double period = number_in("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  return work > 0 && period > 0 ? work / period : 0;
}

Int cores_available(void) {
  Int allowed = cores_allowed();
  double granted = time_granted();
  return granted > 0 ? min(allowed, (Int)ceil(granted)) : allowed;
}

Int second_level_cache(void) {
  static _Atomic Int cache = 0; /* kept, since asking may take a while */
  if (!cache) {
    Int found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    cache = found > 0 ? found : 512 * 1024;
  }
  return cache;
}
