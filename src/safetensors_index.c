/* Which files of a directory hold the weights: one file, or an index and its shards.
 *
 * A shard is named by an untrusted index, so it must be a plain file name: nothing else is ever
 * opened.  See safetensors.h. */
#include "safetensors.h"

#include "json.h"
#include "log.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define INDEX_NAME "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"
#define INDEX_BYTES_MAX ((uint64_t)256 << 20)

void ifkv_shard_map_fini(ifkv_shard_map *map) {
    for (int i = 0; i < map->n_shard; i++) free(map->shard[i]);
    for (int64_t i = 0; i < map->n_tensor; i++) free(map->tensor[i]);
    free(map->shard);
    free(map->tensor);
    free(map->of);
    memset(map, 0, sizeof *map);
}

/* A name that cannot leave the directory: no separator of any system, no drive, not special, and
 * nothing that a terminal or log could misread. */
static bool is_plain_name(const char *name, size_t bytes) {
    if (bytes == 0 || bytes > 255 || name[0] == '.') return false;
    for (size_t i = 0; i < bytes; i++) {
        const unsigned char c = (unsigned char)name[i];
        if (c < 0x20 || c == 0x7f || c == '/' || c == '\\' || c == ':') return false;
    }
    return true;
}

static ifkv_status index_fail(const char *where, const char *name, const char *what,
                              const json_t *value, const char *expected) {
    char quoted[IFKV_QUOTE_BYTES], got[IFKV_QUOTE_BYTES];
    const char *string = json_string_value(value);
    if (string) ifkv_quote(string, json_string_length(value), got);
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                     "%s /weight_map tensor \"%s\": %s: got %s%s%s, expected %s", where,
                     ifkv_quote(name, strlen(name), quoted), what, string ? "\"" : "",
                     string ? got : "another type", string ? "\"" : "", expected);
}

typedef struct entry {
    const char *name, *shard; /* borrowed from the tree */
} entry;

static int compare_entry(const void *a, const void *b) {
    return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}
