/* The communicator "mpi": host memory over a duplicate of MPI_COMM_WORLD, and back-end memory over
 * another, staged in host memory.
 *
 * Owns the duplicate and the requests, allocated at open; a collective allocates nothing.  Never
 * calls MPI_Init or MPI_Finalize and leaves the host's error handlers alone: only the duplicate
 * returns errors.  MPI counts are int, so every buffer moves in messages of at most max_message
 * bytes.  A message longer or shorter than expected is an error on the rank that receives it; sizes
 * of which one is zero leave a rank waiting, as MPI itself would, except in a shift, whose first
 * message is sent even if it is empty.  After an MPI error every call
 * returns IFKV_ERR_PEER, and buffers of the failed call may still be in use: the host then ends the
 * job.  Calls come from the thread that opened it.
 *
 * Back-end memory passes through host memory message by message, so its messages are short: each is
 * downloaded before it is sent and uploaded when it has come, by the back end. */
#include "comm.h"
#include "mpi_check.h"

#include <stdlib.h>
#include <string.h>

enum {
    TAG = 17, /* any: MPI keeps the order of messages between two ranks */
    SHIFT_TAG,
    MAX_MESSAGE = 1 << 30,
    MAX_STAGED = 1 << 20 /* long enough for the rate of the bus, and of short messages */
};

typedef struct mpi_comm {
    ifkv_comm base;
    MPI_Comm mpi; /* owned */
    size_t max_message;
    int node_size, node_rank;
    bool is_broken;
    MPI_Request *requests;          /* [2 size] owned; receives at 2r, sends at 2r + 1 */
    MPI_Request receiving, sending; /* of a shift */
    ifkv_backend *backend;          /* borrowed: whose memory it moves; NULL: the host's */
    char *stage; /* owned: [2 size, max_message] messages, received and sent, by peer; NULL: none */
} mpi_comm;

/* Where the message of a peer lies for MPI: in its stage, or where the caller has it. */
static void *in_stage(const mpi_comm *self, int peer, void *place) {
    return self->backend ? self->stage + 2 * (size_t)peer * self->max_message : place;
}
static char *out_stage(const mpi_comm *self, int peer) {
    return self->stage + (2 * (size_t)peer + 1) * self->max_message;
}

static ifkv_status stage_out(mpi_comm *self, int peer, const void *place, int n,
                             const void **message_p) {
    *message_p = place;
    if (!self->backend) return IFKV_OK;
    *message_p = out_stage(self, peer);
    return self->backend->ops->download(self->backend, out_stage(self, peer), place, (size_t)n);
}

static ifkv_status unstage(mpi_comm *self, int peer, void *place, int n) {
    if (!self->backend) return IFKV_OK;
    return self->backend->ops->upload(self->backend, place, in_stage(self, peer, NULL), (size_t)n);
}

/* This rank's own piece; the ends may overlap. */
static ifkv_status copy_own(mpi_comm *self, void *to, const void *from, size_t bytes) {
    if (!bytes || to == from) return IFKV_OK;
    if (self->backend) return self->backend->ops->copy(self->backend, to, from, bytes);
    memmove(to, from, bytes);
    return IFKV_OK;
}

static ifkv_status mpi_usable(const mpi_comm *self) {
    IFKV_REQUIRE(!self->is_broken, IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                 "communicator mpi: used after it failed");
    return IFKV_OK;
}

/* Pass a status through and remember that the communicator is lost. */
static ifkv_status mpi_note(mpi_comm *self, ifkv_status status) {
    if (status != IFKV_OK) self->is_broken = true;
    return status;
}

static void mpi_release(mpi_comm *self) {
    free(self->requests);
    free(self->stage);
    free(self);
}

/* Collective, unless the communicator failed: then the peers may be gone and the duplicate leaks.
 */
