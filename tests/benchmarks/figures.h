/* What the loads have in common: clocks, the times of round trips, the figures that are printed, the end by an error. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { SAMPLES_MAX = 4000000 };

static float samples[SAMPLES_MAX]; /* microseconds that a round trip took */
static long sample_count;

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "nothing came");
    exit(1);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void sample(double seconds) {
    if (sample_count < SAMPLES_MAX) samples[sample_count++] = seconds * 1e6;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double quantile(double share) { return samples[(long)(share * (sample_count - 1))]; }

/* Print what the load came to, as JSON. */
static void report(double requests, double wall, double cpu) {
    printf("{\"requests\": %.6f, \"wall_s\": %.6f, \"load_s\": %.6f", requests, wall, cpu);
    if (sample_count) {
        qsort(samples, sample_count, sizeof *samples, ascending);
        printf(", \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f", quantile(0.5), quantile(0.99), quantile(1));
    }
    puts("}"), fflush(stdout);
}
