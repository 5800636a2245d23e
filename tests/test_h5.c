/* The HDF5 layer and the child process that guards against it. */
#include "test.h"

#include "error_codes.h"
#include "file_fixture.h"
#include "guard.h"
#include "h5.h"
#include "output.h"
#include "status.h"

#include <signal.h>
#include <unistd.h>

static char *dir;

static int make_dir(void **state) {
    (void)state;
    dir = fixture_dir();
    return 0;
}

static int remove_dir(void **state) {
    (void)state;
    fixture_remove(dir);
    return 0;
}

/* ---- round trips ---- */

#define N_ROW 3000
#define N_COL 700 /* a row of 2800 bytes: of 256 and 512 rows the first is nearer to 1 MiB */

static const char *write_matrix(void) {
    const char *path = fixture_path(dir, "m.h5");
    const int64_t dim[] = {N_ROW, N_COL}, none[] = {0, 3};
    float *data = malloc(sizeof *data * N_ROW * N_COL);
    ifkv_h5 *file;
    for (int i = 0; i < N_ROW * N_COL; i++) data[i] = (float)i;
    assert_ok(ifkv_h5_create(path, &file));
    assert_ok(ifkv_h5_text_write(file, "format", "test"));
    assert_ok(ifkv_h5_text_write(file, "empty", ""));
    assert_ok(ifkv_h5_i64_write(file, "n", -7));
    assert_ok(ifkv_h5_f64_write(file, "x", 0.5));
    assert_ok(ifkv_h5_bool_write(file, "is", true));
    assert_ok(ifkv_h5_group_write(file, "/g"));
    assert_ok(ifkv_h5_dataset_write(file, "/g/m", IFKV_H5_F32, 2, dim, data));
    assert_ok(ifkv_h5_dataset_write(file, "/none", IFKV_H5_I64, 2, none, NULL));
    assert_ok(ifkv_h5_finish(file));
    free(data);
    return path;
}

static ifkv_h5 *open_file(const char *path) {
    ifkv_h5 *file;
    assert_ok(ifkv_h5_open(path, &file));
    return file;
}

static void rows_come_back_from_the_middle(void **state) {
    (void)state;
    static float row[2 * N_COL];
    ifkv_h5 *file = open_file(write_matrix());
    assert_ok(ifkv_h5_rows_read(file, "/g/m", IFKV_H5_F32, 511, 2, row));
    for (int i = 0; i < 2 * N_COL; i++) assert_true(row[i] == (float)(511 * N_COL + i));
    ifkv_h5_close(file);
}

static void bfloat16_keeps_its_bits_and_is_known_again(void **state) {
    (void)state;
    static uint16_t written[1 << 16], read[1 << 16]; /* every value there is */
    const int64_t dim[] = {1 << 15, 2};
    ifkv_h5_dataset dataset;
    ifkv_h5 *file;
    for (int i = 0; i < 1 << 16; i++) written[i] = (uint16_t)i;
    assert_ok(ifkv_h5_create(fixture_path(dir, "b.h5"), &file));
    assert_ok(ifkv_h5_dataset_write(file, "/b", IFKV_H5_BF16, 2, dim, written));
    assert_ok(ifkv_h5_finish(file));
    file = open_file(fixture_path(dir, "b.h5"));
    assert_ok(ifkv_h5_dataset_describe(file, "/b", &dataset));
    assert_int_equal(dataset.type, IFKV_H5_BF16);
    assert_ok(ifkv_h5_rows_read(file, "/b", IFKV_H5_BF16, 0, 1 << 15, read));
    assert_memory_equal(read, written, sizeof read);
    ifkv_h5_close(file);
}

static void blocks_are_256_rows_nearest_a_mebibyte(void **state) {
    (void)state;
    ifkv_h5_dataset dataset;
    ifkv_h5 *file = open_file(write_matrix());
    assert_ok(ifkv_h5_dataset_describe(file, "/g/m", &dataset));
    assert_int_equal(dataset.n_row_block, 256);
    assert_int_equal(dataset.row_bytes, 4 * N_COL);
    assert_string_equal(dataset.type_name, "float32");
    assert_ok(ifkv_h5_dataset_describe(file, "/none", &dataset));
    assert_int_equal(dataset.n_element, 0);
    ifkv_h5_close(file);
}

static void attributes_come_back(void **state) {
    (void)state;
    char *text, value[64];
    bool is_there;
    int64_t n;
    ifkv_h5 *file = open_file(write_matrix());
    assert_ok(ifkv_h5_text_read(file, "/", "empty", &text));
    assert_string_equal(text, "");
    free(text);
    assert_ok(ifkv_h5_text_read(file, "/", "absent", &text));
    assert_null(text);
    assert_ok(ifkv_h5_i64_read(file, "/", "n", &is_there, &n));
    assert_true(is_there && n == -7);
    static const char *const printed[][2] = {
        {"n", "-7"}, {"x", "0.5"}, {"is", "true"}, {"format", "test"}};
    for (int i = 0; i < 4; i++) {
        assert_ok(ifkv_h5_attribute_print(file, printed[i][0], value, sizeof value));
        assert_string_equal(value, printed[i][1]);
    }
    assert_fails(ifkv_h5_text_read(file, "/", "n", &text), IFKV_ERR_DATA, IFKV_E_H5_OBJECT,
                 "attribute n: expected text");
    assert_fails(ifkv_h5_i64_read(file, "/", "x", &is_there, &n), IFKV_ERR_DATA, IFKV_E_H5_OBJECT,
                 "attribute x: expected an integer");
    ifkv_h5_close(file);
}

