/* Communicators by name, checked wrappers over the table, and what is built from them alone:
 * gather, agree, same.
 *
 * Owns the count of received bytes, so that every communicator counts alike: payload of bcast,
 * all_gather, all_to_all, gather and shift that came from other ranks, counted when the call
 * succeeded.
 * Agreement and reductions are not payload.  Knows no MPI and no NCCL; whether those were built are
 * the only conditionals here.  Nothing below allocates. */
#include "comm.h"
#include "tensor.h"
#include "timeline.h"

#include <stdio.h>
#include <string.h>

enum { ERROR_TEXT_BYTES = 1024 }; /* what ifkv_fail keeps */

#if IFKV_HAVE_MPI
#define MPI_OPEN ifkv_comm_mpi_open
#else
static ifkv_status no_mpi_open(ifkv_comm **comm_p) {
    (void)comm_p;
    return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_COMM,
                     "communicator mpi: this ifkv was built without MPI");
}
#define MPI_OPEN no_mpi_open
#endif

#if IFKV_HAVE_NCCL
#define NCCL_ATTACH ifkv_comm_nccl_attach
#else
static ifkv_status no_nccl_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p) {
    (void)comm, (void)backend, (void)data_p;
    return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_COMM,
                     "communicator nccl: this ifkv was built without NCCL");
}
#define NCCL_ATTACH no_nccl_attach
#endif

/* Host memory moves by MPI, and back-end memory by NCCL. */
static ifkv_status nccl_open(ifkv_comm **comm_p) {
    IFKV_TRY(MPI_OPEN(comm_p));
    (*comm_p)->is_nccl = true;
    return IFKV_OK;
}

static ifkv_status auto_open(ifkv_comm **comm_p) {
    IFKV_TRY(MPI_OPEN(comm_p));
    (*comm_p)->is_auto = true;
    return IFKV_OK;
}

static ifkv_status thread_open(ifkv_comm **comm_p) {
    (void)comm_p;
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_COMM,
                     "communicator thread: exists only inside ifkv_comm_thread_run");
}

static const struct {
    const char *name;
    ifkv_status (*open)(ifkv_comm **comm_p);
} communicators[] = {
    {"self", ifkv_comm_self_open}, {"thread", thread_open}, {"mpi", MPI_OPEN},
    {"auto", auto_open},           {"nccl", nccl_open},
};

ifkv_status ifkv_comm_open(const char *name, ifkv_comm **comm_p) {
    IFKV_REQUIRE(name && comm_p, IFKV_ERR_USAGE, IFKV_E_COMM, "communicator: name or result NULL");
    for (size_t i = 0; i < sizeof communicators / sizeof *communicators; i++)
        if (!strcmp(name, communicators[i].name)) return communicators[i].open(comm_p);
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_COMM,
                     "communicator: got \"%s\", expected self, mpi, nccl or auto",
                     ifkv_quote(name, strlen(name), quoted));
}

void ifkv_comm_close(ifkv_comm *comm) {
    if (comm) comm->ops->close(comm);
}

int ifkv_comm_rank(const ifkv_comm *comm) {
    return comm->rank;
}

int ifkv_comm_size(const ifkv_comm *comm) {
    return comm->size;
}

const char *ifkv_comm_name(const ifkv_comm *comm) {
    return comm->is_nccl ? "nccl" : comm->ops->name;
}

/* Who carries host values. */
static ifkv_comm *control_of(const ifkv_comm *comm) {
    return comm->control ? comm->control : (ifkv_comm *)comm;
}

ifkv_status ifkv_comm_attach(ifkv_comm *comm, ifkv_backend *backend, bool has_own_memory,
                             ifkv_comm **data_p) {
    if (comm->is_auto) comm->is_nccl = IFKV_HAVE_NCCL && backend->stream && has_own_memory;
    IFKV_REQUIRE(backend->stream || !comm->is_nccl, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "communicator nccl: got back end %s, expected one that computes on GPUs",
                 backend->ops->name);
    *data_p = comm;
    comm->backend = backend;
    if (!backend->stream) return IFKV_OK;
    IFKV_TRY((comm->is_nccl ? NCCL_ATTACH : comm->ops->attach)(comm, backend, data_p));
    (*data_p)->control = comm;
    return IFKV_OK;
}

void ifkv_comm_detach(ifkv_comm *data) {
    if (!data) return;
    control_of(data)->backend = NULL;
    if (data->control) data->ops->close(data);
}

ifkv_status ifkv_comm_alloc(ifkv_comm *data, ifkv_backend *backend, size_t bytes, void **data_p) {
    if (data->ops->alloc) return data->ops->alloc(data, bytes, data_p);
    return backend->ops->alloc(backend, bytes, data_p);
}

void ifkv_comm_free(ifkv_comm *data, ifkv_backend *backend, void *memory) {
    if (data->ops->free)
        data->ops->free(data, memory);
    else
        backend->ops->free(backend, memory);
}

void ifkv_comm_set_timeout(ifkv_comm *comm, double seconds) {
    comm->timeout_s = seconds;
}

