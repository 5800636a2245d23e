/* The stand-in for NCCL: that it moves what the real one moves, for ranks as threads, whenever
 * stream work is run; that misuse is reported; that a peer which does not come leaves the others
 * where they are until they abort.  Rank threads return a verdict; the main thread asserts. */
#include "test_standin.h"

#include "emu_stream.h"
#include "standin.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <nccl.h>
#include <thread>
#include <vector>

static const char *const times[] = {"early", "late", "random:1", "random:2"};
constexpr size_t N = 200001; /* bytes: longer than a channel, off every power of two */

struct peer {
    int rank, size;
    ncclComm_t comm;
    cudaStream_t stream;
    char *data; /* [size + 1, N] device memory */
};

/* Ask until the communicator has an answer other than "in progress". */
static ncclResult_t settle(ncclComm_t comm, double limit_s = 10) {
    ncclResult_t error = ncclInProgress;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s);
    while (error == ncclInProgress && std::chrono::steady_clock::now() < end)
        if (const ncclResult_t result = ncclCommGetAsyncError(comm, &error)) return result;
    return error;
}

static bool open_peer(peer *p, const ncclUniqueId &id) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    if (cudaSetDevice(p->rank)) return false;
    const ncclResult_t result = ncclCommInitRankConfig(&p->comm, p->size, id, p->rank, &config);
    return (result == ncclSuccess || result == ncclInProgress) && settle(p->comm) == ncclSuccess &&
           !cudaStreamCreateWithFlags(&p->stream, 1) &&
           !cudaMalloc((void **)&p->data, ((size_t)p->size + 1) * N);
}

static bool close_peer(peer *p) {
    bool ok = ncclCommFinalize(p->comm) == ncclInProgress && settle(p->comm) == ncclSuccess;
    ok = ok && ncclCommDestroy(p->comm) == ncclSuccess;
    return !cudaFree(p->data) && !cudaStreamDestroy(p->stream) && ok;
}

/* Run `body` on `size` ranks; true if it was true on all. */
static bool on_ranks(int size, const std::function<bool(peer *)> &body, bool is_closed = true) {
    ncclUniqueId id;
    std::atomic<int> n_good{0};
    std::vector<std::thread> threads;
    setenv("IFKV_EMU_DEVICES", "4", 1);
    if (ncclGetUniqueId(&id)) return false;
    for (int r = 0; r < size; r++)
        threads.emplace_back([&, r] {
            peer p = {r, size, nullptr, nullptr, nullptr};
            bool ok = open_peer(&p, id) && body(&p);
            if (is_closed) ok = ok && close_peer(&p);
            n_good += ok;
        });
    for (std::thread &t : threads) t.join();
    return n_good == size;
}

static char pattern(int rank, size_t i) {
    return (char)(31 * rank + 7 * (int)(i % 1000) + 3);
}

static bool fill(peer *p, char *to) {
    std::vector<char> host(N);
    for (size_t i = 0; i < N; i++) host[i] = pattern(p->rank, i);
    return !cudaMemcpyAsync(to, host.data(), N, cudaMemcpyHostToDevice, p->stream);
}

static bool holds(peer *p, const char *from, int rank) {
    std::vector<char> host(N);
    if (cudaMemcpyAsync(host.data(), from, N, cudaMemcpyDeviceToHost, p->stream)) return false;
    if (cudaStreamSynchronize(p->stream)) return false;
    for (size_t i = 0; i < N; i++)
        if (host[i] != pattern(rank, i)) return false;
    return true;
}

static bool all_gather(peer *p, bool is_in_place) {
    char *own = p->data + (size_t)(is_in_place ? p->rank : p->size) * N;
    bool ok = fill(p, own);
    ok = ok && ncclAllGather(own, p->data, N, ncclUint8, p->comm, p->stream) == ncclInProgress;
    ok = ok && settle(p->comm) == ncclSuccess;
    for (int r = 0; r < p->size; r++) ok = ok && holds(p, p->data + (size_t)r * N, r);
    return ok;
}

static bool broadcast(peer *p) {
    bool ok = true;
    for (int root = 0; root < p->size; root++) {
        ok = ok && fill(p, p->data);
        ok = ok && ncclBroadcast(p->data, p->data, N, ncclUint8, root, p->comm, p->stream) ==
                       ncclInProgress;
        ok = ok && settle(p->comm) == ncclSuccess && holds(p, p->data, root);
    }
    return ok;
}

/* Two messages to each rank in one group, itself included, which keep their order. */
static bool send_and_receive(peer *p) {
    bool ok = fill(p, p->data + (size_t)p->size * N);
    const char *own = p->data + (size_t)p->size * N;
    ok = ok && ncclGroupStart() == ncclSuccess;
    for (int r = 0; r < p->size; r++) {
        ok = ok && !ncclSend(own, 1, ncclUint8, r, p->comm, p->stream);
        ok = ok && !ncclSend(own + 1, N - 1, ncclUint8, r, p->comm, p->stream);
        ok = ok && !ncclRecv(p->data + (size_t)r * N, 1, ncclUint8, r, p->comm, p->stream);
        ok = ok && !ncclRecv(p->data + (size_t)r * N + 1, N - 1, ncclUint8, r, p->comm, p->stream);
    }
    ok = ok && ncclGroupEnd() == ncclInProgress && settle(p->comm) == ncclSuccess;
    for (int r = 0; r < p->size; r++) ok = ok && holds(p, p->data + (size_t)r * N, r);
    return ok;
}

