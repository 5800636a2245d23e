/* Weights in back-end memory: right set, right place, right value, or a named refusal. */
#include "model_files.h"

#include "convert.h"
#include "error_codes.h"
#include "model.h"
#include "safetensors.h"
#include "weights.h"
#include "weights_random.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* The shapes shipped with the source; the build gives the absolute path. */
#ifndef IFKV_CONFIG_DIR
#define IFKV_CONFIG_DIR "configs/models"
#endif

/* ---- a back end of malloc and memcpy that counts what it holds */

static int64_t n_live, upload_limit;

static ifkv_status fake_alloc(ifkv_backend *backend, size_t bytes, void **data_p) {
    (void)backend;
    void *data = bytes < (size_t)1 << 32 ? malloc(bytes ? bytes : 1) : NULL;
    if (!data) return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "fake: no %zu bytes", bytes);
    memset(data, 0xff, bytes); /* NaN, so that a hole shows */
    n_live++;
    *data_p = data;
    return IFKV_OK;
}
static void fake_free(ifkv_backend *backend, void *data) {
    (void)backend;
    n_live--;
    free(data);
}
static ifkv_status fake_upload(ifkv_backend *backend, void *to, const void *from, size_t bytes) {
    (void)backend;
    if (upload_limit-- == 0)
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_BACKEND, "fake: upload refused");
    memcpy(to, from, bytes);
    return IFKV_OK;
}
static ifkv_status fake_sync(ifkv_backend *backend) {
    (void)backend;
    return IFKV_OK;
}

static const ifkv_backend_ops FAKE_F32 = {.name = "fake",
                                          .dtype = IFKV_DTYPE_F32,
                                          .alloc = fake_alloc,
                                          .free = fake_free,
                                          .upload = fake_upload,
                                          .sync = fake_sync};
static const ifkv_backend_ops FAKE_BF16 = {.name = "fake",
                                           .dtype = IFKV_DTYPE_BF16,
                                           .alloc = fake_alloc,
                                           .free = fake_free,
                                           .upload = fake_upload,
                                           .sync = fake_sync};
static ifkv_backend fake = {.ops = &FAKE_F32, .n_thread = 1},
                    fake_bf16 = {.ops = &FAKE_BF16, .n_thread = 1};

static int setup(void **state) {
    n_live = 0;
    upload_limit = -1;
    return dir_setup(state);
}

static int teardown(void **state) {
    const int failed = dir_teardown(state);
    return n_live != 0 ? -1 : failed;
}

/* ---- model files */

typedef struct row {
    char name[80];
    int n_dim;
    int64_t dim[2];
} row;

enum { N_ROW_MAX = 64 };

typedef struct table {
    row of[N_ROW_MAX];
    int n;
} table;

static void add(table *t, const char *name, int64_t n_row, int64_t n_col) {
    row *r = &t->of[t->n++];
    assert_true(t->n <= N_ROW_MAX);
    snprintf(r->name, sizeof r->name, "%s", name);
    r->n_dim = n_row ? 2 : 1;
    r->dim[0] = n_row ? n_row : n_col;
    r->dim[1] = n_col;
}

static void add_layer(table *t, int layer, const char *name, int64_t n_row, int64_t n_col) {
    char full[80];
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    add(t, full, n_row, n_col);
}

/* The tensors of TINY_LLAMA and TINY_QWEN3. */
static table tiny(bool has_head_norm, bool is_tied) {
    table t = {.n = 0};
    add(&t, "model.embed_tokens.weight", 11, 8);
    add(&t, "model.norm.weight", 0, 8);
    if (!is_tied) add(&t, "lm_head.weight", 11, 8);
    for (int i = 0; i < 2; i++) {
        add_layer(&t, i, "input_layernorm.weight", 0, 8);
        add_layer(&t, i, "self_attn.q_proj.weight", 16, 8);
        add_layer(&t, i, "self_attn.k_proj.weight", 8, 8);
        add_layer(&t, i, "self_attn.v_proj.weight", 8, 8);
        add_layer(&t, i, "self_attn.o_proj.weight", 8, 16);
        add_layer(&t, i, "post_attention_layernorm.weight", 0, 8);
        add_layer(&t, i, "mlp.gate_proj.weight", 6, 8);
        add_layer(&t, i, "mlp.up_proj.weight", 6, 8);
        add_layer(&t, i, "mlp.down_proj.weight", 8, 6);
        if (!has_head_norm) continue;
        add_layer(&t, i, "self_attn.q_norm.weight", 0, 4);
        add_layer(&t, i, "self_attn.k_norm.weight", 0, 4);
    }
    return t;
}

static row *find(table *t, const char *name) {
    for (int i = 0; i < t->n; i++)
        if (strcmp(t->of[i].name, name) == 0) return &t->of[i];
    fail_msg("no %s", name);
    return NULL;
}

/* A pattern that every type holds exactly, different in every tensor: m / 16, |m| <= 100. */
static float pattern(const char *name, int64_t i) {
    int64_t h = 0;
    for (; *name; name++) h = (h * 31 + *name) % 9973;
    return (float)((h + 17 * i) % 201 - 100) / 16.0f;
}

