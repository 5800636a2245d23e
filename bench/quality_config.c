/* Files of a quality run.  See quality_config.h. */
#include "quality_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "json.h"

enum { MAX_FILE_BYTES = 1 << 30, WHERE_BYTES = 4096 };

typedef ifkv_status (*line_fn)(void *arg, const char *where, json_t *object);

/* Call fn on the object of every line; fn borrows it. */
static ifkv_status each_line(const char *path, char *text, line_fn fn, void *arg) {
    static const ifkv_json_limits limits = {.max_bytes = MAX_FILE_BYTES};
    int64_t number = 0;
    for (char *line = text, *next; line && *line; line = next) {
        char where[WHERE_BYTES];
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        snprintf(where, sizeof where, "%s:%lld", path, (long long)++number);
        if (!line[strspn(line, " \t\r")]) continue;
        json_t *object = NULL;
        IFKV_TRY(ifkv_json_parse(where, line, strlen(line), &limits, IFKV_E_VALUE, &object));
        const ifkv_status status =
            json_is_object(object) ? fn(arg, where, object)
                                   : IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_VALUE,
                                               "%s: got no object, expected a JSON object", where);
        json_decref(object);
        IFKV_TRY(status);
    }
    return IFKV_OK;
}

static ifkv_status read_lines(const char *path, line_fn fn, void *arg) {
    char *text = NULL;
    size_t bytes = 0;
    IFKV_TRY(ifkv_file_read(path, MAX_FILE_BYTES, IFKV_E_VALUE, &text, &bytes));
    const ifkv_status status = each_line(path, text, fn, arg);
    free(text);
    return status;
}

static ifkv_status read_choice(const json_t *object, const char *where, const char *key,
                               const char *choices, const char **value_p) {
    const json_t *value = json_object_get(object, key);
    if (!value) return IFKV_OK;
    const char *text = json_string_value(value);
    char shown[IFKV_QUOTE_BYTES], padded[64];
    if (text && choices && strlen(text) < sizeof padded - 2) {
        snprintf(padded, sizeof padded, " %s ", text);
        if (!strstr(choices, padded)) text = NULL;
    }
    IFKV_REQUIRE(text, IFKV_ERR_DATA, IFKV_E_VALUE, "%s/%s: got \"%s\", expected%s", where, key,
                 ifkv_quote(json_is_string(value) ? json_string_value(value) : "no string",
                            json_is_string(value) ? json_string_length(value) : 9, shown),
                 choices ? choices : " a string");
    *value_p = text;
    return IFKV_OK;
}

static ifkv_status read_count(const json_t *object, const char *where, const char *key,
                              int64_t *value_p) {
    const json_t *value = json_object_get(object, key);
    IFKV_REQUIRE(!value || (json_is_integer(value) && json_integer_value(value) >= 0),
                 IFKV_ERR_DATA, IFKV_E_VALUE, "%s/%s: expected an integer from 0", where, key);
    *value_p = value ? json_integer_value(value) : 0;
    return IFKV_OK;
}

static ifkv_status refuse_unknown_keys(json_t *object, const char *where) {
    static const char known[] = " name method ratio score layers rows seed answer source weight "
                                "norm reduce block heads write geometry hp refit reorder epic_k ";
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value) {
        char padded[64], shown[IFKV_QUOTE_BYTES];
        snprintf(padded, sizeof padded, " %s ", key);
        IFKV_REQUIRE(strstr(known, padded), IFKV_ERR_DATA, IFKV_E_VALUE,
                     "%s: got key \"%s\", expected one of%s", where,
                     ifkv_quote(key, strlen(key), shown), known);
    }
    return IFKV_OK;
}

static ifkv_status read_config(quality_config *config, const char *where, json_t *object) {
    int64_t seed = 0;
    IFKV_TRY(refuse_unknown_keys(object, where));
    IFKV_TRY(read_choice(object, where, "name", NULL, &config->name));
    IFKV_TRY(read_choice(object, where, "method", NULL, &config->method));
    IFKV_TRY(read_choice(object, where, "ratio", NULL, &config->ratio));
    IFKV_TRY(read_choice(object, where, "score", " l2 l1 mass l2h ", &config->score));
    IFKV_TRY(read_choice(object, where, "layers", NULL, &config->layers));
    IFKV_TRY(read_choice(object, where, "rows", " question prompt ", &config->rows));
    IFKV_TRY(read_choice(object, where, "source", " encoded full ", &config->source));
    IFKV_TRY(read_choice(object, where, "weight", " none v kv ", &config->weight));
    IFKV_TRY(read_choice(object, where, "norm", " none sum ", &config->norm));
    IFKV_TRY(read_choice(object, where, "reduce", " mean max ", &config->reduce));
    IFKV_TRY(read_choice(object, where, "write", " recompute full ", &config->write));
    IFKV_TRY(
        read_choice(object, where, "geometry", " global hl-tp hl-hp tl-tp ", &config->geometry));
    IFKV_TRY(read_choice(object, where, "hp", " shared per_chunk ", &config->hp));
    IFKV_TRY(read_count(object, where, "seed", &seed));
    IFKV_TRY(read_count(object, where, "heads", &config->heads));
    IFKV_TRY(read_count(object, where, "block", &config->block));
    IFKV_TRY(read_count(object, where, "epic_k", &config->epic_k));
    config->seed = (uint64_t)seed;
    config->has_refit = json_is_true(json_object_get(object, "refit"));
    config->has_reorder = json_is_true(json_object_get(object, "reorder"));
    config->has_answer = json_is_true(json_object_get(object, "answer"));
    IFKV_REQUIRE(config->name, IFKV_ERR_DATA, IFKV_E_VALUE, "%s/name: got nothing", where);
    return IFKV_OK;
}

