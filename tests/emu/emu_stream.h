/* The one call by which the execution model hands work to the stand-in for cudart. */
#ifndef IFKV_TESTS_EMU_EMU_STREAM_H
#define IFKV_TESTS_EMU_EMU_STREAM_H

#include <cuda_runtime_api.h>

#include <functional>

/* Run work in the order of a stream, on whichever thread comes to it, with device memory open. */
void emu_enqueue(cudaStream_t stream, std::function<void()> work);

#endif
