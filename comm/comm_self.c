/* The communicator "self": one rank, every collective a copy or nothing.
 *
 * Owns no memory but itself; knows no threads and no library.  Behaves like the others at size one,
 * down to sizes that do not fit and to `abort`, so that code tested on it needs no second path.
 * Back-end memory is copied by the back end, in the order of its operations. */
#include "comm.h"

#include <stdlib.h>
#include <string.h>

typedef struct self_comm {
    ifkv_comm base;
    ifkv_backend *backend; /* borrowed: whose memory it moves; NULL: the host's */
    bool is_aborted;
} self_comm;

static ifkv_status self_usable(const ifkv_comm *comm) {
    const self_comm *self = (const self_comm *)(comm->control ? comm->control : comm);
    IFKV_REQUIRE(!self->is_aborted, IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                 "communicator self: used after it was aborted");
    return IFKV_OK;
}

static void self_close(ifkv_comm *comm) {
    free(comm);
}

static ifkv_status self_barrier(ifkv_comm *comm) {
    return self_usable(comm);
}

static ifkv_status self_bcast(ifkv_comm *comm, void *data, size_t bytes, int root) {
    (void)data;
    (void)bytes;
    (void)root;
    return self_usable(comm);
}

static ifkv_status copy(ifkv_comm *comm, void *to, size_t to_offset, const void *from,
                        size_t from_offset, size_t bytes) {
    ifkv_backend *backend = ((const self_comm *)comm)->backend;
    if (!bytes) return IFKV_OK; /* pointers may be NULL */
    char *into = (char *)to + to_offset;
    const char *source = (const char *)from + from_offset;
    if (into == source) return IFKV_OK;
    if (backend) return backend->ops->copy(backend, into, source, bytes);
    memmove(into, source, bytes);
    return IFKV_OK;
}

static ifkv_status self_all_gather(ifkv_comm *comm, const void *send, void *recv,
                                   const size_t *bytes, const size_t *offset) {
    IFKV_TRY(self_usable(comm));
    return copy(comm, recv, offset[0], send, 0, bytes[0]);
}

static ifkv_status self_all_to_all(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                                   const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                   const size_t *recv_offset) {
    IFKV_TRY(self_usable(comm));
    IFKV_REQUIRE(send_bytes[0] == recv_bytes[0], IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "all_to_all: rank 0 sends %zu bytes to rank 0, which expects %zu", send_bytes[0],
                 recv_bytes[0]);
    return copy(comm, recv, recv_offset[0], send, send_offset[0], send_bytes[0]);
}

static ifkv_status self_shift_begin(ifkv_comm *comm) {
    return self_usable(comm);
}

static ifkv_status self_shift_wait(ifkv_comm *comm) {
    const ifkv_shift *shift = &comm->shift;
    IFKV_TRY(self_usable(comm));
    IFKV_REQUIRE(shift->send_bytes == shift->recv_bytes, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "shift: rank 0 sends %zu bytes to rank 0, which expects %zu from rank 0",
                 shift->send_bytes, shift->recv_bytes);
    return copy(comm, shift->recv, 0, shift->send, 0, shift->recv_bytes);
}

static ifkv_status self_all_reduce_i64(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op) {
    (void)value;
    (void)n;
    (void)op;
    return self_usable(comm);
}

static void self_abort(ifkv_comm *comm, ifkv_status status) {
    (void)status;
    ((self_comm *)comm)->is_aborted = true;
}

static int self_node_size(const ifkv_comm *comm) {
    (void)comm;
    return 1;
}

static int self_node_rank(const ifkv_comm *comm) {
    (void)comm;
    return 0;
}

static ifkv_status self_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p) {
    (void)comm;
    IFKV_TRY(ifkv_comm_self_open(data_p));
    ((self_comm *)*data_p)->backend = backend;
    return IFKV_OK;
}

static const ifkv_comm_ops self_ops = {
    .name = "self",
    .close = self_close,
    .attach = self_attach,
    .barrier = self_barrier,
    .bcast = self_bcast,
    .all_gather = self_all_gather,
    .all_to_all = self_all_to_all,
    .all_reduce_i64 = self_all_reduce_i64,
    .shift_begin = self_shift_begin,
    .shift_wait = self_shift_wait,
    .abort = self_abort,
    .node_size = self_node_size,
    .node_rank = self_node_rank,
};

ifkv_status ifkv_comm_self_open(ifkv_comm **comm_p) {
    self_comm *self = calloc(1, sizeof *self);
    IFKV_REQUIRE(self, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "communicator self: out of host memory");
    self->base.ops = &self_ops;
    self->base.size = 1;
    *comm_p = &self->base;
    return IFKV_OK;
}
