/* The public API: what it refuses and how, what it promises about results, and, under
 * AddressSanitizer, that every path gives back what it took.  One rank, "self", random weights. */
#include "tiny.h"

#include "error_codes.h"
#include "model_files.h"

static uint64_t seed;

typedef struct api_fixture {
    char *dir, *model;
    ifkv_comm *comm;
    ifkv_engine *engine;
    tiny_request request; /* prefix 2, chunks of 9, 1, 14, 6, prompt 5, question 3 */
} api_fixture;

static ifkv_engine_options engine_options(const char *model) {
    return (ifkv_engine_options){.size = sizeof(ifkv_engine_options),
                                 .model_dir = model,
                                 .backend = "cpu",
                                 .n_thread = 1,
                                 .random_weights = true,
                                 .seed = 11};
}

static int setup(void **state) {
    static api_fixture fixture;
    void *dir = NULL;
    if (dir_setup(&dir)) return -1;
    fixture.dir = dir;
    fixture.model = tiny_model(dir, &tiny_shapes[1], -1);
    fixture.request =
        tiny_request_make(&seed, tiny_shapes[1].n_vocab, 2, 4, (int64_t[]){9, 1, 14, 6}, 5, 3);
    const ifkv_engine_options options = engine_options(fixture.model);
    assert_ok(ifkv_comm_open("self", &fixture.comm));
    assert_ok(ifkv_engine_open(fixture.comm, &options, &fixture.engine));
    *state = &fixture;
    return 0;
}

static int teardown(void **state) {
    api_fixture *fixture = *state;
    ifkv_engine_close(fixture->engine);
    ifkv_comm_close(fixture->comm);
    tiny_request_fini(&fixture->request);
    free(fixture->model);
    void *dir = fixture->dir;
    return dir_teardown(&dir);
}

static ifkv_session *opened(api_fixture *fixture, ifkv_prefill_options options) {
    ifkv_session *session = NULL;
    options.size = sizeof options;
    assert_ok(ifkv_session_open(fixture->engine, &fixture->request.request, &options, &session));
    return session;
}

static ifkv_result result_of(ifkv_session *session) {
    ifkv_result result = {.size = sizeof result};
    assert_ok(ifkv_session_result(session, &result));
    return result;
}

static void names_are_never_null(void **state) {
    (void)state;
    assert_string_equal(ifkv_status_name(IFKV_OK), "ok");
    assert_string_equal(ifkv_status_name(IFKV_ERR_DATA), "data");
    assert_non_null(ifkv_status_name((ifkv_status)12345));
    assert_string_equal(ifkv_stage_name(IFKV_STAGE_PLACE), "place");
    assert_string_equal(ifkv_stage_name(IFKV_STAGE_DECODE), "decode");
    assert_non_null(ifkv_stage_name(IFKV_N_STAGE));
    assert_non_null(ifkv_stage_name((ifkv_stage)-1));
    assert_non_null(ifkv_last_error());
    assert_non_null(ifkv_last_error()->text);
}

static void closing_nothing_is_allowed(void **state) {
    (void)state;
    ifkv_session_close(NULL);
    ifkv_engine_close(NULL);
    ifkv_comm_close(NULL);
}

static void comm_open_refuses_unknown_names(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    assert_fails(ifkv_comm_open("carrier pigeon", &comm), IFKV_ERR_USAGE, IFKV_E_COMM, "pigeon");
    assert_fails(ifkv_comm_open("", &comm), IFKV_ERR_USAGE, IFKV_E_COMM, "");
    assert_null(comm);
}

static void engine_open_refuses_misuse(void **state) {
    api_fixture *fixture = *state;
    ifkv_engine *engine = NULL;
    ifkv_engine_options good = engine_options(fixture->model), bad;
    assert_fails(ifkv_engine_open(NULL, &good, &engine), IFKV_ERR_USAGE, IFKV_E_STRUCT, "NULL");
    assert_fails(ifkv_engine_open(fixture->comm, NULL, &engine), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "engine_options");
    assert_fails(ifkv_engine_open(fixture->comm, &good, NULL), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "NULL");
    static const size_t wrong_sizes[] = {0, 1, sizeof(size_t) - 1, sizeof good + 1, SIZE_MAX};
    for (size_t i = 0; i < sizeof wrong_sizes / sizeof *wrong_sizes; i++) {
        bad = good;
        bad.size = wrong_sizes[i];
        assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                     "engine_options.size");
    }
    bad = good;
    bad.model_dir = NULL;
    assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "model");
    bad.model_dir = path_in(fixture->dir, "missing");
    assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_NO_INPUT,
                 IFKV_E_CONFIG_FILE, "missing");
    static const int wrong_threads[] = {-1, 4097, INT32_MIN};
    for (int i = 0; i < 3; i++) {
        bad = good;
        bad.n_thread = wrong_threads[i];
        assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "threads");
    }
    bad = good;
    bad.backend = "abacus";
    assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_USAGE, IFKV_E_BACKEND,
                 "abacus");
