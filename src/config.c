/* config.json of the families that are implemented.  See config.h. */
#include "config.h"

#include "config_field.h"
#include "config_rope.h"
#include "digest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_BYTES_MAX ((uint64_t)16 << 20)
#define INT32_LIMIT 2147483647
#define WIDTH_MAX (1 << 24) /* of hidden and intermediate; products of two fit int64 easily */
#define HEAD_MAX 65536
#define D_HEAD_MAX 1024

static const char SUPPORTED[] = "\"llama\" or \"qwen3\"";

const char *ifkv_family_name(ifkv_family family) {
    return family == IFKV_FAMILY_QWEN3 ? "qwen3" : "llama";
}

static ifkv_status parse_family(const ifkv_field_scope *root, ifkv_config *config) {
    const json_t *type = ifkv_field_get(root, "model_type");
    const char *name = json_string_value(type);
    if (!name) return ifkv_field_refuse(root, "model_type", SUPPORTED);
    if (strlen(name) != json_string_length(type))
        return ifkv_field_refuse(root, "model_type", SUPPORTED);
    if (strcmp(name, "llama") == 0) {
        config->family = IFKV_FAMILY_LLAMA;
    } else if (strcmp(name, "qwen3") == 0) {
        config->family = IFKV_FAMILY_QWEN3;
        config->has_head_norm = true;
    } else {
        return ifkv_field_refuse(root, "model_type", SUPPORTED);
    }
    return IFKV_OK;
}

/* Members that turn a llama or qwen3 into something else, whatever model_type says. */
static ifkv_status refuse_variants(const ifkv_field_scope *root) {
    static const char *const absent[] = {"quantization_config",
                                         "compression_config",
                                         "text_config",
                                         "vision_config",
                                         "kv_lora_rank",
                                         "q_lora_rank",
                                         "num_experts",
                                         "num_local_experts",
                                         "n_routed_experts",
                                         "moe_intermediate_size",
                                         "num_experts_per_tok",
                                         "attn_logit_softcapping",
                                         "final_logit_softcapping"};
    static const char *const false_only[] = {"attention_bias", "mlp_bias", "use_sliding_window",
                                             "rope_interleaved", "add_cross_attention"};
    const double whole = 1.0;
    double partial;
    const json_t *act;
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        if (ifkv_field_get(root, absent[i]))
            return ifkv_field_refuse(root, absent[i], "the field absent or null");
    for (size_t i = 0; i < sizeof false_only / sizeof false_only[0]; i++) {
        bool is_on;
        IFKV_TRY(ifkv_field_bool(root, false_only[i], false, &is_on));
        if (is_on) return ifkv_field_refuse(root, false_only[i], "false");
    }
    act = ifkv_field_get(root, "hidden_act");
    if (act && !json_is_string(act))
        return ifkv_field_fail(root, "hidden_act", "wrong type", "\"silu\"");
    if (act && strcmp(json_string_value(act), "silu") != 0)
        return ifkv_field_refuse(root, "hidden_act", "\"silu\"");
    IFKV_TRY(ifkv_field_real(root, "partial_rotary_factor", 0, 1, &whole, &partial));
    if (partial != whole)
        return ifkv_field_refuse(root, "partial_rotary_factor", "1 (whole heads are rotated)");
    return IFKV_OK;
}

/* A window is in use if sliding_window is a number and nothing says that it is switched off. Qwen3
 * carries one as a matter of course, off unless use_sliding_window is true. */
