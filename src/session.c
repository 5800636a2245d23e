/* Plan a session: host arrays and arena layout.  See session.h. */
#include "session.h"

#include "cost.h"
#include "digest.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_EPIC_K = 16, CHECK_LAYER = 1 };
static const char *const default_exchange = "auto";

/* Chunk bounds as they will be encoded: as given, or re-cut every options.chunk tokens. */
static ifkv_status cut_chunks(ifkv_session *session) {
    const ifkv_request *request = &session->request;
    const int64_t n_token = request->chunk_offsets[request->n_chunk],
                  chunk = session->options.chunk;
    session->n_given = chunk ? (n_token + chunk - 1) / chunk : request->n_chunk;
    IFKV_REQUIRE(session->n_given <= IFKV_MAX_CHUNKS, IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH,
                 "request: got %lld chunks of %lld tokens, expected at most %d",
                 (long long)session->n_given, (long long)chunk, IFKV_MAX_CHUNKS);
    const size_t n = (size_t)session->n_given + 1;
    session->given_offsets = malloc(n * sizeof *session->given_offsets);
    session->chunk_index = malloc(n * sizeof *session->chunk_index);
    IFKV_REQUIRE(session->given_offsets && session->chunk_index, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "session: out of host memory");
    for (int64_t i = 0; i <= session->n_given; i++) {
        const int64_t cut = chunk ? i * chunk : request->chunk_offsets[i];
        session->given_offsets[i] = cut < n_token ? cut : n_token;
        session->chunk_index[i] = i ? request->n_prefix + session->given_offsets[i] : 0;
    }
    return IFKV_OK;
}

static ifkv_status place(ifkv_session *session) {
    const ifkv_config *config = &session->engine->model.config;
    const double q_cols = (double)config->n_head * config->d_head,
                 kv_cols = (double)config->n_kv_head * config->d_head;
    const ifkv_encode_cost cost = {
        .per_row = 2.0 * config->n_layer * config->d_model *
                   (2 * q_cols + 2 * kv_cols + 3.0 * config->d_ff),
        .per_pair = 4.0 * config->n_layer * q_cols,
    };
    const int size = session->engine->comm->size;
    const ifkv_request *request = &session->request;
    if (!strcmp(session->method, "full")) {
        const int64_t whole[2] = {0, session->given_offsets[session->n_given]};
        return ifkv_placement_init(&session->placement, IFKV_PLACE_FIRST, size, request->n_prefix,
                                   1, whole, cost);
    }
    if (session->is_exact) {
        const bool is_zigzag = ifkv_exchange_find(session->method)->n_slice == 2;
        return ifkv_placement_init_slices(&session->placement,
                                          is_zigzag ? IFKV_PLACE_SLICES_ZIGZAG : IFKV_PLACE_SLICES,
                                          size, session->n_context);
    }
    ifkv_placement_kind kind = IFKV_PLACE_AUTO;
    IFKV_TRY(ifkv_session_placement(session->options.placement, &kind));
    IFKV_TRY(ifkv_placement_init(&session->placement, kind, size, request->n_prefix,
                                 session->n_given, session->given_offsets, cost));
    return session->reorder.is_on ? ifkv_placement_split_prefix(&session->placement) : IFKV_OK;
}

void ifkv_session_list_rows(ifkv_session *session) {
    const ifkv_placement *placement = &session->placement;
    const int rank = session->engine->comm->rank;
    int64_t n = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++)
        for (int64_t index = placement->offset[i];
             placement->rank[i] == rank && index < placement->offset[i + 1]; index++, n++) {
            session->cache_index[n] = session->position[n] = index;
        }
}