static uint16_t half_of(float v) { /* of exact values only */
    const int e = v == 0.0f ? 0 : ilogbf(v);
    if (v == 0.0f) return 0;
    const int m = (int)(ldexpf(fabsf(v), 10 - e)) - 1024;
    return (uint16_t)((v < 0 ? 0x8000 : 0) | (e + 15) << 10 | m);
}

static void put(unsigned char **at, const char *type, float value) {
    uint32_t bits;
    uint16_t half = half_of(value);
    memcpy(&bits, &value, 4);
    if (strcmp(type, "F32") == 0) {
        memcpy(*at, &bits, 4);
        *at += 4;
        return;
    }
    if (strcmp(type, "BF16") == 0) half = (uint16_t)(bits >> 16);
    memcpy(*at, &half, 2);
    *at += 2;
}

static void write_table(const char *dir, const char *name, const table *t, const char *type) {
    const int bytes = strcmp(type, "F32") == 0 ? 4 : 2;
    unsigned char *file = calloc(1, 65536), *at;
    char *header = (char *)file + 8, *to = header + sprintf(header, "{");
    int64_t begin = 0;
    for (int i = 0; i < t->n; i++) {
        const row *r = &t->of[i];
        const int64_t n = r->n_dim == 2 ? r->dim[0] * r->dim[1] : r->dim[0];
        to += sprintf(to, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "", r->name, type);
        to += r->n_dim == 2 ? sprintf(to, "%d,%d", (int)r->dim[0], (int)r->dim[1])
                            : sprintf(to, "%d", (int)r->dim[0]);
        to += sprintf(to, "],\"data_offsets\":[%d,%d]}", (int)begin, (int)(begin + n * bytes));
        begin += n * bytes;
    }
    to += sprintf(to, "}");
    file[0] = (unsigned char)(to - header);
    file[1] = (unsigned char)((to - header) >> 8);
    at = (unsigned char *)to;
    for (int i = 0; i < t->n; i++) {
        const row *r = &t->of[i];
        const int64_t n = r->n_dim == 2 ? r->dim[0] * r->dim[1] : r->dim[0];
        for (int64_t k = 0; k < n; k++) put(&at, type, pattern(r->name, k));
    }
    write_file(dir, name, file, (size_t)(at - file));
    free(file);
}

