/* A set of safetensors files: headers in, byte ranges out.  See safetensors.h. */
#include "safetensors.h"

#include "digest.h"
#include "log.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define E_FILE IFKV_E_TENSOR_FILE

static const char GIT_LFS[] = "version https://git-lfs.github.com/spec/";

static uint64_t decode_u64(const unsigned char *bytes) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--) value = value << 8 | bytes[i];
    return value;
}

/* Read the length field and refuse it unless the header it states can be there. */
static ifkv_status read_length(int fd, const ifkv_shard *shard, const char *where,
                               uint64_t *header_bytes) {
    unsigned char start[sizeof GIT_LFS - 1];
    const uint64_t n_file = shard->id.bytes;
    uint64_t n;
    IFKV_REQUIRE(n_file >= 8, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "%s: file too short: got %llu bytes, expected at least 8 and a header", where,
                 (unsigned long long)n_file);
    if (n_file >= sizeof start) {
        IFKV_TRY(ifkv_file_pread(fd, shard->path, 0, start, sizeof start, E_FILE));
        IFKV_REQUIRE(memcmp(start, GIT_LFS, sizeof start) != 0, IFKV_ERR_DATA, E_FILE,
                     "%s: not a safetensors file: got a git-lfs pointer of %llu bytes, expected "
                     "the file it stands for",
                     where, (unsigned long long)n_file);
    }
    IFKV_TRY(ifkv_file_pread(fd, shard->path, 0, start, 8, E_FILE));
    n = decode_u64(start);
    IFKV_REQUIRE(n <= IFKV_TENSOR_MAX_HEADER, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "%s byte 0: header too long: got %llu bytes, expected at most %d", where,
                 (unsigned long long)n, IFKV_TENSOR_MAX_HEADER);
    IFKV_REQUIRE(n >= 2 && n <= n_file - 8, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "%s byte 0: header length does not fit the file: got %llu bytes, expected 2 to "
                 "%llu",
                 where, (unsigned long long)n, (unsigned long long)(n_file - 8));
    *header_bytes = n;
    return IFKV_OK;
}

static ifkv_status read_header(int fd, ifkv_shard *shard, int i_shard, ifkv_tensor_list *list) {
    char where[IFKV_QUOTE_BYTES];
    uint64_t n = 0;
    ifkv_path_quote(shard->path, where);
    IFKV_TRY(read_length(fd, shard, where, &n));
    shard->header = malloc((size_t)n + 1);
    IFKV_REQUIRE(shard->header, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "%s: out of memory: expected room for %llu bytes", where, (unsigned long long)n);
    IFKV_TRY(ifkv_file_pread(fd, shard->path, 8, shard->header, (size_t)n, E_FILE));
    shard->header[n] = 0;
    shard->header_digest = ifkv_digest_bytes(shard->header, (size_t)n);
    shard->data_bytes = shard->id.bytes - 8 - n;
    return ifkv_safetensors_parse(where, shard->header, (size_t)n, shard->data_bytes, i_shard,
                                  list);
}

static ifkv_status open_shard(const char *dir, const char *name, int i_shard, ifkv_shard *shard,
                              ifkv_tensor_list *list) {
    ifkv_status status;
    int fd;
    shard->name = strdup(name);
    shard->path = ifkv_path_join(dir, name);
    IFKV_REQUIRE(shard->name && shard->path, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "safetensors: out of memory");
    IFKV_TRY(ifkv_file_open(shard->path, E_FILE, &fd, &shard->id));
    status = read_header(fd, shard, i_shard, list);
    close(fd);
    return status;
}

static int compare_name(const void *a, const void *b) {
    const ifkv_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* Sort by name, and refuse a name that occurs twice, in one file or in two. */
static ifkv_status index_names(const char *dir, ifkv_safetensors *set) {
    char where[IFKV_QUOTE_BYTES], name[IFKV_QUOTE_BYTES], first[IFKV_QUOTE_BYTES],
        second[IFKV_QUOTE_BYTES];
    set->by_name = malloc(((size_t)set->n_tensor + 1) * sizeof *set->by_name);
    IFKV_REQUIRE(set->by_name, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "safetensors: out of memory");
    for (int64_t i = 0; i < set->n_tensor; i++) set->by_name[i] = &set->tensor[i];
    qsort(set->by_name, (size_t)set->n_tensor, sizeof *set->by_name, compare_name);
    for (int64_t i = 1; i < set->n_tensor; i++) {
        const ifkv_tensor *a = set->by_name[i - 1], *b = set->by_name[i];
        if (strcmp(a->name, b->name) != 0) continue;
        const ifkv_shard *in_a = &set->shard[a->shard], *in_b = &set->shard[b->shard];
        return IFKV_FAIL(IFKV_ERR_DATA, a->shard == b->shard ? IFKV_E_TENSOR_HEADER : IFKV_E_INDEX,
                         "%s tensor \"%s\": name occurs twice: got it in %s and in %s, expected it "
                         "once",
                         ifkv_path_quote(dir, where), ifkv_quote(a->name, strlen(a->name), name),
                         ifkv_path_quote(in_a->name, first), ifkv_path_quote(in_b->name, second));
    }
    return IFKV_OK;
}

static ifkv_status open_all(const char *dir, const ifkv_shard_map *map, ifkv_safetensors *set) {
    ifkv_tensor_list list = {0};
    ifkv_status status = IFKV_OK;
    set->shard = calloc((size_t)map->n_shard, sizeof *set->shard);
    IFKV_REQUIRE(set->shard, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "safetensors: out of memory");
    set->n_shard = map->n_shard;
    for (int i = 0; i < map->n_shard && status == IFKV_OK; i++)
        status = open_shard(dir, map->shard[i], i, &set->shard[i], &list);
    set->tensor = list.tensor;
    set->n_tensor = list.n;
    return status == IFKV_OK ? index_names(dir, set) : status;
}

ifkv_status ifkv_safetensors_open(const char *dir, ifkv_safetensors **set_p) {
    char where[IFKV_QUOTE_BYTES];
    ifkv_shard_map map = {0};
    ifkv_safetensors *set = NULL;
    ifkv_status status;
    bool is_index = false;
    IFKV_TRY_GOTO(status, ifkv_shard_map_find(dir, &map, &is_index), fini_map);
    set = calloc(1, sizeof *set);
    if (!set) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "safetensors: out of memory");
        goto fini_map;
    }
    set->open_shard = -1;
    IFKV_TRY_GOTO(status, open_all(dir, &map, set), fini_map);
    if (is_index)
        IFKV_TRY_GOTO(status, ifkv_shard_map_check(&map, ifkv_path_quote(dir, where), set),
                      fini_map);
    *set_p = set;
    set = NULL;
