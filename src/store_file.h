/* One entry of the chunk store as a file: HDF5, and behind it a trailer with the digest of every
 * byte before.
 *
 * The digest is checked before HDF5 sees the file, so that its parser never meets an accident.
 * Layout: root attributes as in a K/V file, `description`, `key`; /prefix, /token_ids int32;
 * /layers/<l>/k and v [n_row, n_kv_head, d_head], K before rotation.  HDF5 ignores what lies behind
 * its own end. */
#ifndef IFKV_SRC_STORE_FILE_H
#define IFKV_SRC_STORE_FILE_H

#include "status.h"

typedef struct ifkv_store_reader {
    const char *path; /* borrowed; for messages */
    int fd;           /* owned; once HDF5 has it open the file stays readable without its name */
    int64_t n_row;
} ifkv_store_reader;

/* Write an entry to a path that must not exist; `give` fills the layers.  *is_given_p false: it
 * stopped, and the file is not complete. */
ifkv_status ifkv_store_file_write(const char *path, const ifkv_store_entry *entry,
                                  ifkv_store_layer_fn give, void *arg, bool *is_given_p);
/* Open a file and check its digest.  Errors: NO_INPUT if there is none; DATA; those of
 * file.h. */
ifkv_status ifkv_store_file_open(const char *path, ifkv_store_reader *reader);
void ifkv_store_file_close(ifkv_store_reader *reader);
/* Compare the open file with what it should be and hand its layers to `take`.  *is_taken_p false:
 * it stopped.  Errors: NO_INPUT if it has been removed; DATA, also where another entry is found. */
ifkv_status ifkv_store_file_read(const ifkv_store_reader *reader, const ifkv_store_entry *entry,
                                 ifkv_store_layer_fn take, void *arg, bool *is_taken_p);
/* Read an open file's own description and check it, with its name, against itself. */
ifkv_status ifkv_store_file_check(const ifkv_store_reader *reader, const char *key);
/* Rows by the trailer, which is not checked; -1 if there is none. */
int64_t ifkv_store_file_rows(const char *path);

#endif
