/* The public session: run the stages, time them, hand out what they made.  See ifkv.h. */
#include <stdlib.h>
#include <string.h>

#include "auto.h"
#include "convert.h"
#include "log.h"
#include "prefill.h"

const char *ifkv_stage_name(ifkv_stage stage) {
    static const char *const names[IFKV_N_STAGE] = {"place",     "encode", "score", "select",
                                                    "recompute", "prompt", "decode"};
    return stage >= 0 && stage < IFKV_N_STAGE ? names[stage] : "unknown";
}

ifkv_status ifkv_engine_plan(const ifkv_engine *engine, const ifkv_request *request,
                             const ifkv_prefill_options *options, size_t *bytes_p) {
    IFKV_REQUIRE(engine && bytes_p, IFKV_ERR_USAGE, IFKV_E_STRUCT, "engine_plan: got NULL");
    ifkv_session *session = NULL;
    if (ifkv_auto_is_asked(options)) {
        IFKV_TRY(ifkv_auto_plan(engine, request, options, bytes_p));
    } else {
        IFKV_TRY(ifkv_session_create(engine, request, options, &session, bytes_p));
        ifkv_session_destroy(session);
    }
    return ifkv_engine_check_memory(engine, *bytes_p);
}

/* Run one stage and add what it took and received. */
static ifkv_status run_stage(ifkv_session *session, ifkv_stage stage,
                             ifkv_status (*run)(ifkv_session *)) {
    ifkv_engine *engine = session->engine;
    const double begin = engine->backend->ops->clock_ms(engine->backend);
    engine->comm->bytes_received = 0;
    IFKV_TRY(run(session));
    session->ms[stage] += engine->backend->ops->clock_ms(engine->backend) - begin;
    session->bytes[stage] += engine->comm->bytes_received;
    return IFKV_OK;
}

/* Between stages a rank may give up; all do, or none. */
static ifkv_status check_stop(ifkv_comm *comm, const ifkv_prefill_options *options) {
    if (!options || options->size < sizeof *options || !options->stop) return IFKV_OK;
    int64_t is_stopping = options->stop(options->stop_arg);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &is_stopping, 1, IFKV_REDUCE_MAX));
    if (!is_stopping) return IFKV_OK;
    const ifkv_status status =
        IFKV_FAIL(IFKV_ERR_BUSY, IFKV_E_INTERRUPTED, "stopped as asked; nothing of it was kept");
    ifkv_error_share(0);
    return status;
}

/* Plan and take memory.  The ids of rank 0 are everybody's: they are what the clock says they are,
 * distributed here. */
static ifkv_status place(ifkv_engine *engine, const ifkv_request *request,
                         const ifkv_prefill_options *options, ifkv_session **session_p) {
    size_t bytes = 0;
    ifkv_session *session = NULL;
    ifkv_status status = ifkv_session_create(engine, request, options, &session, &bytes);
    if (status == IFKV_OK) status = ifkv_engine_reserve(engine, bytes);
    const bool has_entries = session && (session->reuse.has_store || session->reuse.has_pool);
    if (status == IFKV_OK && has_entries) status = ifkv_engine_identify(engine);
    status = ifkv_comm_agree(engine->comm, status, NULL);
    if (status == IFKV_OK)
        status = ifkv_comm_same(engine->comm, session->plan_digest, "chunks and options");
    if (status != IFKV_OK) {
        ifkv_session_destroy(session);
        return status;
    }
    ifkv_arena arena = {.base = engine->arena};
    ifkv_session_layout(session, &arena);
    ifkv_log(IFKV_LOG_INFO, "exchange %s: %s", session->exchange->ops->name,
             session->exchange->ops->explain);
    if (session->selector)
        ifkv_log(IFKV_LOG_INFO, "selector %s: %s", session->selector->ops->name,
                 session->selector->ops->explain);
    engine->has_session = true;
    *session_p = session;
    return IFKV_OK;
}

static ifkv_status distribute_ids(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    const size_t n = (size_t)(session->n_context + session->n_prompt);
    IFKV_TRY(ifkv_comm_bcast(comm, session->token, n * sizeof *session->token, 0));
    IFKV_TRY(ifkv_comm_bcast(comm, session->question,
                             (size_t)session->n_question * sizeof *session->question, 0));
    ifkv_session_spread_tokens(session);
    return IFKV_OK;
}

