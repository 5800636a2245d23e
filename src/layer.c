/* One layer over a set of rows.  See layer.h. */
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include "placement.h"

ifkv_status ifkv_pass_init(ifkv_pass *pass, const ifkv_model *model, const ifkv_backend *backend,
                           const double *frequency, int64_t max_row, int64_t max_group) {
    const int64_t row_block = backend->ops->row_block;
    memset(pass, 0, sizeof *pass);
    pass->model = model;
    pass->frequency = frequency;
    pass->max_row = max_row;
    pass->max_block = max_row < row_block ? max_row : row_block;
    pass->max_n_block = max_row / row_block + max_group;
    pass->block = malloc(((size_t)pass->max_n_block + 1) * sizeof *pass->block);
    pass->stage = malloc(((size_t)max_row + 1) * sizeof *pass->stage);
    if (!pass->block || !pass->stage) {
        ifkv_pass_fini(pass);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "pass of %lld rows: out of host memory",
                         (long long)max_row);
    }
    return IFKV_OK;
}

void ifkv_pass_fini(ifkv_pass *pass) {
    free(pass->block);
    free(pass->stage);
    memset(pass, 0, sizeof *pass);
}

void ifkv_pass_layout(ifkv_pass *pass, ifkv_arena *arena, ifkv_dtype dtype) {
    const ifkv_config *config = &pass->model->config;
    const int64_t rows = pass->max_row, block = pass->max_block, d_head = config->d_head;
    pass->row_id = ifkv_arena_take(arena, rows, sizeof *pass->row_id);
    pass->position = ifkv_arena_take(arena, rows, sizeof *pass->position);
    pass->hidden = ifkv_arena_view(arena, dtype, rows, config->d_model);
    pass->cos_sin = ifkv_arena_view(arena, IFKV_DTYPE_F32, rows, d_head);
    pass->qkv =
        ifkv_arena_view(arena, dtype, rows, (config->n_head + 2 * config->n_kv_head) * d_head);
    pass->attended = ifkv_arena_view(arena, dtype, rows, config->n_head * d_head);
    pass->norm = ifkv_arena_view(arena, dtype, block, config->d_model);
    pass->gate_up = ifkv_arena_view(arena, dtype, block, 2 * (int64_t)config->d_ff);
    pass->act = ifkv_arena_view(arena, dtype, block, config->d_ff);
}

static void cut_blocks(ifkv_pass *pass, const ifkv_backend *backend, int64_t n_group,
                       const int64_t *group_begin) {
    const int64_t whole[] = {0, pass->n_row};
    if (backend->ops->is_row_exact && n_group > 0) {
        n_group = 1;
        group_begin = whole;
    }
    pass->n_block = 0;
    for (int64_t g = 0; g < n_group; g++) {
        const int64_t rows = group_begin[g + 1] - group_begin[g],
                      n = ifkv_even_blocks(rows, backend->ops->row_block);
        for (int64_t i = 0; i < n; i++)
            pass->block[pass->n_block++] = group_begin[g] + ifkv_even_begin(rows, n, i);
    }
    pass->block[pass->n_block] = pass->n_row;
}

ifkv_status ifkv_pass_begin(ifkv_pass *pass, ifkv_backend *backend, int64_t n_row,
                            const int32_t *token, const int64_t *position, int64_t n_group,
                            const int64_t *group_begin) {
    IFKV_REQUIRE(n_row <= pass->max_row, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "pass: got %lld rows, expected at most %lld", (long long)n_row,
                 (long long)pass->max_row);
    const size_t bytes = (size_t)n_row * sizeof *pass->stage;
    const ifkv_view hidden = ifkv_view_rows(&pass->hidden, 0, n_row),
                    cos_sin = ifkv_view_rows(&pass->cos_sin, 0, n_row);
    pass->n_row = n_row;
    cut_blocks(pass, backend, n_group, group_begin);

    for (int64_t i = 0; i < n_row; i++) pass->stage[i] = token[i];
    IFKV_TRY(backend->ops->upload(backend, pass->row_id, pass->stage, bytes));
    IFKV_TRY(backend->ops->upload(backend, pass->position, position, bytes));
    IFKV_TRY(backend->ops->angles(backend, pass->frequency, pass->position, &cos_sin));
    return backend->ops->gather(backend, &pass->model->embed, pass->row_id, &hidden);
}

