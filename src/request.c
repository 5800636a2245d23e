/* The parser of JSONL requests.  See request.h.
 *
 * One line is parsed, checked and copied into flat arrays before the next one is looked at.  The
 * token sum needs no check of its own: a line of 256 MiB holds fewer than 2^27 ids. */
#include "request.h"

#include "digest.h"
#include "file.h"
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DATA IFKV_ERR_DATA

/* What every check of one line needs to say where it is. */
typedef struct parse_line {
    const char *where; /* borrowed */
    int64_t n_vocab;
} parse_line;

enum {
    KEY_ID,
    KEY_PREFIX,
    KEY_CHUNKS,
    KEY_CONTEXT,
    KEY_PROMPT,
    KEY_QUESTION,
    KEY_ANSWERS,
    KEY_MAX_NEW,
    KEY_META,
    N_KEY
};
static const char *const key_names[N_KEY] = {"id",       "prefix",  "chunks",  "context", "prompt",
                                             "question", "answers", "max_new", "meta"};

static ifkv_status no_memory(const char *where) {
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory for the requests",
                     where);
}

static const char *json_kind(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "a list";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a number with a fraction or exponent";
    case JSON_NULL: return "null";
    default: return "true or false";
    }
}

/* Sort the object's values by key: field[N_KEY], NULL where absent. */
static ifkv_status split_fields(const parse_line *line, json_t *root, json_t **field) {
    const char *key;
    json_t *value;
    char quoted[IFKV_QUOTE_BYTES];
    json_object_foreach(root, key, value) {
        int k = 0;
        while (k < N_KEY && strcmp(key, key_names[k]) != 0) k++;
        IFKV_REQUIRE(k < N_KEY, DATA, IFKV_E_REQUEST_FIELD, "%s /%s: unknown field", line->where,
                     ifkv_quote(key, strlen(key), quoted));
        field[k] = value;
    }
    for (int k = 0; k < N_KEY; k++)
        IFKV_REQUIRE(field[k] || (k != KEY_ID && k != KEY_PROMPT), DATA, IFKV_E_REQUEST_FIELD,
                     "%s /%s: field missing", line->where, key_names[k]);
    IFKV_REQUIRE(field[KEY_CHUNKS] || field[KEY_CONTEXT], DATA, IFKV_E_REQUEST_FIELD,
                 "%s /chunks: field missing: expected chunks or context", line->where);
    IFKV_REQUIRE(!field[KEY_CHUNKS] || !field[KEY_CONTEXT], DATA, IFKV_E_REQUEST_FIELD,
                 "%s /context: both chunks and context given", line->where);
    return IFKV_OK;
}

/* Require a list of at least n_min entries; *n_p is its length. */
static ifkv_status check_list(const parse_line *line, const char *pointer, const json_t *list,
                              int64_t n_min, const char *what, int64_t *n_p) {
    IFKV_REQUIRE(json_is_array(list), DATA, IFKV_E_REQUEST_FIELD,
                 "%s %s: wrong type: got %s, expected a list of %s", line->where, pointer,
                 json_kind(list), what);
    *n_p = (int64_t)json_array_size(list);
    IFKV_REQUIRE(*n_p >= n_min, DATA, IFKV_E_REQUEST_LENGTH,
                 "%s %s: too short: got 0 %s, expected at least 1", line->where, pointer, what);
    return IFKV_OK;
}

/* Copy a checked list of token ids. */
static ifkv_status take_tokens(const parse_line *line, const char *pointer, const json_t *list,
                               int32_t *out) {
    const int64_t last = (line->n_vocab > 0 ? line->n_vocab : (int64_t)INT32_MAX + 1) - 1;
    size_t i;
    json_t *value;
    json_array_foreach(list, i, value) {
        IFKV_REQUIRE(json_is_integer(value), DATA, IFKV_E_REQUEST_TOKEN,
                     "%s %s/%zu: token id of the wrong type: got %s, expected an integer 0..%lld",
                     line->where, pointer, i, json_kind(value), (long long)last);
        const json_int_t id = json_integer_value(value);
        IFKV_REQUIRE(id >= 0 && id <= last, DATA, IFKV_E_REQUEST_TOKEN,
                     "%s %s/%zu: token id out of range: got %lld, expected 0..%lld", line->where,
                     pointer, i, (long long)id, (long long)last);
        out[i] = (int32_t)id;
    }
    return IFKV_OK;
}

