/* The chunk store on disk (I26, faults M8): what is served is what was saved, to the bit, whatever
 * happens to the files. */
#include "tiny.h"

#include "error_codes.h"
#include "file_fixture.h"
#include "h5.h"
#include "model_files.h"
#include "store.h"
#include "store_file.h"
#include "store_key.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t seed;
static char *dir;
static int n_warning;
static char warning[2048]; /* the last one */

static void count_warning(void *arg, const char *line) {
    (void)arg;
    n_warning++;
    snprintf(warning, sizeof warning, "%s", line);
}

static int make_dir(void **state) {
    (void)state;
    dir = fixture_dir();
    n_warning = 0;
    *warning = 0;
    return 0;
}

static int remove_dir(void **state) {
    (void)state;
    fixture_remove(dir);
    return 0;
}

static ifkv_chunk_store *open_store(uint64_t max_bytes) {
    const ifkv_chunk_store_options options = {
        .dir = dir, .max_bytes = max_bytes, .say = count_warning};
    ifkv_chunk_store *store;
    assert_ok(ifkv_chunk_store_open(&options, &store));
    return store;
}

/* ---- made-up entries ---- */

enum { N_LAYER = 3, N_HEAD = 2, D_HEAD = 8, N_TOKEN = 21, N_PREFIX = 2 };

typedef struct fake {
    ifkv_store_entry entry;
    int32_t token[N_TOKEN], prefix[N_PREFIX];
    bool is_right; /* what was taken is what is given */
    int n_layer;   /* taken */
    const char *unlink_at_first;
} fake;

static fake make_fake(int which, const char *description) {
    fake made = {.is_right = true};
    made.entry = (ifkv_store_entry){.size = sizeof made.entry,
                                    .description = description,
                                    .dtype = "float32",
                                    .element_bytes = 4,
                                    .n_layer = N_LAYER,
                                    .n_kv_head = N_HEAD,
                                    .d_head = D_HEAD,
                                    .n_row = N_TOKEN,
                                    .n_prefix = N_PREFIX,
                                    .n_token = N_TOKEN};
    for (int i = 0; i < N_TOKEN; i++) made.token[i] = 1000 * which + i;
    for (int i = 0; i < N_PREFIX; i++) made.prefix[i] = 7 + i;
    return made;
}

/* Pointers into the struct itself, once it lies where it stays. */
static const ifkv_store_entry *entry_of(fake *it) {
    it->entry.token = it->token;
    it->entry.prefix = it->prefix;
    assert_ok(ifkv_store_key_make(&it->entry));
    return &it->entry;
}

static size_t layer_bytes(const fake *it) {
    return (size_t)(it->entry.n_row * N_HEAD * D_HEAD) * it->entry.element_bytes;
}

static unsigned char byte_of(const fake *it, int layer, size_t i) {
    return (unsigned char)(i * 31 + (size_t)layer * 7 + (size_t)it->token[0] / 1000 * 13);
}

static bool give(void *arg, int layer, void *k, void *v) {
    const fake *it = arg;
    for (size_t i = 0; i < layer_bytes(it); i++) {
        ((unsigned char *)k)[i] = byte_of(it, layer, i);
        ((unsigned char *)v)[i] = byte_of(it, layer + N_LAYER, i);
    }
    return true;
}

static bool take(void *arg, int layer, void *k, void *v) {
    fake *it = arg;
    if (layer == 0 && it->unlink_at_first) unlink(it->unlink_at_first);
    it->is_right = it->is_right && layer == it->n_layer++;
    for (size_t i = 0; i < layer_bytes(it); i++)
        it->is_right = it->is_right && ((unsigned char *)k)[i] == byte_of(it, layer, i) &&
                       ((unsigned char *)v)[i] == byte_of(it, layer + N_LAYER, i);
    return true;
}

static void save(const ifkv_chunk_store *store, int which) {
    const ifkv_store *table = ifkv_chunk_store_table(store);
    fake it = make_fake(which, "model a");
    table->save(table->arg, entry_of(&it), give, &it);
}

