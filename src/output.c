/* The output directory of a run.  See output.h. */
#include "output.h"

#include "digest.h"
#include "file.h"
#include "json.h"
#include "log.h"
#include "manifest.h"
#include "output_record.h"
#include "publish.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define RESULTS_NAME "results.jsonl"
#define RUN_NAME "run.json"
#define FORMAT_VERSION "1.0"

/* What is kept of a finished request, so that both files can be written anew. */
typedef struct done_lines {
    char *result, *manifest; /* owned, newline included; both NULL: not done */
} done_lines;

struct ifkv_output {
    ifkv_output_options options; /* its pointers are borrowed, but for dir and run */
    int lock;
    bool has_begun;
    bool is_unordered; /* result lines in the file are not in the order of the requests */
    int64_t i_last;    /* request of the last result line in the file, -1 if none */
    done_lines *done;  /* [requests->n] */
};

static ifkv_status no_memory(void) {
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "output: not enough memory");
}

/* The bytes with a newline behind them. */
static char *line_copy(const char *line, size_t bytes) {
    char *copy = malloc(bytes + 2);
    if (!copy) return NULL;
    memcpy(copy, line, bytes);
    memcpy(copy + bytes, "\n", 2);
    return copy;
}

/* ---- names and keys ---- */

const char *ifkv_output_name(const char *id, char *name) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyz0123456789_-";
    const size_t n = strlen(id), n_plain = strspn(id, plain);
    if (n >= 1 && n <= 64 && n_plain == n) {
        memcpy(name, id, n + 1);
        return name;
    }
    char *p = name;
    for (size_t i = 0; i < n && i < 40; i++) {
        const char c = id[i] >= 'A' && id[i] <= 'Z' ? (char)(id[i] - 'A' + 'a') : id[i];
        *p++ = strchr(plain, c) ? c : '_';
    }
    /* A plain name holds no '.', so the two forms cannot meet. */
    snprintf(p, 18, ".%016llx", (unsigned long long)ifkv_digest_bytes(id, n));
    return name;
}

const char *ifkv_output_key(const ifkv_output_options *options, const ifkv_request_item *item,
                            char *key) {
    const uint64_t n_run = strlen(options->run);
    const uint64_t run = ifkv_digest_bytes(options->run, n_run);
    /* Two 64-bit digests over different texts stand for one of 128 bits. */
    char text[160];
    int n = snprintf(text, sizeof text, "a %s %016llx %016llx %016llx %llu", FORMAT_VERSION,
                     (unsigned long long)options->fingerprint, (unsigned long long)item->digest,
                     (unsigned long long)run, (unsigned long long)n_run);
    const uint64_t high = ifkv_digest_bytes(text, (size_t)n);
    text[0] = 'b';
    snprintf(key, IFKV_OUTPUT_KEY_BYTES, "%016llx%016llx", (unsigned long long)high,
             (unsigned long long)ifkv_digest_bytes(text, (size_t)n));
    return key;
}

/* ---- run.json: what the finished results depend on ---- */

/* {"format", "format_version", "model_fingerprint", "options": {name: value}} */
static json_t *run_to_json(const ifkv_output_options *options) {
    char hex[17];
    json_t *fields = json_object();
    for (const char *at = options->run; *at;) {
        const size_t n = strcspn(at, ";"), n_name = strcspn(at, "=;");
        char *name = strndup(at, n_name);
        if (name && n_name < n)
            json_object_set_new(fields, name, json_stringn(at + n_name + 1, n - n_name - 1));
        free(name);
        at += n + (at[n] == ';');
    }
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)options->fingerprint);
    return json_pack("{s:s,s:s,s:s,s:o}", "format", "ifkv-run", "format_version", FORMAT_VERSION,
                     "model_fingerprint", hex, "options", fields);
}

static ifkv_status run_differs(const char *path, const char *pointer, const char *name,
                               const json_t *old, const json_t *new) {
    char quoted[IFKV_QUOTE_BYTES], quoted_path[IFKV_QUOTE_BYTES], quoted_name[IFKV_QUOTE_BYTES];
    const char *was = json_is_string(old) ? json_string_value(old) : "nothing";
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                     "%s %s%s: differs from the finished results: got %s, expected %s",
                     ifkv_path_quote(path, quoted_path), pointer,
                     ifkv_quote(name, strlen(name), quoted_name),
                     json_is_string(new) ? json_string_value(new) : "nothing",
                     ifkv_quote(was, strlen(was), quoted));
}

