/* The loop of a quality run over requests and configurations, and the line each pair becomes.
 *
 * Owns the order (requests as in the file, configurations as in theirs), the resume rule and the
 * output format (bench/README.md).  A line is written whole and flushed before the next pair. */
#ifndef IFKV_BENCH_QUALITY_LOOP_H
#define IFKV_BENCH_QUALITY_LOOP_H

#include "ifkv.h"

typedef struct quality_options {
    const char *requests, *gold, *configs, *out; /* paths; gold may be NULL */
    const char *scores;    /* directory for raw float32 [n_layer, n_context] files, or NULL */
    const char *snapshots; /* directory for quality_open's snapshots, or NULL */
    int parity;            /* 0: even positions in the request file, 1: odd ones, -1: all */
    int64_t limit;         /* requests at most, after parity; 0: all */
    int64_t chunk, max_answer;
} quality_options;

/* Measure every pair that is not in options->out yet and append its line.  *n_made_p: lines added
 * by this call. */
ifkv_status quality_loop(ifkv_engine *engine, const quality_options *options, int64_t *n_made_p);

#endif
