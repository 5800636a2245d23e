/* Stand-ins for cudart, cuBLASLt and NCCL on a machine without a GPU: what they share, and what a
 * test may ask of them.
 *
 * The functions themselves are declared by the toolkit's headers and replaced at link time; only
 * those that ifkv calls exist.  Work of a stream is run by host threads, as the environment says:
 *   IFKV_EMU_TIME     early (default): as soon as it may; late: not before something waits for it;
 *                     random:SEED: at any call, at random
 *   IFKV_EMU_FAIL     NAME:N[+][=CODE][@RANK],...: the N-th call of NAME fails, with + every one
 *                     from then on; CODE is the library's number.  "kernel" counts pieces of stream
 *                     work, whose failure shows later and stays; "cudaDriverVersion" is CODE;
 *                     NCCL has more of them (standin_nccl.cpp); RANK is the launcher's
 *   IFKV_EMU_DEVICES  number of devices (1)
 *   IFKV_EMU_ARCH     compute capability, "9.0" (default) or "8.0"
 *   IFKV_EMU_MEMORY   bytes of a device (8 GiB)
 *   IFKV_EMU_HOST     open: host code may touch device memory.  Otherwise it ends the process with
 *                     a report; while any thread runs stream work it goes unnoticed
 * Device memory is filled with NaN bytes and fenced; what lies behind an overrun is reported when
 * the memory is freed or the device waited for.  A report ends the process with SIGABRT. */
#ifndef IFKV_TESTS_EMU_STANDIN_H
#define IFKV_TESTS_EMU_STANDIN_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Replace what IFKV_EMU_FAIL says, for all threads; counts begin anew.  NULL: nothing fails. */
void emu_fail(const char *spec);
/* The same for IFKV_EMU_TIME. */
void emu_time(const char *spec);
/* Calls of a name so far, in this process, since emu_fail. */
long emu_calls(const char *name);
/* How many algorithms cuBLASLt offers from now on, 1 to 3 (2).  The first two make the same bits;
 * the third makes others, and where it is offered it is by far the fastest. */
void emu_algorithms(int n);

#ifdef __cplusplus
}

#include <cstdint>
#include <functional>
#include <memory>

namespace emu {

/* Print "emulated device: " and the words, and abort. */
[[noreturn]] void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Count a call; true, with *code_p, if it is to fail.  *code_p keeps its value where the
 * specification names none. */
bool is_failing(const char *name, int *code_p);

/* The environment variable as a number, or the default. */
long long env_number(const char *name, long long otherwise);

/* --- memory --- */
enum class kind { pageable, pinned, device };
struct place {
    emu::kind kind;
    size_t left; /* bytes from here to the end of the allocation; pageable: SIZE_MAX */
    int device;
};
place place_of(const void *address);
cudaError_t allocate(emu::kind kind, int device, size_t bytes, void **address_p);
cudaError_t release(emu::kind kind, void *address);
size_t free_bytes(int device);
/* Report what was written beside an allocation, if a kernel has run since the last look. */
void check_fences();
/* While it lives, on any thread, device memory may be touched: all of it, as by a kernel, or what
 * two addresses lie in. */
struct open_memory {
    open_memory();
    open_memory(const void *one, const void *other);
    ~open_memory();
    open_memory(const open_memory &) = delete;

  private:
    const bool is_all;
    const void *const addresses[2];
};

/* --- calls --- */
/* Count a call and say how it fails: as planned (with `otherwise` where the plan names no code), or
 * because the device is broken. */
cudaError_t enter(const char *name, cudaError_t otherwise = cudaErrorUnknown);
/* Keep an error for cudaGetLastError, and return it. */
cudaError_t leave(cudaError_t error);
/* Fail every call from now on, as after a fault in a kernel, and run no more stream work. */
void break_device(cudaError_t error);
bool is_broken();
int current_device();

/* --- streams --- */
/* A place in a stream, valid also when the stream is no more. */
struct ticket {
    std::shared_ptr<struct queue> queue;
    uint64_t place = 0; /* 1, 2, ... */
};
/* Put a step at the end of a stream.  It is called, with device memory closed, until it returns
 * true. */
ticket enqueue(cudaStream_t stream, std::function<bool()> step);
/* Let what comes to a stream from now on wait for a place in another. */
void enqueue_after(cudaStream_t stream, const ticket &other);
/* Run a stream up to a place.  False: something in it cannot go on yet. */
bool drive(const ticket &to);
bool is_late();
/* Wait until everything on a device is done. */
void wait_device(int device);

} // namespace emu
#endif
#endif
