/* The tensors in a model directory's safetensors files: names, types, shapes, byte ranges.
 *
 * Owns the format: a header is accepted only if every range it states is provable - checked
 * products and sums, sizes that match shape and type, no hole, no overlap, nothing behind the last
 * tensor - so that reading a tensor needs no further check (faults 2.4, 2.7).  Owns the directory
 * rule too: one file, or shards under an index whose names are plain file names.  Knows nothing of
 * architectures; memory is proportional to the headers, never to the weights. */
#ifndef IFKV_SRC_SAFETENSORS_H
#define IFKV_SRC_SAFETENSORS_H

#include "file.h"
#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

#define IFKV_TENSOR_MAX_DIM 8
#define IFKV_TENSOR_MAX_NAME 1024
#define IFKV_TENSOR_MAX_COUNT 1000000
#define IFKV_TENSOR_MAX_SHARD 16384
#define IFKV_TENSOR_MAX_HEADER 100000000

typedef struct ifkv_tensor {
    const char *name; /* views the shard's header text */
    int type;         /* an index of the format's types, see ifkv_tensor_type_name */
    int shard;
    int n_dim; /* 0: a scalar */
    uint64_t dim[IFKV_TENSOR_MAX_DIM];
    uint64_t begin; /* byte in the shard's file */
    uint64_t bytes; /* number of elements times element size */
} ifkv_tensor;

typedef struct ifkv_shard {
    char *name;             /* owned: plain file name */
    char *path;             /* owned */
    char *header;           /* owned: the header text, names unescaped in place */
    uint64_t header_digest; /* XXH3-64 of the header as in the file */
    uint64_t data_bytes;
    ifkv_file_id id; /* of the file whose header was read */
} ifkv_shard;

typedef struct ifkv_safetensors {
    int n_shard;
    ifkv_shard *shard; /* owned, in ascending order of name */
    int64_t n_tensor;
    ifkv_tensor *tensor;         /* owned, in file order: by shard, then by begin */
    const ifkv_tensor **by_name; /* owned: all tensors in ascending order of name */
    /* The shard being read. */
    int open_shard; /* -1: none */
    int fd;
} ifkv_safetensors;

/* Read and validate all headers of DIR/model.safetensors, or of the shards named by
 * DIR/model.safetensors.index.json, which wins where both exist.  Reads no weight.  The caller owns
 * *set_p and releases it with ifkv_safetensors_close.  Local.  Errors: NO_INPUT, PERMISSION, DATA,
 * UNSUPPORTED (unknown element type), IO, RESOURCE. */
ifkv_status ifkv_safetensors_open(const char *dir, ifkv_safetensors **set_p);
void ifkv_safetensors_close(ifkv_safetensors *set);

/* A tensor by name, or NULL. */
const ifkv_tensor *ifkv_safetensors_find(const ifkv_safetensors *set, const char *name);

/* Read `bytes` bytes of a tensor from its byte `first`.  One shard is open at a time: file order is
 * fastest. Errors: IO naming shard and offset, DATA "changed while reading" if the file is not the
 * one whose header was read. */
ifkv_status ifkv_safetensors_read(ifkv_safetensors *set, const ifkv_tensor *tensor, uint64_t first,
                                  void *to, size_t bytes);
/* Report DATA if a file changed since its header was read; call after the last read. */
ifkv_status ifkv_safetensors_finish(ifkv_safetensors *set);

/* "BF16", "F32", ... */
const char *ifkv_tensor_type_name(int type);
/* True, and *dtype, for the types this library computes with: F32, BF16, F16. */
bool ifkv_tensor_dtype(const ifkv_tensor *tensor, ifkv_dtype *dtype);
/* "[2, 3]", "[]" for a scalar.  buffer holds IFKV_QUOTE_BYTES; returns buffer. */
const char *ifkv_tensor_show_shape(const ifkv_tensor *tensor, char *buffer);

/* ---- between safetensors.c, _header.c and _index.c ---- */

/* A growing list. */
typedef struct ifkv_tensor_list {
    ifkv_tensor *tensor; /* owned */
    int64_t n, capacity;
} ifkv_tensor_list;

/* Parse one header (text of `bytes` bytes, NUL behind it, overwritten by the unescaped names) and
 * append its tensors, sorted by range, with absolute file positions.  where: the file, quoted. */
ifkv_status ifkv_safetensors_parse(const char *where, char *text, size_t bytes, uint64_t data_bytes,
                                   int shard, ifkv_tensor_list *list);

/* What an index says. */
typedef struct ifkv_shard_map {
    int n_shard;
    char **shard; /* owned, owned strings: distinct plain file names, ascending */
    int64_t n_tensor;
    char **tensor;        /* owned, owned strings: names, ascending */
    int *of;              /* owned: shard of each name */
    bool has_total;       /* metadata.total_size is given */
    uint64_t total_bytes; /* as given */
} ifkv_shard_map;

/* Read the index of a directory.  Errors: DATA, and those of ifkv_file_read. */
ifkv_status ifkv_shard_map_load(const char *dir, const char *path, ifkv_shard_map *map);
void ifkv_shard_map_fini(ifkv_shard_map *map);
/* Compare a set of opened shards with the index that named them, and warn where total_size is
 * wrong. */
ifkv_status ifkv_shard_map_check(const ifkv_shard_map *map, const char *where,
                                 const ifkv_safetensors *set);
/* Find out whether DIR/model.safetensors.index.json or else DIR/model.safetensors is there; *map is
 * filled either way (one shard without tensors for a single file).  *is_index tells. */
ifkv_status ifkv_shard_map_find(const char *dir, ifkv_shard_map *map, bool *is_index);

#ifdef __cplusplus
}
#endif
#endif
