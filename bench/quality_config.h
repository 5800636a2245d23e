/* What a quality run is asked: configurations, gold answers, and the pairs that are done already.
 *
 * Owns the three JSON-lines files beside the requests and the rule that one spelling of a
 * configuration is one key: its compact, sorted JSON stands in every result line, and a pair of
 * request id and that text is never measured twice.  Knows nothing of models or K/V. */
#ifndef IFKV_BENCH_QUALITY_CONFIG_H
#define IFKV_BENCH_QUALITY_CONFIG_H

#include <jansson.h>

#include "status.h"

/* One configuration.  Strings are borrowed from `json`; NULL where the method's default holds. */
typedef struct quality_config {
    json_t *json;     /* owned */
    char *text;       /* owned; compact JSON with sorted keys */
    const char *name; /* unique in its file */
    /* Passed on to the library: "infoflow", "none", "all", "random", "full"; or "combine". */
    const char *method, *ratio, *score, *layers;
    const char *rows; /* "question" (default) or "prompt" */
    uint64_t seed;
    const char *geometry; /* "global" (default), "hl-tp", "hl-hp", "tl-tp" */
    const char *hp;       /* of "hl-hp": "shared" (default) or "per_chunk" */
    bool has_refit, has_reorder;
    int64_t epic_k;    /* of method "epic": rows at the head of each chunk; 0: its default */
    bool has_answer;   /* also decode greedily */
    const char *write; /* what S gets: "recompute" (default), or "full": its K/V of full prefill, an
                          oracle that shows what stale keys do to recomputed rows */

    /* method "combine": layers' l2 scores put together outside of the library. */
    const char *source; /* K/V that the question sees: "encoded" (default) or "full", an oracle */
    const char *weight; /* "none" (default); "v", "kv": times the row's true error, an oracle */
    const char *norm;   /* "none" (default); "sum": every layer's scores sum to 1 */
    const char *reduce; /* over layers: "mean" (default) or "max" */
    int64_t block;      /* mean over so many neighbours of a chunk, which then rank as one; 0: 1 */
    int64_t heads;      /* first rows of every chunk that are taken before any score */
} quality_config;

typedef struct quality_config_list {
    quality_config *item; /* [n] */
    int64_t n;
} quality_config_list;

/* Read configurations, one JSON object a line.  Errors: DATA with file and line. */
ifkv_status quality_configs_read(const char *path, quality_config_list *list);
void quality_configs_free(quality_config_list *list);

/* Read {"id", "gold": [token ids]} lines into one object id -> array, owned by the caller. */
ifkv_status quality_gold_read(const char *path, json_t **gold_p);

/* Read a result file as the set of its pairs; a last line without an end is cut off the file, which
 * is how an interrupted run leaves it.  A file that is not there is empty. */
ifkv_status quality_done_read(const char *path, json_t **done_p);
bool quality_done_has(const json_t *done, const char *id, const quality_config *config);

#endif
