/* The lines of manifest.jsonl.  See manifest.h. */
#include "manifest.h"

#include "digest.h"
#include "file.h"
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANIFEST_BYTES ((uint64_t)4 << 30)
#define HEX_DIGITS 16

static bool is_plain_name(const char *name) {
    return name && *name && *name != '.' && strlen(name) < 256 && !strchr(name, '/');
}

static bool parse_digest(const json_t *value, uint64_t *digest_p) {
    const char *text = json_string_value(value);
    if (!text || strlen(text) != HEX_DIGITS || strspn(text, "0123456789abcdef") != HEX_DIGITS)
        return false;
    *digest_p = strtoull(text, NULL, 16);
    return true;
}

/* The i-th file name, before the entry is known to be valid. */
static const char *file_name(const json_t *root, int64_t i) {
    return i == 0 ? json_string_value(json_object_get(root, "record"))
                  : json_string_value(json_array_get(json_object_get(root, "kv"), (size_t)i - 1));
}

static bool is_valid(const json_t *root, int64_t n_file) {
    uint64_t digest;
    if (!json_is_string(json_object_get(root, "id")) ||
        !json_is_string(json_object_get(root, "key")) ||
        !json_is_array(json_object_get(root, "kv")))
        return false;
    for (int64_t i = 0; i < n_file; i++) {
        const char *name = file_name(root, i);
        if (!is_plain_name(name) ||
            !parse_digest(json_object_get(json_object_get(root, "xxh3"), name), &digest))
            return false;
    }
    return true;
}

static void parse_entry(ifkv_manifest_entry *entry) {
    const ifkv_json_limits limits = {(uint64_t)256 << 20, 64, (uint64_t)1 << 30};
    json_t *root = NULL;
    if (entry->is_torn || ifkv_json_parse(IFKV_MANIFEST_NAME, entry->line, entry->bytes, &limits,
                                          IFKV_E_OUT_VERIFY, &root) != IFKV_OK)
        return;
    const int64_t n_file = 1 + (int64_t)json_array_size(json_object_get(root, "kv"));
    if (!is_valid(root, n_file)) {
        json_decref(root);
        return;
    }
    entry->root = root;
    entry->id = json_string_value(json_object_get(root, "id"));
    entry->key = json_string_value(json_object_get(root, "key"));
    entry->n_file = n_file;
}

ifkv_status ifkv_manifest_load(const char *dir, ifkv_manifest *manifest) {
    size_t bytes = 0, n_line = 1;
    char *path = ifkv_path_join(dir, IFKV_MANIFEST_NAME), *text = NULL;
    IFKV_REQUIRE(path, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "manifest: not enough memory");
    ifkv_status status = ifkv_file_read(path, MANIFEST_BYTES, IFKV_E_OUT_VERIFY, &text, &bytes);
    free(path);
    memset(manifest, 0, sizeof *manifest);
    if (status == IFKV_ERR_NO_INPUT) return IFKV_OK;
    IFKV_TRY(status);
    for (size_t i = 0; i < bytes; i++) n_line += text[i] == '\n';
    manifest->text = text;
    manifest->entry = calloc(n_line, sizeof *manifest->entry);
    if (!manifest->entry) {
        ifkv_manifest_fini(manifest);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "manifest: not enough memory");
    }
    for (const char *at = text, *end = text + bytes; at < end;) {
        ifkv_manifest_entry *entry = &manifest->entry[manifest->n++];
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        entry->line = at;
        entry->is_torn = !stop;
        entry->bytes = (size_t)((stop ? stop : end) - at);
        parse_entry(entry);
        at = stop ? stop + 1 : end;
    }
    return IFKV_OK;
}

void ifkv_manifest_fini(ifkv_manifest *manifest) {
    for (int64_t i = 0; i < manifest->n; i++) json_decref(manifest->entry[i].root);
    free(manifest->entry);
    free(manifest->text);
    memset(manifest, 0, sizeof *manifest);
}

const char *ifkv_manifest_file(const ifkv_manifest_entry *entry, int64_t i, uint64_t *digest_p) {
    const char *name = file_name(entry->root, i);
    if (!parse_digest(json_object_get(json_object_get(entry->root, "xxh3"), name), digest_p))
        *digest_p = 0;
    return name;
}

bool ifkv_manifest_file_matches(const char *dir, const char *name, uint64_t digest) {
    uint64_t found = 0;
    char *path = ifkv_path_join(dir, name);
    const bool is_ok = path && ifkv_digest_file(path, IFKV_E_OUT_VERIFY, &found) == IFKV_OK;
    free(path);
    return is_ok && found == digest;
}

char *ifkv_manifest_line(const char *id, const char *key, int64_t n_file, const char *const *name,
                         const uint64_t *digest) {
    json_t *kv = json_array(), *xxh3 = json_object();
    for (int64_t i = 0; i < n_file; i++) {
        char hex[HEX_DIGITS + 1];
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)digest[i]);
        json_object_set_new(xxh3, name[i], json_string(hex));
        if (i > 0) json_array_append_new(kv, json_string(name[i]));
    }
    json_t *root = json_pack("{s:s,s:s,s:o,s:o,s:s}", "id", id, "record", name[0], "kv", kv, "xxh3",
                             xxh3, "key", key);
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    const size_t n = text ? strlen(text) : 0;
    char *line = text ? realloc(text, n + 2) : NULL;
    if (!line) {
        free(text);
        return NULL;
    }
    strcpy(line + n, "\n");
    return line;
}