int64_t ifkv_pass_add_riders(const ifkv_backend *backend, int64_t n_rider, int64_t n_group,
                             int64_t *group_begin) {
    const int64_t n_row = group_begin[n_group] + n_rider;
    if (n_group == 0 || !backend->ops->joins_riders) n_group++;
    group_begin[n_group] = n_row;
    return n_group;
}

/* Norm, projection and rotation of one block of rows into qkv. */
static ifkv_status project(ifkv_pass *pass, const ifkv_layer_weights *weights,
                           ifkv_backend *backend, int64_t row, int64_t n, unsigned what) {
    const ifkv_backend_ops *ops = backend->ops;
    const ifkv_config *config = &pass->model->config;
    const int64_t q_cols = (int64_t)config->n_head * config->d_head,
                  kv_cols = (int64_t)config->n_kv_head * config->d_head;
    const bool has_q = what & IFKV_LAYER_Q, has_kv = what & IFKV_LAYER_KV;
    const int64_t first = has_q ? 0 : q_cols,
                  n_col = (has_q ? q_cols : 0) + (has_kv ? 2 * kv_cols : 0);

    const ifkv_view hidden = ifkv_view_rows(&pass->hidden, row, n),
                    norm = ifkv_view_rows(&pass->norm, 0, n);
    const ifkv_view cos_sin = ifkv_view_rows(&pass->cos_sin, row, n);
    const ifkv_view weight = ifkv_view_rows(&weights->qkv, first, n_col);
    const ifkv_view out = ifkv_view_block(&pass->qkv, row, n, first, n_col);
    IFKV_TRY(ops->rms_norm(backend, &hidden, &weights->attention_norm, config->norm_eps, &norm));
    IFKV_TRY(ops->matmul(backend, &norm, &weight, false, &out));
    if (has_q) {
        const ifkv_view q = ifkv_view_block(&pass->qkv, row, n, 0, q_cols);
        IFKV_TRY(ops->rope(backend, &q, config->n_head,
                           config->has_head_norm ? &weights->q_norm : NULL, config->norm_eps,
                           &cos_sin));
    }
    if (has_kv) {
        const ifkv_view k = ifkv_view_block(&pass->qkv, row, n, q_cols, kv_cols);
        const ifkv_view angles =
            pass->k_angles.data ? ifkv_view_rows(&pass->k_angles, 0, n) : cos_sin;
        IFKV_TRY(ops->rope(backend, &k, config->n_kv_head,
                           config->has_head_norm ? &weights->k_norm : NULL, config->norm_eps,
                           &angles));
    }
    return IFKV_OK;
}

/* Output projection and MLP of one block of rows, both added to the residual stream. */
static ifkv_status finish(ifkv_pass *pass, const ifkv_layer_weights *weights, ifkv_backend *backend,
                          int64_t row, int64_t n, unsigned what) {
    (void)what;
    const ifkv_backend_ops *ops = backend->ops;
    const ifkv_view attended = ifkv_view_rows(&pass->attended, row, n),
                    hidden = ifkv_view_rows(&pass->hidden, row, n);
    const ifkv_view norm = ifkv_view_rows(&pass->norm, 0, n),
                    gate_up = ifkv_view_rows(&pass->gate_up, 0, n);
    const ifkv_view act = ifkv_view_rows(&pass->act, 0, n);
    IFKV_TRY(ops->matmul(backend, &attended, &weights->o, true, &hidden));
    IFKV_TRY(
        ops->rms_norm(backend, &hidden, &weights->mlp_norm, pass->model->config.norm_eps, &norm));
    IFKV_TRY(ops->matmul(backend, &norm, &weights->gate_up, false, &gate_up));
    IFKV_TRY(ops->swiglu(backend, &gate_up, &act));
    return ops->matmul(backend, &act, &weights->down, true, &hidden);
}

typedef ifkv_status (*block_fn)(ifkv_pass *pass, const ifkv_layer_weights *weights,
                                ifkv_backend *backend, int64_t row, int64_t n, unsigned what);