static const char *untied(void) {
    static char text[1024];
    char *made =
        replaced(TINY_LLAMA, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    snprintf(text, sizeof text, "%s", made);
    free(made);
    return text;
}

static void write_model(const char *dir, const char *config, const table *t, const char *type) {
    write_text(dir, "config.json", config);
    write_table(dir, "model.safetensors", t, type);
}

static void assert_view(const ifkv_view *view, const char *name, int64_t first_row, int64_t n_row,
                        int64_t n_col) {
    assert_int_equal(view->n_col, n_col);
    assert_int_equal(view->stride, n_col);
    assert_true(first_row + n_row <= view->n_row);
    for (int64_t i = 0; i < n_row * n_col; i++) {
        const float got = ((const float *)view->data)[first_row * n_col + i];
        if (got != pattern(name, i))
            fail_msg("%s [%d]: got %g, want %g", name, (int)i, (double)got,
                     (double)pattern(name, i));
    }
}

static void assert_layer(const ifkv_layer_weights *w, int layer, const char *name,
                         const ifkv_view *view, int64_t first_row, int64_t n_row, int64_t n_col) {
    char full[80];
    (void)w;
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    assert_view(view, full, first_row, n_row, n_col);
}

static void assert_tiny(const ifkv_model *m) {
    assert_view(&m->embed, "model.embed_tokens.weight", 0, 11, 8);
    assert_view(&m->final_norm, "model.norm.weight", 0, 1, 8);
    for (int i = 0; i < 2; i++) {
        const ifkv_layer_weights *w = &m->layer[i];
        assert_layer(w, i, "input_layernorm.weight", &w->attention_norm, 0, 1, 8);
        assert_layer(w, i, "self_attn.q_proj.weight", &w->qkv, 0, 16, 8);
        assert_layer(w, i, "self_attn.k_proj.weight", &w->qkv, 16, 8, 8);
        assert_layer(w, i, "self_attn.v_proj.weight", &w->qkv, 24, 8, 8);
        assert_layer(w, i, "self_attn.o_proj.weight", &w->o, 0, 8, 16);
        assert_layer(w, i, "post_attention_layernorm.weight", &w->mlp_norm, 0, 1, 8);
        assert_layer(w, i, "mlp.gate_proj.weight", &w->gate_up, 0, 6, 8);
        assert_layer(w, i, "mlp.up_proj.weight", &w->gate_up, 6, 6, 8);
        assert_layer(w, i, "mlp.down_proj.weight", &w->down, 0, 8, 6);
        assert_int_equal(w->qkv.n_row, 32);
        assert_int_equal(w->gate_up.n_row, 12);
    }
}

static ifkv_status load(const char *dir, ifkv_model *model) {
    return ifkv_model_load(dir, NULL, &fake, model);
}

static void refused(const char *dir, ifkv_status status, int code, const char *part) {
    ifkv_model model;
    assert_fails(ifkv_model_check(dir, NULL, IFKV_DTYPE_F32, &model), status, code, part);
    assert_fails(load(dir, &model), status, code, part);
}

/* ---- loading */

static void every_tensor_lands_in_its_place(void **state) {
    static const char *const type[] = {"F32", "BF16", "F16"};
    const table t = tiny(false, true);
    for (int i = 0; i < 3; i++) {
        ifkv_model model;
        write_model(*state, TINY_LLAMA, &t, type[i]);
        assert_ok(load(*state, &model));
        assert_tiny(&model);
        assert_null(model.layer[0].q_norm.data);
        ifkv_model_fini(&model);
    }
    assert_string_equal(log_text, "");
}

static void head_norms_of_qwen3_are_loaded(void **state) {
    const table t = tiny(true, true);
    ifkv_model m;
    write_model(*state, TINY_QWEN3, &t, "F32");
    assert_ok(load(*state, &m));
    assert_tiny(&m);
    for (int i = 0; i < 2; i++) {
        assert_layer(m.layer, i, "self_attn.q_norm.weight", &m.layer[i].q_norm, 0, 1, 4);
        assert_layer(m.layer, i, "self_attn.k_norm.weight", &m.layer[i].k_norm, 0, 1, 4);
    }
    ifkv_model_fini(&m);
}

static void tied_head_is_the_embedding(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(load(*state, &m));
    assert_ptr_equal(m.lm_head.data, m.embed.data);
    ifkv_model_fini(&m);
}

static void untied_head_is_its_own(void **state) {
    const table t = tiny(false, false);
    ifkv_model m;
    write_model(*state, untied(), &t, "F32");
    assert_ok(load(*state, &m));
    assert_view(&m.lm_head, "lm_head.weight", 0, 11, 8);
    assert_ptr_not_equal(m.lm_head.data, m.embed.data);
    ifkv_model_fini(&m);
}

static void untied_model_without_head_is_data(void **state) {
    const table t = tiny(false, true);
    write_model(*state, untied(), &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS, "\"lm_head.weight\"");
}

static void tied_model_with_a_copy_of_the_head_is_silent(void **state) {
    const table t = tiny(false, false);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(load(*state, &m));
    assert_ptr_equal(m.lm_head.data, m.embed.data);
    ifkv_model_fini(&m);
    assert_string_equal(log_text, "");
}

static void shards_load_as_one_file_does(void **state) {
    const table t = tiny(true, true);
    table half[2] = {{.n = 0}, {.n = 0}};
    static const char *const name[2] = {"model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors"};
    char index[8192], *to = index + sprintf(index, "{\"weight_map\":{");
    ifkv_model m;
    for (int i = 0; i < t.n; i++) {
        half[i % 2].of[half[i % 2].n++] = t.of[i];
        to += sprintf(to, "%s\"%s\":\"%s\"", i ? "," : "", t.of[i].name, name[i % 2]);
    }
    strcpy(to, "}}");
    write_text(*state, "config.json", TINY_QWEN3);
    write_text(*state, "model.safetensors.index.json", index);
    write_table(*state, name[0], &half[0], "BF16");
    write_table(*state, name[1], &half[1], "F16");
    assert_ok(load(*state, &m));
    assert_tiny(&m);
    ifkv_model_fini(&m);
}

static void bf16_back_end_holds_bf16(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(ifkv_model_load(*state, NULL, &fake_bf16, &m));
    assert_int_equal(m.layer[1].qkv.dtype, IFKV_DTYPE_BF16);
    for (int i = 0; i < 64; i++)
        assert_true(ifkv_bf16_to_f32(((const uint16_t *)m.layer[1].qkv.data)[16 * 8 + i]) ==
                    pattern("model.layers.1.self_attn.k_proj.weight", i));
    ifkv_model_fini(&m);
}

static void check_counts_what_load_allocates(void **state) {
    const table t = tiny(false, true);
    ifkv_model checked, loaded;
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(ifkv_model_check(*state, NULL, IFKV_DTYPE_F32, &checked));
    assert_ok(load(*state, &loaded));
    assert_int_equal(checked.bytes, loaded.bytes);
    assert_int_equal(checked.n_parameter, 11 * 8 + 8 + 2 * (8 + 32 * 8 + 16 * 8 + 8 + 3 * 6 * 8));
    assert_true(checked.fingerprint == loaded.fingerprint);
    assert_null(checked.backend);
    assert_null(checked.layer);
    ifkv_model_fini(&checked);
    ifkv_model_fini(&loaded);
}

/* Whichever goes first, the other still reads them; with the last they are gone. */
static void shared_weights_stay_for_the_last(void **state) {
    const table t = tiny(false, true);
    write_model(*state, TINY_LLAMA, &t, "F32");
    for (int first = 0; first < 2; first++) {
        ifkv_model m[2];
        assert_ok(load(*state, &m[0]));
        const int n_loaded = n_live;
        assert_ok(ifkv_model_share(&m[0], &fake, &m[1]));
        assert_int_equal(n_live, n_loaded);
        assert_ptr_equal(m[0].embed.data, m[1].embed.data);
        ifkv_model_fini(&m[first]);
        assert_tiny(&m[1 - first]);
        ifkv_model_fini(&m[1 - first]);
        assert_int_equal(n_live, 0);
    }
}

static void failed_upload_releases_everything(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    for (int i = 0; i < t.n; i++) {
        upload_limit = i;
        assert_fails(load(*state, &m), IFKV_ERR_RESOURCE, IFKV_E_BACKEND, "upload refused");
        assert_int_equal(n_live, 0);
    }
}

static void model_beyond_memory_is_resource(void **state) {
    char *text = replaced(TINY_LLAMA, "\"vocab_size\": 11", "\"vocab_size\": 2000000000");
    const ifkv_model_options random = {true, 1};
    ifkv_model m;
    write_text(*state, "config.json", text);
    free(text);
    assert_fails(ifkv_model_load(*state, &random, &fake, &m), IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "no ");
}

/* 2 bytes an element make gate (96 bytes) end off a 64-byte boundary: up must follow at once. */
static void packed_matrices_have_no_gap(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(ifkv_model_load(*state, NULL, &fake_bf16, &m));
    for (int i = 0; i < 48; i++)
        assert_true(ifkv_bf16_to_f32(((const uint16_t *)m.layer[0].gate_up.data)[48 + i]) ==
                    pattern("model.layers.0.mlp.up_proj.weight", i));
    ifkv_model_fini(&m);
}

static void other_tensors_begin_on_64_bytes(void **state) {
    const table t = tiny(true, false);
    ifkv_model m;
    char *text =
        replaced(TINY_QWEN3, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    write_model(*state, text, &t, "F32");
    free(text);
    assert_ok(ifkv_model_load(*state, NULL, &fake_bf16, &m));
    const char *base = m.base;
    for (int i = 0; i < 2; i++) {
        const ifkv_layer_weights *w = &m.layer[i];
        const ifkv_view *view[] = {&m.embed,     &m.final_norm, &m.lm_head, &w->attention_norm,
                                   &w->qkv,      &w->q_norm,    &w->k_norm, &w->o,
                                   &w->mlp_norm, &w->gate_up,   &w->down};
        for (size_t v = 0; v < sizeof view / sizeof view[0]; v++)
            assert_int_equal(((const char *)view[v]->data - base) % 64, 0);
    }
    ifkv_model_fini(&m);
}

/* ---- tensor set against architecture (C8, C21, B13, B14) */

static void missing_tensor_is_data_by_name(void **state) {
    table t = tiny(false, true);
    strcpy(find(&t, "model.layers.1.mlp.up_proj.weight")->name, "other");
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS,
            "got none of \"model.layers.1.mlp.up_proj.weight\" (1 of 20 missing)");
}

static void five_missing_tensors_are_named_and_all_counted(void **state) {
    table t = tiny(false, true);
    t.n = 11; /* all of layer 1 is gone: nine */
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS, "(9 of 20 missing)");
    assert_non_null(strstr(ifkv_last_error()->text, "model.layers.1.self_attn.o_proj.weight"));
    assert_null(strstr(ifkv_last_error()->text, "model.layers.1.mlp.gate_proj.weight"));
}

