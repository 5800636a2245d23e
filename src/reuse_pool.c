/* Chunks between the shard and the engine's pool.  See reuse.h, pool.h.
 *
 * The list of the pool's rows is indexed by shard row and goes to the back end once for all that is
 * loaded and once for all that is kept; units that stand side by side in the shard then move in one
 * operation, wherever their rows lie in the pool.  Nothing passes through host memory. */
#include "reuse.h"
#include "session.h"

#include <string.h>

static void note_rows(ifkv_reuse *reuse, const ifkv_reuse_unit *unit, const int64_t *row) {
    memcpy(reuse->pool_row + unit->shard_row, row, (size_t)unit->n_row * sizeof *row);
}

bool ifkv_reuse_pool_find(ifkv_session *session, ifkv_reuse_unit *unit,
                          const ifkv_store_entry *entry) {
    ifkv_reuse *reuse = &session->reuse;
    const int64_t *row = ifkv_pool_use(&session->engine->pool, entry);
    unit->is_pooled = row != NULL;
    if (!row) return false;
    note_rows(reuse, unit, row);
    reuse->n_row_pooled += unit->n_row;
    return true;
}

typedef ifkv_status (*move_fn)(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                               const ifkv_view *to);

/* One side of a layer, shard rows [first, first + n). */
static ifkv_status move_run(ifkv_session *session, const ifkv_view *shard, const ifkv_view *pool,
                            bool is_load, int64_t first, int64_t n) {
    ifkv_backend *backend = session->engine->backend;
    const int64_t *row = session->reuse.pool_row_list + first;
    const ifkv_view rows = ifkv_view_rows(shard, first, n);
    return is_load ? backend->ops->gather(backend, pool, row, &rows)
                   : backend->ops->scatter(backend, &rows, row, pool);
}

static ifkv_status move_layer(ifkv_session *session, int layer, bool is_load) {
    const ifkv_kvcache *cache = &session->cache, *pool = &session->engine->pool.cache;
    const ifkv_reuse *reuse = &session->reuse;
    const ifkv_view k = ifkv_kvcache_k(cache, layer), v = ifkv_kvcache_v(cache, layer),
                    k_pool = ifkv_kvcache_k(pool, layer), v_pool = ifkv_kvcache_v(pool, layer);
    for (int64_t i = 0; i < reuse->n_unit;) {
        const ifkv_reuse_unit *unit = &reuse->unit[i];
        int64_t n = 0;
        for (; i < reuse->n_unit; i++) {
            const ifkv_reuse_unit *next = &reuse->unit[i];
            if (!(is_load ? next->is_pooled : next->is_kept)) break;
            n += next->n_row;
        }
        if (n == 0) {
            i++;
            continue;
        }
        IFKV_TRY(move_run(session, &k, &k_pool, is_load, unit->shard_row, n));
        IFKV_TRY(move_run(session, &v, &v_pool, is_load, unit->shard_row, n));
    }
    return IFKV_OK;
}

static ifkv_status move_units(ifkv_session *session, bool is_load) {
    ifkv_backend *backend = session->engine->backend;
    const ifkv_reuse *reuse = &session->reuse;
    IFKV_TRY(backend->ops->upload(backend, reuse->pool_row_list, reuse->pool_row,
                                  (size_t)session->n_kept * sizeof *reuse->pool_row));
    for (int layer = 0; layer < session->cache.n_layer; layer++)
        IFKV_TRY(move_layer(session, layer, is_load));
    return IFKV_OK;
}

ifkv_status ifkv_reuse_pool_load(ifkv_session *session) {
    return session->reuse.n_row_pooled > 0 ? move_units(session, true) : IFKV_OK;
}

ifkv_status ifkv_reuse_pool_save(ifkv_session *session) {
    ifkv_reuse *reuse = &session->reuse;
    bool has_any = false;
    for (int64_t i = 0; i < reuse->n_unit; i++) {
        ifkv_reuse_unit *unit = &reuse->unit[i];
        ifkv_store_entry entry;
        if (unit->is_pooled) continue;
        IFKV_TRY(ifkv_reuse_entry(session, unit, &entry));
        const int64_t *row = ifkv_pool_put(&session->engine->pool, &entry);
        unit->is_kept = row != NULL;
        if (!row) continue;
        note_rows(reuse, unit, row);
        has_any = true;
    }
    return has_any ? move_units(session, false) : IFKV_OK;
}