static int compare_string(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Collect and check weight_map.  The caller frees *entry_p. */
static ifkv_status collect_entries(const char *where, json_t *weight_map, entry **entry_p,
                                   int64_t *n_p) {
    const size_t n = json_object_size(weight_map);
    const char *name;
    json_t *value;
    int64_t i = 0;
    IFKV_REQUIRE(n >= 1 && n <= IFKV_TENSOR_MAX_COUNT, IFKV_ERR_DATA, IFKV_E_INDEX,
                 "%s /weight_map: number of tensors out of range: got %zu, expected 1 to %d", where,
                 n, IFKV_TENSOR_MAX_COUNT);
    json_object_foreach(weight_map, name, value) {
        if (!json_is_string(value))
            return index_fail(where, name, "wrong type", value, "a plain file name");
        if (!is_plain_name(json_string_value(value), json_string_length(value)))
            return index_fail(where, name, "not a plain file name", value, "a plain file name");
    }
    entry *of = malloc(n * sizeof *of);
    IFKV_REQUIRE(of, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory", where);
    json_object_foreach(weight_map, name, value) {
        of[i].name = name;
        of[i++].shard = json_string_value(value);
    }
    qsort(of, n, sizeof *of, compare_entry);
    *entry_p = of;
    *n_p = (int64_t)n;
    return IFKV_OK;
}

/* Distinct shard names, ascending, into the map. */
static ifkv_status collect_shards(const char *where, const entry *of, int64_t n,
                                  ifkv_shard_map *map) {
    ifkv_status status = IFKV_OK;
    int64_t n_shard = 0;
    const char **name = malloc((size_t)n * sizeof *name);
    IFKV_REQUIRE(name, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory", where);
    for (int64_t i = 0; i < n; i++) name[i] = of[i].shard;
    qsort(name, (size_t)n, sizeof *name, compare_string);
    for (int64_t i = 0; i < n; i++)
        if (n_shard == 0 || strcmp(name[n_shard - 1], name[i]) != 0) name[n_shard++] = name[i];
    if (n_shard > IFKV_TENSOR_MAX_SHARD) {
        status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                           "%s /weight_map: too many shards: got %lld, expected at most %d", where,
                           (long long)n_shard, IFKV_TENSOR_MAX_SHARD);
        goto free_name;
    }
    map->shard = calloc((size_t)n_shard, sizeof *map->shard);
    for (int64_t i = 0; map->shard && i < n_shard; i++) {
        map->shard[i] = strdup(name[i]);
        if (!map->shard[i]) break;
        map->n_shard++;
    }
    if (map->n_shard != n_shard)
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory", where);
free_name:
    free(name);
    return status;
}

static ifkv_status copy_entries(const char *where, const entry *of, int64_t n,
                                ifkv_shard_map *map) {
    map->tensor = calloc((size_t)n, sizeof *map->tensor);
    map->of = calloc((size_t)n, sizeof *map->of);
    IFKV_REQUIRE(map->tensor && map->of, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory",
                 where);
    for (int64_t i = 0; i < n; i++) {
        char **found = bsearch(&of[i].shard, map->shard, (size_t)map->n_shard, sizeof *map->shard,
                               compare_string);
        map->of[i] = (int)(found - map->shard);
        map->tensor[i] = strdup(of[i].name);
        IFKV_REQUIRE(map->tensor[i], IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory", where);
        map->n_tensor++;
    }
    return IFKV_OK;
}

/* The total is information only: a number that is not one is no reason to refuse the weights. */
static void parse_total(const json_t *root, ifkv_shard_map *map) {
    const json_t *total = json_object_get(json_object_get(root, "metadata"), "total_size");
    if (json_is_integer(total) && json_integer_value(total) >= 0) {
        map->has_total = true;
        map->total_bytes = (uint64_t)json_integer_value(total);
    } else if (json_is_real(total) && json_real_value(total) >= 0 &&
               json_real_value(total) < 9e18) {
        map->has_total = true; /* some writers add floats */
        map->total_bytes = (uint64_t)json_real_value(total);
    }
}

static ifkv_status parse_index(const char *where, const json_t *root, ifkv_shard_map *map) {
    json_t *weight_map = json_object_get(root, "weight_map");
    ifkv_status status;
    entry *of = NULL;
    int64_t n = 0;
    IFKV_REQUIRE(json_is_object(weight_map), IFKV_ERR_DATA, IFKV_E_INDEX,
                 "%s /weight_map: got %s, expected an object of names and files", where,
                 weight_map ? "another type" : "nothing");
    IFKV_TRY(collect_entries(where, weight_map, &of, &n));
    parse_total(root, map);
    IFKV_TRY_GOTO(status, collect_shards(where, of, n, map), free_of);
    IFKV_TRY_GOTO(status, copy_entries(where, of, n, map), free_of);
free_of:
    free(of);
    return status;
}

/* A file that is named like a shard of this very set, but that the index does not name, is a sign
 * of two downloads mixed up.  Other safetensors files are none of our business. */
static ifkv_status refuse_stray(const char *dir, const char *where, const ifkv_shard_map *map) {
    ifkv_status status = IFKV_OK;
    const struct dirent *file;
    char got[IFKV_QUOTE_BYTES];
    int n_total = 0, i, n;
    char tail;
    DIR *stream;
    if (sscanf(map->shard[0], "model-%5d-of-%5d.safetensor%c", &i, &n_total, &tail) != 3)
        return IFKV_OK;
    stream = opendir(dir);
    if (!stream) return IFKV_OK; /* opening the shards will tell */
    while (status == IFKV_OK && (file = readdir(stream)) != NULL) {
        const char *name = file->d_name;
        if (sscanf(name, "model-%5d-of-%5d.safetensor%c", &i, &n, &tail) != 3 || n != n_total ||
            strlen(name) != strlen(map->shard[0]) ||
            bsearch(&name, map->shard, (size_t)map->n_shard, sizeof *map->shard, compare_string))
            continue;
        status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                           "%s: shard not in the index: got %s, expected every shard \"of %d\" to "
                           "be named",
                           where, ifkv_path_quote(name, got), n_total);
    }
    closedir(stream);
    return status;
}

ifkv_status ifkv_shard_map_load(const char *dir, const char *path, ifkv_shard_map *map) {
    const ifkv_json_limits limits = {.max_bytes = INDEX_BYTES_MAX};
    char where[IFKV_QUOTE_BYTES];
    ifkv_status status;
    json_t *root = NULL;
    char *text;
    size_t bytes;
    ifkv_path_quote(path, where);
    IFKV_TRY(ifkv_file_read(path, INDEX_BYTES_MAX, IFKV_E_INDEX, &text, &bytes));
    IFKV_TRY_GOTO(status, ifkv_json_parse(where, text, bytes, &limits, IFKV_E_INDEX, &root),
                  free_text);
    IFKV_TRY_GOTO(status, parse_index(where, root, map), free_root);
    IFKV_TRY_GOTO(status, refuse_stray(dir, where, map), free_root);
free_root:
    json_decref(root);
free_text:
    free(text);
    return status;
}

/* Every name of the index must be in the shard it names, and every tensor of a shard in the index.
 * Both lists ascend, so one walk compares them. */
ifkv_status ifkv_shard_map_check(const ifkv_shard_map *map, const char *where,
                                 const ifkv_safetensors *set) {
    char name[IFKV_QUOTE_BYTES], first[IFKV_QUOTE_BYTES], second[IFKV_QUOTE_BYTES];
    uint64_t total = 0;
    int64_t i = 0, j = 0;
    while (i < map->n_tensor || j < set->n_tensor) {
        const ifkv_tensor *tensor = j < set->n_tensor ? set->by_name[j] : NULL;
        const int order = i >= map->n_tensor ? 1
                          : !tensor          ? -1
                                             : strcmp(map->tensor[i], tensor->name);
        if (order == 0 && map->of[i] == tensor->shard) {
            i++, j++;
            continue;
        }
        const char *of = order <= 0 ? map->tensor[i] : tensor->name;
        ifkv_quote(of, strlen(of), name);
        if (order < 0)
            return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                             "%s/" INDEX_NAME " tensor \"%s\": not in its shard: got nothing in "
                             "%s, expected it there",
                             where, name, ifkv_path_quote(map->shard[map->of[i]], first));
        ifkv_path_quote(set->shard[tensor->shard].name, first);
        if (order > 0)
            return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                             "%s/" INDEX_NAME " tensor \"%s\": not in the index: got it in %s, "
                             "expected it in /weight_map",
                             where, name, first);
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_INDEX,
                         "%s/" INDEX_NAME " tensor \"%s\": in another shard: got %s, expected %s",
                         where, name, first, ifkv_path_quote(map->shard[map->of[i]], second));
    }
    for (int k = 0; k < set->n_shard; k++)
        if (ifkv_add_overflow(total, set->shard[k].data_bytes, &total)) total = UINT64_MAX;
    if (map->has_total && map->total_bytes != total)
        ifkv_log(IFKV_LOG_WARN,
                 "%s/" INDEX_NAME " /metadata/total_size: got %llu, expected %llu bytes; ignored",
                 where, (unsigned long long)map->total_bytes, (unsigned long long)total);
    return IFKV_OK;
}

