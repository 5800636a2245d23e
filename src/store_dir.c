/* A store's directory: which entries are there, and which of them go first.  See store.h. */
#include "store_dir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"
#include "publish.h"
#include "store_file.h"

enum { KEY_DIGITS = 32 };

bool ifkv_store_is_entry_name(const char *name) {
    return strspn(name, "0123456789abcdef") == KEY_DIGITS && !strcmp(name + KEY_DIGITS, ".h5");
}

/* Last used first; ties by name, so that every process agrees. */
static int compare_files(const void *a, const void *b) {
    const ifkv_store_file *x = a, *y = b;
    if (x->used_s != y->used_s) return x->used_s < y->used_s ? 1 : -1;
    if (x->used_ns != y->used_ns) return x->used_ns < y->used_ns ? 1 : -1;
    return strcmp(x->name, y->name);
}

static bool append(ifkv_store_file **file, int64_t *n, const ifkv_store_file *one) {
    if ((*n & (*n - 1)) == 0) { /* at every power of two */
        ifkv_store_file *larger = realloc(*file, (size_t)(*n ? 2 * *n : 1) * sizeof **file);
        if (!larger) return false;
        *file = larger;
    }
    (*file)[(*n)++] = *one;
    return true;
}

ifkv_status ifkv_store_scan(const char *dir, ifkv_store_file **file_p, int64_t *n_p) {
    char quoted[IFKV_QUOTE_BYTES];
    struct stat st;
    bool is_ok = true;
    *file_p = NULL;
    *n_p = 0;
    DIR *stream = opendir(dir);
    IFKV_REQUIRE(stream, IFKV_ERR_NO_INPUT, IFKV_E_STORE, "%s: got '%s', expected a directory",
                 ifkv_path_quote(dir, quoted), strerror(errno));
    for (struct dirent *entry; is_ok && (entry = readdir(stream));) {
        ifkv_store_file one = {.n_row = -1};
        if (!ifkv_store_is_entry_name(entry->d_name) ||
            fstatat(dirfd(stream), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0 ||
            !S_ISREG(st.st_mode))
            continue;
        memcpy(one.name, entry->d_name, KEY_DIGITS + sizeof ".h5");
        one.bytes = (uint64_t)st.st_size;
        one.used_s = (int64_t)st.st_mtim.tv_sec;
        one.used_ns = (int64_t)st.st_mtim.tv_nsec;
        is_ok = append(file_p, n_p, &one);
    }
    closedir(stream);
    if (!is_ok) {
        free(*file_p);
        *file_p = NULL;
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "store: out of memory for a list");
    }
    if (*n_p) qsort(*file_p, (size_t)*n_p, sizeof **file_p, compare_files);
    return IFKV_OK;
}

ifkv_status ifkv_store_list(const char *dir, ifkv_store_file **file_p, int64_t *n_p) {
    IFKV_TRY(ifkv_store_scan(dir, file_p, n_p));
    for (int64_t i = 0; i < *n_p; i++) {
        char *path = ifkv_path_join(dir, (*file_p)[i].name);
        if (path) (*file_p)[i].n_row = ifkv_store_file_rows(path);
        free(path);
    }
    return IFKV_OK;
}

ifkv_status ifkv_store_evict(const char *dir, uint64_t max_bytes, int64_t *n_p, uint64_t *bytes_p) {
    ifkv_store_file *file;
    int64_t n;
    uint64_t kept = 0;
    *n_p = 0;
    *bytes_p = 0;
    IFKV_TRY(ifkv_store_scan(dir, &file, &n));
    for (int64_t i = 0; i < n; i++) {
        if (file[i].bytes <= max_bytes - kept) {
            kept += file[i].bytes;
            continue;
        }
        /* from here on all go: a small old one does not outlive a large newer one */
        max_bytes = kept;
        char *path = ifkv_path_join(dir, file[i].name);
        if (path && unlink(path) == 0) {
            ++*n_p;
            *bytes_p += file[i].bytes;
        }
        free(path);
    }
    free(file);
    return IFKV_OK;
}

ifkv_status ifkv_store_prune(const char *dir, uint64_t max_bytes, int64_t *n_p, uint64_t *bytes_p) {
    IFKV_TRY(ifkv_store_evict(dir, max_bytes, n_p, bytes_p));
    return ifkv_publish_share(dir);
}

static ifkv_status verify_file(const char *dir, const char *name) {
    ifkv_store_reader reader;
    char key[KEY_DIGITS + 1] = "", *path = ifkv_path_join(dir, name);
    IFKV_REQUIRE(path, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "store: out of memory");
    memcpy(key, name, KEY_DIGITS);
    ifkv_status status = ifkv_store_file_open(path, &reader);
    if (status == IFKV_OK) {
        status = ifkv_store_file_check(&reader, key);
        ifkv_store_file_close(&reader);
    }
    free(path);
    return status == IFKV_ERR_NO_INPUT ? IFKV_OK : status; /* evicted meanwhile */
}

ifkv_status ifkv_store_verify(const char *dir, ifkv_store_say_fn say, void *say_arg, int64_t *n_p) {
    ifkv_store_file *file;
    int64_t n_damaged = 0;
    char quoted[IFKV_QUOTE_BYTES];
    IFKV_TRY(ifkv_store_scan(dir, &file, n_p));
    for (int64_t i = 0; i < *n_p; i++) {
        if (verify_file(dir, file[i].name) == IFKV_OK) continue;
        n_damaged++;
        if (say) say(say_arg, ifkv_last_error()->text);
    }
    free(file);
    IFKV_REQUIRE(n_damaged == 0, IFKV_ERR_NUMERIC, IFKV_E_STORE,
                 "%s: got %lld damaged of %lld entries, expected none",
                 ifkv_path_quote(dir, quoted), (long long)n_damaged, (long long)*n_p);
    return IFKV_OK;
}
