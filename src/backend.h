/* Arithmetic and memory: the table every back end fills, and how to open one by name.
 *
 * The CPU back end is the readable definition of every operation; another back end is that
 * definition made fast.  Operations are asynchronous on the back end's stream, in the order of the
 * calls; all pointers and views lie in back-end memory, index arrays and spans included, and the
 * host never reads or writes there.  Argument structs and host arrays are read before the call
 * returns.  Shapes are in brackets, row-major, rows outermost; heads lie inside a row.
 * Activations, weights and K/V have the back end's dtype; log-sum-exps and scores are float32
 * (parts may be float64, see merge). On the CPU a row's bits never depend on the number of threads.
 */
#ifndef IFKV_SRC_BACKEND_H
#define IFKV_SRC_BACKEND_H

#include "status.h"
#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ifkv_backend ifkv_backend;

/* Attention of rows over spans of one shard (algorithm 2.1): per row and head, softmax over keys
 * [begin, end) of scale * q.k, out = sum softmax * v and lse = ln sum exp.  Query head h reads K/V
 * head h / (n_head / n_kv_head). An empty span gives out 0, lse -inf.  Rows of one tile share a
 * begin: a tile ends where begin changes, so that the bits of a group of rows with its own begin (a
 * chunk) do not depend on what else is in the call.  Ends ascend within such a group. */
typedef struct ifkv_attention_args {
    int n_head, n_kv_head, d_head;
    float scale;          /* 1 / sqrt(d_head) */
    ifkv_view q;          /* [n_row, n_head * d_head] */
    ifkv_view k, v;       /* [n_key, n_kv_head * d_head] */
    const int64_t *begin; /* [n_row] first key slot */
    const int64_t *end;   /* [n_row] one past the last key slot, begin <= end <= n_key */
    ifkv_view out;        /* [n_row, n_head * d_head]; must not overlap q, k, v */
    ifkv_view lse;        /* [n_row, n_head] float32 */
} ifkv_attention_args;

/* Merge partial attentions over disjoint key sets, in the order given (algorithm 2.2).  A part that
 * saw no key has lse -inf and counts nothing; a row that saw none in any part becomes 0 with lse
 * -inf, never NaN. Sums are carried in float64 and rounded once to the output's dtype; parts may be
 * float32 or float64. Output may alias part 0. */
typedef struct ifkv_merge_args {
    int n_head, d_head;
    int n_part;
    const ifkv_view *out_part; /* [n_part] host array of views [n_row, n_head * d_head] */
    const ifkv_view *lse_part; /* [n_part] host array of views [n_row, n_head] */
    ifkv_view out; /* [n_row, n_head * d_head]; data NULL: not wanted, out_part is not read */
    ifkv_view lse; /* [n_row, n_head]; data NULL: not wanted */
} ifkv_merge_args;

typedef enum ifkv_score_form {
    IFKV_SCORE_L2,
    IFKV_SCORE_L1,
    IFKV_SCORE_MASS,
    IFKV_SCORE_L2H
} ifkv_score_form;

/* Add one layer's score of every key to `score` (algorithm 1.4): probabilities A = exp(scale * q.k
 * - lse) reduced over the question rows and heads in the given form and multiplied by `weight` (1 /
 * number of scoring layers; 1 for mass). l2  sqrt(sum_q (mean_h A)^2)   l1  sum_q mean_h A   mass
 * sum_q sum_h A   l2h sqrt(sum_q sum_h A^2) Keys are tiled within [block[i], block[i+1]) and never
 * across, so a chunk's bits do not depend on its neighbours. */
typedef struct ifkv_score_args {
    int n_head, n_kv_head, d_head;
    float scale, weight;
    ifkv_score_form form;
    ifkv_view q;          /* [n_row, n_head * d_head] question rows */
    ifkv_view lse;        /* [n_row, n_head] float32, over all keys visible to the row */
    ifkv_view k;          /* [n_key, n_kv_head * d_head] */
    const int64_t *block; /* [n_block + 1] host array, 0 .. n_key */
    int64_t n_block;
    float *score; /* [n_key] float32, added to */
} ifkv_score_args;

/* Move rows of x that were not recomputed by what those that were show: per head, an affine map
 * from a stale row to its change is fitted on n_fit rows (ridge regression) and what it says is
 * added to every other row at or above `first`, in place. */
