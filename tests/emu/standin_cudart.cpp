/* The stand-in for cudart: devices, memory and copies.  Streams are in standin_stream.cpp.
 *
 * A copy knows by the book of allocations where its ends lie, and refuses what does not fit: an end
 * past its allocation, a direction that is not the pointers'.  Pageable host memory is read at the
 * call and written before it returns, pinned memory when the stream comes to it, as on a device. */
#include "standin.h"

#include "emu_tensor_map.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

int n_device() {
    return (int)emu::env_number("IFKV_EMU_DEVICES", 1);
}

void read_arch(int *major, int *minor) {
    const char *text = getenv("IFKV_EMU_ARCH");
    if (!text || sscanf(text, "%d.%d", major, minor) != 2) *major = 9, *minor = 0;
}

/* Do the pointers' places fit the call? */
cudaError_t check_copy(const emu::place &to, const emu::place &from, size_t bytes,
                       cudaMemcpyKind copy_kind) {
    const bool to_device = to.kind == emu::kind::device,
               from_device = from.kind == emu::kind::device;
    if (to.left < bytes || from.left < bytes) return cudaErrorInvalidValue;
    switch (copy_kind) {
    case cudaMemcpyHostToHost:
        return to_device || from_device ? cudaErrorInvalidValue : cudaSuccess;
    case cudaMemcpyHostToDevice:
        return !to_device || from_device ? cudaErrorInvalidValue : cudaSuccess;
    case cudaMemcpyDeviceToHost:
        return to_device || !from_device ? cudaErrorInvalidValue : cudaSuccess;
    case cudaMemcpyDeviceToDevice:
        return !to_device || !from_device ? cudaErrorInvalidValue : cudaSuccess;
    case cudaMemcpyDefault: return cudaSuccess;
    }
    return cudaErrorInvalidMemcpyDirection;
}

cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind copy_kind,
                 cudaStream_t stream, bool is_async) {
    if (bytes == 0) return cudaSuccess;
    const emu::place to_place = emu::place_of(to), from_place = emu::place_of(from);
    if (const cudaError_t error = check_copy(to_place, from_place, bytes, copy_kind))
        return emu::leave(error);
    const bool is_staged = from_place.kind == emu::kind::pageable;
    std::vector<char> stage;
    if (is_staged) stage.assign((const char *)from, (const char *)from + bytes);
    emu::enqueue(stream, [to, from, bytes, is_staged, stage = std::move(stage)] {
        const emu::open_memory memory(to, from);
        memmove(to, is_staged ? stage.data() : from, bytes);
        return true;
    });
    if (!is_async || to_place.kind == emu::kind::pageable) return cudaStreamSynchronize(stream);
    return cudaSuccess;
}

} // namespace

cudaError_t cudaGetDeviceCount(int *n_p) {
    if (const cudaError_t error = emu::enter(__func__, cudaErrorNoDevice)) return error;
    *n_p = n_device();
    return n_device() ? cudaSuccess : emu::leave(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device_p) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    *device_p = emu::current_device();
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    if (device < 0 || device >= n_device()) return emu::leave(cudaErrorInvalidDevice);
    *p = {};
    read_arch(&p->major, &p->minor);
    snprintf(p->name, sizeof p->name, "emulated device %d (sm_%d%d on the host)", device, p->major,
             p->minor);
    memcpy(p->uuid.bytes, "emulated device", 15);
    p->uuid.bytes[15] = (char)device;
    p->totalGlobalMem = (size_t)emu::env_number("IFKV_EMU_MEMORY", 8ll << 30);
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = (p->major >= 9 ? 227 : 163) << 10;
    p->sharedMemPerMultiprocessor = (p->major >= 9 ? 228 : 164) << 10;
    p->reservedSharedMemPerBlock = 1 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->multiProcessorCount = 4; /* few, so that persistent kernels go round */
    p->l2CacheSize = 1 << 20;
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
    p->asyncEngineCount = 2;
    p->pciBusID = device + 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value_p, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (const cudaError_t error = emu::enter(__func__)) return error;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value_p = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value_p = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value_p = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value_p = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value_p = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value_p = (int)p.sharedMemPerMultiprocessor;
        break;
    case cudaDevAttrL2CacheSize: *value_p = p.l2CacheSize; break;
    case cudaDevAttrWarpSize: *value_p = p.warpSize; break;
    default: return emu::leave(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    snprintf(text, (size_t)bytes, "0000:%02x:00.0", (unsigned)device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can_p, int device, int peer) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    if (device < 0 || peer < 0 || device >= n_device() || peer >= n_device())
        return emu::leave(cudaErrorInvalidDevice);
    *can_p = device != peer;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version_p) {
    *version_p = CUDART_VERSION;
    return emu::enter(__func__);
}

cudaError_t cudaDriverGetVersion(int *version_p) {
    *version_p = CUDART_VERSION;
    emu::is_failing("cudaDriverVersion", version_p);
    return emu::enter(__func__);
}

cudaError_t cudaMemGetInfo(size_t *free_p, size_t *total_p) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    *free_p = emu::free_bytes(emu::current_device());
    *total_p = (size_t)emu::env_number("IFKV_EMU_MEMORY", 8ll << 30);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **address_p, size_t bytes) {
    if (const cudaError_t error = emu::enter(__func__, cudaErrorMemoryAllocation)) return error;
    return emu::leave(emu::allocate(emu::kind::device, emu::current_device(), bytes, address_p));
}

