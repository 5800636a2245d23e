/* HDF5 files: the only module that includes hdf5.h.
 *
 * Owns opening, creating and closing, datasets of the element types that ifkv stores, scalar
 * attributes, and the checks that make a file from elsewhere readable at all: hard links only, no
 * external or virtual storage, no filter but fletcher32, shuffle and deflate, sizes bounded by what
 * is stored.  Refuses to know what the files mean.  HDF5's own error printing is off from open to
 * close and then as it was; the innermost line of its error stack goes into our message.  A file
 * belongs to one thread, and where HDF5 is built without thread safety (Debian's is built with it)
 * only one thread may use this module at a time. */
#ifndef IFKV_SRC_H5_H
#define IFKV_SRC_H5_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "status.h"

typedef struct ifkv_h5 ifkv_h5;

typedef enum ifkv_h5_type {
    IFKV_H5_F32,
    IFKV_H5_BF16, /* uint16_t in memory: the upper half of a float32 */
    IFKV_H5_I32,
    IFKV_H5_I64,
    IFKV_H5_BOOL, /* uint8_t in memory; an enum of int8 in the file, as h5py writes booleans */
    IFKV_H5_OTHER /* read only: anything else */
} ifkv_h5_type;

#define IFKV_H5_DIMS 8
#define IFKV_H5_PATH_BYTES 256               /* longest path inside a file that is followed */
#define IFKV_H5_TEXT_BYTES ((size_t)1 << 20) /* longest text attribute read */

/* Prepare the process for HDF5: no clean-up at exit, which crashes after a failed write, and no
 * filter plugins.  For the command line tool and test programs only, before any other call here: a
 * host that uses HDF5 itself decides both. */
void ifkv_h5_process_init(void);

/* True if the bytes start with the HDF5 signature. */
bool ifkv_h5_is_signature(const void *data, size_t bytes);

/* Version of the HDF5 library at run time, "1.10.8"; buffer holds 32 bytes.  Returns buffer. */
const char *ifkv_h5_version(char *buffer);

/* ---- files ---- */

/* Open a file read-only.  Errors: NO_INPUT, PERMISSION; BUSY if a writer has it open; DATA if it is
 * not HDF5, truncated or of a newer format. */
ifkv_status ifkv_h5_open(const char *path, ifkv_h5 **file_p);
/* Open a file that lies in memory; name is for messages only and no file is touched. */
ifkv_status ifkv_h5_open_image(const char *name, const void *image, size_t bytes, ifkv_h5 **file_p);
/* Create a file that must not exist.  Errors: CANT_CREATE. */
ifkv_status ifkv_h5_create(const char *path, ifkv_h5 **file_p);
/* Close a created file and report what close tells.  The file is gone from memory either way.
 * Errors: IO; INTERNAL if an object is still open. */
ifkv_status ifkv_h5_finish(ifkv_h5 *file);
/* Close without a report; NULL is fine. */
void ifkv_h5_close(ifkv_h5 *file);

/* ---- writing ---- */

ifkv_status ifkv_h5_group_write(ifkv_h5 *file, const char *path);
/* Write a dataset whole.  dim [n_dim]; data is row-major; a dataset with no element is legal.  Rows
 * are chunked to about 1 MiB with fletcher32, so that a flipped bit is found when it is read. */
ifkv_status ifkv_h5_dataset_write(ifkv_h5 *file, const char *path, ifkv_h5_type type, int n_dim,
                                  const int64_t *dim, const void *data);
/* Attributes of the root group: scalars; text as a fixed-length UTF-8 string. */
ifkv_status ifkv_h5_text_write(ifkv_h5 *file, const char *name, const char *text);
ifkv_status ifkv_h5_i64_write(ifkv_h5 *file, const char *name, int64_t value);
ifkv_status ifkv_h5_f64_write(ifkv_h5 *file, const char *name, double value);
ifkv_status ifkv_h5_bool_write(ifkv_h5 *file, const char *name, bool value);

/* ---- reading ---- */

typedef struct ifkv_h5_dataset {
    ifkv_h5_type type;
    char type_name[24]; /* "float32", "int64 big-endian", "compound", ... */
    int n_dim;
    int64_t dim[IFKV_H5_DIMS];
    int64_t n_element;
    int64_t n_row_block; /* rows that are best read together: those of one storage chunk */
    size_t row_bytes;    /* stored bytes of one row */
} ifkv_h5_dataset;

/* Every link from the root to `path` exists and is hard.  *is_there_p false: the last one is
 * missing, and nothing was wrong before it. */
ifkv_status ifkv_h5_find(ifkv_h5 *file, const char *path, bool *is_there_p);

/* Describe a dataset and refuse one that is not safe to read.  Errors: DATA, naming the dataset. */
ifkv_status ifkv_h5_dataset_describe(ifkv_h5 *file, const char *path, ifkv_h5_dataset *dataset);

/* Read rows [row, row + n_row) as `type`, which is the described type, or I64 for any integer.
 * Errors: DATA with E0604, naming the rows, if the stored data is damaged. */
ifkv_status ifkv_h5_rows_read(ifkv_h5 *file, const char *path, ifkv_h5_type type, int64_t row,
                              int64_t n_row, void *data);

/* Read a text attribute of the object at path.  *text_p is NULL if there is none, else the
 * caller's. */
ifkv_status ifkv_h5_text_read(ifkv_h5 *file, const char *path, const char *name, char **text_p);
ifkv_status ifkv_h5_i64_read(ifkv_h5 *file, const char *path, const char *name, bool *is_there_p,
                             int64_t *value_p);

/* Visit the members of a group by name, attributes (is_link false) after links.  A link that is not
 * hard is refused.  The visitor must not open the same group again. */
typedef ifkv_status (*ifkv_h5_visit_fn)(void *arg, bool is_link, const char *name);
ifkv_status ifkv_h5_group_visit(ifkv_h5 *file, const char *path, ifkv_h5_visit_fn visit, void *arg);

/* Visit every dataset below the root by its path. */
typedef ifkv_status (*ifkv_h5_dataset_fn)(void *arg, ifkv_h5 *file, const char *path,
                                          const ifkv_h5_dataset *dataset);
ifkv_status ifkv_h5_datasets_visit(ifkv_h5 *file, ifkv_h5_dataset_fn visit, void *arg);

/* Describe every dataset and, with read_data, read it all, which checks its checksums. */
ifkv_status ifkv_h5_check(ifkv_h5 *file, bool read_data);

/* Write an attribute's value as text for people: "12", "0.5", "infoflow", "(8 values)".  Value is
 * cut to bytes - 1. */
ifkv_status ifkv_h5_attribute_print(ifkv_h5 *file, const char *name, char *value, size_t bytes);

#endif