static ifkv_status add_config(void *arg, const char *where, json_t *object) {
    quality_config_list *list = arg;
    quality_config *grown = realloc(list->item, ((size_t)list->n + 1) * sizeof *grown);
    IFKV_REQUIRE(grown, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of host memory", where);
    list->item = grown;
    quality_config *config = &list->item[list->n];
    *config = (quality_config){.json = json_incref(object)};
    config->text = json_dumps(object, JSON_COMPACT | JSON_SORT_KEYS);
    list->n++; /* from here on the list releases it */
    IFKV_REQUIRE(config->text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of host memory", where);
    IFKV_TRY(read_config(config, where, object));
    for (int64_t i = 0; i + 1 < list->n; i++)
        IFKV_REQUIRE(strcmp(list->item[i].name, config->name), IFKV_ERR_DATA, IFKV_E_VALUE,
                     "%s/name: got a name that is used before, expected another", where);
    return IFKV_OK;
}

ifkv_status quality_configs_read(const char *path, quality_config_list *list) {
    *list = (quality_config_list){0};
    const ifkv_status status = read_lines(path, add_config, list);
    if (status != IFKV_OK) quality_configs_free(list);
    return status;
}

void quality_configs_free(quality_config_list *list) {
    for (int64_t i = 0; i < list->n; i++) {
        free(list->item[i].text);
        json_decref(list->item[i].json);
    }
    free(list->item);
    *list = (quality_config_list){0};
}

static ifkv_status add_gold(void *arg, const char *where, json_t *object) {
    json_t *all = arg, *gold = json_object_get(object, "gold"), *token;
    const char *id = json_string_value(json_object_get(object, "id"));
    size_t i;
    IFKV_REQUIRE(id && json_array_size(gold) > 0, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s: expected \"id\" and a list \"gold\" of token ids", where);
    json_array_foreach(gold, i, token)
        IFKV_REQUIRE(json_is_integer(token), IFKV_ERR_DATA, IFKV_E_VALUE,
                     "%s/gold/%zu: expected a token id", where, i);
    IFKV_REQUIRE(!json_object_set(all, id, gold), IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "%s: out of host memory", where);
    return IFKV_OK;
}

static ifkv_status read_into_object(const char *path, line_fn fn, json_t **all_p) {
    json_t *all = json_object();
    IFKV_REQUIRE(all, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of host memory", path);
    const ifkv_status status = read_lines(path, fn, all);
    if (status == IFKV_OK)
        *all_p = all;
    else
        json_decref(all);
    return status;
}

ifkv_status quality_gold_read(const char *path, json_t **gold_p) {
    return read_into_object(path, add_gold, gold_p);
}

/* "id config": the compact JSON of a configuration starts with a brace and ids end before it. */
static char *pair_key(const char *id, const char *config) {
    char *key = malloc(strlen(id) + strlen(config) + 2);
    if (key) sprintf(key, "%s %s", id, config);
    return key;
}

static ifkv_status add_done(void *arg, const char *where, json_t *object) {
    json_t *done = arg;
    const char *id = json_string_value(json_object_get(object, "id"));
    char *config = json_dumps(json_object_get(object, "config"), JSON_COMPACT | JSON_SORT_KEYS);
    char *key = id && config ? pair_key(id, config) : NULL;
    const bool is_added = key && !json_object_set_new(done, key, json_true());
    free(key);
    free(config);
    IFKV_REQUIRE(is_added, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s: got no \"id\" and \"config\", expected a line of this program", where);
    return IFKV_OK;
}

static ifkv_status cut_last_line(const char *path) {
    char *text = NULL;
    size_t bytes = 0;
    IFKV_TRY(ifkv_file_read(path, MAX_FILE_BYTES, IFKV_E_VALUE, &text, &bytes));
    size_t end = bytes;
    while (end > 0 && text[end - 1] != '\n') end--;
    free(text);
    IFKV_REQUIRE(end == bytes || !truncate(path, (off_t)end), IFKV_ERR_IO, IFKV_E_VALUE,
                 "%s: cannot cut the unfinished last line: %s", path, strerror(errno));
    return IFKV_OK;
}

ifkv_status quality_done_read(const char *path, json_t **done_p) {
    if (access(path, F_OK)) {
        *done_p = json_object();
        IFKV_REQUIRE(*done_p, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of host memory", path);
        return IFKV_OK;
    }
    IFKV_TRY(cut_last_line(path));
    return read_into_object(path, add_done, done_p);
}

bool quality_done_has(const json_t *done, const char *id, const quality_config *config) {
    char *key = pair_key(id, config->text);
    const bool has = key && json_object_get(done, key);
    free(key);
    return has;
}
