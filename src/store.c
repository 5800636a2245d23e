/* The chunk store: the callbacks of a prefill over a directory.  See store.h. */
#include "store_dir.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#include "file.h"
#include "publish.h"
#include "store_file.h"

struct ifkv_chunk_store {
    char *dir; /* owned */
    uint64_t max_bytes;
    ifkv_store_say_fn say;
    void *say_arg;
    ifkv_store table;
    mtx_t lock; /* of HDF5, which need not be thread-safe, and of all below */
    int n_holder;
    bool is_keeping;   /* entries are saved: until a write fails */
    bool has_told_big; /* that an entry is larger than the bound */
    int64_t n_temporary;
};

__attribute__((format(printf, 2, 3))) static void warn(const ifkv_chunk_store *store,
                                                       const char *format, ...) {
    char line[1200];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (store->say) store->say(store->say_arg, line);
}

static char *entry_path(const ifkv_chunk_store *store, const ifkv_store_entry *entry) {
    char name[40];
    snprintf(name, sizeof name, "%s.h5", entry->key);
    return ifkv_path_join(store->dir, name);
}

/* ---- load ---- */

static ifkv_status load_file(ifkv_chunk_store *store, const char *path,
                             const ifkv_store_entry *entry, ifkv_store_layer_fn take, void *arg,
                             bool *is_taken_p) {
    ifkv_store_reader reader;
    IFKV_TRY(ifkv_store_file_open(path, &reader));
    mtx_lock(&store->lock);
    const ifkv_status status = ifkv_store_file_read(&reader, entry, take, arg, is_taken_p);
    mtx_unlock(&store->lock);
    /* used now; a file that is not ours to touch ages as it is */
    if (status == IFKV_OK) futimens(reader.fd, NULL);
    ifkv_store_file_close(&reader);
    return status;
}

static bool load_entry(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn take,
                       void *take_arg) {
    ifkv_chunk_store *store = arg;
    bool is_taken = true;
    char *path = entry_path(store, entry);
    if (!path) return false;
    const ifkv_status status = load_file(store, path, entry, take, take_arg, &is_taken);
    if (status != IFKV_OK && status != IFKV_ERR_NO_INPUT)
        warn(store, "store: %s; the chunk is encoded", ifkv_last_error()->text);
    free(path);
    return status == IFKV_OK && is_taken;
}

/* ---- save ---- */

/* Something under the entry's name that a file cannot replace; load has warned of it. */
static bool is_blocked(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode);
}

/* True, and told once, where an entry of so many bytes can never be within the bound. */
static bool is_too_big(ifkv_chunk_store *store, const ifkv_store_entry *entry, uint64_t bytes) {
    if (store->max_bytes == 0 || bytes <= store->max_bytes) return false;
    if (!store->has_told_big)
        warn(store,
             "store: %s: an entry of %lld tokens takes %llu bytes, more than the bound of %llu; "
             "such entries are not kept",
             store->dir, (long long)entry->n_row, (unsigned long long)bytes,
             (unsigned long long)store->max_bytes);
    store->has_told_big = true;
    return true;
}

/* Room is made before the entry appears, so that the bound holds at every instant; between
 * processes within what each is about to add.  *is_kept_p false: there is no room for it. */
static ifkv_status make_room(ifkv_chunk_store *store, const ifkv_store_entry *entry,
                             const char *tmp, bool *is_kept_p) {
    struct stat st;
    int64_t n;
    uint64_t bytes;
    if (store->max_bytes == 0 || stat(tmp, &st) != 0) return IFKV_OK;
    *is_kept_p = !is_too_big(store, entry, (uint64_t)st.st_size);
    if (!*is_kept_p) return IFKV_OK;
    return ifkv_store_evict(store->dir, store->max_bytes - (uint64_t)st.st_size, &n, &bytes);
}

