/* config.json: what is accepted, what is refused, and how the refusal reads. */
#include "model_files.h"

#include "config.h"
#include "error_codes.h"
#include "json.h"

#include <malloc.h>
#include <sys/stat.h>
#include <unistd.h>

static ifkv_status load_text(const char *dir, const char *text, ifkv_config *config) {
    write_text(dir, "config.json", text);
    return ifkv_config_load(dir, config);
}

/* The tiny model with one thing changed must load. */
static ifkv_config accepted(const char *dir, const char *base, const char *from, const char *to) {
    ifkv_config config;
    char *text = replaced(base, from, to);
    assert_ok(load_text(dir, text, &config));
    free(text);
    return config;
}

/* The tiny model with one thing changed must be refused. */
static void refused(const char *dir, const char *base, const char *from, const char *to,
                    ifkv_status status, int code, const char *part) {
    ifkv_config config;
    char *text = replaced(base, from, to);
    assert_fails(load_text(dir, text, &config), status, code, part);
    assert_non_null(strstr(ifkv_last_error()->text, "config.json"));
    free(text);
}

static void bad_field(const char *dir, const char *from, const char *to, const char *part) {
    refused(dir, TINY_LLAMA, from, to, IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD, part);
}
static void bad_json(const char *dir, const char *from, const char *to, const char *part) {
    refused(dir, TINY_LLAMA, from, to, IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, part);
}
static void unsupported(const char *dir, const char *base, const char *from, const char *to,
                        const char *part) {
    refused(dir, base, from, to, IFKV_ERR_UNSUPPORTED, IFKV_E_CONFIG_MODEL, part);
}

/* ---- files (B1, B2) */

static void missing_file_is_no_input(void **state) {
    ifkv_config config;
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_NO_INPUT, IFKV_E_CONFIG_FILE,
                 "config.json");
}

static void missing_directory_is_no_input(void **state) {
    ifkv_config config;
    assert_fails(ifkv_config_load(path_in(*state, "none"), &config), IFKV_ERR_NO_INPUT,
                 IFKV_E_CONFIG_FILE, "none/config.json");
}

static void directory_is_data(void **state) {
    ifkv_config config;
    mkdir(path_in(*state, "config.json"), 0700);
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_FILE,
                 "got a directory");
}

static void fifo_is_refused_without_waiting(void **state) {
    ifkv_config config;
    assert_int_equal(mkfifo(path_in(*state, "config.json"), 0600), 0);
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_FILE,
                 "got a FIFO");
}

static void link_loop_is_no_input(void **state) {
    ifkv_config config;
    assert_int_equal(symlink("config.json", path_in(*state, "config.json")), 0);
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_NO_INPUT, IFKV_E_CONFIG_FILE,
                 "config.json");
}

static void unreadable_file_is_permission(void **state) {
    ifkv_config config;
    const bool is_root = geteuid() == 0; /* root reads everything: be somebody else meanwhile */
    write_text(*state, "config.json", TINY_LLAMA);
    chmod(*state, 0755);
    chmod(path_in(*state, "config.json"), 0);
    if (is_root) assert_int_equal(seteuid(65534), 0);
    const ifkv_status status = ifkv_config_load(*state, &config);
    if (is_root) assert_int_equal(seteuid(0), 0);
    assert_fails(status, IFKV_ERR_PERMISSION, IFKV_E_CONFIG_FILE, "config.json");
}

static void link_to_a_file_is_followed(void **state) {
    ifkv_config config;
    write_text(*state, "blob", TINY_LLAMA);
    assert_int_equal(symlink("blob", path_in(*state, "config.json")), 0);
    assert_ok(ifkv_config_load(*state, &config));
}

static void path_with_newline_is_escaped(void **state) {
    ifkv_config config;
    assert_fails(ifkv_config_load(path_in(*state, "a\nb"), &config), IFKV_ERR_NO_INPUT,
                 IFKV_E_CONFIG_FILE, "a\\x0ab/config.json");
}

static void path_beyond_the_limit_is_no_input(void **state) {
    ifkv_config config;
    char *path = malloc(5000);
    (void)state;
    memset(path, 'a', 4999);
    path[4999] = 0;
    assert_fails(ifkv_config_load(path, &config), IFKV_ERR_NO_INPUT, IFKV_E_CONFIG_FILE,
                 "config.json");
    free(path);
}

static void empty_file_is_data(void **state) {
    ifkv_config config;
    assert_fails(load_text(*state, "", &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "byte 0");
}

static void truncation_at_any_byte_is_data(void **state) {
    ifkv_config config;
    const size_t n = strlen(TINY_LLAMA) - 2; /* the last '}' stands here */
    for (size_t i = 0; i <= n; i++) {
        write_file(*state, "config.json", TINY_LLAMA, i);
        assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "byte ");
    }
}

