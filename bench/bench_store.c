/* A chunk store in host memory.  See bench.h. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "status.h"

typedef struct entry {
    struct entry *next;
    char key[33];
    size_t layer_bytes; /* of K, and as much of V */
    unsigned char data[];
} entry;

struct bench_store {
    ifkv_store table;
    entry *first; /* owned list */
};

static size_t layer_bytes(const ifkv_store_entry *e) {
    return (size_t)e->n_row * (size_t)e->n_kv_head * (size_t)e->d_head * e->element_bytes;
}

static entry *find(const bench_store *store, const ifkv_store_entry *wanted) {
    for (entry *e = store->first; e; e = e->next)
        if (!strcmp(e->key, wanted->key) && e->layer_bytes == layer_bytes(wanted)) return e;
    return NULL;
}

static bool pass_layers(entry *e, int n_layer, ifkv_store_layer_fn fn, void *arg) {
    for (int layer = 0; layer < n_layer; layer++) {
        unsigned char *k = e->data + 2 * (size_t)layer * e->layer_bytes;
        if (!fn(arg, layer, k, k + e->layer_bytes)) return false;
    }
    return true;
}

static bool load(void *arg, const ifkv_store_entry *wanted, ifkv_store_layer_fn take,
                 void *take_arg) {
    entry *e = find(arg, wanted);
    return e && pass_layers(e, wanted->n_layer, take, take_arg);
}

static void save(void *arg, const ifkv_store_entry *given, ifkv_store_layer_fn give,
                 void *give_arg) {
    bench_store *store = arg;
    const size_t bytes = layer_bytes(given);
    entry *e = find(store, given) ? NULL : malloc(sizeof *e + 2 * (size_t)given->n_layer * bytes);
    if (!e) return;
    e->layer_bytes = bytes;
    memcpy(e->key, given->key, sizeof e->key);
    if (!pass_layers(e, given->n_layer, give, give_arg)) {
        free(e);
        return;
    }
    e->next = store->first;
    store->first = e;
}

ifkv_status bench_store_create(bench_store **store_p) {
    bench_store *store = calloc(1, sizeof *store);
    IFKV_REQUIRE(store, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    store->table =
        (ifkv_store){.size = sizeof store->table, .arg = store, .load = load, .save = save};
    *store_p = store;
    return IFKV_OK;
}

void bench_store_destroy(bench_store *store) {
    if (!store) return;
    for (entry *e = store->first, *next; e; e = next) {
        next = e->next;
        free(e);
    }
    free(store);
}

const ifkv_store *bench_store_table(bench_store *store) {
    return store ? &store->table : NULL;
}
