/* Command plan: what a prefill on P devices costs, from lengths and rates alone.  See cli.h.
 *
 * Nothing is run and no weight is read: everything printed is computed, and the ranks need not
 * exist.  Floors are those of algorithm 9.2: linear work and attention at the device's rates, each
 * rank's share, the last rank counting; estimates add element-wise passes, messages, prompt and
 * LM head, at the lower rates. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "cost.h"
#include "json.h"
#include "placement.h"
#include "select.h"
#include "status.h"

enum { N_QUESTION = 20, N_PROMPT = 32, BF16_BYTES = 2, DEFAULT_CHUNK = 2048, MAX_RANK = 1024 };

typedef struct way {
    const char *name;
    ifkv_cost_way way;
    bool is_exact, is_warm, has_copy; /* copy: all K/V on every rank */
} way;

static const way ways[] = {
    {"full, one rank", IFKV_COST_EXACT, true, false, false},
    {"allgather", IFKV_COST_ALLGATHER, true, false, true},
    {"ring", IFKV_COST_RING, true, false, false},
    {"infoflow/query", IFKV_COST_QUERY, false, false, false},
    {"infoflow/delta", IFKV_COST_DELTA, false, false, true},
    {"infoflow/query/warm", IFKV_COST_QUERY, false, true, false},
    {"infoflow/delta/warm", IFKV_COST_DELTA, false, true, true},
};
enum {
    N_WAY = sizeof ways / sizeof *ways,
    RING = 2,
    COLD_QUERY = 3,
    COLD_DELTA,
    WARM_QUERY,
    WARM_DELTA
};

typedef struct answer {
    double fast_ms, slow_ms; /* floors */
    double estimate_ms;
    double tflop;    /* linear work and attention, all ranks */
    double mb_layer; /* received per rank and layer while rows are computed, mean */
    double weights, shard, copy, scratch; /* bytes of the fullest rank */
} answer;

typedef struct plan_run {
    const cli_options *options;
    ifkv_config config;
    cli_device device;
    ifkv_rates link; /* link and message_s only */
    int n_rank;
    int64_t chunk, num, den; /* ratio */
} plan_run;

/* ---- input ---- */

static ifkv_status read_json(const char *path, json_t **root_p) {
    const ifkv_json_limits limits = {.max_bytes = 1 << 20};
    char *text = NULL, shown[IFKV_QUOTE_BYTES];
    size_t bytes = 0;
    IFKV_TRY(ifkv_file_read(path, limits.max_bytes, IFKV_E_ARGUMENT, &text, &bytes));
    const ifkv_status status =
        ifkv_json_parse(ifkv_path_quote(path, shown), text, bytes, &limits, IFKV_E_VALUE, root_p);
    free(text);
    return status;
}

