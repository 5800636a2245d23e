/* The communicator "thread": the ranks of a group are threads of one process.
 *
 * Owns the meeting of the threads.  A collective is: publish my arguments, meet, look at everyone's
 * arguments, copy what I need out of the peers' buffers, part.  Every rank checks all arguments
 * against each other, so that calls or sizes that do not fit give the same error on every rank
 * instead of a hang or an overrun.  A meeting ends with an error once a rank has aborted or
 * returned: it can never come.  A parting waits without exception, because the peers read my
 * buffers until then, and all who met do come.  Back-end memory is moved in the same meetings: each
 * rank's back end copies out of the peers' memory, after it has waited for its own operations
 * before the meeting, and for the copies before the parting.  The only file that knows threads; no
 * statics. */
#include "comm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REDUCE_BLOCK = 64, ERROR_TEXT_BYTES = 1024 };

typedef enum call {
    CALL_BARRIER,
    CALL_BCAST,
    CALL_ALL_GATHER,
    CALL_ALL_TO_ALL,
    CALL_ALL_REDUCE,
    CALL_SHIFT
} call;

static const char *const call_names[] = {"barrier",    "bcast",      "all_gather",
                                         "all_to_all", "all_reduce", "shift"};

/* The arguments of one rank's call; everything borrowed until the rank has parted. */
typedef struct slot {
    call call;
    bool is_host; /* buffers are host memory */
    const void *send;
    size_t bytes;              /* bcast */
    int root;                  /* bcast */
    const size_t *send_bytes;  /* all_to_all; all_gather: the pieces of all ranks */
    const size_t *send_offset; /* all_to_all */
    const size_t *recv_bytes;  /* all_to_all */
    const int64_t *value;      /* all_reduce */
    int n;                     /* all_reduce */
    ifkv_reduce op;            /* all_reduce */
    ifkv_shift shift;          /* shift */
} slot;

typedef struct thread_group thread_group;

typedef struct thread_comm thread_comm;

/* What a caller holds: a rank's communicator for host memory, or for that of a back end. */
typedef struct thread_port {
    ifkv_comm base;
    thread_comm *self;     /* borrowed */
    ifkv_backend *backend; /* borrowed: whose memory it moves; NULL: the host's */
} thread_port;

struct thread_comm {
    thread_port port;
    thread_group *group; /* borrowed */
    slot slot;
    pthread_t thread;
    ifkv_rank_fn fn;
    void *arg; /* borrowed */
    ifkv_status status;
    int code, line;
    const char *file; /* borrowed, static */
    char text[ERROR_TEXT_BYTES];
};

struct thread_group {
    pthread_mutex_t mutex;
    pthread_cond_t moved;
    int size;
    int n_waiting;
    uint64_t generation; /* counts completed meetings and partings */
    int gone_rank;       /* first rank that will not come again, or -1 */
    ifkv_status gone_status;
    thread_comm *ranks; /* [size] owned */
};

static void release(thread_group *group) {
    group->n_waiting = 0;
    group->generation++;
    pthread_cond_broadcast(&group->moved);
}

static ifkv_status fail_gone(const thread_comm *self) {
    const thread_group *group = self->group;
    if (group->gone_status == IFKV_OK)
        return IFKV_FAIL(IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                         "%s: rank %d has returned and will not come", call_names[self->slot.call],
                         group->gone_rank);
    return IFKV_FAIL(IFKV_ERR_PEER, IFKV_E_COMM_PEER, "%s: rank %d failed (%s)",
                     call_names[self->slot.call], group->gone_rank,
                     ifkv_status_name(group->gone_status));
}

/* Wait until every rank has published its call.  Either all of them meet or none: a rank that is
 * gone is seen under the same lock under which the last one arrives. */
