/* Element types, row-major matrix views, and size arithmetic that cannot wrap.
 *
 * Owns no memory and knows no back end: a view is a window into somebody's allocation.  All
 * activations and weights of the library are matrices [n_row, n_col] whose rows are `stride`
 * elements apart; heads lie inside a row, [n_head, d_head]. */
#ifndef IFKV_SRC_TENSOR_H
#define IFKV_SRC_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ifkv_dtype {
    IFKV_DTYPE_F32,
    IFKV_DTYPE_F64,
    IFKV_DTYPE_BF16,
    IFKV_DTYPE_F16
} ifkv_dtype;

static inline size_t ifkv_dtype_bytes(ifkv_dtype dtype) {
    return dtype == IFKV_DTYPE_F64 ? 8 : dtype == IFKV_DTYPE_F32 ? 4 : 2;
}

static inline const char *ifkv_dtype_name(ifkv_dtype dtype) {
    static const char *const names[] = {"float32", "float64", "bfloat16", "float16"};
    return names[dtype];
}

typedef struct ifkv_view {
    void *data; /* views, in the back end's memory */
    ifkv_dtype dtype;
    int64_t n_row, n_col;
    int64_t stride; /* elements between the starts of two rows, >= n_col */
} ifkv_view;

static inline ifkv_view ifkv_view_make(void *data, ifkv_dtype dtype, int64_t n_row, int64_t n_col,
                                       int64_t stride) {
    ifkv_view view;
    view.data = data;
    view.dtype = dtype;
    view.n_row = n_row;
    view.n_col = n_col;
    view.stride = stride;
    return view;
}

/* Rows [row, row + n_row) and columns [col, col + n_col) of a view. */
static inline ifkv_view ifkv_view_block(const ifkv_view *of, int64_t row, int64_t n_row,
                                        int64_t col, int64_t n_col) {
    ifkv_view view = *of;
    view.data = (char *)of->data + (size_t)(row * of->stride + col) * ifkv_dtype_bytes(of->dtype);
    view.n_row = n_row;
    view.n_col = n_col;
    return view;
}

static inline ifkv_view ifkv_view_rows(const ifkv_view *of, int64_t row, int64_t n_row) {
    return ifkv_view_block(of, row, n_row, 0, of->n_col);
}

/* True if the result does not fit; *out is then unspecified.  The only arithmetic allowed on sizes
 * from files. */
static inline bool ifkv_add_overflow(uint64_t a, uint64_t b, uint64_t *out) {
    return __builtin_add_overflow(a, b, out);
}
static inline bool ifkv_mul_overflow(uint64_t a, uint64_t b, uint64_t *out) {
    return __builtin_mul_overflow(a, b, out);
}

#ifdef __cplusplus
}
#endif
#endif