/* A positive number, or of a list its i-th. */
static ifkv_status number(const char *path, const json_t *root, const char *name, size_t i,
                          double scale, double *value_p) {
    const json_t *value = json_object_get(root, name);
    if (json_is_array(value)) value = json_array_get(value, i);
    char shown[IFKV_QUOTE_BYTES];
    IFKV_REQUIRE(json_is_number(value) && json_number_value(value) > 0, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s /%s: expected a positive number", ifkv_path_quote(path, shown), name);
    *value_p = scale * json_number_value(value);
    return IFKV_OK;
}

ifkv_status cli_device_read(const char *path, cli_device *d) {
    json_t *root = NULL;
    ifkv_status status;
    IFKV_TRY(read_json(path, &root));
    ifkv_rates *const rates[] = {&d->fast, &d->slow};
    for (size_t i = 0; i < 2; i++) {
        IFKV_TRY_GOTO(status, number(path, root, "matmul_tflops", i, 1e12, &rates[i]->matmul), out);
        IFKV_TRY_GOTO(status, number(path, root, "attention_tflops", i, 1e12, &rates[i]->attention),
                      out);
        IFKV_TRY_GOTO(status, number(path, root, "memory_gbytes_per_s", i, 1e9, &rates[i]->memory),
                      out);
    }
    IFKV_TRY_GOTO(status, number(path, root, "passes_gbytes_per_s", 0, 1e9, &d->passes), out);
    IFKV_TRY_GOTO(status, number(path, root, "memory_gbytes", 0, 1e9, &d->memory_bytes), out);
    d->peak = 0;
    if (json_object_get(root, "peak_tflops"))
        status = number(path, root, "peak_tflops", 0, 1e12, &d->peak);
out:
    json_decref(root);
    return status;
}

/* The nominal link of a profile, or its first. */
static ifkv_status read_link(const char *path, ifkv_rates *rates) {
    cli_link link[CLI_MAX_LINK];
    int n = 0, chosen = 0;
    IFKV_TRY(cli_links_read(path, link, &n));
    for (int i = 0; i < n; i++)
        if (strstr(link[i].name, "nominal")) chosen = i;
    rates->link = 1e9 * link[chosen].link.gbytes_per_s;
    rates->message_s = 1e-6 * link[chosen].link.alpha_us;
    return IFKV_OK;
}

/* ---- arithmetic ---- */

static ifkv_status place(const plan_run *run, const way *w, int64_t n_context,
                         ifkv_placement *placement, bool **is_loaded_p) {
    const ifkv_encode_cost none = {0, 0};
    const int64_t n_chunk = (n_context + run->chunk - 1) / run->chunk;
    *is_loaded_p = NULL;
    if (w->way == IFKV_COST_EXACT)
        return ifkv_placement_init(placement, IFKV_PLACE_FIRST, 1, 0, 1, (int64_t[]){0, n_context},
                                   none);
    if (w->is_exact)
        return ifkv_placement_init_slices(
            placement, w->way == IFKV_COST_RING ? IFKV_PLACE_SLICES_ZIGZAG : IFKV_PLACE_SLICES,
            run->n_rank, n_context);
    int64_t *offset = malloc((size_t)(n_chunk + 1) * sizeof *offset);
    bool *is_loaded = malloc((size_t)n_chunk * sizeof *is_loaded);
    ifkv_status status = offset && is_loaded
                             ? IFKV_OK
                             : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "plan: out of memory");
    for (int64_t i = 0; i <= n_chunk && status == IFKV_OK; i++)
        offset[i] = i * run->chunk < n_context ? i * run->chunk : n_context;
    for (int64_t i = 0; i < n_chunk && status == IFKV_OK; i++) is_loaded[i] = w->is_warm;
    if (status == IFKV_OK)
        status = ifkv_placement_init(placement, IFKV_PLACE_ZIGZAG, run->n_rank, 0, n_chunk, offset,
                                     none);
    free(offset);
    if (status != IFKV_OK) {
        free(is_loaded);
        return status;
    }
    *is_loaded_p = is_loaded;
    return IFKV_OK;
}

static double floor_ms(const plan_run *run, const ifkv_cost_plan *plan, const way *w,
                       const ifkv_rates *rates) {
    const ifkv_cost_model model = {&run->config, BF16_BYTES, BF16_BYTES, 4, true};
    ifkv_cost_plan bare = *plan;
    double stage[IFKV_N_STAGE];
    bare.n_question = bare.n_prompt = 1; /* as 9.2 counts */
    ifkv_cost_time(&model, &bare, w->way, rates, stage);
    return 1e3 * (stage[IFKV_STAGE_ENCODE] + stage[IFKV_STAGE_SCORE] + stage[IFKV_STAGE_RECOMPUTE]);
}

/* Linear work and attention of all ranks. */
static double all_flop(const ifkv_cost_model *model, const ifkv_cost_plan *plan, const way *w,
                       int size) {
    double flop = 0;
    for (int r = 0; r < size; r++) {
        ifkv_cost_work work[IFKV_N_STAGE];
        ifkv_cost_count(model, plan, w->way, r, work);
        for (int i = IFKV_STAGE_ENCODE; i <= IFKV_STAGE_PROMPT; i++)
            flop += work[i].matmul + work[i].attention;
    }
    return flop;
}

/* K/V, weights, and the widest buffers of a pass of its rows: the planner of a run is exact. */
static void count_memory(const plan_run *run, const ifkv_placement *placement, const way *w,
                         int64_t n_context, answer *a) {
    const ifkv_config *c = &run->config;
    const double kv = 2.0 * BF16_BYTES * c->n_layer * c->n_kv_head * c->d_head,
                 q_cols = (double)c->n_head * c->d_head, kv_cols = (double)c->n_kv_head * c->d_head,
                 layer = (double)c->d_model * (2 * q_cols + 2 * kv_cols + 3.0 * c->d_ff),
                 table = (double)c->n_vocab * c->d_model * (c->is_tied ? 1 : 2);
    int64_t most = 0;
    for (int r = 0; r < placement->size; r++) {
        const int64_t n = ifkv_placement_kept_rows(placement, r);
        if (n > most) most = n;
    }
    a->weights = BF16_BYTES * (layer * c->n_layer + table);
    a->shard = kv * (double)most;
    a->copy = w->has_copy && placement->size > 1 ? kv * (double)n_context : 0;
    a->scratch = BF16_BYTES * (double)most * (c->d_model + 2 * q_cols + 2 * kv_cols);
}