static void every_rank_gets_every_piece(void **) {
    for (const char *time : times)
        for (const int size : {1, 2, 4}) {
            emu_time(time);
            assert_true(on_ranks(size, [](peer *p) { return all_gather(p, false); }));
            assert_true(on_ranks(size, [](peer *p) { return all_gather(p, true); }));
            assert_true(on_ranks(size, broadcast));
            assert_true(on_ranks(size, send_and_receive));
        }
}

/* Work enters the stream only while the communicator is asked. */
static void who_does_not_ask_finds_nothing_in_the_stream(void **) {
    emu_time("early");
    assert_true(on_ranks(1, [](peer *p) {
        char *to = p->data + N;
        bool ok = fill(p, p->data) && !cudaMemset(to, 0, N) && !cudaDeviceSynchronize();
        ok = ok && ncclAllGather(p->data, to, N, ncclUint8, p->comm, p->stream) == ncclInProgress;
        ok = ok && !holds(p, to, 0);
        return ok && settle(p->comm) == ncclSuccess && holds(p, to, 0);
    }));
}

/* Work on a second stream waits for that on the first, as with the real one. */
static void work_on_two_streams_keeps_its_order(void **) {
    emu_time("late");
    assert_true(on_ranks(2, [](peer *p) {
        cudaStream_t other = nullptr;
        bool ok = !cudaStreamCreateWithFlags(&other, 1) && fill(p, p->data);
        const int to = 1 - p->rank;
        for (cudaStream_t stream : {p->stream, other}) {
            ok = ok && !ncclGroupStart();
            ok = ok && !ncclSend(p->data, N, ncclUint8, to, p->comm, stream);
            ok = ok && !ncclRecv(p->data + N, N, ncclUint8, to, p->comm, stream);
            ok = ok && ncclGroupEnd() == ncclInProgress && settle(p->comm) == ncclSuccess;
        }
        ok = ok && !cudaStreamSynchronize(other) && cudaStreamQuery(p->stream) == cudaSuccess;
        return ok && holds(p, p->data + N, to) && !cudaStreamDestroy(other);
    }));
}

/* A rank that asks its stream does not hang on a peer that only works on elsewhere. */
static void late_work_is_done_when_a_peer_waits_for_it(void **) {
    emu_time("late");
    std::atomic<bool> has_waited{false};
    assert_true(on_ranks(2, [&](peer *p) {
        bool ok = fill(p, p->data);
        ok = ok &&
             ncclBroadcast(p->data, p->data, N, ncclUint8, 1, p->comm, p->stream) == ncclInProgress;
        ok = ok && settle(p->comm) == ncclSuccess;
        if (p->rank == 0) {
            ok = ok && holds(p, p->data, 1);
            has_waited = true;
        } else { /* without a look at its own stream */
            while (!has_waited) std::this_thread::yield();
        }
        return ok;
    }));
}

