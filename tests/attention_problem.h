/* One attention problem of a test: operands and results in back-end memory, spans on the host.
 *
 * Owns all of them.  How they are filled and what is expected of them is the test's business. */
#ifndef IFKV_TESTS_ATTENTION_PROBLEM_H
#define IFKV_TESTS_ATTENTION_PROBLEM_H

#include "gen.h"

typedef struct heads {
    int n_head, n_kv_head, d_head;
} heads;

typedef struct problem {
    heads h;
    int64_t n_row, n_key;
    gen_matrix q, k, v, out, lse;
    int64_t *begin, *end; /* owns, host */
} problem;

/* The operands with a scale of 1 / sqrt(d_head); begin and end are the caller's to set. */
ifkv_attention_args problem_args(const problem *p);
/* Operands of rows [row, row + n), into the same rows of the results, with a copy of their spans in
 * back-end memory that problem_read releases. */
ifkv_attention_args problem_rows(const problem *p, int64_t row, int64_t n);
/* After these rows were attended and waited for: fetch the results, whose fences must be whole. */
void problem_read(problem *p, const ifkv_attention_args *rows);
void problem_destroy(problem *p);

#endif
