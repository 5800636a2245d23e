/* The key of a chunk store's entry: what its name is made of, for those who look it up and those
 * who check a file against its name.  Knows neither files nor models. */
#ifndef IFKV_SRC_STORE_KEY_H
#define IFKV_SRC_STORE_KEY_H

#include "status.h"

#define IFKV_STORE_KEY_BYTES 33

/* Fill entry->key from description, prefix and token.  Errors: RESOURCE. */
ifkv_status ifkv_store_key_make(ifkv_store_entry *entry);

#endif
