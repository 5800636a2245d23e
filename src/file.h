/* Regular files of untrusted directories: open, identify, read.
 *
 * Owns the rules that keep a file from hanging or fooling a reader: O_NONBLOCK and fstat, so that a
 * FIFO, device or directory is refused and never waited for; EINTR retried; a short read is an
 * error that names file and offset.  Knows nothing of what is in the files. */
#ifndef IFKV_SRC_FILE_H
#define IFKV_SRC_FILE_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What must stay equal while a file is being read.  Access and inode change times are left out: a
 * cache may link to a file while it is in use. */
typedef struct ifkv_file_id {
    uint64_t device, inode, bytes;
    int64_t mtime_s, mtime_ns;
} ifkv_file_id;

/* Write a path for a message: as ifkv_quote, but a long path keeps its end, which tells more.
 * buffer holds IFKV_QUOTE_BYTES; returns buffer. */
const char *ifkv_path_quote(const char *path, char *buffer);
/* "dir/name"; the caller frees it.  NULL if there is no memory. */
char *ifkv_path_join(const char *dir, const char *name);

/* Open a regular file for reading; the caller closes *fd_p.  Symbolic links are followed.  code:
 * the error number to report with.  Errors: NO_INPUT (missing, loop of links), PERMISSION, DATA
 * (not a regular file), OS. */
ifkv_status ifkv_file_open(const char *path, int code, int *fd_p, ifkv_file_id *id);
/* Identify an open file again, or report IO. */
ifkv_status ifkv_file_identify(int fd, const char *path, int code, ifkv_file_id *id);
bool ifkv_file_id_equal(const ifkv_file_id *a, const ifkv_file_id *b);
/* Read exactly `bytes` bytes from `offset`.  Errors: IO with file and offset, also where the file
 * ends early. */
ifkv_status ifkv_file_pread(int fd, const char *path, uint64_t offset, void *to, size_t bytes,
                            int code);
/* Read a regular file whole.  The caller frees *text_p (NUL behind it).  Errors: those of open and
 * pread, DATA if larger than max_bytes, RESOURCE. */
ifkv_status ifkv_file_read(const char *path, uint64_t max_bytes, int code, char **text_p,
                           size_t *bytes_p);

#ifdef __cplusplus
}
#endif
#endif
