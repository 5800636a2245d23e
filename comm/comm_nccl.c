/* The communicator "nccl" for the memory of a CUDA back end: movements by NCCL, on a stream of
 * their own.
 *
 * Owns an NCCL communicator that does not block, the stream, and two events that order it with the
 * back end's stream.  A movement is put into the stream and the call returns; an error or a peer
 * that does not come shows when the host next waits for the back end, which asks here first
 * (before_wait).  NCCL itself has no time limit, and over NVLink not even an error: a kernel whose
 * peer is gone spins for ever.  After an error or the limit the communicator is aborted, which
 * frees the stream, by a thread of its own, because the abort may hang as well; then the device is
 * given up.  Knows no kernel and no MPI: what the host must know goes over the control
 * communicator. Calls come from the thread that opened it. */
#include "nccl_check.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

enum {
    INIT_S = 120, /* at most, for all ranks to come to the initialisation */
    ABORT_S = 10, /* for an abort */
    CLOSE_S = 5,  /* at most, for movements under way when the communicator is closed */
};

typedef struct nccl_comm {
    ifkv_comm base;
    ifkv_backend *backend;   /* borrowed */
    ncclComm_t nccl;         /* owned; NULL: not there yet, or aborted */
    cudaStream_t stream;     /* owned */
    cudaEvent_t ready, done; /* owned: what a movement waits for; the last movement */
    void *memory, *handle;   /* borrowed: registered memory, and NCCL's handle of it */
    bool is_broken;
} nccl_comm;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Between two looks: short at first, because most waits are. */
static void pause_after(double waited_s) {
    const struct timespec t = {.tv_nsec = waited_s < 1e-3 ? 1000 : 100000};
    nanosleep(&t, NULL);
}

/* Seconds of patience, at most `most`. */
static double limit_of(const ifkv_comm *control, double most) {
    const double limit_s = control->timeout_s > 0 ? control->timeout_s : IFKV_COMM_TIMEOUT_S;
    return limit_s < most ? limit_s : most;
}

/* NULL where it has worked. */
static void *abort_main(void *nccl) {
    return ncclCommAbort(nccl) == ncclSuccess ? NULL : nccl;
}

/* Abort, and lose the device if that fails or hangs. */
static void give_up(nccl_comm *self) {
    pthread_t thread;
    struct timespec end;
    void *failed = NULL;
    self->is_broken = true;
    if (!self->nccl) return;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += ABORT_S;
    if (pthread_create(&thread, NULL, abort_main, self->nccl)) {
        self->backend->is_lost = true;
    } else if (pthread_timedjoin_np(thread, &failed, &end)) {
        self->backend->is_lost = true;
        pthread_detach(thread);
    } else if (failed) {
        self->backend->is_lost = true;
    }
    self->nccl = NULL;
}

/* Pass a status through and leave a communicator that failed. */
static ifkv_status note(nccl_comm *self, ifkv_status status) {
    if (status != IFKV_OK && !self->is_broken) give_up(self);
    return status;
}

static ifkv_status usable(const nccl_comm *self) {
    IFKV_REQUIRE(!self->is_broken, IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                 "communicator nccl: used after it failed");
    return IFKV_OK;
}

/* Ask until what was begun is under way; NCCL's last answer, ncclInProgress after limit_s. */
static ncclResult_t ask(const nccl_comm *self, double limit_s) {
    const double begin = now_s();
    for (;;) {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t result = ncclCommGetAsyncError(self->nccl, &state);
        const double waited_s = now_s() - begin;
        if (result != ncclSuccess) return result;
        if (state != ncclInProgress || waited_s > limit_s) return state;
        pause_after(waited_s);
    }
}

static ifkv_status settle(const nccl_comm *self, double limit_s, const char *what) {
    const ncclResult_t state = ask(self, limit_s);
    IFKV_REQUIRE(state != ncclInProgress, IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                 "communicator nccl: %s: the other ranks did not come within %g s", what, limit_s);
    return ifkv_nccl_status(state, what, __FILE__, __LINE__);
}

/* See backend.h.  An error of the device itself is left to the back end, which finds it next. */
static ifkv_status wait_for_movements(void *arg) {
    nccl_comm *self = arg;
    const double limit_s = limit_of(self->base.control, INFINITY), begin = now_s();
    IFKV_TRY(usable(self));
    for (;;) {
        const cudaError_t error = cudaEventQuery(self->done);
        const double waited_s = now_s() - begin;
        ncclResult_t state = ncclSuccess;
        if (error != cudaErrorNotReady) return IFKV_OK;
        IFKV_TRY(note(self, IFKV_NCCL(ncclCommGetAsyncError(self->nccl, &state))));
        IFKV_TRY(note(self, ifkv_nccl_status(state, "a movement", __FILE__, __LINE__)));
        if (waited_s > limit_s)
            return note(self, IFKV_FAIL(IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                                        "communicator nccl: a movement did not end within %g s",
                                        limit_s));
        pause_after(waited_s);
    }
}

