/* The k largest of a list of scores in a total order, larger value first, then lower index, written
 * in ascending index.
 *
 * Floats become unsigned integers that order alike (-0 first becomes +0).  The k-th largest is
 * found digit by digit, 11, 11 and 10 bits, from histograms of the keys that share the digits found
 * so far; then one pass writes every larger key, and of the equal ones the first that are still
 * wanted.  One block does it all: a list is read four times whatever it holds, 1 MiB of scores in
 * about 30 us, once a request, and nothing depends on which thread comes first.  No scratch. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 1024, WARPS = THREADS / IFKV_WARP_LANES;
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;

struct SharedMemory {
    uint32_t count[DIGITS]; // of keys by their next digit
    unsigned digit;         // the one chosen
    uint32_t wanted;        // how many of the keys with that digit
    unsigned larger[WARPS], equal[WARPS];
};
static_assert(sizeof(SharedMemory) <= 48 * 1024, "more must be asked for");

struct top_k_args {
    const float *value;
    int64_t n, k;
    int64_t *index;
};

__device__ __forceinline__ uint32_t order_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ void count_digits(const top_k_args &args, SharedMemory &shared, uint32_t prefix,
                             uint32_t known, int shift, uint32_t mask) {
    for (int i = static_cast<int>(threadIdx.x); i < DIGITS; i += THREADS) shared.count[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < args.n; i += THREADS) {
        const uint32_t key = order_key(args.value[i]);
        if ((key & known) == prefix) atomicAdd(&shared.count[key >> shift & mask], 1u);
    }
    __syncthreads();
}

/* The largest digit with fewer than `wanted` keys above it, by the lanes of one warp: each adds up
 * its share of the digits, then the one whose share holds the answer looks closer. */
__device__ void choose_digit(SharedMemory &shared, uint32_t wanted, uint32_t mask) {
    const int share = (static_cast<int>(mask) + 1) / IFKV_WARP_LANES;
    const int top = static_cast<int>(mask) - lane_index() * share; // lane 0 has the largest digits
    uint32_t mine = 0, above = 0;
    for (int i = 0; i < share; i++) mine += shared.count[top - i];
    for (int lane = 0; lane < IFKV_WARP_LANES; lane++) {
        const uint32_t other = __shfl_sync(IFKV_ALL_LANES, mine, lane);
        if (lane < lane_index()) above += other;
    }
    if (above >= wanted || above + mine < wanted) return;
    int digit = top;
    for (; above + shared.count[digit] < wanted; digit--) above += shared.count[digit];
    shared.digit = static_cast<unsigned>(digit);
    shared.wanted = wanted - above;
}

/* Write what belongs to the k of one block-wide piece of the list; returns how many that were. */
__device__ int64_t write_piece(const top_k_args &args, SharedMemory &shared, int64_t i,
                               uint32_t least, uint32_t &n_equal, int64_t written) {
    const bool is_in = i < args.n;
    const uint32_t key = is_in ? order_key(args.value[i]) : 0;
    const bool is_larger = is_in && key > least, is_equal = is_in && key == least;
    const unsigned larger = __ballot_sync(IFKV_ALL_LANES, is_larger),
                   equal = __ballot_sync(IFKV_ALL_LANES, is_equal);
    if (lane_index() == 0) {
        shared.larger[warp_index()] = static_cast<unsigned>(__popc(larger));
        shared.equal[warp_index()] = static_cast<unsigned>(__popc(equal));
    }
    __syncthreads();
    const unsigned below = (1u << lane_index()) - 1; // lanes before this one
    uint32_t larger_before = static_cast<unsigned>(__popc(larger & below)),
             equal_before = static_cast<unsigned>(__popc(equal & below)), all_larger = 0,
             all_equal = 0;
    for (int warp = 0; warp < WARPS; warp++) {
        if (warp < warp_index()) {
            larger_before += shared.larger[warp];
            equal_before += shared.equal[warp];
        }
        all_larger += shared.larger[warp];
        all_equal += shared.equal[warp];
    }
    const uint32_t taken_before = equal_before < n_equal ? equal_before : n_equal;
    if (is_larger || (is_equal && equal_before < n_equal))
        args.index[written + static_cast<int64_t>(larger_before + taken_before)] = i;
    __syncthreads(); // before the next piece's counts
    const uint32_t taken = all_equal < n_equal ? all_equal : n_equal;
    n_equal -= taken;
    return static_cast<int64_t>(all_larger + taken);
}

__global__ void __launch_bounds__(THREADS) select_top(top_k_args args) {
    SharedMemory &shared = ifkv_shared<SharedMemory>();
    uint32_t prefix = 0, known = 0; // digits found so far, and the mask of their bits
    uint32_t wanted = static_cast<uint32_t>(args.k);
    for (int shift = 32; shift > 0;) {
        const int bits = shift < DIGIT_BITS ? shift : DIGIT_BITS;
        const uint32_t mask = (1u << bits) - 1;
        shift -= bits;
        count_digits(args, shared, prefix, known, shift, mask);
        if (warp_index() == 0) choose_digit(shared, wanted, mask);
        __syncthreads();
        prefix |= shared.digit << shift;
        known |= mask << shift;
        wanted = shared.wanted;
        __syncthreads(); // before the histogram is cleared
    }
    int64_t written = 0;
    for (int64_t first = 0; first < args.n; first += THREADS)
        written += write_piece(args, shared, first + threadIdx.x, prefix, wanted, written);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_top_k(const ifkv_cuda_context *context, const float *value,
                                       int64_t n, int64_t k, int64_t *scratch, int64_t *index) {
    (void)scratch;
    IFKV_REQUIRE(k >= 0 && k <= n, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "top_k: got %lld of %lld values", static_cast<long long>(k),
                 static_cast<long long>(n));
    IFKV_REQUIRE(n <= UINT32_MAX, IFKV_ERR_UNSUPPORTED, IFKV_E_SHAPE,
                 "top_k: got %lld values, expected at most %lld", static_cast<long long>(n),
                 static_cast<long long>(UINT32_MAX));
    if (k == 0) return IFKV_OK;
    const top_k_args args = {value, n, k, index};
    return IFKV_CUDA(ifkv_launch(select_top, dim3(1), dim3(THREADS), sizeof(SharedMemory),
                                 context->stream, args));
}
