/* The stages of a prefill.  See prefill.h. */
#include "prefill.h"

#include <math.h>
#include <string.h>

#include "digest.h"

static void report(const ifkv_session *session, ifkv_stage stage, int64_t done, int64_t total) {
    if (session->options.progress)
        session->options.progress(session->options.progress_arg, stage, done, total);
}

static ifkv_status chunk_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    ifkv_session *session =
        (ifkv_session *)((char *)exchange - offsetof(ifkv_session, chunk_exchange));
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const ifkv_view k_shard = ifkv_kvcache_k(&session->cache, layer),
                    v_shard = ifkv_kvcache_v(&session->cache, layer);
    IFKV_TRY(ops->gather(exchange->backend, k, session->kept_row, &k_shard));
    IFKV_TRY(ops->gather(exchange->backend, v, session->kept_row, &v_shard));
    return session->exchange->ops->share(session->exchange, layer);
}

static ifkv_status chunk_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    ifkv_session *session =
        (ifkv_session *)((char *)exchange - offsetof(ifkv_session, chunk_exchange));
    const ifkv_config *config = &session->engine->model.config;
    const int64_t q_cols = (int64_t)config->n_head * config->d_head, n_row = session->n_encoded;
    const int64_t kv_cols = (int64_t)config->n_kv_head * config->d_head;
    (void)layer;
    const ifkv_attention_args args = {
        .n_head = config->n_head,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .scale = 1.0f / sqrtf((float)config->d_head),
        .q = *q,
        .k = ifkv_view_block(&session->encode.qkv, 0, n_row, q_cols, kv_cols),
        .v = ifkv_view_block(&session->encode.qkv, 0, n_row, q_cols + kv_cols, kv_cols),
        .begin = session->span_begin,
        .end = session->span_end,
        .out = *out,
        .lse = session->encode_lse,
    };
    return exchange->backend->ops->attention(exchange->backend, &args);
}

const ifkv_exchange_ops ifkv_exchange_chunk_ops = {
    .name = "chunk",
    .struct_bytes = sizeof(ifkv_exchange),
    .is_home_owner = true,
    .is_exact = false,
    .init = ifkv_exchange_init_nothing,
    .fini = ifkv_exchange_fini_nothing,
    .layout_shared = ifkv_exchange_layout_nothing,
    .layout = ifkv_exchange_layout_nothing,
    .share = ifkv_exchange_share_nothing,
    .begin = ifkv_exchange_begin_nothing,
    .store = chunk_store,
    .attend = chunk_attend,
    .bytes = ifkv_exchange_no_bytes,
    .explain = "a row sees its own chunk; kept rows go to this rank's shard",
};

static ifkv_status begin_chunks(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const int64_t n = session->n_encoded;
    session->chunk_exchange.ops = &ifkv_exchange_chunk_ops;
    session->chunk_exchange.backend = backend;
    session->chunk_exchange.comm = session->engine->data;
    const size_t bytes = (size_t)n * sizeof(int64_t);
    IFKV_TRY(backend->ops->upload(backend, session->span_begin, session->encode_stage, bytes));
    IFKV_TRY(backend->ops->upload(backend, session->span_end, session->encode_stage + n, bytes));
    return backend->ops->upload(backend, session->kept_row, session->encode_stage + 2 * n,
                                (size_t)session->n_kept * sizeof(int64_t));
}

/* The pass of an exact method: every row of the context, where its slice is. */
static ifkv_status begin_slices(ifkv_session *session) {
    for (int64_t i = 0; i < session->n_context; i++) {
        session->pass_index[i] = i;
        session->pass_home[i] = session->pass_owner[i] =
            ifkv_placement_owner(&session->placement, i);
    }
    const ifkv_exchange_rows rows = {
        .n_row = session->n_context,
        .index = session->pass_index,
        .home = session->pass_home,
        .owner = session->pass_owner,
    };
    return session->exchange->ops->begin(session->exchange, &rows);
}

/* What a rider received counts for its own stage, and not for the one that carries it. */
static void count_rider(ifkv_session *session, ifkv_stage carrier, ifkv_stage rider,
                        int64_t bytes) {
    session->bytes[carrier] -= bytes;
    session->bytes[rider] += bytes;
}

