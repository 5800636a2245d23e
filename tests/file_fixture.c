/* See file_fixture.h.  A failure here is a broken test machine: it ends the program. */
#include "file_fixture.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void need(bool is_ok, const char *what) {
    if (is_ok) return;
    fprintf(stderr, "fixture: %s: %s\n", what, strerror(errno));
    abort();
}

/* ---- files ---- */

char *fixture_dir(void) {
    const char *base = getenv("TMPDIR");
    char path[4096];
    snprintf(path, sizeof path, "%s/ifkv-test-XXXXXX", base && *base ? base : "/tmp");
    need(mkdtemp(path), path);
    return strdup(path);
}

static void remove_tree(const char *path) {
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char child[4096];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
        if (unlink(child) != 0) remove_tree(child);
    }
    if (dir) closedir(dir);
    rmdir(path);
}

void fixture_remove(char *dir) {
    remove_tree(dir);
    free(dir);
}

const char *fixture_path(const char *dir, const char *name) {
    static char paths[8][4096];
    static int i;
    i = (i + 1) % 8;
    snprintf(paths[i], sizeof paths[i], "%s/%s", dir, name);
    return paths[i];
}

void fixture_write(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    need(file && fwrite(data, 1, bytes, file) == bytes, path);
    need(fclose(file) == 0, path);
}

void fixture_write_text(const char *path, const char *text) {
    fixture_write(path, text, strlen(text));
}

char *fixture_read(const char *path, size_t *bytes_p) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    const size_t n = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(n + 1);
    need(text && fread(text, 1, n, file) == n, path);
    fclose(file);
    text[n] = 0;
    if (bytes_p) *bytes_p = n;
    return text;
}

bool fixture_exists(const char *path) {
    return access(path, F_OK) == 0;
}

bool fixture_flip(const char *path, const void *pattern, size_t bytes) {
    size_t n;
    char *text = fixture_read(path, &n);
    char *at = text ? memmem(text, n, pattern, bytes) : NULL;
    if (at) {
        *at ^= 1;
        fixture_write(path, text, n);
    }
    free(text);
    return at;
}

/* ---- HDF5 requests ---- */

const char fixture_h5_jsonl[] =
    "{\"id\":\"one\",\"prefix\":[1],\"chunks\":[[2,3],[4],[5,6,7]],\"prompt\":[8,9],"
    "\"question\":[9],\"answers\":[\"a\\nb\",\"\\u00e9\"],\"meta\":{\"k\":[1,2.5]},\"max_new\":7}\n"
    "{\"id\":\"tw\\u00f6\",\"context\":[10,11,12],\"prompt\":[13,14,15,16]}\n";

static void put_text(hid_t at, const char *name, const char *text, bool is_variable) {
    const hid_t space = H5Screate(H5S_SCALAR), type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, is_variable ? H5T_VARIABLE : strlen(text));
    H5Tset_cset(type, H5T_CSET_UTF8);
    if (!is_variable) H5Tset_strpad(type, H5T_STR_NULLPAD);
    const hid_t attribute = H5Acreate2(at, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    need(attribute >= 0 && H5Awrite(attribute, type, is_variable ? (const void *)&text : text) >= 0,
         name);
    H5Aclose(attribute);
    H5Tclose(type);
    H5Sclose(space);
}

static void put_ids(hid_t at, const char *name, hid_t type, hid_t layout, int n_dim,
                    const hsize_t *dim, const int64_t *id) {
    const hid_t space = H5Screate_simple(n_dim, dim, NULL);
    const hid_t set = H5Dcreate2(at, name, type, space, H5P_DEFAULT, layout, H5P_DEFAULT);
    need(set >= 0, name);
    if (id) need(H5Dwrite(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, id) >= 0, name);
    H5Dclose(set);
    H5Sclose(space);
}

static void put_list(hid_t at, const char *name, hsize_t n, const int64_t *id) {
    put_ids(at, name, H5T_STD_I32LE, H5P_DEFAULT, 1, &n, id);
}

static const int64_t prompt[] = {13, 14, 15, 16};
static const hsize_t n_prompt = 4;

