/* Tiny models and prefills of them.  See tiny.h. */
#include "tiny.h"

#include <sys/stat.h>
#include <time.h>

#include "agree.h"
#include "comm.h"
#include "digest.h"
#include "engine.h"
#include "model_files.h"

const tiny_shape tiny_shapes[TINY_N_SHAPE] = {
    {"llama_g1", "llama", 3, 40, 2, 2, 64, 56, 97, true},
    {"llama_g3", "llama", 5, 48, 6, 2, 64, 72, 61, false},
    {"qwen3_g5", "qwen3", 4, 36, 5, 1, 128, 44, 83, true},
    {"qwen3_g3", "qwen3", 6, 52, 3, 1, 64, 60, 71, false},
};

char *tiny_model(const char *dir, const tiny_shape *shape, int eos) {
    char name[64], config[1024], stop[64] = "";
    if (eos >= 0) snprintf(stop, sizeof stop, ", \"eos_token_id\": %d", eos);
    snprintf(name, sizeof name, "%s_%d", shape->name, eos);
    mkdir(path_in(dir, name), 0700); /* a model that is there already is written again */
    snprintf(config, sizeof config,
             "{\"model_type\": \"%s\", \"hidden_act\": \"silu\", \"num_hidden_layers\": %d, "
             "\"hidden_size\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
             "\"head_dim\": %d, \"intermediate_size\": %d, \"vocab_size\": %d, "
             "\"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, "
             "\"tie_word_embeddings\": %s%s}\n",
             shape->family, shape->n_layer, shape->d_model, shape->n_head, shape->n_kv_head,
             shape->d_head, shape->d_ff, shape->n_vocab, shape->is_tied ? "true" : "false", stop);
    char *path = strdup(path_in(dir, name));
    assert_non_null(path);
    write_text(path, "config.json", config);
    return path;
}