fini_map:
    ifkv_safetensors_close(set);
    ifkv_shard_map_fini(&map);
    return status;
}

void ifkv_safetensors_close(ifkv_safetensors *set) {
    if (!set) return;
    if (set->open_shard >= 0) close(set->fd);
    for (int i = 0; i < set->n_shard; i++) {
        free(set->shard[i].name);
        free(set->shard[i].path);
        free(set->shard[i].header);
    }
    free(set->shard);
    free(set->tensor);
    free(set->by_name);
    free(set);
}

const ifkv_tensor *ifkv_safetensors_find(const ifkv_safetensors *set, const char *name) {
    const ifkv_tensor key = {.name = name}, *of_key = &key;
    const ifkv_tensor **found =
        bsearch(&of_key, set->by_name, (size_t)set->n_tensor, sizeof *set->by_name, compare_name);
    return found ? *found : NULL;
}

static ifkv_status check_unchanged(const ifkv_shard *shard, const ifkv_file_id *now) {
    char where[IFKV_QUOTE_BYTES];
    if (ifkv_file_id_equal(&shard->id, now)) return IFKV_OK;
    return IFKV_FAIL(
        IFKV_ERR_DATA, IFKV_E_TENSOR_CHANGED,
        "%s: file changed while reading: got inode %llu with %llu bytes of time %lld.%09lld, "
        "expected inode %llu with %llu bytes of time %lld.%09lld",
        ifkv_path_quote(shard->path, where), (unsigned long long)now->inode,
        (unsigned long long)now->bytes, (long long)now->mtime_s, (long long)now->mtime_ns,
        (unsigned long long)shard->id.inode, (unsigned long long)shard->id.bytes,
        (long long)shard->id.mtime_s, (long long)shard->id.mtime_ns);
}

/* The file that was read must still be the one whose header was read. */
ifkv_status ifkv_safetensors_finish(ifkv_safetensors *set) {
    const ifkv_shard *shard;
    ifkv_file_id now;
    ifkv_status status;
    if (set->open_shard < 0) return IFKV_OK;
    shard = &set->shard[set->open_shard];
    status = ifkv_file_identify(set->fd, shard->path, E_FILE, &now);
    if (status == IFKV_OK) status = check_unchanged(shard, &now);
    close(set->fd);
    set->open_shard = -1;
    return status;
}

static ifkv_status switch_shard(ifkv_safetensors *set, int i_shard) {
    const ifkv_shard *shard = &set->shard[i_shard];
    ifkv_file_id now;
    ifkv_status status;
    int fd;
    IFKV_TRY(ifkv_safetensors_finish(set));
    IFKV_TRY(ifkv_file_open(shard->path, E_FILE, &fd, &now));
    status = check_unchanged(shard, &now);
    if (status != IFKV_OK) {
        close(fd);
        return status;
    }
    set->fd = fd;
    set->open_shard = i_shard;
    return IFKV_OK;
}

ifkv_status ifkv_safetensors_read(ifkv_safetensors *set, const ifkv_tensor *tensor, uint64_t first,
                                  void *to, size_t bytes) {
    IFKV_REQUIRE(first <= tensor->bytes && bytes <= tensor->bytes - first, IFKV_ERR_INTERNAL,
                 IFKV_E_TENSOR_RANGE,
                 "tensor \"%s\": read outside: got bytes %llu + %zu, expected at most %llu",
                 tensor->name, (unsigned long long)first, bytes, (unsigned long long)tensor->bytes);
    if (set->open_shard != tensor->shard) IFKV_TRY(switch_shard(set, tensor->shard));
    return ifkv_file_pread(set->fd, set->shard[tensor->shard].path, tensor->begin + first, to,
                           bytes, E_FILE);
}