ifkv_status ifkv_prefill_encode(ifkv_session *session) {
    if (session->reuse.is_on) {
        IFKV_TRY(ifkv_reuse_encode(session));
        if (!session->reorder.is_on) IFKV_TRY(ifkv_reuse_place(session));
        IFKV_TRY(session->engine->backend->ops->sync(session->engine->backend));
        ifkv_reuse_commit(session);
        return IFKV_OK;
    }
    ifkv_backend *backend = session->engine->backend;
    ifkv_selector *rider = session->rides[IFKV_STAGE_SCORE] ? session->selector : NULL;
    const int n_layer = session->engine->model.config.n_layer;
    int64_t rider_bytes = 0;
    ifkv_layer_part part[2] = {{session->is_exact ? session->exchange : &session->chunk_exchange,
                                session->n_encoded, 0, 0}};
    IFKV_TRY(session->is_exact ? begin_slices(session) : begin_chunks(session));
    IFKV_TRY(ifkv_pass_begin(&session->encode, backend,
                             session->n_encoded + session->n_encode_rider, session->encode_token,
                             session->encode_position, session->n_encode_group,
                             session->encode_begin));
    if (rider) IFKV_TRY(rider->ops->ride_begin(rider, &session->encode, session->n_encoded));
    for (int layer = 0; layer < n_layer; layer++) {
        /* nothing reads the context's last hidden state */
        part[0].what = layer + 1 < n_layer ? IFKV_LAYER_ALL : IFKV_LAYER_KV;
        if (rider) part[1] = rider->ops->ride_part(rider, layer);
        IFKV_TRY(ifkv_layer_run_parts(&session->encode, layer, part, rider ? 2 : 1));
        if (rider) IFKV_TRY(rider->ops->ride_layer(rider, layer));
        rider_bytes += part[1].bytes;
        report(session, IFKV_STAGE_ENCODE, layer + 1, n_layer);
    }
    rider_bytes -= ifkv_comm_received(session->engine->comm);
    if (rider) IFKV_TRY(rider->ops->score(rider, session->scores));
    rider_bytes += ifkv_comm_received(session->engine->comm);
    count_rider(session, IFKV_STAGE_ENCODE, IFKV_STAGE_SCORE, rider_bytes);
    return backend->ops->sync(backend);
}

ifkv_status ifkv_prefill_score(ifkv_session *session) {
    if (session->reorder.is_on) IFKV_TRY(ifkv_reorder_run(session));
    if (!session->scores) return IFKV_OK;
    ifkv_selector *selector = session->selector;
    IFKV_TRY(selector->ops->score(selector, session->scores));
    /* what other ranks have been given of that layer is out of date */
    if (selector->rewritten_layer < 0) return IFKV_OK;
    return session->exchange->ops->share(session->exchange, selector->rewritten_layer);
}

ifkv_status ifkv_prefill_select(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    ifkv_status status = IFKV_OK;
    if (session->selector)
        status =
            session->selector->ops->choose(session->selector, session->scores, session->selected);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    session->selected_digest = ifkv_digest_indices(session->selected, session->n_selected);
    for (int64_t i = 0, row = 0; i < session->n_selected; i++) {
        while (row < session->n_kept && session->cache_index[row] < session->selected[i]) row++;
        if (row < session->n_kept && session->cache_index[row] == session->selected[i])
            session->recomputed[row] = 1;
    }
    const uint64_t agreed[] = {(uint64_t)session->n_context, (uint64_t)session->n_selected,
                               session->selected_digest};
    return ifkv_comm_same(comm, ifkv_digest_bytes(agreed, sizeof agreed), "selection");
}

/* Rows [0, k) of a pass over all ranks: S. */
static void list_selected(ifkv_session *session) {
    const bool is_home_owner = session->exchange->ops->is_home_owner;
    const int64_t k = session->n_selected;
    for (int64_t i = 0; i < k; i++) {
        session->pass_index[i] = session->selected[i];
        session->pass_owner[i] = ifkv_placement_owner(&session->placement, session->selected[i]);
        session->pass_home[i] = is_home_owner ? session->pass_owner[i]
                                              : ifkv_deal_home(i, k, session->engine->comm->size);
    }
}