static ifkv_status take_id(const parse_line *line, const json_t *value, char **id_p) {
    IFKV_REQUIRE(json_is_string(value), DATA, IFKV_E_REQUEST_FIELD,
                 "%s /id: wrong type: got %s, expected a string", line->where, json_kind(value));
    const size_t n = json_string_length(value);
    IFKV_REQUIRE(n >= 1 && n <= IFKV_REQUEST_ID_BYTES, DATA, IFKV_E_REQUEST_LENGTH,
                 "%s /id: bad length: got %zu bytes, expected 1..%d", line->where, n,
                 IFKV_REQUEST_ID_BYTES);
    *id_p = strdup(json_string_value(value));
    return *id_p ? IFKV_OK : no_memory(line->where);
}

/* answers, max_new and meta: carried along, not computed with. */
static ifkv_status take_extras(const parse_line *line, json_t *const *field,
                               ifkv_request_item *item) {
    const json_t *answers = field[KEY_ANSWERS], *max_new = field[KEY_MAX_NEW];
    const size_t dump = JSON_COMPACT | JSON_REAL_PRECISION(17);
    item->max_new = -1;
    if (answers) {
        int64_t n;
        size_t i;
        json_t *value;
        IFKV_TRY(check_list(line, "/answers", answers, 0, "strings", &n));
        json_array_foreach(answers, i, value)
            IFKV_REQUIRE(json_is_string(value), DATA, IFKV_E_REQUEST_FIELD,
                         "%s /answers/%zu: wrong type: got %s, expected a string", line->where, i,
                         json_kind(value));
        item->answers_json = json_dumps(answers, dump);
        if (!item->answers_json) return no_memory(line->where);
    }
    if (max_new) {
        IFKV_REQUIRE(json_is_integer(max_new), DATA, IFKV_E_REQUEST_FIELD,
                     "%s /max_new: wrong type: got %s, expected an integer 0..%d", line->where,
                     json_kind(max_new), INT32_MAX);
        item->max_new = json_integer_value(max_new);
        IFKV_REQUIRE(item->max_new >= 0 && item->max_new <= INT32_MAX, DATA, IFKV_E_REQUEST_FIELD,
                     "%s /max_new: out of range: got %lld, expected 0..%d", line->where,
                     (long long)item->max_new, INT32_MAX);
    }
    if (field[KEY_META]) {
        IFKV_REQUIRE(json_is_object(field[KEY_META]), DATA, IFKV_E_REQUEST_FIELD,
                     "%s /meta: wrong type: got %s, expected an object", line->where,
                     json_kind(field[KEY_META]));
        item->meta_json = json_dumps(field[KEY_META], dump);
        if (!item->meta_json) return no_memory(line->where);
    }
    return IFKV_OK;
}

/* The chunk table: lengths to offsets, before any token is copied. */
static ifkv_status plan_chunks(const parse_line *line, const json_t *chunks,
                               ifkv_request_item *item) {
    int64_t n_chunk;
    IFKV_TRY(check_list(line, "/chunks", chunks, 1, "chunks", &n_chunk));
    IFKV_REQUIRE(n_chunk <= IFKV_REQUEST_CHUNKS, DATA, IFKV_E_REQUEST_LENGTH,
                 "%s /chunks: too many: got %lld chunks, expected at most %d", line->where,
                 (long long)n_chunk, IFKV_REQUEST_CHUNKS);
    item->offsets = calloc((size_t)n_chunk + 1, sizeof *item->offsets);
    if (!item->offsets) return no_memory(line->where);
    item->request.n_chunk = n_chunk;
    for (int64_t i = 0; i < n_chunk; i++) {
        char pointer[40];
        int64_t n;
        snprintf(pointer, sizeof pointer, "/chunks/%lld", (long long)i);
        IFKV_TRY(check_list(line, pointer, json_array_get(chunks, (size_t)i), 1, "tokens", &n));
        item->offsets[i + 1] = item->offsets[i] + n;
    }
    return IFKV_OK;
}

static ifkv_status plan_context(const parse_line *line, const json_t *context,
                                ifkv_request_item *item) {
    int64_t n;
    IFKV_TRY(check_list(line, "/context", context, 1, "tokens", &n));
    item->offsets = calloc(2, sizeof *item->offsets);
    if (!item->offsets) return no_memory(line->where);
    item->offsets[1] = n;
    item->request.n_chunk = 1;
    item->is_context = true;
    return IFKV_OK;
}