/* ---- refusals ---- */

static void a_file_is_never_created_over_another(void **state) {
    (void)state;
    ifkv_h5 *file;
    fixture_write_text(fixture_path(dir, "x"), "x");
    assert_fails(ifkv_h5_create(fixture_path(dir, "x"), &file), IFKV_ERR_CANT_CREATE,
                 IFKV_E_OUT_CREATE, "cannot be created");
}

static void wrong_rows_types_and_paths_are_refused(void **state) {
    (void)state;
    static float row[N_COL];
    ifkv_h5_dataset dataset;
    ifkv_h5 *file = open_file(write_matrix());
    assert_fails(ifkv_h5_rows_read(file, "/g/m", IFKV_H5_F32, N_ROW, 1, row), IFKV_ERR_DATA,
                 IFKV_E_H5_OBJECT, "no such rows");
    assert_fails(ifkv_h5_rows_read(file, "/g/m", IFKV_H5_I64, 0, 1, row), IFKV_ERR_DATA,
                 IFKV_E_H5_OBJECT, "wrong type: got float32");
    assert_fails(ifkv_h5_dataset_describe(file, "/g/no", &dataset), IFKV_ERR_DATA, IFKV_E_H5_OBJECT,
                 "m.h5 /g/no: dataset missing");
    assert_fails(ifkv_h5_dataset_describe(file, "/no/m", &dataset), IFKV_ERR_DATA, IFKV_E_H5_OBJECT,
                 "/no/m: dataset missing");
    assert_fails(ifkv_h5_dataset_describe(file, "/g", &dataset), IFKV_ERR_DATA, IFKV_E_H5_OBJECT,
                 "/g: not a dataset");
    ifkv_h5_close(file);
}

static void check_names_the_rows_of_a_flipped_bit(void **state) {
    (void)state;
    const char *path = write_matrix();
    const float pattern[] = {1000.0f * N_COL, 1000.0f * N_COL + 1};
    assert_true(fixture_flip(path, pattern, sizeof pattern));
    ifkv_h5 *file = open_file(path);
    assert_ok(ifkv_h5_check(file, false));
    assert_fails(ifkv_h5_check(file, true), IFKV_ERR_DATA, IFKV_E_H5_DATA,
                 "m.h5 /g/m: rows 768..1023 not readable: data error detected by Fletcher32");
    ifkv_h5_close(file);
}

static void a_walk_refuses_what_leaves_the_file_or_never_ends(void **state) {
    (void)state;
    static const struct {
        fixture_h5_kind kind;
        const char *part;
    } bad[] = {{H5_CYCLE, "cycle of groups"},       {H5_SOFT_LINK, "soft link"},
               {H5_EXTERNAL_LINK, "external link"}, {H5_EXTERNAL_STORAGE, "external storage"},
               {H5_VIRTUAL, "virtual dataset"},     {H5_FILTER, "filter 32015 not allowed"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *path = fixture_path(dir, "bad.h5");
        fixture_h5_write(path, bad[i].kind);
        ifkv_h5 *file = open_file(path);
        assert_fails(ifkv_h5_check(file, true), IFKV_ERR_DATA, IFKV_E_H5_REFUSED, bad[i].part);
        ifkv_h5_close(file);
    }
}

/* Whatever a changed byte does to HDF5, the caller gets a status. */
static void a_damaged_file_gives_a_status_whatever_byte_it_is(void **state) {
    (void)state;
    ifkv_h5_summary summary;
    const char *path = fixture_path(dir, "q.h5");
    size_t n;
    fixture_h5_write(path, H5_VALID);
    char *image = fixture_read(path, &n);
    unsigned seed = 1;
    for (int i = 0; i < 200; i++) {
        seed = seed * 1103515245u + 12345u;
        const size_t at = (seed >> 8) % n;
        const char was = image[at];
        image[at] = (char)(was ^ (1 << (seed >> 29)));
        fixture_write(path, image, n);
        image[at] = was;
        const ifkv_status status = ifkv_h5_inspect(path, &summary);
        assert_true(status == IFKV_OK || status == IFKV_ERR_DATA);
    }
    free(image);
}

/* ---- the child ---- */

static const ifkv_guard_limits roomy = {(size_t)1 << 30, 20}, narrow = {(size_t)200 << 20, 20};

static ifkv_status answer_much(ifkv_guard *guard, void *arg) {
    static char block[100000];
    memset(block, *(const char *)arg, sizeof block);
    for (int i = 0; i < 100; i++) IFKV_TRY(ifkv_guard_write(guard, block, sizeof block));
    return IFKV_OK;
}

static ifkv_status fail_after_an_answer(ifkv_guard *guard, void *arg) {
    (void)arg;
    IFKV_TRY(ifkv_guard_write(guard, "half", 4));
    return IFKV_FAIL(IFKV_ERR_BUSY, IFKV_E_H5_OPEN, "why: %d", 7);
}

static ifkv_status crash(ifkv_guard *guard, void *arg) {
    (void)guard;
    raise(*(const int *)arg);
    return IFKV_OK;
}

static ifkv_status leave(ifkv_guard *guard, void *arg) {
    (void)guard, (void)arg;
    _exit(3);
}

static ifkv_status allocate(ifkv_guard *guard, void *arg) {
    char *volatile block = malloc(*(const size_t *)arg);
    (void)guard;
    if (!block) return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_H5_DATA, "refused");
    memset(block, 1, *(const size_t *)arg);
    return IFKV_OK;
}

