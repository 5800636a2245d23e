/* Communicators: the same bodies over self, over threads of 1, 2, 3, 5 and 8 ranks, and with the
 * argument "mpi" over MPI, whole and in messages of 13 bytes.  Buffers hold patterns that name
 * sender, receiver and place, and a canary where nothing may be written; everything is compared
 * bitwise.  Built with a device (test_comm_device), the bodies move its memory: by what self,
 * threads and MPI have for it, and with "nccl" and "nccl_mpi" by NCCL. */
#include "test.h"

#include "agree.h"
#include "comm.h"
#if IFKV_HAVE_MPI
#include "mpi_check.h"
#endif

enum { CANARY = 0xa5, GAP = 5, MAX_SIZE = 64 };

static ifkv_comm *world; /* opened by main under mpirun, else NULL */

#if IFKV_TEST_DEVICE
#include "device_backend.h"

static bool is_nccl; /* device memory moves by NCCL */
static _Thread_local ifkv_backend *device;

/* NCCL wants a device for each rank of a process; whatever else moves lets them share one. */
static bool has_room(int n_rank) {
    if (!is_nccl || n_rank <= device_backend_count()) return true;
    print_message("SKIPPED: %d ranks as threads, %d devices\n", n_rank, device_backend_count());
    return false;
}

/* The body over the communicator for a device's memory. */
static ifkv_status on_device(ifkv_comm *comm, ifkv_rank_fn body) {
    ifkv_comm *data = NULL;
    ifkv_backend *before = device;
    ifkv_status status = device_backend_open(ifkv_comm_node_rank(comm), &device);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    comm->is_nccl = is_nccl;
    status = ifkv_comm_attach(comm, device, true, &data);
    if (!status) status = body(data, NULL);
    ifkv_comm_detach(data);
    device->ops->close(device);
    device = before;
    return status;
}

/* A buffer of the test as the communicator wants it: a copy in device memory, until take_back. */
static void *lend(unsigned char *host, size_t bytes) {
    void *data = NULL;
    if (device->ops->alloc(device, bytes + 1, &data) ||
        device->ops->upload(device, data, host, bytes))
        abort();
    device_backend_delay(device);
    return data;
}
/* By a copy on the device, whose next operation must come behind the movement. */
static bool look(const void *data, unsigned char *host, size_t bytes) {
    void *copy = NULL;
    if (device->ops->alloc(device, bytes + 1, &copy)) abort();
    const bool ok = !device->ops->copy(device, copy, data, bytes) &&
                    !device->ops->download(device, host, copy, bytes);
    device->ops->free(device, copy);
    return ok;
}
static void take_back(void *data, unsigned char *host, size_t bytes) {
    look(data, host, bytes);
    device->ops->free(device, data);
}
#else
static bool has_room(int n_rank) {
    (void)n_rank;
    return true;
}
static ifkv_status on_device(ifkv_comm *comm, ifkv_rank_fn body) {
    return body(comm, NULL);
}
static void *lend(unsigned char *host, size_t bytes) {
    (void)bytes;
    return host;
}
static bool look(const void *data, unsigned char *host, size_t bytes) {
    (void)data, (void)host, (void)bytes;
    return true;
}
static void take_back(void *data, unsigned char *host, size_t bytes) {
    (void)data, (void)host, (void)bytes;
}
#endif

static ifkv_status rank_main(ifkv_comm *comm, void *body) {
    return on_device(comm, *(ifkv_rank_fn *)body);
}

static void over_all(ifkv_rank_fn body) {
    if (world) {
        assert_ok(on_device(world, body));
        return;
    }
    ifkv_comm *self = NULL;
    assert_ok(ifkv_comm_open("self", &self));
    const ifkv_status status = on_device(self, body);
    ifkv_comm_close(self);
    assert_ok(status);
    static const int sizes[] = {1, 2, 3, 5, 8};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (has_room(sizes[i])) assert_ok(ifkv_comm_thread_run(sizes[i], rank_main, &body));
}

/* Byte i of what `from` has for `to`. */
static unsigned char pattern(int from, int to, size_t i) {
    return (unsigned char)(31u * (unsigned)from + 101u * (unsigned)to + 7u * i + (i >> 8));
}

static void fill(unsigned char *at, size_t bytes, int from, int to) {
    for (size_t i = 0; i < bytes; i++) at[i] = pattern(from, to, i);
}

