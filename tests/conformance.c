#include "conformance.h"

gen noise;
bool is_aligned;
static const char *backend_name;

void conformance_init(int argc, char **argv) {
    backend_name = argc > 1 ? argv[1] : "cpu";
    noise = gen_create(argv[0]);
}

bool is_cpu(void) {
    return !strcmp(backend_name, "cpu");
}

ifkv_backend *open_with(int n_thread) {
    ifkv_backend *backend = NULL;
    assert_ok(ifkv_backend_open(backend_name, n_thread, 0, &backend));
    return backend;
}

int backend_setup(void **state) {
    *state = open_with(2);
    return 0;
}

int backend_teardown(void **state) {
    ifkv_backend_close(*state);
    return 0;
}

gen_matrix make_of(ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row, int64_t n_col,
                   int64_t gap, gen_fill fill) {
    return (is_aligned ? gen_matrix_create_aligned : gen_matrix_create)(&noise, backend, dtype,
                                                                        n_row, n_col, gap, fill);
}

gen_matrix make(ifkv_backend *backend, int64_t n_row, int64_t n_col, int64_t gap, gen_fill fill) {
    return make_of(backend, backend->ops->dtype, n_row, n_col, gap, fill);
}

double rounding(ifkv_dtype dtype, double want) {
    return dtype == IFKV_DTYPE_BF16 ? 0x1p-8 * fabs(want) : 0;
}

void assert_near(double got, double want, double tolerance, const char *what, int64_t row,
                 int64_t col) {
    if (!(got == want || fabs(got - want) <= tolerance))
        fail_msg("%s [%lld, %lld]: got %.9g, want %.9g within %.2g", what, (long long)row,
                 (long long)col, got, want, tolerance);
}
