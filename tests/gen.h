/* Data for tests: seeded noise, small integers that floats hold exactly, and matrices in back-end
 * memory fenced by NaN.
 *
 * Owns what it creates.  A matrix lies at an odd offset, or at one of 16 bytes, inside a larger
 * allocation whose every other byte, the gaps between its rows included, is 0xff, a NaN of every
 * float type: an operation that reads beside its operand shows it in the result, one that writes
 * there is caught by the next read. */
#ifndef IFKV_TESTS_GEN_H
#define IFKV_TESTS_GEN_H

#include "backend.h"

/* Uniform bits, splitmix64 (Steele, Lea, Flood 2014). */
typedef struct gen {
    uint64_t state;
} gen;

/* A seed that differs from run to run, or IFKV_TEST_SEED; printed, so that a failure can be
 * repeated. */
gen gen_create(const char *program);
uint64_t gen_bits(gen *g);
/* Uniform in [0, n). */
int64_t gen_below(gen *g, int64_t n);
/* Uniform in [low, high). */
double gen_uniform(gen *g, double low, double high);

typedef enum gen_fill {
    GEN_POISON,  /* NaN: an output */
    GEN_UNIFORM, /* [-1, 1) */
    GEN_INTEGER  /* -4 .. 4 */
} gen_fill;

typedef struct gen_matrix {
    ifkv_backend *backend; /* borrows */
    ifkv_view view;        /* views base */
    void *base;            /* owns, back-end memory */
    unsigned char *image;  /* owns, host copy of base */
    size_t bytes;
    int64_t fence; /* elements before and after */
    double
        *value; /* owns [n_row * n_col]: what the view holds, exactly, at the last write or read */
} gen_matrix;

/* Create a matrix whose rows are n_col + gap elements apart. */
gen_matrix gen_matrix_create(gen *g, ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row,
                             int64_t n_col, int64_t gap, gen_fill fill);
/* Create a matrix whose rows begin on 16 bytes, and are up to 15 bytes farther apart. */
gen_matrix gen_matrix_create_aligned(gen *g, ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row,
                                     int64_t n_col, int64_t gap, gen_fill fill);
/* Send value, rounded to the element type, to the back end, and restore the fence. */
void gen_matrix_write(gen_matrix *m);
/* Fetch value from the back end; false if a byte of the fence has changed. */
bool gen_matrix_read(gen_matrix *m);
void gen_matrix_destroy(gen_matrix *m);

static inline double *gen_at(const gen_matrix *m, int64_t row, int64_t col) {
    return &m->value[row * m->view.n_col + col];
}

/* The number stored there. */
double gen_decode(ifkv_dtype dtype, const void *stored);
/* The nearest number of that type, ties to even. */
double gen_round(ifkv_dtype dtype, double value);

/* A copy of host memory in back-end memory; the caller owns it (ops->free). */
void *gen_upload(ifkv_backend *backend, const void *from, size_t bytes);

#endif
