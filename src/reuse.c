/* Encode with a chunk store.  See reuse.h. */
#include "reuse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"
#include "store_key.h"

/* ---- plan ---- */

static void add_unit(ifkv_reuse *reuse, int64_t index, int64_t n_dropped, int64_t n_row) {
    ifkv_reuse_unit unit = {.index = index, .n_dropped = n_dropped, .n_row = n_row};
    if (reuse->n_unit > 0) {
        const ifkv_reuse_unit *last = &reuse->unit[reuse->n_unit - 1];
        unit.shard_row = last->shard_row + last->n_row;
    }
    reuse->unit[reuse->n_unit++] = unit;
}

static void list_units(ifkv_session *session) {
    const ifkv_placement *placement = &session->placement;
    const int64_t n_prefix = placement->n_prefix;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != session->engine->comm->rank) continue;
        const int64_t index = i ? placement->offset[i] : n_prefix;
        if (i == 0 && n_prefix > 0) add_unit(&session->reuse, 0, 0, n_prefix);
        if (placement->offset[i + 1] > index) /* not so in a prefix chunk */
            add_unit(&session->reuse, index, n_prefix, placement->offset[i + 1] - index);
    }
}

ifkv_status ifkv_reuse_plan(ifkv_session *session) {
    ifkv_reuse *reuse = &session->reuse;
    const int64_t n_chunk = ifkv_placement_chunks(&session->placement, session->engine->comm->rank);
    reuse->unit = calloc((size_t)n_chunk + 1, sizeof *reuse->unit);
    session->encode_begin = malloc(((size_t)n_chunk + 2) * sizeof *session->encode_begin);
    IFKV_REQUIRE(reuse->unit && session->encode_begin, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "session: out of host memory");
    list_units(session);
    session->n_chunk = reuse->n_unit;
    for (int64_t i = 0; i < reuse->n_unit; i++)
        session->n_encoded += reuse->unit[i].n_dropped + reuse->unit[i].n_row;
    const size_t n = (size_t)session->n_encoded;
    session->encode_token = malloc(n * sizeof *session->encode_token + 1);
    session->encode_position = malloc(n * sizeof *session->encode_position + 1);
    session->encode_stage = malloc(3 * n * sizeof *session->encode_stage + 1);
    reuse->pool_row = malloc((size_t)session->n_kept * sizeof *reuse->pool_row + 1);
    IFKV_REQUIRE(session->encode_token && session->encode_position && session->encode_stage &&
                     reuse->pool_row,
                 IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: out of host memory");
    return ifkv_pass_init(&session->encode, &session->engine->model, session->engine->backend,
                          session->engine->frequency, session->n_encoded, reuse->n_unit);
}

void ifkv_reuse_layout(ifkv_session *session, ifkv_arena *arena) {
    ifkv_reuse *reuse = &session->reuse;
    const int d_head = session->engine->model.config.d_head;
    reuse->no_angles = ifkv_arena_view(arena, IFKV_DTYPE_F32, session->encode.max_block, d_head);
    reuse->shard_position = ifkv_arena_take(arena, session->n_kept, sizeof *reuse->shard_position);
    reuse->shard_angles = ifkv_arena_view(arena, IFKV_DTYPE_F32, session->n_kept, d_head);
    if (reuse->has_pool)
        reuse->pool_row_list = ifkv_arena_take(arena, session->n_kept, sizeof(int64_t));
}

void ifkv_reuse_fini(ifkv_reuse *reuse) {
    free(reuse->unit);
    free(reuse->pool_row);
    memset(reuse, 0, sizeof *reuse);
}

/* ---- entries ---- */

/* All that the bits depend on besides the ids.  The back end is part of it: two of them round
 * differently, and so do two element types. */
static void describe(ifkv_session *session) {
    const ifkv_engine *engine = session->engine;
    const ifkv_config *c = &engine->model.config;
    ifkv_reuse *reuse = &session->reuse;
    snprintf(reuse->description, sizeof reuse->description,
             "ifkv-chunk 1;family=%s;model=%016llx;weights=%016llx;backend=%s;dtype=%s;layers=%d;"
             "kv_heads=%d;d_head=%d;k=before_rope;rope=%d,%.17g,%.17g,%.17g,%.17g,%lld",
             ifkv_family_name(c->family), (unsigned long long)engine->model.fingerprint,
             (unsigned long long)engine->weights_digest, engine->backend->ops->name,
             ifkv_dtype_name(engine->backend->ops->dtype), c->n_layer, c->n_kv_head, c->d_head,
             (int)c->rope_kind, c->rope_theta, c->rope_factor, c->rope_low, c->rope_high,
             (long long)c->rope_original);
}

ifkv_status ifkv_reuse_entry(const ifkv_session *session, const ifkv_reuse_unit *unit,
                             ifkv_store_entry *entry) {
    const ifkv_config *config = &session->engine->model.config;
    const ifkv_dtype dtype = session->engine->backend->ops->dtype;
    const int64_t n_prefix = session->placement.n_prefix;
    const bool is_prefix = unit->index < n_prefix;
    *entry = (ifkv_store_entry){
        .size = sizeof *entry,
        .description = session->reuse.description,
        .dtype = ifkv_dtype_name(dtype),
        .element_bytes = ifkv_dtype_bytes(dtype),
        .n_layer = config->n_layer,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .n_row = unit->n_row,
        .prefix = session->token,
        .n_prefix = n_prefix,
        .token = session->token + unit->index,
        .n_token = is_prefix ? 0 : unit->n_row,
    };
    return ifkv_store_key_make(entry);
}

typedef struct layer_copy {
    ifkv_session *session;
    const ifkv_reuse_unit *unit;
    ifkv_status status; /* of the back end */
} layer_copy;

static void shard_rows(const layer_copy *copy, int layer, ifkv_view *k, ifkv_view *v) {
    const ifkv_kvcache *cache = &copy->session->cache;
    const ifkv_view k_all = ifkv_kvcache_k(cache, layer), v_all = ifkv_kvcache_v(cache, layer);
    *k = ifkv_view_rows(&k_all, copy->unit->shard_row, copy->unit->n_row);
    *v = ifkv_view_rows(&v_all, copy->unit->shard_row, copy->unit->n_row);
}

static size_t layer_bytes(const layer_copy *copy) {
    const ifkv_kvcache *cache = &copy->session->cache;
    return (size_t)(copy->unit->n_row * cache->n_col) * ifkv_dtype_bytes(cache->k.dtype);
}

static bool upload_layer(void *arg, int layer, void *k, void *v) {
    layer_copy *copy = arg;
    ifkv_backend *backend = copy->session->engine->backend;
    ifkv_view k_rows, v_rows;
    shard_rows(copy, layer, &k_rows, &v_rows);
    copy->status = backend->ops->upload(backend, k_rows.data, k, layer_bytes(copy));
    if (copy->status == IFKV_OK)
        copy->status = backend->ops->upload(backend, v_rows.data, v, layer_bytes(copy));
    return copy->status == IFKV_OK;
}

static bool download_layer(void *arg, int layer, void *k, void *v) {
    layer_copy *copy = arg;
    ifkv_backend *backend = copy->session->engine->backend;
    ifkv_view k_rows, v_rows;
    shard_rows(copy, layer, &k_rows, &v_rows);
    copy->status = backend->ops->download(backend, k, k_rows.data, layer_bytes(copy));
    if (copy->status == IFKV_OK)
        copy->status = backend->ops->download(backend, v, v_rows.data, layer_bytes(copy));
    return copy->status == IFKV_OK;
}

ifkv_status ifkv_reuse_probe(ifkv_session *session, bool *is_loaded) {
    const ifkv_reuse *reuse = &session->reuse;
    const ifkv_placement *placement = &session->placement;
    const bool can_ask = reuse->has_store && reuse->store.has;
    memset(is_loaded, 0, (size_t)placement->n_chunk * sizeof *is_loaded);
    if (!can_ask && !reuse->has_pool) return IFKV_OK;
    describe(session);
    for (int64_t i = 0; i < reuse->n_unit; i++) {
        const ifkv_reuse_unit *unit = &reuse->unit[i];
        ifkv_store_entry entry;
        if (unit->index < placement->n_prefix) continue; /* the prefix, a few rows */
        IFKV_TRY(ifkv_reuse_entry(session, unit, &entry));
        is_loaded[ifkv_placement_chunk_of(placement, unit->index)] =
            (reuse->has_pool && ifkv_pool_has(&session->engine->pool, &entry)) ||
            (can_ask && reuse->store.has(reuse->store.arg, &entry));
    }
    return IFKV_OK;
}

static ifkv_status load_unit(ifkv_session *session, ifkv_reuse_unit *unit) {
    ifkv_reuse *reuse = &session->reuse;
    layer_copy copy = {session, unit, IFKV_OK};
    ifkv_store_entry entry;
    IFKV_TRY(ifkv_reuse_entry(session, unit, &entry));
    unit->is_hit = reuse->has_pool && ifkv_reuse_pool_find(session, unit, &entry);
    if (!unit->is_hit && reuse->has_store)
        unit->is_hit = reuse->store.load(reuse->store.arg, &entry, upload_layer, &copy);
    reuse->n_hit += unit->is_hit;
    reuse->n_miss += !unit->is_hit;
    reuse->n_row_hit += unit->is_hit ? unit->n_row : 0;
    return copy.status;
}

static ifkv_status load_units(ifkv_session *session) {
    ifkv_reuse *reuse = &session->reuse;
    describe(session);
    if (reuse->has_pool) ifkv_pool_begin(&session->engine->pool);
    for (int64_t i = 0; i < reuse->n_unit; i++) IFKV_TRY(load_unit(session, &reuse->unit[i]));
    return reuse->has_pool ? ifkv_reuse_pool_load(session) : IFKV_OK;
}

static ifkv_status save_misses(ifkv_session *session) {
    ifkv_reuse *reuse = &session->reuse;
    for (int64_t i = 0; i < reuse->n_unit; i++) {
        layer_copy copy = {session, &reuse->unit[i], IFKV_OK};
        ifkv_store_entry entry;
        if (reuse->unit[i].is_hit) continue;
        IFKV_TRY(ifkv_reuse_entry(session, &reuse->unit[i], &entry));
        reuse->store.save(reuse->store.arg, &entry, download_layer, &copy);
        IFKV_TRY(copy.status);
    }
    return IFKV_OK;
}

/* ---- encode ---- */

/* K arrives unrotated: so it goes to the shard, and rotated it stays for the chunk's own rows. */
static ifkv_status reuse_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    ifkv_session *session =
        (ifkv_session *)((char *)exchange - offsetof(ifkv_session, chunk_exchange));
    ifkv_backend *backend = exchange->backend;
    const ifkv_config *config = &session->engine->model.config;
    for (int64_t i = 0; i < session->reuse.n_unit; i++) {
        const ifkv_reuse_unit *unit = &session->reuse.unit[i];
        const layer_copy copy = {session, unit, IFKV_OK};
        const int64_t first = unit->encode_row + unit->n_dropped;
        ifkv_view k_to, v_to;
        if (unit->is_hit) continue;
        shard_rows(&copy, layer, &k_to, &v_to);
        const ifkv_view k_from = ifkv_view_rows(k, first, unit->n_row),
                        v_from = ifkv_view_rows(v, first, unit->n_row);
        IFKV_TRY(backend->ops->gather(backend, &k_from, NULL, &k_to));
        IFKV_TRY(backend->ops->gather(backend, &v_from, NULL, &v_to));
    }
    const ifkv_view angles = ifkv_view_rows(&session->encode.cos_sin, 0, k->n_row);
    return backend->ops->rope(backend, k, config->n_kv_head, NULL, config->norm_eps, &angles);
}