static ifkv_status compute(const plan_run *run, const way *w, int64_t n_context, answer *a) {
    ifkv_placement placement;
    bool *is_loaded;
    IFKV_TRY(place(run, w, n_context, &placement, &is_loaded));
    const int64_t first = ifkv_select_first(&placement);
    const ifkv_cost_plan plan = {
        .placement = &placement,
        .n_selected = w->is_exact
                          ? 0
                          : ifkv_select_by_ratio(run->num, run->den, n_context, n_context - first),
        .n_question = N_QUESTION,
        .n_prompt = N_PROMPT,
        .n_score_layer = w->is_exact                 ? 0
                         : run->config.n_layer >= 26 ? 26
                                                     : run->config.n_layer,
        .is_loaded = is_loaded,
        .has_riders = true,
    };
    const ifkv_cost_model model = {&run->config, BF16_BYTES, BF16_BYTES, 4, false};
    ifkv_rates rates = run->device.slow;
    rates.passes = run->device.passes;
    if (placement.size > 1) {
        rates.link = run->link.link;
        rates.message_s = run->link.message_s;
    }
    const ifkv_cost_bytes bytes =
        ifkv_cost_exchange(&model, w->way, placement.size, n_context, plan.n_selected);
    a->fast_ms = floor_ms(run, &plan, w, &run->device.fast);
    a->slow_ms = floor_ms(run, &plan, w, &run->device.slow);
    a->estimate_ms = 1e3 * ifkv_cost_time(&model, &plan, w->way, &rates, NULL);
    a->tflop = 1e-12 * all_flop(&model, &plan, w, placement.size);
    a->mb_layer = 1e-6 * (w->is_exact ? bytes.shared : bytes.asked + bytes.fresh);
    count_memory(run, &placement, w, n_context, a);
    ifkv_placement_fini(&placement);
    free(is_loaded);
    return IFKV_OK;
}

/* ---- output ---- */

static double total_bytes(const answer *a) {
    return a->weights + a->shard + a->copy + a->scratch;
}

/* Exchange auto: delta where it fits. */
static int pick_exchange(const plan_run *run, const answer *delta, int i_delta, int i_query) {
    return total_bytes(delta) <= run->device.memory_bytes ? i_delta : i_query;
}

static void print_json(const plan_run *run, int64_t n_context, const way *w, const answer *a) {
    json_t *object =
        json_pack("{s:s, s:I, s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:{s:I, s:I, s:I, s:I, s:b}}",
                  "model", run->options->model, "tokens", (json_int_t)n_context, "way", w->name,
                  "ranks", w->way == IFKV_COST_EXACT ? 1 : run->n_rank, "floor_fast_ms", a->fast_ms,
                  "floor_slow_ms", a->slow_ms, "estimate_ms", a->estimate_ms, "tflop", a->tflop,
                  "mb_per_rank_and_layer", a->mb_layer, "memory", "weights", (json_int_t)a->weights,
                  "shard", (json_int_t)a->shard, "copy", (json_int_t)a->copy, "scratch",
                  (json_int_t)a->scratch, "fits", total_bytes(a) <= run->device.memory_bytes);
    char *line = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(6)) : NULL;
    if (line) printf("%s\n", line);
    free(line);
    json_decref(object);
}

static void print_row(const plan_run *run, int64_t n_context, const way *w, const answer *a) {
    printf("  %8lld %-20s %8.0f %9.0f %9.0f %9.0f %10.1f %9.2f %7.2f %7.2f %7.2f %6.1f%s\n",
           (long long)n_context, w->name, a->tflop, a->fast_ms, a->slow_ms, a->estimate_ms,
           a->mb_layer, 1e-6 * a->mb_layer * 1e3 * run->config.n_layer, 1e-9 * a->weights,
           1e-9 * a->shard, 1e-9 * (a->copy + a->scratch), 1e-9 * total_bytes(a),
           total_bytes(a) <= run->device.memory_bytes ? "" : "  does not fit");
}