static ifkv_status refuse_window(const ifkv_field_scope *root, const ifkv_config *config) {
    const json_t *types = ifkv_field_get(root, "layer_types");
    const bool is_switched = json_object_get(root->object, "use_sliding_window") != NULL;
    char pointer[64];
    size_t i;
    json_t *type;
    if (ifkv_field_get(root, "sliding_window") && !is_switched &&
        config->family != IFKV_FAMILY_QWEN3)
        return ifkv_field_refuse(root, "sliding_window", "null");
    if (!types) return IFKV_OK;
    if (!json_is_array(types))
        return ifkv_field_fail(root, "layer_types", "wrong type", "an array of strings");
    if (json_array_size(types) != (size_t)config->n_layer)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                         "%s %s/layer_types: length differs from num_hidden_layers: got %zu, "
                         "expected %d",
                         root->where, root->pointer, json_array_size(types), config->n_layer);
    json_array_foreach(types, i, type) {
        char shown[IFKV_QUOTE_BYTES];
        const char *name = json_string_value(type);
        if (name && strcmp(name, "full_attention") == 0) continue;
        snprintf(pointer, sizeof pointer, "/layer_types/%zu", i);
        return IFKV_FAIL(name ? IFKV_ERR_UNSUPPORTED : IFKV_ERR_DATA,
                         name ? IFKV_E_CONFIG_MODEL : IFKV_E_CONFIG_FIELD,
                         "%s %s%s: not supported: got %s, expected \"full_attention\"", root->where,
                         root->pointer, pointer, ifkv_field_show(type, shown));
    }
    return IFKV_OK;
}

static ifkv_status parse_int(const ifkv_field_scope *root, const char *key, int64_t high,
                             const int64_t *missing, int *value) {
    int64_t got;
    IFKV_TRY(ifkv_field_int(root, key, 1, high, missing, &got));
    *value = (int)got;
    return IFKV_OK;
}

static ifkv_status parse_heads(const ifkv_field_scope *root, ifkv_config *config) {
    int64_t missing;
    IFKV_TRY(parse_int(root, "num_attention_heads", HEAD_MAX, NULL, &config->n_head));
    missing = config->n_head;
    IFKV_TRY(parse_int(root, "num_key_value_heads", HEAD_MAX, &missing, &config->n_kv_head));
    if (config->n_head % config->n_kv_head != 0)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                         "%s %s/num_key_value_heads: does not divide num_attention_heads: got %d, "
                         "expected a divisor of %d",
                         root->where, root->pointer, config->n_kv_head, config->n_head);
    if (!ifkv_field_get(root, "head_dim") && config->d_model % config->n_head != 0)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                         "%s %s/hidden_size: not a multiple of num_attention_heads, and head_dim "
                         "is absent: got %d, expected a multiple of %d",
                         root->where, root->pointer, config->d_model, config->n_head);
    missing = config->d_model / config->n_head;
    IFKV_TRY(parse_int(root, "head_dim", INT32_LIMIT, &missing, &config->d_head));
    if (config->d_head % 2 != 0 || config->d_head > D_HEAD_MAX)
        return IFKV_FAIL(
            IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
            "%s %s/head_dim: %s: got %d (from %s), expected an even number in [2, %d]", root->where,
            root->pointer, config->d_head % 2 != 0 ? "odd" : "out of range", config->d_head,
            ifkv_field_get(root, "head_dim") ? "the field" : "hidden_size / num_attention_heads",
            D_HEAD_MAX);
    return IFKV_OK;
}

static ifkv_status parse_shape(const ifkv_field_scope *root, ifkv_config *config) {
    IFKV_TRY(parse_int(root, "num_hidden_layers", INT32_LIMIT, NULL, &config->n_layer));
    IFKV_TRY(parse_int(root, "hidden_size", WIDTH_MAX, NULL, &config->d_model));
    IFKV_TRY(parse_int(root, "intermediate_size", WIDTH_MAX, NULL, &config->d_ff));
    IFKV_TRY(parse_heads(root, config));
    IFKV_TRY(ifkv_field_int(root, "vocab_size", 1, INT32_LIMIT, NULL, &config->n_vocab));
    IFKV_TRY(ifkv_field_int(root, "max_position_embeddings", 1, INT32_LIMIT, NULL,
                            &config->max_position));
    IFKV_TRY(ifkv_field_real(root, "rms_norm_eps", 0, 1, NULL, &config->norm_eps));
    return ifkv_field_bool(root, "tie_word_embeddings", false, &config->is_tied);
}