static void mpi_close(ifkv_comm *comm) {
    mpi_comm *self = (mpi_comm *)comm;
    int is_finalized = 0;
    MPI_Finalized(&is_finalized);
    if (!is_finalized && !self->is_broken) MPI_Comm_free(&self->mpi);
    mpi_release(self);
}

static ifkv_status mpi_barrier(ifkv_comm *comm) {
    mpi_comm *self = (mpi_comm *)comm;
    IFKV_TRY(mpi_usable(self));
    return mpi_note(self, IFKV_MPI(MPI_Barrier(self->mpi)));
}

static ifkv_status mpi_bcast(ifkv_comm *comm, void *data, size_t bytes, int root) {
    mpi_comm *self = (mpi_comm *)comm;
    IFKV_TRY(mpi_usable(self));
    for (size_t done = 0; done < bytes;) {
        const int n = ifkv_mpi_chunk(bytes - done, self->max_message);
        char *place = (char *)data + done;
        const void *message = in_stage(self, root, place);
        if (comm->rank == root) IFKV_TRY(mpi_note(self, stage_out(self, root, place, n, &message)));
        IFKV_TRY(
            mpi_note(self, IFKV_MPI(MPI_Bcast((void *)message, n, MPI_BYTE, root, self->mpi))));
        if (comm->rank != root) IFKV_TRY(mpi_note(self, unstage(self, root, place, n)));
        done += (size_t)n;
    }
    return IFKV_OK;
}

/* Where this rank's pieces lie for one exchange; everything borrowed. */
typedef struct pieces {
    const char *send;
    const size_t *send_bytes, *send_offset; /* [size]; NULL: same_bytes at send for every peer */
    size_t same_bytes;
    char *recv;
    const size_t *recv_bytes, *recv_offset; /* [size] */
} pieces;

/* Start the messages of one round; *is_busy_p says whether there was any. */
static ifkv_status post_round(mpi_comm *self, const pieces *p, size_t done, bool *is_busy_p) {
    const int size = self->base.size, rank = self->base.rank;
    for (int i = 0; i < 2 * size; i++) self->requests[i] = MPI_REQUEST_NULL;
    *is_busy_p = false;
    /* Receives first, so that data finds its buffer; peers in rotated order, so that not all ranks
     * send to rank 0 at once. */
    for (int step = 1; step < size; step++) {
        const int r = (rank + size - step) % size;
        if (done >= p->recv_bytes[r]) continue;
        const int n = ifkv_mpi_chunk(p->recv_bytes[r] - done, self->max_message);
        void *message = in_stage(self, r, p->recv + p->recv_offset[r] + done);
        IFKV_TRY(
            IFKV_MPI(MPI_Irecv(message, n, MPI_BYTE, r, TAG, self->mpi, &self->requests[2 * r])));
        *is_busy_p = true;
    }
    const void *message = NULL;
    for (int step = 1; step < size; step++) {
        const int r = (rank + step) % size;
        const size_t bytes = p->send_bytes ? p->send_bytes[r] : p->same_bytes;
        const size_t offset = p->send_offset ? p->send_offset[r] : 0;
        if (done >= bytes) continue;
        const int n = ifkv_mpi_chunk(bytes - done, self->max_message);
        if (!message || p->send_bytes) /* the same piece is staged once */
            IFKV_TRY(stage_out(self, r, p->send + offset + done, n, &message));
        IFKV_TRY(IFKV_MPI(
            MPI_Isend(message, n, MPI_BYTE, r, TAG, self->mpi, &self->requests[2 * r + 1])));
        *is_busy_p = true;
    }
    return IFKV_OK;
}

/* Wait for one message; expected -1 for one that is sent.  One MPI_Wait each, because MPI_Waitall
 * of Open MPI 4.1.4 never returns when a message that is too long arrives during the wait. */
