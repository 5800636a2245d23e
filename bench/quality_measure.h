/* One request, many configurations: what each costs against full prefill.
 *
 * Owns two snapshots of the context's K and V, of full prefill and of the chunks as encoded, so
 * that a configuration pays for its own stages only; full prefill's log-probabilities over the
 * forced answers; and the scores of single layers, where a configuration combines them itself.
 * Refuses to know files.  One rank.  Forced tokens are appended to the prompt, so that one prompt
 * pass yields all their logits; all sums are in float64. */
#ifndef IFKV_BENCH_QUALITY_MEASURE_H
#define IFKV_BENCH_QUALITY_MEASURE_H

#include "prefill.h"
#include "quality_config.h"

/* Tokens that are forced on every method, and how probable full prefill finds every token of the
 * vocabulary at each of them. */
typedef struct quality_forced {
    int64_t n;
    int32_t *token; /* [n] */
    double *log_p;  /* [n, n_vocab] natural log */
} quality_forced;

typedef struct quality_case {
    ifkv_engine *engine;         /* borrowed */
    const ifkv_request *request; /* borrowed */
    ifkv_request planned;        /* the request with room for forced tokens behind its prompt */
    int32_t *prompt;             /* [planned.n_prompt] */
    int64_t n_prompt, max_answer, chunk, n_context, n_col, n_vocab;
    int n_layer;
    float *full, *encoded; /* [2, n_layer, n_context, n_col]: K, then V */
    quality_forced greedy,
        gold;      /* full prefill's own answer with its end-of-turn id; gold.n may be 0 */
    double *log_q; /* [longest of both, n_vocab] of the configuration at hand */
    double encode_ms, full_ms;
    float *layer_score[2]; /* [n_layer, n_context] of encoded and full K/V; NULL until asked for */
} quality_case;

typedef struct quality_result {
    int64_t n_selected, n_answer;
    uint64_t selected_digest;
    double kl_first, kl_greedy, nll_greedy; /* nats; mean over the answer's tokens */
    double kl_gold, nll_gold;               /* NaN without a gold answer */
    double *k_error, *v_error;              /* [n_layer] relative L2 over all context rows; owned */
    double stale_error[2], fresh_error[2];  /* K, V: mean over layers of the selected rows' error as
                                               encoded, and at the end */
    int32_t *answer;                        /* [n_answer] owned; NULL unless asked for */
    double score_ms, recompute_ms, prompt_ms, decode_ms;
} quality_result;

/* Run full prefill and encode once, or read both from the file `snapshot`, which is written where
 * it is not there; NULL: no file.  chunk: as in ifkv_prefill_options.  The caller closes. */
ifkv_status quality_open(ifkv_engine *engine, const ifkv_request *request, int64_t chunk,
                         int64_t max_answer, const int32_t *gold, int64_t n_gold,
                         const char *snapshot, quality_case *made);
void quality_close(quality_case *it);
/* What quality_open runs, to a file and back; a file that is not there loads nothing.  A file
 * belongs to one model, request, chunking, gold answer and max_answer: the caller keeps them apart.
 */
ifkv_status quality_snapshot_save(const char *path, quality_case *it);
ifkv_status quality_snapshot_load(const char *path, quality_case *it, bool *is_loaded_p);
/* Measure one configuration.  Release with quality_result_fini. */
ifkv_status quality_measure(quality_case *it, const quality_config *config, quality_result *result);
void quality_result_fini(quality_result *result);

/* Scores of every single layer (algorithm 1.4, l2, question rows) over a snapshot:
 * [n_layer, n_context], borrowed; computed at the first call. */
ifkv_status quality_layer_scores(quality_case *it, bool of_full, const float **score_p);
/* The rows that a "combine" configuration selects, ascending.  The caller frees *selected_p. */
ifkv_status quality_combine(quality_case *it, const quality_config *config, int64_t **selected_p,
                            int64_t *n_p);

/* Open a session over a snapshot, or over nothing (NULL), with the stages still to be run. */
ifkv_status quality_session(quality_case *it, const ifkv_prefill_options *options,
                            const float *snapshot, bool has_question, ifkv_session **session_p);
const float *quality_rows(const quality_case *it, const float *snapshot, bool is_v, int layer);

/* sum p (log p - log q) of two rows of n log-probabilities. */
double quality_kl(const double *log_p, const double *log_q, int64_t n);
void quality_log_softmax(const float *logits, int64_t n, double *log_p);

#endif
