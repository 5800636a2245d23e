/* How this project meets the CUDA runtime: the check macro.
 *
 * Owns the translation of a CUDA error into a status: what the machine lacks is RESOURCE, what a
 * kernel did wrong is INTERNAL.  Nothing is retried: after a failed kernel or a hardware error the
 * process gets no further result from this device. */
#ifndef IFKV_CUDA_CUDA_CHECK_H
#define IFKV_CUDA_CUDA_CHECK_H

#include <cuda_runtime_api.h>

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A CUDA call as an ifkv_status: IFKV_TRY(IFKV_CUDA(cudaSetDevice(device))). */
#define IFKV_CUDA(call) ifkv_cuda_status((call), #call, __FILE__, __LINE__)

static inline ifkv_status ifkv_cuda_status(cudaError_t error, const char *call, const char *file,
                                           int line) {
    if (error == cudaSuccess) return IFKV_OK;
    switch (error) {
    case cudaErrorMemoryAllocation:
        return ifkv_fail(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, file, line,
                         "back end cuda: no memory on the device: %s", call);
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorMpsConnectionFailed:
    case cudaErrorMpsServerNotReady:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorLaunchTimeout:
        return ifkv_fail(IFKV_ERR_RESOURCE, IFKV_E_BACKEND, file, line,
                         "back end cuda: %s [%s]: %s", cudaGetErrorString(error),
                         cudaGetErrorName(error), call);
    default:
        return ifkv_fail(IFKV_ERR_INTERNAL, IFKV_E_BACKEND, file, line,
                         "back end cuda: %s [%s]: %s", cudaGetErrorString(error),
                         cudaGetErrorName(error), call);
    }
}

#ifdef __cplusplus
}
#endif
#endif