static ifkv_status wait_message(mpi_comm *self, MPI_Request *request, int peer, int expected) {
    MPI_Status status;
    int got = 0, kind = MPI_SUCCESS;
    const int error = MPI_Wait(request, &status);
    if (error != MPI_SUCCESS) MPI_Error_class(error, &kind);
    IFKV_REQUIRE(expected < 0 || kind != MPI_ERR_TRUNCATE, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "rank %d sent more than the %d bytes that rank %d expects", peer, expected,
                 self->base.rank);
    IFKV_TRY(ifkv_mpi_status(error, "MPI_Wait", __FILE__, __LINE__));
    if (expected < 0) return IFKV_OK;
    IFKV_TRY(IFKV_MPI(MPI_Get_count(&status, MPI_BYTE, &got)));
    IFKV_REQUIRE(got == expected, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "rank %d sent %d bytes where rank %d expects %d", peer, got, self->base.rank,
                 expected);
    return IFKV_OK;
}

static ifkv_status wait_round(mpi_comm *self, const pieces *p, size_t done) {
    for (int r = 0; r < self->base.size; r++) {
        if (self->requests[2 * r] == MPI_REQUEST_NULL) continue;
        const int expected = ifkv_mpi_chunk(p->recv_bytes[r] - done, self->max_message);
        IFKV_TRY(wait_message(self, &self->requests[2 * r], r, expected));
        IFKV_TRY(unstage(self, r, p->recv + p->recv_offset[r] + done, expected));
    }
    for (int r = 0; r < self->base.size; r++)
        if (self->requests[2 * r + 1] != MPI_REQUEST_NULL)
            IFKV_TRY(wait_message(self, &self->requests[2 * r + 1], r, -1));
    return IFKV_OK;
}

/* Move all pieces between different ranks.  Round k moves the k-th chunk of every pair, so two
 * ranks always agree on the rounds they share, whatever others still have to move, and one request
 * a direction and peer is enough. */
static ifkv_status exchange(mpi_comm *self, const pieces *p) {
    bool is_busy = true;
    for (size_t done = 0; is_busy; done += self->max_message) {
        IFKV_TRY(mpi_note(self, post_round(self, p, done, &is_busy)));
        if (is_busy) IFKV_TRY(mpi_note(self, wait_round(self, p, done)));
    }
    return IFKV_OK;
}

static ifkv_status mpi_all_to_all(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                                  const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                  const size_t *recv_offset) {
    mpi_comm *self = (mpi_comm *)comm;
    const int me = comm->rank;
    const pieces p = {.send = send,
                      .send_bytes = send_bytes,
                      .send_offset = send_offset,
                      .recv = recv,
                      .recv_bytes = recv_bytes,
                      .recv_offset = recv_offset};
    IFKV_TRY(mpi_usable(self));
    IFKV_TRY(exchange(self, &p));
    /* After the exchange: a rank that returns before it would leave its peers waiting. */
    IFKV_REQUIRE(send_bytes[me] == recv_bytes[me], IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "all_to_all: rank %d sends %zu bytes to rank %d, which expects %zu", me,
                 send_bytes[me], me, recv_bytes[me]);
    if (!recv_bytes[me]) return IFKV_OK;
    return copy_own(self, p.recv + recv_offset[me], p.send + send_offset[me], recv_bytes[me]);
}

/* Pairs of messages instead of MPI_Allgatherv: its int displacements would need a second path for
 * long buffers, and all ranks would have to choose it together. */
static ifkv_status mpi_all_gather(ifkv_comm *comm, const void *send, void *recv,
                                  const size_t *bytes, const size_t *offset) {
    mpi_comm *self = (mpi_comm *)comm;
    const int me = comm->rank;
    const pieces p = {.send = send,
                      .same_bytes = bytes[me],
                      .recv = recv,
                      .recv_bytes = bytes,
                      .recv_offset = offset};
    IFKV_TRY(mpi_usable(self));
    IFKV_TRY(exchange(self, &p));
    return bytes[me] ? copy_own(self, p.recv + offset[me], send, bytes[me]) : IFKV_OK;
}

