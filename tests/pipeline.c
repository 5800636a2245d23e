#include "pipeline.h"

#include "model_files.h"

uint64_t seed;
char *dir;
tiny_case cases[N_CASE], large;

int make_cases(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    int64_t random_length[11];
    for (int i = 0; i < 11; i++) random_length[i] = 1 + tiny_below(&seed, 30);
    cases[0] = tiny_case_make(dir, &seed, &tiny_shapes[0], 3, 7,
                              (int64_t[]){17, 1, 40, 5, 33, 64, 9}, 7, 4);
    cases[1] = tiny_case_make(dir, &seed, &tiny_shapes[1], 0, 3, (int64_t[]){20, 1, 31}, 1, 3);
    cases[2] = tiny_case_make(dir, &seed, &tiny_shapes[2], 2, 11, random_length, 5, 0);
    cases[3] = tiny_case_make(dir, &seed, &tiny_shapes[3], 1, 1, (int64_t[]){37}, 4, 2);
    large =
        tiny_case_make(dir, &seed, &tiny_shapes[0], 1, 4, (int64_t[]){300, 257, 200, 256}, 300, 9);
    return 0;
}

int free_cases(void **state) {
    for (int i = 0; i < N_CASE; i++) tiny_case_fini(&cases[i]);
    tiny_case_fini(&large);
    return dir_teardown(state);
}

void assert_equals_full(const tiny_run *got, const tiny_run *full, int64_t end) {
    assert_within(tiny_rows_error(got, full, 0, end), TINY_TOLERANCE);
    if (end == full->n_context)
        assert_within(tiny_error(got->logits, full->logits, full->n_vocab), TINY_TOLERANCE);
}

static int64_t largest(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Distance of the largest to the second. */
static double lead(const float *x, int64_t n) {
    const int64_t best = largest(x, n);
    double second = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (i != best && x[i] > second) second = x[i];
    return x[best] - second;
}

/* Logits are of order 1 and agree to about 1e-5: where two lead by less, their order is open. */
#define CLEAR_LEAD 1e-3

int64_t check_answer(const tiny_case *it, const char *method, const tiny_run *one) {
    const ifkv_request *request = &it->request.request;
    int32_t *prompt = malloc((size_t)(request->n_prompt + one->n_answer) * sizeof *prompt);
    assert_non_null(prompt);
    memcpy(prompt, request->prompt, (size_t)request->n_prompt * sizeof *prompt);
    memcpy(prompt + request->n_prompt, one->answer, (size_t)one->n_answer * sizeof *prompt);
    int64_t n_clear = 0;
    bool is_clear = true;
    for (int64_t i = 0; i < one->n_answer && is_clear; i++) {
        ifkv_request extended = *request;
        extended.prompt = prompt;
        extended.n_prompt += i;
        tiny_run run = tiny_run_of(it, (ifkv_prefill_options){.method = method,
                                                              .selected = one->selected,
                                                              .n_selected = one->n_selected});
        run.request = &extended;
        assert_ok(tiny_run_on(0, &run));
        is_clear = lead(run.logits, run.n_vocab) > CLEAR_LEAD;
        if (is_clear) assert_int_equal(largest(run.logits, run.n_vocab), one->answer[i]);
        n_clear += is_clear;
        tiny_run_fini(&run);
    }
    free(prompt);
    return n_clear;
}