#if !IFKV_HAVE_CUDA
    bad.backend = "cuda";
    assert_fails(ifkv_engine_open(fixture->comm, &bad, &engine), IFKV_ERR_UNSUPPORTED,
                 IFKV_E_BACKEND, "cuda");
#endif
    assert_null(engine);
}

/* A caller built when the struct ended after model_dir gets the defaults for the rest. */
static void older_option_structs_are_read(void **state) {
    api_fixture *fixture = *state;
    ifkv_engine *engine = NULL;
    ifkv_engine_options older = engine_options(fixture->model);
    older.size = offsetof(ifkv_engine_options, check_only);
    older.check_only = true; /* beyond its size: not looked at */
    assert_ok(ifkv_engine_open(fixture->comm, &older, &engine));
    ifkv_session *session = NULL;
    ifkv_prefill_options options = {.size = offsetof(ifkv_prefill_options, ratio),
                                    .method = "none",
                                    .ratio = "not a number, and not read"};
    assert_ok(ifkv_session_open(engine, &fixture->request.request, &options, &session));
    ifkv_session_close(session);
    ifkv_engine_close(engine);
}

static void info_writes_only_what_the_caller_knows(void **state) {
    api_fixture *fixture = *state;
    ifkv_model_info info = {.size = sizeof info};
    assert_ok(ifkv_engine_info(fixture->engine, &info));
    assert_string_equal(info.family, "llama");
    assert_string_equal(info.backend, "cpu");
    assert_int_equal(info.size, sizeof info);
    assert_int_equal(info.n_layer, 5);
    assert_int_equal(info.n_head, 6);
    assert_int_equal(info.n_kv_head, 2);
    assert_int_equal(info.d_head, 64);
    assert_int_equal(info.n_vocab, 61);
    assert_int_equal(info.n_thread, 1);
    assert_false(info.is_tied);
    assert_true(info.weight_bytes >= 4 * (size_t)info.n_parameter);
    ifkv_model_info part = {.size = offsetof(ifkv_model_info, n_head), .n_head = -7};
    assert_ok(ifkv_engine_info(fixture->engine, &part));
    assert_int_equal(part.n_layer, 5);
    assert_int_equal(part.n_head, -7);
    assert_fails(ifkv_engine_info(NULL, &info), IFKV_ERR_USAGE, IFKV_E_STRUCT, "NULL");
    assert_fails(ifkv_engine_info(fixture->engine, NULL), IFKV_ERR_USAGE, IFKV_E_STRUCT, "NULL");
    info.size = sizeof info + 8;
    assert_fails(ifkv_engine_info(fixture->engine, &info), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "model_info.size");
}

