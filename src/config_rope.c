/* Rotary parameters.  See config_rope.h. */
#include "config_rope.h"

#include <stdio.h>
#include <string.h>

#define THETA_MAX 1e15
#define LENGTH_MAX 2147483647

/* What one spelling says. */
typedef struct rope_source {
    const char *name;
    bool is_present, has_theta;
    ifkv_rope_kind kind;
    double theta, factor, low, high;
    int64_t original;
} rope_source;

static ifkv_status rope_fail(const ifkv_field_scope *scope, ifkv_status status, const char *key,
                             const char *what, const char *expected) {
    char shown[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(status, IFKV_E_CONFIG_ROPE, "%s %s/%s: %s: got %s, expected %s", scope->where,
                     scope->pointer, key, what,
                     ifkv_field_show(json_object_get(scope->object, key), shown), expected);
}

/* "type" is the old name of "rope_type"; files of the change-over carry both. */
static ifkv_status parse_kind(const ifkv_field_scope *scope, ifkv_rope_kind *kind) {
    static const char expected[] = "\"default\" or \"llama3\"";
    const json_t *new_name = ifkv_field_get(scope, "rope_type");
    const json_t *old_name = ifkv_field_get(scope, "type");
    const char *key = new_name ? "rope_type" : "type";
    const json_t *field = new_name ? new_name : old_name;
    char shown[IFKV_QUOTE_BYTES];
    /* rope_parameters that hold theta alone mean no scaling; with a factor the type is needed. */
    if (!field && !ifkv_field_get(scope, "factor")) {
        *kind = IFKV_ROPE_PLAIN;
        return IFKV_OK;
    }
    if (!field)
        return rope_fail(scope, IFKV_ERR_DATA, "rope_type", "required field missing", expected);
    if (!json_is_string(field)) return rope_fail(scope, IFKV_ERR_DATA, key, "wrong type", expected);
    if (new_name && old_name && !json_equal(new_name, old_name))
        return rope_fail(scope, IFKV_ERR_DATA, "rope_type", "does not agree with \"type\"",
                         ifkv_field_show(old_name, shown));
    if (strcmp(json_string_value(field), "default") == 0) {
        *kind = IFKV_ROPE_PLAIN;
    } else if (strcmp(json_string_value(field), "llama3") == 0) {
        *kind = IFKV_ROPE_LLAMA3;
    } else {
        return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_CONFIG_ROPE,
                         "%s %s/%s: unknown rope type %s, expected %s", scope->where,
                         scope->pointer, key, ifkv_field_show(field, shown), expected);
    }
    return IFKV_OK;
}

/* transformers 5 nests the parameters per layer type where layers differ. */
static ifkv_status refuse_nested(const ifkv_field_scope *scope) {
    const char *key;
    json_t *value;
    char shown[IFKV_QUOTE_BYTES];
    json_object_foreach(scope->object, key, value) {
        if (!json_is_object(value)) continue;
        return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_CONFIG_ROPE,
                         "%s %s/%s: rotary parameters per layer type: got an object, expected one "
                         "set of numbers for all layers",
                         scope->where, scope->pointer, ifkv_quote(key, strlen(key), shown));
    }
    return IFKV_OK;
}

static ifkv_status parse_llama3(const ifkv_field_scope *scope, rope_source *source) {
    IFKV_TRY(ifkv_field_real(scope, "factor", 0, 1e6, NULL, &source->factor));
    IFKV_TRY(ifkv_field_real(scope, "low_freq_factor", 0, 1e6, NULL, &source->low));
    IFKV_TRY(ifkv_field_real(scope, "high_freq_factor", 0, 1e6, NULL, &source->high));
    IFKV_TRY(ifkv_field_int(scope, "original_max_position_embeddings", 1, LENGTH_MAX, NULL,
                            &source->original));
    if (source->factor < 1)
        return rope_fail(scope, IFKV_ERR_DATA, "factor", "out of range", "a number from 1");
    if (source->low >= source->high)
        return rope_fail(scope, IFKV_ERR_DATA, "low_freq_factor", "not below high_freq_factor",
                         "a number below high_freq_factor");
    return IFKV_OK;
}