static void count(ifkv_comm *comm, size_t bytes) {
    control_of(comm)->bytes_received += (int64_t)bytes;
}

/* Give the turn away for a call, and file it with what it received. */
static void enter(ifkv_comm *comm, ifkv_timeline_event *event) {
    ifkv_comm *control = control_of(comm);
    if (!control->timeline) return;
    ifkv_timeline_enter(control, event);
    event->bytes = -control->bytes_received;
}

static void leave(ifkv_comm *comm, ifkv_timeline_event *event, ifkv_timeline_kind kind) {
    ifkv_comm *control = control_of(comm);
    if (!control->timeline) return;
    event->kind = kind;
    event->bytes += control->bytes_received;
    ifkv_timeline_leave(control, event);
}

void ifkv_comm_phase(ifkv_comm *comm, int phase) {
    if (comm->timeline) ifkv_timeline_phase(comm, phase);
}

int ifkv_comm_node_size(const ifkv_comm *comm) {
    return control_of(comm)->ops->node_size(control_of(comm));
}

int ifkv_comm_node_rank(const ifkv_comm *comm) {
    return control_of(comm)->ops->node_rank(control_of(comm));
}

void ifkv_comm_abort(ifkv_comm *comm, ifkv_status status) {
    control_of(comm)->ops->abort(control_of(comm), status);
}

int64_t ifkv_comm_received(const ifkv_comm *comm) {
    return control_of(comm)->bytes_received;
}

ifkv_status ifkv_comm_barrier(ifkv_comm *comm) {
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = control_of(comm)->ops->barrier(control_of(comm));
    leave(comm, &event, IFKV_TIMELINE_CONTROL);
    return status;
}

ifkv_status ifkv_comm_bcast(ifkv_comm *comm, void *data, size_t bytes, int root) {
    IFKV_REQUIRE(comm && (data || !bytes), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "bcast: communicator or buffer NULL");
    IFKV_REQUIRE(root >= 0 && root < comm->size, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "bcast: root: got %d, expected 0 to %d", root, comm->size - 1);
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = comm->ops->bcast(comm, data, bytes, root);
    if (status == IFKV_OK && comm->rank != root) count(comm, bytes);
    leave(comm, &event, IFKV_TIMELINE_CONTROL);
    return status;
}

/* One bcast a rank: slower than all_gather by a few latencies, but needs no arrays of counts, whose
 * allocation could fail on one rank while the others already wait. */
static ifkv_status bcast_pieces(ifkv_comm *comm, size_t bytes, char *to) {
    for (int r = 0; r < comm->size; r++) {
        IFKV_TRY(comm->ops->bcast(comm, bytes ? to + (size_t)r * bytes : to, bytes, r));
        if (r != comm->rank) count(comm, bytes);
    }
    return IFKV_OK;
}

ifkv_status ifkv_comm_gather(ifkv_comm *comm, const void *send, size_t bytes, void *recv) {
    IFKV_REQUIRE(comm && ((send && recv) || !bytes), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "gather: communicator or buffer NULL");
    const size_t size = (size_t)comm->size, rank = (size_t)comm->rank;
    uint64_t all;
    IFKV_REQUIRE(!ifkv_mul_overflow(size, bytes, &all) && all <= SIZE_MAX, IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "gather: %zu pieces of %zu bytes exceed the address space", size,
                 bytes);
    char *to = recv;
    comm = control_of(comm);
    if (bytes) memmove(to + rank * bytes, send, bytes);
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = bcast_pieces(comm, bytes, to);
    leave(comm, &event, IFKV_TIMELINE_CONTROL);
    return status;
}

ifkv_status ifkv_comm_all_gather(ifkv_comm *comm, const void *send, void *recv, const size_t *bytes,
                                 const size_t *offset) {
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = comm->ops->all_gather(comm, send, recv, bytes, offset);
    for (int r = 0; r < comm->size && status == IFKV_OK; r++)
        if (r != comm->rank) count(comm, bytes[r]);
    leave(comm, &event, IFKV_TIMELINE_COLLECTIVE);
    return status;
}

ifkv_status ifkv_comm_all_to_all(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                                 const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                 const size_t *recv_offset) {
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status =
        comm->ops->all_to_all(comm, send, send_bytes, send_offset, recv, recv_bytes, recv_offset);
    for (int r = 0; r < comm->size && status == IFKV_OK; r++)
        if (r != comm->rank) count(comm, recv_bytes[r]);
    leave(comm, &event, IFKV_TIMELINE_COLLECTIVE);
    return status;
}

ifkv_status ifkv_comm_all_reduce_i64(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op) {
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status =
        control_of(comm)->ops->all_reduce_i64(control_of(comm), value, n, op);
    leave(comm, &event, IFKV_TIMELINE_CONTROL);
    return status;
}

