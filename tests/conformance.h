/* What the programs that hold a back end to its definition begin with: the back end named on the
 * command line, seeded noise, operands in its memory, and a comparison with float64.
 *
 * A program is one operation or a few, runs as `program cpu | cuda`, and computes what it expects
 * itself.  All back ends compute in float32; one whose results are bfloat16 rounds them once more.
 */
#ifndef IFKV_TESTS_CONFORMANCE_H
#define IFKV_TESTS_CONFORMANCE_H

#include "gen.h"
#include "test.h"

#define EPS 0x1p-23 /* spacing of float32 at 1; a rounding errs by at most EPS / 2 */

extern gen noise;
/* Rows of `make` begin anywhere, or all on 16 bytes: a back end may take another way then. */
extern bool is_aligned;

/* Take the back end's name from the arguments (cpu if there is none) and seed the noise. */
void conformance_init(int argc, char **argv);
bool is_cpu(void);
ifkv_backend *open_with(int n_thread);

/* cmocka setup and teardown of a group: *state is the back end, with two threads. */
int backend_setup(void **state);
int backend_teardown(void **state);

gen_matrix make_of(ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row, int64_t n_col,
                   int64_t gap, gen_fill fill);
/* Of the back end's own type. */
gen_matrix make(ifkv_backend *backend, int64_t n_row, int64_t n_col, int64_t gap, gen_fill fill);

/* The last rounding of a result to this type, beyond that to float32: 2^-8 of bfloat16. */
double rounding(ifkv_dtype dtype, double want);
/* Fail with `what` and the place where got is farther from want than tolerance; infinities equal
 * themselves. */
void assert_near(double got, double want, double tolerance, const char *what, int64_t row,
                 int64_t col);

#endif