/* Copy all token lists into one array and point the request at it. */
static ifkv_status take_sequence(const parse_line *line, json_t *const *field,
                                 ifkv_request_item *item) {
    ifkv_request *r = &item->request;
    if (field[KEY_PREFIX])
        IFKV_TRY(check_list(line, "/prefix", field[KEY_PREFIX], 0, "tokens", &r->n_prefix));
    IFKV_TRY(check_list(line, "/prompt", field[KEY_PROMPT], 1, "tokens", &r->n_prompt));
    if (field[KEY_QUESTION])
        IFKV_TRY(check_list(line, "/question", field[KEY_QUESTION], 1, "tokens", &r->n_question));
    IFKV_TRY(field[KEY_CHUNKS] ? plan_chunks(line, field[KEY_CHUNKS], item)
                               : plan_context(line, field[KEY_CONTEXT], item));

    const int64_t n_context = item->offsets[r->n_chunk];
    int32_t *tokens =
        malloc((size_t)(r->n_prefix + n_context + r->n_prompt + r->n_question) * sizeof *tokens);
    if (!tokens) return no_memory(line->where);
    item->tokens = tokens;
    int32_t *context = tokens + r->n_prefix, *prompt = context + n_context;
    r->size = sizeof *r;
    r->prefix = tokens;
    r->chunk_tokens = context;
    r->chunk_offsets = item->offsets;
    r->prompt = prompt;
    r->question = field[KEY_QUESTION] ? prompt + r->n_prompt : NULL;

    if (field[KEY_PREFIX]) IFKV_TRY(take_tokens(line, "/prefix", field[KEY_PREFIX], tokens));
    if (item->is_context) IFKV_TRY(take_tokens(line, "/context", field[KEY_CONTEXT], context));
    for (int64_t i = 0; i < r->n_chunk && !item->is_context; i++) {
        char pointer[40];
        snprintf(pointer, sizeof pointer, "/chunks/%lld", (long long)i);
        IFKV_TRY(take_tokens(line, pointer, json_array_get(field[KEY_CHUNKS], (size_t)i),
                             context + item->offsets[i]));
    }
    IFKV_TRY(take_tokens(line, "/prompt", field[KEY_PROMPT], prompt));
    if (field[KEY_QUESTION])
        IFKV_TRY(take_tokens(line, "/question", field[KEY_QUESTION], prompt + r->n_prompt));
    return IFKV_OK;
}

/* Digests of the parts, then one over them with the counts between: no two requests that differ
 * have the same bytes under it. */
static uint64_t digest_item(const ifkv_request_item *item) {
    const ifkv_request *r = &item->request;
    const int64_t n_context = item->offsets[r->n_chunk];
    const int64_t n_token = r->n_prefix + n_context + r->n_prompt + r->n_question;
    const char *answers = item->answers_json ? item->answers_json : "";
    const char *meta = item->meta_json ? item->meta_json : "";
    const uint64_t part[] = {
        ifkv_digest_bytes(item->id, strlen(item->id)),
        ifkv_digest_bytes(item->tokens, (size_t)n_token * sizeof *item->tokens),
        ifkv_digest_bytes(item->offsets, (size_t)(r->n_chunk + 1) * sizeof *item->offsets),
        (uint64_t)r->n_prefix,
        (uint64_t)r->n_prompt,
        (uint64_t)r->n_question,
        (uint64_t)item->max_new,
        (uint64_t)item->is_context,
        ifkv_digest_bytes(answers, strlen(answers)),
        ifkv_digest_bytes(meta, strlen(meta)),
    };
    return ifkv_digest_bytes(part, sizeof part);
}

static void item_fini(ifkv_request_item *item) {
    free(item->id);
    free(item->answers_json);
    free(item->meta_json);
    free(item->where);
    free(item->tokens);
    free(item->offsets);
}

static int64_t *table_slot(const ifkv_request_list *list, const char *id) {
    const uint64_t mask = (uint64_t)list->n_slot - 1;
    uint64_t slot = ifkv_digest_bytes(id, strlen(id)) & mask;
    while (list->table[slot] >= 0 && strcmp(list->item[list->table[slot]].id, id) != 0)
        slot = (slot + 1) & mask;
    return &list->table[slot];
}

/* Make room for one more item; the table stays at most half full. */
static ifkv_status list_grow(ifkv_request_list *list, const char *where) {
    if (list->n < list->n_capacity) return IFKV_OK;
    const int64_t n_capacity = list->n_capacity ? 2 * list->n_capacity : 16;
    ifkv_request_item *item = realloc(list->item, (size_t)n_capacity * sizeof *item);
    if (!item) return no_memory(where);
    list->item = item;
    int64_t *table = malloc((size_t)n_capacity * 2 * sizeof *table);
    if (!table) return no_memory(where);
    free(list->table);
    list->table = table;
    list->n_capacity = n_capacity;
    list->n_slot = 2 * n_capacity;
    for (int64_t i = 0; i < list->n_slot; i++) table[i] = -1;
    for (int64_t i = 0; i < list->n; i++) *table_slot(list, list->item[i].id) = i;
    return IFKV_OK;
}