static bool holds(const unsigned char *at, size_t bytes, int from, int to) {
    for (size_t i = 0; i < bytes; i++)
        if (at[i] != pattern(from, to, i)) return false;
    return true;
}

static bool untouched(const unsigned char *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (at[i] != CANARY) return false;
    return true;
}

static unsigned char *canaries(size_t bytes) {
    unsigned char *buffer = malloc(bytes);
    if (!buffer) abort(); /* a test without memory has no verdict */
    memset(buffer, CANARY, bytes);
    return buffer;
}

/* Awkward sizes: nothing, one byte, off every power of two, larger than a page; asymmetric. */
static size_t awkward(int from, int to, int round) {
    static const size_t bytes[] = {0, 1, 4099, 0, 13, 26, 255, 1, 65537, 0, 12};
    return bytes[(size_t)(3 * from + 5 * to + round) % (sizeof bytes / sizeof *bytes)];
}

static ifkv_status check_bcast(ifkv_comm *comm, size_t bytes, int root) {
    const int rank = ifkv_comm_rank(comm);
    unsigned char *data = canaries(bytes + GAP);
    if (rank == root) fill(data, bytes, root, 0);
    void *lent = lend(data, bytes + GAP);
    ifkv_status status = ifkv_comm_bcast(comm, lent, bytes, root);
    take_back(lent, data, bytes + GAP);
    const bool ok = holds(data, bytes, root, 0) && untouched(data + bytes, GAP);
    free(data);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static ifkv_status bcast_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    for (int root = 0; root < ifkv_comm_size(comm); root++)
        for (int round = 0; round < 11; round++)
            IFKV_TRY(check_bcast(comm, awkward(0, 0, round), root));
    return ifkv_comm_bcast(comm, NULL, 0, 0);
}

static void bcast_copies_the_root(void **state) {
    (void)state;
    over_all(bcast_body);
}

enum { EVEN = -1, EVEN_WITH_GAPS = -2 };

/* Pieces of all ranks with gaps between them, in reverse order of rank; or, in the rounds above, of
 * one size in ascending order. */
static size_t lay_out(int size, int round, size_t *bytes, size_t *offset) {
    size_t end = GAP;
    if (round < 0) {
        const size_t gap = round == EVEN ? 0 : GAP;
        for (int r = 0; r < size; r++) {
            bytes[r] = 4099;
            offset[r] = GAP + (size_t)r * (4099 + gap);
        }
        return GAP + (size_t)size * (4099 + gap) + GAP;
    }
    for (int r = size - 1; r >= 0; r--) {
        bytes[r] = awkward(r, 0, round);
        offset[r] = end;
        end += bytes[r] + GAP;
    }
    return end;
}

static ifkv_status check_all_gather(ifkv_comm *comm, int round, bool is_in_place) {
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    size_t bytes[MAX_SIZE], offset[MAX_SIZE];
    const size_t end = lay_out(size, round, bytes, offset);
    unsigned char *recv = canaries(end), *own = canaries(bytes[rank] + 1);
    fill(is_in_place ? recv + offset[rank] : own, bytes[rank], rank, round);
    char *lent = lend(recv, end), *lent_own = lend(own, bytes[rank] + 1);
    const ifkv_status status = ifkv_comm_all_gather(
        comm, is_in_place ? lent + offset[rank] : lent_own, lent, bytes, offset);
    take_back(lent, recv, end);
    take_back(lent_own, own, bytes[rank] + 1);
    bool ok = untouched(recv, GAP);
    for (int r = 0; r < size; r++)
        ok = ok && holds(recv + offset[r], bytes[r], r, round) &&
             (round == EVEN || untouched(recv + offset[r] + bytes[r], GAP));
    ok = ok && untouched(recv + end - GAP, GAP);
    free(own);
    free(recv);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static ifkv_status all_gather_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    for (int round = EVEN_WITH_GAPS; round < 11; round++) {
        IFKV_TRY(check_all_gather(comm, round, false));
        IFKV_TRY(check_all_gather(comm, round, true));
    }
    return IFKV_OK;
}

static void all_gather_places_every_piece(void **state) {
    (void)state;
    over_all(all_gather_body);
}

