/* The one way to launch a kernel.
 *
 * Owns the difference between a launch on a GPU and a run of the same kernel on the host execution
 * model: nobody else writes <<<>>> or calls cudaLaunchKernelEx.  Local; asynchronous on `stream`.
 *
 *   ifkv_launch(kernel, grid, block, shared_bytes, stream, args...)
 *     shared_bytes  dynamic shared memory of a block, in bytes; what exceeds 48 KiB is asked for
 * here args          converted to the kernel's parameter types and copied before the call returns
 *
 * Returns the launch's own error (invalid configuration, no such device); an error of the running
 * kernel surfaces later, at whatever waits for the stream. */
#ifndef IFKV_CUDA_LAUNCH_CUH
#define IFKV_CUDA_LAUNCH_CUH

#include <cuda_runtime_api.h>
#include <stddef.h>

#include <utility>

#ifdef IFKV_EMU
#include "emu_launch.h"

// A macro, because its text names the kernel in the model's reports.
#define ifkv_launch(...) emu_launch(#__VA_ARGS__, emu_here(), __VA_ARGS__)

#else

template <typename... Parameters, typename... Arguments>
cudaError_t ifkv_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Arguments &&...args) {
    if (shared_bytes > 48 * 1024) { // more is given only to a kernel that asks
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(args)...);
}

#endif
#endif
