/* Costs of a prefill.  See cost.h. */
#include "cost.h"

#include <math.h>
#include <string.h>

bool ifkv_cost_way_find(const char *name, ifkv_cost_way *way_p) {
    static const char *const names[] = {
        [IFKV_COST_QUERY] = "query",        [IFKV_COST_DELTA] = "delta", [IFKV_COST_KV] = "kv",
        [IFKV_COST_LOCAL] = "local",        [IFKV_COST_EXACT] = "full",  [IFKV_COST_RING] = "ring",
        [IFKV_COST_ALLGATHER] = "allgather"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], name)) continue;
        *way_p = (ifkv_cost_way)i;
        return true;
    }
    return false;
}

/* ---- one layer ---- */

static double q_cols(const ifkv_config *c) {
    return (double)c->n_head * c->d_head;
}
static double kv_cols(const ifkv_config *c) {
    return (double)c->n_kv_head * c->d_head;
}

/* Parameters of the matrices: K and V; Q, K and V; all of a layer. */
static double kv_parameters(const ifkv_config *c) {
    return 2 * kv_cols(c) * c->d_model;
}
static double qkv_parameters(const ifkv_config *c) {
    return q_cols(c) * c->d_model + kv_parameters(c);
}
static double layer_parameters(const ifkv_config *c) {
    return qkv_parameters(c) + q_cols(c) * c->d_model + 3.0 * c->d_ff * c->d_model;
}

/* K and V of a token in a layer. */
static double kv_bytes(const ifkv_cost_model *model) {
    return 2 * kv_cols(model->config) * model->element_bytes;
}

/* Element-wise passes over a row in a layer, every operand read and every result written: two
 * norms; norms of heads; rotation; K and V into the cache; two residual sums; SwiGLU. */
static double pass_bytes(const ifkv_cost_model *model) {
    const ifkv_config *c = model->config;
    const double heads = q_cols(c) + kv_cols(c);
    return model->element_bytes *
           (2 * 2.0 * c->d_model + (c->has_head_norm ? 2 * heads : 0) + 2 * heads + 4 * kv_cols(c) +
            2 * 3.0 * c->d_model + 3.0 * c->d_ff);
}

/* n rows through layers whose matrices have so many parameters together. */
static void add_rows(ifkv_cost_work *work, const ifkv_cost_model *model, double n,
                     double parameters) {
    if (n <= 0) return;
    work->matmul += 2 * n * parameters;
    work->weight_bytes += model->element_bytes * parameters;
    work->pass_bytes += n * pass_bytes(model) * parameters / layer_parameters(model->config);
}

/* Query rows times the keys that each sees, in n_layer layers: q.k and p.v. */
static void add_pairs(ifkv_cost_work *work, const ifkv_cost_model *model, double pairs,
                      double n_layer) {
    work->attention += 4 * q_cols(model->config) * pairs * n_layer;
}

/* A collective is a message from every other rank. */
static void add_messages(ifkv_cost_work *work, double bytes, int size, double n_collective) {
    if (size == 1) return;
    work->link_bytes += bytes;
    work->n_message += n_collective * (size - 1);
}

static double causal_pairs(int64_t begin, int64_t end) {
    return ((double)end * ((double)end + 1) - (double)begin * ((double)begin + 1)) / 2;
}

/* Layers whose attention runs: nothing reads the output of the last one. */
static double attention_layers(const ifkv_cost_model *model) {
    return model->config->n_layer - (model->is_whole ? 0 : 1);
}

ifkv_cost_bytes ifkv_cost_exchange(const ifkv_cost_model *model, ifkv_cost_way way, int size,
                                   int64_t n_context, int64_t n_row) {
    const ifkv_config *c = model->config;
    const double others = (double)(size - 1) / size, row = kv_bytes(model), k = (double)n_row;
    const double asked = q_cols(c) * (model->element_bytes + model->part_bytes) + 4.0 * c->n_head;
    ifkv_cost_bytes bytes = {0, 0, 0};
    switch (way) {
    case IFKV_COST_QUERY:
        bytes.asked = others * k * asked;
        bytes.fresh = others * k / size * row;
        break;
    case IFKV_COST_DELTA:
        bytes.shared = others * (double)n_context * row;
        bytes.fresh = others * k * row;
        break;
    case IFKV_COST_KV: bytes.fresh = others * k * row; break;
    case IFKV_COST_RING:
    case IFKV_COST_ALLGATHER: bytes.shared = others * (double)n_context * row; break;
    case IFKV_COST_LOCAL:
    case IFKV_COST_EXACT: break;
    }
    return bytes;
}