static void options_check_names_what_is_wrong(void **state) {
    (void)state;
    static const struct {
        ifkv_prefill_options options;
        const char *part;
    } bad[] = {
        {{.method = "best"}, "method"},
        {{.method = ""}, "method"},
        {{.exchange = "ring"}, "exchange"},
        {{.ratio = "1.01"}, "ratio"},
        {{.ratio = "-0.1"}, "ratio"},
        {{.ratio = ""}, "ratio"},
        {{.score = "l3"}, "score"},
        {{.score_rows = "answer"}, "score-rows"},
        {{.score_layers = "3,2"}, "score-layers"},
        {{.score_layers = ""}, "score-layers"},
        {{.placement = "random"}, "placement"},
        {{.placement = "first"}, "placement"},
        {{.chunk = -1}, "chunk"},
        {{.chunk = INT64_MAX}, "chunk"},
        {{.geometry = "local"}, "geometry"},
        {{.geometry = "hl-hp", .hp = "both"}, "hp"},
        {{.ride = "all"}, "ride"},
        {{.ride = ""}, "ride"},
        {{.epic_k = -1}, "epic-k"},
        {{.epic_k = INT64_MAX}, "epic-k"},
        {{.max_new = -1}, "max-new"},
        {{.max_new = INT64_MAX}, "max-new"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ifkv_prefill_options options = bad[i].options;
        options.size = sizeof options;
        assert_fails(ifkv_prefill_options_check(&options), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     bad[i].part);
    }
    static const ifkv_prefill_options good[] = {{.method = "full"},
                                                {.method = "all", .exchange = "local"},
                                                {.score_layers = "wide"},
                                                {.ratio = "0"},
                                                {.placement = "longest"},
                                                {.score_rows = "prompt"},
                                                {.method = "epic_budget"},
                                                {.method = "epic", .epic_k = 3},
                                                {.geometry = "hl-hp", .hp = "per_chunk"},
                                                {.geometry = "global", .hp = "shared"}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        ifkv_prefill_options options = good[i];
        options.size = sizeof options;
        assert_ok(ifkv_prefill_options_check(&options));
    }
    assert_fails(ifkv_prefill_options_check(NULL), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "prefill_options");
    ifkv_prefill_options sized = {.size = 4};
    assert_fails(ifkv_prefill_options_check(&sized), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "prefill_options.size");
}

static void assert_refused(const api_fixture *fixture, const ifkv_request *request,
                           ifkv_prefill_options options, ifkv_status status, int code,
                           const char *part) {
    size_t bytes = 0;
    ifkv_session *session = NULL;
    options.size = sizeof options;
    assert_fails(ifkv_engine_plan(fixture->engine, request, &options, &bytes), status, code, part);
    assert_fails(ifkv_session_open(fixture->engine, request, &options, &session), status, code,
                 part);
    assert_null(session);
}

static void options_are_checked_against_the_model(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *request = &fixture->request.request; /* rows 11 .. 31 are eligible */
    assert_refused(fixture, request, (ifkv_prefill_options){.score_layers = "4,5"}, IFKV_ERR_USAGE,
                   IFKV_E_VALUE, "score-layers");
    assert_refused(fixture, request, (ifkv_prefill_options){.method = "best"}, IFKV_ERR_USAGE,
                   IFKV_E_VALUE, "method");
    static const int64_t chunk_0[] = {10, 20}, twice[] = {20, 20}, falling[] = {21, 20},
                         behind[] = {31, 32}, negative[] = {-1, 20};
    static const int64_t *const bad[] = {chunk_0, twice, falling, behind, negative};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_refused(fixture, request,
                       (ifkv_prefill_options){.selected = bad[i], .n_selected = 2}, IFKV_ERR_USAGE,
                       IFKV_E_VALUE, "selected");
    assert_refused(fixture, request, (ifkv_prefill_options){.selected = chunk_0, .n_selected = -1},
                   IFKV_ERR_USAGE, IFKV_E_VALUE, "n_selected");
    assert_refused(fixture, request, (ifkv_prefill_options){.selected = chunk_0, .n_selected = 99},
                   IFKV_ERR_USAGE, IFKV_E_VALUE, "n_selected");
    assert_refused(fixture, request,
                   (ifkv_prefill_options){.method = "full", .selected = twice, .n_selected = 1},
                   IFKV_ERR_USAGE, IFKV_E_VALUE, "n_selected");
}

static void request_lengths_are_checked(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *good = &fixture->request.request;
    static const int64_t late[] = {1, 9}, empty[] = {0, 5, 5, 9}, falling[] = {0, 9, 5},
                         huge[] = {0, INT64_MAX}, negative[] = {0, -5};
    static const struct {
        const int64_t *offsets;
        int64_t n;
    } chunks[] = {{late, 1}, {empty, 3}, {falling, 2}, {huge, 1},     {negative, 1},
                  {NULL, 1}, {late, 0},  {empty, -1},  {empty, 65537}};
    ifkv_request bad;
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        bad = *good;
        bad.chunk_offsets = chunks[i].offsets;
        bad.n_chunk = chunks[i].n;
        assert_refused(fixture, &bad, (ifkv_prefill_options){0}, IFKV_ERR_DATA,
                       IFKV_E_REQUEST_LENGTH, "chunks");
    }
    static const int64_t prompts[] = {0, -1, INT64_MIN, INT64_MAX};
    for (size_t i = 0; i < 4; i++) {
        bad = *good;
        bad.n_prompt = prompts[i];
        assert_refused(fixture, &bad, (ifkv_prefill_options){0}, IFKV_ERR_DATA,
                       IFKV_E_REQUEST_LENGTH, "prompt");
    }
    static const int64_t others[] = {-1, INT64_MIN, INT64_MAX};
    for (size_t i = 0; i < 3; i++) {
        bad = *good;
        bad.n_prefix = others[i];
        assert_refused(fixture, &bad, (ifkv_prefill_options){0}, IFKV_ERR_DATA,
                       IFKV_E_REQUEST_LENGTH, "length");
        bad = *good;
        bad.n_question = others[i];
        assert_refused(fixture, &bad, (ifkv_prefill_options){0}, IFKV_ERR_DATA,
                       IFKV_E_REQUEST_LENGTH, "length");
    }
    /* 32 context and 5 prompt tokens of 4096 positions */
    assert_refused(fixture, good, (ifkv_prefill_options){.max_new = 4060}, IFKV_ERR_DATA,
                   IFKV_E_REQUEST_LENGTH, "4097");
    size_t bytes = 0;
    const ifkv_prefill_options fits = {.size = sizeof fits, .max_new = 4059};
    assert_ok(ifkv_engine_plan(fixture->engine, good, &fits, &bytes));
}