static void fused_qkv_is_data_naming_the_split_ones(void **state) {
    table t = tiny(false, true);
    strcpy(find(&t, "model.layers.0.self_attn.q_proj.weight")->name,
           "model.layers.0.self_attn.qkv_proj.weight");
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS, "model.layers.0.self_attn.q_proj.weight");
}

static void transposed_tensor_is_data_with_both_shapes(void **state) {
    table t = tiny(false, true);
    row *r = find(&t, "model.layers.0.self_attn.o_proj.weight");
    r->dim[0] = 16;
    r->dim[1] = 8;
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS,
            "\"model.layers.0.self_attn.o_proj.weight\" got [16, 8], expected [8, 16]");
}

static void rank_of_a_norm_must_be_one(void **state) {
    table t = tiny(false, true);
    row *r = find(&t, "model.norm.weight");
    r->n_dim = 2;
    r->dim[0] = 1;
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS,
            "\"model.norm.weight\" got [1, 8], expected [8]");
}

static void five_wrong_shapes_are_named_and_all_counted(void **state) {
    table t = tiny(false, true);
    for (int i = 0; i < t.n; i++)
        if (t.of[i].n_dim == 1) t.of[i].dim[0] = 9;
    for (int i = 0; i < t.n; i++)
        if (strstr(t.of[i].name, "down_proj")) t.of[i].dim[1] = 7;
    write_model(*state, TINY_LLAMA, &t, "F32");
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS, "wrong shape (7)");
    const char *text = ifkv_last_error()->text;
    int n_named = 0;
    for (const char *at = text; (at = strstr(at, " got [")) != NULL; at++) n_named++;
    assert_int_equal(n_named, 5);
    assert_non_null(strstr(text, "; ..."));
}

