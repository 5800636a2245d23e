/* Inside of the chunk store: its directory, for store.c.  Everyone else includes store.h. */
#ifndef IFKV_SRC_STORE_DIR_H
#define IFKV_SRC_STORE_DIR_H

#include "store.h"

bool ifkv_store_is_entry_name(const char *name);
/* As ifkv_store_list, but opens no file: n_row is -1. */
ifkv_status ifkv_store_scan(const char *dir, ifkv_store_file **file_p, int64_t *n_p);
/* Remove the entries used longest ago until the others have at most max_bytes. */
ifkv_status ifkv_store_evict(const char *dir, uint64_t max_bytes, int64_t *n_p, uint64_t *bytes_p);

#endif