/* Name a file that looks like weights in another form, for the message. */
static bool find_other(const char *dir, char *quoted) {
    static const char *const suffix[] = {".safetensors", ".bin",  ".pt",        ".pth",
                                         ".gguf",        ".part", ".incomplete"};
    const struct dirent *file;
    bool is_found = false;
    DIR *stream = opendir(dir);
    if (!stream) return false;
    while (!is_found && (file = readdir(stream)) != NULL) {
        const size_t n = strlen(file->d_name);
        for (size_t i = 0; i < sizeof suffix / sizeof suffix[0] && !is_found; i++)
            is_found = n > strlen(suffix[i]) &&
                       strcmp(file->d_name + n - strlen(suffix[i]), suffix[i]) == 0;
        if (is_found) ifkv_path_quote(file->d_name, quoted);
    }
    closedir(stream);
    return is_found;
}

static ifkv_status map_single(ifkv_shard_map *map) {
    map->shard = calloc(1, sizeof *map->shard);
    if (map->shard) map->shard[0] = strdup(SINGLE_NAME);
    IFKV_REQUIRE(map->shard && map->shard[0], IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "safetensors: out of memory");
    map->n_shard = 1;
    return IFKV_OK;
}

/* lstat, so that a dangling link counts as there and is reported by name when it is opened. */
static bool is_there(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0 || errno != ENOENT;
}

ifkv_status ifkv_shard_map_find(const char *dir, ifkv_shard_map *map, bool *is_index) {
    char where[IFKV_QUOTE_BYTES], other[IFKV_QUOTE_BYTES];
    ifkv_status status = IFKV_OK;
    char *index = ifkv_path_join(dir, INDEX_NAME), *single = ifkv_path_join(dir, SINGLE_NAME);
    if (!index || !single) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "safetensors: out of memory");
        goto free_paths;
    }
    *is_index = is_there(index);
    if (*is_index) {
        status = ifkv_shard_map_load(dir, index, map);
        if (status == IFKV_OK && is_there(single))
            ifkv_log(IFKV_LOG_WARN,
                     "%s: both " SINGLE_NAME " and " INDEX_NAME " are there; the index is used",
                     ifkv_path_quote(dir, where));
    } else if (is_there(single)) {
        status = map_single(map);
    } else {
        const bool is_other = find_other(dir, other);
        status = IFKV_FAIL(IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE,
                           "%s: no weights: got %s, expected " SINGLE_NAME " or " INDEX_NAME,
                           ifkv_path_quote(dir, where), is_other ? other : "neither");
    }
free_paths:
    free(single);
    free(index);
    return status;
}
