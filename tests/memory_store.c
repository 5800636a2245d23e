/* A chunk store in memory.  See memory_store.h. */
#include "memory_store.h"

#include <stdlib.h>
#include <string.h>

static size_t bytes_of(const ifkv_store_entry *entry) {
    return (size_t)(entry->n_row * entry->n_kv_head * entry->d_head) * entry->element_bytes;
}

static int find(const memory_store *memory, const char *key) {
    int i = 0;
    while (i < memory->n_entry && strcmp(memory->entry[i].key, key)) i++;
    return i;
}

static bool memory_load(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn take,
                        void *take_arg) {
    memory_store *memory = arg;
    const size_t bytes = bytes_of(entry);
    mtx_lock(&memory->lock);
    const int i = find(memory, entry->key);
    bool is_there = i < memory->n_entry && !(memory->is_forgetful && i % 2);
    const int n = memory->n_layer_given ? memory->n_layer_given : entry->n_layer;
    char *data = is_there ? malloc(2 * bytes) : NULL;
    for (int layer = 0; layer < n && is_there; layer++) {
        memcpy(data, memory->entry[i].data + 2 * (size_t)layer * bytes, 2 * bytes);
        if (memory->n_layer_given) memset(data, 0x7f, 2 * bytes);
        is_there = take(take_arg, layer, data, data + bytes);
    }
    free(data);
    is_there = is_there && !memory->n_layer_given;
    memory->n_load += is_there;
    mtx_unlock(&memory->lock);
    return is_there;
}

static void memory_save(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn give,
                        void *give_arg) {
    memory_store *memory = arg;
    const size_t bytes = bytes_of(entry);
    mtx_lock(&memory->lock);
    const int i = find(memory, entry->key);
    if (i == memory->n_entry && i < MEMORY_MAX_ENTRY) memory->n_entry++;
    if (i < MEMORY_MAX_ENTRY) {
        memory_entry *to = &memory->entry[i];
        memcpy(to->key, entry->key, sizeof to->key);
        to->n_token = entry->n_token;
        if (!to->data) to->data = malloc(2 * bytes * (size_t)entry->n_layer);
        for (int layer = 0; layer < entry->n_layer; layer++) {
            char *at = to->data + 2 * (size_t)layer * bytes;
            give(give_arg, layer, at, at + bytes);
        }
        memory->n_save++;
    }
    mtx_unlock(&memory->lock);
}

static bool memory_has(void *arg, const ifkv_store_entry *entry) {
    memory_store *of = arg;
    mtx_lock(&of->lock);
    const bool is_there = find(of, entry->key) < of->n_entry;
    mtx_unlock(&of->lock);
    return is_there;
}

bool memory_store_init(memory_store *memory) {
    *memory = (memory_store){.table = {.size = sizeof memory->table,
                                       .arg = memory,
                                       .load = memory_load,
                                       .save = memory_save,
                                       .has = memory_has}};
    return mtx_init(&memory->lock, mtx_plain) == thrd_success;
}

void memory_store_empty(memory_store *memory) {
    for (int i = 0; i < memory->n_entry; i++) free(memory->entry[i].data);
    memset(memory->entry, 0, sizeof memory->entry);
    memory->n_entry = memory->n_load = memory->n_save = memory->n_layer_given = 0;
    memory->is_forgetful = false;
}

void memory_store_fini(memory_store *memory) {
    memory_store_empty(memory);
    mtx_destroy(&memory->lock);
}