/* Sequence, question and the description of this rank's rows. */
static ifkv_status list_tokens(ifkv_session *session) {
    const ifkv_request *request = &session->request;
    const ifkv_placement *placement = &session->placement;
    const int rank = session->engine->comm->rank;
    const bool has_question = request->n_question > 0 && session->options.score_rows == NULL;
    session->n_question = has_question ? request->n_question : request->n_prompt;
    session->n_kept = ifkv_placement_kept_rows(placement, rank);
    const int64_t n_token = session->n_context + session->n_prompt + session->max_new;
    session->token = malloc((size_t)n_token * sizeof *session->token);
    session->question = malloc((size_t)session->n_question * sizeof *session->question + 1);
    session->cache_index =
        malloc((size_t)(session->n_kept + session->n_tail + 1) * sizeof *session->cache_index);
    session->position = malloc((size_t)session->n_kept * sizeof *session->position + 1);
    session->kept_token = malloc((size_t)session->n_kept * sizeof *session->kept_token + 1);
    session->recomputed = calloc((size_t)session->n_kept + 1, 1);
    session->answer = malloc((size_t)session->max_new * sizeof *session->answer + 1);
    IFKV_REQUIRE(session->token && session->question && session->cache_index && session->position &&
                     session->kept_token && session->recomputed && session->answer,
                 IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: out of host memory");
    memcpy(session->question, has_question ? request->question : request->prompt,
           (size_t)session->n_question * sizeof *session->question);
    if (request->n_prefix)
        memcpy(session->token, request->prefix, (size_t)request->n_prefix * sizeof *session->token);
    memcpy(session->token + request->n_prefix, request->chunk_tokens,
           (size_t)(session->n_context - request->n_prefix) * sizeof *session->token);
    memcpy(session->token + session->n_context, request->prompt,
           (size_t)session->n_prompt * sizeof *session->token);
    ifkv_session_list_rows(session);
    return IFKV_OK;
}

/* Rows that encode runs on this rank: for each chunk its prefix copy at shifted positions, then its
 * own rows. */
static ifkv_status list_encode_rows(ifkv_session *session) {
    const ifkv_placement *placement = &session->placement;
    const int rank = session->engine->comm->rank;
    session->n_encoded = ifkv_placement_encoded_rows(placement, rank);
    session->n_chunk = ifkv_placement_chunks(placement, rank);
    session->n_encode_rider = session->rides[IFKV_STAGE_SCORE] ? session->n_question : 0;
    const size_t n = (size_t)session->n_encoded, n_all = n + (size_t)session->n_encode_rider;
    session->encode_begin = malloc(((size_t)session->n_chunk + 2) * sizeof *session->encode_begin);
    session->encode_token = malloc(n_all * sizeof *session->encode_token + 1);
    session->encode_position = malloc(n_all * sizeof *session->encode_position + 1);
    session->encode_stage = malloc(3 * n * sizeof *session->encode_stage + 1);
    IFKV_REQUIRE(session->encode_begin && session->encode_token && session->encode_position &&
                     session->encode_stage,
                 IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: out of host memory");
    int64_t row = 0, n_chunk = 0, n_kept = 0;
    int64_t *begin = session->encode_stage, *end = begin + n, *kept = end + n;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != rank) continue;
        const int64_t dropped = ifkv_placement_dropped(placement, i), first = row;
        session->encode_begin[n_chunk++] = first;
        /* row a of the chunk is rotated at a + o_i - p, so that kept rows land at their index */
        for (int64_t position = placement->offset[i] - dropped; position < placement->offset[i + 1];
             position++, row++) {
            session->encode_position[row] = position;
            begin[row] = first;
            end[row] = row + 1;
            if (position >= placement->offset[i]) kept[n_kept++] = row;
        }
    }
    session->encode_begin[n_chunk] = row;
    for (int64_t i = 0; i < session->n_encode_rider; i++)
        session->encode_position[row + i] = session->n_context + i;
    session->n_encode_group = n_chunk;
    if (session->n_encode_rider > 0)
        session->n_encode_group = ifkv_pass_add_riders(
            session->engine->backend, session->n_encode_rider, n_chunk, session->encode_begin);
    return ifkv_pass_init(&session->encode, &session->engine->model, session->engine->backend,
                          session->engine->frequency, session->n_encoded + session->n_encode_rider,
                          session->n_encode_group);
}

void ifkv_session_spread_tokens(ifkv_session *session) {
    const ifkv_placement *placement = &session->placement;
    for (int64_t i = 0; i < session->n_kept; i++)
        session->kept_token[i] = session->token[session->cache_index[i]];
    if (session->reuse.is_on) return; /* lists its rows when it knows which it must encode */
    for (int64_t i = 0, row = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != session->engine->comm->rank) continue;
        const int64_t dropped = ifkv_placement_dropped(placement, i);
        const int64_t n = dropped + placement->offset[i + 1] - placement->offset[i];
        memcpy(session->encode_token + row, session->token,
               (size_t)dropped * sizeof *session->token);
        memcpy(session->encode_token + row + dropped, session->token + placement->offset[i],
               (size_t)(n - dropped) * sizeof *session->token);
        row += n;
    }
    memcpy(session->encode_token + session->n_encoded, session->question,
           (size_t)session->n_encode_rider * sizeof *session->question);
}