/* Behind what the back end has been asked for. */
static ifkv_status begin_movement(nccl_comm *self) {
    IFKV_TRY(usable(self));
    IFKV_TRY(IFKV_NCCL_CUDA(cudaEventRecord(self->ready, self->backend->stream)));
    IFKV_TRY(IFKV_NCCL_CUDA(cudaStreamWaitEvent(self->stream, self->ready, 0)));
    return IFKV_NCCL(ncclGroupStart());
}

/* Close the group, also behind a call that failed in it; its work is in the stream afterwards. */
static ifkv_status end_movement(nccl_comm *self, ifkv_status status) {
    const ifkv_status ended = IFKV_NCCL(ncclGroupEnd());
    if (status == IFKV_OK) status = ended;
    IFKV_TRY(status);
    IFKV_TRY(settle(self, limit_of(self->base.control, INFINITY), "ncclGroupEnd"));
    return IFKV_NCCL_CUDA(cudaEventRecord(self->done, self->stream));
}

/* Before what the back end will be asked for. */
static ifkv_status join_movement(nccl_comm *self) {
    return IFKV_NCCL_CUDA(cudaStreamWaitEvent(self->backend->stream, self->done, 0));
}

static ifkv_status send(nccl_comm *self, const void *from, size_t offset, size_t bytes, int peer) {
    if (!bytes) return IFKV_OK;
    return IFKV_NCCL(
        ncclSend((const char *)from + offset, bytes, ncclUint8, peer, self->nccl, self->stream));
}

static ifkv_status receive(nccl_comm *self, void *to, size_t offset, size_t bytes, int peer) {
    if (!bytes) return IFKV_OK;
    return IFKV_NCCL(
        ncclRecv((char *)to + offset, bytes, ncclUint8, peer, self->nccl, self->stream));
}

/* This rank's own piece. */
static ifkv_status copy_own(nccl_comm *self, void *to, size_t to_offset, const void *from,
                            size_t from_offset, size_t bytes) {
    if (!bytes || (char *)to + to_offset == (const char *)from + from_offset) return IFKV_OK;
    return IFKV_NCCL_CUDA(cudaMemcpyAsync((char *)to + to_offset, (const char *)from + from_offset,
                                          bytes, cudaMemcpyDeviceToDevice, self->stream));
}

static ifkv_status nccl_bcast(ifkv_comm *comm, void *data, size_t bytes, int root) {
    nccl_comm *self = (nccl_comm *)comm;
    if (!bytes) return usable(self);
    IFKV_TRY(note(self, begin_movement(self)));
    const ifkv_status status =
        IFKV_NCCL(ncclBroadcast(data, data, bytes, ncclUint8, root, self->nccl, self->stream));
    IFKV_TRY(note(self, end_movement(self, status)));
    return note(self, join_movement(self));
}

/* Pieces of one size in ascending ranks, as ncclAllGather lays them out? */
static bool is_even(const ifkv_comm *comm, const size_t *bytes, const size_t *offset) {
    for (int r = 1; r < comm->size; r++)
        if (bytes[r] != bytes[0] || offset[r] != offset[0] + (size_t)r * bytes[0]) return false;
    return true;
}

static ifkv_status gather_pieces(nccl_comm *self, const void *send_from, void *recv,
                                 const size_t *bytes, const size_t *offset) {
    const int size = self->base.size, rank = self->base.rank;
    if (is_even(&self->base, bytes, offset))
        return IFKV_NCCL(ncclAllGather(send_from, (char *)recv + offset[0], bytes[0], ncclUint8,
                                       self->nccl, self->stream));
    for (int step = 1; step < size; step++) {
        const int to = (rank + step) % size, from = (rank + size - step) % size;
        IFKV_TRY(send(self, send_from, 0, bytes[rank], to));
        IFKV_TRY(receive(self, recv, offset[from], bytes[from], from));
    }
    return copy_own(self, recv, offset[rank], send_from, 0, bytes[rank]);
}

