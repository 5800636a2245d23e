/* Opening back ends by name, the one conditional that says which were built, and the checks of
 * operands that they share.
 *
 * Owns the list of names.  Knows nothing of what a back end does. */
#include "backend.h"

#include <string.h>

#if IFKV_HAVE_CUDA
#define CUDA_OPEN ifkv_cuda_backend_open
#define CUDA_IS_WANTED ifkv_cuda_backend_is_wanted
#else
static ifkv_status no_cuda_open(int n_thread, int node_rank, ifkv_backend **backend_p) {
    (void)n_thread, (void)node_rank, (void)backend_p;
    return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_BACKEND,
                     "back end cuda: this ifkv was built without CUDA");
}
static bool no_cuda_is_wanted(void) {
    return false;
}
#define CUDA_OPEN no_cuda_open
#define CUDA_IS_WANTED no_cuda_is_wanted
#endif

static ifkv_status auto_open(int n_thread, int node_rank, ifkv_backend **backend_p) {
    return (CUDA_IS_WANTED() ? CUDA_OPEN : ifkv_cpu_backend_open)(n_thread, node_rank, backend_p);
}

enum { MAX_THREAD = 4096 }; /* what the engine accepts */

static const struct {
    const char *name;
    ifkv_status (*open)(int n_thread, int node_rank, ifkv_backend **backend_p);
} backends[] = {
    {"auto", auto_open},
    {"cpu", ifkv_cpu_backend_open},
    {"cuda", CUDA_OPEN},
};

ifkv_status ifkv_backend_open(const char *name, int n_thread, int node_rank,
                              ifkv_backend **backend_p) {
    IFKV_REQUIRE(name && backend_p, IFKV_ERR_USAGE, IFKV_E_BACKEND,
                 "back end: name or result NULL");
    IFKV_REQUIRE(n_thread >= 1 && n_thread <= MAX_THREAD, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "back end: got %d threads, expected 1 to %d", n_thread, (int)MAX_THREAD);
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
        if (!strcmp(name, backends[i].name))
            return backends[i].open(n_thread, node_rank, backend_p);
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_BACKEND,
                     "back end: got \"%s\", expected auto, cpu or cuda",
                     ifkv_quote(name, strlen(name), quoted));
}

void ifkv_backend_close(ifkv_backend *backend) {
    if (backend) backend->ops->close(backend);
}

ifkv_status ifkv_view_check(const char *op, const char *what, const ifkv_view *view,
                            ifkv_dtype dtype, int64_t n_row, int64_t n_col) {
    IFKV_REQUIRE(view->n_row == n_row && view->n_col == n_col && n_row >= 0 && n_col >= 0,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "%s: %s is [%lld, %lld], expected [%lld, %lld]",
                 op, what, (long long)view->n_row, (long long)view->n_col, (long long)n_row,
                 (long long)n_col);
    IFKV_REQUIRE(view->dtype == dtype, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "%s: %s has element type %d, expected %d", op, what, (int)view->dtype, (int)dtype);
    IFKV_REQUIRE(view->stride >= n_col && (view->data || n_row == 0 || n_col == 0),
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "%s: %s has stride %lld for %lld columns, or no data", op, what,
                 (long long)view->stride, (long long)n_col);
    return IFKV_OK;
}

ifkv_status ifkv_refit_check(const ifkv_refit_args *args, ifkv_dtype dtype) {
    const int64_t n_col = (int64_t)args->n_head * args->d_head, n_fit = args->stale.n_row,
                  n_row = args->x.n_row;
    IFKV_TRY(ifkv_view_check("refit", "stale", &args->stale, dtype, n_fit, n_col));
    IFKV_TRY(ifkv_view_check("refit", "fresh", &args->fresh, dtype, n_fit, n_col));
    IFKV_TRY(ifkv_view_check("refit", "x", &args->x, dtype, n_row, n_col));
    if (args->cos_sin.data)
        IFKV_TRY(ifkv_view_check("refit", "cos_sin", &args->cos_sin, IFKV_DTYPE_F32, n_row,
                                 args->d_head));
    IFKV_REQUIRE(args->first >= 0, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got first row %lld, expected at least 0", (long long)args->first);
    return IFKV_OK;
}
