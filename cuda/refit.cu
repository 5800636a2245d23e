/* Rows that were not recomputed follow those that were: per head, W = (sum x x' + lambda)^-1 sum x
 * y' of a stale row x and its change y, both less their means, lambda = ridge * trace / d_head;
 * then every other row x moves by shift + W' x (backend.h, refit).  x is a row as it was before
 * rotation.
 *
 * Host code: checks operands and puts the three launches one behind the other, each with its budget
 * in a file of its own: moments (refit_moments.cu), solution (refit_solve.cu), movement
 * (refit_move.cu).  d_head is a multiple of 16 up to 128; rows begin on 16 bytes. */
#include "piece.cuh"
#include "refit.cuh"

namespace {

ifkv_status check_aligned(const char *what, const ifkv_view *view) {
    IFKV_REQUIRE(!view->data || is_aligned(view), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got rows of %s that do not begin on 16 bytes", what);
    return IFKV_OK;
}

ifkv_status check_refit(const ifkv_refit_args *args) {
    IFKV_REQUIRE(args->n_head >= 1 && args->d_head % 16 == 0 && args->d_head >= 16 &&
                     args->d_head <= MAX_D_HEAD,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got %d heads of width %d, expected a multiple of 16 up to %d",
                 args->n_head, args->d_head, MAX_D_HEAD);
    IFKV_TRY(ifkv_refit_check(args, IFKV_DTYPE_BF16));
    IFKV_TRY(check_aligned("stale", &args->stale));
    IFKV_TRY(check_aligned("fresh", &args->fresh));
    IFKV_TRY(check_aligned("x", &args->x));
    IFKV_TRY(check_aligned("cos_sin", &args->cos_sin));
    IFKV_REQUIRE(reinterpret_cast<uintptr_t>(args->scratch) % 16 == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "refit: got scratch that does not begin on 16 bytes");
    return IFKV_OK;
}

} // namespace

extern "C" ifkv_status ifkv_cuda_refit(const ifkv_cuda_context *context,
                                       const ifkv_refit_args *args) {
    IFKV_TRY(check_refit(args));
    if (args->stale.n_row == 0) return IFKV_OK;
    IFKV_TRY(ifkv_cuda_refit_moments(context, args));
    IFKV_TRY(ifkv_cuda_refit_solve(context, args));
    return ifkv_cuda_refit_move(context, args);
}
