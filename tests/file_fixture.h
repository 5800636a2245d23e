/* Temporary directories, small files, and HDF5 request files of every kind that must be refused.
 * The only test code that includes hdf5.h. */
#ifndef IFKV_TESTS_FILE_FIXTURE_H
#define IFKV_TESTS_FILE_FIXTURE_H

#include <stdbool.h>
#include <stddef.h>

/* A fresh directory, removed with everything in it by fixture_remove; the caller frees the name. */
char *fixture_dir(void);
void fixture_remove(char *dir);
/* "dir/name" in one of eight static buffers, used in turn. */
const char *fixture_path(const char *dir, const char *name);
void fixture_write(const char *path, const void *data, size_t bytes);
void fixture_write_text(const char *path, const char *text);
/* The file, with a NUL behind it; NULL if it is missing.  The caller frees it. */
char *fixture_read(const char *path, size_t *bytes_p);
bool fixture_exists(const char *path);
/* Flip the lowest bit of the first byte of `pattern` in the file. */
bool fixture_flip(const char *path, const void *pattern, size_t bytes);

/* What /requests/000001/prompt is in a file of two requests; everything else is as in
 * fixture_h5_jsonl. */
typedef enum fixture_h5_kind {
    H5_VALID,
    H5_BIG_ENDIAN,
    H5_INT64,
    H5_DEFLATED,
    H5_FLETCHER, /* holds H5_PATTERN */
    H5_FLOAT,
    H5_UNSIGNED,
    H5_COMPOUND,
    H5_TEXT,
    H5_RANK_2,
    H5_RANK_0,
    H5_NULL_SPACE,
    H5_EMPTY,
    H5_MISSING,
    H5_GROUP,
    H5_EXTERNAL_STORAGE,
    H5_EXTERNAL_LINK,
    H5_SOFT_LINK,
    H5_VIRTUAL,
    H5_HUGE,
    H5_HUGE_CHUNK,
    H5_THIN,    /* deflated, and claims more than deflate can mean */
    H5_FILTER,  /* filter 32015 */
    H5_OFFSETS, /* chunk_offsets do not end at the number of tokens */
    H5_UNKNOWN_MEMBER,
    H5_NO_ID,
    H5_NO_FORMAT,
    H5_BAD_META,
    H5_GAP, /* a group that is not the next number */
    H5_CYCLE
} fixture_h5_kind;

#define H5_PATTERN 0x51525354 /* first id of the prompt of request 000001, H5_FLETCHER */

void fixture_h5_write(const char *path, fixture_h5_kind kind);
/* The same two requests as JSONL. */
extern const char fixture_h5_jsonl[];

#endif
