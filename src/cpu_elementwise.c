/* Row-wise operations: RMS norm, angles, rotation, SwiGLU, gather and scatter, distances of rows,
 * and the exponential that they and attention share.
 *
 * Knows no matrix product.  Rows are dealt to threads; a row is reduced over IFKV_CPU_LANES partial
 * sums in a fixed order, so its bits depend on its values alone. */
#include "cpu_backend.h"

#include <math.h>
#include <string.h>

enum { LANES = IFKV_CPU_LANES };

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* is ? a : b without a branch: written as one, the compiler masks all that depends on it. */
static inline float choose(bool is, float a, float b) {
    const uint32_t mask = -(uint32_t)is;
    return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; x at most 88.7.  Adding 1.5 * 2^23
 * rounds to an integer and leaves it in the low bits.  ln 2 is subtracted in two parts, the first
 * short enough that n times it is exact.  The polynomial is the minimax one of relative error 4e-9.
 * The ends come out of the scale itself: n = -127 gives the bits of 0 and n = 128 those of
 * infinity; a NaN passes. */
static inline float exp_of(float x) {
    const float round = 0x1.8p23f, log2_e = 0x1.715476p0f;
    const float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
    x = choose(x < -88.0f, -88.0f, x);
    const float shifted = x * log2_e + round, n = shifted - round;
    const float r = (x - n * ln2_high) - n * ln2_low;
    float p = 0x1.6a21acp-10f;
    p = p * r + 0x1.123b6ap-7f;
    p = p * r + 0x1.5558fap-5f;
    p = p * r + 0x1.555490p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = (p * (r * r) + r) + 1.0f;
    return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

static inline float sum_of(const float *lane) {
    float part[LANES];
    memcpy(part, lane, sizeof part);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) part[l] += part[l + half];
    return part[0];
}

IFKV_CPU_CLONES
float ifkv_cpu_max(const float *x, int64_t n) {
    float lane[LANES], max = -INFINITY;
    for (int l = 0; l < LANES; l++) lane[l] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (int l = 0; i < n; i++, l++) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
    for (int l = 0; l < LANES; l++) max = lane[l] > max ? lane[l] : max;
    return max;
}

IFKV_CPU_CLONES
float ifkv_cpu_exp_sum(float *x, int64_t n, float shift) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            x[i + l] = exp_of(x[i + l] - shift);
            lane[l] += x[i + l];
        }
    for (int l = 0; i < n; i++, l++) {
        x[i] = exp_of(x[i] - shift);
        lane[l] += x[i];
    }
    return sum_of(lane);
}

IFKV_CPU_CLONES
void ifkv_cpu_silu_mul(const float *restrict gate, const float *restrict up, float *restrict out,
                       int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float x = choose(gate[i] < -88.7f, 88.7f, -gate[i]);
        out[i] = gate[i] / (1.0f + exp_of(x)) * up[i];
    }
}

IFKV_CPU_CLONES
static float sum_squares(const float *x, int64_t n) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += x[i + l] * x[i + l];
    for (int l = 0; i < n; i++, l++) lane[l] += x[i] * x[i];
    return sum_of(lane);
}

/* One row; out may be x. */
static void norm_row(const float *x, const float *weight, int64_t n, double eps, float *out) {
    const float inverse = (float)(1.0 / sqrt((double)sum_squares(x, n) / (double)n + eps));
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

ifkv_status ifkv_cpu_rms_norm(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *weight,
                              double eps, const ifkv_view *out) {
    const int64_t n_row = x->n_row, n_col = x->n_col;
    IFKV_TRY(ifkv_view_check("rms_norm", "x", x, IFKV_DTYPE_F32, n_row, n_col));
    IFKV_TRY(ifkv_view_check("rms_norm", "weight", weight, IFKV_DTYPE_F32, 1, n_col));
    IFKV_TRY(ifkv_view_check("rms_norm", "out", out, IFKV_DTYPE_F32, n_row, n_col));
    const float *from = x->data;
    float *to = out->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * n_col))
    for (int64_t row = 0; row < n_row; row++)
        norm_row(from + row * x->stride, weight->data, n_col, eps, to + row * out->stride);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_angles(ifkv_backend *backend, const double *frequency, const int64_t *position,
                            const ifkv_view *cos_sin) {
    const int64_t n_row = cos_sin->n_row, half = cos_sin->n_col / 2;
    IFKV_TRY(ifkv_view_check("angles", "cos_sin", cos_sin, IFKV_DTYPE_F32, n_row, 2 * half));
    float *to = cos_sin->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * half))
    for (int64_t row = 0; row < n_row; row++)
        for (int64_t i = 0; i < half; i++) {
            /* At position 2^31 a double angle is still good to 2e-7 radians; float would not be
             * good to one turn. */
            const double angle = (double)position[row] * frequency[i];
            to[row * cos_sin->stride + i] = (float)cos(angle);
            to[row * cos_sin->stride + half + i] = (float)sin(angle);
        }
    return IFKV_OK;
}

/* Rotate the pairs (x[i], x[i + half]) of one head. */
static void rotate_head(float *restrict x, const float *restrict cos_sin, int half) {
    float *low = x, *high = x + half;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    for (int i = 0; i < half; i++) {
        const float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = b * cosine[i] + a * sine[i];
    }
}