static ifkv_status check_all_to_all(ifkv_comm *comm, int round) {
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    size_t out[MAX_SIZE], out_offset[MAX_SIZE], in[MAX_SIZE], in_offset[MAX_SIZE];
    size_t out_end = 0, in_end = GAP;
    for (int r = 0; r < size; r++) {
        out[r] = awkward(rank, r, round);
        in[r] = awkward(r, rank, round);
        out_offset[r] = out_end;
        in_offset[r] = in_end;
        out_end += out[r] + 1;
        in_end += in[r] + GAP;
    }
    unsigned char *send = canaries(out_end), *recv = canaries(in_end);
    for (int r = 0; r < size; r++) fill(send + out_offset[r], out[r], rank, r);
    void *lent = lend(send, out_end), *lent_recv = lend(recv, in_end);
    const ifkv_status status =
        ifkv_comm_all_to_all(comm, lent, out, out_offset, lent_recv, in, in_offset);
    take_back(lent_recv, recv, in_end);
    take_back(lent, send, out_end);
    bool ok = untouched(recv, GAP);
    for (int r = 0; r < size; r++)
        ok = ok && holds(recv + in_offset[r], in[r], r, rank) &&
             untouched(recv + in_offset[r] + in[r], GAP);
    free(recv);
    free(send);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static ifkv_status all_to_all_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    for (int round = 0; round < 11; round++) IFKV_TRY(check_all_to_all(comm, round));
    size_t none[MAX_SIZE] = {0};
    return ifkv_comm_all_to_all(comm, NULL, none, none, NULL, none, none);
}

static void all_to_all_delivers_by_sender_and_receiver(void **state) {
    (void)state;
    over_all(all_to_all_body);
}

static int64_t *received(ifkv_comm *comm) {
    return &(comm->control ? comm->control : comm)->bytes_received;
}

/* Send to the rank `hops` further on, which gets by number of rank and round its awkward bytes. */
static ifkv_status check_shift(ifkv_comm *comm, int hops, int round) {
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    const int to = (rank + hops) % size, from = (rank + size - hops % size) % size;
    const size_t out = awkward(rank, to, round), in = awkward(from, rank, round);
    unsigned char *send = canaries(out + 1), *recv = canaries(in + 2 * GAP);
    fill(send, out, rank, to);
    char *lent = lend(send, out + 1), *lent_recv = lend(recv, in + 2 * GAP);
    const int64_t before = *received(comm);
    ifkv_status status = ifkv_comm_shift_begin(comm, lent, out, to, lent_recv + GAP, in, from);
    /* what is on its way may still be read */
    bool ok = look(lent, send, out + 1) && holds(send, out, rank, to) && *received(comm) == before;
    if (!status) status = ifkv_comm_shift_wait(comm);
    take_back(lent_recv, recv, in + 2 * GAP);
    take_back(lent, send, out + 1);
    ok = ok && holds(recv + GAP, in, from, rank) && untouched(recv, GAP) &&
         untouched(recv + GAP + in, GAP) &&
         *received(comm) == before + (from == rank ? 0 : (int64_t)in);
    free(recv);
    free(send);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static ifkv_status shift_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    for (int hops = 0; hops <= ifkv_comm_size(comm); hops++)
        for (int round = 0; round < 11; round++) IFKV_TRY(check_shift(comm, hops, round));
    const int rank = ifkv_comm_rank(comm);
    IFKV_TRY(ifkv_comm_shift_begin(comm, NULL, 0, rank, NULL, 0, rank));
    return ifkv_comm_shift_wait(comm);
}

static void shift_delivers_to_the_rank_it_names(void **state) {
    (void)state;
    over_all(shift_body);
}

/* Every rank's piece goes all the way round, two buffers taking turns. */
static ifkv_status ring_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm), round = 2;
    unsigned char *block[2] = {canaries(65537), canaries(65537)};
    fill(block[0], awkward(rank, 0, round), rank, 0);
    void *lent[2] = {lend(block[0], 65537), lend(block[1], 65537)};
    ifkv_status status = IFKV_OK;
    for (int hop = 0; hop < size && status == IFKV_OK; hop++) {
        const int held = (rank + size - hop) % size, coming = (held + size - 1) % size;
        status = ifkv_comm_shift_begin(comm, lent[hop % 2], awkward(held, 0, round),
                                       (rank + 1) % size, lent[(hop + 1) % 2],
                                       awkward(coming, 0, round), (rank + size - 1) % size);
        if (!status) status = ifkv_comm_shift_wait(comm);
    }
    for (int i = 0; i < 2; i++) take_back(lent[i], block[i], 65537);
    const bool ok = holds(block[size % 2], awkward(rank, 0, round), rank, 0);
    free(block[0]);
    free(block[1]);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static void shifts_round_the_ring_come_home(void **state) {
    (void)state;
    over_all(ring_body);
}

