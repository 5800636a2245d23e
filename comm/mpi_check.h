/* How this project meets MPI: the check macro, and the parts of comm_mpi.c that a test drives
 * apart.
 *
 * Owns the translation of an MPI error into a status.  Includes mpi.h, so only comm_mpi.c and the
 * mains that start MPI may include it. */
#ifndef IFKV_COMM_MPI_CHECK_H
#define IFKV_COMM_MPI_CHECK_H

#include "comm.h"

#include <mpi.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An MPI call as an ifkv_status: IFKV_TRY(IFKV_MPI(MPI_Barrier(mpi))).  A failure is IFKV_ERR_PEER,
 * because without a communicator the peers are lost, with the library's own words. */
#define IFKV_MPI(call) ifkv_mpi_status((call), #call, __FILE__, __LINE__)

static inline ifkv_status ifkv_mpi_status(int error, const char *call, const char *file, int line) {
    char words[MPI_MAX_ERROR_STRING] = "";
    int n_word = 0;
    if (error == MPI_SUCCESS) return IFKV_OK;
    MPI_Error_string(error, words, &n_word);
    return ifkv_fail(IFKV_ERR_PEER, IFKV_E_COMM, file, line, "%s: %s", call, words);
}

/* Bytes of the next message when `left` bytes remain and no message may exceed max_message.  MPI
 * counts are int: max_message is at most INT_MAX. */
static inline int ifkv_mpi_chunk(size_t left, size_t max_message) {
    return (int)(left < max_message ? left : max_message);
}

/* ifkv_comm_mpi_open with messages of at most max_message bytes (1 to INT_MAX; the same on every
 * rank), so that a test reaches the path of long buffers with short ones.  Collective. */
ifkv_status ifkv_comm_mpi_open_chunked(size_t max_message, ifkv_comm **comm_p);

/* Fail with RESOURCE if the environment says that the launcher started several copies while MPI
 * counts world_size = 1: each would do the whole job and write the same files.  Local. */
ifkv_status ifkv_mpi_check_launch(int world_size);

#ifdef __cplusplus
}
#endif
#endif