/* ---- stages ---- */

static bool is_exact(ifkv_cost_way way) {
    return way >= IFKV_COST_EXACT;
}

/* Parameters that context rows meet: the last layer stops after K and V. */
static double encode_parameters(const ifkv_cost_model *model) {
    const ifkv_config *c = model->config;
    return attention_layers(model) * layer_parameters(c) + (model->is_whole ? 0 : kv_parameters(c));
}

static void count_prefill(const ifkv_cost_model *model, const ifkv_cost_plan *plan,
                          ifkv_cost_way way, int rank, ifkv_cost_work *work) {
    const ifkv_placement *placement = plan->placement;
    const double n_layer = attention_layers(model);
    double pairs = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++)
        if (placement->rank[i] == rank)
            pairs += causal_pairs(placement->offset[i], placement->offset[i + 1]);
    add_rows(work, model, (double)ifkv_placement_kept_rows(placement, rank),
             encode_parameters(model));
    add_pairs(work, model, pairs, n_layer);
    const ifkv_cost_bytes bytes =
        ifkv_cost_exchange(model, way, placement->size, placement->n_context, 0);
    if (way != IFKV_COST_EXACT)
        add_messages(work, bytes.shared * n_layer, placement->size, n_layer);
    work->is_hidden = way == IFKV_COST_RING;
}

/* What is loaded is read, checked, copied and rotated: as many passes over K and V. */
enum { LOAD_PASSES = 4 };

static bool is_cold(const ifkv_cost_plan *plan) {
    for (int64_t i = 0; plan->is_loaded && i < plan->placement->n_chunk; i++)
        if (plan->is_loaded[i]) return false;
    return true;
}

static void count_encode(const ifkv_cost_model *model, const ifkv_cost_plan *plan,
                         ifkv_cost_way way, int rank, ifkv_cost_work *work) {
    const ifkv_placement *placement = plan->placement;
    const int n_layer = model->config->n_layer;
    double rows = 0, pairs = 0, loaded = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != rank) continue;
        const int64_t kept = placement->offset[i + 1] - placement->offset[i];
        const int64_t n = kept + ifkv_placement_dropped(placement, i);
        const bool is_loaded = plan->is_loaded && plan->is_loaded[i];
        rows += is_loaded ? 0 : (double)n;
        pairs += is_loaded ? 0 : causal_pairs(0, n);
        loaded += is_loaded ? (double)kept : 0;
    }
    add_rows(work, model, rows, encode_parameters(model));
    add_pairs(work, model, pairs, attention_layers(model));
    work->pass_bytes += LOAD_PASSES * loaded * kv_bytes(model) * n_layer;
    const ifkv_cost_bytes bytes =
        ifkv_cost_exchange(model, way, placement->size, placement->n_context, plan->n_selected);
    if (way == IFKV_COST_DELTA)
        add_messages(work, bytes.shared * n_layer, placement->size, n_layer);
}

static void count_score(const ifkv_cost_model *model, const ifkv_cost_plan *plan, int rank,
                        ifkv_cost_work *work) {
    const ifkv_config *c = model->config;
    const ifkv_placement *placement = plan->placement;
    const double n = (double)plan->n_question, n_layer = plan->n_score_layer;
    const double kept = (double)ifkv_placement_kept_rows(placement, rank);
    if (n_layer == 0) return;
    add_rows(work, model, n, (n_layer - 1) * layer_parameters(c) + qkv_parameters(c));
    if (plan->has_riders && is_cold(plan)) work->weight_bytes = 0;
    add_pairs(work, model, n * kept + n * (n + 1) / 2, n_layer);
    /* an lse from every other rank, and above the last layer a partial output with it */
    const double lse = (placement->size - 1) * n * c->n_head * model->score_part_bytes;
    const double bytes = lse * ((n_layer - 1) * (c->d_head + 1) + 1);
    add_messages(work, bytes + 4 * ((double)placement->n_context - kept), placement->size,
                 n_layer + 1);
}