static ifkv_status print_length(const plan_run *run, int64_t n_context) {
    answer answers[N_WAY];
    for (int i = 0; i < N_WAY; i++) {
        IFKV_TRY(compute(run, &ways[i], n_context, &answers[i]));
        if (run->options->json)
            print_json(run, n_context, &ways[i], &answers[i]);
        else
            print_row(run, n_context, &ways[i], &answers[i]);
    }
    if (run->options->json) return IFKV_OK;
    const double exact = answers[RING].estimate_ms;
    const int kinds[] = {pick_exchange(run, &answers[COLD_DELTA], COLD_DELTA, COLD_QUERY),
                         pick_exchange(run, &answers[WARM_DELTA], WARM_DELTA, WARM_QUERY)};
    for (int i = 0; i < 2; i++)
        printf("# %lld tokens: --method auto takes %s (%s %.0f ms, ring %.0f ms, %.2fx)\n",
               (long long)n_context,
               ifkv_cost_takes_infoflow(exact, answers[kinds[i]].estimate_ms) ? "infoflow" : "ring",
               ways[kinds[i]].name, answers[kinds[i]].estimate_ms, exact,
               exact / answers[kinds[i]].estimate_ms);
    return IFKV_OK;
}

/* The shortest context, to 1024 tokens, from which on a cold infoflow is chosen. */
static ifkv_status print_crossover(const plan_run *run) {
    enum { STEP = 1024, LONGEST = 1 << 20 };
    int64_t low = 0, high = LONGEST / STEP; /* not chosen, chosen */
    answer ring, cold;
    if (run->options->json || run->n_rank < 2) return IFKV_OK;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        IFKV_TRY(compute(run, &ways[RING], middle * STEP, &ring));
        IFKV_TRY(compute(run, &ways[COLD_DELTA], middle * STEP, &cold));
        if (pick_exchange(run, &cold, COLD_DELTA, COLD_QUERY) == COLD_QUERY)
            IFKV_TRY(compute(run, &ways[COLD_QUERY], middle * STEP, &cold));
        if (ifkv_cost_takes_infoflow(ring.estimate_ms, cold.estimate_ms))
            high = middle;
        else
            low = middle;
    }
    if (high == LONGEST / STEP)
        printf("# crossover: none up to %d tokens\n", LONGEST);
    else
        printf("# crossover: a cold infoflow beats the ring by 3 %% from about %lld tokens on\n",
               (long long)high * STEP);
    return IFKV_OK;
}

static void print_head(const plan_run *run) {
    const cli_options *o = run->options;
    printf("# ifkv plan: %s, bf16, %d ranks, ratio %s, chunks of %lld; computed, nothing was run\n",
           o->model, run->n_rank, o->ratio ? o->ratio : "0.15", (long long)run->chunk);
    printf(
        "# device %s, links %s (nominal); floors count linear work and attention at the device's "
        "higher and lower rates,\n# estimates add passes, messages, prompt and head\n",
        o->device ? o->device : "configs/devices/h100_sxm.json",
        o->links ? o->links : "configs/links/nvlink4.json");
    printf("# %8s %-20s %8s %9s %9s %9s %10s %9s %7s %7s %7s %6s\n", "tokens", "method", "TFLOP",
           "floor ms", "to ms", "estimate", "MB/rk/lay", "GB/rank", "weights", "K/V", "other",
           "GB");
}

ifkv_status cli_plan(ifkv_comm *comm, const cli_options *options) {
    (void)comm;
    plan_run run = {.options = options,
                    .n_rank = options->ranks ? (int)options->ranks : 4,
                    .chunk = options->chunk ? options->chunk : DEFAULT_CHUNK};
    const char *text = options->lengths ? options->lengths : "8192,16384,32768,131072";
    IFKV_REQUIRE(options->model, IFKV_ERR_USAGE, IFKV_E_ARGUMENT, "--model: got none; see --help");
    IFKV_TRY(ifkv_config_load(options->model, &run.config));
    IFKV_TRY(ifkv_ratio_parse(options->ratio ? options->ratio : "0.15", &run.num, &run.den));
    IFKV_TRY(cli_device_read(options->device ? options->device : "configs/devices/h100_sxm.json",
                             &run.device));
    IFKV_TRY(read_link(options->links ? options->links : "configs/links/nvlink4.json", &run.link));
    if (!options->json) print_head(&run);
    for (;;) {
        char *end = NULL, shown[IFKV_QUOTE_BYTES];
        const long long n = *text >= '0' && *text <= '9' ? strtoll(text, &end, 10) : 0;
        IFKV_REQUIRE(n > 0 && n <= INT32_MAX && (*end == 0 || *end == ','), IFKV_ERR_USAGE,
                     IFKV_E_VALUE,
                     "--lengths: got \"%s\", expected numbers of tokens, with commas "
                     "between them",
                     ifkv_quote(text, strlen(text), shown));
        IFKV_TRY(print_length(&run, n));
        if (!*end) break;
        text = end + 1;
    }
    return print_crossover(&run);
}
