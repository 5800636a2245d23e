/* The pool's table: what is served, what goes and in which order.  Rows are numbers here; what lies
 * in them is the business of test_reuse_pool.c. */
#include "test.h"

#include <stdio.h>
#include <string.h>

#include "error_codes.h"
#include "pool.h"
#include "store_key.h"

enum { N_LAYER = 3, N_COL = 10, N_ROW = 20 };
/* an odd row of K and V in all layers: 240 bytes, no whole number of cache lines */
static const uint64_t row_bytes = 2 * N_LAYER * N_COL * sizeof(float);

typedef struct pool_fixture {
    ifkv_backend *backend;
    ifkv_pool pool;
} pool_fixture;

static int setup(void **state) {
    static pool_fixture fixture;
    fixture = (pool_fixture){0};
    *state = &fixture;
    if (ifkv_backend_open("cpu", 1, 0, &fixture.backend) != IFKV_OK) return -1;
    const size_t bytes = ifkv_pool_bytes(IFKV_DTYPE_F32, N_LAYER, N_COL, N_ROW);
    if (ifkv_pool_init(&fixture.pool, IFKV_DTYPE_F32, N_LAYER, N_COL, bytes)) return -1;
    return (int)ifkv_pool_alloc(&fixture.pool, fixture.backend);
}

static int teardown(void **state) {
    pool_fixture *fixture = *state;
    ifkv_pool_fini(&fixture->pool, fixture->backend);
    ifkv_backend_close(fixture->backend);
    return 0;
}

static const int32_t ids[] = {7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                              23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38};

/* n rows of the chunk that begins with id number `first`, behind the prefix 3, 4. */
static ifkv_store_entry chunk(int64_t first, int64_t n) {
    static const int32_t prefix[] = {3, 4};
    ifkv_store_entry entry = {.size = sizeof entry,
                              .description = "model a",
                              .n_row = n,
                              .prefix = prefix,
                              .n_prefix = 2,
                              .token = ids + first,
                              .n_token = n};
    assert_int_equal(ifkv_store_key_make(&entry), IFKV_OK);
    return entry;
}

/* A session of its own that puts an entry and sees it written. */
static void keep(ifkv_pool *pool, ifkv_store_entry entry) {
    ifkv_pool_begin(pool);
    assert_non_null(ifkv_pool_put(pool, &entry));
    ifkv_pool_commit(pool);
}

static bool has(const ifkv_pool *pool, ifkv_store_entry entry) {
    return ifkv_pool_has(pool, &entry);
}

/* Rows of entries are within the pool, and nobody has two of one. */
static void assert_rows_are_apart(ifkv_pool *pool, const ifkv_store_entry *entry, int n) {
    int n_owner[N_ROW] = {0};
    int64_t n_owned = 0;
    for (int i = 0; i < n; i++) {
        const int64_t *row = ifkv_pool_use(pool, &entry[i]);
        assert_non_null(row);
        for (int64_t j = 0; j < entry[i].n_row; j++) {
            assert_in_range(row[j], 0, N_ROW - 1);
            assert_int_equal(n_owner[row[j]]++, 0);
        }
        n_owned += entry[i].n_row;
    }
    assert_int_equal(pool->n_free, N_ROW - n_owned);
    assert_int_equal(pool->n_entry, n);
}

static void bytes_are_never_exceeded(void **state) {
    (void)state;
    for (uint64_t bytes = 1; bytes < 5 * row_bytes; bytes++) {
        ifkv_pool pool = {0};
        assert_int_equal(ifkv_pool_init(&pool, IFKV_DTYPE_F32, N_LAYER, N_COL, bytes), IFKV_OK);
        assert_true(pool.is_on);
        assert_true(pool.bytes <= bytes);
        assert_true((uint64_t)(pool.cache.capacity + 1) * row_bytes + 2 * 63 > bytes);
        ifkv_pool_fini(&pool, NULL);
    }
}

