/* Awkward requests to tiny models and what their runs are compared with, for the programs about the
 * whole pipeline: one process, random weights, ranks as threads.
 *
 * Owns the cases of a group: a chunk of one token, fewer chunks than ranks, one chunk, no prefix, a
 * prompt of one token, a question that is not the prompt. */
#ifndef IFKV_TESTS_PIPELINE_H
#define IFKV_TESTS_PIPELINE_H

#include "tiny.h"

enum { N_CASE = 4 };
/* large: several tiles of rows, several blocks of keys, units of 64 on 2 ranks, 2 blocks of tail
 * rows. */
extern tiny_case cases[N_CASE], large;
extern uint64_t seed; /* of the group's draws; tiny_seed, before the group begins */
extern char *dir;     /* where models lie */

/* cmocka setup and teardown of a group. */
int make_cases(void **state);
int free_cases(void **state);

/* Rows [0, end) on which full prefill and a run must agree, and the logits if these are all. */
void assert_equals_full(const tiny_run *got, const tiny_run *full, int64_t end);
/* The one-rank answer, each token checked against a prefill whose prompt holds the tokens before
 * it.  Returns how many leading tokens are clear enough to be demanded of others. */
int64_t check_answer(const tiny_case *it, const char *method, const tiny_run *one);

#endif
