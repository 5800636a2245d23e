/* The host calls a test kernel needs, on the model (IFKV_EMU: plain memory, no stand-in) and on a
 * GPU. */
#ifndef IFKV_EMU_DEVICE_H
#define IFKV_EMU_DEVICE_H

#include "check.h"
#include "common.cuh"
#include "launch.cuh"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#ifdef IFKV_EMU
#include "emu_tensor_map.h"
#endif

/* An array on the device; what nobody wrote is NaN.  Owns its memory. */
template <typename T> class device_array {
  public:
    explicit device_array(size_t n) : n_(n) {
        const std::vector<unsigned char> poison(n * sizeof(T), 0xff);
        acquire();
        upload(poison.data());
    }
    explicit device_array(const std::vector<T> &from) : n_(from.size()) {
        acquire();
        upload(from.data());
    }
    device_array(const device_array &) = delete;
    device_array &operator=(const device_array &) = delete;
#ifdef IFKV_EMU
    ~device_array() {
        free(data_);
    }
    std::vector<T> fetch() const {
        return std::vector<T>(data_, data_ + n_);
    }

  private:
    void acquire() {
        void *memory = nullptr;
        if (posix_memalign(&memory, 256, n_ * sizeof(T)) != 0) abort();
        data_ = static_cast<T *>(memory);
    }
    void upload(const void *from) {
        memcpy(static_cast<void *>(data_), from, n_ * sizeof(T));
    }
#else
    ~device_array() {
        cudaFree(data_);
    }
    std::vector<T> fetch() const {
        std::vector<T> to(n_);
        const cudaError_t error =
            cudaMemcpy(to.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost);
        CHECK(error == cudaSuccess, "copy from the device: %s", cudaGetErrorString(error));
        return to;
    }

  private:
    void acquire() {
        void *memory = nullptr;
        const cudaError_t error = cudaMalloc(&memory, n_ * sizeof(T));
        CHECK(error == cudaSuccess, "allocation on the device: %s", cudaGetErrorString(error));
        data_ = static_cast<T *>(memory);
    }
    void upload(const void *from) {
        const cudaError_t error = cudaMemcpy(data_, from, n_ * sizeof(T), cudaMemcpyHostToDevice);
        CHECK(error == cudaSuccess, "copy to the device: %s", cudaGetErrorString(error));
    }
#endif
  public:
    T *data() const {
        return data_;
    }

  private:
    T *data_ = nullptr;
    size_t n_;
};

/* A tensor map of bf16: dims and box in elements, innermost first, strides in bytes from the second
 * dimension on. */
inline CUresult device_encode(CUtensorMap *map, void *address, const std::vector<cuuint64_t> &dims,
                              const std::vector<cuuint64_t> &strides,
                              const std::vector<cuuint32_t> &box, CUtensorMapSwizzle swizzle) {
    const std::vector<cuuint32_t> ones(dims.size(), 1);
#ifdef IFKV_EMU
    const auto encode = emu_tensor_map_encode;
#else
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    CHECK(error == cudaSuccess && entry, "cuTensorMapEncodeTiled: %s", cudaGetErrorString(error));
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
#endif
    return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(dims.size()),
                  address, dims.data(), strides.data(), box.data(), ones.data(),
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

inline CUtensorMap device_tensor_map(void *address, const std::vector<cuuint64_t> &dims,
                                     const std::vector<cuuint64_t> &strides,
                                     const std::vector<cuuint32_t> &box,
                                     CUtensorMapSwizzle swizzle) {
    CUtensorMap map;
    const CUresult result = device_encode(&map, address, dims, strides, box, swizzle);
    CHECK(result == CUDA_SUCCESS, "tensor map: %d", static_cast<int>(result));
    return map;
}

inline uint16_t bf16_bits(float value) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

/* Integers in [-high, high] as bf16, and as numbers. */
inline std::vector<uint16_t> random_bf16(size_t n, int high, uint64_t seed,
                                         std::vector<int> *values) {
    check_random random = {seed};
    std::vector<uint16_t> bits(n);
    values->resize(n);
    for (size_t i = 0; i < n; i++) {
        (*values)[i] = random.between(-high, high);
        bits[i] = bf16_bits(static_cast<float>((*values)[i]));
    }
    return bits;
}

#endif