static void extra_tensors_are_a_warning(void **state) {
    table t = tiny(false, true);
    ifkv_model m;
    add(&t, "model.layers.0.self_attn.q_proj.bias", 0, 16);
    add(&t, "model.layers.2.input_layernorm.weight", 0, 8);
    add(&t, "model.layers.01.input_layernorm.weight", 0, 8);
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(load(*state, &m));
    assert_tiny(&m);
    ifkv_model_fini(&m);
    assert_non_null(strstr(log_text, "3 tensors that the architecture does not have"));
    assert_non_null(strstr(log_text, "q_proj.bias"));
}

static void five_extra_tensors_are_named_and_all_counted(void **state) {
    table t = tiny(false, true);
    ifkv_model m;
    for (int i = 0; i < 6; i++) {
        char name[8];
        snprintf(name, sizeof name, "x%d", i);
        add(&t, name, 0, 1);
    }
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(load(*state, &m));
    ifkv_model_fini(&m);
    assert_non_null(strstr(log_text, "6 tensors that the architecture does not have: \"x0\", "
                                     "\"x1\", \"x2\", \"x3\", \"x4\", ...; ignored"));
}

/* Names of 1024 bytes fill the message; it is cut, never overrun. */
static void long_names_of_extra_tensors_are_cut(void **state) {
    table t = tiny(false, true);
    char header[9000], name[1025], *to;
    memset(name, 'n', 1024);
    name[1024] = 0;
    to = header + sprintf(header, "{");
    for (int i = 0; i < 6; i++)
        to += sprintf(to, "%s\"%d%s\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}",
                      i ? "," : "", i, name + 1);
    strcpy(to, "}");
    write_table(*state, "one.safetensors", &t, "F32");
    write_safetensors(*state, "two.safetensors", header, 0);
    FILE *index = fopen(path_in(*state, "model.safetensors.index.json"), "w");
    fprintf(index, "{\"weight_map\":{");
    for (int i = 0; i < t.n; i++) fprintf(index, "\"%s\":\"one.safetensors\",", t.of[i].name);
    for (int i = 0; i < 6; i++)
        fprintf(index, "\"%d%s\":\"two.safetensors\"%s", i, name + 1, i < 5 ? "," : "}}");
    fclose(index);
    write_text(*state, "config.json", TINY_LLAMA);
    ifkv_model m;
    assert_ok(load(*state, &m));
    assert_tiny(&m);
    ifkv_model_fini(&m);
    assert_non_null(strstr(log_text, "6 tensors that the architecture does not have"));
}

static void rotary_buffers_are_silent(void **state) {
    table t = tiny(false, true);
    ifkv_model m;
    add(&t, "model.layers.0.self_attn.rotary_emb.inv_freq", 0, 2);
    write_model(*state, TINY_LLAMA, &t, "F32");
    assert_ok(load(*state, &m));
    ifkv_model_fini(&m);
    assert_string_equal(log_text, "");
}

static void stated_dtype_that_differs_is_a_warning(void **state) {
    const table t = tiny(false, true);
    char *text =
        replaced(TINY_LLAMA, "{\"model_type\"", "{\"torch_dtype\": \"bfloat16\", \"model_type\"");
    ifkv_model m;
    write_model(*state, text, &t, "F32");
    free(text);
    assert_ok(load(*state, &m));
    assert_tiny(&m);
    ifkv_model_fini(&m);
    assert_non_null(strstr(log_text, "/torch_dtype: got \"bfloat16\", but the tensors are F32"));
}

static void integer_weights_are_unsupported_by_name_and_type(void **state) {
    const table t = tiny(false, true);
    char file[20000], *at;
    size_t n;
    write_model(*state, TINY_LLAMA, &t, "F32");
    FILE *f = fopen(path_in(*state, "model.safetensors"), "rb");
    n = fread(file, 1, sizeof file - 1, f);
    fclose(f);
    at = memmem(file, n, "q_proj.weight\":{\"dtype\":\"F32\"", 29);
    assert_non_null(at);
    memcpy(at + 25, "I32", 3);
    write_file(*state, "model.safetensors", file, n);
    refused(*state, IFKV_ERR_UNSUPPORTED, IFKV_E_TENSOR_DTYPE,
            "tensor \"model.layers.0.self_attn.q_proj.weight\" dtype: not supported for a weight: "
            "got \"I32\"");
}