static ifkv_status parse_source(const ifkv_field_scope *root, const char *name, const char *pointer,
                                rope_source *source) {
    json_t *object = ifkv_field_get(root, name);
    source->name = name;
    if (!object) return IFKV_OK;
    if (!json_is_object(object))
        return ifkv_field_fail(root, name, "wrong type", "an object or null");
    const ifkv_field_scope scope = {root->where, pointer, object};
    const double whole = 1.0;
    double partial;
    source->is_present = true;
    IFKV_TRY(refuse_nested(&scope));
    IFKV_TRY(parse_kind(&scope, &source->kind));
    IFKV_TRY(ifkv_field_real(&scope, "partial_rotary_factor", 0, 1, &whole, &partial));
    if (partial != whole)
        return ifkv_field_refuse(&scope, "partial_rotary_factor", "1 (whole heads are rotated)");
    source->has_theta = ifkv_field_get(&scope, "rope_theta") != NULL;
    if (source->has_theta)
        IFKV_TRY(ifkv_field_real(&scope, "rope_theta", 1, THETA_MAX, NULL, &source->theta));
    return source->kind == IFKV_ROPE_LLAMA3 ? parse_llama3(&scope, source) : IFKV_OK;
}

static ifkv_status disagree(const char *where, const char *key, const char *name_a, double a,
                            const char *name_b, double b) {
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_ROPE,
                     "%s /%s: rotary parameters disagree: got %s %.17g and %s %.17g, expected one "
                     "value",
                     where, key, name_a, a, name_b, b);
}

static ifkv_status compare_sources(const char *where, const rope_source *a, const rope_source *b) {
    if (a->kind != b->kind)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_ROPE,
                         "%s /rope_type: %s and %s disagree: got \"%s\" and \"%s\", expected one "
                         "value",
                         where, a->name, b->name, a->kind == IFKV_ROPE_PLAIN ? "default" : "llama3",
                         b->kind == IFKV_ROPE_PLAIN ? "default" : "llama3");
    if (a->kind == IFKV_ROPE_PLAIN) return IFKV_OK;
    if (a->factor != b->factor)
        return disagree(where, "factor", a->name, a->factor, b->name, b->factor);
    if (a->low != b->low)
        return disagree(where, "low_freq_factor", a->name, a->low, b->name, b->low);
    if (a->high != b->high)
        return disagree(where, "high_freq_factor", a->name, a->high, b->name, b->high);
    if (a->original != b->original)
        return disagree(where, "original_max_position_embeddings", a->name, (double)a->original,
                        b->name, (double)b->original);
    return IFKV_OK;
}

/* Theta may stand at the root and in either object: all that say it must say the same. */
static ifkv_status reconcile_theta(const ifkv_field_scope *root, const rope_source *in_scaling,
                                   const rope_source *in_parameters, ifkv_config *config) {
    rope_source at_root = {.name = "/rope_theta"};
    rope_source of[3];
    const rope_source *first = NULL;
    at_root.has_theta = ifkv_field_get(root, "rope_theta") != NULL;
    if (at_root.has_theta)
        IFKV_TRY(ifkv_field_real(root, "rope_theta", 1, THETA_MAX, NULL, &at_root.theta));
    of[0] = at_root;
    of[1] = *in_parameters;
    of[2] = *in_scaling;
    for (int i = 0; i < 3; i++) {
        if (!of[i].has_theta) continue;
        if (!first) first = &of[i];
        if (first->theta != of[i].theta)
            return disagree(root->where, "rope_theta", first->name, first->theta, of[i].name,
                            of[i].theta);
    }
    /* Llama 1 and 2 were published without the field and mean this value. */
    if (!first && config->family == IFKV_FAMILY_LLAMA) {
        config->rope_theta = 10000.0;
        return IFKV_OK;
    }
    if (!first)
        return ifkv_field_fail(root, "rope_theta", "required field missing",
                               "a number, here or in rope_parameters");
    config->rope_theta = first->theta;
    return IFKV_OK;
}

ifkv_status ifkv_config_rope(const ifkv_field_scope *root, ifkv_config *config) {
    rope_source scaling = {0}, parameters = {0};
    const rope_source *used;
    IFKV_TRY(parse_source(root, "rope_scaling", "/rope_scaling", &scaling));
    IFKV_TRY(parse_source(root, "rope_parameters", "/rope_parameters", &parameters));
    if (scaling.is_present && parameters.is_present)
        IFKV_TRY(compare_sources(root->where, &scaling, &parameters));
    IFKV_TRY(reconcile_theta(root, &scaling, &parameters, config));
    used = parameters.is_present ? &parameters : &scaling;
    config->rope_kind = used->kind;
    config->rope_factor = used->factor;
    config->rope_low = used->low;
    config->rope_high = used->high;
    config->rope_original = used->original;
    return IFKV_OK;
}