static ifkv_status copy_given_selection(ifkv_session *session) {
    const int64_t first = ifkv_select_first(&session->placement), n = session->options.n_selected;
    for (int64_t i = 0; i < n; i++) {
        const int64_t index = session->options.selected[i],
                      above = i ? session->options.selected[i - 1] : first - 1;
        IFKV_REQUIRE(index > above && index < session->n_context, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "selected[%lld]: got %lld, expected ascending indices from %lld to %lld",
                     (long long)i, (long long)index, (long long)first,
                     (long long)session->n_context - 1);
        session->selected[i] = index;
    }
    return IFKV_OK;
}

/* What the caller lets ride: "score", "prompt" or both. */
static bool may_ride(const ifkv_session *session, const char *rows) {
    const char *ride = session->options.ride;
    return !ride || !strcmp(ride, "both") || !strcmp(ride, rows);
}

static void print_score_layers(ifkv_session *session, const ifkv_select_input *input) {
    size_t used = 0;
    for (int i = 0; i < input->n_score_layer && used < sizeof session->score_layers; i++)
        used += (size_t)snprintf(session->score_layers + used, sizeof session->score_layers - used,
                                 "%s%d", i ? "," : "", input->score_layer[i]);
}

static ifkv_status plan_selection(ifkv_session *session) {
    const ifkv_prefill_options *options = &session->options;
    const ifkv_engine *engine = session->engine;
    const bool is_exact = session->is_exact || !strcmp(session->method, "full");
    const ifkv_select_ops *ops = ifkv_select_find(is_exact ? "none" : session->method);
    ifkv_select_input input = {
        .backend = engine->backend,
        .comm = engine->comm,
        .data = engine->data,
        .model = &engine->model,
        .frequency = engine->frequency,
        .placement = &session->placement,
        .cache = &session->cache,
        .n_question = session->n_question,
        .question = session->question,
        .token = session->kept_token,
        .seed = options->seed,
        .check_layer = CHECK_LAYER,
        .epic_k = options->epic_k ? options->epic_k : DEFAULT_EPIC_K,
        .progress = options->progress,
        .progress_arg = options->progress_arg,
    };
    IFKV_TRY(ifkv_scoring_parse(options, &input.is_local));
    input.has_sink = options->local_sink;
    int64_t num = 0, den = 1;
    IFKV_TRY(ifkv_ratio_parse(options->ratio ? options->ratio : "0.15", &num, &den));
    IFKV_TRY(ifkv_score_form_parse(options->score ? options->score : "l2", &input.form));
    IFKV_TRY(ifkv_geometry_parse(options->geometry, options->hp, &input.geometry));
    IFKV_TRY(ifkv_score_layers_parse(options->score_layers, engine->model.config.n_layer, &input));
    /* an exact method selects nothing, so nothing may be given either */
    int64_t n_eligible = is_exact ? 0 : session->n_context - ifkv_select_first(&session->placement);
    input.budget = options->selected ? options->n_selected : ops->budget(&input, num, den);
    if (session->reorder.is_on) {
        n_eligible = ifkv_reorder_eligible(&session->placement);
        input.budget = ifkv_select_by_ratio(num, den, session->n_context, n_eligible);
        IFKV_TRY(ifkv_reorder_plan(session, &input, num, den));
    }
    IFKV_REQUIRE(input.budget >= 0 && input.budget <= n_eligible, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "n_selected: got %lld, expected 0 to %lld", (long long)input.budget,
                 (long long)n_eligible);
    session->n_selected = input.budget;
    session->selected = malloc((size_t)input.budget * sizeof *session->selected + 1);
    IFKV_REQUIRE(session->selected, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "session: out of host memory");
    if (options->selected) return copy_given_selection(session);

    const bool is_scoring = ops->has_scores && (input.budget > 0 || options->keep_scores);
    if (is_scoring) {
        if (ops->is_question_scored) {
            print_score_layers(session, &input);
            session->geometry = input.geometry;
            session->scoring = input.is_local ? "local" : "exact";
        }
        /* with a store or a pool K lies in the shards unrotated until all layers are there */
        session->rides[IFKV_STAGE_SCORE] = may_ride(session, "score") && ops->ride_begin &&
                                           !session->reuse.is_on && !input.is_local &&
                                           input.geometry == IFKV_GEOMETRY_GLOBAL;
        input.is_riding = session->rides[IFKV_STAGE_SCORE];
        session->scores = malloc((size_t)session->n_context * sizeof *session->scores);
        IFKV_REQUIRE(session->scores, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                     "session: out of host memory");
    } else if (ops->has_scores) {
        ops = &ifkv_select_none_ops; /* nothing to choose from: do not look either */
    }
    return ifkv_selector_create(ops, &input, &session->selector);
}