static void a_billion_layers_fail_in_a_second_and_little_memory(void **state) {
    const table t = tiny(false, true);
    char *text =
        replaced(TINY_LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000");
    const clock_t begin = clock();
    struct rusage before, after;
    write_model(*state, text, &t, "F32");
    free(text);
    getrusage(RUSAGE_SELF, &before);
    refused(*state, IFKV_ERR_DATA, IFKV_E_WEIGHTS,
            "got none of \"model.layers.2.input_layernorm.weight\"");
    getrusage(RUSAGE_SELF, &after);
    assert_non_null(strstr(ifkv_last_error()->text, "(8999999982 of 9000000002 missing)"));
    assert_true((double)(clock() - begin) / CLOCKS_PER_SEC < 1);
    assert_true(after.ru_maxrss - before.ru_maxrss < 100 * 1024);
}

static void a_billion_random_layers_are_data(void **state) {
    char *text =
        replaced(TINY_LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000");
    const ifkv_model_options random = {true, 1};
    ifkv_model m;
    write_text(*state, "config.json", text);
    free(text);
    assert_fails(ifkv_model_check(*state, &random, IFKV_DTYPE_F32, &m), IFKV_ERR_DATA,
                 IFKV_E_CONFIG_FIELD, "num_hidden_layers");
}

static void random_layers_are_limited_to_65536(void **state) {
    const ifkv_model_options random = {true, 1};
    ifkv_model m;
    char *text = replaced(TINY_LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 65536");
    write_text(*state, "config.json", text);
    free(text);
    assert_ok(ifkv_model_check(*state, &random, IFKV_DTYPE_F32, &m));
    text = replaced(TINY_LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 65537");
    write_text(*state, "config.json", text);
    free(text);
    assert_fails(ifkv_model_check(*state, &random, IFKV_DTYPE_F32, &m), IFKV_ERR_DATA,
                 IFKV_E_CONFIG_FIELD, "at most 65536");
}

static void size_beyond_64_bits_is_data(void **state) {
    char *a = replaced(TINY_LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2147483647");
    char *b = replaced(a, "\"hidden_size\": 8", "\"hidden_size\": 16777216");
    char *c = replaced(b, "\"intermediate_size\": 6", "\"intermediate_size\": 16777216");
    ifkv_model m;
    write_text(*state, "config.json", c);
    assert_fails(ifkv_model_check(*state, NULL, IFKV_DTYPE_F32, &m), IFKV_ERR_DATA, IFKV_E_WEIGHTS,
                 "num_hidden_layers");
    free(c);
    free(b);
    free(a);
}

/* ---- values (C22) */

/* Overwrite element i of the last tensor. */
static void poison(const char *dir, const table *t, uint32_t bits) {
    const int fd = open(path_in(dir, "model.safetensors"), O_RDWR);
    const off_t end = lseek(fd, 0, SEEK_END);
    assert_int_equal(pwrite(fd, &bits, 4, end - 8), 4);
    close(fd);
    (void)t;
}

static void not_finite_weights_are_numeric_by_name_and_element(void **state) {
    static const uint32_t bits[] = {0x7fc00000, 0x7f800000, 0xff800000, 0x7f800001};
    const table t = tiny(false, true); /* the last tensor is down_proj [8, 6] of layer 1 */
    ifkv_model m;
    for (int i = 0; i < 4; i++) {
        write_model(*state, TINY_LLAMA, &t, "F32");
        poison(*state, &t, bits[i]);
        assert_fails(load(*state, &m), IFKV_ERR_NUMERIC, IFKV_E_WEIGHT_VALUE,
                     "tensor \"model.layers.1.mlp.down_proj.weight\": element 46: got NaN or "
                     "infinity");
    }
}

static void largest_finite_weights_are_accepted(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    poison(*state, &t, 0x7f7fffff);
    assert_ok(load(*state, &m));
    ifkv_model_fini(&m);
}

static void check_reads_no_weight(void **state) {
    const table t = tiny(false, true);
    ifkv_model m;
    write_model(*state, TINY_LLAMA, &t, "F32");
    poison(*state, &t, 0x7fc00000);
    assert_ok(ifkv_model_check(*state, NULL, IFKV_DTYPE_F32, &m));
}

/* ---- fingerprint */

static uint64_t fingerprint(const char *dir, const ifkv_model_options *options) {
    ifkv_model m;
    assert_ok(ifkv_model_check(dir, options, IFKV_DTYPE_F32, &m));
    return m.fingerprint;
}

static void fingerprint_changes_with_config_type_and_set(void **state) {
    table t = tiny(false, true);
    uint64_t value[4];
    write_model(*state, TINY_LLAMA, &t, "F32");
    value[0] = fingerprint(*state, NULL);
    assert_true(value[0] == fingerprint(*state, NULL));
    char *text = replaced(TINY_LLAMA, "1e-05", "1e-06");
    write_model(*state, text, &t, "F32");
    free(text);
    value[1] = fingerprint(*state, NULL);
    write_model(*state, TINY_LLAMA, &t, "BF16");
    value[2] = fingerprint(*state, NULL);
    add(&t, "extra", 0, 8);
    write_model(*state, TINY_LLAMA, &t, "F32");
    value[3] = fingerprint(*state, NULL);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < i; k++) assert_true(value[i] != value[k]);
}

/* A byte of padding in a header changes no name, type or shape. */
static void fingerprint_changes_with_a_header(void **state) {
    const table t = tiny(false, true);
    char file[20000];
    write_model(*state, TINY_LLAMA, &t, "F32");
    const uint64_t before = fingerprint(*state, NULL);
    FILE *f = fopen(path_in(*state, "model.safetensors"), "rb");
    const size_t n = fread(file, 1, sizeof file - 1, f);
    fclose(f);
    const size_t n_header = (size_t)(unsigned char)file[0] | (size_t)(unsigned char)file[1] << 8;
    memmove(file + 8 + n_header + 1, file + 8 + n_header, n - 8 - n_header);
    file[8 + n_header] = ' ';
    file[0] = (char)(n_header + 1);
    file[1] = (char)((n_header + 1) >> 8);
    write_file(*state, "model.safetensors", file, n + 1);
    assert_true(fingerprint(*state, NULL) != before);
}

static void fingerprint_of_drawn_weights_changes_with_the_seed(void **state) {
    const ifkv_model_options one = {true, 1}, two = {true, 2};
    write_text(*state, "config.json", TINY_LLAMA);
    assert_true(fingerprint(*state, &one) == fingerprint(*state, &one));
    assert_true(fingerprint(*state, &one) != fingerprint(*state, &two));
}

/* ---- drawn weights */

static ifkv_weight_plan smol_plan(void) {
    ifkv_config c = {.n_layer = 30, .n_head = 9, .n_kv_head = 3, .d_head = 64, .d_model = 576};
    ifkv_weight_plan plan;
    c.d_ff = 1536;
    c.n_vocab = 49152;
    c.is_tied = true;
    assert_ok(ifkv_weights_plan(&c, IFKV_DTYPE_F32, &plan));
    return plan;
}

static void draw(const ifkv_weight_plan *plan, uint64_t seed, ifkv_weight_kind kind, int layer,
                 int64_t first, int64_t n, float *to) {
    const ifkv_draw stream = ifkv_weights_stream(plan, seed, kind, layer);
    ifkv_weights_draw(&stream, first, n, to);
}

static void drawn_elements_do_not_depend_on_the_block(void **state) {
    const ifkv_weight_plan plan = smol_plan();
    float whole[1000], part[1000];
    (void)state;
    draw(&plan, 5, IFKV_WEIGHT_Q, 3, 0, 1000, whole);
    for (int i = 0; i < 1000; i += 77)
        draw(&plan, 5, IFKV_WEIGHT_Q, 3, i, 1000 - i < 77 ? 1000 - i : 77, part + i);
    assert_memory_equal(whole, part, sizeof whole);
}

static void drawn_weights_are_the_same_on_every_machine(void **state) {
    const ifkv_weight_plan plan = smol_plan();
    float got[3];
    (void)state;
    draw(&plan, 1, IFKV_WEIGHT_Q, 0, 0, 3, got);
    assert_true(got[0] == -0x1.76b17p-5f && got[1] == -0x1.2eac54p-3f && got[2] == 0x1.ea1872p-4f);
}

static void drawn_tensors_differ_by_seed_layer_and_kind(void **state) {
    const ifkv_weight_plan plan = smol_plan();
    float got[4];
    (void)state;
    draw(&plan, 1, IFKV_WEIGHT_GATE, 0, 0, 1, &got[0]);
    draw(&plan, 2, IFKV_WEIGHT_GATE, 0, 0, 1, &got[1]);
    draw(&plan, 1, IFKV_WEIGHT_GATE, 1, 0, 1, &got[2]);
    draw(&plan, 1, IFKV_WEIGHT_UP, 0, 0, 1, &got[3]);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < i; k++) assert_true(got[i] != got[k]);
}

/* 1e5 draws: the mean is within five standard errors, the variance within 3 %. */
static void drawn_weights_have_the_stated_spread(void **state) {
    const ifkv_weight_plan plan = smol_plan();
    enum { N = 100000 };
    float *got = malloc(N * sizeof *got);
    double sum = 0, square = 0;
    (void)state;
    draw(&plan, 1, IFKV_WEIGHT_UP, 0, 0, N, got);
    for (int i = 0; i < N; i++) {
        sum += (double)got[i];
        square += (double)got[i] * (double)got[i];
    }
    free(got);
    assert_true(fabs(sum / N) < 5 / sqrt(576.0 * N));
    assert_true(fabs(square / N * 576.0 - 1) < 0.03);
}

static void drawn_model_fills_every_tensor(void **state) {
    const ifkv_model_options random = {true, 1};
    ifkv_model m;
    write_text(*state, "config.json", TINY_QWEN3);
    assert_ok(ifkv_model_load(*state, &random, &fake, &m));
    for (int i = 0; i < 2; i++) {
        const ifkv_view *view[] = {
            &m.layer[i].attention_norm, &m.layer[i].qkv, &m.layer[i].q_norm,
            &m.layer[i].k_norm,         &m.layer[i].o,   &m.layer[i].mlp_norm,
            &m.layer[i].gate_up,        &m.layer[i].down};
        for (size_t v = 0; v < sizeof view / sizeof view[0]; v++)
            assert_true(
                ifkv_is_finite(IFKV_DTYPE_F32, view[v]->data, view[v]->n_row * view[v]->n_col));
    }
    ifkv_model_fini(&m);
}

/* ---- names */

static void names_and_numbers_are_inverse(void **state) {
    const ifkv_weight_plan plan = smol_plan();
    (void)state;
    assert_int_equal(plan.n_tensor, 2 + 30 * 9);
    for (int64_t i = 0; i < plan.n_tensor; i++) {
        char name[IFKV_WEIGHT_NAME_BYTES];
        ifkv_weight_kind kind, found;
        int layer, found_layer;
        ifkv_weights_at(&plan, i, &kind, &layer);
        assert_true(
            ifkv_weights_find(&plan, ifkv_weight_name(kind, layer, name), &found, &found_layer));
        assert_int_equal(found, kind);
        assert_int_equal(found_layer, layer);
    }
}

static void foreign_names_are_not_found(void **state) {
    static const char *const name[] = {"",
                                       "model.layers.",
                                       "model.layers.30.mlp.up_proj.weight",
                                       "model.layers.00.mlp.up_proj.weight",
                                       "model.layers.-1.mlp.up_proj.weight",
                                       "model.layers.4294967296.mlp.up_proj.weight",
                                       "model.layers.99999999999999999999.mlp.up_proj.weight",
                                       "model.layers.1mlp.up_proj.weight",
                                       "lm_head.weight",
                                       "model.layers.1.self_attn.q_norm.weight",
                                       "model.norm.weightx"};
    const ifkv_weight_plan plan = smol_plan();
    ifkv_weight_kind kind;
    int layer;
    (void)state;
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++)
        assert_false(ifkv_weights_find(&plan, name[i], &kind, &layer));
}

/* ---- shapes that are shipped */

static int64_t n_parameter_of(const char *name) {
    const ifkv_model_options random = {true, 1};
    char path[512];
    ifkv_model m;
    snprintf(path, sizeof path, "%s/%s", IFKV_CONFIG_DIR, name);
    assert_ok(ifkv_model_check(path, &random, IFKV_DTYPE_F32, &m));
    return m.n_parameter;
}

static void shipped_shapes_have_their_number_of_parameters(void **state) {
    (void)state;
    assert_int_equal(n_parameter_of("Qwen3-14B"), 14768307200);
    assert_int_equal(n_parameter_of("Llama-3.1-8B"), 8030261248);
    assert_int_equal(n_parameter_of("SmolLM2-135M"), 134515008);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_tensor_lands_in_its_place),
        TEST(head_norms_of_qwen3_are_loaded),
        TEST(tied_head_is_the_embedding),
        TEST(untied_head_is_its_own),
        TEST(untied_model_without_head_is_data),
        TEST(tied_model_with_a_copy_of_the_head_is_silent),
        TEST(shards_load_as_one_file_does),
        TEST(bf16_back_end_holds_bf16),
        TEST(check_counts_what_load_allocates),
        TEST(shared_weights_stay_for_the_last),
        TEST(failed_upload_releases_everything),
        TEST(model_beyond_memory_is_resource),
        TEST(packed_matrices_have_no_gap),
        TEST(other_tensors_begin_on_64_bytes),
        TEST(missing_tensor_is_data_by_name),
        TEST(five_missing_tensors_are_named_and_all_counted),
        TEST(fused_qkv_is_data_naming_the_split_ones),
        TEST(transposed_tensor_is_data_with_both_shapes),
        TEST(rank_of_a_norm_must_be_one),
        TEST(five_wrong_shapes_are_named_and_all_counted),
        TEST(extra_tensors_are_a_warning),
        TEST(five_extra_tensors_are_named_and_all_counted),
        TEST(long_names_of_extra_tensors_are_cut),
        TEST(rotary_buffers_are_silent),
        TEST(stated_dtype_that_differs_is_a_warning),
        TEST(integer_weights_are_unsupported_by_name_and_type),
        TEST(a_billion_layers_fail_in_a_second_and_little_memory),
        TEST(a_billion_random_layers_are_data),
        TEST(random_layers_are_limited_to_65536),
        TEST(size_beyond_64_bits_is_data),
        TEST(not_finite_weights_are_numeric_by_name_and_element),
        TEST(largest_finite_weights_are_accepted),
        TEST(check_reads_no_weight),
        TEST(fingerprint_changes_with_config_type_and_set),
        TEST(fingerprint_changes_with_a_header),
        TEST(fingerprint_of_drawn_weights_changes_with_the_seed),
        TEST(drawn_elements_do_not_depend_on_the_block),
        TEST(drawn_weights_are_the_same_on_every_machine),
        TEST(drawn_tensors_differ_by_seed_layer_and_kind),
        TEST(drawn_weights_have_the_stated_spread),
        TEST(drawn_model_fills_every_tensor),
        TEST(names_and_numbers_are_inverse),
        TEST(foreign_names_are_not_found),
        TEST(shipped_shapes_have_their_number_of_parameters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
