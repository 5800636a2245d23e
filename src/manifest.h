/* The lines of manifest.jsonl: which files a finished request has, and their digests.
 *
 * Owns writing one line and reading a whole file of them.  File names in it are plain names: a line
 * that names a path is as invalid as a torn one.  Refuses to decide what an invalid line means: a
 * resume computes the request again, a verification reports it. */
#ifndef IFKV_SRC_MANIFEST_H
#define IFKV_SRC_MANIFEST_H

#include <jansson.h>

#include "status.h"

#define IFKV_MANIFEST_NAME "manifest.jsonl"

/* One line.  Strings view root and text. */
typedef struct ifkv_manifest_entry {
    json_t *root; /* owned; NULL: the line is invalid */
    const char *id, *key;
    int64_t n_file;   /* the record, then KV files by rank */
    const char *line; /* without the newline */
    size_t bytes;
    bool is_torn; /* the last line, without a newline */
} ifkv_manifest_entry;

typedef struct ifkv_manifest {
    char *text;                 /* owned */
    ifkv_manifest_entry *entry; /* [n], blank lines included as invalid */
    int64_t n;
} ifkv_manifest;

/* Read DIR/manifest.jsonl; a missing file is an empty manifest.  The caller destroys it.
 * Errors: PERMISSION, IO, RESOURCE. */
ifkv_status ifkv_manifest_load(const char *dir, ifkv_manifest *manifest);
void ifkv_manifest_fini(ifkv_manifest *manifest);

/* Name and digest of file i of a valid entry; the name views the entry. */
const char *ifkv_manifest_file(const ifkv_manifest_entry *entry, int64_t i, uint64_t *digest_p);

/* True if DIR/name exists and has this digest. */
bool ifkv_manifest_file_matches(const char *dir, const char *name, uint64_t digest);

/* Make a line, newline included, for the files name[0] (record), name[1..n_file) (KV by rank).  The
 * caller frees it; NULL without memory. */
char *ifkv_manifest_line(const char *id, const char *key, int64_t n_file, const char *const *name,
                         const uint64_t *digest);

#endif
