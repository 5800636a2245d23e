/* HDF5 requests as JSONL.  See request.h.
 *
 * Runs in a child process, on a file from anywhere.  Checks what makes the file readable (kinds,
 * sizes, names of its members); what the values mean is checked by the parser of the JSONL. */
#include "request.h"

#include "file.h"
#include "h5.h"
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DATA IFKV_ERR_DATA
#define BLOCK_TOKENS 65536

/* An id takes at least two bytes of a line, so no longer dataset can be part of a request. */
#define MAX_TOKENS ((int64_t)(IFKV_REQUEST_LINE_BYTES / 2))

typedef struct converter {
    ifkv_h5 *file;
    const char *name; /* of the file, quoted */
    char group[32];
    ifkv_request_write_fn write;
    void *arg;
    char line[1 << 16];
    size_t bytes;
    int64_t n_request;
} converter;

static ifkv_status flush(converter *c) {
    const size_t n = c->bytes;
    c->bytes = 0;
    return c->write(c->arg, c->line, n);
}

static ifkv_status put(converter *c, const char *text) {
    const size_t n = strlen(text);
    if (n > sizeof c->line - c->bytes) IFKV_TRY(flush(c));
    if (n > sizeof c->line) return c->write(c->arg, text, n);
    memcpy(c->line + c->bytes, text, n);
    c->bytes += n;
    return IFKV_OK;
}

static ifkv_status put_token(converter *c, bool is_first, int64_t id) {
    char text[24];
    snprintf(text, sizeof text, "%s%lld", is_first ? "" : ",", (long long)id);
    return put(c, text);
}

static ifkv_status fail_member(const converter *c, const char *member, const char *what) {
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(DATA, IFKV_E_H5_OBJECT, "%s %s/%s: %s", c->name, c->group,
                     ifkv_quote(member, strlen(member), quoted), what);
}

static ifkv_status no_memory(const converter *c) {
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s %s: not enough memory", c->name,
                     c->group);
}

static void member_path(const converter *c, const char *member, char path[64]) {
    snprintf(path, 64, "%s/%s", c->group, member);
}

static ifkv_status has_member(converter *c, const char *member, bool *is_there_p) {
    char path[64];
    member_path(c, member, path);
    return ifkv_h5_find(c->file, path, is_there_p);
}

/* Length of a one-dimensional integer dataset. */
static ifkv_status member_length(converter *c, const char *member, int64_t *n_p) {
    ifkv_h5_dataset dataset;
    char path[64], what[120];
    member_path(c, member, path);
    IFKV_TRY(ifkv_h5_dataset_describe(c->file, path, &dataset));
    if (dataset.n_dim != 1) {
        snprintf(what, sizeof what, "wrong rank: got %d dimensions, expected 1", dataset.n_dim);
        return fail_member(c, member, what);
    }
    if (dataset.type != IFKV_H5_I32 && dataset.type != IFKV_H5_I64) {
        snprintf(what, sizeof what, "wrong type: got %s, expected int32 or int64",
                 dataset.type_name);
        return fail_member(c, member, what);
    }
    if (dataset.n_element > MAX_TOKENS) {
        snprintf(what, sizeof what, "too long: got %lld, expected at most %lld",
                 (long long)dataset.n_element, (long long)MAX_TOKENS);
        return fail_member(c, member, what);
    }
    *n_p = dataset.n_element;
    return IFKV_OK;
}

/* Write elements [begin, end) of a token dataset as a list. */
static ifkv_status put_list(converter *c, const char *member, int64_t begin, int64_t end) {
    static int64_t block[BLOCK_TOKENS]; /* the child is one thread */
    char path[64];
    member_path(c, member, path);
    IFKV_TRY(put(c, "["));
    for (int64_t at = begin; at < end;) {
        const int64_t n = end - at < BLOCK_TOKENS ? end - at : BLOCK_TOKENS;
        IFKV_TRY(ifkv_h5_rows_read(c->file, path, IFKV_H5_I64, at, n, block));
        for (int64_t i = 0; i < n; i++) IFKV_TRY(put_token(c, at + i == begin, block[i]));
        at += n;
    }
    return put(c, "]");
}