/* True if it is served; then it must be right. */
static bool load_fake(const ifkv_chunk_store *store, fake *it) {
    const ifkv_store *table = ifkv_chunk_store_table(store);
    it->n_layer = 0;
    const bool is_served = table->load(table->arg, entry_of(it), take, it);
    assert_true(!is_served || (it->is_right && it->n_layer == N_LAYER));
    return is_served;
}

static bool load(const ifkv_chunk_store *store, int which) {
    fake it = make_fake(which, "model a");
    return load_fake(store, &it);
}

/* What an estimate goes by. */
static bool has(const ifkv_chunk_store *store, int which) {
    const ifkv_store *table = ifkv_chunk_store_table(store);
    fake it = make_fake(which, "model a");
    return table->has(table->arg, entry_of(&it));
}

/* In one of fixture_path's buffers. */
static const char *path_of(int which) {
    char name[40];
    fake it = make_fake(which, "model a");
    snprintf(name, sizeof name, "%s.h5", entry_of(&it)->key);
    return fixture_path(dir, name);
}

static void assert_missed_with_one_warning(const ifkv_chunk_store *store, int which,
                                           const char *part) {
    n_warning = 0;
    assert_false(load(store, which));
    assert_int_equal(n_warning, 1);
    if (!strstr(warning, part)) fail_msg("got \"%s\", want \"%s\" in it", warning, part);
}

/* ---- round trip ---- */

static void what_is_saved_is_served_to_the_bit(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    assert_false(load(store, 1));
    save(store, 1);
    save(store, 2);
    assert_true(load(store, 1) && load(store, 2));
    assert_false(load(store, 3));
    assert_true(has(store, 1) && has(store, 2) && !has(store, 3));
    ifkv_chunk_store_close(store);
    store = open_store(0);
    assert_true(load(store, 1) && load(store, 2));
    assert_int_equal(n_warning, 0);
    int64_t n;
    assert_ok(ifkv_store_verify(dir, count_warning, NULL, &n));
    assert_int_equal(n, 2);
    ifkv_chunk_store_close(store);
}

static void bfloat16_and_prefix_rows_are_served_to_the_bit(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    const ifkv_store *table = ifkv_chunk_store_table(store);
    fake half = make_fake(1, "bf16"), prefix = make_fake(2, "prefix");
    half.entry.dtype = "bfloat16";
    half.entry.element_bytes = 2;
    prefix.entry.n_token = 0;
    prefix.entry.n_row = N_PREFIX;
    table->save(table->arg, entry_of(&half), give, &half);
    table->save(table->arg, entry_of(&prefix), give, &prefix);
    assert_true(load_fake(store, &half) && load_fake(store, &prefix));
    int64_t n;
    assert_ok(ifkv_store_verify(dir, NULL, NULL, &n));
    assert_int_equal(n_warning, 0);
    ifkv_chunk_store_close(store);
}

static void a_name_gone_while_it_is_read_breaks_nothing(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    fake it = make_fake(1, "model a");
    it.unlink_at_first = path_of(1);
    assert_true(load_fake(store, &it));
    assert_false(load(store, 1));
    assert_int_equal(n_warning, 0);
    ifkv_chunk_store_close(store);
}

static void a_name_gone_before_hdf5_has_it_is_missing_not_damaged(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    ifkv_store_reader reader;
    fake it = make_fake(1, "model a");
    bool is_taken;
    save(store, 1);
    assert_ok(ifkv_store_file_open(path_of(1), &reader));
    assert_int_equal(unlink(path_of(1)), 0);
    assert_fails(ifkv_store_file_read(&reader, entry_of(&it), take, &it, &is_taken),
                 IFKV_ERR_NO_INPUT, IFKV_E_STORE, "removed");
    ifkv_store_file_close(&reader);
    ifkv_chunk_store_close(store);
}