static ifkv_status meet(thread_comm *self, const slot *mine) {
    thread_group *group = self->group;
    ifkv_status status = IFKV_OK;
    pthread_mutex_lock(&group->mutex);
    self->slot = *mine;
    const uint64_t generation = group->generation;
    if (group->gone_rank >= 0) {
        status = fail_gone(self);
    } else if (++group->n_waiting == group->size) {
        release(group);
    } else {
        while (group->generation == generation && group->gone_rank < 0)
            pthread_cond_wait(&group->moved, &group->mutex);
        /* the count of those waiting stays wrong: no meeting will be completed any more */
        if (group->generation == generation) status = fail_gone(self);
    }
    pthread_mutex_unlock(&group->mutex);
    return status;
}

/* Wait until no rank needs another's arguments or buffers any more. */
static void part(thread_comm *self) {
    thread_group *group = self->group;
    pthread_mutex_lock(&group->mutex);
    const uint64_t generation = group->generation;
    if (++group->n_waiting == group->size) {
        release(group);
    } else {
        while (group->generation == generation) pthread_cond_wait(&group->moved, &group->mutex);
    }
    pthread_mutex_unlock(&group->mutex);
}

static void leave(thread_group *group, int rank, ifkv_status status) {
    pthread_mutex_lock(&group->mutex);
    if (group->gone_rank < 0) {
        group->gone_rank = rank;
        group->gone_status = status;
        pthread_cond_broadcast(&group->moved);
    }
    pthread_mutex_unlock(&group->mutex);
}

static ifkv_status check_bcast(const thread_group *group) {
    const slot *first = &group->ranks[0].slot;
    for (int r = 1; r < group->size; r++) {
        const slot *other = &group->ranks[r].slot;
        IFKV_REQUIRE(first->bytes == other->bytes && first->root == other->root, IFKV_ERR_INTERNAL,
                     IFKV_E_DIVERGED,
                     "bcast: rank 0 expects %zu bytes from root %d, rank %d %zu from root %d",
                     first->bytes, first->root, r, other->bytes, other->root);
    }
    return IFKV_OK;
}

static ifkv_status check_all_gather(const thread_group *group) {
    const slot *first = &group->ranks[0].slot;
    for (int r = 1; r < group->size; r++)
        for (int q = 0; q < group->size; q++) {
            const size_t other = group->ranks[r].slot.send_bytes[q];
            IFKV_REQUIRE(first->send_bytes[q] == other, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                         "all_gather: rank 0 expects %zu bytes of rank %d, rank %d expects %zu",
                         first->send_bytes[q], q, r, other);
        }
    return IFKV_OK;
}

static ifkv_status check_all_to_all(const thread_group *group) {
    for (int r = 0; r < group->size; r++)
        for (int q = 0; q < group->size; q++) {
            const size_t sent = group->ranks[r].slot.send_bytes[q];
            const size_t expected = group->ranks[q].slot.recv_bytes[r];
            IFKV_REQUIRE(sent == expected, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                         "all_to_all: rank %d sends %zu bytes to rank %d, which expects %zu", r,
                         sent, q, expected);
        }
    return IFKV_OK;
}

static ifkv_status check_all_reduce(const thread_group *group) {
    const slot *first = &group->ranks[0].slot;
    for (int r = 1; r < group->size; r++) {
        const slot *other = &group->ranks[r].slot;
        IFKV_REQUIRE(first->n == other->n && first->op == other->op, IFKV_ERR_INTERNAL,
                     IFKV_E_DIVERGED,
                     "all_reduce: rank 0 passes %d values with operation %d, rank %d %d with %d",
                     first->n, (int)first->op, r, other->n, (int)other->op);
    }
    return IFKV_OK;
}

static ifkv_status check_shift(const thread_group *group) {
    for (int r = 0; r < group->size; r++) {
        const ifkv_shift *sent = &group->ranks[r].slot.shift;
        const ifkv_shift *expected = &group->ranks[sent->to].slot.shift;
        IFKV_REQUIRE(expected->from == r && sent->send_bytes == expected->recv_bytes,
                     IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                     "shift: rank %d sends %zu bytes to rank %d, which expects %zu from rank %d", r,
                     sent->send_bytes, sent->to, expected->recv_bytes, expected->from);
    }
    return IFKV_OK;
}