/* Take every run of neighbouring parts that want the same of `mask` through `step`, a row block at
 * a time; a block that reaches over the end of a run is cut there. */
static ifkv_status run_blocks(ifkv_pass *pass, const ifkv_layer_weights *weights,
                              const ifkv_layer_part *part, int n_part, unsigned mask,
                              block_fn step) {
    int64_t begin = 0, end = 0;
    for (int i = 0; i < n_part; begin = end) {
        const unsigned what = part[i].what & mask;
        ifkv_backend *backend = part[i].exchange->backend;
        for (; i < n_part && (part[i].what & mask) == what; i++) end += part[i].n_row;
        for (int64_t b = 0; what && b < pass->n_block; b++) {
            const int64_t row = pass->block[b] > begin ? pass->block[b] : begin,
                          stop = pass->block[b + 1] < end ? pass->block[b + 1] : end;
            if (row < stop) IFKV_TRY(step(pass, weights, backend, row, stop - row, what));
        }
    }
    return IFKV_OK;
}

static ifkv_status store(ifkv_pass *pass, int layer, ifkv_layer_part *part, int64_t row) {
    const ifkv_config *config = &pass->model->config;
    const int64_t q_cols = (int64_t)config->n_head * config->d_head,
                  kv_cols = (int64_t)config->n_kv_head * config->d_head;
    const ifkv_view k = ifkv_view_block(&pass->qkv, row, part->n_row, q_cols, kv_cols),
                    v = ifkv_view_block(&pass->qkv, row, part->n_row, q_cols + kv_cols, kv_cols);
    const int64_t before = ifkv_comm_received(part->exchange->comm);
    const ifkv_status status = part->exchange->ops->store(part->exchange, layer, &k, &v);
    part->bytes += ifkv_comm_received(part->exchange->comm) - before;
    return status;
}

static ifkv_status attend(ifkv_pass *pass, int layer, ifkv_layer_part *part, int64_t row) {
    const ifkv_config *config = &pass->model->config;
    const ifkv_view q = ifkv_view_block(&pass->qkv, row, part->n_row, 0,
                                        (int64_t)config->n_head * config->d_head),
                    attended = ifkv_view_rows(&pass->attended, row, part->n_row);
    const int64_t before = ifkv_comm_received(part->exchange->comm);
    const ifkv_status status = part->exchange->ops->attend(part->exchange, layer, &q, &attended);
    part->bytes += ifkv_comm_received(part->exchange->comm) - before;
    return status;
}

ifkv_status ifkv_layer_run_parts(ifkv_pass *pass, int layer, ifkv_layer_part *part, int n_part) {
    const ifkv_layer_weights *weights = &pass->model->layer[layer];
    int64_t row = 0;
    IFKV_TRY(run_blocks(pass, weights, part, n_part, IFKV_LAYER_Q | IFKV_LAYER_KV, project));
    for (int i = 0; i < n_part; row += part[i++].n_row)
        if (part[i].what & IFKV_LAYER_KV) IFKV_TRY(store(pass, layer, &part[i], row));
    row = 0;
    for (int i = 0; i < n_part; row += part[i++].n_row)
        if (part[i].what & IFKV_LAYER_ATTEND) IFKV_TRY(attend(pass, layer, &part[i], row));
    return run_blocks(pass, weights, part, n_part, IFKV_LAYER_FINISH, finish);
}

ifkv_status ifkv_layer_run(ifkv_pass *pass, int layer, ifkv_exchange *exchange, unsigned what) {
    ifkv_layer_part all = {exchange, pass->n_row, what, 0};
    return ifkv_layer_run_parts(pass, layer, &all, 1);
}

ifkv_status ifkv_pass_logits(ifkv_pass *pass, ifkv_backend *backend, int64_t row,
                             const ifkv_view *logits) {
    const ifkv_view hidden = ifkv_view_rows(&pass->hidden, row, 1),
                    norm = ifkv_view_rows(&pass->norm, 0, 1);
    IFKV_TRY(backend->ops->rms_norm(backend, &hidden, &pass->model->final_norm,
                                    pass->model->config.norm_eps, &norm));
    return backend->ops->matmul(backend, &norm, &pass->model->lm_head, false, logits);
}