/* A shift out of turn or to a rank that is none is refused where it is made, and the next is as if
 * it had not been. */
static ifkv_status misuse_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    unsigned char bytes[2] = {0, 0};
    char *a = lend(bytes, 2), *b = a + 1;
    bool ok = ifkv_comm_shift_wait(comm) == IFKV_ERR_USAGE;
    ok = ok && ifkv_comm_shift_begin(comm, a, 1, size, b, 1, size) == IFKV_ERR_USAGE;
    ok = ok && ifkv_comm_shift_begin(comm, a, 1, -1, b, 1, rank) == IFKV_ERR_USAGE;
    ok = ok && ifkv_comm_shift_begin(comm, NULL, 1, rank, b, 1, rank) == IFKV_ERR_USAGE;
    ok = ok && ifkv_comm_shift_begin(comm, a, 1, rank, NULL, 1, rank) == IFKV_ERR_USAGE;
    if (size > 1)
        ok = ok &&
             ifkv_comm_shift_begin(comm, a, 1, rank, b, 1, (rank + 1) % size) == IFKV_ERR_USAGE;
    ok = ok && ifkv_comm_shift_begin(comm, a, 1, rank, b, 1, rank) == IFKV_OK;
    ok = ok && ifkv_comm_shift_begin(comm, a, 1, rank, b, 1, rank) == IFKV_ERR_USAGE;
    ok = ok && ifkv_last_error()->code == IFKV_E_STATE && ifkv_comm_shift_wait(comm) == IFKV_OK;
    take_back(a, bytes, 2);
    IFKV_TRY(agree_true(comm, ok));
    return check_shift(comm, 1, 4);
}

static void shift_refuses_what_cannot_be(void **state) {
    (void)state;
    over_all(misuse_body);
}

static ifkv_status check_gather(ifkv_comm *comm, size_t bytes, bool is_in_place) {
    const size_t size = (size_t)ifkv_comm_size(comm), rank = (size_t)ifkv_comm_rank(comm);
    unsigned char *recv = canaries(size * bytes + GAP), *own = canaries(bytes + 1);
    unsigned char *send = is_in_place ? recv + rank * bytes : own;
    fill(send, bytes, (int)rank, 0);
    const ifkv_status status = ifkv_comm_gather(comm, send, bytes, recv);
    bool ok = untouched(recv + size * bytes, GAP);
    for (size_t r = 0; r < size; r++) ok = ok && holds(recv + r * bytes, bytes, (int)r, 0);
    free(own);
    free(recv);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static ifkv_status gather_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    for (int round = 0; round < 11; round++) {
        IFKV_TRY(check_gather(comm, awkward(0, 0, round), false));
        IFKV_TRY(check_gather(comm, awkward(0, 0, round), true));
    }
    return ifkv_comm_gather(comm, NULL, 0, NULL);
}

static void gather_orders_by_rank(void **state) {
    (void)state;
    over_all(gather_body);
}

static ifkv_status check_all_reduce(ifkv_comm *comm, int n, ifkv_reduce op) {
    const int64_t size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    int64_t value[256];
    bool ok = true;
    /* value i of rank r: (r - 2) * 2^33 + i, so that the low word alone gives a wrong answer */
    for (int i = 0; i < n; i++) value[i] = (rank - 2) * (INT64_C(1) << 33) + i;
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, value, n, op));
    for (int i = 0; i < n; i++) {
        int64_t want = 0;
        if (op == IFKV_REDUCE_MIN) want = -2 * (INT64_C(1) << 33) + i;
        if (op == IFKV_REDUCE_MAX) want = (size - 3) * (INT64_C(1) << 33) + i;
        if (op == IFKV_REDUCE_SUM)
            want = (size * (size - 1) / 2 - 2 * size) * (INT64_C(1) << 33) + size * i;
        ok = ok && value[i] == want;
    }
    return agree_true(comm, ok);
}