static void tokens_are_checked(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *good = &fixture->request.request;
    static const int32_t values[] = {-1, 61, INT32_MAX, INT32_MIN};
    static const char *const parts[] = {"/prefix/1", "/chunks/29", "/prompt/4", "/question/2"};
    const int64_t places[] = {1, 31, 36, 39}; /* the last of each */
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 4; i++) {
            int32_t *token = &fixture->request.token[places[p]];
            const int32_t kept = *token;
            *token = values[i];
            assert_refused(fixture, good, (ifkv_prefill_options){0}, IFKV_ERR_DATA,
                           IFKV_E_REQUEST_TOKEN, parts[p]);
            *token = kept;
        }
}

static void missing_arrays_are_refused(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *good = &fixture->request.request;
    ifkv_request bad[4] = {*good, *good, *good, *good};
    bad[0].prefix = bad[1].chunk_tokens = bad[2].prompt = bad[3].question = NULL;
    for (int i = 0; i < 4; i++)
        assert_refused(fixture, &bad[i], (ifkv_prefill_options){0}, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                       "NULL");
    ifkv_request sized = *good;
    sized.size = sizeof sized + 1;
    assert_refused(fixture, &sized, (ifkv_prefill_options){0}, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                   "request.size");
    assert_refused(fixture, NULL, (ifkv_prefill_options){0}, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                   "request");
}

static void null_handles_are_refused(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *request = &fixture->request.request;
    const ifkv_prefill_options options = {.size = sizeof options};
    size_t bytes = 0;
    ifkv_session *session = NULL;
    ifkv_result result = {.size = sizeof result};
    ifkv_kv_rows rows = {.size = sizeof rows};
    float unused = 0;
    const int code = IFKV_E_STRUCT;
    assert_fails(ifkv_engine_plan(NULL, request, &options, &bytes), IFKV_ERR_USAGE, code, "NULL");
    assert_fails(ifkv_engine_plan(fixture->engine, request, &options, NULL), IFKV_ERR_USAGE, code,
                 "NULL");
    assert_fails(ifkv_engine_plan(fixture->engine, request, NULL, &bytes), IFKV_ERR_USAGE, code,
                 "NULL");
    assert_fails(ifkv_engine_reserve(NULL, 1), IFKV_ERR_USAGE, code, "NULL");
    assert_fails(ifkv_session_open(NULL, request, &options, &session), IFKV_ERR_USAGE, code,
                 "NULL");
    assert_fails(ifkv_session_open(fixture->engine, request, &options, NULL), IFKV_ERR_USAGE, code,
                 "NULL");
    assert_fails(ifkv_session_open(fixture->engine, request, NULL, &session), IFKV_ERR_USAGE, code,
                 "NULL");
    assert_fails(ifkv_session_decode(NULL), IFKV_ERR_USAGE, code, "NULL");
    assert_fails(ifkv_session_result(NULL, &result), IFKV_ERR_USAGE, code, "NULL");
    assert_fails(ifkv_session_kv_rows(NULL, &rows), IFKV_ERR_USAGE, code, "NULL");
    assert_int_equal(ifkv_session_kv_read(NULL, 0, &unused, &unused), IFKV_ERR_USAGE);
    assert_int_equal(ifkv_session_kv_gather(NULL, 0, &unused, &unused), IFKV_ERR_USAGE);
}