/* Rows [begin, end) of the context as if chunk 0 were not there. */
static double eligible_rows(int64_t first, int64_t begin, int64_t end) {
    if (begin < first) begin = first;
    return end > begin ? (double)(end - begin) : 0;
}

/* Keys in chunk i that eligible rows see: those behind it all of them, its own the earlier ones. */
static double seen_pairs(const ifkv_placement *placement, int64_t first, int64_t i) {
    const int64_t begin = placement->offset[i], end = placement->offset[i + 1];
    return (double)(end - begin) * eligible_rows(first, end, placement->n_context) +
           (begin >= first ? causal_pairs(0, end - begin) : 0);
}

static void count_recompute(const ifkv_cost_model *model, const ifkv_cost_plan *plan,
                            ifkv_cost_way way, int rank, ifkv_cost_work *work) {
    const ifkv_placement *placement = plan->placement;
    const int64_t n_context = placement->n_context, k = plan->n_selected;
    const int64_t first = placement->offset[ifkv_placement_first_document(placement) + 1];
    const int size = placement->size;
    const double n_layer = model->config->n_layer, n_attended = attention_layers(model);
    if (k == 0 || first == n_context) return;
    const double share = (double)k / eligible_rows(first, first, n_context);
    double rows = (double)k / size, pairs = 0, owned = 0, own_pairs = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        const int64_t begin = placement->offset[i], end = placement->offset[i + 1];
        if (placement->rank[i] != rank) continue;
        pairs += share * seen_pairs(placement, first, i); /* K and V stay, queries come */
        /* of its own rows each sees this rank's keys: at most all of them */
        own_pairs += share * (eligible_rows(first, begin, end) * owned +
                              (begin >= first ? causal_pairs(0, end - begin) : 0));
        owned += (double)(end - begin);
    }
    if (way == IFKV_COST_DELTA) /* the same over full K and V, dealt evenly */
        pairs = rows * (double)(n_context + first + 1) / 2;
    if (way == IFKV_COST_KV || way == IFKV_COST_LOCAL) {
        rows = 0;
        for (int64_t i = 0; i < placement->n_chunk; i++)
            if (placement->rank[i] == rank)
                rows +=
                    share * eligible_rows(first, placement->offset[i], placement->offset[i + 1]);
        pairs = own_pairs;
        if (way == IFKV_COST_KV) pairs += rows * ((double)k - rows) / 2;
    }
    /* layer 0 asks only, the last one stores only: together one layer */
    add_rows(work, model, rows, n_attended * layer_parameters(model->config));
    add_pairs(work, model, pairs, n_attended);
    const ifkv_cost_bytes bytes = ifkv_cost_exchange(model, way, size, n_context, k);
    const double n_stored = n_layer - (model->is_whole ? 0 : 1);
    if (way != IFKV_COST_LOCAL)
        add_messages(work, bytes.asked * n_attended + bytes.fresh * n_stored, size,
                     (way == IFKV_COST_QUERY ? 3 : 1) * n_attended);
}

/* Dealt over the ranks like any pass of exchange query; the last row meets the LM head on rank 0.
 */
