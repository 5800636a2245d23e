/* One transformer layer over a set of rows, and the buffers such a pass needs.
 *
 * Every stage runs this same layer over different rows: a row is a token at a position with the
 * keys it may see.  What it sees is the exchange's business; where rows come from is the stage's.
 * The layer loop allocates nothing. Source: algorithm 1.3, 1.7; pre-norm attention and SwiGLU
 * blocks of the llama and qwen3 families. */
#ifndef IFKV_SRC_LAYER_H
#define IFKV_SRC_LAYER_H

#include "exchange.h"
#include "model.h"

typedef struct ifkv_pass {
    const ifkv_model *model;    /* borrowed */
    const double *frequency;    /* [d_head / 2] of rope.h, borrowed */
    int64_t max_row, max_block; /* linear work goes over rows in blocks of at most max_block */
    int64_t n_row;              /* rows of this rank in the current pass */
    int64_t *block;             /* [max_n_block + 1] host, owned: boundaries of the row blocks */
    int64_t n_block, max_n_block;
    int64_t *stage; /* [max_row] host, owned: ids on their way to the back end */

    /* Views of the arena; rows [max_row] unless said otherwise. */
    int64_t *row_id;    /* token ids */
    int64_t *position;  /* rotary */
    ifkv_view hidden;   /* [., d_model] residual stream */
    ifkv_view cos_sin;  /* [., d_head] float32 */
    ifkv_view k_angles; /* [max_block, d_head] float32: the same angles for every block of K; data
                           NULL: cos_sin */
    ifkv_view qkv;      /* [., (n_head + 2 n_kv_head) * d_head] */
    ifkv_view attended; /* [., n_head * d_head] */
    ifkv_view norm;     /* [max_block, d_model] */
    ifkv_view gate_up;  /* [max_block, 2 * d_ff] */
    ifkv_view act;      /* [max_block, d_ff] */
} ifkv_pass;

/* Allocate the host side of a pass of up to max_row rows in up to max_group groups (see begin). */
ifkv_status ifkv_pass_init(ifkv_pass *pass, const ifkv_model *model, const ifkv_backend *backend,
                           const double *frequency, int64_t max_row, int64_t max_group);
void ifkv_pass_fini(ifkv_pass *pass);
void ifkv_pass_layout(ifkv_pass *pass, ifkv_arena *arena, ifkv_dtype dtype);

/* Start a pass: embed the tokens and make the rotation tables.  Rows are cut into blocks within
 * each group, never across unless the back end is row-exact, so that a group's bits do not depend
 * on the others.  All arrays are
 * host memory, read before the call returns. token, position  [n_row]                group_begin
 * [n_group + 1], 0 .. n_row */
ifkv_status ifkv_pass_begin(ifkv_pass *pass, ifkv_backend *backend, int64_t n_row,
                            const int32_t *token, const int64_t *position, int64_t n_group,
                            const int64_t *group_begin);
/* Add n_rider rows to the n_group groups of a pass: in a group of their own, or in the last one
 * where the back end says that riders join (see backend.h).  group_begin has room for one more.
 * Returns the number of groups. */
int64_t ifkv_pass_add_riders(const ifkv_backend *backend, int64_t n_rider, int64_t n_group,
                             int64_t *group_begin);

/* What of a layer is to be done. */
enum {
    IFKV_LAYER_Q = 1,      /* project and rotate Q */
    IFKV_LAYER_KV = 2,     /* project and rotate K, project V, store both */
    IFKV_LAYER_ATTEND = 4, /* attend with Q */
    IFKV_LAYER_FINISH = 8, /* output projection and MLP: hidden becomes the next layer's input */
    IFKV_LAYER_ALL = 15
};

/* Run one layer over the rows of the pass, in place on hidden.  Collective through the exchange;
 * asynchronous. */
ifkv_status ifkv_layer_run(ifkv_pass *pass, int layer, ifkv_exchange *exchange, unsigned what);

/* Rows of a pass, in order behind those of the part before, and what becomes of them in a layer. */
typedef struct ifkv_layer_part {
    ifkv_exchange *exchange; /* borrowed */
    int64_t n_row;
    unsigned what;
    int64_t bytes; /* received so far by its exchange, added to */
} ifkv_layer_part;

/* The same over a pass of several parts, each with its exchange: riders behind the rows that carry
 * them (algorithm 1.4, 1.8).  All parts store before any attends, in the order of the list.  Linear
 * work goes over neighbouring parts that want the same together, in the pass's row blocks. */
ifkv_status ifkv_layer_run_parts(ifkv_pass *pass, int layer, ifkv_layer_part *part, int n_part);

/* logits [1, n_vocab] float32 of one row of hidden: final norm and LM head.  Uses the pass's norm
 * scratch.  Local. */
ifkv_status ifkv_pass_logits(ifkv_pass *pass, ifkv_backend *backend, int64_t row,
                             const ifkv_view *logits);

#endif