static void the_bytes_of_rows_hold_that_many(void **state) {
    (void)state;
    for (int64_t n = 0; n < 40; n++) {
        const size_t bytes = ifkv_pool_bytes(IFKV_DTYPE_F32, N_LAYER, N_COL, n);
        ifkv_pool pool = {0};
        assert_int_equal(ifkv_pool_init(&pool, IFKV_DTYPE_F32, N_LAYER, N_COL, bytes), IFKV_OK);
        assert_int_equal(pool.cache.capacity, n);
        assert_int_equal(pool.bytes, bytes);
        ifkv_pool_fini(&pool, NULL);
    }
    assert_true(ifkv_pool_bytes(IFKV_DTYPE_F32, N_LAYER, INT64_MAX, 2) == SIZE_MAX);
}

static void nothing_asked_is_no_pool(void **state) {
    (void)state;
    ifkv_pool pool = {0};
    assert_int_equal(ifkv_pool_init(&pool, IFKV_DTYPE_F32, N_LAYER, N_COL, 0), IFKV_OK);
    assert_false(pool.is_on);
    ifkv_pool_fini(&pool, NULL);
    assert_int_equal(ifkv_pool_init(&pool, IFKV_DTYPE_F32, N_LAYER, N_COL, UINT64_MAX),
                     IFKV_ERR_RESOURCE);
}

static void an_entry_is_served_once_it_is_written(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    const ifkv_store_entry a = chunk(0, 5), b = chunk(1, 5);
    ifkv_pool_begin(pool);
    assert_null(ifkv_pool_use(pool, &a));
    assert_non_null(ifkv_pool_put(pool, &a));
    assert_null(ifkv_pool_put(pool, &a)); /* the same chunk twice in one request */
    assert_false(has(pool, a));
    assert_null(ifkv_pool_use(pool, &a));
    ifkv_pool_commit(pool);
    assert_rows_are_apart(pool, &a, 1);
    ifkv_pool_begin(pool);
    assert_non_null(ifkv_pool_put(pool, &b)); /* a session that fails */
    ifkv_pool_begin(pool);
    ifkv_pool_commit(pool);
    assert_false(has(pool, b));
    assert_rows_are_apart(pool, &a, 1);
}

static void only_what_was_asked_is_served(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    static const int32_t other_prefix[] = {3, 5};
    const ifkv_store_entry a = chunk(0, 5);
    keep(pool, a);
    assert_true(has(pool, a));
    assert_false(has(pool, chunk(0, 4)));
    assert_false(has(pool, chunk(1, 5)));
    ifkv_store_entry other[4] = {a, a, a, a};
    other[0].description = "model b";
    other[1].prefix = other_prefix;
    other[2].token = ids + 1;
    other[3].n_prefix = 1; /* a row, an id and a prefix id less have the same n_row */
    for (int i = 0; i < 4; i++) {
        assert_false(has(pool, other[i])); /* even where the keys are the same by accident */
        assert_int_equal(ifkv_store_key_make(&other[i]), IFKV_OK);
        assert_false(has(pool, other[i]));
    }
    ifkv_store_entry same = a;
    same.key[32 - 1] ^= 1;
    assert_false(has(pool, same));
}

static void the_prefix_rows_are_an_entry(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    ifkv_store_entry prefix = chunk(0, 2);
    prefix.token = NULL;
    prefix.n_token = 0;
    assert_int_equal(ifkv_store_key_make(&prefix), IFKV_OK);
    keep(pool, prefix);
    assert_rows_are_apart(pool, &prefix, 1);
    assert_false(has(pool, chunk(0, 2)));
}

static void the_one_used_longest_ago_goes_first(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    const ifkv_store_entry a = chunk(0, 6), b = chunk(1, 6), c = chunk(2, 6), d = chunk(3, 4),
                           e = chunk(4, 9);
    keep(pool, a);
    keep(pool, b);
    keep(pool, c);
    assert_true(has(pool, b)); /* looking is no use */
    ifkv_pool_begin(pool);
    assert_non_null(ifkv_pool_use(pool, &a));
    keep(pool, d); /* 2 of 20 rows are free: b goes, and a and c stay */
    assert_false(has(pool, b));
    assert_rows_are_apart(pool, (ifkv_store_entry[]){a, c, d}, 3); /* uses them in this order */
    keep(pool, e); /* 4 are free: a goes, then 10 are */
    assert_false(has(pool, a));
    assert_rows_are_apart(pool, (ifkv_store_entry[]){c, d, e}, 3);
}