static ifkv_status nccl_all_gather(ifkv_comm *comm, const void *send_from, void *recv,
                                   const size_t *bytes, const size_t *offset) {
    nccl_comm *self = (nccl_comm *)comm;
    IFKV_TRY(note(self, begin_movement(self)));
    const ifkv_status status = gather_pieces(self, send_from, recv, bytes, offset);
    IFKV_TRY(note(self, end_movement(self, status)));
    return note(self, join_movement(self));
}

static ifkv_status exchange_pieces(nccl_comm *self, const void *send_from, const size_t *send_bytes,
                                   const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                   const size_t *recv_offset) {
    const int size = self->base.size, rank = self->base.rank;
    for (int step = 1; step < size; step++) {
        const int to = (rank + step) % size, from = (rank + size - step) % size;
        IFKV_TRY(send(self, send_from, send_offset[to], send_bytes[to], to));
        IFKV_TRY(receive(self, recv, recv_offset[from], recv_bytes[from], from));
    }
    IFKV_REQUIRE(send_bytes[rank] == recv_bytes[rank], IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "all_to_all: rank %d sends %zu bytes to rank %d, which expects %zu", rank,
                 send_bytes[rank], rank, recv_bytes[rank]);
    return copy_own(self, recv, recv_offset[rank], send_from, send_offset[rank], recv_bytes[rank]);
}

static ifkv_status nccl_all_to_all(ifkv_comm *comm, const void *send_from, const size_t *send_bytes,
                                   const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                   const size_t *recv_offset) {
    nccl_comm *self = (nccl_comm *)comm;
    IFKV_TRY(note(self, begin_movement(self)));
    const ifkv_status status =
        exchange_pieces(self, send_from, send_bytes, send_offset, recv, recv_bytes, recv_offset);
    IFKV_TRY(note(self, end_movement(self, status)));
    return note(self, join_movement(self));
}

static ifkv_status shift_pieces(nccl_comm *self) {
    const ifkv_shift *shift = &self->base.shift;
    if (shift->to == self->base.rank) {
        IFKV_REQUIRE(shift->send_bytes == shift->recv_bytes, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                     "shift: rank %d sends itself %zu bytes and expects %zu", self->base.rank,
                     shift->send_bytes, shift->recv_bytes);
        return copy_own(self, shift->recv, 0, shift->send, 0, shift->recv_bytes);
    }
    IFKV_TRY(send(self, shift->send, 0, shift->send_bytes, shift->to));
    return receive(self, shift->recv, 0, shift->recv_bytes, shift->from);
}

/* Moves behind whatever the back end is asked for until the wait. */
static ifkv_status nccl_shift_begin(ifkv_comm *comm) {
    nccl_comm *self = (nccl_comm *)comm;
    IFKV_TRY(note(self, begin_movement(self)));
    return note(self, end_movement(self, shift_pieces(self)));
}

static ifkv_status nccl_shift_wait(ifkv_comm *comm) {
    nccl_comm *self = (nccl_comm *)comm;
    IFKV_TRY(usable(self));
    return note(self, join_movement(self));
}

/* Memory that NCCL can move without a copy of its own; registered while it is the only such. */
static ifkv_status nccl_alloc(ifkv_comm *comm, size_t bytes, void **data_p) {
    nccl_comm *self = (nccl_comm *)comm;
    void *data = NULL;
    IFKV_TRY(usable(self));
    const ncclResult_t result = ncclMemAlloc(&data, bytes);
    IFKV_REQUIRE(result == ncclSuccess, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "communicator nccl: no memory for %zu bytes on %s: %s", bytes,
                 self->backend->device, ncclGetErrorString(result));
    if (!self->memory && ncclCommRegister(self->nccl, data, bytes, &self->handle) == ncclSuccess)
        self->memory = data;
    *data_p = data;
    return IFKV_OK;
}

/* Let movements under way end, or give up.  Without a word about what fails: whoever frees or
 * closes may be reporting an error already. */
static void drain(nccl_comm *self) {
    const double begin = now_s(), limit_s = limit_of(self->base.control, CLOSE_S);
    if (!self->nccl) return;
    while (cudaEventQuery(self->done) == cudaErrorNotReady && now_s() - begin < limit_s)
        pause_after(now_s() - begin);
    if (cudaEventQuery(self->done) != cudaSuccess || ask(self, limit_s) != ncclSuccess)
        give_up(self);
}

/* Behind the movements of this memory, whose peers may not come. */
static void nccl_free(ifkv_comm *comm, void *data) {
    nccl_comm *self = (nccl_comm *)comm;
    if (data) drain(self);
    if (!data || self->backend->is_lost) return;
    if (data == self->memory) {
        if (self->nccl) ncclCommDeregister(self->nccl, self->handle);
        self->memory = self->handle = NULL;
    }
    ncclMemFree(data);
}