ifkv_status ifkv_session_open(ifkv_engine *engine, const ifkv_request *request,
                              const ifkv_prefill_options *options, ifkv_session **session_p) {
    IFKV_REQUIRE(engine && session_p, IFKV_ERR_USAGE, IFKV_E_STRUCT, "session_open: got NULL");
    IFKV_REQUIRE(!engine->has_session, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "session_open: the engine has an open session");
    IFKV_REQUIRE(engine->model.base, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "session_open: the engine was opened to check only");
    static const struct {
        ifkv_stage stage;
        ifkv_status (*run)(ifkv_session *);
    } stages[] = {
        {IFKV_STAGE_ENCODE, ifkv_prefill_encode}, {IFKV_STAGE_SCORE, ifkv_prefill_score},
        {IFKV_STAGE_SELECT, ifkv_prefill_select}, {IFKV_STAGE_RECOMPUTE, ifkv_prefill_recompute},
        {IFKV_STAGE_PROMPT, ifkv_prefill_prompt},
    };
    ifkv_backend *backend = engine->backend;
    ifkv_session *session = NULL;
    /* outside the clock, as loading them is; an error shows again where the ranks agree */
    const bool has_store = options && options->size >= sizeof *options && options->store;
    if (has_store || engine->pool.is_on) ifkv_engine_identify(engine);
    IFKV_TRY(check_stop(engine->comm, options));
    const bool is_auto = ifkv_auto_is_asked(options);
    ifkv_rates rates = {.size = sizeof rates};
    ifkv_auto_choice choice = {0};
    ifkv_prefill_options chosen;
    IFKV_TRY(ifkv_comm_same(engine->comm, is_auto, "whether the method is auto"));
    if (is_auto) IFKV_TRY(ifkv_engine_measure(engine, &rates));
    IFKV_TRY(ifkv_comm_barrier(engine->comm));
    ifkv_comm_phase(engine->comm, IFKV_STAGE_PLACE);
    const double begin = backend->ops->clock_ms(backend);
    engine->comm->bytes_received = 0;
    if (is_auto) {
        IFKV_TRY(ifkv_auto_choose(engine, request, options, &choice));
        IFKV_TRY(ifkv_struct_read(&chosen, sizeof chosen, options, "prefill_options"));
        chosen.size = sizeof chosen;
        chosen.method = choice.method;
        options = &chosen;
    }
    IFKV_TRY(place(engine, request, options, &session));
    session->auto_exact = is_auto ? choice.exact : "";
    session->auto_exact_ms = choice.exact_ms;
    session->auto_infoflow_ms = choice.infoflow_ms;
    ifkv_status status = distribute_ids(session);
    session->ms[IFKV_STAGE_PLACE] = backend->ops->clock_ms(backend) - begin;
    session->bytes[IFKV_STAGE_PLACE] = engine->comm->bytes_received;
    for (size_t i = 0; i < sizeof stages / sizeof *stages && status == IFKV_OK; i++) {
        if (session->rides[stages[i].stage]) continue;
        if (i > 0) status = check_stop(engine->comm, options);
        ifkv_comm_phase(engine->comm, (int)stages[i].stage);
        if (status == IFKV_OK) status = run_stage(session, stages[i].stage, stages[i].run);
    }
    ifkv_comm_phase(engine->comm, IFKV_STAGE_DECODE);
    if (status != IFKV_OK) {
        ifkv_session_close(session);
        return status;
    }
    session->ttft_ms = backend->ops->clock_ms(backend) - begin;
    *session_p = session;
    return IFKV_OK;
}

ifkv_status ifkv_session_decode(ifkv_session *session) {
    IFKV_REQUIRE(session, IFKV_ERR_USAGE, IFKV_E_STRUCT, "session_decode: got NULL");
    IFKV_TRY(check_stop(session->engine->comm, &session->options));
    return run_stage(session, IFKV_STAGE_DECODE, ifkv_prefill_decode);
}

void ifkv_session_close(ifkv_session *session) {
    if (!session) return;
    session->engine->has_session = false;
    ifkv_session_destroy(session);
}

