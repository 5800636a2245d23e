/* Which algorithm the products of the CUDA back end take.
 *
 * On the emulated device the stand-in for cuBLASLt offers one algorithm, or two that make the same
 * bits, or a third that is fastest and makes others.  However many there are, the bits are those of
 * the first.  On a GPU the offers are the library's, and every back end opened times them anew:
 * whichever wins, the bits are the same. */
#include "test.h"

#include "gen.h"
#ifdef IFKV_EMU
#include "emu/standin.h"
#else
static void emu_algorithms(int n) {
    (void)n;
}
#endif

static gen noise;

/* out [n, 40] = x w^T, or added to itself, with this many algorithms to choose from; twice, so that
 * the choice once made is used again. */
static void multiply(int n_algorithm, gen_matrix *x, gen_matrix *w, bool add_to_out,
                     unsigned char **image_p, size_t *bytes_p) {
    ifkv_backend *backend = NULL;
    emu_algorithms(n_algorithm);
    assert_ok(ifkv_backend_open("cuda", 1, 0, &backend));
    gen_matrix out =
        gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, x->view.n_row, 40, 3, GEN_POISON);
    for (int i = 0; i < 2; i++) {
        for (int64_t j = 0; j < out.view.n_row * 40; j++) out.value[j] = (double)(j % 7);
        gen_matrix_write(&out);
        assert_ok(backend->ops->matmul(backend, &x->view, &w->view, add_to_out, &out.view));
        assert_true(gen_matrix_read(&out));
    }
    *bytes_p = out.bytes;
    *image_p = malloc(out.bytes);
    assert_non_null(*image_p);
    memcpy(*image_p, out.image, out.bytes);
    gen_matrix_destroy(&out);
    ifkv_backend_close(backend);
    emu_algorithms(2);
}

static void bits_are_those_of_the_first_algorithm(void **state) {
    (void)state;
    ifkv_backend *backend = NULL;
    const int64_t rows[] = {1, 16, 17, 70};
    assert_ok(ifkv_backend_open("cuda", 1, 0, &backend));
    for (int way = 0; way < 8; way++) {
        const bool add_to_out = way & 1;
        gen_matrix x = gen_matrix_create_aligned(&noise, backend, IFKV_DTYPE_BF16, rows[way / 2],
                                                 500, 0, GEN_UNIFORM),
                   w = gen_matrix_create_aligned(&noise, backend, IFKV_DTYPE_BF16, 40, 500, 0,
                                                 GEN_UNIFORM);
        unsigned char *image[4];
        size_t bytes[4];
        for (int n = 1; n <= 3; n++) multiply(n, &x, &w, add_to_out, &image[n], &bytes[n]);
        for (int n = 2; n <= 3; n++) {
            assert_int_equal(bytes[n], bytes[1]);
            assert_memory_equal(image[n], image[1], bytes[1]);
        }
        for (int n = 1; n <= 3; n++) free(image[n]);
        gen_matrix_destroy(&x), gen_matrix_destroy(&w);
    }
    ifkv_backend_close(backend);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bits_are_those_of_the_first_algorithm),
    };
    (void)argc;
    noise = gen_create(argv[0]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