static ifkv_status add_eos(const ifkv_field_scope *root, const char *pointer, const json_t *id,
                           ifkv_config *config) {
    char shown[IFKV_QUOTE_BYTES];
    if (!json_is_integer(id) || json_integer_value(id) < 0 ||
        json_integer_value(id) >= config->n_vocab)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                         "%s %s%s: not a token id: got %s, expected an integer in [0, %lld)",
                         root->where, root->pointer, pointer, ifkv_field_show(id, shown),
                         (long long)config->n_vocab);
    const int32_t token = (int32_t)json_integer_value(id);
    for (int i = 0; i < config->n_eos; i++)
        if (config->eos[i] == token) return IFKV_OK;
    IFKV_REQUIRE(config->n_eos < IFKV_MAX_EOS, IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                 "%s %s%s: too many end-of-turn ids: got more than %d, expected at most %d",
                 root->where, root->pointer, pointer, IFKV_MAX_EOS, IFKV_MAX_EOS);
    config->eos[config->n_eos++] = token;
    return IFKV_OK;
}

static ifkv_status parse_eos(const ifkv_field_scope *root, ifkv_config *config) {
    json_t *field = ifkv_field_get(root, "eos_token_id");
    char pointer[64];
    size_t i;
    json_t *id;
    if (!field) return IFKV_OK;
    if (!json_is_array(field)) return add_eos(root, "/eos_token_id", field, config);
    json_array_foreach(field, i, id) {
        snprintf(pointer, sizeof pointer, "/eos_token_id/%zu", i);
        IFKV_TRY(add_eos(root, pointer, id, config));
    }
    return IFKV_OK;
}

static void parse_stated_dtype(const ifkv_field_scope *root, ifkv_config *config) {
    const char *name = json_string_value(ifkv_field_get(root, "dtype"));
    if (!name) name = json_string_value(ifkv_field_get(root, "torch_dtype"));
    if (name && strlen(name) < sizeof config->stated_dtype)
        memcpy(config->stated_dtype, name, strlen(name) + 1);
}

static ifkv_status parse_root(const ifkv_field_scope *root, ifkv_config *config) {
    IFKV_TRY(parse_family(root, config));
    IFKV_TRY(refuse_variants(root));
    IFKV_TRY(parse_shape(root, config));
    IFKV_TRY(refuse_window(root, config));
    IFKV_TRY(ifkv_config_rope(root, config));
    IFKV_TRY(parse_eos(root, config));
    parse_stated_dtype(root, config);
    return IFKV_OK;
}

typedef ifkv_status (*parse_fn)(const ifkv_field_scope *root, ifkv_config *config);

/* Read one file whose root is an object and hand it to `parse`. */
static ifkv_status load_object(const char *path, parse_fn parse, ifkv_config *config,
                               uint64_t *digest) {
    const ifkv_json_limits limits = {.max_bytes = FILE_BYTES_MAX};
    char where[IFKV_QUOTE_BYTES];
    ifkv_status status;
    ifkv_field_scope root = {ifkv_path_quote(path, where), "", NULL};
    char *text;
    size_t bytes;
    IFKV_TRY(ifkv_file_read(path, FILE_BYTES_MAX, IFKV_E_CONFIG_FILE, &text, &bytes));
    *digest = ifkv_digest_bytes(text, bytes);
    IFKV_TRY_GOTO(status,
                  ifkv_json_parse(where, text, bytes, &limits, IFKV_E_CONFIG_JSON, &root.object),
                  free_text);
    if (!json_is_object(root.object)) {
        status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_JSON,
                           "%s: wrong type at the root: got an array, expected an object", where);
        goto free_root;
    }
    status = parse(&root, config);
free_root:
    json_decref(root.object);
free_text:
    free(text);
    return status;
}

/* generation_config.json may be absent; everything else about it that is wrong is an error. */
static ifkv_status load_generation(const char *path, ifkv_config *config) {
    uint64_t digest;
    const ifkv_status status = load_object(path, parse_eos, config, &digest);
    return status == IFKV_ERR_NO_INPUT ? IFKV_OK : status;
}

ifkv_status ifkv_config_load(const char *model_dir, ifkv_config *config) {
    ifkv_config loaded = {0};
    ifkv_status status = IFKV_OK;
    char *path = ifkv_path_join(model_dir, "config.json");
    char *generation = ifkv_path_join(model_dir, "generation_config.json");
    if (!path || !generation) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "config: out of memory");
        goto free_paths;
    }
    IFKV_TRY_GOTO(status, load_object(path, parse_root, &loaded, &loaded.digest), free_paths);
    IFKV_TRY_GOTO(status, load_generation(generation, &loaded), free_paths);
    *config = loaded;
free_paths:
    free(generation);
    free(path);
    return status;
}
