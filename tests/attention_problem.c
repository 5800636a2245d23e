#include "attention_problem.h"

#include "test.h"

ifkv_attention_args problem_args(const problem *p) {
    return (ifkv_attention_args){.n_head = p->h.n_head,
                                 .n_kv_head = p->h.n_kv_head,
                                 .d_head = p->h.d_head,
                                 .scale = (float)(1 / sqrt((double)p->h.d_head)),
                                 .q = p->q.view,
                                 .k = p->k.view,
                                 .v = p->v.view,
                                 .out = p->out.view,
                                 .lse = p->lse.view};
}

ifkv_attention_args problem_rows(const problem *p, int64_t row, int64_t n) {
    ifkv_attention_args args = problem_args(p);
    args.begin = gen_upload(p->q.backend, p->begin + row, (size_t)n * sizeof *p->begin);
    args.end = gen_upload(p->q.backend, p->end + row, (size_t)n * sizeof *p->end);
    args.q = ifkv_view_rows(&args.q, row, n);
    args.out = ifkv_view_rows(&args.out, row, n);
    args.lse = ifkv_view_rows(&args.lse, row, n);
    return args;
}

void problem_read(problem *p, const ifkv_attention_args *rows) {
    ifkv_backend *backend = p->q.backend;
    assert_true(gen_matrix_read(&p->out));
    assert_true(gen_matrix_read(&p->lse));
    backend->ops->free(backend, (void *)(uintptr_t)rows->begin);
    backend->ops->free(backend, (void *)(uintptr_t)rows->end);
}

void problem_destroy(problem *p) {
    gen_matrix_destroy(&p->q), gen_matrix_destroy(&p->k), gen_matrix_destroy(&p->v);
    gen_matrix_destroy(&p->out), gen_matrix_destroy(&p->lse);
    free(p->begin), free(p->end);
}