static ifkv_status all_reduce_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    static const int counts[] = {0, 1, 2, 63, 64, 65, 128, 200};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        IFKV_TRY(check_all_reduce(comm, counts[i], IFKV_REDUCE_MIN));
        IFKV_TRY(check_all_reduce(comm, counts[i], IFKV_REDUCE_MAX));
        IFKV_TRY(check_all_reduce(comm, counts[i], IFKV_REDUCE_SUM));
    }
    return IFKV_OK;
}

static void all_reduce_equals_closed_form(void **state) {
    (void)state;
    over_all(all_reduce_body);
}

static ifkv_status same_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    static const uint64_t values[] = {0, 1, UINT64_MAX, UINT64_C(1) << 63, 0x123456789abcdef0};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        IFKV_TRY(ifkv_comm_same(comm, values[i], "digest"));
    /* one odd rank, by the top bit alone and by the lowest alone: every rank must see it */
    const int last = ifkv_comm_size(comm) - 1;
    if (last == 0) return IFKV_OK;
    for (int bit = 0; bit < 64; bit += 63) {
        const uint64_t mine = ifkv_comm_rank(comm) == last ? UINT64_C(1) << bit : 0;
        const ifkv_status status = ifkv_comm_same(comm, mine, "digest of the selection");
        const ifkv_error *error = ifkv_last_error();
        IFKV_TRY(agree_true(comm, status == IFKV_ERR_INTERNAL && error->code == IFKV_E_DIVERGED &&
                                      strstr(error->text, "digest of the selection")));
    }
    return IFKV_OK;
}

static void same_refuses_one_odd_rank(void **state) {
    (void)state;
    over_all(same_body);
}

/* Ranks in the set `failing` (bit r) fail, each with its own status, code and words. */
static ifkv_status check_agree(ifkv_comm *comm, unsigned failing) {
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    int lowest = -1, got_rank = 99, again_rank = 99;
    for (int r = size - 1; r >= 0; r--)
        if (failing >> r & 1) lowest = r;
    ifkv_status mine = IFKV_OK;
    if (failing >> rank & 1)
        mine =
            IFKV_FAIL(rank % 2 ? IFKV_ERR_DATA : IFKV_ERR_IO, 300 + rank, "shard %d%% bad", rank);
    const ifkv_status got = ifkv_comm_agree(comm, mine, &got_rank);
    const ifkv_error first = *ifkv_last_error();
    if (lowest < 0) return agree_true(comm, got == IFKV_OK && got_rank == -1);
    char want[64];
    snprintf(want, sizeof want, "shard %d%% bad", lowest);
    bool ok = got_rank == lowest && got == (lowest % 2 ? IFKV_ERR_DATA : IFKV_ERR_IO) &&
              first.status == got && first.code == 300 + lowest && first.rank == lowest &&
              !strcmp(first.text, want);
    /* an agreement further up, where all ranks fail by now: still that rank's error */
    ok = ifkv_comm_agree(comm, got, &again_rank) == got && again_rank == lowest &&
         ifkv_last_error()->rank == lowest && !strcmp(ifkv_last_error()->text, want) && ok;
    return agree_true(comm, ok);
}

static ifkv_status agree_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    const int size = ifkv_comm_size(comm);
    for (unsigned failing = 0; failing < 1u << (size < 6 ? size : 6); failing++)
        IFKV_TRY(check_agree(comm, failing));
    return check_agree(comm, 1u << (size - 1));
}

static void agree_carries_the_lowest_failing_rank(void **state) {
    (void)state;
    over_all(agree_body);
}

static ifkv_status long_text_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    char text[2000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    const bool is_mine = ifkv_comm_rank(comm) == 0;
    const ifkv_status mine = is_mine ? IFKV_FAIL(IFKV_ERR_DATA, 1, "%s", text) : IFKV_OK;
    const ifkv_status got = ifkv_comm_agree(comm, mine, NULL);
    return agree_true(comm, got == IFKV_ERR_DATA && strlen(ifkv_last_error()->text) == 1023 &&
                                !strncmp(ifkv_last_error()->text, text, 1023));
}

static void agree_cuts_a_long_text(void **state) {
    (void)state;
    over_all(long_text_body);
}