static void one_session_an_engine(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.method = "none"});
    ifkv_session *second = NULL;
    const ifkv_prefill_options options = {.size = sizeof options};
    assert_fails(ifkv_session_open(fixture->engine, &fixture->request.request, &options, &second),
                 IFKV_ERR_USAGE, IFKV_E_STATE, "open");
    assert_null(second);
    assert_fails(ifkv_engine_reserve(fixture->engine, 1), IFKV_ERR_USAGE, IFKV_E_STATE, "open");
    size_t bytes = 0; /* planning needs no arena */
    assert_ok(ifkv_engine_plan(fixture->engine, &fixture->request.request, &options, &bytes));
    assert_true(bytes > 0);
    ifkv_session_close(session);
    session = opened(fixture, (ifkv_prefill_options){.method = "none"});
    ifkv_session_close(session);
}

static void checked_engine_opens_no_session(void **state) {
    api_fixture *fixture = *state;
    ifkv_engine_options options = engine_options(fixture->model);
    options.check_only = true;
    ifkv_engine *engine = NULL;
    assert_ok(ifkv_engine_open(fixture->comm, &options, &engine));
    ifkv_model_info info = {.size = sizeof info};
    assert_ok(ifkv_engine_info(engine, &info));
    assert_int_equal(info.n_layer, 5);
    size_t bytes = 0;
    const ifkv_prefill_options prefill = {.size = sizeof prefill};
    ifkv_session *session = NULL;
    assert_ok(ifkv_engine_plan(engine, &fixture->request.request, &prefill, &bytes));
    assert_fails(ifkv_session_open(engine, &fixture->request.request, &prefill, &session),
                 IFKV_ERR_USAGE, IFKV_E_STATE, "check only");
    ifkv_engine_close(engine);
}

static void more_memory_than_the_machine_has_is_refused(void **state) {
    api_fixture *fixture = *state;
    assert_fails(ifkv_engine_reserve(fixture->engine, SIZE_MAX / 2), IFKV_ERR_RESOURCE,
                 IFKV_E_MEMORY, "memory");
    ifkv_session_close(opened(fixture, (ifkv_prefill_options){0})); /* and nothing is lost */
}

static void prefill_alone_chooses_the_first_token_and_generates_none(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.max_new = 0});
    assert_ok(ifkv_session_decode(session));
    const ifkv_result result = result_of(session);
    assert_int_equal(result.n_answer, 0);
    assert_string_equal(result.finish, "length");
    assert_non_null(result.first_logits);
    for (int64_t i = 0; i < result.n_vocab; i++) assert_true(isfinite(result.first_logits[i]));
    ifkv_session_close(session);
}

static void decode_generates_max_new_tokens_and_no_more(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.max_new = 7});
    assert_int_equal(result_of(session).n_answer, 0);
    for (int i = 0; i < 2; i++) {
        assert_ok(ifkv_session_decode(session));
        const ifkv_result result = result_of(session);
        assert_int_equal(result.n_answer, 7);
        assert_string_equal(result.finish, "length");
        int64_t best = 0;
        for (int64_t t = 1; t < result.n_vocab; t++)
            if (result.first_logits[t] > result.first_logits[best]) best = t;
        assert_int_equal(result.answer[0], best);
    }
    ifkv_session_close(session);
}