static ifkv_status list_add(ifkv_request_list *list, const ifkv_request_item *item) {
    IFKV_TRY(list_grow(list, item->where));
    int64_t *slot = table_slot(list, item->id);
    if (*slot >= 0) {
        char quoted[IFKV_QUOTE_BYTES];
        return IFKV_FAIL(DATA, IFKV_E_REQUEST_FIELD, "%s /id: duplicate id: got '%s', first at %s",
                         item->where, ifkv_quote(item->id, strlen(item->id), quoted),
                         list->item[*slot].where);
    }
    *slot = list->n;
    list->item[list->n++] = *item;
    return IFKV_OK;
}

static ifkv_status parse_item(const char *text, size_t bytes, int64_t n_vocab,
                              ifkv_request_item *item) {
    const parse_line line = {item->where, n_vocab};
    const ifkv_json_limits limits = {IFKV_REQUEST_LINE_BYTES, 64, (uint64_t)1 << 30};
    json_t *root = NULL, *field[N_KEY] = {NULL};
    ifkv_status status;
    IFKV_REQUIRE(bytes <= IFKV_REQUEST_LINE_BYTES, DATA, IFKV_E_REQUEST_LENGTH,
                 "%s: line too long: got %zu bytes, expected at most %zu", item->where, bytes,
                 IFKV_REQUEST_LINE_BYTES);
    IFKV_TRY(ifkv_json_parse(item->where, text, bytes, &limits, IFKV_E_REQUEST_JSON, &root));
    if (!json_is_object(root)) {
        status = IFKV_FAIL(DATA, IFKV_E_REQUEST_JSON, "%s: wrong type: got %s, expected an object",
                           item->where, json_kind(root));
        goto out;
    }
    IFKV_TRY_GOTO(status, split_fields(&line, root, field), out);
    IFKV_TRY_GOTO(status, take_id(&line, field[KEY_ID], &item->id), out);
    IFKV_TRY_GOTO(status, take_sequence(&line, field, item), out);
    IFKV_TRY_GOTO(status, take_extras(&line, field, item), out);
    item->digest = digest_item(item);
out:
    json_decref(root);
    return status;
}

static bool is_blank(const char *text, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (!strchr(" \t\r", text[i]) || !text[i]) return false;
    return true;
}

static ifkv_status parse_one(ifkv_request_list *list, const char *name, bool is_h5, int64_t i_line,
                             const char *text, size_t bytes, int64_t n_vocab) {
    ifkv_request_item item = {0};
    char place[32];
    ifkv_status status;
    if (is_h5)
        snprintf(place, sizeof place, " /requests/%06lld", (long long)i_line);
    else
        snprintf(place, sizeof place, ":%lld", (long long)i_line + 1);
    item.where = malloc(strlen(name) + strlen(place) + 1);
    if (!item.where) return no_memory(name);
    strcpy(stpcpy(item.where, name), place);
    IFKV_TRY_GOTO(status, parse_item(text, bytes, n_vocab, &item), err_fini_item);
    IFKV_TRY_GOTO(status, list_add(list, &item), err_fini_item);
    return IFKV_OK;
err_fini_item:
    item_fini(&item);
    return status;
}

ifkv_status ifkv_requests_parse(const char *path, const char *text, size_t bytes, bool is_h5,
                                int64_t n_vocab, ifkv_request_list **list_p) {
    char quoted[IFKV_QUOTE_BYTES];
    const char *name = strcmp(path, "-") == 0 ? "<stdin>" : ifkv_path_quote(path, quoted);
    const char *at = text, *end = text + bytes;
    ifkv_status status;
    ifkv_request_list *list = calloc(1, sizeof *list);
    if (!list) return no_memory(name);
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) at += 3; /* a file may have one mark */
    for (int64_t i_line = 0; at < end; i_line++) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        const size_t n = (size_t)((stop ? stop : end) - at);
        if (!is_blank(at, n))
            IFKV_TRY_GOTO(status, parse_one(list, name, is_h5, i_line, at, n, n_vocab),
                          err_free_list);
        if (!stop) break;
        at = stop + 1;
    }
    if (list->n == 0) {
        status = IFKV_FAIL(DATA, IFKV_E_REQUEST_LENGTH,
                           "%s: no request: got 0, expected at least 1", name);
        goto err_free_list;
    }
    *list_p = list;
    return IFKV_OK;
err_free_list:
    ifkv_requests_free(list);
    return status;
}

void ifkv_requests_free(ifkv_request_list *list) {
    if (!list) return;
    for (int64_t i = 0; i < list->n; i++) item_fini(&list->item[i]);
    free(list->item);
    free(list->table);
    free(list);
}

const ifkv_request_item *ifkv_requests_find(const ifkv_request_list *list, const char *id) {
    if (list->n == 0) return NULL;
    const int64_t i = *table_slot(list, id);
    return i < 0 ? NULL : &list->item[i];
}