/* Rows [at, at + n) of a pass: rows [first, first + n) of the prompt and what follows it. */
static ifkv_status list_tail(ifkv_session *session, int64_t at, int64_t first, int64_t n) {
    const ifkv_placement *placement = &session->placement;
    for (int64_t i = 0; i < n; i++) {
        const int64_t index = session->n_context + first + i;
        const int owner = ifkv_placement_owner(placement, index);
        session->pass_index[at + i] = index;
        session->pass_owner[at + i] = owner;
        /* dealt from the last row, so that rank 0 always has the one that meets the LM head */
        session->pass_home[at + i] = ifkv_deal_home(n - 1 - i, n, placement->n_tail_rank);
        if (owner == session->engine->comm->rank)
            IFKV_TRY(ifkv_kvcache_append(&session->cache, index));
    }
    return IFKV_OK;
}

/* Route rows [first, first + n) of a pass, and put this rank's share of them behind the n_before
 * rows it has. */
static ifkv_status begin_part(ifkv_session *session, ifkv_exchange *exchange, int64_t first,
                              int64_t n, int64_t n_before, ifkv_layer_part *part) {
    const ifkv_exchange_rows rows = {
        .n_row = n,
        .index = session->pass_index + first,
        .home = session->pass_home + first,
        .owner = session->pass_owner + first,
    };
    *part = (ifkv_layer_part){exchange, 0, IFKV_LAYER_ALL, 0};
    for (int64_t i = 0; i < n; i++) {
        if (rows.home[i] != session->engine->comm->rank) continue;
        const int64_t row = n_before + part->n_row++;
        session->home_token[row] = session->token[rows.index[i]];
        session->home_position[row] = rows.index[i];
    }
    return exchange->ops->begin(exchange, &rows);
}

/* Choose the next token from the logits of the row of the pass that rank 0 ran last; every rank
 * learns it. */
static ifkv_status choose_token(ifkv_session *session, ifkv_pass *pass) {
    ifkv_engine *engine = session->engine;
    ifkv_backend *backend = engine->backend;
    const int64_t n_vocab = engine->model.config.n_vocab;
    int32_t token = -1;
    ifkv_status status = IFKV_OK;
    if (engine->comm->rank == 0) {
        IFKV_TRY(ifkv_pass_logits(pass, backend, pass->n_row - 1, &session->logits_view));
        IFKV_TRY(backend->ops->download(backend, session->logits, session->logits_view.data,
                                        (size_t)n_vocab * sizeof *session->logits));
        float best = -INFINITY;
        for (int64_t i = 0; i < n_vocab && status == IFKV_OK; i++) {
            if (!isfinite(session->logits[i]))
                status = IFKV_FAIL(IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE,
                                   "logit %lld: got %g, expected a finite number", (long long)i,
                                   (double)session->logits[i]);
            if (session->logits[i] > best) { /* the lowest id wins a tie */
                best = session->logits[i];
                token = (int32_t)i;
            }
        }
    }
    IFKV_TRY(ifkv_comm_agree(engine->comm, status, NULL));
    IFKV_TRY(ifkv_comm_bcast(engine->comm, &token, sizeof token, 0));
    session->next_token = token;
    return IFKV_OK;
}

static ifkv_status choose_first_token(ifkv_session *session, ifkv_pass *pass) {
    IFKV_TRY(choose_token(session, pass));
    if (session->engine->comm->rank == 0)
        memcpy(session->first_logits, session->logits,
               (size_t)session->engine->model.config.n_vocab * sizeof *session->logits);
    return IFKV_OK;
}

/* Project and store the rows of a part, let the others follow, and leave the rest of the layer. */
static ifkv_status store_and_refit(ifkv_session *session, int layer, ifkv_layer_part *part) {
    const unsigned project = IFKV_LAYER_Q | IFKV_LAYER_KV, rest = part->what & ~project;
    part->what &= project;
    IFKV_TRY(ifkv_refit_before(&session->refit, session->exchange, layer));
    IFKV_TRY(ifkv_layer_run_parts(&session->recompute, layer, part, 1));
    IFKV_TRY(ifkv_refit_after(&session->refit, session->exchange, layer));
    part->what = rest;
    return IFKV_OK;
}

