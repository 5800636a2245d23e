/* The key of an entry.  See store_key.h. */
#include "store_key.h"

#include <stdio.h>
#include <string.h>

#include "digest.h"

/* Ids enter as int32 of this machine, which is little-endian: see digest.c. */
static ifkv_status digest_entry(const ifkv_store_entry *entry, char form, uint64_t *value) {
    ifkv_digest *digest;
    IFKV_TRY(ifkv_digest_create(&digest));
    ifkv_digest_add(digest, &form, 1);
    ifkv_digest_add(digest, entry->description, strlen(entry->description) + 1);
    ifkv_digest_add_u64(digest, (uint64_t)entry->n_prefix);
    ifkv_digest_add(digest, entry->prefix, (size_t)entry->n_prefix * sizeof *entry->prefix);
    ifkv_digest_add_u64(digest, (uint64_t)entry->n_token);
    ifkv_digest_add(digest, entry->token, (size_t)entry->n_token * sizeof *entry->token);
    *value = ifkv_digest_value(digest);
    ifkv_digest_destroy(digest);
    return IFKV_OK;
}

ifkv_status ifkv_store_key_make(ifkv_store_entry *entry) {
    /* two 64-bit digests over different bytes stand for one of 128 bits */
    uint64_t high, low;
    IFKV_TRY(digest_entry(entry, 'a', &high));
    IFKV_TRY(digest_entry(entry, 'b', &low));
    snprintf(entry->key, sizeof entry->key, "%016llx%016llx", (unsigned long long)high,
             (unsigned long long)low);
    return IFKV_OK;
}
