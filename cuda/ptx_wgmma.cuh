/* wgmma and setmaxnreg (sm_90a); read through ptx.cuh only, which explains the fragments.
 *
 * An m64nNk16 product over a warpgroup: d [64, N] float = a [64, 16] * b [16, N] + (scale_d ? d :
 * 0), N chosen by the size N/2 of the accumulator array.  _ss takes both operands from shared
 * memory, _rs takes a from registers.  `trans_b` 0: b is K-major (rows of N, k contiguous), 1:
 * MN-major (rows of k, N contiguous).  a in shared memory is always K-major.
 *
 * Asynchronous: fence before the first one and whenever accumulators or a's registers were touched;
 * commit makes a group; after wait<n> all but the n latest groups are done, and only then may
 * accumulators, a's registers and the operands in shared memory be touched, or their arrays go out
 * of scope. */
#ifndef IFKV_CUDA_PTX_WGMMA_CUH
#define IFKV_CUDA_PTX_WGMMA_CUH

/* Descriptor of an operand in shared memory with 128-byte swizzle (hopper 9).  `shared` is the
 * first byte of the tile, shifted by the k step; offsets in bytes: `leading` between 64-wide chunks
 * of an MN-major operand (ignored for K-major), `stride` between groups of eight rows. */
__device__ __forceinline__ uint64_t ptx_wgmma_descriptor(const void *shared, uint32_t leading,
                                                         uint32_t stride) {
    const uint64_t start = (ptx_shared_address(shared) & 0x3ffffu) >> 4;
    return start | static_cast<uint64_t>((leading & 0x3ffffu) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

/* The same descriptor `bytes` further on. */
__device__ __forceinline__ uint64_t ptx_wgmma_descriptor_advance(uint64_t descriptor,
                                                                 uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

__device__ __forceinline__ void ptx_wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void ptx_wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int n> __device__ __forceinline__ void ptx_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

/* Keep the compiler from moving reads or writes of accumulators or fragments across this point. */
template <int n> __device__ __forceinline__ void ptx_pin(float (&values)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(values[i])::"memory");
}

/* Registers a thread of this warpgroup may use from here on, a multiple of 8 in 24..256; all its
 * warps execute it. */
template <int n> __device__ __forceinline__ void ptx_setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> __device__ __forceinline__ void ptx_setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// Accumulators as operands, and as the text that names them.
#define PTX_FLOATS_8(d, i)                                                                         \
    "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]),                    \
        "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define PTX_FLOATS_24(d, i) PTX_FLOATS_8(d, i), PTX_FLOATS_8(d, (i) + 8), PTX_FLOATS_8(d, (i) + 16)
#define PTX_FLOATS_32(d, i) PTX_FLOATS_24(d, i), PTX_FLOATS_8(d, (i) + 24)
#define PTX_FLOATS_64(d) PTX_FLOATS_32(d, 0), PTX_FLOATS_32(d, 32)
#define PTX_FLOATS_88(d) PTX_FLOATS_64(d), PTX_FLOATS_24(d, 64)
#define PTX_FLOATS_96(d) PTX_FLOATS_64(d), PTX_FLOATS_32(d, 64)
#define PTX_FLOATS_128(d) PTX_FLOATS_96(d), PTX_FLOATS_32(d, 96)
#define PTX_NAMES_32                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7"                                                               \
    ", %8, %9, %10, %11, %12, %13, %14, %15"                                                       \
    ", %16, %17, %18, %19, %20, %21, %22, %23"                                                     \
    ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_NAMES_64                                                                               \
    PTX_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"                                        \
                 ", %40, %41, %42, %43, %44, %45, %46, %47"                                        \
                 ", %48, %49, %50, %51, %52, %53, %54, %55"                                        \
                 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_NAMES_88                                                                               \
    PTX_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"                                        \
                 ", %72, %73, %74, %75, %76, %77, %78, %79"                                        \
                 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PTX_NAMES_96 PTX_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_NAMES_128                                                                              \
    PTX_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"                                    \
                 ", %104, %105, %106, %107, %108, %109, %110, %111"                                \
                 ", %112, %113, %114, %115, %116, %117, %118, %119"                                \
                 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define PTX_WGMMA(n, half, floats, names, i0, i1, i2, i3, i4, i5, i6)                              \
    template <int trans_b>                                                                         \
    __device__ __forceinline__ void ptx_wgmma_ss(float(&d)[half], uint64_t a, uint64_t b,          \
                                                 int scale_d) {                                    \
        asm volatile("{\n\t"                                                                       \
                     ".reg .pred p;\n\t"                                                           \
                     "setp.ne.b32 p, " i2 ", 0;\n\t"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " i0   \
                     ", " i1 ", p, 1, 1, 0, " i3 ";\n\t"                                           \
                     "}"                                                                           \
                     : floats                                                                      \
                     : "l"(a), "l"(b), "r"(scale_d), "n"(trans_b)                                  \
                     : "memory");                                                                  \
    }                                                                                              \
    template <int trans_b>                                                                         \
    __device__ __forceinline__ void ptx_wgmma_rs(float(&d)[half], const uint32_t(&a)[4],           \
                                                 uint64_t b, int scale_d) {                        \
        asm volatile("{\n\t"                                                                       \
                     ".reg .pred p;\n\t"                                                           \
                     "setp.ne.b32 p, " i5 ", 0;\n\t"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, {" i0  \
                     ", " i1 ", " i2 ", " i3 "}, " i4 ", p, 1, 1, " i6 ";\n\t"                     \
                     "}"                                                                           \
                     : floats                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d),           \
                       "n"(trans_b)                                                                \
                     : "memory");                                                                  \
    }

PTX_WGMMA(64, 32, PTX_FLOATS_32(d, 0), PTX_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37",
          "%38")
PTX_WGMMA(128, 64, PTX_FLOATS_64(d), PTX_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
PTX_WGMMA(176, 88, PTX_FLOATS_88(d), PTX_NAMES_88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
PTX_WGMMA(192, 96, PTX_FLOATS_96(d), PTX_NAMES_96, "%96", "%97", "%98", "%99", "%100", "%101",
          "%102")
PTX_WGMMA(256, 128, PTX_FLOATS_128(d), PTX_NAMES_128, "%128", "%129", "%130", "%131", "%132",
          "%133", "%134")

#undef PTX_WGMMA

#endif