/* What differs between ranks: take the maximum, and of bytes also the sum. */
static ifkv_status reduce_result(ifkv_session *session, ifkv_result *result) {
    ifkv_engine *engine = session->engine;
    const ifkv_reuse *reuse = &session->reuse;
    int64_t value[2 * IFKV_N_STAGE + 3], total = 0;
    for (int i = 0; i < IFKV_N_STAGE; i++) {
        value[i] = (int64_t)(session->ms[i] * 1e6);
        value[IFKV_N_STAGE + i] = session->bytes[i];
        total += session->bytes[i];
    }
    /* the ranks of a thread communicator share one process: each reports its share */
    const size_t peak = ifkv_resident_peak_bytes();
    const int64_t used =
        peak > engine->resident_before ? (int64_t)(peak - engine->resident_before) : 0;
    const int n_shared = strcmp(ifkv_comm_name(engine->comm), "thread") ? 1 : engine->comm->size;
    value[2 * IFKV_N_STAGE] = engine->comm->rank == 0 ? (int64_t)(session->ttft_ms * 1e6) : 0;
    value[2 * IFKV_N_STAGE + 1] =
        (int64_t)(engine->weight_bytes + engine->pool.bytes + engine->arena_bytes);
    value[2 * IFKV_N_STAGE + 2] = used / n_shared;
    IFKV_TRY(ifkv_comm_all_reduce_i64(engine->comm, value, sizeof value / sizeof *value,
                                      IFKV_REDUCE_MAX));
    int64_t sum[] = {total, reuse->n_hit, reuse->n_miss, reuse->n_row_hit, reuse->n_row_pooled};
    IFKV_TRY(
        ifkv_comm_all_reduce_i64(engine->comm, sum, sizeof sum / sizeof *sum, IFKV_REDUCE_SUM));
    for (int i = 0; i < IFKV_N_STAGE; i++) {
        result->ms[i] = (double)value[i] / 1e6;
        result->bytes[i] = value[IFKV_N_STAGE + i];
    }
    result->bytes_total = sum[0];
    result->store_hits = sum[1];
    result->store_misses = sum[2];
    result->store_tokens_hit = sum[3];
    result->store_tokens_device = sum[4];
    result->ttft_ms = (double)value[2 * IFKV_N_STAGE] / 1e6;
    result->memory_weights = engine->weight_bytes;
    result->memory_planned = (size_t)value[2 * IFKV_N_STAGE + 1];
    result->memory_peak = (size_t)value[2 * IFKV_N_STAGE + 2];
    return IFKV_OK;
}

ifkv_status ifkv_session_result(ifkv_session *session, ifkv_result *caller_result) {
    IFKV_REQUIRE(session, IFKV_ERR_USAGE, IFKV_E_STRUCT, "session_result: got NULL");
    const ifkv_engine *engine = session->engine;
    ifkv_result result = {
        .method = session->method,
        .exchange = strcmp(session->method, "full") ? session->exchange_name : "none",
        .backend = engine->backend->ops->name,
        .device = engine->backend->device,
        .comm = ifkv_comm_name(engine->comm),
        .finish = session->is_stopped ? "stop" : "length",
        .n_rank = engine->comm->size,
        .n_context = session->n_context,
        .n_chunk = session->n_given,
        .n_prompt = session->n_prompt,
        .n_selected = session->n_selected,
        .selected_digest = session->selected_digest,
        .selected = session->selected,
        .scores = session->options.keep_scores ? session->scores : NULL,
        .first_logits = session->first_logits,
        .n_vocab = engine->model.config.n_vocab,
        .answer = session->answer,
        .n_answer = session->n_answer,
        .score_layers = session->score_layers,
        .has_store = session->reuse.has_store,
        .has_pool = session->reuse.has_pool,
        .geometry = *session->score_layers ? ifkv_geometry_name(session->geometry) : "",
        .hp = *session->score_layers ? ifkv_geometry_hp_name(session->geometry) : "",
        .scoring = session->scoring,
        .chunk_order = session->reorder.order,
        .auto_exact = session->auto_exact,
        .auto_exact_ms = session->auto_exact_ms,
        .auto_infoflow_ms = session->auto_infoflow_ms,
        .exchange_choice = session->exchange_choice,
    };
    memcpy(result.rode, session->rides, sizeof result.rode);
    IFKV_TRY(reduce_result(session, &result));
    return ifkv_struct_write(caller_result, &result, sizeof result, "result");
}

ifkv_status ifkv_session_kv_rows(const ifkv_session *session, ifkv_kv_rows *caller_rows) {
    IFKV_REQUIRE(session, IFKV_ERR_USAGE, IFKV_E_STRUCT, "session_kv_rows: got NULL");
    const ifkv_config *config = &session->engine->model.config;
    const ifkv_kv_rows rows = {
        .n_layer = config->n_layer,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .n_row = session->n_kept,
        .n_chunk = session->n_given,
        .index = session->cache_index,
        .position = session->position,
        .token = session->kept_token,
        .recomputed = session->recomputed,
        .chunk_offsets = session->chunk_index,
        .chunk_order = session->reorder.order,
    };
    return ifkv_struct_write(caller_rows, &rows, sizeof rows, "kv_rows");
}