static ifkv_status unreported_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    /* the last error is of another failure: its words must not be taken for this one's */
    (void)IFKV_FAIL(IFKV_ERR_IO, 702, "an older failure");
    const bool is_mine = ifkv_comm_rank(comm) == 0;
    const ifkv_status got = ifkv_comm_agree(comm, is_mine ? IFKV_ERR_NUMERIC : IFKV_OK, NULL);
    const ifkv_error *error = ifkv_last_error();
    return agree_true(comm, got == IFKV_ERR_NUMERIC && error->status == IFKV_ERR_NUMERIC &&
                                error->rank == 0 && !strcmp(error->text, "numeric"));
}

static void agree_does_not_borrow_an_older_text(void **state) {
    (void)state;
    over_all(unreported_body);
}

static ifkv_status count_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm), round = 4;
    size_t bytes[MAX_SIZE], offset[MAX_SIZE], in[MAX_SIZE], out[MAX_SIZE], place[MAX_SIZE];
    unsigned char *buffer = canaries((size_t)size * 2 * 65537), *send = canaries(65537);
    const size_t end = lay_out(size, round, bytes, offset);
    int64_t gathered = 0, exchanged = 0, value = rank;
    (void)end;
    for (int r = 0; r < size; r++) {
        out[r] = awkward(rank, r, round);
        in[r] = awkward(r, rank, round);
        place[r] = 65537 * (size_t)r;
        if (r != rank) gathered += (int64_t)bytes[r];
        if (r != rank) exchanged += (int64_t)in[r];
    }
    const size_t nowhere[MAX_SIZE] = {0}, room = (size_t)size * 2 * 65537;
    void *lent = lend(buffer, room), *lent_send = lend(send, 65537);
    *received(comm) = 0;
    ifkv_status status = ifkv_comm_barrier(comm);
    if (!status) status = ifkv_comm_all_reduce_i64(comm, &value, 1, IFKV_REDUCE_SUM);
    if (!status) status = ifkv_comm_same(comm, 7, "seven");
    if (!status) status = ifkv_comm_agree(comm, IFKV_OK, NULL);
    bool ok = *received(comm) == 0;
    if (!status) status = ifkv_comm_bcast(comm, lent, 1001, size - 1);
    ok = ok && *received(comm) == (rank == size - 1 ? 0 : 1001);
    *received(comm) = 0;
    if (!status) status = ifkv_comm_gather(comm, send, 77, buffer);
    ok = ok && *received(comm) == 77 * (int64_t)(size - 1);
    *received(comm) = 0;
    if (!status) status = ifkv_comm_all_gather(comm, lent_send, lent, bytes, offset);
    ok = ok && *received(comm) == gathered;
    if (!status) status = ifkv_comm_all_to_all(comm, lent_send, out, nowhere, lent, in, place);
    ok = ok && *received(comm) == gathered + exchanged;
    take_back(lent, buffer, room);
    take_back(lent_send, send, 65537);
    free(send);
    free(buffer);
    IFKV_TRY(status);
    return agree_true(comm, ok);
}

static void bytes_received_equals_closed_form(void **state) {
    (void)state;
    over_all(count_body);
}

/* Calls of changing kind and size without a barrier between them: a message or a wake-up of one
 * call taken for another shows as a wrong pattern. */
static ifkv_status order_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    uint32_t seed = 12345;
    for (int i = 0; i < 200; i++) {
        seed = seed * 1664525u + 1013904223u;
        const int round = (int)(seed >> 16 & 1023);
        switch (seed >> 27 & 7) {
        case 0: IFKV_TRY(check_all_to_all(comm, round)); break;
        case 3: IFKV_TRY(check_shift(comm, 1 + round % 3, round)); break;
        case 1: IFKV_TRY(check_all_gather(comm, round, seed >> 26 & 1)); break;
        case 2:
            IFKV_TRY(check_bcast(comm, awkward(0, 0, round), round % ifkv_comm_size(comm)));
            break;
        default: IFKV_TRY(check_all_reduce(comm, round % 200, IFKV_REDUCE_SUM)); break;
        }
    }
    return IFKV_OK;
}

static void mixed_calls_keep_their_order(void **state) {
    (void)state;
    over_all(order_body);
}

