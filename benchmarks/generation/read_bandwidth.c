/* How fast memory can be read: each thread sums a buffer of its own, far larger than any cache.

   The buffer is read as several streams at once, since one stream keeps too few requests in flight to fill the
   bus; which number of streams is best differs from machine to machine, so 1, 2, 4, 8 and 16 are tried. Threads
   start each pass together, at a barrier, and the pass ends with the last of them.

   read_bandwidth THREADS MIB_A_THREAD PASSES  ->  a line for each number of streams: streams, best bytes a second. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t line __attribute__((vector_size(64)));

static size_t lines;
static int passes;
static pthread_barrier_t gate;
static volatile uint64_t sink;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec * 1e-9;
}

#define READ(STREAMS)                                                    \
    static line read_##STREAMS(const line *from) {                       \
        const size_t each = lines / STREAMS;                             \
        line sum[STREAMS];                                               \
        memset(sum, 0, sizeof sum);                                      \
        for (size_t i = 0; i < each; i++)                                \
            for (int s = 0; s < STREAMS; s++) sum[s] += from[s * each + i]; \
        for (int s = 1; s < STREAMS; s++) sum[0] += sum[s];              \
        return sum[0];                                                   \
    }
READ(1) READ(2) READ(4) READ(8) READ(16)

static line (*const readers[])(const line *) = {read_1, read_2, read_4, read_8, read_16};
#define READERS (sizeof readers / sizeof *readers)
static double best[READERS];

static void *work(void *number) {
    const int first = *(int *)number == 0;
    line *mine = mmap(NULL, lines * sizeof(line), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mine == MAP_FAILED) {
        perror("read_bandwidth: mmap");
        exit(1);
    }
#ifdef MADV_HUGEPAGE
    madvise(mine, lines * sizeof(line), MADV_HUGEPAGE);
#endif
    memset(mine, 1, lines * sizeof(line));
    for (int pass = 0; pass < passes; pass++)
        for (size_t r = 0; r < READERS; r++) {
            pthread_barrier_wait(&gate);
            const double began = now();
            const line found = readers[r](mine);
            sink += found[0] ^ found[7];
            pthread_barrier_wait(&gate);
            const double took = now() - began;
            if (first && (best[r] == 0 || took < best[r])) best[r] = took;
        }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "read_bandwidth: expected THREADS MIB_A_THREAD PASSES\n");
        return 2;
    }
    const int threads = atoi(argv[1]);
    lines = (size_t)atoi(argv[2]) * 1024 * 1024 / sizeof(line);
    passes = atoi(argv[3]);
    pthread_t *all = malloc(threads * sizeof *all);
    int *numbers = malloc(threads * sizeof *numbers);
    pthread_barrier_init(&gate, NULL, threads);
    for (int t = 0; t < threads; t++) {
        numbers[t] = t;
        if (pthread_create(&all[t], NULL, work, &numbers[t])) {
            fprintf(stderr, "read_bandwidth: no thread %d\n", t);
            return 1;
        }
    }
    for (int t = 0; t < threads; t++) pthread_join(all[t], NULL);
    for (size_t r = 0; r < READERS; r++)
        printf("%d %.0f\n", 1 << r, (double)threads * lines * sizeof(line) / best[r]);
    return 0;
}
