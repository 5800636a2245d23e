/* Files that appear complete or not at all, in a directory that one job owns.
 *
 * Owns the order of system calls that makes this true after a kill at any instant: write under
 * DIR/.tmp with O_EXCL, fsync, verify, rename, fsync of the directory; lines are appended by a
 * single write and synced.  Owns the lock by which a second job is told, and the removal of what a
 * dead job left in DIR/.tmp.  Refuses to know what is in the files, but for reading a written HDF5
 * file back.  No byte under a final name is ever partly written. */
#ifndef IFKV_SRC_PUBLISH_H
#define IFKV_SRC_PUBLISH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "h5.h"
#include "status.h"

/* Create DIR (its parent must exist), prove that it can be written, lock it and empty DIR/.tmp.
 * *lock_p is the lock's descriptor.  Local: one rank of a job.  Errors: CANT_CREATE; BUSY, naming
 * host, pid and job of the holder. */
ifkv_status ifkv_publish_lock(const char *dir, int *lock_p);
void ifkv_publish_unlock(const char *dir, int lock);

/* The same for a directory that many jobs fill at once: no lock, and DIR/.tmp loses only what
 * nobody has written to for IFKV_PUBLISH_STALE_SECONDS. */
enum { IFKV_PUBLISH_STALE_SECONDS = 3600 };
ifkv_status ifkv_publish_share(const char *dir);

/* Path under DIR/.tmp for a file that is to become DIR/name; the caller frees it.  Nothing is
 * created. */
ifkv_status ifkv_publish_path(const char *dir, const char *name, int rank, char **tmp_p);
/* Make a closed HDF5 file DIR/name, replacing what is there, and digest it.  On error the file
 * under tmp is removed.  Errors: IO. */
ifkv_status ifkv_publish_h5(const char *dir, const char *name, const char *tmp, uint64_t *digest_p);
/* Create a file under DIR/.tmp, fill it and publish it as DIR/name: all of the above. */
typedef ifkv_status (*ifkv_publish_fill_fn)(void *arg, ifkv_h5 *file);
ifkv_status ifkv_publish_h5_filled(const char *dir, const char *name, int rank,
                                   ifkv_publish_fill_fn fill, void *arg, uint64_t *digest_p);
/* Remove a file under DIR/.tmp that will not be published; it may be missing. */
void ifkv_publish_abandon(const char *tmp);
/* Write a text file whole as DIR/name, replacing what is there. */
ifkv_status ifkv_publish_text(const char *dir, const char *name, const char *text, size_t bytes);
/* Append one line, newline included, to DIR/name.  A write that fails half-way is taken back. */
ifkv_status ifkv_publish_line(const char *dir, const char *name, const char *line, size_t bytes);
/* Remove DIR/name if it is there, and sync the directory. */
ifkv_status ifkv_publish_remove(const char *dir, const char *name);

#endif
