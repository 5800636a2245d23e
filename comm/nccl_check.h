/* How this project meets NCCL: the check macros, and the parts of comm_nccl.c that a test drives
 * apart.
 *
 * Owns the translation of NCCL's results, and of the CUDA calls between them, into a status: what
 * the network or a peer did is PEER, what the machine lacks is RESOURCE, the rest INTERNAL.
 * Includes nccl.h, so only comm_nccl.c and its tests may include it. */
#ifndef IFKV_COMM_NCCL_CHECK_H
#define IFKV_COMM_NCCL_CHECK_H

#include "comm.h"

#include <nccl.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An NCCL call as an ifkv_status: IFKV_TRY(IFKV_NCCL(ncclGroupStart())).  ncclInProgress is no
 * failure: whoever starts something asks how it goes. */
#define IFKV_NCCL(call) ifkv_nccl_status((call), #call, __FILE__, __LINE__)
/* The same for the CUDA runtime. */
#define IFKV_NCCL_CUDA(call) ifkv_nccl_cuda_status((call), #call, __FILE__, __LINE__)

static inline ifkv_status ifkv_nccl_status(ncclResult_t result, const char *call, const char *file,
                                           int line) {
    ifkv_status status = IFKV_ERR_INTERNAL;
    if (result == ncclSuccess || result == ncclInProgress) return IFKV_OK;
    if (result == ncclRemoteError || result == ncclSystemError) status = IFKV_ERR_PEER;
    /* invalid usage: two ranks on one device, which NCCL refuses */
    if (result == ncclUnhandledCudaError || result == ncclInvalidUsage) status = IFKV_ERR_RESOURCE;
    const char *words = ncclGetLastError(NULL); /* of any communicator: more than the code says */
    return ifkv_fail(status, IFKV_E_COMM, file, line, "communicator nccl: %s: %s%s%s", call,
                     ncclGetErrorString(result), words && *words ? ": " : "", words ? words : "");
}

static inline ifkv_status ifkv_nccl_cuda_status(cudaError_t error, const char *call,
                                                const char *file, int line) {
    ifkv_status status = IFKV_ERR_INTERNAL;
    if (error == cudaSuccess) return IFKV_OK;
    if (error == cudaErrorMemoryAllocation || error == cudaErrorECCUncorrectable ||
        error == cudaErrorNvlinkUncorrectable || error == cudaErrorLaunchTimeout)
        status = IFKV_ERR_RESOURCE;
    return ifkv_fail(status, IFKV_E_COMM, file, line, "communicator nccl: %s: %s", call,
                     cudaGetErrorString(error));
}

#ifdef __cplusplus
}
#endif
#endif