static void what_the_session_uses_never_goes(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    const ifkv_store_entry a = chunk(0, 6), b = chunk(1, 6), c = chunk(2, 6), d = chunk(3, 8);
    keep(pool, a);
    keep(pool, b);
    keep(pool, c);
    ifkv_pool_begin(pool);
    assert_non_null(ifkv_pool_use(pool, &a)); /* and used longest ago before */
    assert_non_null(ifkv_pool_use(pool, &a)); /* a use counts once */
    assert_non_null(ifkv_pool_put(pool, &d)); /* 14 rows are not used */
    assert_true(has(pool, a));
    assert_false(has(pool, b));
    const ifkv_store_entry small = chunk(5, 6), smallest = chunk(9, 1);
    assert_non_null(ifkv_pool_put(pool, &small));
    assert_false(has(pool, c));
    assert_null(ifkv_pool_put(pool, &smallest)); /* a, d and this use all */
    ifkv_pool_commit(pool);
    assert_rows_are_apart(pool, (ifkv_store_entry[]){a, d, small}, 3);
    ifkv_pool_begin(pool); /* and now they may */
    const ifkv_store_entry all = chunk(0, N_ROW);
    assert_non_null(ifkv_pool_put(pool, &all));
    ifkv_pool_commit(pool);
    assert_rows_are_apart(pool, &all, 1);
}

static void what_does_not_fit_drives_nothing_out(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    const ifkv_store_entry a = chunk(0, 6), b = chunk(1, 6), large = chunk(2, 15),
                           huge = chunk(0, N_ROW + 1);
    keep(pool, a);
    keep(pool, b);
    ifkv_pool_begin(pool);
    assert_null(ifkv_pool_put(pool, &huge));
    assert_non_null(ifkv_pool_use(pool, &a));
    assert_null(ifkv_pool_put(pool, &large)); /* beside a */
    assert_rows_are_apart(pool, (ifkv_store_entry[]){a, b}, 2);
}

static void rows_that_go_leave_holes_that_are_filled(void **state) {
    ifkv_pool *pool = &((pool_fixture *)*state)->pool;
    enum { N_FIRST = 25, MOST = 7 };
    for (int i = 0; i < 300; i++) {
        ifkv_store_entry there[N_ROW];
        int n = 0;
        const ifkv_store_entry entry = chunk(i % N_FIRST, 1 + (i * 5) % MOST);
        if (!has(pool, entry)) keep(pool, entry);
        for (int first = 0; first < N_FIRST; first++)
            for (int64_t length = 1; length <= MOST; length++)
                if (has(pool, chunk(first, length))) there[n++] = chunk(first, length);
        assert_true(n > 0);
        assert_rows_are_apart(pool, there, n);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_are_never_exceeded),
        cmocka_unit_test(the_bytes_of_rows_hold_that_many),
        cmocka_unit_test(nothing_asked_is_no_pool),
        cmocka_unit_test_setup_teardown(an_entry_is_served_once_it_is_written, setup, teardown),
        cmocka_unit_test_setup_teardown(only_what_was_asked_is_served, setup, teardown),
        cmocka_unit_test_setup_teardown(the_prefix_rows_are_an_entry, setup, teardown),
        cmocka_unit_test_setup_teardown(the_one_used_longest_ago_goes_first, setup, teardown),
        cmocka_unit_test_setup_teardown(what_the_session_uses_never_goes, setup, teardown),
        cmocka_unit_test_setup_teardown(what_does_not_fit_drives_nothing_out, setup, teardown),
        cmocka_unit_test_setup_teardown(rows_that_go_leave_holes_that_are_filled, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
