/* A chunk store that is a list in memory, for tests of who looks into it and when.  Ranks that are
 * threads share one. */
#ifndef IFKV_TESTS_MEMORY_STORE_H
#define IFKV_TESTS_MEMORY_STORE_H

#include "ifkv.h"

#include <threads.h>

enum { MEMORY_MAX_ENTRY = 64 };

typedef struct memory_entry {
    char key[33];
    int64_t n_token;
    char *data; /* [n_layer, 2, layer_bytes] */
} memory_entry;

typedef struct memory_store {
    ifkv_store table;
    mtx_t lock;
    memory_entry entry[MEMORY_MAX_ENTRY];
    int n_entry, n_load, n_save;
    int n_layer_given; /* stop behind so many layers and call it damaged; 0: never */
    bool is_forgetful; /* of every other entry */
} memory_store;

/* False if there is no lock to be had. */
bool memory_store_init(memory_store *memory);
/* Forget all entries and counts. */
void memory_store_empty(memory_store *memory);
void memory_store_fini(memory_store *memory);

#endif