/* The first field of `new` that `old` has otherwise, or the reverse. */
static ifkv_status run_compare(const char *path, const char *pointer, json_t *old, json_t *new) {
    const char *name;
    json_t *value;
    json_object_foreach(
        new, name,
        value) if (json_is_string(value) &&
                   !json_equal(
                       value, json_object_get(old, name))) return run_differs(path, pointer, name,
                                                                              json_object_get(old,
                                                                                              name),
                                                                              value);
    json_object_foreach(old, name, value) if (!json_object_get(new, name)) return run_differs(
        path, pointer, name, value, NULL);
    return IFKV_OK;
}

static ifkv_status run_check(const ifkv_output_options *options) {
    const ifkv_json_limits limits = {(uint64_t)16 << 20, 64, (uint64_t)1 << 30};
    char *path = ifkv_path_join(options->dir, RUN_NAME), *text = NULL;
    json_t *old = NULL, *new = run_to_json(options);
    size_t bytes;
    ifkv_status status = path && new ? IFKV_OK : no_memory();
    if (status != IFKV_OK) goto out;
    IFKV_TRY_GOTO(status, ifkv_file_read(path, limits.max_bytes, IFKV_E_OUT_EXISTS, &text, &bytes),
                  out);
    IFKV_TRY_GOTO(status, ifkv_json_parse(path, text, bytes, &limits, IFKV_E_OUT_EXISTS, &old),
                  out);
    IFKV_TRY_GOTO(status, run_compare(path, "/", old, new), out);
    status = run_compare(path, "/options/", json_object_get(old, "options"),
                         json_object_get(new, "options"));
out:
    json_decref(new);
    json_decref(old);
    free(text);
    free(path);
    /* finished results without their run.json cannot be judged */
    if (status == IFKV_ERR_NO_INPUT)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                         "%s/" RUN_NAME ": missing beside finished results", options->dir);
    return status;
}

static ifkv_status run_save(const ifkv_output_options *options) {
    json_t *root = run_to_json(options);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    char *line = text ? line_copy(text, strlen(text)) : NULL;
    const ifkv_status status =
        line ? ifkv_publish_text(options->dir, RUN_NAME, line, strlen(line)) : no_memory();
    json_decref(root);
    free(line);
    free(text);
    return status;
}

/* ---- opening ---- */

static bool has_content(const char *dir, const char *name) {
    struct stat st;
    char *path = ifkv_path_join(dir, name);
    const bool is_there = path && stat(path, &st) == 0 && st.st_size > 0;
    free(path);
    return is_there;
}

static bool files_match(const char *dir, const ifkv_manifest_entry *entry) {
    for (int64_t i = 0; i < entry->n_file; i++) {
        uint64_t digest;
        const char *name = ifkv_manifest_file(entry, i, &digest);
        if (!ifkv_manifest_file_matches(dir, name, digest)) return false;
    }
    return true;
}

/* Keep the manifest lines that still hold.  An invalid line and a damaged file only cost the
 * request another run; a request that is another one under the same id is an error. */
static ifkv_status keep_manifest(ifkv_output *out) {
    const ifkv_output_options *options = &out->options;
    ifkv_manifest manifest;
    ifkv_status status = IFKV_OK;
    char key[IFKV_OUTPUT_KEY_BYTES], quoted[IFKV_QUOTE_BYTES];
    IFKV_TRY(ifkv_manifest_load(options->dir, &manifest));
    for (int64_t i = 0; i < manifest.n && status == IFKV_OK; i++) {
        const ifkv_manifest_entry *entry = &manifest.entry[i];
        if (!entry->root) continue;
        const ifkv_request_item *item = ifkv_requests_find(options->requests, entry->id);
        ifkv_quote(entry->id, strlen(entry->id), quoted);
        if (!item) {
            status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                               "%s/" IFKV_MANIFEST_NAME ":%lld /id: finished request '%s' is not "
                               "among the requests",
                               options->dir, (long long)i + 1, quoted);
        } else if (strcmp(ifkv_output_key(options, item, key), entry->key) != 0) {
            status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                               "%s /id: request '%s' differs from the finished one of that id in "
                               "%s/" IFKV_MANIFEST_NAME ":%lld",
                               item->where, quoted, options->dir, (long long)i + 1);
        } else if (files_match(options->dir, entry)) {
            done_lines *done = &out->done[item - options->requests->item];
            free(done->manifest);
            done->manifest = line_copy(entry->line, entry->bytes);
            if (!done->manifest) status = no_memory();
        } else {
            ifkv_log(IFKV_LOG_WARN,
                     "%s: files of request '%s' are missing or damaged: it runs again",
                     options->dir, quoted);
        }
    }
    ifkv_manifest_fini(&manifest);
    return status;
}