ifkv_status ifkv_cpu_rope(ifkv_backend *backend, const ifkv_view *x, int n_head,
                          const ifkv_view *weight, double eps, const ifkv_view *cos_sin) {
    const int64_t n_row = x->n_row, d_head = cos_sin->n_col;
    IFKV_REQUIRE(n_head >= 1 && d_head >= 2 && d_head % 2 == 0, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "rope: got %d heads of width %lld, expected an even width", n_head,
                 (long long)d_head);
    IFKV_TRY(ifkv_view_check("rope", "x", x, IFKV_DTYPE_F32, n_row, n_head * d_head));
    IFKV_TRY(ifkv_view_check("rope", "cos_sin", cos_sin, IFKV_DTYPE_F32, n_row, d_head));
    if (weight) IFKV_TRY(ifkv_view_check("rope", "weight", weight, IFKV_DTYPE_F32, 1, d_head));
    float *data = x->data;
    const float *angle = cos_sin->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * x->n_col))
    for (int64_t row = 0; row < n_row; row++)
        for (int h = 0; h < n_head; h++) {
            float *head = data + row * x->stride + h * d_head;
            if (weight) norm_row(head, weight->data, d_head, eps, head);
            rotate_head(head, angle + row * cos_sin->stride, (int)(d_head / 2));
        }
    return IFKV_OK;
}

ifkv_status ifkv_cpu_swiglu(ifkv_backend *backend, const ifkv_view *gate_up, const ifkv_view *out) {
    const int64_t n_row = out->n_row, d_ff = out->n_col;
    IFKV_TRY(ifkv_view_check("swiglu", "gate_up", gate_up, IFKV_DTYPE_F32, n_row, 2 * d_ff));
    IFKV_TRY(ifkv_view_check("swiglu", "out", out, IFKV_DTYPE_F32, n_row, d_ff));
    const float *from = gate_up->data;
    float *to = out->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * d_ff))
    for (int64_t row = 0; row < n_row; row++) {
        const float *gate = from + row * gate_up->stride;
        ifkv_cpu_silu_mul(gate, gate + d_ff, to + row * out->stride, d_ff);
    }
    return IFKV_OK;
}

/* Refuse a list of rows that leaves its matrix before anything is written. */
static ifkv_status check_rows(const char *op, const int64_t *row, int64_t n, int64_t n_row) {
    if (!row) {
        IFKV_REQUIRE(n <= n_row, IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "%s: %lld rows of %lld", op,
                     (long long)n, (long long)n_row);
        return IFKV_OK;
    }
    for (int64_t i = 0; i < n; i++)
        IFKV_REQUIRE(row[i] >= 0 && row[i] < n_row, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "%s: row %lld of %lld", op, (long long)row[i], (long long)n_row);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_gather(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                            const ifkv_view *to) {
    const int64_t n = to->n_row;
    IFKV_TRY(ifkv_view_check("gather", "from", from, to->dtype, from->n_row, to->n_col));
    IFKV_TRY(ifkv_view_check("gather", "to", to, to->dtype, n, to->n_col));
    IFKV_TRY(check_rows("gather", row, n, from->n_row));
    const size_t element = ifkv_dtype_bytes(to->dtype), bytes = (size_t)to->n_col * element;
    const char *source = from->data;
    char *target = to->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n * to->n_col))
    for (int64_t i = 0; i < n; i++)
        memcpy(target + (size_t)(i * to->stride) * element,
               source + (size_t)((row ? row[i] : i) * from->stride) * element, bytes);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_scatter(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                             const ifkv_view *to) {
    const int64_t n = from->n_row;
    IFKV_TRY(ifkv_view_check("scatter", "from", from, to->dtype, n, to->n_col));
    IFKV_TRY(ifkv_view_check("scatter", "to", to, to->dtype, to->n_row, to->n_col));
    IFKV_TRY(check_rows("scatter", row, n, to->n_row));
    const size_t element = ifkv_dtype_bytes(to->dtype), bytes = (size_t)to->n_col * element;
    const char *source = from->data;
    char *target = to->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n * to->n_col))
    for (int64_t i = 0; i < n; i++)
        memcpy(target + (size_t)((row ? row[i] : i) * to->stride) * element,
               source + (size_t)(i * from->stride) * element, bytes);
    return IFKV_OK;
}

/* In float64 and in the order of the columns: nearly equal rows are told apart, and a distance does
 * not depend on what else is in the call. */
static double squared_distance(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double difference = (double)a[i] - (double)b[i];
        sum += difference * difference;
    }
    return sum;
}

ifkv_status ifkv_cpu_row_distance(ifkv_backend *backend, const ifkv_view *a, const ifkv_view *b,
                                  float *out) {
    const int64_t n_row = a->n_row, n_col = a->n_col;
    IFKV_TRY(ifkv_view_check("row_distance", "a", a, IFKV_DTYPE_F32, n_row, n_col));
    IFKV_TRY(ifkv_view_check("row_distance", "b", b, IFKV_DTYPE_F32, n_row, n_col));
    const float *x = a->data, *y = b->data;
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * n_col))
    for (int64_t row = 0; row < n_row; row++)
        out[row] = (float)squared_distance(x + row * a->stride, y + row * b->stride, n_col);
    return IFKV_OK;
}
