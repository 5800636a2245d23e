/* Running a kernel on the host execution model; cuda/launch.cuh turns ifkv_launch into emu_launch.
 *
 * A block runs on one OS thread, every CUDA thread of it is a fiber, blocks are spread over OS
 * threads (IFKV_EMU_THREADS, default: as many as there are cores).  IFKV_EMU_TIME chooses when
 * asynchronous work completes and in which order threads run: `early` (the default), `late`, or
 * `random:SEED`. */
#ifndef IFKV_EMU_LAUNCH_H
#define IFKV_EMU_LAUNCH_H

#include "emu_place.h"

#include <cuda_runtime_api.h>

#include <functional>
#include <tuple>
#include <utility>

/* Check the configuration as a device of compute capability 9.0 would and enqueue the grid.  `text`
 * is the source text of the launch's arguments, whose first one names the kernel; `thread` runs the
 * kernel for the current thread. */
cudaError_t emu_launch_grid(const char *text, emu_place at, dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream, std::function<void()> thread);

template <typename... Parameters, typename... Arguments>
cudaError_t emu_launch(const char *text, emu_place at, void (*kernel)(Parameters...), dim3 grid,
                       dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments &&...args) {
    std::tuple<Parameters...> values(std::forward<Arguments>(args)...);
    return emu_launch_grid(text, at, grid, block, shared_bytes, stream,
                           [kernel, values] { std::apply(kernel, values); });
}

#endif