/* The request a result line belongs to, or NULL. */
static const ifkv_request_item *line_item(const ifkv_request_list *requests, const char *line,
                                          size_t bytes) {
    const ifkv_json_limits limits = {(uint64_t)1 << 30, 64, (uint64_t)1 << 30};
    json_t *root = NULL;
    if (ifkv_json_parse(RESULTS_NAME, line, bytes, &limits, IFKV_E_OUT_VERIFY, &root) != IFKV_OK)
        return NULL;
    const char *id = json_string_value(json_object_get(root, "id"));
    const ifkv_request_item *item = id ? ifkv_requests_find(requests, id) : NULL;
    json_decref(root);
    return item;
}

/* Keep the result lines of requests whose manifest line was kept, and drop manifest lines that have
 * no result. */
static ifkv_status keep_results(ifkv_output *out) {
    const ifkv_request_list *requests = out->options.requests;
    char *path = ifkv_path_join(out->options.dir, RESULTS_NAME), *text = NULL;
    size_t bytes = 0;
    if (!path) return no_memory();
    ifkv_status status = ifkv_file_read(path, (uint64_t)64 << 30, IFKV_E_OUT_VERIFY, &text, &bytes);
    free(path);
    if (status != IFKV_OK && status != IFKV_ERR_NO_INPUT) return status;
    status = IFKV_OK;
    const char *at = text, *stop;
    while (text && (stop = memchr(at, '\n', (size_t)(text + bytes - at)))) {
        const ifkv_request_item *item = line_item(requests, at, (size_t)(stop - at));
        done_lines *done = item ? &out->done[item - requests->item] : NULL;
        if (done && done->manifest) {
            free(done->result);
            done->result = line_copy(at, (size_t)(stop - at));
            if (!done->result) status = no_memory();
        }
        at = stop + 1;
    }
    free(text);
    for (int64_t i = 0; i < requests->n; i++) {
        if (out->done[i].result) continue;
        free(out->done[i].manifest);
        out->done[i].manifest = NULL;
    }
    return status;
}

static ifkv_status open_mode(ifkv_output *out) {
    const ifkv_output_options *options = &out->options;
    char quoted[IFKV_QUOTE_BYTES];
    const char *found = has_content(options->dir, IFKV_MANIFEST_NAME) ? IFKV_MANIFEST_NAME
                        : has_content(options->dir, RESULTS_NAME)     ? RESULTS_NAME
                                                                      : NULL;
    if (!found || options->mode == IFKV_OUTPUT_OVERWRITE) return IFKV_OK;
    IFKV_REQUIRE(options->mode == IFKV_OUTPUT_RESUME, IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "%s/%s: results of another run are there: expected --resume, --overwrite or "
                 "another directory",
                 ifkv_path_quote(options->dir, quoted), found);
    IFKV_TRY(run_check(options));
    IFKV_TRY(keep_manifest(out));
    return keep_results(out);
}

ifkv_status ifkv_output_open(const ifkv_output_options *options, ifkv_output **out_p) {
    ifkv_status status;
    ifkv_output *out = calloc(1, sizeof *out);
    if (!out) return no_memory();
    out->options = *options;
    out->lock = -1;
    out->i_last = -1;
    out->options.dir = strdup(options->dir);
    out->options.run = strdup(options->run);
    out->done = calloc((size_t)options->requests->n + 1, sizeof *out->done);
    if (!out->options.dir || !out->options.run || !out->done) {
        status = no_memory();
        goto err_close;
    }
    IFKV_TRY_GOTO(status, ifkv_publish_lock(options->dir, &out->lock), err_close);
    IFKV_TRY_GOTO(status, open_mode(out), err_close);
    *out_p = out;
    return IFKV_OK;
err_close:
    ifkv_output_close(out);
    return status;
}

void ifkv_output_close(ifkv_output *out) {
    if (!out) return;
    for (int64_t i = 0; out->done && i < out->options.requests->n; i++) {
        free(out->done[i].result);
        free(out->done[i].manifest);
    }
    if (out->options.dir) ifkv_publish_unlock(out->options.dir, out->lock);
    free(out->done);
    free((char *)out->options.run);
    free((char *)out->options.dir);
    free(out);
}

bool ifkv_output_is_done(const ifkv_output *out, int64_t i_request) {
    return out->done[i_request].manifest != NULL;
}

/* ---- writing ---- */

/* The manifest goes first: from then on nothing counts as finished, whatever is still there. */
static ifkv_status remove_old(const ifkv_output *out) {
    const char *dir = out->options.dir;
    ifkv_manifest manifest;
    IFKV_TRY(ifkv_manifest_load(dir, &manifest));
    ifkv_status status = ifkv_publish_remove(dir, IFKV_MANIFEST_NAME);
    if (status == IFKV_OK) status = ifkv_publish_remove(dir, RESULTS_NAME);
    for (int64_t i = 0; i < manifest.n; i++) {
        const ifkv_manifest_entry *entry = &manifest.entry[i];
        for (int64_t j = 0; entry->root && j < entry->n_file && status == IFKV_OK; j++) {
            uint64_t digest;
            status = ifkv_publish_remove(dir, ifkv_manifest_file(entry, j, &digest));
        }
    }
    ifkv_manifest_fini(&manifest);
    return status;
}