static ifkv_status put_member(converter *c, const char *member, const char *key) {
    bool is_there;
    int64_t n;
    IFKV_TRY(has_member(c, member, &is_there));
    if (!is_there) return IFKV_OK;
    IFKV_TRY(member_length(c, member, &n));
    IFKV_TRY(put(c, key));
    return put_list(c, member, 0, n);
}

/* chunk_offsets: n + 1 entries, first 0, never descending, last the number of tokens. */
static ifkv_status read_offsets(converter *c, int64_t n_token, int64_t **offsets_p,
                                int64_t *n_chunk_p) {
    int64_t n;
    char path[64];
    ifkv_status status;
    member_path(c, "chunk_offsets", path);
    IFKV_TRY(member_length(c, "chunk_offsets", &n));
    if (n < 1 || n > IFKV_REQUEST_CHUNKS + 1)
        return fail_member(c, "chunk_offsets", "wrong length: expected 1 + number of chunks");
    int64_t *offsets = malloc((size_t)n * sizeof *offsets);
    if (!offsets) return no_memory(c);
    IFKV_TRY_GOTO(status, ifkv_h5_rows_read(c->file, path, IFKV_H5_I64, 0, n, offsets),
                  err_free_offsets);
    bool is_ok = offsets[0] == 0 && offsets[n - 1] == n_token;
    for (int64_t i = 1; i < n; i++) is_ok = is_ok && offsets[i] >= offsets[i - 1];
    if (!is_ok) {
        status = fail_member(c, "chunk_offsets",
                             "expected to start at 0, ascend and end at the number of tokens");
        goto err_free_offsets;
    }
    *offsets_p = offsets;
    *n_chunk_p = n - 1;
    return IFKV_OK;
err_free_offsets:
    free(offsets);
    return status;
}

static ifkv_status put_chunks(converter *c) {
    bool is_there;
    int64_t n_token, n_chunk = 0, *offsets = NULL;
    ifkv_status status;
    IFKV_TRY(has_member(c, "chunk_tokens", &is_there));
    if (!is_there) return IFKV_OK;
    IFKV_TRY(member_length(c, "chunk_tokens", &n_token));
    IFKV_TRY(read_offsets(c, n_token, &offsets, &n_chunk));
    IFKV_TRY_GOTO(status, put(c, ",\"chunks\":["), out);
    for (int64_t i = 0; i < n_chunk; i++) {
        if (i > 0) IFKV_TRY_GOTO(status, put(c, ","), out);
        IFKV_TRY_GOTO(status, put_list(c, "chunk_tokens", offsets[i], offsets[i + 1]), out);
    }
    status = put(c, "]");
out:
    free(offsets);
    return status;
}

/* Write a text attribute as a JSON string, or as the JSON value that it spells. */
static ifkv_status put_text(converter *c, const char *name, const char *key, bool is_json,
                            bool is_required) {
    const ifkv_json_limits limits = {IFKV_H5_TEXT_BYTES, 64, (uint64_t)1 << 30};
    char where[IFKV_QUOTE_BYTES + 64], *text = NULL, *dump = NULL;
    json_t *value = NULL;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(ifkv_h5_text_read(c->file, c->group, name, &text));
    if (!text) return is_required ? fail_member(c, name, "attribute missing") : IFKV_OK;
    snprintf(where, sizeof where, "%s %s/%s", c->name, c->group, name);
    if (is_json)
        status = ifkv_json_parse(where, text, strlen(text), &limits, IFKV_E_REQUEST_JSON, &value);
    else if (!(value = json_string(text)))
        status = fail_member(c, name, "not UTF-8");
    if (status != IFKV_OK) goto out;
    dump = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
    status = dump ? put(c, key) : no_memory(c);
    if (status == IFKV_OK) status = put(c, dump);
out:
    free(dump);
    json_decref(value);
    free(text);
    return status;
}

