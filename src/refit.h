/* Rows that are not recomputed follow those that are.
 *
 * In every layer, K and V of the selected rows are known twice: stale, as their chunk alone saw
 * them, and fresh.  An affine map from stale to fresh, fitted on them per K/V head by ridge
 * regression, is applied to every other row of chunks 1 .. n-1 before anybody attends, so that
 * fresh rows and the prompt see better keys at the cost of two small products a row.  K is mapped
 * as it is before rotation.  Chunk 0 stays as it is, and so does everything where nothing is
 * selected.
 *
 * Owns the plan and the order of the steps; the arithmetic is the back end's.  A row then depends,
 * through the map, on selected rows behind it as well: what a cut of the sequence leaves is no
 * longer the same (algorithm 8, I9), and a second recompute is no repetition (I8).  Not part of the
 * published method. */
#ifndef IFKV_SRC_REFIT_H
#define IFKV_SRC_REFIT_H

#include "exchange.h"
#include "select.h"

/* K, then V. */
typedef struct ifkv_refit {
    bool is_on;
    int n_head, d_head;  /* K/V heads */
    int64_t n_selected;  /* at least one if on */
    int64_t first;       /* rows below, of chunk 0, stay */
    int64_t *stage;      /* host, owned: indices on their way to the back end */
    const int64_t *kept; /* [n_kept] index of each row of the shard, borrowed */
    int64_t n_kept;

    /* Back-end memory. */
    int64_t *selected;            /* [n_selected] */
    int64_t *kept_row;            /* [n_kept], where the whole context lies apart from the shard */
    ifkv_view stale[2], fresh[2]; /* [n_selected, n_head * d_head] */
    int64_t *position;            /* [n_context] */
    ifkv_view cos_sin;            /* [n_context, d_head] float32 */
    double *scratch;
} ifkv_refit;

/* Plan: is_on and what follows from lengths.  Errors: RESOURCE; UNSUPPORTED if the back end has no
 * refit.  fini takes a zeroed one. */
ifkv_status ifkv_refit_init(ifkv_refit *refit, const ifkv_backend *backend,
                            const ifkv_exchange_shape *shape, int64_t n_selected,
                            const int64_t *kept, int64_t n_kept);
void ifkv_refit_fini(ifkv_refit *refit);
void ifkv_refit_layout(ifkv_refit *refit, const ifkv_exchange *exchange, ifkv_arena *arena);

/* Once before the layers: selected [n_selected] host, ascending. */
ifkv_status ifkv_refit_begin(ifkv_refit *refit, const ifkv_exchange *exchange,
                             const double *frequency, const int64_t *selected);
/* Around the exchange's store of a layer: keep the selected rows as they were, then fit, and move
 * the others in the whole context and in the shard.  Local. */
ifkv_status ifkv_refit_before(ifkv_refit *refit, const ifkv_exchange *exchange, int layer);
ifkv_status ifkv_refit_after(ifkv_refit *refit, const ifkv_exchange *exchange, int layer);

#endif