/* Write one of the two files anew from the kept lines, in the order of the requests. */
static ifkv_status rewrite(const ifkv_output *out, const char *name, bool is_manifest) {
    const int64_t n = out->options.requests->n;
    size_t bytes = 0;
    for (int64_t i = 0; i < n; i++) {
        const char *line = is_manifest ? out->done[i].manifest : out->done[i].result;
        if (line) bytes += strlen(line);
    }
    char *text = malloc(bytes + 1), *at = text;
    if (!text) return no_memory();
    for (int64_t i = 0; i < n; i++) {
        const char *line = is_manifest ? out->done[i].manifest : out->done[i].result;
        if (line) at = stpcpy(at, line);
    }
    const ifkv_status status = ifkv_publish_text(out->options.dir, name, text, bytes);
    free(text);
    return status;
}

ifkv_status ifkv_output_begin(ifkv_output *out) {
    if (out->has_begun) return IFKV_OK;
    if (out->options.mode == IFKV_OUTPUT_RESUME) {
        /* Manifest first: a result line without a manifest line is harmless. */
        IFKV_TRY(rewrite(out, IFKV_MANIFEST_NAME, true));
        IFKV_TRY(rewrite(out, RESULTS_NAME, false));
        for (int64_t i = 0; i < out->options.requests->n; i++)
            if (out->done[i].result) out->i_last = i;
    } else {
        IFKV_TRY(remove_old(out));
    }
    IFKV_TRY(run_save(&out->options));
    out->has_begun = true;
    return IFKV_OK;
}

static ifkv_status append_lines(ifkv_output *out, int64_t i_request, done_lines *lines) {
    const char *dir = out->options.dir;
    done_lines *done = &out->done[i_request];
    IFKV_TRY(ifkv_publish_line(dir, RESULTS_NAME, lines->result, strlen(lines->result)));
    if (i_request < out->i_last) out->is_unordered = true;
    out->i_last = i_request;
    IFKV_TRY(ifkv_publish_line(dir, IFKV_MANIFEST_NAME, lines->manifest, strlen(lines->manifest)));
    free(done->result);
    free(done->manifest);
    *done = *lines;
    lines->result = lines->manifest = NULL;
    return IFKV_OK;
}

ifkv_status ifkv_output_record(ifkv_output *out, int64_t i_request, const ifkv_result *result,
                               int n_kv, const uint64_t *kv_digest) {
    const ifkv_request_item *item = &out->options.requests->item[i_request];
    const size_t name_bytes = IFKV_OUTPUT_NAME_BYTES + 32, n_file = (size_t)n_kv + 1;
    char base[IFKV_OUTPUT_NAME_BYTES], key[IFKV_OUTPUT_KEY_BYTES];
    done_lines lines = {NULL, NULL};
    ifkv_status status;
    char *names = malloc(n_file * name_bytes);
    const char **name = malloc(n_file * sizeof *name);
    uint64_t *digest = malloc(n_file * sizeof *digest);
    if (!names || !name || !digest) {
        status = no_memory();
        goto out;
    }
    ifkv_output_name(item->id, base);
    for (size_t i = 0; i < n_file; i++) {
        char *text = names + i * name_bytes;
        if (i == 0)
            snprintf(text, name_bytes, "%s.h5", base);
        else
            snprintf(text, name_bytes, "%s.kv%zu.h5", base, i - 1);
        name[i] = text;
        if (i > 0) digest[i] = kv_digest[i - 1];
    }
    IFKV_TRY_GOTO(status, ifkv_output_begin(out), out);
    IFKV_TRY_GOTO(status, ifkv_output_record_file(&out->options, item, result, name[0], &digest[0]),
                  out);
    IFKV_TRY_GOTO(status, ifkv_output_result_line(item, result, &lines.result), out);
    lines.manifest = ifkv_manifest_line(item->id, ifkv_output_key(&out->options, item, key),
                                        (int64_t)n_file, name, digest);
    status = lines.manifest ? append_lines(out, i_request, &lines) : no_memory();
out:
    free(lines.manifest);
    free(lines.result);
    free(digest);
    free(name);
    free(names);
    return status;
}

ifkv_status ifkv_output_finish(ifkv_output *out) {
    IFKV_TRY(ifkv_output_begin(out));
    if (!out->is_unordered) return IFKV_OK;
    IFKV_TRY(rewrite(out, IFKV_MANIFEST_NAME, true));
    IFKV_TRY(rewrite(out, RESULTS_NAME, false));
    out->is_unordered = false;
    return IFKV_OK;
}