/* Not written, but with its storage in place. */
static void put_empty(hid_t at, hid_t type, hid_t space) {
    const hid_t layout = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_alloc_time(layout, H5D_ALLOC_TIME_EARLY);
    const hid_t set = H5Dcreate2(at, "prompt", type, space, H5P_DEFAULT, layout, H5P_DEFAULT);
    need(set >= 0, "prompt");
    H5Dclose(set);
    H5Pclose(layout);
    H5Sclose(space);
    H5Tclose(type);
}

static void put_space(hid_t at, hid_t space) {
    put_empty(at, H5Tcopy(H5T_STD_I32LE), space);
}

static void put_typed(hid_t at, hid_t type) {
    put_empty(at, type, H5Screate_simple(1, &n_prompt, NULL));
}

/* The variants that are made by the storage layout. */
static void put_stored(hid_t at, fixture_h5_kind kind) {
    const hid_t layout = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t huge = (hsize_t)1 << 50, wide = (hsize_t)1 << 27, thin = 1 << 20, two[] = {2, 2};
    const int64_t pattern[] = {H5_PATTERN, 14, 15, 16};
    const char filler[64] = {0};
    const hsize_t origin = 0;
    switch (kind) {
    case H5_DEFLATED:
        H5Pset_chunk(layout, 1, &n_prompt);
        H5Pset_shuffle(layout);
        H5Pset_deflate(layout, 6);
        put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &n_prompt, prompt);
        break;
    case H5_FLETCHER:
        H5Pset_chunk(layout, 1, &n_prompt);
        H5Pset_fletcher32(layout);
        put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &n_prompt, pattern);
        break;
    case H5_RANK_2: put_ids(at, "prompt", H5T_STD_I32LE, layout, 2, two, prompt); break;
    case H5_EXTERNAL_STORAGE:
        H5Pset_external(layout, "/etc/passwd", 0, 16);
        put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &n_prompt, NULL);
        break;
    case H5_VIRTUAL: {
        const hid_t space = H5Screate_simple(1, &n_prompt, NULL);
        H5Pset_virtual(layout, space, "/tmp/other.h5", "/x", space);
        H5Sclose(space);
        put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &n_prompt, NULL);
        break;
    }
    case H5_HUGE: put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &huge, NULL); break;
    case H5_FILTER:
        H5Pset_chunk(layout, 1, &n_prompt);
        H5Pset_filter(layout, 32015, H5Z_FLAG_OPTIONAL, 0, NULL);
        put_ids(at, "prompt", H5T_STD_I32LE, layout, 1, &n_prompt, prompt);
        break;
    default: { /* H5_HUGE_CHUNK, H5_THIN: a chunk of a few bytes stands for many elements */
        const hsize_t chunk = kind == H5_THIN ? thin : wide, no_limit = H5S_UNLIMITED;
        const hid_t space = H5Screate_simple(1, kind == H5_THIN ? &thin : &n_prompt, &no_limit);
        H5Pset_chunk(layout, 1, &chunk);
        H5Pset_deflate(layout, 6);
        const hid_t set =
            H5Dcreate2(at, "prompt", H5T_STD_I32LE, space, H5P_DEFAULT, layout, H5P_DEFAULT);
        H5Sclose(space);
        need(H5Dwrite_chunk(set, H5P_DEFAULT, 0, &origin, sizeof filler, filler) >= 0, "chunk");
        H5Dclose(set);
    }
    }
    H5Pclose(layout);
}