/* Sound by its digest, and yet no entry: the message names the file. */
static void a_stranger_with_a_right_digest_is_never_served(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    fake it = make_fake(1, "model a");
    ifkv_store_entry odd = *entry_of(&it);
    bool is_given;
    odd.n_layer = 1; /* fewer layers than the key stands for */
    assert_ok(ifkv_store_file_write(path_of(1), &odd, give, &it, &is_given));
    assert_missed_with_one_warning(store, 1, strrchr(path_of(1), '/'));
    assert_non_null(strstr(warning, "/layers/1/k"));
    ifkv_chunk_store_close(store);
}

static void an_entry_is_whole_under_its_name_only(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    DIR *tmp = opendir(fixture_path(dir, ".tmp"));
    int n = 0;
    while (readdir(tmp)) n++;
    closedir(tmp);
    assert_int_equal(n, 2); /* . and .. */
    ifkv_chunk_store_close(store);
}

/* ---- damage ---- */

static void a_flipped_bit_anywhere_is_never_served(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    const char *path = strdup(path_of(1));
    size_t bytes;
    char *data = fixture_read(path, &bytes);
    const int fd = open(path, O_RDWR);
    assert_true(fd >= 0 && data && bytes > 1000);
    for (size_t at = 0; at < bytes; at += 1 + (size_t)tiny_below(&seed, 13)) {
        const char flipped = (char)(data[at] ^ 1 << tiny_below(&seed, 8));
        assert_int_equal(pwrite(fd, &flipped, 1, (off_t)at), 1);
        assert_missed_with_one_warning(store, 1, "chunk is encoded");
        assert_int_equal(pwrite(fd, &data[at], 1, (off_t)at), 1);
    }
    assert_true(load(store, 1));
    close(fd);
    free(data);
    free((char *)path);
    ifkv_chunk_store_close(store);
}

static void a_truncated_or_longer_file_is_never_served(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    const char *path = strdup(path_of(1));
    size_t bytes;
    char *data = fixture_read(path, &bytes);
    for (size_t n = 0; n < bytes; n += 1 + (size_t)tiny_below(&seed, 400)) {
        fixture_write(path, data, n);
        assert_missed_with_one_warning(store, 1, "not a whole entry");
    }
    data = realloc(data, bytes + 1);
    data[bytes] = 0;
    fixture_write(path, data, bytes + 1);
    assert_missed_with_one_warning(store, 1, "not a whole entry");
    free(data);
    free((char *)path);
    ifkv_chunk_store_close(store);
}

static void another_entry_under_the_name_is_never_served(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    save(store, 2);
    assert_int_equal(rename(path_of(2), path_of(1)), 0);
    assert_missed_with_one_warning(store, 1, "ids differ");
    int64_t n;
    assert_fails(ifkv_store_verify(dir, count_warning, NULL, &n), IFKV_ERR_NUMERIC, IFKV_E_STORE,
                 "1 damaged");
    save(store, 1); /* replaced by the right one */
    assert_true(load(store, 1));
    ifkv_chunk_store_close(store);
}

static void another_model_or_prefix_is_another_entry(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    fake model = make_fake(1, "model b"), prefix = make_fake(1, "model a");
    prefix.prefix[1]++;
    assert_false(load_fake(store, &model));
    assert_false(load_fake(store, &prefix));
    /* nor under its name */
    char name[40];
    snprintf(name, sizeof name, "%s.h5", model.entry.key);
    assert_int_equal(rename(path_of(1), fixture_path(dir, name)), 0);
    assert_int_equal(n_warning, 0);
    assert_false(load_fake(store, &model));
    assert_int_equal(n_warning, 1);
    assert_non_null(strstr(warning, "description differs"));
    ifkv_chunk_store_close(store);
}

static void what_is_no_file_is_a_miss_and_stays(void **state) {
    (void)state;
    ifkv_chunk_store *store = open_store(0);
    assert_int_equal(mkdir(path_of(1), 0700), 0);
    assert_int_equal(mkfifo(path_of(2), 0600), 0);
    for (int which = 1; which <= 2; which++) {
        assert_missed_with_one_warning(store, which, "not a regular file");
        save(store, which); /* says nothing more */
        assert_int_equal(n_warning, 1);
        assert_true(fixture_exists(path_of(which)));
    }
    assert_int_equal(symlink("nowhere", path_of(3)), 0);
    n_warning = 0;
    assert_false(load(store, 3));
    save(store, 3);
    assert_true(load(store, 3));
    assert_int_equal(n_warning, 0);
    ifkv_chunk_store_close(store);
}