static bool is_stuck(peer *p) {
    for (int i = 0; i < 200; i++) {
        ncclResult_t error = ncclSuccess;
        if (cudaStreamQuery(p->stream) != cudaErrorNotReady) return false;
        if (ncclCommGetAsyncError(p->comm, &error) || error != ncclSuccess) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
}

static bool abort_peer(peer *p) {
    return !ncclCommAbort(p->comm) && !cudaStreamSynchronize(p->stream) && !cudaFree(p->data) &&
           !cudaStreamDestroy(p->stream);
}

static bool begin_gather(peer *p, size_t bytes) {
    ncclAllGather(p->data, p->data, bytes, ncclUint8, p->comm, p->stream);
    return settle(p->comm) == ncclSuccess;
}

static void a_peer_that_does_not_come_is_waited_for_until_the_abort(void **) {
    for (const char *time : times) {
        emu_time(time);
        std::atomic<int> n_left{2};
        assert_true(on_ranks(
            3,
            [&](peer *p) {
                if (p->rank == 1) {
                    while (n_left) std::this_thread::yield();
                    return abort_peer(p);
                }
                const bool ok = begin_gather(p, N) && is_stuck(p);
                const bool is_free = abort_peer(p);
                n_left--;
                return ok && is_free;
            },
            false));
    }
}

static void counts_that_do_not_fit_hang(void **) {
    emu_time("early");
    std::atomic<int> n_left{2};
    assert_true(on_ranks(
        2,
        [&](peer *p) {
            const bool ok = begin_gather(p, N - (size_t)p->rank) && is_stuck(p);
            n_left--;
            while (n_left) std::this_thread::yield();
            return abort_peer(p) && ok;
        },
        false));
}

static void planned_failures_happen(void **) {
    emu_time("early");
    emu_fail("ncclAsync/1:1=6,ncclAllGather:3=3,ncclVersion:1+=22703");
    int version = 0;
    assert_int_equal(ncclGetVersion(&version), ncclSuccess);
    assert_int_equal(version, 22703);
    std::atomic<int> n_seen{0}, n_left{2};
    assert_true(on_ranks(
        2,
        [&](peer *p) {
            bool ok = begin_gather(p, N) || p->rank == 1; /* whose failure may show at once */
            ncclResult_t error = ncclSuccess;
            if (p->rank == 1) {
                while (!error) ncclCommGetAsyncError(p->comm, &error);
                n_seen += error == ncclRemoteError;
            } else { /* nobody tells it */
                ok = ok && is_stuck(p);
            }
            n_left--;
            while (n_left) std::this_thread::yield();
            return abort_peer(p) && ok;
        },
        false));
    assert_int_equal(n_seen, 1);
    assert_true(on_ranks(
        1,
        [](peer *p) {
            return ncclAllGather(p->data, p->data, 1, ncclUint8, p->comm, p->stream) ==
                       ncclInternalError &&
                   abort_peer(p);
        },
        false));
    emu_fail("ncclInitHang/0:1");
    ncclUniqueId id;
    ncclComm_t comm = nullptr;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    assert_int_equal(ncclGetUniqueId(&id), ncclSuccess);
    assert_int_equal(ncclCommInitRankConfig(&comm, 1, id, 0, &config), ncclInProgress);
    assert_int_equal(settle(comm, 0.05), ncclInProgress);
    assert_int_equal(ncclCommAbort(comm), ncclSuccess);
    emu_fail(nullptr);
}

static void two_ranks_on_one_device_are_refused(void **) {
    ncclUniqueId id;
    std::atomic<int> n_refused{0};
    std::vector<std::thread> threads;
    assert_int_equal(ncclGetUniqueId(&id), ncclSuccess);
    for (int r = 0; r < 2; r++)
        threads.emplace_back([&, r] {
            ncclComm_t comm = nullptr;
            ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
            config.blocking = 0;
            cudaSetDevice(0);
            ncclCommInitRankConfig(&comm, 2, id, r, &config);
            n_refused += settle(comm) == ncclInvalidUsage;
            ncclCommAbort(comm);
        });
    for (std::thread &t : threads) t.join();
    assert_int_equal(n_refused, 2);
}

/* Misuse ends the process with a report. */
static void misuse_is_reported(void **) {
    static const struct {
        const char *words;
        void (*misuse)(peer *p);
    } cases[] = {
        {"does not exist", [](peer *p) { ncclCommAbort(p->comm), ncclCommDestroy(p->comm); }},
        {"ask ncclCommGetAsyncError first",
         [](peer *p) {
             ncclAllGather(p->data, p->data, 1, ncclUint8, p->comm, p->stream);
             ncclAllGather(p->data, p->data, 1, ncclUint8, p->comm, p->stream);
         }},
        {"work is under way",
         [](peer *p) {
             emu_time("late");
             ncclAllGather(p->data, p->data + 1, 1, ncclUint8, p->comm, p->stream);
             settle(p->comm);
             ncclCommDestroy(p->comm);
         }},
        {"still registered",
         [](peer *p) {
             void *handle = nullptr;
             ncclCommRegister(p->comm, p->data, N, &handle);
             ncclCommDestroy(p->comm);
         }},
        {"can only be aborted",
         [](peer *p) {
             emu_fail("ncclAsync:1");
             ncclAllGather(p->data, p->data + 1, 1, ncclUint8, p->comm, p->stream);
             settle(p->comm);
             cudaStreamQuery(p->stream);
             ncclCommDestroy(p->comm);
         }},
    };
    for (const auto &c : cases) {
        int signal = 0;
        const std::string said = in_child(
            [&] {
                on_ranks(
                    1, [&](peer *p) { return c.misuse(p), true; }, false);
            },
            &signal);
        assert_int_equal(signal, SIGABRT);
        assert_says(said, c.words);
    }
}

int main() {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(misuse_is_reported), /* first: it forks, and the others start a thread */
        cmocka_unit_test(every_rank_gets_every_piece),
        cmocka_unit_test(who_does_not_ask_finds_nothing_in_the_stream),
        cmocka_unit_test(work_on_two_streams_keeps_its_order),
        cmocka_unit_test(late_work_is_done_when_a_peer_waits_for_it),
        cmocka_unit_test(a_peer_that_does_not_come_is_waited_for_until_the_abort),
        cmocka_unit_test(counts_that_do_not_fit_hang),
        cmocka_unit_test(planned_failures_happen),
        cmocka_unit_test(two_ranks_on_one_device_are_refused),
    };
    return cmocka_run_group_tests_name("stand-in for NCCL", tests, nullptr, nullptr);
}