/* The rows of all misses: a group each, the prefix in front, positions from 0. */
static void list_misses(ifkv_session *session) {
    ifkv_reuse *reuse = &session->reuse;
    int64_t row = 0, n_group = 0;
    for (int64_t i = 0; i < reuse->n_unit; i++) {
        ifkv_reuse_unit *unit = &reuse->unit[i];
        const int64_t n = unit->n_dropped + unit->n_row;
        if (unit->is_hit) continue;
        unit->encode_row = session->encode_begin[n_group++] = row;
        memcpy(session->encode_token + row, session->token,
               (size_t)unit->n_dropped * sizeof *session->token);
        memcpy(session->encode_token + row + unit->n_dropped, session->token + unit->index,
               (size_t)unit->n_row * sizeof *session->token);
        for (int64_t a = 0; a < n; a++) session->encode_position[row + a] = a;
        row += n;
    }
    session->encode_begin[n_group] = row;
    session->n_chunk = n_group;
    session->n_encoded = session->encode_lse.n_row = row;
    int64_t *begin = session->encode_stage, *end = begin + row;
    for (int64_t g = 0; g < n_group; g++)
        for (int64_t i = session->encode_begin[g]; i < session->encode_begin[g + 1]; i++) {
            begin[i] = session->encode_begin[g];
            end[i] = i + 1;
        }
}