/* ---- space ---- */

static uint64_t total(int64_t *n_p) {
    ifkv_store_file *file;
    uint64_t bytes = 0;
    assert_ok(ifkv_store_list(dir, &file, n_p));
    for (int64_t i = 0; i < *n_p; i++) {
        assert_int_equal(file[i].n_row, N_TOKEN);
        bytes += file[i].bytes;
    }
    free(file);
    return bytes;
}

/* Set an entry's last use: the clock of the file system may be coarse. */
static void set_use(int which, int seconds_ago) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec -= seconds_ago;
    assert_int_equal(utimensat(AT_FDCWD, path_of(which), (struct timespec[]){now, now}, 0), 0);
}

static void eviction_keeps_the_bound_and_the_last_used(void **state) {
    (void)state;
    int64_t n;
    ifkv_chunk_store *store = open_store(0);
    save(store, 1);
    const uint64_t one = total(&n);
    ifkv_chunk_store_close(store);
    store = open_store(3 * one);
    set_use(1, 50);
    save(store, 2);
    set_use(2, 40);
    save(store, 3);
    set_use(3, 30);
    assert_true(load(store, 1)); /* used now */
    for (int which = 4; which <= 6; which++) {
        save(store, which);
        assert_true(total(&n) <= 3 * one);
        assert_int_equal(n, 3);
        set_use(which, 20 - which);
        if (which == 4) assert_false(load(store, 2));
    }
    assert_true(load(store, 1) && load(store, 5) && load(store, 6));
    assert_false(load(store, 3) || load(store, 4));
    uint64_t bytes;
    set_use(1, 0);
    set_use(5, 3);
    set_use(6, 2);
    assert_ok(ifkv_store_prune(dir, 2 * one + 1, &n, &bytes));
    assert_true(n == 1 && bytes == one && load(store, 1) && load(store, 6));
    assert_ok(ifkv_store_prune(dir, 0, &n, &bytes));
    assert_int_equal(n, 2);
    assert_int_equal(n_warning, 0);
    ifkv_chunk_store_close(store);
}

static void an_entry_larger_than_the_bound_is_not_kept(void **state) {
    (void)state;
    int64_t n;
    ifkv_chunk_store *store = open_store(1000);
    save(store, 1);
    save(store, 2);
    assert_int_equal(n_warning, 1);
    assert_true(total(&n) == 0);
    ifkv_chunk_store_close(store);
}

static void strangers_are_never_evicted(void **state) {
    (void)state;
    int64_t n;
    uint64_t bytes;
    fixture_write_text(fixture_path(dir, "notes.h5"), "x");
    fixture_write_text(fixture_path(dir, "0123456789abcdef0123456789abcdef"), "x");
    assert_ok(ifkv_store_prune(dir, 0, &n, &bytes));
    assert_true(n == 0 && fixture_exists(fixture_path(dir, "notes.h5")));
}

static void what_dead_writers_left_goes(void **state) {
    (void)state;
    ifkv_chunk_store_close(open_store(0));
    const char *old = strdup(fixture_path(dir, ".tmp/old")),
               *fresh = strdup(fixture_path(dir, ".tmp/fresh"));
    fixture_write_text(old, "x");
    fixture_write_text(fresh, "x");
    const struct timespec long_ago = {.tv_sec = 1000000};
    assert_int_equal(utimensat(AT_FDCWD, old, (struct timespec[]){long_ago, long_ago}, 0), 0);
    ifkv_chunk_store_close(open_store(0));
    assert_true(!fixture_exists(old) && fixture_exists(fresh));
    free((char *)old);
    free((char *)fresh);
}

