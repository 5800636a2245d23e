/* Data for tests.  See gen.h. */
#include "gen.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    FENCE = 67,        /* odd, so that no operand is aligned */
    ALIGNED_FENCE = 72 /* 16 bytes of any type */
};

gen gen_create(const char *program) {
    const char *text = getenv("IFKV_TEST_SEED");
    const uint64_t seed = text ? strtoull(text, NULL, 10) : (uint64_t)time(NULL);
    fprintf(stderr, "%s: IFKV_TEST_SEED=%llu\n", program, (unsigned long long)seed);
    return (gen){.state = seed};
}

uint64_t gen_bits(gen *g) {
    uint64_t z = g->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t gen_below(gen *g, int64_t n) {
    return (int64_t)(gen_bits(g) % (uint64_t)n);
}

double gen_uniform(gen *g, double low, double high) {
    return low + (high - low) * ((double)(gen_bits(g) >> 11) * 0x1p-53);
}

/* What cannot go on without: out of memory or a back end that cannot copy. */
static void must(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "tests: %s failed: %s\n", what, ifkv_last_error()->text);
    abort();
}

static size_t element_at(const gen_matrix *m, int64_t row, int64_t col) {
    return (size_t)(m->fence + row * m->view.stride + col) * ifkv_dtype_bytes(m->view.dtype);
}

/* What is stored of a value, and back. */
static void encode(ifkv_dtype dtype, double value, void *stored) {
    const float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    if (dtype == IFKV_DTYPE_BF16) {
        if (!isnan(narrow)) bits += 0x7fffu + (bits >> 16 & 1u);
        const uint16_t upper = (uint16_t)(bits >> 16);
        memcpy(stored, &upper, sizeof upper);
    } else if (dtype == IFKV_DTYPE_F64) {
        memcpy(stored, &value, sizeof value);
    } else {
        must(dtype == IFKV_DTYPE_F32, "element type");
        memcpy(stored, &narrow, sizeof narrow);
    }
}

double gen_decode(ifkv_dtype dtype, const void *stored) {
    uint16_t upper = 0;
    double value;
    float narrow;
    if (dtype == IFKV_DTYPE_F64) {
        memcpy(&value, stored, sizeof value);
        return value;
    }
    if (dtype == IFKV_DTYPE_BF16) {
        memcpy(&upper, stored, sizeof upper);
        const uint32_t bits = (uint32_t)upper << 16;
        memcpy(&narrow, &bits, sizeof narrow);
    } else {
        memcpy(&narrow, stored, sizeof narrow);
    }
    return (double)narrow;
}

double gen_round(ifkv_dtype dtype, double value) {
    unsigned char stored[sizeof value];
    encode(dtype, value, stored);
    return gen_decode(dtype, stored);
}

static gen_matrix create(gen *g, ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row,
                         int64_t n_col, int64_t stride, int64_t fence, gen_fill fill) {
    gen_matrix m = {.backend = backend, .fence = fence};
    m.view = ifkv_view_make(NULL, dtype, n_row, n_col, stride);
    m.bytes = element_at(&m, n_row, fence);
    m.image = malloc(m.bytes);
    m.value = malloc((size_t)(n_row * n_col + 1) * sizeof *m.value);
    must(m.image && m.value, "malloc");
    must(backend->ops->alloc(backend, m.bytes, &m.base) == IFKV_OK, "alloc");
    m.view.data = (char *)m.base + element_at(&m, 0, 0);
    for (int64_t i = 0; i < n_row * n_col; i++)
        m.value[i] = fill == GEN_UNIFORM   ? gen_uniform(g, -1, 1)
                     : fill == GEN_INTEGER ? (double)(gen_below(g, 9) - 4)
                                           : (double)NAN;
    gen_matrix_write(&m);
    return m;
}

gen_matrix gen_matrix_create(gen *g, ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row,
                             int64_t n_col, int64_t gap, gen_fill fill) {
    return create(g, backend, dtype, n_row, n_col, n_col + gap, FENCE, fill);
}

gen_matrix gen_matrix_create_aligned(gen *g, ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row,
                                     int64_t n_col, int64_t gap, gen_fill fill) {
    const int64_t unit = 16 / (int64_t)ifkv_dtype_bytes(dtype);
    const int64_t stride = (n_col + gap + unit - 1) / unit * unit;
    return create(g, backend, dtype, n_row, n_col, stride, ALIGNED_FENCE, fill);
}

void gen_matrix_write(gen_matrix *m) {
    const ifkv_dtype dtype = m->view.dtype;
    memset(m->image, 0xff, m->bytes);
    for (int64_t row = 0; row < m->view.n_row; row++)
        for (int64_t col = 0; col < m->view.n_col; col++) {
            unsigned char *stored = m->image + element_at(m, row, col);
            encode(dtype, *gen_at(m, row, col), stored);
            *gen_at(m, row, col) = gen_decode(dtype, stored);
        }
    must(m->backend->ops->upload(m->backend, m->base, m->image, m->bytes) == IFKV_OK, "upload");
    must(m->backend->ops->sync(m->backend) == IFKV_OK, "sync");
}

bool gen_matrix_read(gen_matrix *m) {
    must(m->backend->ops->sync(m->backend) == IFKV_OK, "sync");
    must(m->backend->ops->download(m->backend, m->image, m->base, m->bytes) == IFKV_OK, "download");
    must(m->backend->ops->sync(m->backend) == IFKV_OK, "sync");
    bool is_intact = true;
    size_t next = 0;
    for (int64_t row = 0; row <= m->view.n_row; row++) {
        const size_t begin = row < m->view.n_row ? element_at(m, row, 0) : m->bytes;
        for (size_t i = next; i < begin; i++) is_intact = is_intact && m->image[i] == 0xff;
        if (row == m->view.n_row) break;
        next = element_at(m, row, m->view.n_col);
        for (int64_t col = 0; col < m->view.n_col; col++)
            *gen_at(m, row, col) = gen_decode(m->view.dtype, m->image + element_at(m, row, col));
    }
    return is_intact;
}

void gen_matrix_destroy(gen_matrix *m) {
    m->backend->ops->free(m->backend, m->base);
    free(m->image);
    free(m->value);
}

void *gen_upload(ifkv_backend *backend, const void *from, size_t bytes) {
    void *to = NULL;
    must(backend->ops->alloc(backend, bytes, &to) == IFKV_OK, "alloc");
    must(backend->ops->upload(backend, to, from, bytes) == IFKV_OK, "upload");
    must(backend->ops->sync(backend) == IFKV_OK, "sync");
    return to;
}