/* Do the calls of all ranks fit each other?  The same answer and the same words on every rank. */
static ifkv_status check_calls(const thread_group *group) {
    const call first = group->ranks[0].slot.call;
    for (int r = 1; r < group->size; r++) {
        const call other = group->ranks[r].slot.call;
        IFKV_REQUIRE(first == other, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                     "rank 0 calls %s while rank %d calls %s", call_names[first], r,
                     call_names[other]);
        IFKV_REQUIRE(group->ranks[0].slot.is_host == group->ranks[r].slot.is_host,
                     IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                     "%s: rank 0 and rank %d move memory of different kinds", call_names[first], r);
    }
    switch (first) {
    case CALL_BARRIER: return IFKV_OK;
    case CALL_BCAST: return check_bcast(group);
    case CALL_ALL_GATHER: return check_all_gather(group);
    case CALL_ALL_TO_ALL: return check_all_to_all(group);
    case CALL_ALL_REDUCE: return check_all_reduce(group);
    case CALL_SHIFT: return check_shift(group);
    }
    return IFKV_OK;
}

static thread_comm *self_of(const ifkv_comm *comm) {
    return ((const thread_port *)comm)->self;
}

/* Wait for the operations on back-end memory; nothing on the host's. */
static ifkv_status sync_memory(const ifkv_comm *comm) {
    ifkv_backend *backend = ((const thread_port *)comm)->backend;
    return backend ? backend->ops->sync(backend) : IFKV_OK;
}

/* Meet and check.  On success the caller copies and then ends the call. */
static ifkv_status begin_call(const ifkv_comm *comm, slot mine) {
    thread_comm *self = self_of(comm);
    mine.is_host = !((const thread_port *)comm)->backend;
    IFKV_TRY(sync_memory(comm)); /* the peers will read it */
    IFKV_TRY(meet(self, &mine));
    const ifkv_status status = check_calls(self->group);
    if (status == IFKV_OK) return IFKV_OK;
    ifkv_error_share(0);
    part(self);
    return status;
}

/* Part, also after a copy that failed. */
static ifkv_status end_call(const ifkv_comm *comm, ifkv_status status) {
    if (status == IFKV_OK) status = sync_memory(comm);
    part(self_of(comm));
    return status;
}

static ifkv_status copy_in(const ifkv_comm *comm, void *recv, size_t offset, const void *from,
                           size_t from_offset, size_t bytes) {
    ifkv_backend *backend = ((const thread_port *)comm)->backend;
    if (!bytes) return IFKV_OK; /* pointers may be NULL */
    char *to = (char *)recv + offset;
    const char *source = (const char *)from + from_offset;
    if (to == source) return IFKV_OK;
    if (backend) return backend->ops->copy(backend, to, source, bytes);
    memmove(to, source, bytes);
    return IFKV_OK;
}

/* The group owns its ranks; ifkv_comm_thread_run releases them. */
static void thread_close(ifkv_comm *comm) {
    if (comm->control) free(comm);
}

static ifkv_status thread_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p) {
    thread_port *port = malloc(sizeof *port);
    IFKV_REQUIRE(port, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "communicator thread: out of host memory");
    *port = (thread_port){
        .base = {.ops = comm->ops, .rank = comm->rank, .size = comm->size},
        .self = self_of(comm),
        .backend = backend,
    };
    *data_p = &port->base;
    return IFKV_OK;
}

static ifkv_status thread_barrier(ifkv_comm *comm) {
    IFKV_TRY(begin_call(comm, (slot){.call = CALL_BARRIER}));
    return end_call(comm, IFKV_OK);
}

static ifkv_status thread_bcast(ifkv_comm *comm, void *data, size_t bytes, int root) {
    const thread_group *group = self_of(comm)->group;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(
        begin_call(comm, (slot){.call = CALL_BCAST, .send = data, .bytes = bytes, .root = root}));
    if (comm->rank != root) status = copy_in(comm, data, 0, group->ranks[root].slot.send, 0, bytes);
    return end_call(comm, status);
}