static ifkv_status put_max_new(converter *c) {
    bool is_there;
    int64_t value;
    char text[40];
    IFKV_TRY(ifkv_h5_i64_read(c->file, c->group, "max_new", &is_there, &value));
    if (!is_there) return IFKV_OK;
    snprintf(text, sizeof text, ",\"max_new\":%lld", (long long)value);
    return put(c, text);
}

static ifkv_status check_member(void *arg, bool is_link, const char *name) {
    static const char *const links[] = {"prefix",       "prompt",        "question",
                                        "chunk_tokens", "chunk_offsets", "context"};
    static const char *const attributes[] = {"id", "answers", "meta", "max_new"};
    const char *const *known = is_link ? links : attributes;
    const size_t n =
        is_link ? sizeof links / sizeof *links : sizeof attributes / sizeof *attributes;
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, known[i]) == 0) return IFKV_OK;
    return fail_member(arg, name, is_link ? "unknown member" : "unknown attribute");
}

static ifkv_status convert_request(converter *c, int64_t i_request) {
    bool is_there;
    snprintf(c->group, sizeof c->group, "/requests/%06lld", (long long)i_request);
    IFKV_TRY(ifkv_h5_find(c->file, c->group, &is_there));
    IFKV_REQUIRE(is_there, DATA, IFKV_E_H5_OBJECT,
                 "%s %s: group missing: expected %lld groups numbered from 000000", c->name,
                 c->group, (long long)c->n_request);
    IFKV_TRY(ifkv_h5_group_visit(c->file, c->group, check_member, c));
    IFKV_TRY(put_text(c, "id", "{\"id\":", false, true));
    IFKV_TRY(put_member(c, "prefix", ",\"prefix\":"));
    IFKV_TRY(put_chunks(c));
    IFKV_TRY(put_member(c, "context", ",\"context\":"));
    IFKV_TRY(put_member(c, "prompt", ",\"prompt\":"));
    IFKV_TRY(put_member(c, "question", ",\"question\":"));
    IFKV_TRY(put_text(c, "answers", ",\"answers\":", true, false));
    IFKV_TRY(put_text(c, "meta", ",\"meta\":", true, false));
    IFKV_TRY(put_max_new(c));
    return put(c, "}\n");
}

static ifkv_status count_request(void *arg, bool is_link, const char *name) {
    (void)name;
    ((converter *)arg)->n_request += is_link;
    return IFKV_OK;
}

static ifkv_status check_format(converter *c) {
    char *format = NULL, quoted[IFKV_QUOTE_BYTES];
    ifkv_status status = IFKV_OK;
    IFKV_TRY(ifkv_h5_text_read(c->file, "/", "format", &format));
    if (!format || strcmp(format, "ifkv-requests") != 0)
        status = IFKV_FAIL(DATA, IFKV_E_H5_OBJECT,
                           "%s /: attribute format: got '%s', expected ifkv-requests", c->name,
                           format ? ifkv_quote(format, strlen(format), quoted) : "");
    free(format);
    return status;
}

ifkv_status ifkv_requests_h5_convert(const char *path, const void *image, size_t bytes,
                                     ifkv_request_write_fn write, void *arg) {
    char quoted[IFKV_QUOTE_BYTES];
    const char *name = strcmp(path, "-") == 0 ? "<stdin>" : ifkv_path_quote(path, quoted);
    ifkv_status status;
    converter *c = calloc(1, sizeof *c);
    IFKV_REQUIRE(c, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory", name);
    c->name = name;
    c->write = write;
    c->arg = arg;
    IFKV_TRY_GOTO(status, ifkv_h5_open_image(name, image, bytes, &c->file), err_free_converter);
    IFKV_TRY_GOTO(status, check_format(c), err_close_file);
    IFKV_TRY_GOTO(status, ifkv_h5_group_visit(c->file, "/requests", count_request, c),
                  err_close_file);
    for (int64_t i = 0; i < c->n_request; i++)
        IFKV_TRY_GOTO(status, convert_request(c, i), err_close_file);
    status = flush(c);
err_close_file:
    ifkv_h5_close(c->file);
err_free_converter:
    free(c);
    return status;
}