/* The same weights, and a config.json that calls the third token of the answer an end of turn. */
static void decode_stops_at_an_end_of_turn(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.max_new = 7});
    assert_ok(ifkv_session_decode(session));
    const ifkv_result whole = result_of(session);
    const int32_t stop = whole.answer[2];
    int64_t n_before = 0;
    int32_t before[7];
    while (whole.answer[n_before] != stop) {
        before[n_before] = whole.answer[n_before];
        n_before++;
    }
    ifkv_session_close(session);

    char *model = tiny_model(fixture->dir, &tiny_shapes[1], stop);
    const ifkv_engine_options options = engine_options(model);
    const ifkv_prefill_options prefill = {.size = sizeof prefill, .max_new = 7};
    ifkv_engine *engine = NULL;
    assert_ok(ifkv_engine_open(fixture->comm, &options, &engine));
    assert_ok(ifkv_session_open(engine, &fixture->request.request, &prefill, &session));
    for (int i = 0; i < 2; i++) {
        assert_ok(ifkv_session_decode(session));
        const ifkv_result result = result_of(session);
        assert_int_equal(result.n_answer, n_before);
        assert_memory_equal(result.answer, before, (size_t)n_before * sizeof *before);
        assert_string_equal(result.finish, "stop");
    }
    ifkv_session_close(session);
    ifkv_engine_close(engine);
    free(model);
}

static tiny_run prefilled(const api_fixture *fixture, const ifkv_request *request,
                          ifkv_prefill_options options) {
    tiny_run run = {
        .model = fixture->model, .weight_seed = 11, .request = request, .options = options};
    assert_ok(tiny_run_on(0, &run));
    return run;
}

static void assert_same(tiny_run *a, tiny_run *b, bool is_same) {
    const bool same = tiny_same_rows(a, b) && a->selected_digest == b->selected_digest;
    tiny_run_fini(a);
    tiny_run_fini(b);
    assert_int_equal(same, is_same);
}

static void cutting_again_equals_chunks_given_so(void **state) {
    api_fixture *fixture = *state;
    static const int64_t sevens[] = {0, 7, 14, 21, 28, 30};
    ifkv_request given = fixture->request.request;
    given.chunk_offsets = sevens;
    given.n_chunk = 5;
    tiny_run cut = prefilled(fixture, &fixture->request.request,
                             (ifkv_prefill_options){.ratio = "0.3", .chunk = 7});
    tiny_run want = prefilled(fixture, &given, (ifkv_prefill_options){.ratio = "0.3"});
    assert_same(&cut, &want, true);
    tiny_run one = prefilled(fixture, &fixture->request.request,
                             (ifkv_prefill_options){.method = "none", .chunk = 1000});
    tiny_run full = prefilled(fixture, &given, (ifkv_prefill_options){.method = "full"});
    assert_same(&one, &full, true);
}

static void defaults_are_the_documented_ones(void **state) {
    api_fixture *fixture = *state;
    const ifkv_request *request = &fixture->request.request;
    tiny_run plain = prefilled(fixture, request, (ifkv_prefill_options){0});
    tiny_run named = prefilled(fixture, request,
                               (ifkv_prefill_options){.method = "infoflow",
                                                      .exchange = "auto",
                                                      .ratio = "0.15",
                                                      .score = "l2",
                                                      .score_rows = "question",
                                                      .score_layers = "wide",
                                                      .placement = "zigzag"});
    assert_int_equal(plain.n_selected, 4); /* of 32 */
    assert_same(&plain, &named, true);
}

static void scoring_rows_are_question_or_prompt(void **state) {
    api_fixture *fixture = *state;
    ifkv_request question = fixture->request.request, prompt = question, missing = question;
    prompt.question = prompt.prompt;
    prompt.n_question = prompt.n_prompt;
    missing.question = NULL;
    missing.n_question = 0;
    tiny_run rows = prefilled(fixture, &question, (ifkv_prefill_options){.score_rows = "prompt"});
    tiny_run want = prefilled(fixture, &prompt, (ifkv_prefill_options){0});
    tiny_run none = prefilled(fixture, &missing, (ifkv_prefill_options){0});
    tiny_run other = prefilled(fixture, &question, (ifkv_prefill_options){0});
    const size_t bytes = (size_t)want.n_context * sizeof *want.scores;
    assert_memory_equal(rows.scores, want.scores, bytes);
    assert_memory_equal(none.scores, want.scores, bytes);
    assert_memory_not_equal(other.scores, want.scores, bytes);
    assert_same(&rows, &want, true);
    tiny_run_fini(&none);
    tiny_run_fini(&other);
}

