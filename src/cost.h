/* What a prefill costs: FLOP, bytes and messages of every stage and rank from lengths alone, and
 * the time they take at given rates.
 *
 * Owns the arithmetic of algorithm 3 (bytes of the exchanges) and 9.2 (floors).  Knows no session,
 * back end or communicator: a plan of ranks that do not exist costs as little as one of those that
 * do.  Selected rows are taken to lie evenly over the eligible ones.  Pure functions; the same
 * answer on every rank for the same rates. */
#ifndef IFKV_SRC_COST_H
#define IFKV_SRC_COST_H

#include "config.h"
#include "placement.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ifkv_cost_model {
    const ifkv_config *config; /* borrowed */
    double element_bytes;      /* of weights, activations and K/V */
    double part_bytes; /* of a number of a partial output that `query` sends: 2 in algorithm 3 */
    double score_part_bytes; /* of one that scoring sends: 4 in algorithm 1.4 */
    bool is_whole; /* the first and the last layer run whole, as the floors of 9.2 count; else what
                      nothing reads is left out, as it is when they run */
} ifkv_cost_model;

typedef enum ifkv_cost_way {
    IFKV_COST_QUERY, /* selective, by exchange */
    IFKV_COST_DELTA,
    IFKV_COST_KV,
    IFKV_COST_LOCAL,
    IFKV_COST_EXACT,    /* exact, on one rank */
    IFKV_COST_RING,     /* exact; K/V travel behind attention */
    IFKV_COST_ALLGATHER /* exact; K/V travel before it */
} ifkv_cost_way;

/* By the name of a method or exchange; false if there is none.  "full" is EXACT. */
bool ifkv_cost_way_find(const char *name, ifkv_cost_way *way_p);

typedef struct ifkv_cost_plan {
    const ifkv_placement *placement; /* borrowed: chunks, or slices of an exact way */
    int64_t n_selected, n_question, n_prompt;
    int n_score_layer;     /* layers that the question runs through; 0: nothing is scored */
    const bool *is_loaded; /* [chunks] found in a store, NULL: none; borrowed */
    bool
        has_riders; /* scoring rows in a cold encode and the prompt in recompute: read no weights */
} ifkv_cost_plan;

/* One stage of one rank. */
typedef struct ifkv_cost_work {
    double matmul, attention; /* FLOP */
    double weight_bytes;      /* read at least, however few rows */
    double pass_bytes;        /* of element-wise passes over rows, unfused: read and written */
    double link_bytes;        /* received from other ranks */
    double n_message;         /* received */
    bool is_hidden;           /* messages travel behind attention */
} ifkv_cost_work;

/* The stages from encode to prompt of one rank; the others cost nothing here. */
void ifkv_cost_count(const ifkv_cost_model *model, const ifkv_cost_plan *plan, ifkv_cost_way way,
                     int rank, ifkv_cost_work work[IFKV_N_STAGE]);

/* Received by a rank in one layer (algorithm 3): rows, and keys, dealt evenly. */
typedef struct ifkv_cost_bytes {
    double shared; /* while the context is encoded; of an exact way, while it is prefilled */
    double asked;  /* queries and partial results of a pass */
    double fresh;  /* K and V of the rows of a pass */
} ifkv_cost_bytes;
ifkv_cost_bytes ifkv_cost_exchange(const ifkv_cost_model *model, ifkv_cost_way way, int size,
                                   int64_t n_context, int64_t n_row);

/* Seconds of some work: a product takes its FLOP or the reading of its weights, whichever is
 * longer. A rate of 0 is an infinite one. */
double ifkv_cost_seconds(const ifkv_rates *rates, const ifkv_cost_work *work);
/* Seconds of each stage, of its slowest rank, into stage [IFKV_N_STAGE] (may be NULL); returns
 * their sum. */
double ifkv_cost_time(const ifkv_cost_model *model, const ifkv_cost_plan *plan, ifkv_cost_way way,
                      const ifkv_rates *rates, double *stage);

/* Fit seconds = *message_s_p + bytes / *link_p to n >= 2 messages of different lengths: least
 * squares of errors relative to the times, for the longest would else be all that counts.  Neither
 * comes out negative; a link is never faster than 1e18 bytes/s, which is no link. */
void ifkv_cost_fit_link(int n, const double *bytes, const double *seconds, double *message_s_p,
                        double *link_p);

/* Is the approximation enough faster to be worth it (algorithm 9.4)? */
bool ifkv_cost_takes_infoflow(double exact_ms, double infoflow_ms);

#ifdef __cplusplus
}
#endif
#endif