/* Start the messages of a shift that begin `done` bytes into it. */
static ifkv_status post_shift(mpi_comm *self, size_t done) {
    const ifkv_shift *shift = &self->base.shift;
    if (!done || done < shift->recv_bytes) {
        const int n = ifkv_mpi_chunk(shift->recv_bytes - done, self->max_message);
        void *message = in_stage(self, shift->from, (char *)shift->recv + done);
        IFKV_TRY(IFKV_MPI(
            MPI_Irecv(message, n, MPI_BYTE, shift->from, SHIFT_TAG, self->mpi, &self->receiving)));
    }
    if (!done || done < shift->send_bytes) {
        const int n = ifkv_mpi_chunk(shift->send_bytes - done, self->max_message);
        const void *message = NULL;
        IFKV_TRY(stage_out(self, shift->to, (const char *)shift->send + done, n, &message));
        IFKV_TRY(IFKV_MPI(
            MPI_Isend(message, n, MPI_BYTE, shift->to, SHIFT_TAG, self->mpi, &self->sending)));
    }
    return IFKV_OK;
}

static ifkv_status wait_shift(mpi_comm *self, size_t done) {
    const ifkv_shift *shift = &self->base.shift;
    if (self->receiving != MPI_REQUEST_NULL) {
        const int expected = ifkv_mpi_chunk(shift->recv_bytes - done, self->max_message);
        IFKV_TRY(wait_message(self, &self->receiving, shift->from, expected));
        IFKV_TRY(unstage(self, shift->from, (char *)shift->recv + done, expected));
    }
    if (self->sending != MPI_REQUEST_NULL)
        IFKV_TRY(wait_message(self, &self->sending, shift->to, -1));
    return IFKV_OK;
}

static ifkv_status mpi_shift_begin(ifkv_comm *comm) {
    mpi_comm *self = (mpi_comm *)comm;
    IFKV_TRY(mpi_usable(self));
    if (comm->shift.to == comm->rank) return IFKV_OK;
    return mpi_note(self, post_shift(self, 0));
}

/* What does not fit one message follows here, message by message: only the first moves behind the
 * caller's work, which is all of it up to 1 GiB. */
static ifkv_status mpi_shift_wait(ifkv_comm *comm) {
    mpi_comm *self = (mpi_comm *)comm;
    const ifkv_shift *shift = &comm->shift;
    IFKV_TRY(mpi_usable(self));
    if (shift->to == comm->rank) {
        IFKV_REQUIRE(shift->send_bytes == shift->recv_bytes, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                     "shift: rank %d sends itself %zu bytes and expects %zu", comm->rank,
                     shift->send_bytes, shift->recv_bytes);
        return copy_own(self, shift->recv, shift->send, shift->recv_bytes);
    }
    IFKV_TRY(mpi_note(self, wait_shift(self, 0)));
    for (size_t done = self->max_message; done < shift->recv_bytes || done < shift->send_bytes;
         done += self->max_message) {
        IFKV_TRY(mpi_note(self, post_shift(self, done)));
        IFKV_TRY(mpi_note(self, wait_shift(self, done)));
    }
    return IFKV_OK;
}

static ifkv_status mpi_all_reduce_i64(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op) {
    mpi_comm *self = (mpi_comm *)comm;
    MPI_Op mpi_op = MPI_SUM;
    IFKV_TRY(mpi_usable(self));
    switch (op) {
    case IFKV_REDUCE_MIN: mpi_op = MPI_MIN; break;
    case IFKV_REDUCE_MAX: mpi_op = MPI_MAX; break;
    case IFKV_REDUCE_SUM: break;
    }
    return mpi_note(
        self, IFKV_MPI(MPI_Allreduce(MPI_IN_PLACE, value, n, MPI_INT64_T, mpi_op, self->mpi)));
}

