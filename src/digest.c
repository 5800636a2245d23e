/* Digests over libxxhash.  See digest.h. */
#include "digest.h"

#include "file.h"

#include <stdlib.h>
#include <unistd.h>

#include <xxhash.h>

#define BLOCK_BYTES ((size_t)1 << 20)

uint64_t ifkv_digest_bytes(const void *data, size_t bytes) {
    return XXH3_64bits(data, bytes);
}

static void little_endian(uint64_t value, unsigned char *to) {
    for (int i = 0; i < 8; i++) to[i] = (unsigned char)(value >> 8 * i);
}

uint64_t ifkv_digest_indices(const int64_t *index, int64_t n) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return ifkv_digest_bytes(index, (size_t)n * sizeof *index);
#else
#error "needs a byte-swapping loop on this machine"
#endif
}

struct ifkv_digest {
    XXH3_state_t *state; /* owned */
};

ifkv_status ifkv_digest_create(ifkv_digest **digest_p) {
    ifkv_digest *digest = malloc(sizeof *digest);
    IFKV_REQUIRE(digest, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "digest: out of memory");
    digest->state = XXH3_createState();
    if (!digest->state) {
        free(digest);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "digest: out of memory");
    }
    XXH3_64bits_reset(digest->state); /* fails on NULL only */
    *digest_p = digest;
    return IFKV_OK;
}

void ifkv_digest_destroy(ifkv_digest *digest) {
    if (!digest) return;
    XXH3_freeState(digest->state);
    free(digest);
}

void ifkv_digest_add(ifkv_digest *digest, const void *data, size_t bytes) {
    if (bytes > 0) XXH3_64bits_update(digest->state, data, bytes); /* fails on NULL only */
}

void ifkv_digest_add_u64(ifkv_digest *digest, uint64_t value) {
    unsigned char bytes[8];
    little_endian(value, bytes);
    ifkv_digest_add(digest, bytes, sizeof bytes);
}

uint64_t ifkv_digest_value(const ifkv_digest *digest) {
    return XXH3_64bits_digest(digest->state);
}

ifkv_status ifkv_digest_range(int fd, const char *path, uint64_t bytes, int code, uint64_t *value) {
    ifkv_status status;
    ifkv_digest *digest = NULL;
    char *block = malloc(BLOCK_BYTES);
    IFKV_REQUIRE(block, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "digest: out of memory");
    IFKV_TRY_GOTO(status, ifkv_digest_create(&digest), err_free);
    for (uint64_t at = 0; at < bytes; at += BLOCK_BYTES) {
        const size_t n = bytes - at < BLOCK_BYTES ? (size_t)(bytes - at) : BLOCK_BYTES;
        IFKV_TRY_GOTO(status, ifkv_file_pread(fd, path, at, block, n, code), err_destroy);
        ifkv_digest_add(digest, block, n);
    }
    *value = ifkv_digest_value(digest);
err_destroy:
    ifkv_digest_destroy(digest);
err_free:
    free(block);
    return status;
}

ifkv_status ifkv_digest_file(const char *path, int code, uint64_t *value) {
    ifkv_file_id id;
    int fd;
    IFKV_TRY(ifkv_file_open(path, code, &fd, &id));
    const ifkv_status status = ifkv_digest_range(fd, path, id.bytes, code, value);
    close(fd);
    return status;
}