static void kv_rows_describe_the_context(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.ratio = "0.4", .max_new = 3});
    assert_ok(ifkv_session_decode(session));
    const ifkv_result result = result_of(session);
    ifkv_kv_rows rows = {.size = sizeof rows};
    assert_ok(ifkv_session_kv_rows(session, &rows));
    static const int64_t bounds[] = {0, 11, 12, 26, 32};
    assert_int_equal(rows.n_row, 32); /* prompt and answer are not context */
    assert_int_equal(rows.n_chunk, 4);
    assert_memory_equal(rows.chunk_offsets, bounds, sizeof bounds);
    assert_int_equal(result.n_selected, 12);
    for (int64_t i = 0, s = 0; i < rows.n_row; i++) {
        const bool is_selected = s < result.n_selected && result.selected[s] == i;
        s += is_selected;
        assert_int_equal(rows.index[i], i);
        assert_int_equal(rows.position[i], i);
        assert_int_equal(rows.token[i], fixture->request.token[i]);
        assert_int_equal(rows.recomputed[i], is_selected);
    }
    float *k = malloc(32 * 2 * 64 * sizeof *k), *v = malloc(32 * 2 * 64 * sizeof *v);
    assert_non_null(k);
    assert_non_null(v);
    static const int bad_layers[] = {-1, 5, INT32_MAX};
    for (int i = 0; i < 3; i++) {
        assert_fails(ifkv_session_kv_read(session, bad_layers[i], k, v), IFKV_ERR_USAGE,
                     IFKV_E_VALUE, "layer");
        assert_fails(ifkv_session_kv_gather(session, bad_layers[i], k, v), IFKV_ERR_USAGE,
                     IFKV_E_VALUE, "layer");
    }
    assert_fails(ifkv_session_kv_gather(session, 0, NULL, v), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "NULL");
    assert_fails(ifkv_session_kv_gather(session, 0, k, NULL), IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "NULL");
    assert_int_equal(ifkv_session_kv_read(session, 0, NULL, v), IFKV_ERR_USAGE);
    assert_int_equal(ifkv_session_kv_read(session, 0, k, NULL), IFKV_ERR_USAGE);
    free(k);
    free(v);
    ifkv_session_close(session);
}

static void result_says_what_was_done(void **state) {
    api_fixture *fixture = *state;
    ifkv_session *session = opened(fixture, (ifkv_prefill_options){.keep_scores = true});
    ifkv_result result = result_of(session);
    assert_string_equal(result.method, "infoflow");
    assert_string_equal(result.exchange, "delta"); /* what "auto" chose */
    assert_string_equal(result.backend, "cpu");
    assert_string_equal(result.comm, "self");
    assert_string_equal(result.score_layers, "1,4"); /* wide, of 5 */
    assert_string_equal(result.geometry, "global");
    assert_string_equal(result.hp, "");
    assert_int_equal(result.n_rank, 1);
    assert_int_equal(result.n_context, 32);
    assert_int_equal(result.n_chunk, 4);
    assert_int_equal(result.n_prompt, 5);
    assert_true(result.rode[IFKV_STAGE_SCORE] && result.rode[IFKV_STAGE_PROMPT]);
    assert_false(result.rode[IFKV_STAGE_ENCODE] || result.rode[IFKV_STAGE_RECOMPUTE]);
    assert_int_equal(result.bytes_total, 0); /* one rank receives nothing */
    assert_non_null(result.scores);
    assert_true(result.ttft_ms > 0);
    assert_true(result.memory_planned > result.memory_weights);
    ifkv_result part = {.size = offsetof(ifkv_result, n_rank), .n_rank = -7};
    assert_ok(ifkv_session_result(session, &part));
    assert_int_equal(part.n_rank, -7);
    part.size = 0;
    assert_fails(ifkv_session_result(session, &part), IFKV_ERR_USAGE, IFKV_E_STRUCT, "result.size");
    assert_fails(ifkv_session_result(session, NULL), IFKV_ERR_USAGE, IFKV_E_STRUCT, "NULL");
    ifkv_session_close(session);

    session = opened(fixture, (ifkv_prefill_options){.method = "random"});
    result = result_of(session);
    assert_null(result.scores);
    assert_string_equal(result.score_layers, "");
    assert_string_equal(result.geometry, "");
    ifkv_session_close(session);
    session = opened(fixture, (ifkv_prefill_options){0}); /* not asked to keep them */
    assert_null(result_of(session).scores);
    ifkv_session_close(session);
    session = opened(fixture, (ifkv_prefill_options){.method = "full"});
    result = result_of(session);
    assert_string_equal(result.exchange, "none");
    assert_int_equal(result.n_chunk, 4); /* of the request */
    ifkv_session_close(session);
}