static int64_t largest_shard(const ifkv_placement *placement) {
    int64_t most = 0;
    for (int r = 0; r < placement->size; r++) {
        const int64_t n = ifkv_placement_kept_rows(placement, r);
        if (n > most) most = n;
    }
    return most;
}

/* An exchange for up to max_row rows over all ranks, max_home of them here. */
static ifkv_status plan_exchange(ifkv_session *session, const char *exchange, int64_t max_row,
                                 int64_t max_home, ifkv_exchange **exchange_p) {
    const ifkv_engine *engine = session->engine;
    const ifkv_config *config = &engine->model.config;
    const ifkv_exchange_shape shape = {
        .n_head = config->n_head,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .n_layer = config->n_layer,
        .max_row = max_row,
        .max_home = max_home,
        .max_shard = largest_shard(&session->placement),
        .placement = &session->placement,
    };
    return ifkv_exchange_create(exchange, engine->backend, engine->data, &session->cache, &shape,
                                exchange_p);
}

static ifkv_status plan_passes(ifkv_session *session) {
    const ifkv_engine *engine = session->engine;
    const ifkv_comm *comm = engine->comm;
    const int64_t k = session->is_exact ? session->n_context : session->n_selected,
                  n_prompt = session->n_prompt;
    const ifkv_exchange_ops *ops = ifkv_exchange_find(session->exchange_name);
    int64_t home = ifkv_deal_count(k, comm->size, comm->rank),
            prompt_home = ifkv_deal_count(n_prompt, session->placement.n_tail_rank, comm->rank);
    if (ops && ops->is_home_owner) home = k < session->n_kept ? k : session->n_kept;
    IFKV_TRY(plan_exchange(session, session->exchange_name, k, home, &session->exchange));
    if (session->options.refit && !session->is_exact)
        IFKV_TRY(ifkv_refit_init(&session->refit, session->engine->backend,
                                 &session->exchange->shape, k, session->cache_index,
                                 session->n_kept));
    IFKV_TRY(plan_exchange(session, "query", n_prompt, prompt_home, &session->prompt_exchange));

    /* refit moves keys between the stores of the two parts */
    session->rides[IFKV_STAGE_PROMPT] =
        may_ride(session, "prompt") && session->n_selected > 0 && !session->refit.is_on;
    if (session->rides[IFKV_STAGE_PROMPT]) {
        home += prompt_home;
        prompt_home = prompt_home > 0; /* decode's row */
    }
    if (!session->is_exact)
        IFKV_TRY(ifkv_pass_init(&session->recompute, &engine->model, engine->backend,
                                engine->frequency, home, 2));
    IFKV_TRY(ifkv_pass_init(&session->prompt, &engine->model, engine->backend, engine->frequency,
                            prompt_home, 1));

    const size_t rows = (size_t)(k + n_prompt);
    session->pass_index = malloc(rows * sizeof *session->pass_index);
    session->pass_home = malloc(rows * sizeof *session->pass_home);
    session->pass_owner = malloc(rows * sizeof *session->pass_owner);
    session->home_token = malloc(rows * sizeof *session->home_token);
    session->home_position = malloc(rows * sizeof *session->home_position);
    IFKV_REQUIRE(session->pass_index && session->pass_home && session->pass_owner &&
                     session->home_token && session->home_position,
                 IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: out of host memory");
    if (comm->rank == 0) {
        const size_t bytes = (size_t)engine->model.config.n_vocab * sizeof *session->logits;
        session->logits = malloc(bytes);
        session->first_logits = malloc(bytes);
        IFKV_REQUIRE(session->logits && session->first_logits, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                     "session: out of host memory");
    }
    return IFKV_OK;
}

static bool is_exchange_open(const ifkv_session *session) {
    const char *name = session->options.exchange ? session->options.exchange : default_exchange;
    return !session->is_exact && !strcmp(name, "auto");
}

/* Memory of delta: weights, pool, shard and full copy. */
static double delta_bytes(const ifkv_session *session) {
    const ifkv_engine *engine = session->engine;
    const ifkv_config *config = &engine->model.config;
    const double row = 2.0 * config->n_layer * config->n_kv_head * config->d_head *
                       (double)ifkv_dtype_bytes(engine->backend->ops->dtype);
    return (double)engine->weight_bytes + (double)engine->most_pool +
           2 * row * (double)session->n_context;
}

/* `auto` is `delta` if shard and full copy, each of all context rows, fit beside weights and pool
 * into half of the least share of memory, else `query`: a function of lengths and of what all ranks
 * know, so that they decide alike. */
static const char *pick_exchange(const ifkv_session *session) {
    if (session->is_exact) return session->method; /* its own exchange */
    const char *name = session->options.exchange ? session->options.exchange : default_exchange;
    if (!is_exchange_open(session)) return name;
    if (session->options.refit) return "delta"; /* the only one that keeps the whole context */
    return delta_bytes(session) <= (double)session->engine->least_share / 2 ? "delta" : "query";
}

/* Estimated bytes of both, and what decides. */
static void explain_exchange(ifkv_session *session) {
    const ifkv_engine *engine = session->engine;
    const ifkv_cost_model model = {&engine->model.config,
                                   (double)ifkv_dtype_bytes(engine->backend->ops->dtype),
                                   sizeof(float), sizeof(double), false};
    if (!is_exchange_open(session) || !strcmp(session->method, "full") || session->refit.is_on)
        return;
    double mb[2] = {0};
    static const ifkv_cost_way ways[] = {IFKV_COST_DELTA, IFKV_COST_QUERY};
    for (int i = 0; i < 2; i++) {
        const ifkv_cost_bytes bytes = ifkv_cost_exchange(&model, ways[i], engine->comm->size,
                                                         session->n_context, session->n_selected);
        mb[i] = 1e-6 * engine->model.config.n_layer * (bytes.shared + bytes.asked + bytes.fresh);
    }
    snprintf(
        session->exchange_choice, sizeof session->exchange_choice,
        "%s: delta needs %.1f MB with the weights%s, half of a rank's memory is %.1f MB; a rank "
        "receives about %.2f MB by delta, %.2f MB by query",
        session->exchange_name, 1e-6 * delta_bytes(session),
        engine->most_pool > 0 ? " and kept chunks" : "", 1e-6 * (double)engine->least_share / 2,
        mb[0], mb[1]);
}

static ifkv_status read_arguments(ifkv_session *session, const ifkv_request *request,
                                  const ifkv_prefill_options *options) {
    IFKV_TRY(ifkv_prefill_options_check(options));
    IFKV_TRY(ifkv_struct_read(&session->request, sizeof session->request, request, "request"));
    IFKV_TRY(
        ifkv_struct_read(&session->options, sizeof session->options, options, "prefill_options"));
    session->method = session->options.method ? session->options.method : "infoflow";
    IFKV_REQUIRE(strcmp(session->method, "auto"), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "method: got auto, expected one that a session can run");
    session->is_exact = ifkv_method_is_exact(session->method);
    const char *rows = session->options.score_rows;
    if (rows && !strcmp(rows, "question")) session->options.score_rows = NULL;
    session->max_new = session->options.max_new;
    IFKV_TRY(ifkv_reorder_check(&session->options, &session->reorder.is_on));
    /* an exact prefill makes other rows than a chunk's own */
    const bool has_entries = !session->is_exact && strcmp(session->method, "full");
    bool is_pool_on;
    IFKV_TRY(ifkv_session_pool(session->options.pool, &is_pool_on));
    session->reuse.has_store = has_entries && session->options.store;
    session->reuse.has_pool = has_entries && is_pool_on && session->engine->pool.is_on;
    session->reuse.is_on =
        session->reuse.has_store || session->reuse.has_pool || session->reorder.is_on;
    if (session->reuse.has_store)
        IFKV_TRY(ifkv_struct_read(&session->reuse.store, sizeof session->reuse.store,
                                  session->options.store, "store"));
    IFKV_REQUIRE(!session->reuse.has_store ||
                     (session->reuse.store.load && session->reuse.store.save),
                 IFKV_ERR_USAGE, IFKV_E_STRUCT, "store: got NULL for load or save");
    IFKV_TRY(
        ifkv_request_check(&session->engine->model.config, &session->request, session->max_new));
    const ifkv_request *r = &session->request;
    session->n_context = r->n_prefix + r->chunk_offsets[r->n_chunk];
    session->exchange_name = pick_exchange(session);
    IFKV_REQUIRE(!session->options.refit || !session->reorder.is_on, IFKV_ERR_USAGE,
                 IFKV_E_CONFLICT, "refit and reorder exclude each other");
    IFKV_REQUIRE(!session->options.refit || session->is_exact || session->engine->comm->size == 1 ||
                     ifkv_exchange_find(session->exchange_name)->whole,
                 IFKV_ERR_USAGE, IFKV_E_VALUE, "refit: got exchange %s, expected delta",
                 session->exchange_name);
    session->n_prompt = r->n_prompt;
    session->n_tail = r->n_prompt + (session->max_new > 0 ? session->max_new - 1 : 0);
    return IFKV_OK;
}

static void add_text(ifkv_digest *digest, const char *text) {
    ifkv_digest_add(digest, text, strlen(text) + 1);
}

/* Which messages are sent, how long they are and what the scores in them mean.  Not the ids, which
 * rank 0 hands out, nor seed and selected rows, which the digest of the selection covers. */
static ifkv_status digest_plan(ifkv_session *session) {
    const ifkv_prefill_options *options = &session->options;
    const ifkv_placement *placement = &session->placement;
    ifkv_digest *digest;
    IFKV_TRY(ifkv_digest_create(&digest));
    add_text(digest, session->method);
    add_text(digest, session->exchange_name);
    add_text(digest, session->scores ? session->score_layers : "");
    add_text(digest, session->scores && options->score ? options->score : "l2");
    add_text(digest, session->scoring);
    const int64_t number[] = {
        session->n_context,        session->n_prompt,       session->n_question,
        session->n_selected,       session->max_new,        session->scores != NULL,
        options->selected != NULL, placement->n_prefix,     placement->n_chunk,
        session->reuse.has_store,  session->reuse.has_pool, session->geometry,
        options->local_sink,       session->reorder.is_on,  session->refit.is_on};
    for (size_t i = 0; i < sizeof number / sizeof *number; i++)
        ifkv_digest_add_u64(digest, (uint64_t)number[i]);
    for (int i = 0; i < IFKV_N_STAGE; i++) ifkv_digest_add_u64(digest, session->rides[i]);
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        ifkv_digest_add_u64(digest, (uint64_t)placement->offset[i]);
        ifkv_digest_add_u64(digest, (uint64_t)placement->rank[i]);
    }
    session->plan_digest = ifkv_digest_value(digest);
    ifkv_digest_destroy(digest);
    return IFKV_OK;
}