static void a_childs_answer_arrives_whole(void **state) {
    (void)state;
    char c = 'x', *answer = NULL;
    size_t bytes;
    assert_ok(ifkv_guard_run("f", roomy, answer_much, &c, &answer, &bytes));
    assert_int_equal(bytes, 10000000);
    assert_true(answer[0] == 'x' && answer[bytes - 1] == 'x' && answer[bytes] == 0);
    free(answer);
}

static void a_childs_error_is_the_parents(void **state) {
    (void)state;
    char *answer = NULL;
    size_t bytes;
    assert_fails(ifkv_guard_run("f", roomy, fail_after_an_answer, NULL, &answer, &bytes),
                 IFKV_ERR_BUSY, IFKV_E_H5_OPEN, "why: 7");
    assert_null(answer);
}

static void a_crash_of_the_child_is_a_data_error(void **state) {
    (void)state;
    int signals[] = {SIGSEGV, SIGABRT, SIGBUS, SIGKILL};
    char *answer = NULL, part[64];
    size_t bytes;
    for (int i = 0; i < 4; i++) {
        snprintf(part, sizeof part, "f.h5: its reader died (signal %d)", signals[i]);
        assert_fails(ifkv_guard_run("f.h5", roomy, crash, &signals[i], &answer, &bytes),
                     IFKV_ERR_DATA, IFKV_E_H5_CRASH, part);
    }
    assert_fails(ifkv_guard_run("f.h5", roomy, leave, NULL, &answer, &bytes), IFKV_ERR_DATA,
                 IFKV_E_H5_CRASH, "(exit 3)");
}

static ifkv_status sleep_long(ifkv_guard *guard, void *arg) {
    (void)guard, (void)arg;
    sleep(60);
    return IFKV_OK;
}

static ifkv_status loop(ifkv_guard *guard, void *arg) {
    static volatile int is_forever = 1;
    (void)guard, (void)arg;
    while (is_forever) {
    }
    return IFKV_OK;
}

static void a_child_that_never_answers_is_ended(void **state) {
    (void)state;
    const ifkv_guard_limits short_time = {(size_t)1 << 30, 1};
    char *answer = NULL;
    size_t bytes;
    assert_fails(ifkv_guard_run("f", short_time, sleep_long, NULL, &answer, &bytes), IFKV_ERR_DATA,
                 IFKV_E_H5_CRASH, "no answer in time");
    assert_fails(ifkv_guard_run("f", short_time, loop, NULL, &answer, &bytes), IFKV_ERR_DATA,
                 IFKV_E_H5_CRASH, "its reader died");
}

static void a_child_is_held_to_its_memory(void **state) {
    (void)state;
    char *answer = NULL;
    size_t bytes, wanted = (size_t)100 << 20;
#if defined(__SANITIZE_ADDRESS__)
    skip(); /* the sanitizer's own mappings make the limit meaningless */
#endif
    assert_ok(ifkv_guard_run("f", narrow, allocate, &wanted, &answer, &bytes));
    free(answer);
    wanted = (size_t)300 << 20;
    assert_fails(ifkv_guard_run("f", narrow, allocate, &wanted, &answer, &bytes), IFKV_ERR_DATA,
                 IFKV_E_H5_DATA, "refused");
}

int main(void) {
    ifkv_h5_process_init();
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(rows_come_back_from_the_middle),
        TEST(bfloat16_keeps_its_bits_and_is_known_again),
        TEST(blocks_are_256_rows_nearest_a_mebibyte),
        TEST(attributes_come_back),
        TEST(a_file_is_never_created_over_another),
        TEST(wrong_rows_types_and_paths_are_refused),
        TEST(check_names_the_rows_of_a_flipped_bit),
        TEST(a_walk_refuses_what_leaves_the_file_or_never_ends),
        TEST(a_damaged_file_gives_a_status_whatever_byte_it_is),
        TEST(a_childs_answer_arrives_whole),
        TEST(a_childs_error_is_the_parents),
        TEST(a_crash_of_the_child_is_a_data_error),
        TEST(a_child_that_never_answers_is_ended),
        TEST(a_child_is_held_to_its_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
