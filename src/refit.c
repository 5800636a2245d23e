/* Rows that are not recomputed follow those that are.  See refit.h. */
#include "refit.h"

#include <stdlib.h>
#include <string.h>

/* Share of the mean variance that is added to every variance.  0.3 and 1 did alike on the two
 * questions they were tried on (even ones of bench/README.md); nothing finer was searched. */
static const double ridge = 0.3;

static int64_t kv_cols(const ifkv_refit *refit) {
    return (int64_t)refit->n_head * refit->d_head;
}

/* The context that rows at home attend to: row i has index i. */
static const ifkv_kvcache *whole_context(const ifkv_exchange *exchange) {
    return exchange->comm->size == 1 ? exchange->cache : exchange->ops->whole(exchange);
}

ifkv_status ifkv_refit_init(ifkv_refit *refit, const ifkv_backend *backend,
                            const ifkv_exchange_shape *shape, int64_t n_selected,
                            const int64_t *kept, int64_t n_kept) {
    const int64_t n_context = shape->placement->n_context;
    IFKV_REQUIRE(backend->ops->refit, IFKV_ERR_UNSUPPORTED, IFKV_E_VALUE,
                 "refit: back end %s has none", backend->ops->name);
    refit->is_on = n_selected > 0;
    refit->n_head = shape->n_kv_head;
    refit->d_head = shape->d_head;
    refit->n_selected = n_selected;
    refit->first = ifkv_select_first(shape->placement);
    refit->kept = kept;
    refit->n_kept = n_kept;
    refit->stage = malloc(((size_t)n_context + 1) * sizeof *refit->stage);
    IFKV_REQUIRE(refit->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "refit: out of host memory");
    return IFKV_OK;
}

void ifkv_refit_fini(ifkv_refit *refit) {
    free(refit->stage);
}

void ifkv_refit_layout(ifkv_refit *refit, const ifkv_exchange *exchange, ifkv_arena *arena) {
    if (!refit->is_on) return;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    refit->selected = ifkv_arena_take(arena, refit->n_selected, sizeof *refit->selected);
    refit->kept_row = ifkv_arena_take(arena, refit->n_kept, sizeof *refit->kept_row);
    for (int i = 0; i < 2; i++) {
        refit->stale[i] = ifkv_arena_view(arena, dtype, refit->n_selected, kv_cols(refit));
        refit->fresh[i] = ifkv_arena_view(arena, dtype, refit->n_selected, kv_cols(refit));
    }
    const int64_t n_context = exchange->shape.placement->n_context;
    refit->position = ifkv_arena_take(arena, n_context, sizeof *refit->position);
    refit->cos_sin = ifkv_arena_view(arena, IFKV_DTYPE_F32, n_context, refit->d_head);
    refit->scratch = ifkv_arena_take(arena, refit->n_head * ifkv_refit_scratch(refit->d_head),
                                     sizeof *refit->scratch);
}

ifkv_status ifkv_refit_begin(ifkv_refit *refit, const ifkv_exchange *exchange,
                             const double *frequency, const int64_t *selected) {
    ifkv_backend *backend = exchange->backend;
    const int64_t n_context = exchange->shape.placement->n_context;
    for (int64_t i = 0; i < n_context; i++) refit->stage[i] = i;
    IFKV_TRY(backend->ops->upload(backend, refit->position, refit->stage,
                                  (size_t)n_context * sizeof *refit->stage));
    IFKV_TRY(backend->ops->angles(backend, frequency, refit->position, &refit->cos_sin));
    IFKV_TRY(backend->ops->upload(backend, refit->kept_row, refit->kept,
                                  (size_t)refit->n_kept * sizeof *refit->kept));
    return backend->ops->upload(backend, refit->selected, selected,
                                (size_t)refit->n_selected * sizeof *selected);
}

static ifkv_status gather_selected(ifkv_refit *refit, const ifkv_exchange *exchange, int layer,
                                   const ifkv_view to[2]) {
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const ifkv_kvcache *whole = whole_context(exchange);
    const ifkv_view k = ifkv_kvcache_k(whole, layer), v = ifkv_kvcache_v(whole, layer);
    IFKV_TRY(ops->gather(exchange->backend, &k, refit->selected, &to[0]));
    return ops->gather(exchange->backend, &v, refit->selected, &to[1]);
}

ifkv_status ifkv_refit_before(ifkv_refit *refit, const ifkv_exchange *exchange, int layer) {
    return gather_selected(refit, exchange, layer, refit->stale);
}

/* Where the shard is a place of its own, its rows become those of the whole context. */
static ifkv_status copy_to_shard(ifkv_refit *refit, const ifkv_exchange *exchange,
                                 const ifkv_view *from, const ifkv_view *shard) {
    if (whole_context(exchange) == exchange->cache) return IFKV_OK;
    const ifkv_view to = ifkv_view_rows(shard, 0, refit->n_kept);
    return exchange->backend->ops->gather(exchange->backend, from, refit->kept_row, &to);
}

ifkv_status ifkv_refit_after(ifkv_refit *refit, const ifkv_exchange *exchange, int layer) {
    ifkv_backend *backend = exchange->backend;
    const ifkv_kvcache *whole = whole_context(exchange), *shard = exchange->cache;
    const ifkv_view from[] = {ifkv_kvcache_k(whole, layer), ifkv_kvcache_v(whole, layer)},
                    to[] = {ifkv_kvcache_k(shard, layer), ifkv_kvcache_v(shard, layer)};
    IFKV_TRY(gather_selected(refit, exchange, layer, refit->fresh));
    for (int i = 0; i < 2; i++) {
        const ifkv_refit_args args = {
            .n_head = refit->n_head,
            .d_head = refit->d_head,
            .ridge = ridge,
            .stale = refit->stale[i],
            .fresh = refit->fresh[i],
            .row = refit->selected,
            .first = refit->first,
            .cos_sin = i == 0 ? refit->cos_sin : (ifkv_view){0},
            .x = ifkv_view_rows(&from[i], 0, exchange->shape.placement->n_context),
            .scratch = refit->scratch,
        };
        IFKV_TRY(backend->ops->refit(backend, &args));
        IFKV_TRY(copy_to_shard(refit, exchange, &from[i], &to[i]));
    }
    return IFKV_OK;
}
