/* Requests: JSONL or HDF5 files of token ids, turned into ifkv_request structs.
 *
 * Owns the two steps of reading: the bytes (one rank; a file, a pipe or standard input) and the
 * parse (every rank, from the broadcast bytes).  An HDF5 file is turned into JSONL by a child
 * process on the way, so there is one parser and one set of checks, and a file that crashes the
 * HDF5 library costs a message.  Refuses to know the model beyond its vocabulary size, and how a
 * context is cut: lengths against positions and memory are the engine's.  After a successful parse
 * every array is within the limits of formats.md 1 and every id is unique. */
#ifndef IFKV_SRC_REQUEST_H
#define IFKV_SRC_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "status.h"

#define IFKV_REQUEST_LINE_BYTES ((size_t)256 << 20) /* longest line */
#define IFKV_REQUEST_CHUNKS 65536                   /* most chunks of one request */
#define IFKV_REQUEST_ID_BYTES 32768 /* longest id: an HDF5 attribute holds less than 64 KiB */

/* One request.  Owns everything it points to; `request` views the item's own arrays. */
typedef struct ifkv_request_item {
    char *id;
    ifkv_request request;
    char *answers_json; /* compact JSON text, NULL if not given */
    char *meta_json;    /* compact JSON text, NULL if not given */
    int64_t max_new;    /* -1: not given */
    bool is_context;    /* came as `context`: one chunk now, to be cut every --chunk tokens */
    uint64_t digest;    /* XXH3 of all of the above, part of the resume key */
    char *where;        /* "file:line" or "file /requests/000003", to start messages with */
    int32_t *tokens;    /* [prefix, context, prompt, question] in this order */
    int64_t *offsets;   /* [n_chunk + 1] */
} ifkv_request_item;

typedef struct ifkv_request_list {
    ifkv_request_item *item; /* [n] */
    int64_t n;
    int64_t n_capacity;
    int64_t *table; /* [n_slot] open-addressed index of ids, -1 = free */
    int64_t n_slot;
} ifkv_request_list;

/* Read a request file whole; path "-" is standard input.  HDF5 comes back as the JSONL it means,
 * with *is_h5_p set.  The caller frees *text_p.  Local: one rank calls it and broadcasts.
 * Errors: NO_INPUT, PERMISSION, IO; BUSY if an HDF5 file is open for writing elsewhere; DATA if it
 * is a directory, compressed, changed meanwhile, or malformed HDF5. */
ifkv_status ifkv_requests_read(const char *path, char **text_p, size_t *bytes_p, bool *is_h5_p);

/* Parse the bytes that ifkv_requests_read gave.  path names the file in messages; token ids are
 * checked against n_vocab unless it is 0.  Memory is about 4 bytes a token plus one parsed line.
 * The caller destroys *list_p with ifkv_requests_free.  Local; the same answer on every rank.
 * Errors: DATA, naming line or group and a JSON pointer; RESOURCE without memory. */
ifkv_status ifkv_requests_parse(const char *path, const char *text, size_t bytes, bool is_h5,
                                int64_t n_vocab, ifkv_request_list **list_p);
void ifkv_requests_free(ifkv_request_list *list);

/* Find a request by id; NULL if there is none. */
const ifkv_request_item *ifkv_requests_find(const ifkv_request_list *list, const char *id);

/* Write the requests of an HDF5 file image as JSONL through `write`.  Runs in the child process of
 * ifkv_requests_read; path names the file in messages. */
typedef ifkv_status (*ifkv_request_write_fn)(void *arg, const void *data, size_t bytes);
ifkv_status ifkv_requests_h5_convert(const char *path, const void *image, size_t bytes,
                                     ifkv_request_write_fn write, void *arg);

#endif