typedef struct ifkv_refit_args {
    int n_head, d_head;
    double ridge;           /* added to every variance, in mean variances; above 0 */
    ifkv_view stale, fresh; /* [n_fit, n_head * d_head] */
    const int64_t *row;     /* [n_fit] where they lie in x, ascending */
    int64_t first;
    ifkv_view cos_sin; /* [n_row, d_head] float32: rows are rotated by these angles and are mapped
                          as they were before; data NULL: they are not */
    ifkv_view x;       /* [n_row, n_head * d_head] */
    double *scratch;   /* [n_head, ifkv_refit_scratch(d_head)] back-end memory, on 16 bytes */
} ifkv_refit_args;

/* What any back end wants for a head: sums [2, d, d] and [2, d] of each piece of the fitted rows
 * that is added up by itself, a row, and the map. */
enum { IFKV_REFIT_PIECE = 4 };
static inline int64_t ifkv_refit_scratch(int d_head) {
    const int64_t d = d_head;
    return IFKV_REFIT_PIECE * 2 * d * (d + 1) + 2 * d + d * (d + 1) / 2;
}

/* A stream of numbers, element i a function of key and i alone: z = mix(key + (i + 1) *
 * 0x9e3779b97f4a7c15) with the finaliser of splitmix64; the sum of the four 16-bit fields of z less
 * 2 * 65535, exact in float32, times scale, plus centre, each rounded by itself. */
typedef struct ifkv_draw {
    uint64_t key;
    float scale, centre;
} ifkv_draw;

typedef struct ifkv_backend_ops {
    const char *name;      /* "cpu" */
    ifkv_dtype dtype;      /* of activations, weights and K/V */
    ifkv_dtype part_dtype; /* of partial outputs that cross ranks while scoring */
    /* Rows that ride in the pass of others (algorithm 1.4, 1.8) join their matrix products, which
     * then read the weights once; the bits of both may depend on that.  False: products of their
     * own, so that riding changes no bit, over weights that are still in a cache. */
    bool joins_riders;
    int64_t row_block; /* rows of a linear operation at most that are worth their scratch */
    /* A row's bits depend on nothing but the row, from 17 rows a call on: groups of rows that must
     * not depend on each other may share a call. */
    bool is_row_exact;

    void (*close)(ifkv_backend *backend);
    /* Size per-thread scratch for a model's heads, once, before the first attention.  Allocates. */
    ifkv_status (*prepare)(ifkv_backend *backend, int n_head, int n_kv_head, int d_head);

    /* Memory, 64-byte aligned at least, all of it taken from the system now; contents unspecified.
     * RESOURCE if there is none. */
    ifkv_status (*alloc)(ifkv_backend *backend, size_t bytes, void **data_p);
    void (*free)(ifkv_backend *backend, void *data);
    /* upload has read from_host, download has written to_host, when they return. */
    ifkv_status (*upload)(ifkv_backend *backend, void *to, const void *from_host, size_t bytes);
    ifkv_status (*download)(ifkv_backend *backend, void *to_host, const void *from, size_t bytes);
    ifkv_status (*copy)(ifkv_backend *backend, void *to, const void *from, size_t bytes);
    ifkv_status (*sync)(ifkv_backend *backend);
    double (*clock_ms)(ifkv_backend *backend); /* monotonic; call after sync */

    /* out [n_row, n_out] = x [n_row, n_in] w^T, w [n_out, n_in]; with add_to_out, out += that. */
    ifkv_status (*matmul)(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *w,
                          bool add_to_out, const ifkv_view *out);
    /* out = x / sqrt(mean(x^2) + eps) * weight, per row; weight [1, n_col].  out may be x. */
    ifkv_status (*rms_norm)(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *weight,
                            double eps, const ifkv_view *out);
    /* cos_sin [n_row, d_head] float32 = the cosines of the d_head/2 pairs, then their sines, of
     * position[i] * frequency[j]: product, cosine and sine are float64, rounded once.  position is
     * any int64, in back-end memory; frequency [d_head / 2] (rope.h) a host array. */
    ifkv_status (*angles)(ifkv_backend *backend, const double *frequency, const int64_t *position,
                          const ifkv_view *cos_sin);
    /* In place on x [n_row, n_head * d_head]: where weight is not NULL ([1, d_head]) RMS norm of
     * every head, then rotation of the pairs (i, i + d_head/2) by cos_sin [n_row, d_head] float32
     * (cosines, then sines).
     */
    ifkv_status (*rope)(ifkv_backend *backend, const ifkv_view *x, int n_head,
                        const ifkv_view *weight, double eps, const ifkv_view *cos_sin);
    /* out [n_row, d_ff] = silu(gate) * up, gate_up [n_row, 2 * d_ff] holding gate, then up. */
    ifkv_status (*swiglu)(ifkv_backend *backend, const ifkv_view *gate_up, const ifkv_view *out);
    /* to[i] = from[row[i]], i < to->n_row; row in back-end memory, NULL: row[i] = i. */
    ifkv_status (*gather)(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                          const ifkv_view *to);
    /* to[row[i]] = from[i], i < from->n_row; rows distinct. */
    ifkv_status (*scatter)(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                           const ifkv_view *to);
    ifkv_status (*attention)(ifkv_backend *backend, const ifkv_attention_args *args);
    ifkv_status (*merge)(ifkv_backend *backend, const ifkv_merge_args *args);
    ifkv_status (*score)(ifkv_backend *backend, const ifkv_score_args *args);
    /* out[i] = sum over columns of (a[i] - b[i])^2; out [n_row] float32 in back-end memory. */
    ifkv_status (*row_distance)(ifkv_backend *backend, const ifkv_view *a, const ifkv_view *b,
                                float *out);
    /* The k best of value [n]: largest first, ties to the lower index; -0 equals +0.  Written in
     * ascending index order to index [k].  NaN must not occur.  Scratch is the caller's: [n] int64
     * in back-end memory.
     */
    ifkv_status (*top_k)(ifkv_backend *backend, const float *value, int64_t n, int64_t k,
                         int64_t *scratch, int64_t *index);
    /* (optional) NULL: refit is refused where it is asked for. */
    ifkv_status (*refit)(ifkv_backend *backend, const ifkv_refit_args *args);
    /* (optional) The first n numbers of a stream, rounded to the back end's dtype, to `to`; NULL:
     * they are drawn on the host and uploaded. */
    ifkv_status (*draw)(ifkv_backend *backend, const ifkv_draw *draw, int64_t n, void *to);
} ifkv_backend_ops;

