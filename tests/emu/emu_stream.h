/* The one hook between the model and whatever stands in for the CUDA runtime.
 *
 * emu_enqueue runs `work` in the order of `stream`, after all work that the stream's order puts
 * before it; when, is the implementation's choice.  The default that the model brings is weak and
 * runs the work before it returns; a stand-in for cudart defines the function strongly and must be
 * linked as objects, not taken from an archive, or the weak one may win. Every launch goes through
 * it, and a stand-in's copies and event records should. */
#ifndef IFKV_EMU_STREAM_H
#define IFKV_EMU_STREAM_H

#include <cuda_runtime_api.h>

#include <functional>

void emu_enqueue(cudaStream_t stream, std::function<void()> work);

#endif