ifkv_status ifkv_comm_shift_begin(ifkv_comm *comm, const void *send, size_t send_bytes, int to,
                                  void *recv, size_t recv_bytes, int from) {
    IFKV_REQUIRE(comm && (send || !send_bytes) && (recv || !recv_bytes), IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "shift: communicator or buffer NULL");
    IFKV_REQUIRE(to >= 0 && to < comm->size && from >= 0 && from < comm->size &&
                     (to == comm->rank) == (from == comm->rank),
                 IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "shift: got rank %d sending to %d and receiving from %d of %d ranks", comm->rank,
                 to, from, comm->size);
    IFKV_REQUIRE(!comm->is_shifting, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "shift: begun before the last one was waited for");
    comm->shift = (ifkv_shift){.send = send,
                               .recv = recv,
                               .send_bytes = send_bytes,
                               .recv_bytes = recv_bytes,
                               .to = to,
                               .from = from};
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = comm->ops->shift_begin(comm);
    comm->is_shifting = status == IFKV_OK;
    if (control_of(comm)->timeline) {
        event.from = from;
        event.bytes +=
            from == comm->rank ? 0 : (int64_t)recv_bytes; /* counted when they are there */
    }
    leave(comm, &event, IFKV_TIMELINE_SHIFT_BEGIN);
    return status;
}

ifkv_status ifkv_comm_shift_wait(ifkv_comm *comm) {
    IFKV_REQUIRE(comm && comm->is_shifting, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "shift: waited for, but none was begun");
    comm->is_shifting = false;
    ifkv_timeline_event event;
    enter(comm, &event);
    const ifkv_status status = comm->ops->shift_wait(comm);
    if (status == IFKV_OK && comm->shift.from != comm->rank) count(comm, comm->shift.recv_bytes);
    leave(comm, &event, IFKV_TIMELINE_SHIFT_WAIT);
    return status;
}

ifkv_status ifkv_comm_same(ifkv_comm *comm, uint64_t value, const char *what) {
    /* The minimum of ~value is ~maximum: one reduction gives both ends. */
    int64_t ends[2] = {(int64_t)value, (int64_t)~value};
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, ends, 2, IFKV_REDUCE_MIN));
    const uint64_t low = (uint64_t)ends[0], high = ~(uint64_t)ends[1];
    if (low == high) return IFKV_OK;
    IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
              "ranks disagree on %s: rank %d has %016llx, others from %016llx to %016llx", what,
              comm->rank, (unsigned long long)value, (unsigned long long)low,
              (unsigned long long)high);
    ifkv_error_share(0);
    return IFKV_ERR_INTERNAL;
}

/* An error as it travels: fixed size, so that the receiver needs no second message. */
typedef struct error_note {
    int32_t status, code;
    int32_t rank; /* whose failure it is */
    char text[ERROR_TEXT_BYTES];
} error_note;

/* What to tell the peers of `status`.  Its words are this thread's last error, unless that is of
 * another failure; an error that all ranks know already stays the failure of the rank it came from.
 */
static error_note note_of(const ifkv_comm *comm, ifkv_status status) {
    error_note note;
    memset(&note, 0, sizeof note);
    note.status = (int32_t)status;
    note.rank = comm->rank;
    const ifkv_error *error = ifkv_last_error();
    if (status != IFKV_OK && error->status == status) {
        note.code = error->code;
        if (error->rank >= 0 && error->rank < comm->size) note.rank = error->rank;
        snprintf(note.text, sizeof note.text, "%s", error->text);
    } else {
        snprintf(note.text, sizeof note.text, "%s", ifkv_status_name(status));
    }
    return note;
}

static ifkv_status fail_as(const error_note *note) {
    return IFKV_FAIL((ifkv_status)note->status, note->code, "%.*s", (int)sizeof note->text - 1,
                     note->text);
}

ifkv_status ifkv_comm_agree(ifkv_comm *comm, ifkv_status status, int *rank_p) {
    IFKV_REQUIRE(comm, IFKV_ERR_USAGE, IFKV_E_VALUE, "agree: communicator NULL");
    comm = control_of(comm);
    const error_note mine = note_of(comm, status);
    error_note first = mine;
    int64_t lowest = status == IFKV_OK ? comm->size : comm->rank;
    ifkv_timeline_event event;
    enter(comm, &event);
    ifkv_status moved = comm->ops->all_reduce_i64(comm, &lowest, 1, IFKV_REDUCE_MIN);
    if (moved == IFKV_OK && lowest < comm->size)
        moved = comm->ops->bcast(comm, &first, sizeof first, (int)lowest);
    leave(comm, &event, IFKV_TIMELINE_CONTROL);
    if (moved != IFKV_OK) {
        /* Nobody can be told.  A rank that failed by itself keeps its own cause, which says more
         * than that the peers are gone. */
        if (rank_p) *rank_p = status == IFKV_OK ? -1 : comm->rank;
        return status == IFKV_OK ? moved : fail_as(&mine);
    }
    if (rank_p) *rank_p = lowest < comm->size ? first.rank : -1;
    if (lowest == comm->size) return IFKV_OK;
    /* the lowest rank keeps file and line of its own report, if it made one */
    if (lowest != comm->rank || ifkv_last_error()->status != status) fail_as(&first);
    ifkv_error_share(first.rank);
    return (ifkv_status)first.status;
}