struct ifkv_backend {
    const ifkv_backend_ops *ops;
    int n_thread;
    char device[256];      /* what it computes on, for people: "cpu", "NVIDIA H100 80GB HBM3" */
    uint64_t unit;         /* ranks that show the same number share one memory; 0: the node's */
    uint64_t memory_bytes; /* of that memory, in all */
    /* The stream of the operations (a cudaStream_t), for communicators that move this memory; NULL:
     * it is the host's memory, and operations are done when they return. */
    void *stream;
    /* Set by a communicator that puts work into the stream, borrowed: called before the host waits
     * for it, and returns when that work is done or has failed. */
    ifkv_status (*before_wait)(void *arg);
    void *before_wait_arg;
    bool is_emulated; /* a host model of a device, for tests: its times mean nothing */
    bool is_lost; /* set by a communicator: the stream will never end, close must not wait for it */
};

/* Open a back end by name: "auto" (the fastest that is built and has a device), "cpu", "cuda".
 * Where several devices are visible, node_rank picks one.  The caller owns *backend_p and releases
 * it with ifkv_backend_close.  Errors: USAGE if unknown, UNSUPPORTED if not built, RESOURCE if
 * there is no device. */
ifkv_status ifkv_backend_open(const char *name, int n_thread, int node_rank,
                              ifkv_backend **backend_p);
void ifkv_backend_close(ifkv_backend *backend);

/* For back ends, in front of every wait for the stream.  Errors: those of the communicator. */
static inline ifkv_status ifkv_backend_before_wait(const ifkv_backend *backend) {
    return backend->before_wait ? backend->before_wait(backend->before_wait_arg) : IFKV_OK;
}

/* For back ends: REQUIRE that a view is [n_row, n_col] of this type with a stride that fits;
 * IFKV_ERR_INTERNAL with IFKV_E_SHAPE otherwise.  `op` and `what` are for the message. */
ifkv_status ifkv_view_check(const char *op, const char *what, const ifkv_view *view,
                            ifkv_dtype dtype, int64_t n_row, int64_t n_col);
/* For back ends: the same of all views of a refit, whose rows are of this type, and that `first` is
 * not below 0.  The list of rows is for the back end to check. */
ifkv_status ifkv_refit_check(const ifkv_refit_args *args, ifkv_dtype dtype);

/* Implemented by src/cpu_backend.c and cuda/cuda_backend.c; called by ifkv_backend_open only. */
ifkv_status ifkv_cpu_backend_open(int n_thread, int node_rank, ifkv_backend **backend_p);
ifkv_status ifkv_cuda_backend_open(int n_thread, int node_rank, ifkv_backend **backend_p);
/* True if a real device is visible, which `auto` then takes.  Reports nothing. */
bool ifkv_cuda_backend_is_wanted(void);

#ifdef __cplusplus
}
#endif
#endif