static ifkv_status thread_all_gather(ifkv_comm *comm, const void *send, void *recv,
                                     const size_t *bytes, const size_t *offset) {
    const thread_group *group = self_of(comm)->group;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(begin_call(comm, (slot){.call = CALL_ALL_GATHER, .send = send, .send_bytes = bytes}));
    for (int r = 0; r < comm->size && status == IFKV_OK; r++)
        status = copy_in(comm, recv, offset[r], group->ranks[r].slot.send, 0, bytes[r]);
    return end_call(comm, status);
}

static ifkv_status thread_all_to_all(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                                     const size_t *send_offset, void *recv,
                                     const size_t *recv_bytes, const size_t *recv_offset) {
    const thread_group *group = self_of(comm)->group;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(begin_call(comm, (slot){.call = CALL_ALL_TO_ALL,
                                     .send = send,
                                     .send_bytes = send_bytes,
                                     .send_offset = send_offset,
                                     .recv_bytes = recv_bytes}));
    for (int r = 0; r < comm->size && status == IFKV_OK; r++) {
        const slot *from = &group->ranks[r].slot;
        /* an offset of an empty piece is never read: it need not be a place */
        if (recv_bytes[r])
            status = copy_in(comm, recv, recv_offset[r], from->send, from->send_offset[comm->rank],
                             recv_bytes[r]);
    }
    return end_call(comm, status);
}

/* Nothing moves behind the work of a rank here: what is begun is copied in the wait, where all
 * meet. */
static ifkv_status thread_shift_begin(ifkv_comm *comm) {
    (void)comm;
    return IFKV_OK;
}

static ifkv_status thread_shift_wait(ifkv_comm *comm) {
    const thread_group *group = self_of(comm)->group;
    IFKV_TRY(begin_call(comm, (slot){.call = CALL_SHIFT, .shift = comm->shift}));
    const ifkv_shift *from = &group->ranks[comm->shift.from].slot.shift;
    return end_call(comm,
                    copy_in(comm, comm->shift.recv, 0, from->send, 0, comm->shift.recv_bytes));
}

static int64_t reduce_two(int64_t a, int64_t b, ifkv_reduce op) {
    switch (op) {
    case IFKV_REDUCE_MIN: return a < b ? a : b;
    case IFKV_REDUCE_MAX: return a > b ? a : b;
    case IFKV_REDUCE_SUM: return (int64_t)((uint64_t)a + (uint64_t)b); /* wraps, as MPI does */
    }
    return a;
}

static ifkv_status thread_all_reduce_i64(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op) {
    thread_comm *self = self_of(comm);
    const thread_group *group = self->group;
    IFKV_TRY(begin_call(comm, (slot){.call = CALL_ALL_REDUCE, .value = value, .n = n, .op = op}));
    if (n <= 0) part(self);
    /* In place, so a block may be overwritten only after all have read it; blocks bound the copy.
     */
    for (int i = 0; i < n; i += REDUCE_BLOCK) {
        const int m = n - i < REDUCE_BLOCK ? n - i : REDUCE_BLOCK;
        int64_t sum[REDUCE_BLOCK];
        memcpy(sum, group->ranks[0].slot.value + i, (size_t)m * sizeof *sum);
        for (int r = 1; r < group->size; r++)
            for (int j = 0; j < m; j++)
                sum[j] = reduce_two(sum[j], group->ranks[r].slot.value[i + j], op);
        part(self);
        memcpy(value + i, sum, (size_t)m * sizeof *sum);
    }
    return IFKV_OK;
}

static void thread_abort(ifkv_comm *comm, ifkv_status status) {
    /* IFKV_OK would read as a rank that returned */
    leave(self_of(comm)->group, comm->rank, status == IFKV_OK ? IFKV_ERR_UNEXPECTED : status);
}

static int thread_node_size(const ifkv_comm *comm) {
    return comm->size;
}

static int thread_node_rank(const ifkv_comm *comm) {
    return comm->rank;
}

