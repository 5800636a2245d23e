/* Which tokens are recomputed: the table every selector fills, and the budget all of them keep.
 *
 * A selector scores context rows (or not) and chooses the set S under a budget.  Eligible are the
 * rows of chunks 1 .. n-1: chunk 0 saw its true past already.  S is ascending and the same on every
 * rank.  A selector may run layers; one that changes the cache (`cacheblend`, in its check layer)
 * says in which layer.  Source: algorithm 1.4, 1.5, 5.1, 5.2. */
#ifndef IFKV_SRC_SELECT_H
#define IFKV_SRC_SELECT_H

#include "geometry.h"
#include "layer.h"
#include "placement.h"

enum { IFKV_MAX_SCORE_LAYER = 512 };

typedef struct ifkv_selector ifkv_selector;

/* What a selector may look at.  All borrowed for the selector's life. */
typedef struct ifkv_select_input {
    ifkv_backend *backend;
    ifkv_comm *comm; /* for host memory */
    ifkv_comm *data; /* for back-end memory */
    const ifkv_model *model;
    const double *frequency; /* of rope.h */
    const ifkv_placement *placement;
    const ifkv_kvcache *cache;
    int64_t n_question;
    const int32_t *question;
    const int32_t *token; /* [kept rows] ids of this rank's rows, in shard order */
    int64_t budget;       /* k = |S| */
    uint64_t seed;
    int64_t epic_k;         /* of `epic`: rows at the head of each chunk */
    int check_layer;        /* of `cacheblend`: 1, or 0 where nothing can deviate */
    ifkv_geometry geometry; /* positions while scoring */
    bool is_unrotated;      /* K of the cache are still before RoPE */
    bool excludes_none;     /* chunk 0 is eligible like any other */
    bool is_local;          /* question rows see this rank's shard and themselves only */
    bool has_sink;          /* and where is_local, on a rank without chunk 0, the prefix */
    ifkv_score_form form;
    int n_score_layer;
    int score_layer[IFKV_MAX_SCORE_LAYER]; /* ascending */
    ifkv_progress_fn progress;             /* may be NULL */
    void *progress_arg;
    bool is_riding; /* the scoring rows ride through encode: the selector has no pass of its own */
} ifkv_select_input;

typedef struct ifkv_select_ops {
    const char *name;
    size_t struct_bytes;
    bool has_scores;
    bool is_question_scored; /* scores come from the question's attention in score_layer */
    /* Rows the method recomputes for a ratio of num / den; the input's budget is not set yet. */
    int64_t (*budget)(const ifkv_select_input *input, int64_t num, int64_t den);
    ifkv_status (*init)(ifkv_selector *selector);
    void (*fini)(ifkv_selector *selector);
    void (*layout)(ifkv_selector *selector,
                   ifkv_arena *arena); /* Local; runs twice (see arena.h) */
    /* Fill score [n_context], in index order, on every rank; finite and >= 0.  Collective.  For
     * rows that rode, after the last layer of encode, before anything else uses its memory. */
    ifkv_status (*score)(ifkv_selector *selector, float *score);
    /* Ride through encode (algorithm 1.4): the scoring rows are rows [first, first + n_question) of
     * the pass, begun by the caller, at the positions of GLOBAL.  NULL, all three: no row of this
     * selector can ride.  Before the first layer, Local; */
    ifkv_status (*ride_begin)(ifkv_selector *selector, ifkv_pass *pass, int64_t first);
    /*   what becomes of the rows in a layer, Local; */
    ifkv_layer_part (*ride_part)(ifkv_selector *selector, int layer);
    /*   when that layer has run, Local.  What the ranks can still agree on is kept for `score`;
     * that peers are gone, which the device may tell here first, is returned. */
    ifkv_status (*ride_layer)(ifkv_selector *selector, int layer);
    /* Write the budget's rows, ascending.  The same on every rank; Local. */
    ifkv_status (*choose)(ifkv_selector *selector, const float *score, int64_t *selected);
    const char *explain; /* one sentence for help texts */
} ifkv_select_ops;

struct ifkv_selector {
    const ifkv_select_ops *ops;
    ifkv_select_input input;
    int rewritten_layer; /* whose K/V scoring replaced in every shard, the same on all ranks; -1 */
};