/* Angles of position 0: multiplying by 1 and adding 0 leaves a number what it is. */
static ifkv_status make_no_angles(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const ifkv_view *to = &session->reuse.no_angles;
    ifkv_pass *pass = &session->encode;
    const size_t bytes = (size_t)to->n_row * sizeof *pass->stage;
    memset(pass->stage, 0, bytes);
    IFKV_TRY(backend->ops->upload(backend, pass->position, pass->stage, bytes));
    pass->k_angles = *to;
    return backend->ops->angles(backend, pass->frequency, pass->position, to);
}

static ifkv_status begin_misses(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const int64_t n = session->n_encoded;
    const size_t bytes = (size_t)n * sizeof(int64_t);
    ifkv_reuse *reuse = &session->reuse;
    reuse->ops = ifkv_exchange_chunk_ops;
    reuse->ops.store = reuse_store;
    session->chunk_exchange.ops = &reuse->ops;
    session->chunk_exchange.backend = backend;
    session->chunk_exchange.comm = session->engine->data;
    IFKV_TRY(backend->ops->upload(backend, session->span_begin, session->encode_stage, bytes));
    IFKV_TRY(backend->ops->upload(backend, session->span_end, session->encode_stage + n, bytes));
    IFKV_TRY(make_no_angles(session));
    return ifkv_pass_begin(&session->encode, backend, n, session->encode_token,
                           session->encode_position, session->n_chunk, session->encode_begin);
}