ifkv_status ifkv_prefill_recompute(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const int64_t k = session->n_selected;
    const int n_layer = session->engine->model.config.n_layer;
    const bool has_rider = session->rides[IFKV_STAGE_PROMPT];
    ifkv_layer_part part[2];
    int64_t begin[3] = {0}, n_group = 1;
    if (k == 0) return IFKV_OK;
    list_selected(session);
    IFKV_TRY(begin_part(session, session->exchange, 0, k, 0, &part[0]));
    begin[1] = part[0].n_row;
    if (has_rider) {
        IFKV_TRY(list_tail(session, k, 0, session->n_prompt));
        IFKV_TRY(begin_part(session, session->prompt_exchange, k, session->n_prompt, begin[1],
                            &part[1]));
        n_group = ifkv_pass_add_riders(backend, part[1].n_row, n_group, begin);
    }
    IFKV_TRY(ifkv_pass_begin(&session->recompute, backend, begin[n_group], session->home_token,
                             session->home_position, n_group, begin));
    if (session->refit.is_on)
        IFKV_TRY(ifkv_refit_begin(&session->refit, session->exchange, session->engine->frequency,
                                  session->selected));
    for (int layer = 0; layer < n_layer; layer++) {
        /* K/V of layer 0 depend on token and position only and are right already; nothing reads the
         * last hidden state */
        part[0].what = IFKV_LAYER_ALL;
        if (layer == 0) part[0].what &= ~(unsigned)IFKV_LAYER_KV;
        if (layer + 1 == n_layer) part[0].what &= IFKV_LAYER_KV;
        if (session->refit.is_on && layer > 0) IFKV_TRY(store_and_refit(session, layer, &part[0]));
        IFKV_TRY(ifkv_layer_run_parts(&session->recompute, layer, part, has_rider ? 2 : 1));
        report(session, IFKV_STAGE_RECOMPUTE, layer + 1, n_layer);
    }
    if (!has_rider) return backend->ops->sync(backend);
    int64_t rider_bytes = part[1].bytes - ifkv_comm_received(session->engine->comm);
    IFKV_TRY(choose_first_token(session, &session->recompute));
    rider_bytes += ifkv_comm_received(session->engine->comm);
    count_rider(session, IFKV_STAGE_RECOMPUTE, IFKV_STAGE_PROMPT, rider_bytes);
    return IFKV_OK;
}

/* Run rows [first, first + n) of the prompt and what follows it through all layers. */
static ifkv_status run_tail(ifkv_session *session, int64_t first, int64_t n, ifkv_stage stage) {
    const int n_layer = session->engine->model.config.n_layer;
    ifkv_layer_part part;
    IFKV_TRY(list_tail(session, 0, first, n));
    IFKV_TRY(begin_part(session, session->prompt_exchange, 0, n, 0, &part));
    IFKV_TRY(ifkv_pass_begin(&session->prompt, session->engine->backend, part.n_row,
                             session->home_token, session->home_position, 1,
                             (int64_t[]){0, part.n_row}));
    for (int layer = 0; layer < n_layer; layer++) {
        IFKV_TRY(ifkv_layer_run_parts(&session->prompt, layer, &part, 1));
        if (stage == IFKV_STAGE_PROMPT) report(session, stage, layer + 1, n_layer);
    }
    return IFKV_OK;
}

ifkv_status ifkv_prefill_prompt(ifkv_session *session) {
    IFKV_TRY(run_tail(session, 0, session->n_prompt, IFKV_STAGE_PROMPT));
    return choose_first_token(session, &session->prompt);
}

static bool is_end(const ifkv_config *config, int32_t token) {
    for (int i = 0; i < config->n_eos; i++)
        if (config->eos[i] == token) return true;
    return false;
}

ifkv_status ifkv_prefill_decode(ifkv_session *session) {
    while (session->n_answer < session->max_new) {
        if (is_end(&session->engine->model.config, session->next_token)) {
            session->is_stopped = true;
            break;
        }
        session->answer[session->n_answer++] = session->next_token;
        report(session, IFKV_STAGE_DECODE, session->n_answer, session->max_new);
        if (session->n_answer == session->max_new)
            break; /* nothing needs the row of the last token */
        const int64_t at = session->n_prompt + session->n_answer - 1;
        session->token[session->n_context + at] = session->next_token;
        IFKV_TRY(run_tail(session, at, 1, IFKV_STAGE_DECODE));
        IFKV_TRY(choose_token(session, &session->prompt));
    }
    return IFKV_OK;
}