static void put_prompt(hid_t file, hid_t at, fixture_h5_kind kind) {
    const hsize_t none = 0;
    switch (kind) {
    case H5_BIG_ENDIAN:
        put_ids(at, "prompt", H5T_STD_I32BE, H5P_DEFAULT, 1, &n_prompt, prompt);
        break;
    case H5_INT64: put_ids(at, "prompt", H5T_STD_I64LE, H5P_DEFAULT, 1, &n_prompt, prompt); break;
    case H5_FLOAT: put_typed(at, H5Tcopy(H5T_IEEE_F32LE)); break;
    case H5_UNSIGNED: put_typed(at, H5Tcopy(H5T_STD_U32LE)); break;
    case H5_COMPOUND: {
        const hid_t type = H5Tcreate(H5T_COMPOUND, 8);
        H5Tinsert(type, "x", 0, H5T_STD_I32LE);
        put_typed(at, type);
        break;
    }
    case H5_TEXT: {
        const hid_t type = H5Tcopy(H5T_C_S1);
        H5Tset_size(type, H5T_VARIABLE);
        put_typed(at, type);
        break;
    }
    case H5_RANK_0: put_space(at, H5Screate(H5S_SCALAR)); break;
    case H5_NULL_SPACE: put_space(at, H5Screate(H5S_NULL)); break;
    case H5_EMPTY: put_ids(at, "prompt", H5T_STD_I32LE, H5P_DEFAULT, 1, &none, NULL); break;
    case H5_MISSING: break;
    case H5_GROUP: H5Gclose(H5Gcreate2(at, "prompt", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)); break;
    case H5_EXTERNAL_LINK:
        H5Lcreate_external("/tmp/other.h5", "/x", at, "prompt", H5P_DEFAULT, H5P_DEFAULT);
        break;
    case H5_SOFT_LINK:
        H5Lcreate_soft("/requests/000000/prompt", at, "prompt", H5P_DEFAULT, H5P_DEFAULT);
        break;
    case H5_CYCLE: H5Lcreate_hard(file, "/requests", at, "prompt", H5P_DEFAULT, H5P_DEFAULT); break;
    case H5_DEFLATED:
    case H5_FLETCHER:
    case H5_RANK_2:
    case H5_EXTERNAL_STORAGE:
    case H5_VIRTUAL:
    case H5_HUGE:
    case H5_HUGE_CHUNK:
    case H5_THIN:
    case H5_FILTER: put_stored(at, kind); break;
    default: put_list(at, "prompt", n_prompt, prompt);
    }
}

static void put_first(hid_t requests, fixture_h5_kind kind) {
    static const int64_t prefix[] = {1}, tokens[] = {2, 3, 4, 5, 6, 7}, question[] = {9};
    static const int64_t first_prompt[] = {8, 9}, offsets[] = {0, 2, 3, 6}, bad[] = {0, 2, 3, 5};
    const int64_t max_new = 7;
    const hid_t at = H5Gcreate2(requests, "000000", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    put_list(at, "prefix", 1, prefix);
    put_list(at, "chunk_tokens", 6, tokens);
    put_list(at, "chunk_offsets", 4, kind == H5_OFFSETS ? bad : offsets);
    put_list(at, "prompt", 2, first_prompt);
    put_list(at, "question", 1, question);
    if (kind != H5_NO_ID) put_text(at, "id", "one", false);
    put_text(at, "answers", "[\"a\\nb\", \"\xc3\xa9\"]", true);
    put_text(at, "meta", kind == H5_BAD_META ? "{\"k\"" : "{\"k\": [1, 2.5]}", true);
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute =
        H5Acreate2(at, "max_new", H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, H5T_NATIVE_INT64, &max_new);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Gclose(at);
}

void fixture_h5_write(const char *path, fixture_h5_kind kind) {
    static const int64_t context[] = {10, 11, 12};
    const hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    need(file >= 0, path);
    if (kind != H5_NO_FORMAT) put_text(file, "format", "ifkv-requests", true);
    const hid_t requests = H5Gcreate2(file, "requests", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    put_first(requests, kind);
    const hid_t at = H5Gcreate2(requests, kind == H5_GAP ? "000002" : "000001", H5P_DEFAULT,
                                H5P_DEFAULT, H5P_DEFAULT);
    put_text(at, "id", "tw\xc3\xb6", true);
    put_list(at, "context", 3, context);
    put_prompt(file, at, kind);
    if (kind == H5_UNKNOWN_MEMBER) put_list(at, "promt", n_prompt, prompt);
    H5Gclose(at);
    H5Gclose(requests);
    need(H5Fclose(file) >= 0, path);
}
