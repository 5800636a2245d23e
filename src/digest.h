/* XXH3-64 digests of bytes, files and index lists.
 *
 * Owns the choice of the hash and the byte order it sees, so that a digest means the same on every
 * machine; the only file that knows the hash library.  Digests find accidents, not forgeries. */
#ifndef IFKV_SRC_DIGEST_H
#define IFKV_SRC_DIGEST_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

uint64_t ifkv_digest_bytes(const void *data, size_t bytes);
/* Of index[0..n) as little-endian int64; ascending where it stands for a selection.  Of no index:
 * the digest of no bytes. */
uint64_t ifkv_digest_indices(const int64_t *index, int64_t n);
/* Of a regular file's bytes.  code: the error number to report with.  Errors: those of
 * ifkv_file_open and ifkv_file_pread, RESOURCE. */
ifkv_status ifkv_digest_file(const char *path, int code, uint64_t *digest);

/* Of the first `bytes` bytes of an open file; path is for messages. */
ifkv_status ifkv_digest_range(int fd, const char *path, uint64_t bytes, int code, uint64_t *digest);

/* A digest taken piece by piece; equal to that of all pieces in one. */
typedef struct ifkv_digest ifkv_digest;

ifkv_status ifkv_digest_create(ifkv_digest **digest_p);
void ifkv_digest_destroy(ifkv_digest *digest);
void ifkv_digest_add(ifkv_digest *digest, const void *data, size_t bytes);
/* The eight little-endian bytes of a number. */
void ifkv_digest_add_u64(ifkv_digest *digest, uint64_t value);
/* So far; more may be added afterwards. */
uint64_t ifkv_digest_value(const ifkv_digest *digest);

#ifdef __cplusplus
}
#endif
#endif