static ifkv_status save_file(ifkv_chunk_store *store, const ifkv_store_entry *entry,
                             ifkv_store_layer_fn give, void *arg) {
    char name[40], unique[100], *tmp;
    struct timespec now;
    uint64_t digest;
    bool is_given, is_kept = true;
    ifkv_status status;
    /* pids of several machines or containers may be equal: the name under .tmp holds a time too */
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(name, sizeof name, "%s.h5", entry->key);
    snprintf(unique, sizeof unique, "%s.%llx%08lx", name, (long long)now.tv_sec, now.tv_nsec);
    IFKV_TRY(ifkv_publish_path(store->dir, unique, (int)(store->n_temporary++ & 0xffff), &tmp));
    IFKV_TRY_GOTO(status, ifkv_store_file_write(tmp, entry, give, arg, &is_given), err_abandon);
    if (!is_given) goto err_abandon; /* the prefill itself has failed and tells it */
    IFKV_TRY_GOTO(status, make_room(store, entry, tmp, &is_kept), err_abandon);
    if (!is_kept) goto err_abandon;
    status = ifkv_publish_h5(store->dir, name, tmp, &digest);
    free(tmp);
    return status;
err_abandon:
    ifkv_publish_abandon(tmp);
    free(tmp);
    return status;
}

static uint64_t entry_bytes(const ifkv_store_entry *entry) {
    return 2 * (uint64_t)entry->n_layer * (uint64_t)entry->n_row *
           (uint64_t)(entry->n_kv_head * entry->d_head) * entry->element_bytes;
}

static void save_entry(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn give,
                       void *give_arg) {
    ifkv_chunk_store *store = arg;
    char *path = entry_path(store, entry);
    if (!path) return;
    mtx_lock(&store->lock);
    if (store->is_keeping && !is_too_big(store, entry, entry_bytes(entry)) && !is_blocked(path) &&
        save_file(store, entry, give, give_arg) != IFKV_OK) {
        store->is_keeping = false;
        warn(store, "store: %s; no more entries are kept", ifkv_last_error()->text);
    }
    mtx_unlock(&store->lock);
    free(path);
}

static bool has_entry(void *arg, const ifkv_store_entry *entry) {
    const ifkv_chunk_store *store = arg;
    char *path = entry_path(store, entry);
    const bool is_there = path && access(path, R_OK) == 0;
    free(path);
    return is_there;
}

/* ---- open, close ---- */

/* Serve from what can only be read; fail where there is nothing. */
static ifkv_status prepare_dir(ifkv_chunk_store *store) {
    struct stat st;
    const ifkv_status status = ifkv_publish_share(store->dir);
    store->is_keeping = status == IFKV_OK;
    if (status == IFKV_OK || stat(store->dir, &st) != 0 || !S_ISDIR(st.st_mode)) return status;
    warn(store, "store: %s; no entries are kept", ifkv_last_error()->text);
    return IFKV_OK;
}

ifkv_status ifkv_chunk_store_open(const ifkv_chunk_store_options *options,
                                  ifkv_chunk_store **store_p) {
    ifkv_status status;
    ifkv_chunk_store *store = calloc(1, sizeof *store);
    char *dir = strdup(options->dir);
    if (!store || !dir || mtx_init(&store->lock, mtx_plain) != thrd_success) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "store: out of memory");
        goto err_free;
    }
    store->dir = dir;
    store->max_bytes = options->max_bytes;
    store->say = options->say;
    store->say_arg = options->say_arg;
    store->n_holder = 1;
    store->table = (ifkv_store){.size = sizeof store->table,
                                .arg = store,
                                .load = load_entry,
                                .save = save_entry,
                                .has = has_entry};
    IFKV_TRY_GOTO(status, prepare_dir(store), err_destroy_lock);
    *store_p = store;
    return IFKV_OK;
err_destroy_lock:
    mtx_destroy(&store->lock);
err_free:
    free(dir);
    free(store);
    return status;
}

ifkv_chunk_store *ifkv_chunk_store_share(ifkv_chunk_store *store) {
    mtx_lock(&store->lock);
    store->n_holder++;
    mtx_unlock(&store->lock);
    return store;
}

void ifkv_chunk_store_close(ifkv_chunk_store *store) {
    if (!store) return;
    mtx_lock(&store->lock);
    const bool is_last = --store->n_holder == 0;
    mtx_unlock(&store->lock);
    if (!is_last) return;
    mtx_destroy(&store->lock);
    free(store->dir);
    free(store);
}

const ifkv_store *ifkv_chunk_store_table(const ifkv_chunk_store *store) {
    return store ? &store->table : NULL;
}