ifkv_status ifkv_session_create(const ifkv_engine *engine, const ifkv_request *request,
                                const ifkv_prefill_options *options, ifkv_session **session_p,
                                size_t *arena_bytes_p) {
    ifkv_session *session = calloc(1, sizeof *session);
    IFKV_REQUIRE(session, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: out of host memory");
    ifkv_status status;
    ifkv_arena arena = {0};
    session->engine = (ifkv_engine *)engine;
    session->scoring = session->auto_exact = "";
    IFKV_TRY_GOTO(status, read_arguments(session, request, options), err_destroy);
    IFKV_TRY_GOTO(status, cut_chunks(session), err_destroy);
    IFKV_TRY_GOTO(status, place(session), err_destroy);
    IFKV_TRY_GOTO(status, list_tokens(session), err_destroy);
    IFKV_TRY_GOTO(status, plan_selection(session), err_destroy);
    IFKV_TRY_GOTO(status,
                  session->reuse.is_on ? ifkv_reuse_plan(session) : list_encode_rows(session),
                  err_destroy);
    IFKV_TRY_GOTO(status, plan_passes(session), err_destroy);
    IFKV_TRY_GOTO(status, digest_plan(session), err_destroy);
    explain_exchange(session);
    ifkv_session_layout(session, &arena);
    if (arena.is_overflown) {
        status =
            IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "session: memory plan exceeds 64 bits");
        goto err_destroy;
    }
    *arena_bytes_p = arena.peak;
    *session_p = session;
    return IFKV_OK;
err_destroy:
    ifkv_session_destroy(session);
    return status;
}