/* Ends the processes of all ranks, this one included: MPI has no gentler way to wake a rank that
 * waits.  The library never calls it; only a host that has decided to end the job does, through
 * ifkv_comm_abort.  The status becomes the exit code, where the launcher passes it on. */
static void mpi_abort(ifkv_comm *comm, ifkv_status status) {
    MPI_Abort(((mpi_comm *)comm)->mpi, (int)status);
}

static int mpi_node_size(const ifkv_comm *comm) {
    return ((const mpi_comm *)comm)->node_size;
}

static int mpi_node_rank(const ifkv_comm *comm) {
    return ((const mpi_comm *)comm)->node_rank;
}

static ifkv_status mpi_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p);

static const ifkv_comm_ops mpi_ops = {
    .name = "mpi",
    .close = mpi_close,
    .attach = mpi_attach,
    .barrier = mpi_barrier,
    .bcast = mpi_bcast,
    .all_gather = mpi_all_gather,
    .all_to_all = mpi_all_to_all,
    .all_reduce_i64 = mpi_all_reduce_i64,
    .shift_begin = mpi_shift_begin,
    .shift_wait = mpi_shift_wait,
    .abort = mpi_abort,
    .node_size = mpi_node_size,
    .node_rank = mpi_node_rank,
};

/* A variable's value as a count; -1 if it is not set or no number. */
static long long env_count(const char *name) {
    const char *text = getenv(name);
    char *end = NULL;
    if (!text || !*text) return -1;
    const long long value = strtoll(text, &end, 10);
    return *end ? -1 : value;
}

ifkv_status ifkv_mpi_check_launch(int world_size) {
    /* The first variable that is set speaks for the nearest launcher: mpirun inside a Slurm job
     * sets its own and inherits Slurm's. */
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    if (world_size != 1) return IFKV_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const long long n_task = env_count(names[i]);
        if (n_task < 0) continue;
        /* Slurm's variables are also inherited by the shells of salloc and sbatch, where one
         * process alone is right: only a task of an ordinary step counts, and the steps that are
         * shells have the highest numbers. */
        const long long step = env_count("SLURM_STEP_ID");
        if (i == 2 && (env_count("SLURM_PROCID") < 0 || step < 0 || step >= 0xfffffff0LL)) continue;
        IFKV_REQUIRE(n_task <= 1, IFKV_ERR_RESOURCE, IFKV_E_COMM_LAUNCH,
                     "communicator mpi: MPI counts 1 rank, the launcher started %lld (%s)", n_task,
                     names[i]);
        return IFKV_OK;
    }
    IFKV_REQUIRE(env_count("PMIX_RANK") <= 0, IFKV_ERR_RESOURCE, IFKV_E_COMM_LAUNCH,
                 "communicator mpi: MPI counts 1 rank, the launcher calls this one rank %lld "
                 "(PMIX_RANK)",
                 env_count("PMIX_RANK"));
    return IFKV_OK;
}

/* Has the host started MPI, and well enough? */
static ifkv_status check_host(void) {
    int is_initialized = 0, is_finalized = 0, level = MPI_THREAD_SINGLE, world_size = 0;
    IFKV_TRY(IFKV_MPI(MPI_Initialized(&is_initialized)));
    IFKV_REQUIRE(is_initialized, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "communicator mpi: opened before MPI_Init_thread");
    IFKV_TRY(IFKV_MPI(MPI_Finalized(&is_finalized)));
    IFKV_REQUIRE(!is_finalized, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "communicator mpi: opened after MPI_Finalize");
    IFKV_TRY(IFKV_MPI(MPI_Query_thread(&level)));
    IFKV_REQUIRE(level >= MPI_THREAD_FUNNELED, IFKV_ERR_RESOURCE, IFKV_E_COMM,
                 "communicator mpi: thread level: got %d, expected at least %d "
                 "(MPI_THREAD_FUNNELED)",
                 level, MPI_THREAD_FUNNELED);
    IFKV_TRY(IFKV_MPI(MPI_Comm_size(MPI_COMM_WORLD, &world_size)));
    return ifkv_mpi_check_launch(world_size);
}

