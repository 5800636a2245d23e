/* Strict JSON for untrusted files, on jansson.
 *
 * Owns the limits that jansson does not have: file size, depth, and the memory that parsing may
 * take, estimated from the text before a byte is parsed (jansson's allocator hook is process-global
 * and so not for a library).  Duplicate keys, NUL, invalid UTF-8 and trailing garbage are refused.
 * Error texts name file, byte or line, and a JSON pointer; statuses are the caller's. */
#ifndef IFKV_SRC_JSON_H
#define IFKV_SRC_JSON_H

#include <jansson.h>

#include "file.h"
#include "status.h"

typedef struct ifkv_json_limits {
    uint64_t max_bytes;       /* of the text */
    int max_depth;            /* 64 unless told */
    uint64_t max_parse_bytes; /* estimated memory while parsed, 1 GiB unless told */
} ifkv_json_limits;

/* Parse `bytes` bytes of text; `where` ("path" or "path:line") starts every message.  The caller
 * owns *root_p (json_decref). A UTF-8 byte order mark is refused.  Errors: DATA with `code`;
 * RESOURCE never: over the budget is DATA. */
ifkv_status ifkv_json_parse(const char *where, const char *text, size_t bytes,
                            const ifkv_json_limits *limits, int code, json_t **root_p);

#endif
