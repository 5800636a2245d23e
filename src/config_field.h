/* Typed, range-checked members of a JSON object, with messages that name file, pointer, value and
 * expectation.
 *
 * Owns the wording of "got <value>, expected <range>"; knows nothing of what the members mean.
 * Private to config.c and config_rope.c. */
#ifndef IFKV_SRC_CONFIG_FIELD_H
#define IFKV_SRC_CONFIG_FIELD_H

#include "json.h"

/* One JSON object of a file. */
typedef struct ifkv_field_scope {
    const char *where;   /* borrowed: the file, quoted */
    const char *pointer; /* borrowed: "" or "/rope_scaling" */
    json_t *object;      /* borrowed */
} ifkv_field_scope;

/* Show a JSON value in a message: a scalar as it is, the rest by kind.  buffer holds
 * IFKV_QUOTE_BYTES. */
const char *ifkv_field_show(const json_t *value, char *buffer);

/* Report DATA: "<where> <pointer>/<key>: <what>: got <value>, expected <expected>". */
ifkv_status ifkv_field_fail(const ifkv_field_scope *scope, const char *key, const char *what,
                            const char *expected);
/* Report UNSUPPORTED in the same form. */
ifkv_status ifkv_field_refuse(const ifkv_field_scope *scope, const char *key, const char *expected);

/* A member; NULL where it is absent or null. */
json_t *ifkv_field_get(const ifkv_field_scope *scope, const char *key);

/* Read an integer in [low, high].  With `missing` NULL an absent or null member is an error; else
 * absent and null alike give *missing. */
ifkv_status ifkv_field_int(const ifkv_field_scope *scope, const char *key, int64_t low,
                           int64_t high, const int64_t *missing, int64_t *value);
/* Read a number > low and <= high; whole numbers may be written without a point. */
ifkv_status ifkv_field_real(const ifkv_field_scope *scope, const char *key, double low, double high,
                            const double *missing, double *value);
/* Read true or false; absent and null give `missing`. */
ifkv_status ifkv_field_bool(const ifkv_field_scope *scope, const char *key, bool missing,
                            bool *value);

#endif