static ifkv_status look_at_node(mpi_comm *self) {
    MPI_Comm node = MPI_COMM_NULL;
    IFKV_TRY(
        IFKV_MPI(MPI_Comm_split_type(self->mpi, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node)));
    IFKV_TRY(IFKV_MPI(MPI_Comm_size(node, &self->node_size)));
    IFKV_TRY(IFKV_MPI(MPI_Comm_rank(node, &self->node_rank)));
    return IFKV_MPI(MPI_Comm_free(&node));
}

/* Everything of this rank in host memory, or NULL. */
static mpi_comm *create(int size, size_t max_message, ifkv_backend *backend) {
    mpi_comm *self = calloc(1, sizeof *self);
    if (!self) return NULL;
    self->backend = backend;
    self->max_message = max_message;
    self->requests = malloc(2 * (size_t)size * sizeof *self->requests);
    if (backend) self->stage = malloc(2 * (size_t)size * max_message);
    if (self->requests && (self->stage || !backend)) return self;
    mpi_release(self);
    return NULL;
}

static ifkv_status describe(mpi_comm *self, MPI_Comm mpi) {
    self->base.ops = &mpi_ops;
    self->mpi = mpi;
    self->receiving = self->sending = MPI_REQUEST_NULL;
    IFKV_TRY(IFKV_MPI(MPI_Comm_rank(mpi, &self->base.rank)));
    IFKV_TRY(IFKV_MPI(MPI_Comm_size(mpi, &self->base.size)));
    return look_at_node(self);
}

/* Memory is asked for behind the duplication, and the answer shared: it can fail on one rank alone,
 * and the others must not be left waiting. */
static ifkv_status open_over(MPI_Comm parent, size_t max_message, ifkv_backend *backend,
                             ifkv_comm **comm_p) {
    ifkv_status status = IFKV_OK;
    MPI_Comm mpi = MPI_COMM_NULL;
    mpi_comm *self = NULL;
    int size = 0;
    IFKV_TRY(IFKV_MPI(MPI_Comm_dup(parent, &mpi)));
    IFKV_TRY_GOTO(status, IFKV_MPI(MPI_Comm_set_errhandler(mpi, MPI_ERRORS_RETURN)), err_free_mpi);
    IFKV_TRY_GOTO(status, IFKV_MPI(MPI_Comm_size(mpi, &size)), err_free_mpi);
    self = create(size, max_message, backend);
    int is_ready = self != NULL;
    IFKV_TRY_GOTO(status,
                  IFKV_MPI(MPI_Allreduce(MPI_IN_PLACE, &is_ready, 1, MPI_INT, MPI_MIN, mpi)),
                  err_release);
    if (!is_ready) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                           "communicator mpi: out of host memory on a rank");
        goto err_release;
    }
    IFKV_TRY_GOTO(status, describe(self, mpi), err_release);
    *comm_p = &self->base;
    return IFKV_OK;
err_release:
    if (self) mpi_release(self);
err_free_mpi:
    MPI_Comm_free(&mpi);
    return status;
}

ifkv_status ifkv_comm_mpi_open_chunked(size_t max_message, ifkv_comm **comm_p) {
    IFKV_TRY(check_host());
    return open_over(MPI_COMM_WORLD, max_message, NULL, comm_p);
}

ifkv_status ifkv_comm_mpi_open(ifkv_comm **comm_p) {
    return ifkv_comm_mpi_open_chunked(MAX_MESSAGE, comm_p);
}

static ifkv_status mpi_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p) {
    mpi_comm *self = (mpi_comm *)comm;
    IFKV_TRY(mpi_usable(self));
    const size_t max = self->max_message < MAX_STAGED ? self->max_message : MAX_STAGED;
    return mpi_note(self, open_over(self->mpi, max, backend, data_p));
}