/* NULL if there is no selector of that name. */
const ifkv_select_ops *ifkv_select_find(const char *name);
ifkv_status ifkv_selector_create(const ifkv_select_ops *ops, const ifkv_select_input *input,
                                 ifkv_selector **selector_p);
void ifkv_selector_destroy(ifkv_selector *selector);

/* First eligible index: the end of chunk 0, or of document 0 behind a prefix chunk. */
int64_t ifkv_select_first(const ifkv_placement *placement);
/* The same of an input, which may exclude nothing. */
int64_t ifkv_select_first_eligible(const ifkv_select_input *input);

/* Read an exact decimal in [0, 1] as num / den; den is a power of ten up to 10^15.  Errors: USAGE.
 */
ifkv_status ifkv_ratio_parse(const char *text, int64_t *num_p, int64_t *den_p);
/* min(max(1, floor(num * n_context / den)), n_eligible), 0 for a ratio of 0; in integers. */
int64_t ifkv_select_by_ratio(int64_t num, int64_t den, int64_t n_context, int64_t n_eligible);
/* The same of the input's placement: what most selectors' budget is. */
int64_t ifkv_select_ratio_budget(const ifkv_select_input *input, int64_t num, int64_t den);

/* Read "published", "wide" (NULL) or an ascending comma list into input->score_layer
 * (algorithm 1.4, 5.2). Errors: USAGE. */
ifkv_status ifkv_score_layers_parse(const char *text, int n_layer, ifkv_select_input *input);
ifkv_status ifkv_score_form_parse(const char *text, ifkv_score_form *form_p);

/* For members of the table that have nothing to do at that point. */
ifkv_status ifkv_select_init_nothing(ifkv_selector *selector);
void ifkv_select_fini_nothing(ifkv_selector *selector);
void ifkv_select_layout_nothing(ifkv_selector *selector, ifkv_arena *arena);
ifkv_status ifkv_select_no_score(ifkv_selector *selector, float *score);

/* Scores on their way from this rank's shard to a selection; part of a selector that has scores. */
typedef struct ifkv_scores {
    float *gathered;        /* [n_context] host, owned: rank-major */
    size_t *bytes, *offset; /* [size] host, owned: messages */

    /* Back-end memory. */
    float *own;       /* [kept rows] in shard order */
    float *value;     /* [n_context] */
    int64_t *scratch; /* [n_context] */
    int64_t *chosen;  /* [budget] */
} ifkv_scores;

ifkv_status ifkv_scores_init(ifkv_scores *scores, const ifkv_select_input *input);
void ifkv_scores_fini(ifkv_scores *scores);
/* What scoring needs; what choosing, which comes later, needs. */
void ifkv_scores_layout(ifkv_scores *scores, const ifkv_select_input *input, ifkv_arena *arena);
void ifkv_scores_layout_best(ifkv_scores *scores, const ifkv_select_input *input,
                             ifkv_arena *arena);
/* Set own to zero.  Local. */
ifkv_status ifkv_scores_clear(ifkv_scores *scores, const ifkv_select_input *input);
/* Refuse a score of this rank that is not finite and >= 0, naming its row and `layer`.  Local: the
 * caller agrees. Errors: NUMERIC. */
ifkv_status ifkv_scores_check(ifkv_scores *scores, const ifkv_select_input *input, int layer);
/* Put the ranks' scores together: score [n_context] host, in index order.  Collective. */
ifkv_status ifkv_scores_gather(ifkv_scores *scores, const ifkv_select_input *input, float *score);
/* The budget's best eligible rows, ascending: score descending, ties to the lower index.  Local. */
ifkv_status ifkv_scores_best(ifkv_scores *scores, const ifkv_select_input *input,
                             const float *score, int64_t *selected);

extern const ifkv_select_ops ifkv_select_infoflow_ops, ifkv_select_none_ops, ifkv_select_all_ops,
    ifkv_select_random_ops, ifkv_select_epic_ops, ifkv_select_epic_budget_ops,
    ifkv_select_cacheblend_ops;

/* Names of all methods as messages list them. */
#define IFKV_METHOD_NAMES                                                                          \
    "infoflow, none, all, random, epic, epic_budget, cacheblend, full, ring, allgather or auto"

#endif