static const ifkv_comm_ops thread_ops = {
    .name = "thread",
    .close = thread_close,
    .attach = thread_attach,
    .barrier = thread_barrier,
    .bcast = thread_bcast,
    .all_gather = thread_all_gather,
    .all_to_all = thread_all_to_all,
    .all_reduce_i64 = thread_all_reduce_i64,
    .shift_begin = thread_shift_begin,
    .shift_wait = thread_shift_wait,
    .abort = thread_abort,
    .node_size = thread_node_size,
    .node_rank = thread_node_rank,
};

/* Keep a rank's error past the end of its thread, whose last error dies with it. */
static void keep_error(thread_comm *self) {
    const ifkv_error *error = ifkv_last_error();
    if (error->status == self->status) {
        self->code = error->code;
        self->file = error->file;
        self->line = error->line;
        snprintf(self->text, sizeof self->text, "%s", error->text);
    } else { /* the rank function returned a status that it did not report */
        self->file = __FILE__;
        self->line = __LINE__;
        snprintf(self->text, sizeof self->text, "rank %d returned status %s", self->port.base.rank,
                 ifkv_status_name(self->status));
    }
}

static void *rank_main(void *arg) {
    thread_comm *self = arg;
    self->status = self->fn(&self->port.base, self->arg);
    if (self->status != IFKV_OK) keep_error(self);
    leave(self->group, self->port.base.rank, self->status);
    return NULL;
}

/* The rank whose error the run stands for: the lowest that failed by itself, else the lowest that
 * failed because of others, else -1. */
static int first_failure(const thread_group *group) {
    int first_peer = -1;
    for (int r = 0; r < group->size; r++) {
        const ifkv_status status = group->ranks[r].status;
        if (status != IFKV_OK && status != IFKV_ERR_PEER) return r;
        if (status == IFKV_ERR_PEER && first_peer < 0) first_peer = r;
    }
    return first_peer;
}

/* Start and join all ranks.  Returns RESOURCE if a thread could not be started; ranks that run
 * already are sent home then. */
static ifkv_status run_ranks(thread_group *group) {
    int n_started = 0, error = 0;
    while (n_started < group->size) {
        thread_comm *rank = &group->ranks[n_started];
        error = pthread_create(&rank->thread, NULL, rank_main, rank);
        if (error) break;
        n_started++;
    }
    if (error) leave(group, n_started, IFKV_ERR_RESOURCE);
    for (int r = 0; r < n_started; r++) pthread_join(group->ranks[r].thread, NULL);
    IFKV_REQUIRE(!error, IFKV_ERR_RESOURCE, IFKV_E_COMM,
                 "communicator thread: rank %d of %d cannot be started: error %d", n_started,
                 group->size, error);
    return IFKV_OK;
}

ifkv_status ifkv_comm_thread_run(int size, ifkv_rank_fn fn, void *arg) {
    IFKV_REQUIRE(size >= 1 && fn, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "communicator thread: %d ranks%s, expected at least 1", size,
                 fn ? "" : " and no function");
    ifkv_status status = IFKV_OK;
    thread_group group = {.size = size, .gone_rank = -1};
    group.ranks = calloc((size_t)size, sizeof *group.ranks);
    IFKV_REQUIRE(group.ranks, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "communicator thread: out of host memory for %d ranks", size);
    pthread_mutex_init(&group.mutex, NULL);
    pthread_cond_init(&group.moved, NULL);
    for (int r = 0; r < size; r++)
        group.ranks[r] =
            (thread_comm){.port = {.base = {.ops = &thread_ops, .rank = r, .size = size},
                                   .self = &group.ranks[r]},
                          .group = &group,
                          .fn = fn,
                          .arg = arg};
    IFKV_TRY_GOTO(status, run_ranks(&group), err_fini);
    const int first = first_failure(&group);
    if (first >= 0) {
        const thread_comm *rank = &group.ranks[first];
        status = ifkv_fail(rank->status, rank->code, rank->file, rank->line, "%s", rank->text);
    }
err_fini:
    pthread_cond_destroy(&group.moved);
    pthread_mutex_destroy(&group.mutex);
    free(group.ranks);
    return status;
}