/* Rows of a matrix in back-end memory as float32 in host memory. */
static ifkv_status read_rows(ifkv_backend *backend, const ifkv_view *from, float *to) {
    const int64_t n = from->n_row * from->n_col;
    const size_t bytes = (size_t)n * ifkv_dtype_bytes(from->dtype);
    if (from->dtype == IFKV_DTYPE_F32)
        return backend->ops->download(backend, to, from->data, bytes);
    void *stored = malloc(bytes + 1);
    IFKV_REQUIRE(stored, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session_kv_read: out of host memory");
    const ifkv_status status = backend->ops->download(backend, stored, from->data, bytes);
    if (status == IFKV_OK) ifkv_convert(from->dtype, stored, IFKV_DTYPE_F32, to, n);
    free(stored);
    return status;
}

ifkv_status ifkv_session_kv_read(const ifkv_session *session, int layer, float *k, float *v) {
    IFKV_REQUIRE(session && layer >= 0 && layer < session->cache.n_layer, IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "session_kv_read: got layer %d", layer);
    IFKV_REQUIRE((k && v) || session->n_kept == 0, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "session_kv_read: got NULL for %lld rows", (long long)session->n_kept);
    ifkv_backend *backend = session->engine->backend;
    const ifkv_view k_all = ifkv_kvcache_k(&session->cache, layer),
                    v_all = ifkv_kvcache_v(&session->cache, layer);
    const ifkv_view k_kept = ifkv_view_rows(&k_all, 0, session->n_kept),
                    v_kept = ifkv_view_rows(&v_all, 0, session->n_kept);
    IFKV_TRY(read_rows(backend, &k_kept, k));
    return read_rows(backend, &v_kept, v);
}

/* Send every rank's rows of one matrix to rank 0, which puts its chunks where they belong. */
static ifkv_status gather_rows(ifkv_session *session, const float *own, float *staged, float *to) {
    const ifkv_placement *placement = &session->placement;
    ifkv_comm *comm = session->engine->comm;
    const size_t row = (size_t)session->cache.n_col * sizeof(float), size = (size_t)comm->size;
    size_t *message = calloc(4 * size, sizeof *message);
    IFKV_REQUIRE(message, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "session_kv_gather: out of host memory");
    size_t *send = message, *send_at = send + size, *receive = send_at + size,
           *receive_at = receive + size, total = 0;
    send[0] = (size_t)session->n_kept * row;
    for (size_t r = 0; r < size && comm->rank == 0; r++) {
        receive_at[r] = total;
        receive[r] = (size_t)ifkv_placement_kept_rows(placement, (int)r) * row;
        total += receive[r];
    }
    const ifkv_status status =
        ifkv_comm_all_to_all(comm, own, send, send_at, staged, receive, receive_at);
    for (int64_t i = 0; i < placement->n_chunk && comm->rank == 0 && status == IFKV_OK; i++) {
        const size_t bytes = (size_t)(placement->offset[i + 1] - placement->offset[i]) * row;
        size_t *from = &receive_at[placement->rank[i]];
        memcpy((char *)to + (size_t)placement->offset[i] * row, (char *)staged + *from, bytes);
        *from += bytes;
    }
    free(message);
    return status;
}

ifkv_status ifkv_session_kv_gather(ifkv_session *session, int layer, float *k, float *v) {
    IFKV_REQUIRE(session && layer >= 0 && layer < session->cache.n_layer, IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "session_kv_gather: got layer %d", layer);
    ifkv_comm *comm = session->engine->comm;
    const size_t n_col = (size_t)session->cache.n_col;
    const size_t n_own = (size_t)session->n_kept * n_col,
                 n_all = comm->rank ? 0 : (size_t)session->n_context * n_col;
    float *own = malloc((2 * n_own + n_all + 1) * sizeof *own);
    ifkv_status status =
        own ? ifkv_session_kv_read(session, layer, own, own + n_own)
            : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session_kv_gather: out of host memory");
    if (status == IFKV_OK && comm->rank == 0 && (!k || !v))
        status = IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_STRUCT, "session_kv_gather: got NULL on rank 0");
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = gather_rows(session, own, own + 2 * n_own, k);
    if (status == IFKV_OK) status = gather_rows(session, own + n_own, own + 2 * n_own, v);
    free(own);
    return status;
}
