/* Run a reader of hostile input in a child process.
 *
 * Owns the fork, the pipes, the limits (memory, processor time, silence) and what a dead child
 * means: one DATA error that names the signal.  The child answers with bytes and one status; its
 * error text, cause number and place arrive as if the parent had reported them.  Refuses to know
 * what is read.  The child shares memory with the parent until it writes, so its input needs no
 * copy. */
#ifndef IFKV_SRC_GUARD_H
#define IFKV_SRC_GUARD_H

#include <stddef.h>

#include "status.h"

typedef struct ifkv_guard ifkv_guard;

/* Runs in the child.  What it opens ends with the process. */
typedef ifkv_status (*ifkv_guard_fn)(ifkv_guard *guard, void *arg);

/* Append to the answer.  In the child only.  Errors: OS. */
ifkv_status ifkv_guard_write(void *guard, const void *data, size_t bytes);

typedef struct ifkv_guard_limits {
    size_t memory_bytes; /* beyond what this process has now */
    int seconds;         /* of processor time, and of silence */
} ifkv_guard_limits;

/* Fork, run fn(arg) in the child and wait.  `name` starts the message if the child dies.  The
 * caller frees *answer_p.  Errors: the child's; DATA with E0605 if it crashed, used up its time or
 * fell silent; OS if there is no child. */
ifkv_status ifkv_guard_run(const char *name, ifkv_guard_limits limits, ifkv_guard_fn fn, void *arg,
                           char **answer_p, size_t *bytes_p);

#endif