static void count_prompt(const ifkv_cost_model *model, const ifkv_cost_plan *plan, int rank,
                         ifkv_cost_work *work) {
    const ifkv_config *c = model->config;
    const ifkv_placement *placement = plan->placement;
    const int size = placement->n_tail_rank;
    const double n = (double)plan->n_prompt, n_layer = c->n_layer;
    if (rank >= size) return;
    add_rows(work, model, n / size, n_layer * layer_parameters(c));
    if (plan->has_riders && plan->n_selected > 0) work->weight_bytes = 0;
    add_pairs(work, model,
              n * (double)ifkv_placement_kept_rows(placement, rank) + n * (n + 1) / 2 / size,
              n_layer);
    const ifkv_cost_bytes bytes =
        ifkv_cost_exchange(model, IFKV_COST_QUERY, size, placement->n_context, plan->n_prompt);
    add_messages(work, (bytes.asked + bytes.fresh) * n_layer, size, 3 * n_layer);
    if (rank > 0) return;
    work->matmul += 2.0 * (double)c->n_vocab * c->d_model;
    work->weight_bytes += model->element_bytes * (double)c->n_vocab * c->d_model;
}

void ifkv_cost_count(const ifkv_cost_model *model, const ifkv_cost_plan *plan, ifkv_cost_way way,
                     int rank, ifkv_cost_work work[IFKV_N_STAGE]) {
    memset(work, 0, IFKV_N_STAGE * sizeof *work);
    count_prompt(model, plan, rank, &work[IFKV_STAGE_PROMPT]);
    if (is_exact(way)) {
        count_prefill(model, plan, way, rank, &work[IFKV_STAGE_ENCODE]);
        return;
    }
    count_encode(model, plan, way, rank, &work[IFKV_STAGE_ENCODE]);
    count_score(model, plan, rank, &work[IFKV_STAGE_SCORE]);
    count_recompute(model, plan, way, rank, &work[IFKV_STAGE_RECOMPUTE]);
}

/* ---- time ---- */

static double at(double amount, double rate) {
    return rate > 0 ? amount / rate : 0;
}

double ifkv_cost_seconds(const ifkv_rates *rates, const ifkv_cost_work *work) {
    const double linear =
        fmax(at(work->matmul, rates->matmul), at(work->weight_bytes, rates->memory));
    const double attention = at(work->attention, rates->attention);
    const double link = at(work->link_bytes, rates->link) + work->n_message * rates->message_s;
    return linear + at(work->pass_bytes, rates->passes) +
           (work->is_hidden ? fmax(attention, link) : attention + link);
}

double ifkv_cost_time(const ifkv_cost_model *model, const ifkv_cost_plan *plan, ifkv_cost_way way,
                      const ifkv_rates *rates, double *stage) {
    ifkv_cost_work work[IFKV_N_STAGE];
    double most[IFKV_N_STAGE] = {0}, sum = 0;
    for (int rank = 0; rank < plan->placement->size; rank++) {
        ifkv_cost_count(model, plan, way, rank, work);
        for (int i = 0; i < IFKV_N_STAGE; i++)
            most[i] = fmax(most[i], ifkv_cost_seconds(rates, &work[i]));
    }
    for (int i = 0; i < IFKV_N_STAGE; i++) sum += most[i];
    if (stage) memcpy(stage, most, sizeof most);
    return sum;
}

void ifkv_cost_fit_link(int n, const double *bytes, const double *seconds, double *message_s_p,
                        double *link_p) {
    static const double least = 1e-18; /* seconds a byte */
    /* minimise the sum of (message_s u + slope v - 1)^2, u = 1 / seconds, v = bytes / seconds */
    double uu = 0, uv = 0, vv = 0, u_sum = 0, v_sum = 0;
    for (int i = 0; i < n; i++) {
        const double u = 1 / seconds[i], v = bytes[i] / seconds[i];
        uu += u * u;
        uv += u * v;
        vv += v * v;
        u_sum += u;
        v_sum += v;
    }
    const double determinant = uu * vv - uv * uv;
    double message_s = (u_sum * vv - v_sum * uv) / determinant;
    double slope = (v_sum * uu - u_sum * uv) / determinant;
    if (message_s < 0) {
        message_s = 0;
        slope = v_sum / vv;
    } else if (slope < 0) {
        message_s = u_sum / uu;
        slope = 0;
    }
    *message_s_p = message_s;
    *link_p = 1 / fmax(slope, least);
}

bool ifkv_cost_takes_infoflow(double exact_ms, double infoflow_ms) {
    return infoflow_ms <= 0.97 * exact_ms;
}
