/* Tiny models, awkward requests and whole prefills of them, for tests of the pipeline.
 *
 * Owns directories with nothing but a config.json (weights are drawn), seeded token ids, and a
 * runner that opens an engine on every rank of a "thread" communicator, fills its memory with NaN,
 * prefills, and collects what must not depend on the number of ranks.  Rank threads return a
 * status; the main thread asserts. */
#ifndef IFKV_TESTS_TINY_H
#define IFKV_TESTS_TINY_H

#include "test.h"

/* algorithm section 8: fp32 CPU path, relative L2 per tensor */
#define TINY_TOLERANCE 2e-5

typedef struct tiny_shape {
    const char *name, *family;
    int n_layer, d_model, n_head, n_kv_head, d_head, d_ff, n_vocab;
    bool is_tied;
} tiny_shape;

/* Both families, d_head 64 and 128, 1, 3 and 5 query heads a K/V head, tied and untied, 3 to 6
 * layers; n_head * d_head never equals d_model. */
enum { TINY_N_SHAPE = 4 };
extern const tiny_shape tiny_shapes[TINY_N_SHAPE];

/* Make dir/<name>/config.json with the given end-of-turn id (-1: none).  The caller frees the path.
 */
char *tiny_model(const char *dir, const tiny_shape *shape, int eos);

/* IFKV_TEST_SEED or the time; printed once by each program. */
uint64_t tiny_seed(void);
/* The next number of a seeded sequence, below `limit`; state advances. */
int64_t tiny_below(uint64_t *state, int64_t limit);

typedef struct tiny_request {
    ifkv_request request; /* views the arrays below */
    int32_t *token;       /* owned: prefix, chunks, prompt, question */
    int64_t *offset;      /* owned */
    int64_t n_context;
} tiny_request;

/* Random ids below n_vocab in these lengths; n_question 0 leaves the question out. */
tiny_request tiny_request_make(uint64_t *state, int n_vocab, int64_t n_prefix, int64_t n_chunk,
                               const int64_t *chunk_length, int64_t n_prompt, int64_t n_question);
void tiny_request_fini(tiny_request *request);
/* Index behind the last row of chunk i. */
int64_t tiny_request_end(const tiny_request *request, int64_t chunk);

/* The same with its chunks in another order: place i has chunk order[i].  Release it likewise. */
tiny_request tiny_request_permute(const tiny_request *from, const int64_t *order);

/* A model and a request to it. */
typedef struct tiny_case {
    char *model; /* owned, as the request is */
    const tiny_shape *shape;
    uint64_t weight_seed;
    tiny_request request;
} tiny_case;

/* Make a model of this shape in dir and a request as tiny_request_make does. */
tiny_case tiny_case_make(const char *dir, uint64_t *state, const tiny_shape *shape,
                         int64_t n_prefix, int64_t n_chunk, const int64_t *chunk_length,
                         int64_t n_prompt, int64_t n_question);
void tiny_case_fini(tiny_case *it);
/* About one in `one_in` of the rows that may be selected, ascending.  The caller frees them. */
int64_t *tiny_case_rows(const tiny_case *it, uint64_t *state, int64_t one_in, int64_t *n_p);

/* A store in which nothing is ever found. */
extern const ifkv_store tiny_empty_store;

typedef ifkv_status (*tiny_engine_fn)(ifkv_engine *engine);
typedef ifkv_status (*tiny_session_fn)(ifkv_session *session);
/* Rates under which products are all that takes time: recompute adds to those of encode, unless
 * there are none. */
ifkv_status tiny_slow_products(ifkv_engine *engine);

typedef struct tiny_run {
    /* In. */
    const char *model;   /* directory */
    const char *backend; /* NULL: "cpu" */
    uint64_t weight_seed;
    int n_thread;        /* 0: one */
    uint64_t pool_bytes; /* of every rank */
    const ifkv_request *request;
    ifkv_prefill_options options; /* size may be left 0; scores are always kept */
    tiny_engine_fn before;        /* on every rank, between the engine and the session; or NULL */
    tiny_session_fn after;        /* on every rank, on the open session; or NULL */

    /* Out: as rank 0 has it, owned. */
    int n_layer;
    int64_t n_context, n_col, n_vocab, n_selected, n_answer;
    uint64_t selected_digest;
    float *k, *v;                                   /* [n_layer, n_context, n_col] */
    float *logits;                                  /* [n_vocab] of the first token */
    float *scores;                                  /* [n_context] or NULL */
    int64_t *selected;                              /* [n_selected] */
    int32_t *answer;                                /* [n_answer] */
    int64_t n_hit, n_miss, n_row_hit, n_row_pooled; /* of store and pool */
} tiny_run;

/* A run of this case, to be changed and then run. */
tiny_run tiny_run_of(const tiny_case *it, ifkv_prefill_options options);
/* Prefill and decode on `size` ranks ("self" if 0).  Scores and selection must be the same bits on
 * every rank, or the run fails.  Release with tiny_run_fini. */
ifkv_status tiny_run_on(int size, tiny_run *run);
/* The same n times, one session after the other on one engine, which the first run describes.  What
 * was made before an error stays. */
ifkv_status tiny_runs_on(int size, tiny_run *run, int n);
/* The run of a case on `size` ranks, which must succeed. */
tiny_run tiny_prefill(const tiny_case *it, int size, ifkv_prefill_options options);
void tiny_run_fini(tiny_run *run);

/* |got - want| / |want| in L2; NaN in either gives NaN. */
double tiny_error(const float *got, const float *want, int64_t n);
/* Largest such error over K and V of all layers, rows [first, end). */
double tiny_rows_error(const tiny_run *got, const tiny_run *want, int64_t first, int64_t end);
/* True if K, V of all layers are the same bits. */
bool tiny_same_rows(const tiny_run *got, const tiny_run *want);
/* The same selection, scores and answer, and rows within the tolerance; the same bits of rows and
 * logits where both ran on as many ranks.  Logits of the prompt depend on the dealing of its rows,
 * hence on the number of ranks, in their last bits (I12). */
void tiny_assert_same(const tiny_run *got, const tiny_run *want, bool has_same_size);

/* value <= limit, where NaN is not */
#define assert_within(value, limit)                                                                \
    do {                                                                                           \
        const double value_ = (value), limit_ = (limit);                                           \
        if (!(value_ <= limit_))                                                                   \
            fail_msg("%s: got %.3g, want at most %.3g", #value, value_, limit_);                   \
    } while (0)

#endif