static void trailing_garbage_is_data(void **state) {
    bad_json(*state, "null}\n", "null}\nx", "byte ");
}

static void trailing_nul_is_data(void **state) {
    ifkv_config config;
    write_file(*state, "config.json", TINY_LLAMA, strlen(TINY_LLAMA) + 1);
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "byte ");
}

static void byte_order_mark_is_data(void **state) {
    bad_json(*state, "{\"model_type\"", "\xef\xbb\xbf{\"model_type\"", "byte order mark");
}

static void utf16_is_data(void **state) {
    char text[2048];
    const size_t n = strlen(TINY_LLAMA);
    ifkv_config config;
    for (size_t i = 0; i < n; i++) {
        text[2 * i] = TINY_LLAMA[i];
        text[2 * i + 1] = 0;
    }
    write_file(*state, "config.json", text, 2 * n);
    assert_fails(ifkv_config_load(*state, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "byte ");
}

static void duplicate_key_is_data(void **state) {
    bad_json(*state, "\"hidden_size\": 8", "\"hidden_size\": 8, \"hidden_size\": 8", "hidden_size");
}

static void invalid_utf8_is_data(void **state) {
    bad_json(*state, "\"silu\"", "\"\xff\"", "hidden_act");
}

static void nul_in_a_key_is_data(void **state) {
    bad_json(*state, "{\"model_type\"", "{\"a\\u0000b\": 1, \"model_type\"", "byte ");
}

static void git_lfs_pointer_is_named(void **state) {
    ifkv_config config;
    assert_fails(
        load_text(*state, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", &config),
        IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "git-lfs pointer");
}

static void array_at_the_root_is_data(void **state) {
    ifkv_config config;
    assert_fails(load_text(*state, "[]", &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "an object");
}

/* Arrays nested `depth` deep inside the root object, which is level 1. */
static ifkv_status load_depth(const char *dir, int depth) {
    ifkv_config config;
    char *deep = malloc(2 * (size_t)depth + 64);
    char *at = deep + sprintf(deep, "{\"deep\": ");
    memset(at, '[', (size_t)depth - 1);
    memset(at + depth - 1, ']', (size_t)depth - 1);
    strcpy(at + 2 * (depth - 1), ", \"model_type\"");
    char *text = replaced(TINY_LLAMA, "{\"model_type\"", deep);
    const ifkv_status status = load_text(dir, text, &config);
    free(text);
    free(deep);
    return status;
}

static void depth_64_is_accepted(void **state) {
    assert_ok(load_depth(*state, 63));
    assert_ok(load_depth(*state, 64));
}

static void depth_65_is_data(void **state) {
    assert_fails(load_depth(*state, 65), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "at most 64");
}

static void depth_of_100_000_is_data(void **state) {
    assert_fails(load_depth(*state, 100000), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON, "at most 64");
}

/* The tiny model padded with spaces to n bytes. */
static ifkv_status load_padded(const char *dir, size_t n) {
    ifkv_config config;
    char *text = malloc(n);
    memset(text, ' ', n);
    memcpy(text, TINY_LLAMA, strlen(TINY_LLAMA));
    write_file(dir, "config.json", text, n);
    free(text);
    return ifkv_config_load(dir, &config);
}

static void sixteen_mebibytes_are_accepted(void **state) {
    assert_ok(load_padded(*state, (16 << 20) - 1));
    assert_ok(load_padded(*state, 16 << 20));
}

static void one_byte_more_is_data(void **state) {
    assert_fails(load_padded(*state, (16 << 20) + 1), IFKV_ERR_DATA, IFKV_E_CONFIG_FILE,
                 "at most 16777216");
}

/* ---- memory of parsing (C5) */

static ifkv_status parse_repeated(const char *unit, size_t n, uint64_t memory) {
    const ifkv_json_limits limits = {0, 0, memory};
    const size_t n_unit = strlen(unit);
    char *text = malloc(n * (n_unit + 1) + 2), *at = text;
    json_t *root = NULL;
    *at++ = '[';
    for (size_t i = 0; i < n; i++) {
        memcpy(at, unit, n_unit);
        at += n_unit;
        *at++ = i + 1 < n ? ',' : ']';
    }
    const ifkv_status status =
        ifkv_json_parse("text", text, (size_t)(at - text), &limits, IFKV_E_CONFIG_JSON, &root);
    free(text);
    json_decref(root);
    return status;
}

static void ninety_megabytes_of_empty_objects_are_refused(void **state) {
    (void)state;
    assert_fails(parse_repeated("{}", 30000000, 0), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON,
                 "too much memory");
}

/* Grows with every kind of node: the budget must never be below what the heap really takes. */
static void estimate_is_an_upper_bound(void **state) {
    static const char *const unit[] = {
        "{}",
        "[]",
        "1",
        "1.5",
        "\"\"",
        "\"abcdefghijklmnopqrstuvwx\"",
        "[[1]]",
        "{\"a\":1}",
        "{\"a\":{},\"b\":[],\"c\":\"x\",\"d\":1,\"e\":2,\"f\":3,\"g\":4,\"h\":5,\"i\":6}"};
    (void)state;
    for (size_t i = 0; i < sizeof unit / sizeof unit[0]; i++) {
        const size_t n = 65537; /* just behind a doubling of the array */
        char *text = malloc(n * (strlen(unit[i]) + 1) + 2), *at = text;
        const ifkv_json_limits tight = {0, 0, 1};
        json_t *root = NULL;
        *at++ = '[';
        for (size_t k = 0; k < n; k++) at += sprintf(at, "%s%c", unit[i], k + 1 < n ? ',' : ']');
        /* The refusal states the estimate. */
        assert_int_equal(ifkv_json_parse("text", text, (size_t)(at - text), &tight, 1, &root),
                         IFKV_ERR_DATA);
        const char *got = strstr(ifkv_last_error()->text, "about ");
        assert_non_null(got);
        const unsigned long long estimate = strtoull(got + 6, NULL, 10);
        const ifkv_json_limits wide = {0, 0, estimate};
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
        const size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
        assert_ok(ifkv_json_parse("text", text, (size_t)(at - text), &wide, 1, &root));
        const size_t used = mallinfo2().uordblks + mallinfo2().hblkhd - before;
        if (used > estimate) fail_msg("%s: used %zu, estimated %llu", unit[i], used, estimate);
#else
        assert_ok(ifkv_json_parse("text", text, (size_t)(at - text), &wide, 1, &root));
#endif
        json_decref(root);
        free(text);
    }
}

static void budget_counts_to_the_byte(void **state) {
    (void)state;
    assert_int_equal(parse_repeated("1", 100, 1), IFKV_ERR_DATA);
    const unsigned long long estimate =
        strtoull(strstr(ifkv_last_error()->text, "about ") + 6, NULL, 10);
    assert_ok(parse_repeated("1", 100, estimate));
    assert_int_equal(parse_repeated("1", 100, estimate - 1), IFKV_ERR_DATA);
}

/* ---- what the model is (B3) */

static void unknown_model_types_are_unsupported(void **state) {
    static const char *const type[] = {
        "\"chatglm\"",     "\"glm\"", "\"glm4\"", "\"qwen2\"", "\"qwen3_vl\"", "\"qwen3_moe\"",
        "\"deepseek_v3\"", "\"\"",    "null",     "7",         "\"llama\\n\""};
    for (size_t i = 0; i < sizeof type / sizeof type[0]; i++)
        unsupported(*state, TINY_LLAMA, "\"llama\"", type[i], "/model_type: not supported: got ");
}

static void refusal_lists_the_supported_types(void **state) {
    unsupported(*state, TINY_LLAMA, "\"llama\"", "\"glm4\"",
                "\"glm4\", expected \"llama\" or \"qwen3\"");
}

static void absent_model_type_is_unsupported(void **state) {
    unsupported(*state, TINY_LLAMA, "\"model_type\"", "\"model\"", "/model_type");
}

static void terminal_escapes_are_quoted(void **state) {
    unsupported(*state, TINY_LLAMA, "\"llama\"", "\"\\u001b[2J\"", "\\x1b[2J");
}

static void variants_are_unsupported_by_name(void **state) {
    static const char *const field[][2] = {{"quantization_config", "{\"quant_method\": \"fp8\"}"},
                                           {"num_experts", "8"},
                                           {"num_local_experts", "8"},
                                           {"n_routed_experts", "64"},
                                           {"kv_lora_rank", "512"},
                                           {"q_lora_rank", "1536"},
                                           {"text_config", "{}"},
                                           {"attention_bias", "true"},
                                           {"mlp_bias", "true"},
                                           {"use_sliding_window", "true"},
                                           {"sliding_window", "4096"},
                                           {"partial_rotary_factor", "0.5"},
                                           {"rope_interleaved", "true"},
                                           {"final_logit_softcapping", "30.0"}};
    for (size_t i = 0; i < sizeof field / sizeof field[0]; i++) {
        char to[128], part[64];
        snprintf(to, sizeof to, "{\"%s\": %s, \"model_type\"", field[i][0], field[i][1]);
        snprintf(part, sizeof part, "/%s: not supported", field[i][0]);
        unsupported(*state, TINY_LLAMA, "{\"model_type\"", to, part);
    }
}

static void null_variants_are_accepted(void **state) {
    accepted(*state, TINY_LLAMA, "{\"model_type\"",
             "{\"quantization_config\": null, \"sliding_window\": null, \"attention_bias\": false, "
             "\"partial_rotary_factor\": 1.0, \"model_type\"");
}

static void other_activations_are_unsupported(void **state) {
    unsupported(*state, TINY_LLAMA, "\"silu\"", "\"gelu\"",
                "/hidden_act: not supported: got \"gelu\"");
}

static void qwen3_window_that_is_off_is_accepted(void **state) {
    accepted(*state, TINY_QWEN3, "\"sliding_window\": null", "\"sliding_window\": 4096");
}

static void qwen3_window_in_use_is_unsupported(void **state) {
    unsupported(*state, TINY_QWEN3, "\"use_sliding_window\": false", "\"use_sliding_window\": true",
                "/use_sliding_window");
}

static void full_attention_layers_are_accepted(void **state) {
    accepted(*state, TINY_QWEN3, "\"sliding_window\": null",
             "\"layer_types\": [\"full_attention\", \"full_attention\"]");
}

static void a_sliding_layer_is_unsupported(void **state) {
    unsupported(*state, TINY_QWEN3, "\"sliding_window\": null",
                "\"layer_types\": [\"full_attention\", \"sliding_attention\"]",
                "/layer_types/1: not supported: got \"sliding_attention\"");
}

static void layer_types_of_another_length_are_data(void **state) {
    refused(*state, TINY_QWEN3, "\"sliding_window\": null", "\"layer_types\": [\"full_attention\"]",
            IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD, "/layer_types");
}

/* ---- fields (B4-B7) */

static void each_required_field_is_required(void **state) {
    static const char *const field[] = {"num_hidden_layers",   "hidden_size",
                                        "num_attention_heads", "intermediate_size",
                                        "vocab_size",          "max_position_embeddings",
                                        "rms_norm_eps"};
    for (size_t i = 0; i < sizeof field / sizeof field[0]; i++) {
        char from[64], to[64], part[96];
        snprintf(from, sizeof from, "\"%s\"", field[i]);
        snprintf(to, sizeof to, "\"x%zu\"", i);
        snprintf(part, sizeof part, "config.json /%s: required field missing", field[i]);
        bad_field(*state, from, to, part);
    }
}

static void wrong_types_and_ranges_name_the_field(void **state) {
    static const char *const value[] = {"\"8\"", "8.0",        "true", "null", "-1",
                                        "0",     "2147483648", "[8]",  "{}"};
    static const char *const field[] = {
        "num_hidden_layers\": 2", "hidden_size\": 8", "num_attention_heads\": 4",
        "intermediate_size\": 6", "vocab_size\": 11", "max_position_embeddings\": 64"};
    for (size_t f = 0; f < sizeof field / sizeof field[0]; f++) {
        for (size_t v = 0; v < sizeof value / sizeof value[0]; v++) {
            const int n = (int)(strchr(field[f], '"') - field[f]);
            char to[96], part[96];
            snprintf(to, sizeof to, "%.*s\": %s", n, field[f], value[v]);
            snprintf(part, sizeof part, "/%.*s: ", n, field[f]);
            bad_field(*state, field[f], to, part);
            assert_non_null(strstr(ifkv_last_error()->text, "got "));
            assert_non_null(strstr(ifkv_last_error()->text, "expected an integer in [1, "));
        }
    }
}

static void bounds_of_a_field_are_inclusive(void **state) {
    assert_int_equal(accepted(*state, TINY_LLAMA, "\"max_position_embeddings\": 64",
                              "\"max_position_embeddings\": 1")
                         .max_position,
                     1);
    assert_int_equal(accepted(*state, TINY_LLAMA, "\"max_position_embeddings\": 64",
                              "\"max_position_embeddings\": 2147483647")
                         .max_position,
                     2147483647);
}

static void numbers_that_json_cannot_hold_name_the_field(void **state) {
    static const char *const value[] = {"9223372036854775808", "1e400", "012", "NaN", "Infinity"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char to[64];
        snprintf(to, sizeof to, "\"hidden_size\": %s", value[i]);
        bad_json(*state, "\"hidden_size\": 8", to, "hidden_size");
    }
}

static void eps_must_be_a_small_positive_number(void **state) {
    static const char *const value[] = {"0", "-1e-6", "\"1e-6\"", "1.5", "null"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++)
        bad_field(*state, "1e-05", value[i], "/rms_norm_eps");
}

static void kv_heads_must_divide_heads(void **state) {
    bad_field(
        *state, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3",
        "/num_key_value_heads: does not divide num_attention_heads: got 3, expected a divisor "
        "of 4");
}

static void kv_heads_default_to_heads(void **state) {
    assert_int_equal(accepted(*state, TINY_LLAMA, "\"num_key_value_heads\"", "\"x\"").n_kv_head, 4);
    assert_int_equal(
        accepted(*state, TINY_LLAMA, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": null")
            .n_kv_head,
        4);
}

static void head_dim_must_be_even_and_sane(void **state) {
    static const char *const value[] = {"5", "0", "1000000", "-4", "1026", "4.0"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char to[64];
        snprintf(to, sizeof to, "\"head_dim\": %s", value[i]);
        bad_field(*state, "\"head_dim\": 4", to, "/head_dim");
    }
}

static void head_dim_limit_is_1024(void **state) {
    assert_int_equal(accepted(*state, TINY_LLAMA, "\"head_dim\": 4", "\"head_dim\": 1024").d_head,
                     1024);
}

static void absent_head_dim_is_hidden_over_heads(void **state) {
    assert_int_equal(accepted(*state, TINY_LLAMA, "\"head_dim\"", "\"x\"").d_head, 2);
}

static void absent_head_dim_needs_a_whole_quotient(void **state) {
    ifkv_config config;
    char *a = replaced(TINY_LLAMA, "\"head_dim\"", "\"x\"");
    char *b = replaced(a, "\"hidden_size\": 8", "\"hidden_size\": 10");
    assert_fails(load_text(*state, b, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                 "/hidden_size: not a multiple of num_attention_heads");
    free(b);
    free(a);
}

static void explicit_head_dim_may_differ_from_the_quotient(void **state) {
    assert_int_equal(accepted(*state, TINY_QWEN3, "\"head_dim\": 4", "\"head_dim\": 128").d_head,
                     128);
}

static void shape_of_llama_is_read(void **state) {
    ifkv_config c;
    assert_ok(load_text(*state, TINY_LLAMA, &c));
    assert_int_equal(c.family, IFKV_FAMILY_LLAMA);
    assert_false(c.has_head_norm);
    assert_true(c.is_tied);
    assert_int_equal(c.n_layer, 2);
    assert_int_equal(c.d_model, 8);
    assert_int_equal(c.n_head, 4);
    assert_int_equal(c.n_kv_head, 2);
    assert_int_equal(c.d_head, 4);
    assert_int_equal(c.d_ff, 6);
    assert_int_equal(c.n_vocab, 11);
    assert_int_equal(c.max_position, 64);
    assert_true(c.norm_eps == 1e-5);
    assert_true(c.rope_theta == 1e4);
    assert_int_equal(c.rope_kind, IFKV_ROPE_PLAIN);
}

static void qwen3_has_head_norms(void **state) {
    ifkv_config c;
    assert_ok(load_text(*state, TINY_QWEN3, &c));
    assert_int_equal(c.family, IFKV_FAMILY_QWEN3);
    assert_true(c.has_head_norm);
}

/* ---- rotary parameters (B8, B9) */

#define LLAMA3(type)                                                                               \
    "\"" type "\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1, \"high_freq_factor\": 4, " \
    "\"original_max_position_embeddings\": 32"
#define ROPE "\"rope_theta\": 10000.0,\n \"rope_scaling\": null"

static void all_spellings_of_plain_rope_agree(void **state) {
    static const char *const spelling[] = {
        "\"rope_theta\": 5e5",
        "\"rope_theta\": 500000",
        "\"rope_theta\": 500000.0, \"rope_scaling\": {\"type\": \"default\"}",
        "\"rope_theta\": 500000.0, \"rope_scaling\": {\"rope_type\": \"default\"}",
        "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500000.0}",
        "\"rope_parameters\": {\"rope_theta\": 500000.0}",
        "\"rope_theta\": 500000.0, \"rope_parameters\": {\"rope_type\": \"default\", "
        "\"rope_theta\": 500000.0}, \"rope_scaling\": null",
        "\"rope_theta\": 500000.0, \"rope_parameters\": null"};
    for (size_t i = 0; i < sizeof spelling / sizeof spelling[0]; i++) {
        const ifkv_config c = accepted(*state, TINY_QWEN3, ROPE, spelling[i]);
        assert_true(c.rope_theta == 5e5);
        assert_int_equal(c.rope_kind, IFKV_ROPE_PLAIN);
    }
}

static void all_spellings_of_llama3_rope_agree(void **state) {
    static const char *const spelling[] = {
        "\"rope_theta\": 5e5, \"rope_scaling\": {" LLAMA3("type") "}",
        "\"rope_theta\": 5e5, \"rope_scaling\": {" LLAMA3("rope_type") "}",
        "\"rope_theta\": 5e5, \"rope_scaling\": {\"type\": \"llama3\", " LLAMA3("rope_type") "}",
        "\"rope_parameters\": {\"rope_theta\": 5e5, " LLAMA3("rope_type") "}",
        "\"rope_theta\": 5e5, \"rope_scaling\": {" LLAMA3("type") "}, \"rope_parameters\": "
                                                                  "{\"rope_theta\": 5e5, " LLAMA3(
                                                                      "rope_type") "}"};
    for (size_t i = 0; i < sizeof spelling / sizeof spelling[0]; i++) {
        const ifkv_config c = accepted(*state, TINY_LLAMA, ROPE, spelling[i]);
        assert_true(c.rope_theta == 5e5);
        assert_int_equal(c.rope_kind, IFKV_ROPE_LLAMA3);
        assert_true(c.rope_factor == 8 && c.rope_low == 1 && c.rope_high == 4);
        assert_int_equal(c.rope_original, 32);
    }
}

static void bad_rope(void **state, const char *to, ifkv_status status, const char *part) {
    refused(*state, TINY_LLAMA, ROPE, to, status, IFKV_E_CONFIG_ROPE, part);
}

static void disagreeing_theta_is_data_with_both_values(void **state) {
    bad_rope(state,
             "\"rope_theta\": 10000.0, \"rope_parameters\": {\"rope_type\": \"default\", "
             "\"rope_theta\": 500000.0}",
             IFKV_ERR_DATA, "rope_theta");
    assert_non_null(strstr(ifkv_last_error()->text, "10000"));
    assert_non_null(strstr(ifkv_last_error()->text, "500000"));
}

static void disagreeing_types_are_data(void **state) {
    bad_rope(state,
             "\"rope_theta\": 1e4, \"rope_scaling\": {" LLAMA3(
                 "type") "}, \"rope_parameters\": {\"rope_type\": \"default\"}",
             IFKV_ERR_DATA, "rope_type");
    bad_rope(
        state,
        "\"rope_theta\": 1e4, \"rope_scaling\": {\"rope_type\": \"default\", " LLAMA3("type") "}",
        IFKV_ERR_DATA, "rope_type");
}

static void disagreeing_factors_are_data(void **state) {
    bad_rope(state,
             "\"rope_theta\": 1e4, \"rope_scaling\": {" LLAMA3(
                 "type") "}, \"rope_parameters\": {\"rope_type\": \"llama3\", \"factor\": 32, "
                         "\"low_freq_factor\": 1, \"high_freq_factor\": 4, "
                         "\"original_max_position_embeddings\": 32}",
             IFKV_ERR_DATA,
             "/factor: rotary parameters disagree: got rope_scaling 8 and "
             "rope_parameters 32");
}

static void unknown_rope_types_are_unsupported(void **state) {
    bad_rope(state, "\"rope_theta\": 1e4, \"rope_scaling\": {\"type\": \"yolo\", \"factor\": 2}",
             IFKV_ERR_UNSUPPORTED, "unknown rope type \"yolo\"");
    static const char *const type[] = {"linear", "dynamic", "yarn", "longrope", "mrope"};
    for (size_t i = 0; i < sizeof type / sizeof type[0]; i++) {
        char to[128];
        snprintf(to, sizeof to, "\"rope_theta\": 1e4, \"rope_scaling\": {\"type\": \"%s\"}",
                 type[i]);
        bad_rope(state, to, IFKV_ERR_UNSUPPORTED, type[i]);
    }
}

static void rope_per_layer_type_is_unsupported(void **state) {
    bad_rope(state,
             "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\", "
             "\"rope_theta\": 1e4}}",
             IFKV_ERR_UNSUPPORTED, "/rope_parameters/full_attention");
}

static void partial_rotation_in_rope_parameters_is_unsupported(void **state) {
    unsupported(*state, TINY_LLAMA, ROPE,
                "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 1e4, "
                "\"partial_rotary_factor\": 0.5}",
                "/rope_parameters/partial_rotary_factor");
}

/* `factor`, low and high of llama3 as given. */
static void bad_llama3(void **state, const char *factor, const char *low, const char *high,
                       int code, const char *part) {
    char to[400];
    snprintf(to, sizeof to,
             "\"rope_theta\": 1e4, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": %s, "
             "\"low_freq_factor\": %s, \"high_freq_factor\": %s, "
             "\"original_max_position_embeddings\": 32}",
             factor, low, high);
    refused(*state, TINY_LLAMA, ROPE, to, IFKV_ERR_DATA, code, part);
}

static void llama3_factor_must_be_a_number_from_one(void **state) {
    bad_llama3(state, "0", "1", "4", IFKV_E_CONFIG_FIELD, "/rope_scaling/factor");
    bad_llama3(state, "-8", "1", "4", IFKV_E_CONFIG_FIELD, "/rope_scaling/factor");
    bad_llama3(state, "\"8\"", "1", "4", IFKV_E_CONFIG_FIELD, "/rope_scaling/factor");
    bad_llama3(state, "NaN", "1", "4", IFKV_E_CONFIG_JSON, "factor");
    bad_llama3(state, "0.5", "1", "4", IFKV_E_CONFIG_ROPE, "/rope_scaling/factor");
}

static void llama3_low_must_be_below_high(void **state) {
    bad_llama3(state, "8", "4", "4", IFKV_E_CONFIG_ROPE, "/rope_scaling/low_freq_factor");
    bad_llama3(state, "8", "5", "4", IFKV_E_CONFIG_ROPE, "/rope_scaling/low_freq_factor");
    bad_llama3(state, "8", "0", "4", IFKV_E_CONFIG_FIELD, "/rope_scaling/low_freq_factor");
}

static void llama3_needs_all_its_fields(void **state) {
    refused(*state, TINY_LLAMA, ROPE,
            "\"rope_theta\": 1e4, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, "
            "\"low_freq_factor\": 1, \"high_freq_factor\": 4}",
            IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD, "/rope_scaling/original_max_position_embeddings");
}

static void theta_must_be_above_one(void **state) {
    static const char *const value[] = {"0", "-1", "1", "\"1e4\"", "true", "1e16"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char to[64];
        snprintf(to, sizeof to, "\"rope_theta\": %s", value[i]);
        bad_field(*state, "\"rope_theta\": 10000.0", to, "/rope_theta");
    }
}

static void llama_without_theta_means_10000(void **state) {
    assert_true(accepted(*state, TINY_LLAMA, ROPE, "\"x\": 1").rope_theta == 1e4);
}

static void qwen3_without_theta_is_data(void **state) {
    refused(*state, TINY_QWEN3, ROPE, "\"x\": 1", IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
            "/rope_theta");
}

/* ---- end-of-turn ids (B12) */

static void eos_may_be_a_number_or_a_list(void **state) {
    ifkv_config c = accepted(*state, TINY_LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": 10");
    assert_int_equal(c.n_eos, 1);
    assert_int_equal(c.eos[0], 10);
    c = accepted(*state, TINY_LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": [3, 2, 3]");
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos[0], 3);
    assert_int_equal(c.eos[1], 2);
}

static void eos_may_be_absent(void **state) {
    assert_int_equal(
        accepted(*state, TINY_LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": null").n_eos, 0);
}

static void eos_beyond_the_vocabulary_is_data(void **state) {
    bad_field(*state, "\"eos_token_id\": 2", "\"eos_token_id\": 11",
              "/eos_token_id: not a token id");
    bad_field(*state, "\"eos_token_id\": 2", "\"eos_token_id\": [0, -1]", "/eos_token_id/1");
    bad_field(*state, "\"eos_token_id\": 2", "\"eos_token_id\": \"2\"", "/eos_token_id");
}

static void more_than_sixteen_eos_are_data(void **state) {
    static const char ids[] = "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]";
    char *wide = replaced(TINY_LLAMA, "\"vocab_size\": 11", "\"vocab_size\": 99"), to[128];
    snprintf(to, sizeof to, "\"eos_token_id\": %s", ids);
    refused(*state, wide, "\"eos_token_id\": 2", to, IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
            "/eos_token_id/16");
    free(wide);
}

static void generation_config_adds_its_eos(void **state) {
    write_text(*state, "generation_config.json", "{\"eos_token_id\": [2, 7]}");
    const ifkv_config c =
        accepted(*state, TINY_LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": 3");
    assert_int_equal(c.n_eos, 3);
    assert_int_equal(c.eos[1], 2);
    assert_int_equal(c.eos[2], 7);
}

static void damaged_generation_config_is_data(void **state) {
    ifkv_config config;
    write_text(*state, "generation_config.json", "{\"eos_token_id\": [2, 7}");
    assert_fails(load_text(*state, TINY_LLAMA, &config), IFKV_ERR_DATA, IFKV_E_CONFIG_JSON,
                 "generation_config.json");
}

static void dtype_wins_over_torch_dtype(void **state) {
    const ifkv_config c = accepted(*state, TINY_LLAMA, "{\"model_type\"",
                                   "{\"torch_dtype\": \"float32\", \"dtype\": \"bfloat16\", "
                                   "\"model_type\"");
    assert_string_equal(c.stated_dtype, "bfloat16");
}

static void stated_dtype_beyond_its_room_is_ignored(void **state) {
    ifkv_config c = accepted(*state, TINY_LLAMA, "{\"model_type\"",
                             "{\"dtype\": \"123456789012345\", \"model_type\"");
    assert_string_equal(c.stated_dtype, "123456789012345");
    c = accepted(*state, TINY_LLAMA, "{\"model_type\"",
                 "{\"dtype\": \"1234567890123456\", \"model_type\"");
    assert_string_equal(c.stated_dtype, "");
}

static void families_have_their_names(void **state) {
    (void)state;
    assert_string_equal(ifkv_family_name(IFKV_FAMILY_LLAMA), "llama");
    assert_string_equal(ifkv_family_name(IFKV_FAMILY_QWEN3), "qwen3");
}

static void llama3_factor_of_one_is_accepted(void **state) {
    const ifkv_config c = accepted(*state, TINY_LLAMA, ROPE,
                                   "\"rope_theta\": 1e4, \"rope_scaling\": {\"rope_type\": "
                                   "\"llama3\", \"factor\": 1, \"low_freq_factor\": 1, "
                                   "\"high_freq_factor\": 4, "
                                   "\"original_max_position_embeddings\": 32}");
    assert_true(c.rope_factor == 1);
}

static void head_dim_refusal_says_odd_or_out_of_range(void **state) {
    bad_field(*state, "\"head_dim\": 4", "\"head_dim\": 5", "/head_dim: odd: got 5");
    bad_field(*state, "\"head_dim\": 4", "\"head_dim\": 1026", "/head_dim: out of range: got 1026");
}

static void config_is_untouched_on_error(void **state) {
    ifkv_config config, before;
    memset(&config, 0x5a, sizeof config);
    before = config;
    char *text = replaced(TINY_LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": 11");
    assert_int_equal(load_text(*state, text, &config), IFKV_ERR_DATA);
    assert_memory_equal(&config, &before, sizeof config);
    free(text);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, dir_setup, dir_teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(missing_file_is_no_input),
        TEST(missing_directory_is_no_input),
        TEST(directory_is_data),
        TEST(fifo_is_refused_without_waiting),
        TEST(link_loop_is_no_input),
        TEST(unreadable_file_is_permission),
        TEST(link_to_a_file_is_followed),
        TEST(path_with_newline_is_escaped),
        TEST(path_beyond_the_limit_is_no_input),
        TEST(empty_file_is_data),
        TEST(truncation_at_any_byte_is_data),
        TEST(trailing_garbage_is_data),
        TEST(trailing_nul_is_data),
        TEST(byte_order_mark_is_data),
        TEST(utf16_is_data),
        TEST(duplicate_key_is_data),
        TEST(invalid_utf8_is_data),
        TEST(nul_in_a_key_is_data),
        TEST(git_lfs_pointer_is_named),
        TEST(array_at_the_root_is_data),
        TEST(depth_64_is_accepted),
        TEST(depth_65_is_data),
        TEST(depth_of_100_000_is_data),
        TEST(sixteen_mebibytes_are_accepted),
        TEST(one_byte_more_is_data),
        TEST(ninety_megabytes_of_empty_objects_are_refused),
        TEST(estimate_is_an_upper_bound),
        TEST(budget_counts_to_the_byte),
        TEST(unknown_model_types_are_unsupported),
        TEST(refusal_lists_the_supported_types),
        TEST(absent_model_type_is_unsupported),
        TEST(terminal_escapes_are_quoted),
        TEST(variants_are_unsupported_by_name),
        TEST(null_variants_are_accepted),
        TEST(other_activations_are_unsupported),
        TEST(qwen3_window_that_is_off_is_accepted),
        TEST(qwen3_window_in_use_is_unsupported),
        TEST(full_attention_layers_are_accepted),
        TEST(a_sliding_layer_is_unsupported),
        TEST(layer_types_of_another_length_are_data),
        TEST(each_required_field_is_required),
        TEST(wrong_types_and_ranges_name_the_field),
        TEST(bounds_of_a_field_are_inclusive),
        TEST(numbers_that_json_cannot_hold_name_the_field),
        TEST(eps_must_be_a_small_positive_number),
        TEST(kv_heads_must_divide_heads),
        TEST(kv_heads_default_to_heads),
        TEST(head_dim_must_be_even_and_sane),
        TEST(head_dim_limit_is_1024),
        TEST(absent_head_dim_is_hidden_over_heads),
        TEST(absent_head_dim_needs_a_whole_quotient),
        TEST(explicit_head_dim_may_differ_from_the_quotient),
        TEST(shape_of_llama_is_read),
        TEST(qwen3_has_head_norms),
        TEST(all_spellings_of_plain_rope_agree),
        TEST(all_spellings_of_llama3_rope_agree),
        TEST(disagreeing_theta_is_data_with_both_values),
        TEST(disagreeing_types_are_data),
        TEST(disagreeing_factors_are_data),
        TEST(unknown_rope_types_are_unsupported),
        TEST(rope_per_layer_type_is_unsupported),
        TEST(partial_rotation_in_rope_parameters_is_unsupported),
        TEST(llama3_factor_must_be_a_number_from_one),
        TEST(llama3_low_must_be_below_high),
        TEST(llama3_needs_all_its_fields),
        TEST(theta_must_be_above_one),
        TEST(llama_without_theta_means_10000),
        TEST(qwen3_without_theta_is_data),
        TEST(eos_may_be_a_number_or_a_list),
        TEST(eos_may_be_absent),
        TEST(eos_beyond_the_vocabulary_is_data),
        TEST(more_than_sixteen_eos_are_data),
        TEST(generation_config_adds_its_eos),
        TEST(damaged_generation_config_is_data),
        TEST(dtype_wins_over_torch_dtype),
        TEST(stated_dtype_beyond_its_room_is_ignored),
        TEST(families_have_their_names),
        TEST(llama3_factor_of_one_is_accepted),
        TEST(head_dim_refusal_says_odd_or_out_of_range),
        TEST(config_is_untouched_on_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