/* Waits for the device, as the real one does: a stream that never ends keeps it waiting. */
cudaError_t cudaFree(void *address) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const emu::place place = emu::place_of(address);
    if (address && place.kind != emu::kind::device) return emu::leave(cudaErrorInvalidValue);
    if (address) emu::wait_device(place.device);
    return emu::leave(emu::release(emu::kind::device, address));
}

cudaError_t cudaHostAlloc(void **address_p, size_t bytes, unsigned) {
    if (const cudaError_t error = emu::enter(__func__, cudaErrorMemoryAllocation)) return error;
    return emu::leave(emu::allocate(emu::kind::pinned, -1, bytes, address_p));
}

cudaError_t cudaMallocHost(void **address_p, size_t bytes) {
    if (const cudaError_t error = emu::enter(__func__, cudaErrorMemoryAllocation)) return error;
    return emu::leave(emu::allocate(emu::kind::pinned, -1, bytes, address_p));
}

cudaError_t cudaFreeHost(void *address) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    if (address) emu::wait_device(emu::current_device());
    return emu::leave(emu::release(emu::kind::pinned, address));
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const emu::place place = emu::place_of(address);
    *attributes = {};
    attributes->device = place.device;
    attributes->type = cudaMemoryTypeUnregistered;
    if (place.kind == emu::kind::pinned) attributes->type = cudaMemoryTypeHost;
    if (place.kind == emu::kind::device) attributes->type = cudaMemoryTypeDevice;
    if (place.kind == emu::kind::device) attributes->devicePointer = (void *)address;
    if (place.kind == emu::kind::pinned) attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind copy_kind,
                            cudaStream_t stream) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    return copy(to, from, bytes, copy_kind, stream, true);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind copy_kind) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    return copy(to, from, bytes, copy_kind, nullptr, false);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const emu::place place = emu::place_of(to);
    if (bytes == 0) return cudaSuccess;
    if (place.kind == emu::kind::pageable || place.left < bytes)
        return emu::leave(cudaErrorInvalidValue);
    emu::enqueue(stream, [to, value, bytes] {
        const emu::open_memory memory(to, nullptr);
        memset(to, value, bytes);
        return true;
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    return emu::enter(__func__);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function_p, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *status_p) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const bool is_known = !strcmp(symbol, "cuTensorMapEncodeTiled");
    *function_p = is_known ? (void *)&emu_tensor_map_encode : nullptr;
    if (status_p)
        *status_p = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return is_known ? cudaSuccess : emu::leave(cudaErrorSymbolNotFound);
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorECCUncorrectable: return "cudaErrorECCUncorrectable";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchTimeout: return "cudaErrorLaunchTimeout";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorSymbolNotFound: return "cudaErrorSymbolNotFound";
    default: return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorECCUncorrectable: return "uncorrectable ECC error encountered";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchTimeout: return "the launch timed out and was terminated";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorSymbolNotFound: return "named symbol not found";
    default: return "unknown error";
    }
}