uint64_t tiny_seed(void) {
    const char *text = getenv("IFKV_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const uint64_t seed =
        text ? strtoull(text, NULL, 10) : (uint64_t)now.tv_sec * 1000003u + (uint64_t)now.tv_nsec;
    printf("IFKV_TEST_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

/* xorshift64* (Vigna 2016): another generator than the library's, whose output is under test */
int64_t tiny_below(uint64_t *state, int64_t limit) {
    if (!*state) *state = 1;
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (int64_t)((*state * 0x2545f4914f6cdd1du >> 1) % (uint64_t)limit);
}

tiny_request tiny_request_make(uint64_t *state, int n_vocab, int64_t n_prefix, int64_t n_chunk,
                               const int64_t *chunk_length, int64_t n_prompt, int64_t n_question) {
    tiny_request made = {0};
    made.offset = malloc(((size_t)n_chunk + 1) * sizeof *made.offset);
    assert_non_null(made.offset);
    made.offset[0] = 0;
    for (int64_t i = 0; i < n_chunk; i++) made.offset[i + 1] = made.offset[i] + chunk_length[i];
    made.n_context = n_prefix + made.offset[n_chunk];
    const int64_t n = made.n_context + n_prompt + n_question;
    made.token = malloc((size_t)n * sizeof *made.token);
    assert_non_null(made.token);
    for (int64_t i = 0; i < n; i++) made.token[i] = (int32_t)tiny_below(state, n_vocab);
    made.request = (ifkv_request){
        .size = sizeof made.request,
        .prefix = n_prefix ? made.token : NULL,
        .n_prefix = n_prefix,
        .chunk_tokens = made.token + n_prefix,
        .chunk_offsets = made.offset,
        .n_chunk = n_chunk,
        .prompt = made.token + made.n_context,
        .n_prompt = n_prompt,
        .question = n_question ? made.token + made.n_context + n_prompt : NULL,
        .n_question = n_question,
    };
    return made;
}

void tiny_request_fini(tiny_request *request) {
    free(request->token);
    free(request->offset);
    memset(request, 0, sizeof *request);
}

int64_t tiny_request_end(const tiny_request *request, int64_t chunk) {
    return request->request.n_prefix + request->offset[chunk + 1];
}

tiny_request tiny_request_permute(const tiny_request *from, const int64_t *order) {
    const int64_t n = from->request.n_chunk, n_prefix = from->request.n_prefix;
    const int64_t n_token = from->n_context + from->request.n_prompt + from->request.n_question;
    tiny_request to = {.request = from->request, .n_context = from->n_context};
    to.token = malloc((size_t)n_token * sizeof *to.token);
    to.offset = malloc(((size_t)n + 1) * sizeof *to.offset);
    assert_true(to.token && to.offset);
    memcpy(to.token, from->token, (size_t)n_token * sizeof *to.token);
    to.offset[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t begin = from->offset[order[i]], length = from->offset[order[i] + 1] - begin;
        memcpy(to.token + n_prefix + to.offset[i], from->token + n_prefix + begin,
               (size_t)length * sizeof *to.token);
        to.offset[i + 1] = to.offset[i] + length;
    }
    to.request.prefix = n_prefix ? to.token : NULL;
    to.request.chunk_tokens = to.token + n_prefix;
    to.request.chunk_offsets = to.offset;
    return to;
}

tiny_case tiny_case_make(const char *dir, uint64_t *state, const tiny_shape *shape,
                         int64_t n_prefix, int64_t n_chunk, const int64_t *chunk_length,
                         int64_t n_prompt, int64_t n_question) {
    tiny_case made = {.model = tiny_model(dir, shape, -1), .shape = shape};
    made.weight_seed = (uint64_t)tiny_below(state, 1 << 30);
    made.request = tiny_request_make(state, shape->n_vocab, n_prefix, n_chunk, chunk_length,
                                     n_prompt, n_question);
    return made;
}

void tiny_case_fini(tiny_case *it) {
    free(it->model);
    tiny_request_fini(&it->request);
}

int64_t *tiny_case_rows(const tiny_case *it, uint64_t *state, int64_t one_in, int64_t *n_p) {
    int64_t *row = malloc((size_t)it->request.n_context * sizeof *row);
    assert_non_null(row);
    *n_p = 0;
    for (int64_t i = tiny_request_end(&it->request, 0); i < it->request.n_context; i++)
        if (tiny_below(state, one_in) == 0) row[(*n_p)++] = i;
    return row;
}

static bool load_nothing(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn take,
                         void *take_arg) {
    (void)arg, (void)entry, (void)take, (void)take_arg;
    return false;
}
static void save_nothing(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn give,
                         void *give_arg) {
    (void)arg, (void)entry, (void)give, (void)give_arg;
}
const ifkv_store tiny_empty_store = {
    .size = sizeof tiny_empty_store, .load = load_nothing, .save = save_nothing};

ifkv_status tiny_slow_products(ifkv_engine *engine) {
    engine->rates = (ifkv_rates){
        .size = sizeof engine->rates, .matmul = 1e6, .attention = 1e15, .memory = 1e12};
    engine->has_rates = true;
    return IFKV_OK;
}

/* Bytes of all ones: NaN as a number, -1 as an index.  What is read before it is written shows. */
static ifkv_status poison(ifkv_engine *engine, void *to, size_t bytes) {
    unsigned char *ones = malloc(bytes + 1);
    if (!ones) abort(); /* a test without memory has no verdict */
    memset(ones, 0xff, bytes);
    const ifkv_status status = engine->backend->ops->upload(engine->backend, to, ones, bytes);
    free(ones);
    return status;
}

static ifkv_status poison_arena(ifkv_engine *engine, const tiny_run *run) {
    size_t bytes = 0;
    IFKV_TRY(ifkv_engine_plan(engine, run->request, &run->options, &bytes));
    IFKV_TRY(ifkv_engine_reserve(engine, bytes));
    return poison(engine, engine->arena, engine->arena_bytes);
}

static void *copy_of(const void *from, int64_t n, size_t item) {
    char *copy = malloc((size_t)n * item + 1);
    if (!copy) abort(); /* a test without memory has no verdict */
    if (n) memcpy(copy, from, (size_t)n * item);
    return copy;
}

/* NaN everywhere, so that a row that is not written shows. */
static float *nan_rows(int64_t n) {
    float *rows = malloc((size_t)n * sizeof *rows + 1);
    if (!rows) abort();
    for (int64_t i = 0; i < n; i++) rows[i] = NAN;
    return rows;
}

static ifkv_status collect(ifkv_session *session, const ifkv_engine *engine, tiny_run *run) {
    ifkv_comm *comm = engine->comm;
    const bool is_first = ifkv_comm_rank(comm) == 0;
    ifkv_result result = {.size = sizeof result};
    IFKV_TRY(ifkv_session_result(session, &result));
    IFKV_TRY(ifkv_comm_same(comm, result.selected_digest, "selection"));
    const size_t score_bytes = result.scores ? (size_t)result.n_context * sizeof(float) : 0;
    IFKV_TRY(ifkv_comm_same(comm, ifkv_digest_bytes(result.scores, score_bytes), "scores"));
    const size_t answer_bytes = (size_t)result.n_answer * sizeof(int32_t);
    IFKV_TRY(ifkv_comm_same(comm, ifkv_digest_bytes(result.answer, answer_bytes), "answer"));
    IFKV_TRY(agree_true(comm, is_first == (result.first_logits != NULL)));
    const int64_t n_col = (int64_t)engine->model.config.n_kv_head * engine->model.config.d_head;
    const int n_layer = engine->model.config.n_layer;
    if (is_first) {
        run->n_layer = n_layer;
        run->n_context = result.n_context;
        run->n_col = n_col;
        run->n_vocab = result.n_vocab;
        run->n_selected = result.n_selected;
        run->n_answer = result.n_answer;
        run->n_hit = result.store_hits;
        run->n_miss = result.store_misses;
        run->n_row_hit = result.store_tokens_hit;
        run->n_row_pooled = result.store_tokens_device;
        run->selected_digest = result.selected_digest;
        run->k = nan_rows(n_layer * result.n_context * n_col);
        run->v = nan_rows(n_layer * result.n_context * n_col);
        run->logits = copy_of(result.first_logits, result.n_vocab, sizeof *run->logits);
        run->scores =
            result.scores ? copy_of(result.scores, result.n_context, sizeof *run->scores) : NULL;
        run->selected = copy_of(result.selected, result.n_selected, sizeof *run->selected);
        run->answer = copy_of(result.answer, result.n_answer, sizeof *run->answer);
    }
    for (int layer = 0; layer < n_layer; layer++) {
        const int64_t at = layer * result.n_context * n_col;
        IFKV_TRY(ifkv_session_kv_gather(session, layer, is_first ? run->k + at : NULL,
                                        is_first ? run->v + at : NULL));
    }
    return IFKV_OK;
}

static ifkv_status run_session(ifkv_engine *engine, tiny_run *run) {
    ifkv_session *session = NULL;
    IFKV_TRY(ifkv_session_open(engine, run->request, &run->options, &session));
    ifkv_status status = IFKV_OK;
    if (run->after) IFKV_TRY_GOTO(status, run->after(session), err_close);
    IFKV_TRY_GOTO(status, ifkv_session_decode(session), err_close);
    status = collect(session, engine, run);
err_close:
    ifkv_session_close(session);
    return status;
}

typedef struct run_list {
    tiny_run *run;
    int n;
} run_list;

static ifkv_status run_each(ifkv_engine *engine, const run_list *list) {
    for (int i = 0; i < list->n; i++) {
        tiny_run *run = &list->run[i];
        if (run->before) IFKV_TRY(run->before(engine));
        IFKV_TRY(agree_ok(engine->comm, poison_arena(engine, run)));
        IFKV_TRY(run_session(engine, run));
    }
    return IFKV_OK;
}

static ifkv_status run_rank(ifkv_comm *comm, void *arg) {
    const run_list *list = arg;
    const tiny_run *run = &list->run[0];
    const ifkv_engine_options options = {
        .size = sizeof options,
        .model_dir = run->model,
        .backend = run->backend ? run->backend : "cpu",
        .n_thread = run->n_thread ? run->n_thread : 1,
        .random_weights = true,
        .seed = run->weight_seed,
        .pool_bytes = run->pool_bytes,
    };
    ifkv_engine *engine = NULL;
    IFKV_TRY(ifkv_engine_open(comm, &options, &engine));
    ifkv_status status = IFKV_OK;
    if (engine->pool.base) status = poison(engine, engine->pool.base, engine->pool.bytes);
    status = agree_ok(comm, status);
    if (status == IFKV_OK) status = run_each(engine, list);
    ifkv_engine_close(engine);
    return status;
}

ifkv_status tiny_runs_on(int size, tiny_run *run, int n) {
    run_list list = {run, n};
    for (int i = 0; i < n; i++) {
        run[i].options.size = sizeof run[i].options;
        run[i].options.keep_scores = true;
    }
    if (size > 0) return ifkv_comm_thread_run(size, run_rank, &list);
    ifkv_comm *self = NULL;
    IFKV_TRY(ifkv_comm_open("self", &self));
    const ifkv_status status = run_rank(self, &list);
    ifkv_comm_close(self);
    return status;
}

ifkv_status tiny_run_on(int size, tiny_run *run) {
    return tiny_runs_on(size, run, 1);
}

tiny_run tiny_run_of(const tiny_case *it, ifkv_prefill_options options) {
    return (tiny_run){.model = it->model,
                      .weight_seed = it->weight_seed,
                      .request = &it->request.request,
                      .options = options};
}

tiny_run tiny_prefill(const tiny_case *it, int size, ifkv_prefill_options options) {
    tiny_run run = tiny_run_of(it, options);
    assert_ok(tiny_run_on(size, &run));
    return run;
}

void tiny_run_fini(tiny_run *run) {
    free(run->k);
    free(run->v);
    free(run->logits);
    free(run->scores);
    free(run->selected);
    free(run->answer);
    run->k = run->v = run->logits = run->scores = NULL;
    run->selected = NULL;
    run->answer = NULL;
}

double tiny_error(const float *got, const float *want, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)got[i] - (double)want[i];
        difference += d * d;
        norm += (double)want[i] * (double)want[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

double tiny_rows_error(const tiny_run *got, const tiny_run *want, int64_t first, int64_t end) {
    double worst = 0;
    for (int layer = 0; layer < want->n_layer; layer++) {
        const int64_t n = (end - first) * want->n_col;
        const float *const pairs[][2] = {
            {got->k + (layer * got->n_context + first) * got->n_col,
             want->k + (layer * want->n_context + first) * want->n_col},
            {got->v + (layer * got->n_context + first) * got->n_col,
             want->v + (layer * want->n_context + first) * want->n_col}};
        for (int i = 0; i < 2; i++) {
            const double error = tiny_error(pairs[i][0], pairs[i][1], n);
            if (!(error <= worst)) worst = error;
            if (isnan(worst)) return worst;
        }
    }
    return worst;
}

bool tiny_same_rows(const tiny_run *got, const tiny_run *want) {
    const size_t bytes = (size_t)(want->n_layer * want->n_context * want->n_col) * sizeof(float);
    return got->n_context == want->n_context && !memcmp(got->k, want->k, bytes) &&
           !memcmp(got->v, want->v, bytes);
}

void tiny_assert_same(const tiny_run *got, const tiny_run *want, bool has_same_size) {
    if (has_same_size) {
        assert_true(tiny_same_rows(got, want));
        assert_memory_equal(got->logits, want->logits,
                            (size_t)want->n_vocab * sizeof *want->logits);
    }
    assert_within(tiny_rows_error(got, want, 0, want->n_context), TINY_TOLERANCE);
    assert_true(got->selected_digest == want->selected_digest);
    assert_memory_equal(got->scores, want->scores, (size_t)want->n_context * sizeof *want->scores);
    assert_int_equal(got->n_answer, want->n_answer);
    assert_memory_equal(got->answer, want->answer, (size_t)want->n_answer * sizeof *want->answer);
}
