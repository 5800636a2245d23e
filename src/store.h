/* The chunk store of the command line tool: a directory of entries, shared by ranks, processes and
 * runs.
 *
 * Owns DIR/<key>.h5, the bound on their size and the order in which they go: the one used longest
 * ago first.  An entry is served only if the whole file has the digest it was written with, and
 * description and ids are the asked ones; anything else is a miss with one warning.  Entries appear
 * complete or not at all (publish.h), so any number of processes may fill and empty one directory;
 * a race is lost without harm, since equal keys mean equal bits.  Digests find accidents, not
 * forgeries: whoever may write to DIR is trusted.  Knows nothing of models. */
#ifndef IFKV_SRC_STORE_H
#define IFKV_SRC_STORE_H

#include "status.h"

typedef struct ifkv_chunk_store ifkv_chunk_store;
typedef void (*ifkv_store_say_fn)(void *arg, const char *line);

typedef struct ifkv_chunk_store_options {
    const char *dir;       /* made if its parent exists */
    uint64_t max_bytes;    /* of all entries together; 0: no bound */
    ifkv_store_say_fn say; /* one line a warning, by the thread that meets it; may be NULL */
    void *say_arg;
} ifkv_chunk_store_options;

/* Open a store.  A directory that can be read but not written serves and keeps nothing, with a
 * warning.  Local.  Errors: CANT_CREATE, RESOURCE. */
ifkv_status ifkv_chunk_store_open(const ifkv_chunk_store_options *options,
                                  ifkv_chunk_store **store_p);
/* One more holder of the same store, such as another rank of this process; each closes it once.
 * Calls of several threads take turns where they use HDF5. */
ifkv_chunk_store *ifkv_chunk_store_share(ifkv_chunk_store *store);
void ifkv_chunk_store_close(ifkv_chunk_store *store);
/* The table for ifkv_prefill_options.store; valid while the store is open. */
const ifkv_store *ifkv_chunk_store_table(const ifkv_chunk_store *store);

/* ---- without opening it ---- */

typedef struct ifkv_store_file {
    char name[40]; /* <key>.h5 */
    uint64_t bytes;
    int64_t n_row;           /* tokens; -1 where the file's end does not tell */
    int64_t used_s, used_ns; /* last use, of the epoch */
} ifkv_store_file;

/* The entries of a directory, the last used first.  Nothing is checked.  The caller frees *file_p.
 * Errors: NO_INPUT, RESOURCE. */
ifkv_status ifkv_store_list(const char *dir, ifkv_store_file **file_p, int64_t *n_p);
/* Remove entries, those used longest ago first, until the others have at most max_bytes, and what
 * dead writers left.  Counts what it removed.  Errors: those of list. */
ifkv_status ifkv_store_prune(const char *dir, uint64_t max_bytes, int64_t *n_p, uint64_t *bytes_p);
/* Read every entry whole and check it against its digest, its name and its shape.  Errors: those of
 * list; NUMERIC if one is damaged, each of which has been said. */
ifkv_status ifkv_store_verify(const char *dir, ifkv_store_say_fn say, void *say_arg, int64_t *n_p);

#endif