static void layout_chunk_exchange(ifkv_session *session, ifkv_arena *arena) {
    const int n_head = session->engine->model.config.n_head;
    session->span_begin = ifkv_arena_take(arena, session->n_encoded, sizeof(int64_t));
    session->span_end = ifkv_arena_take(arena, session->n_encoded, sizeof(int64_t));
    session->kept_row = ifkv_arena_take(arena, session->n_kept, sizeof(int64_t));
    session->encode_lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, session->n_encoded, n_head);
}

void ifkv_session_layout(ifkv_session *session, ifkv_arena *arena) {
    const ifkv_engine *engine = session->engine;
    const ifkv_config *config = &engine->model.config;
    const ifkv_dtype dtype = engine->backend->ops->dtype;
    const int64_t tail =
        ifkv_placement_tail_rows(&session->placement, engine->comm->rank, session->n_tail);
    ifkv_kvcache_layout(&session->cache, arena, dtype, config->n_layer,
                        (int64_t)config->n_kv_head * config->d_head, session->n_kept + tail);
    session->cache.index = session->cache_index;
    session->cache.n_row = session->n_kept;
    if (engine->comm->rank == 0)
        session->logits_view = ifkv_arena_view(arena, IFKV_DTYPE_F32, 1, config->n_vocab);

    session->exchange->ops->layout_shared(session->exchange, arena);

    const size_t mark = ifkv_arena_mark(arena); /* stages follow each other and share the rest */
    ifkv_pass_layout(&session->encode, arena, dtype);
    if (session->is_exact)
        session->exchange->ops->layout(session->exchange, arena);
    else
        layout_chunk_exchange(session, arena);
    if (session->reuse.is_on) ifkv_reuse_layout(session, arena);
    if (!session->rides[IFKV_STAGE_SCORE]) ifkv_arena_reset(arena, mark);
    if (session->reorder.is_on) {
        ifkv_reorder_layout(session, arena);
        ifkv_arena_reset(arena, mark);
    }
    if (session->selector) session->selector->ops->layout(session->selector, arena);
    ifkv_arena_reset(arena, mark);
    if (!session->is_exact) {
        ifkv_pass_layout(&session->recompute, arena, dtype);
        session->exchange->ops->layout(session->exchange, arena);
        ifkv_refit_layout(&session->refit, session->exchange, arena);
    }
    if (!session->rides[IFKV_STAGE_PROMPT]) ifkv_arena_reset(arena, mark);
    ifkv_pass_layout(&session->prompt, arena, dtype);
    session->prompt_exchange->ops->layout(session->prompt_exchange, arena);
}

void ifkv_session_destroy(ifkv_session *session) {
    if (!session) return;
    ifkv_selector_destroy(session->selector);
    ifkv_exchange_destroy(session->exchange);
    ifkv_exchange_destroy(session->prompt_exchange);
    ifkv_refit_fini(&session->refit);
    ifkv_pass_fini(&session->encode);
    ifkv_pass_fini(&session->recompute);
    ifkv_pass_fini(&session->prompt);
    ifkv_placement_fini(&session->placement);
    ifkv_reuse_fini(&session->reuse);
    ifkv_reorder_fini(&session->reorder);
    void *const owned[] = {
        session->given_offsets, session->chunk_index,     session->token,
        session->question,      session->cache_index,     session->encode_begin,
        session->encode_token,  session->encode_position, session->encode_stage,
        session->selected,      session->scores,          session->logits,
        session->first_logits,  session->pass_index,      session->pass_home,
        session->pass_owner,    session->home_token,      session->home_position,
        session->answer,        session->recomputed,      session->position,
        session->kept_token,
    };
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(session);
}