static ifkv_status encode_misses(ifkv_session *session) {
    const int n_layer = session->engine->model.config.n_layer;
    const ifkv_prefill_options *options = &session->options;
    list_misses(session);
    if (session->n_encoded > 0) IFKV_TRY(begin_misses(session));
    for (int layer = 0; layer < n_layer; layer++) {
        const unsigned what = layer + 1 < n_layer ? IFKV_LAYER_ALL : IFKV_LAYER_KV;
        if (session->n_encoded > 0)
            IFKV_TRY(ifkv_layer_run(&session->encode, layer, &session->chunk_exchange, what));
        if (options->progress)
            options->progress(options->progress_arg, IFKV_STAGE_ENCODE, layer + 1, n_layer);
    }
    return IFKV_OK;
}

ifkv_status ifkv_reuse_encode(ifkv_session *session) {
    const ifkv_reuse *reuse = &session->reuse;
    if (reuse->has_store || reuse->has_pool) IFKV_TRY(load_units(session));
    IFKV_TRY(encode_misses(session));
    /* before anything rewrites a row */
    if (reuse->has_pool) IFKV_TRY(ifkv_reuse_pool_save(session));
    return reuse->has_store ? save_misses(session) : IFKV_OK;
}

void ifkv_reuse_commit(ifkv_session *session) {
    if (session->reuse.has_pool) ifkv_pool_commit(&session->engine->pool);
}

ifkv_status ifkv_reuse_place(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const ifkv_config *config = &session->engine->model.config;
    const ifkv_view *angles = &session->reuse.shard_angles;
    const int64_t n = session->n_kept;
    IFKV_TRY(backend->ops->upload(backend, session->reuse.shard_position, session->position,
                                  (size_t)n * sizeof *session->position));
    IFKV_TRY(backend->ops->angles(backend, session->engine->frequency,
                                  session->reuse.shard_position, angles));
    for (int layer = 0; layer < config->n_layer; layer++) {
        const ifkv_view all = ifkv_kvcache_k(&session->cache, layer),
                        k = ifkv_view_rows(&all, 0, n);
        IFKV_TRY(
            backend->ops->rope(backend, &k, config->n_kv_head, NULL, config->norm_eps, angles));
        IFKV_TRY(session->exchange->ops->share(session->exchange, layer));
    }
    return IFKV_OK;
}