typedef struct progress_log {
    int64_t done[IFKV_N_STAGE], total[IFKV_N_STAGE];
    ifkv_stage last;
    bool is_bad;
} progress_log;

static void keep_progress(void *arg, ifkv_stage stage, int64_t done, int64_t total) {
    progress_log *log = arg;
    log->is_bad |= stage < log->last || done != log->done[stage] + 1 || done > total;
    log->last = stage;
    log->done[stage] = done;
    log->total[stage] = total;
}

static void progress_counts_up_stage_by_stage(void **state) {
    api_fixture *fixture = *state;
    for (int is_riding = 0; is_riding < 2; is_riding++) {
        progress_log log = {.last = IFKV_STAGE_PLACE};
        ifkv_session *session =
            opened(fixture, (ifkv_prefill_options){.max_new = 4,
                                                   .progress = keep_progress,
                                                   .progress_arg = &log,
                                                   .ride = is_riding ? "both" : "none"});
        assert_ok(ifkv_session_decode(session));
        assert_false(log.is_bad);
        static const ifkv_stage by_layer[] = {IFKV_STAGE_ENCODE, IFKV_STAGE_RECOMPUTE,
                                              IFKV_STAGE_SCORE, IFKV_STAGE_PROMPT};
        for (int i = 0; i < 4; i++) {
            const int64_t want = is_riding && i >= 2 ? 0 : 5; /* part of the stage that carries */
            assert_int_equal(log.total[by_layer[i]], want);
            assert_int_equal(log.done[by_layer[i]], want);
        }
        assert_int_equal(log.total[IFKV_STAGE_DECODE], 4);
        ifkv_session_close(session);
    }
}

/* Sessions of different sizes follow each other in one arena, and nothing is left of one in the
 * next. */
static void sessions_leave_no_trace_in_each_other(void **state) {
    api_fixture *fixture = *state;
    const ifkv_prefill_options options = {.ratio = "0.3", .max_new = 3};
    float logits[2][64];
    for (int round = 0; round < 2; round++) {
        ifkv_session *session = opened(fixture, options);
        const ifkv_result result = result_of(session);
        memcpy(logits[round], result.first_logits, 61 * sizeof(float));
        ifkv_session_close(session);
        session = opened(fixture, (ifkv_prefill_options){.method = "full", .max_new = 900});
        ifkv_session_close(session);
    }
    assert_memory_equal(logits[0], logits[1], 61 * sizeof(float));
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_never_null),
        cmocka_unit_test(closing_nothing_is_allowed),
        cmocka_unit_test(comm_open_refuses_unknown_names),
        cmocka_unit_test(engine_open_refuses_misuse),
        cmocka_unit_test(older_option_structs_are_read),
        cmocka_unit_test(info_writes_only_what_the_caller_knows),
        cmocka_unit_test(options_check_names_what_is_wrong),
        cmocka_unit_test(options_are_checked_against_the_model),
        cmocka_unit_test(request_lengths_are_checked),
        cmocka_unit_test(tokens_are_checked),
        cmocka_unit_test(missing_arrays_are_refused),
        cmocka_unit_test(null_handles_are_refused),
        cmocka_unit_test(one_session_an_engine),
        cmocka_unit_test(checked_engine_opens_no_session),
        cmocka_unit_test(more_memory_than_the_machine_has_is_refused),
        cmocka_unit_test(prefill_alone_chooses_the_first_token_and_generates_none),
        cmocka_unit_test(decode_generates_max_new_tokens_and_no_more),
        cmocka_unit_test(decode_stops_at_an_end_of_turn),
        cmocka_unit_test(cutting_again_equals_chunks_given_so),
        cmocka_unit_test(defaults_are_the_documented_ones),
        cmocka_unit_test(scoring_rows_are_question_or_prompt),
        cmocka_unit_test(kv_rows_describe_the_context),
        cmocka_unit_test(result_says_what_was_done),
        cmocka_unit_test(progress_counts_up_stage_by_stage),
        cmocka_unit_test(sessions_leave_no_trace_in_each_other),
    };
    return cmocka_run_group_tests_name("api", tests, setup, teardown);
}