static void a_store_that_cannot_be_made_is_an_error(void **state) {
    (void)state;
    ifkv_chunk_store *store;
    ifkv_chunk_store_options options = {.dir = fixture_path(dir, "a/b")};
    assert_fails(ifkv_chunk_store_open(&options, &store), IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE,
                 "a/b");
    fixture_write_text(fixture_path(dir, "file"), "x");
    options.dir = fixture_path(dir, "file");
    assert_fails(ifkv_chunk_store_open(&options, &store), IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE,
                 "file");
}

/* In a child: HDF5 does not recover from a failed write. */
static void a_full_disk_is_one_warning(void **state) {
    (void)state;
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit limit = {4000, 4000};
        signal(SIGXFSZ, SIG_IGN);
        ifkv_chunk_store *store = open_store(0);
        setrlimit(RLIMIT_FSIZE, &limit);
        save(store, 1);
        save(store, 2);
        const bool is_right = n_warning == 1 && strstr(warning, "no more entries are kept") &&
                              !fixture_exists(path_of(1));
        _exit(is_right ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* ---- kills and races ---- */

enum { N_FILL = 12 };

static void fill(uint64_t max_bytes, int first, int step) {
    ifkv_chunk_store *store = open_store(max_bytes);
    for (int i = 0; i < N_FILL; i++) {
        const int which = (first + i * step) % N_FILL;
        if (!load(store, which)) save(store, which);
    }
    ifkv_chunk_store_close(store);
}

static pid_t fork_fill(uint64_t max_bytes, int first, int step) {
    const pid_t child = fork();
    if (child == 0) {
        fill(max_bytes, first, step);
        if (n_warning) fprintf(stderr, "%s\n", warning);
        _exit(n_warning ? 1 : 0);
    }
    return child;
}

static void assert_sound(void) {
    int64_t n;
    n_warning = 0;
    assert_ok(ifkv_store_verify(dir, count_warning, NULL, &n));
    ifkv_chunk_store *store = open_store(0);
    for (int which = 0; which < N_FILL; which++) load(store, which); /* right where served */
    ifkv_chunk_store_close(store);
    assert_int_equal(n_warning, 0);
}

static void a_kill_at_any_instant_leaves_whole_entries(void **state) {
    (void)state;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int status;
    waitpid(fork_fill(0, 0, 1), &status, 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    const int64_t us = (end.tv_sec - begin.tv_sec) * 1000000 + (end.tv_nsec - begin.tv_nsec) / 1000;
    for (int i = 0; i < 40; i++) {
        int64_t n;
        uint64_t bytes;
        if (i % 4 == 0) assert_ok(ifkv_store_prune(dir, 0, &n, &bytes));
        const pid_t child = fork_fill(0, i, 1);
        usleep((useconds_t)(us * i / 40));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_sound();
    }
}

static void processes_may_fill_and_empty_one_directory(void **state) {
    (void)state;
    int64_t n;
    fill(0, 0, 1);
    const uint64_t one = total(&n) / N_FILL;
    for (int i = 0; i < 6; i++) {
        uint64_t bytes;
        assert_ok(ifkv_store_prune(dir, 0, &n, &bytes));
        const uint64_t bound = i % 2 ? 5 * one : 0;
        const pid_t a = fork_fill(bound, 0, 1), b = fork_fill(bound, N_FILL - 1, N_FILL - 1);
        int status_a, status_b;
        assert_true(waitpid(a, &status_a, 0) == a && waitpid(b, &status_b, 0) == b);
        assert_true(status_a == 0 && status_b == 0);
        assert_sound();
        assert_true(bound == 0 || total(&n) <= bound + one);
        if (bound == 0) assert_int_equal((total(&n), n), N_FILL);
    }
}

/* ---- a prefill over it ---- */

static tiny_run prefill(const char *model, const tiny_request *request, int size,
                        const ifkv_chunk_store *store) {
    tiny_run run = {.model = model,
                    .weight_seed = 5,
                    .request = &request->request,
                    .options = {.ratio = "0.3",
                                .max_new = 3,
                                .store = store ? ifkv_chunk_store_table(store) : NULL}};
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static void assert_same(const tiny_run *got, const tiny_run *want) {
    assert_true(tiny_same_rows(got, want) && got->selected_digest == want->selected_digest);
    assert_memory_equal(got->logits, want->logits, (size_t)want->n_vocab * sizeof *want->logits);
    assert_memory_equal(got->answer, want->answer, (size_t)want->n_answer * sizeof *want->answer);
}

/* Damage every other entry in another way. */
static int damage_entries(int64_t n) {
    ifkv_store_file *file;
    int n_damaged = 0;
    assert_ok(ifkv_store_list(dir, &file, &n));
    for (int64_t i = 0; i < n; i += 2, n_damaged++) {
        const char *path = fixture_path(dir, file[i].name);
        if (i % 4)
            assert_int_equal(truncate(path, (off_t)file[i].bytes / 2), 0);
        else
            assert_true(fixture_flip(path, "token_ids", 9));
    }
    free(file);
    return n_damaged;
}

static void i26_a_damaged_store_changes_no_bit(void **state) {
    (void)state;
    const tiny_shape *shape = &tiny_shapes[2];
    char *model = tiny_model(dir, shape, -1);
    tiny_request request =
        tiny_request_make(&seed, shape->n_vocab, 2, 4, (int64_t[]){9, 1, 30, 14}, 3, 2);
    static const int sizes[] = {1, 2, 3, 5};
    for (int s = 0; s < 4; s++) {
        int64_t n;
        uint64_t bytes;
        assert_ok(ifkv_store_prune(dir, 0, &n, &bytes));
        ifkv_chunk_store *store = open_store(0);
        tiny_run without = prefill(model, &request, sizes[s], NULL),
                 cold = prefill(model, &request, sizes[s], store),
                 warm = prefill(model, &request, sizes[s], store);
        assert_within(tiny_rows_error(&cold, &without, 0, cold.n_context), TINY_TOLERANCE);
        assert_same(&warm, &cold);
        n_warning = 0;
        const int n_damaged = damage_entries(5);
        tiny_run mixed = prefill(model, &request, sizes[s], store);
        assert_same(&mixed, &cold);
        assert_int_equal(n_warning, n_damaged);
        assert_ok(ifkv_store_verify(dir, NULL, NULL, &n)); /* they were replaced */
        assert_int_equal(n, 5);
        tiny_run_fini(&without);
        tiny_run_fini(&cold);
        tiny_run_fini(&warm);
        tiny_run_fini(&mixed);
        ifkv_chunk_store_close(store);
    }
    tiny_request_fini(&request);
    free(model);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(what_is_saved_is_served_to_the_bit),
        TEST(bfloat16_and_prefix_rows_are_served_to_the_bit),
        TEST(a_name_gone_while_it_is_read_breaks_nothing),
        TEST(a_name_gone_before_hdf5_has_it_is_missing_not_damaged),
        TEST(a_stranger_with_a_right_digest_is_never_served),
        TEST(an_entry_is_whole_under_its_name_only),
        TEST(a_flipped_bit_anywhere_is_never_served),
        TEST(a_truncated_or_longer_file_is_never_served),
        TEST(another_entry_under_the_name_is_never_served),
        TEST(another_model_or_prefix_is_another_entry),
        TEST(what_is_no_file_is_a_miss_and_stays),
        TEST(eviction_keeps_the_bound_and_the_last_used),
        TEST(an_entry_larger_than_the_bound_is_not_kept),
        TEST(strangers_are_never_evicted),
        TEST(what_dead_writers_left_goes),
        TEST(a_store_that_cannot_be_made_is_an_error),
        TEST(a_full_disk_is_one_warning),
        TEST(a_kill_at_any_instant_leaves_whole_entries),
        TEST(processes_may_fill_and_empty_one_directory),
        TEST(i26_a_damaged_store_changes_no_bit),
    };
    seed = tiny_seed();
    ifkv_h5_process_init();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