static ifkv_status describe_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    int64_t ranks = ifkv_comm_rank(comm);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &ranks, 1, IFKV_REDUCE_SUM));
    const int64_t size = ifkv_comm_size(comm);
    IFKV_TRY(agree_true(comm, ranks == size * (size - 1) / 2));
    /* the tests run on one node */
    return agree_true(comm, ifkv_comm_node_size(comm) == ifkv_comm_size(comm) &&
                                ifkv_comm_node_rank(comm) == ifkv_comm_rank(comm) &&
                                ifkv_comm_name(comm) != NULL);
}

static void ranks_are_numbered_and_share_a_node(void **state) {
    (void)state;
    over_all(describe_body);
}

static ifkv_status one_all_to_all_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    return check_all_to_all(comm, 2);
}

/* A second communicator inside the first: a group of threads within a rank, or a second duplicate.
 */
static ifkv_status second_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    ifkv_comm *other = NULL, *control = comm->control ? comm->control : comm;
    *received(comm) = 3;
    IFKV_TRY(ifkv_comm_open(world ? "mpi" : "self", &other));
    ifkv_status status = on_device(other, one_all_to_all_body);
    if (!status) status = check_bcast(comm, 13, 0);
    const bool ok = *received(comm) == 3 + (ifkv_comm_rank(comm) ? 13 : 0) + 0;
    ifkv_comm_close(other);
    IFKV_TRY(status);
    IFKV_TRY(agree_true(comm, ok));
    ifkv_rank_fn body = all_to_all_body;
    if (!strcmp(ifkv_comm_name(control), "thread") && has_room(3))
        IFKV_TRY(agree_ok(comm, ifkv_comm_thread_run(3, rank_main, &body)));
    return check_all_gather(comm, 1, false);
}

static void two_communicators_are_independent(void **state) {
    (void)state;
    over_all(second_body);
}

static int run_all(const char *name) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_are_numbered_and_share_a_node),
        cmocka_unit_test(bcast_copies_the_root),
        cmocka_unit_test(all_gather_places_every_piece),
        cmocka_unit_test(all_to_all_delivers_by_sender_and_receiver),
        cmocka_unit_test(shift_delivers_to_the_rank_it_names),
        cmocka_unit_test(shifts_round_the_ring_come_home),
        cmocka_unit_test(shift_refuses_what_cannot_be),
        cmocka_unit_test(gather_orders_by_rank),
        cmocka_unit_test(all_reduce_equals_closed_form),
        cmocka_unit_test(same_refuses_one_odd_rank),
        cmocka_unit_test(agree_carries_the_lowest_failing_rank),
        cmocka_unit_test(agree_cuts_a_long_text),
        cmocka_unit_test(agree_does_not_borrow_an_older_text),
        cmocka_unit_test(bytes_received_equals_closed_form),
        cmocka_unit_test(mixed_calls_keep_their_order),
        cmocka_unit_test(two_communicators_are_independent),
    };
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}

#if IFKV_HAVE_MPI
/* Every rank runs every test; one of them speaks, and a failure on any is everyone's exit code. */
static int run_mpi(int *argc, char ***argv) {
    int level = 0, rank = 0, n_failed = 0;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) MPI_Abort(MPI_COMM_WORLD, 1);
#if IFKV_TEST_DEVICE
    static const size_t max_message[] = {1 << 30, 4093}; /* a message waits for its device */
#else
    static const size_t max_message[] = {1 << 30, 13};
#endif
    for (size_t i = 0; i < sizeof max_message / sizeof *max_message; i++) {
        if (ifkv_comm_mpi_open_chunked(max_message[i], &world) != IFKV_OK) {
            fprintf(stderr, "rank %d: %s\n", rank, ifkv_last_error()->text);
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
        n_failed += run_all(i ? "comm mpi, short messages" : "comm mpi");
        ifkv_comm_close(world);
    }
    MPI_Allreduce(MPI_IN_PLACE, &n_failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    MPI_Finalize();
    return n_failed != 0;
}
#endif

int main(int argc, char **argv) {
    const char *over = argc > 1 ? argv[1] : "";
#if IFKV_TEST_DEVICE
    is_nccl = !strncmp(over, "nccl", 4);
    if (is_nccl) over += strlen(over) > 5 ? 5 : 4; /* "nccl" or "nccl_mpi" */
#endif
    if (!*over) return run_all("comm self and thread");
#if IFKV_HAVE_MPI
    if (!strcmp(over, "mpi")) return run_mpi(&argc, &argv);
#endif
    fprintf(stderr, "usage: %s [mpi]\n", argv[0]);
    return 2;
}
