/* Digests of bytes, files and indices: the same whole and in pieces, and those of the format. */
#include "model_files.h"

#include "digest.h"
#include "error_codes.h"

static void digest_of_pieces_equals_digest_of_the_whole(void **state) {
    char bytes[1000];
    ifkv_digest *digest;
    (void)state;
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (char)(i * 7);
    assert_ok(ifkv_digest_create(&digest));
    for (size_t i = 0; i < sizeof bytes; i += 37)
        ifkv_digest_add(digest, bytes + i, sizeof bytes - i < 37 ? sizeof bytes - i : 37);
    assert_true(ifkv_digest_value(digest) == ifkv_digest_bytes(bytes, sizeof bytes));
    ifkv_digest_destroy(digest);
}

static void digest_of_a_file_equals_digest_of_its_bytes(void **state) {
    uint64_t value;
    write_text(*state, "x", "some bytes");
    assert_ok(ifkv_digest_file(path_in(*state, "x"), IFKV_E_TENSOR_FILE, &value));
    assert_true(value == ifkv_digest_bytes("some bytes", 10));
}

static void digest_of_indices_is_that_of_little_endian_int64(void **state) {
    static const int64_t index[2] = {1, 0x0102030405060708};
    static const unsigned char bytes[16] = {1, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1};
    (void)state;
    assert_true(ifkv_digest_indices(index, 2) == ifkv_digest_bytes(bytes, 16));
}

static void digest_of_nothing_is_the_published_constant(void **state) {
    (void)state;
    assert_true(ifkv_digest_indices(NULL, 0) == 0x2d06800538d394c2u);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, dir_setup, dir_teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(digest_of_pieces_equals_digest_of_the_whole),
        TEST(digest_of_a_file_equals_digest_of_its_bytes),
        TEST(digest_of_indices_is_that_of_little_endian_int64),
        TEST(digest_of_nothing_is_the_published_constant),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
