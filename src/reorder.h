/* Reorder: independent documents change places, so that those the question attends to most stand
 * nearest to the prompt (algorithm 1.6).
 *
 * The question scores all chunks from equal distance first (HL-TP, nothing excluded).  A document's
 * ratio is the share of its rows among the best; documents are sorted by it, ascending, and the
 * prefix stays in front.  Until then K lies in the shard unrotated, as with a chunk store
 * (reuse.h), and is rotated once, at its last place.  A document stays on its rank: rows move
 * within shards only, nothing but scores crosses ranks, and the prefix is a chunk of its own so
 * that no shard changes its size.  From there on the session is one of the permuted chunk list, and
 * every index means a place in it. */
#ifndef IFKV_SRC_REORDER_H
#define IFKV_SRC_REORDER_H

#include "select.h"

typedef struct ifkv_session ifkv_session;

typedef struct ifkv_reorder {
    bool is_on;
    int64_t n_document;
    int64_t *order;       /* [n_document] the request's chunk in each place; owned */
    int64_t num, den;     /* ratio of the selection */
    ifkv_selector *first; /* the first look; NULL: nothing can change places; owned */
    int64_t *best;        /* [first's budget] owned */
    int64_t *shard_row;   /* [n_document] of a document of this rank before the move; owned */
    int32_t *moved_token; /* [documents' tokens] owned */
    int64_t *from;        /* [n_kept] back-end memory: shard row that each row comes from */
    ifkv_view staged;     /* [n_kept, kv] */
} ifkv_reorder;

/* Read the option: NULL or "off"; "on"; "force", which also takes a context that was cut every so
 * many tokens.  Errors: USAGE. */
ifkv_status ifkv_reorder_check(const ifkv_prefill_options *options, bool *is_on_p);
/* Rows that may be eligible, whichever document comes first. */
int64_t ifkv_reorder_eligible(const ifkv_placement *placement);
/* Plan the first look of a selection of ratio num / den; input is that of the second, whose scores
 * it borrows the memory of.  Called while a session is created. */
ifkv_status ifkv_reorder_plan(ifkv_session *session, const ifkv_select_input *input, int64_t num,
                              int64_t den);
void ifkv_reorder_layout(ifkv_session *session, ifkv_arena *arena);
/* Score, sort, move, rotate.  Collective. */
ifkv_status ifkv_reorder_run(ifkv_session *session);
void ifkv_reorder_fini(ifkv_reorder *reorder);

/* order [n]: documents by chosen[i] / length[i], ascending, equal ratios by number.  Exact: lengths
 * are below 2^31.  Errors: RESOURCE. */
ifkv_status ifkv_reorder_sort(int64_t n, const int64_t *chosen, const int64_t *length,
                              int64_t *order);

#endif
