/* Inside an open HDF5 file: what h5.c and h5_read.c share.  Only those two include it; everyone
 * else includes h5.h, which names no HDF5 type. */
#ifndef IFKV_SRC_H5_FILE_H
#define IFKV_SRC_H5_FILE_H

#include "h5.h"

#include <hdf5.h>

struct ifkv_h5 {
    hid_t id;
    H5E_auto2_t print; /* the host's error printing, put back at close */
    void *print_arg;
    char name[IFKV_QUOTE_BYTES]; /* for messages */
};

/* Report "<file> <path>: <what>: <innermost line of HDF5's error stack>". */
ifkv_status ifkv_h5_fail(const ifkv_h5 *file, ifkv_status status, int code, const char *path,
                         const char *what);

/* Type of an element in memory; the caller closes it. */
hid_t ifkv_h5_memory_type_create(ifkv_h5_type type);

/* Rows of about 1 MiB: the multiple of 256 nearest, at least one such, at most all rows. */
int64_t ifkv_h5_block_rows(int64_t n_row, int64_t row_bytes);

#endif
