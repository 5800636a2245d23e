/* Assertions of distributed tests: the ranks agree first, so that all of them fail at once.
 *
 * A cmocka assertion that fails on one rank jumps out of the test and leaves the others waiting in
 * the next collective until the timeout; in a rank's thread it ends the process.  So a test body
 * returns a status: IFKV_TRY(agree_true(comm, a == b)); the main thread asserts after the run. */
#ifndef IFKV_TESTS_AGREE_H
#define IFKV_TESTS_AGREE_H

#include "status.h"

/* IFKV_OK on every rank if ok holds on every rank, else IFKV_ERR_UNEXPECTED on every rank, with the
 * condition and its place on the lowest rank where it does not hold.  Collective. */
#define agree_true(comm, ok) agree_true_at((comm), (ok), #ok, __FILE__, __LINE__)

/* The same for a call that must succeed on every rank.  Collective. */
#define agree_ok(comm, call) ifkv_comm_agree((comm), (call), NULL)

static inline ifkv_status agree_true_at(ifkv_comm *comm, bool ok, const char *claim,
                                        const char *file, int line) {
    ifkv_status status = IFKV_OK;
    if (!ok)
        status =
            ifkv_fail(IFKV_ERR_UNEXPECTED, 0, file, line, "%s:%d: not true: %s", file, line, claim);
    return ifkv_comm_agree(comm, status, NULL);
}

#endif