static void leave_nccl(nccl_comm *self) {
    drain(self);
    if (!self->nccl) return;
    const ncclResult_t result = ncclCommFinalize(self->nccl);
    const double limit_s = limit_of(self->base.control, CLOSE_S);
    if ((result != ncclSuccess && result != ncclInProgress) || ask(self, limit_s) != ncclSuccess) {
        give_up(self);
        return;
    }
    ncclCommDestroy(self->nccl);
}

static void nccl_close(ifkv_comm *comm) {
    nccl_comm *self = (nccl_comm *)comm;
    leave_nccl(self);
    self->backend->before_wait = NULL;
    if (!self->backend->is_lost) {
        if (self->done) cudaEventDestroy(self->done);
        if (self->ready) cudaEventDestroy(self->ready);
        if (self->stream) cudaStreamDestroy(self->stream);
    }
    free(self);
}

static const ifkv_comm_ops nccl_ops = {
    .name = "nccl",
    .close = nccl_close,
    .bcast = nccl_bcast,
    .all_gather = nccl_all_gather,
    .all_to_all = nccl_all_to_all,
    .shift_begin = nccl_shift_begin,
    .shift_wait = nccl_shift_wait,
    .alloc = nccl_alloc,
    .free = nccl_free,
};

/* ---- opening: every step ends in an agreement, so that no rank waits for one that failed ---- */

static ifkv_status check_version(ifkv_comm *control) {
    int version = 0;
    ifkv_status status = IFKV_NCCL(ncclGetVersion(&version));
    if (status == IFKV_OK && version < NCCL_VERSION_CODE)
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_COMM,
                           "communicator nccl: got NCCL %d, expected %d or later, for which it was "
                           "built",
                           version, NCCL_VERSION_CODE);
    IFKV_TRY(ifkv_comm_agree(control, status, NULL));
    int64_t ends[2] = {version, -version};
    IFKV_TRY(ifkv_comm_all_reduce_i64(control, ends, 2, IFKV_REDUCE_MIN));
    if (ends[0] != -ends[1])
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_COMM,
                           "communicator nccl: got NCCL %lld on one rank and %lld on another, "
                           "expected the same",
                           (long long)ends[0], (long long)-ends[1]);
    return ifkv_comm_agree(control, status, NULL);
}

static ifkv_status create(nccl_comm *self) {
    IFKV_TRY(IFKV_NCCL_CUDA(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking)));
    IFKV_TRY(IFKV_NCCL_CUDA(cudaEventCreateWithFlags(&self->ready, cudaEventDisableTiming)));
    return IFKV_NCCL_CUDA(cudaEventCreateWithFlags(&self->done, cudaEventDisableTiming));
}

static ifkv_status initialise(nccl_comm *self, ifkv_comm *control) {
    const double limit_s = limit_of(control, INIT_S);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id = {{0}};
    config.blocking = 0;
    ifkv_status status = control->rank ? IFKV_OK : IFKV_NCCL(ncclGetUniqueId(&id));
    IFKV_TRY(ifkv_comm_agree(control, status, NULL));
    IFKV_TRY(control->ops->bcast(control, &id, sizeof id, 0));
    status =
        IFKV_NCCL(ncclCommInitRankConfig(&self->nccl, control->size, id, control->rank, &config));
    if (status != IFKV_OK) self->nccl = NULL;
    IFKV_TRY(ifkv_comm_agree(control, status, NULL));
    return ifkv_comm_agree(control, settle(self, limit_s, "ncclCommInitRankConfig"), NULL);
}

ifkv_status ifkv_comm_nccl_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p) {
    ifkv_status status = IFKV_OK;
    IFKV_TRY(check_version(comm));
    nccl_comm *self = calloc(1, sizeof *self);
    if (self) {
        self->base = (ifkv_comm){.ops = &nccl_ops, .rank = comm->rank, .size = comm->size};
        self->base.control = comm;
        self->backend = backend;
        status = create(self);
    } else {
        status =
            IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "communicator nccl: out of host memory");
    }
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), err_close);
    IFKV_TRY_GOTO(status, initialise(self, comm), err_give_up);
    backend->before_wait = wait_for_movements;
    backend->before_wait_arg = self;
    *data_p = &self->base;
    return IFKV_OK;
err_give_up:
    give_up(self); /* as all ranks do: some may wait in the initialisation of the others */
err_close:
    if (self) nccl_close(&self->base);
    return status;
}
