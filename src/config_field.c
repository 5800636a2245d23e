/* Members of a configuration object.  See config_field.h. */
#include "config_field.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const char *ifkv_field_show(const json_t *value, char *buffer) {
    char quoted[IFKV_QUOTE_BYTES];
    if (!value) return "nothing";
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING:
        ifkv_quote(json_string_value(value), json_string_length(value), quoted);
        snprintf(buffer, IFKV_QUOTE_BYTES, "\"%.500s\"", quoted);
        return buffer;
    case JSON_INTEGER:
        snprintf(buffer, IFKV_QUOTE_BYTES, "%lld", (long long)json_integer_value(value));
        return buffer;
    case JSON_REAL:
        snprintf(buffer, IFKV_QUOTE_BYTES, "%.17g (with a fraction or exponent)",
                 json_real_value(value));
        return buffer;
    case JSON_TRUE: return "true";
    case JSON_FALSE: return "false";
    case JSON_NULL: return "null";
    }
    return "something";
}

ifkv_status ifkv_field_fail(const ifkv_field_scope *scope, const char *key, const char *what,
                            const char *expected) {
    char shown[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD, "%s %s/%s: %s: got %s, expected %s",
                     scope->where, scope->pointer, key, what,
                     ifkv_field_show(json_object_get(scope->object, key), shown), expected);
}

ifkv_status ifkv_field_refuse(const ifkv_field_scope *scope, const char *key,
                              const char *expected) {
    char shown[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_CONFIG_MODEL,
                     "%s %s/%s: not supported: got %s, expected %s", scope->where, scope->pointer,
                     key, ifkv_field_show(json_object_get(scope->object, key), shown), expected);
}

json_t *ifkv_field_get(const ifkv_field_scope *scope, const char *key) {
    json_t *value = json_object_get(scope->object, key);
    return json_is_null(value) ? NULL : value;
}

ifkv_status ifkv_field_int(const ifkv_field_scope *scope, const char *key, int64_t low,
                           int64_t high, const int64_t *missing, int64_t *value) {
    char expected[80];
    const json_t *field = ifkv_field_get(scope, key);
    if (!field && missing) {
        *value = *missing;
        return IFKV_OK;
    }
    snprintf(expected, sizeof expected, "an integer in [%lld, %lld]", (long long)low,
             (long long)high);
    if (!json_object_get(scope->object, key))
        return ifkv_field_fail(scope, key, "required field missing", expected);
    if (!json_is_integer(field)) return ifkv_field_fail(scope, key, "wrong type", expected);
    const int64_t got = (int64_t)json_integer_value(field);
    if (got < low || got > high) return ifkv_field_fail(scope, key, "out of range", expected);
    *value = got;
    return IFKV_OK;
}

ifkv_status ifkv_field_real(const ifkv_field_scope *scope, const char *key, double low, double high,
                            const double *missing, double *value) {
    char expected[80];
    const json_t *field = ifkv_field_get(scope, key);
    if (!field && missing) {
        *value = *missing;
        return IFKV_OK;
    }
    snprintf(expected, sizeof expected, "a number above %g, at most %g", low, high);
    if (!json_object_get(scope->object, key))
        return ifkv_field_fail(scope, key, "required field missing", expected);
    if (!json_is_number(field)) return ifkv_field_fail(scope, key, "wrong type", expected);
    const double got = json_number_value(field);
    if (!isfinite(got) || !(got > low) || got > high)
        return ifkv_field_fail(scope, key, "out of range", expected);
    *value = got;
    return IFKV_OK;
}

ifkv_status ifkv_field_bool(const ifkv_field_scope *scope, const char *key, bool missing,
                            bool *value) {
    const json_t *field = ifkv_field_get(scope, key);
    if (!field) {
        *value = missing;
        return IFKV_OK;
    }
    if (!json_is_boolean(field)) return ifkv_field_fail(scope, key, "wrong type", "true or false");
    *value = json_is_true(field);
    return IFKV_OK;
}
