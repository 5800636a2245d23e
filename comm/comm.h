/* Movement between ranks: the table every communicator fills, and checked wrappers.
 *
 * Owns order and sizes, knows nothing of what the bytes mean.  Every rank makes the same calls in
 * the same order with sizes that fit each other, zero bytes included.  All are Collective and
 * blocking unless marked; buffers are borrowed.  A communicator in which a rank called `abort`, or
 * whose library failed, returns IFKV_ERR_PEER from then on.
 *
 * Buffers are host memory, until a back end is attached: that gives a second communicator of the
 * same ranks for the back end's memory, whose movements come behind the back end's operations so
 * far and before its next ones.  Only the movements are its own; the rest goes to the first, its
 * control: host values that ranks agree on, and the count of bytes.  Where a back end computes in
 * host memory the two are one.
 *
 * One movement is asynchronous, for work behind which it can hide: a shift.  Between its begin and
 * its wait there is no other call. */
#ifndef IFKV_COMM_COMM_H
#define IFKV_COMM_COMM_H

#include "backend.h"
#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { IFKV_COMM_TIMEOUT_S = 300 };

typedef enum ifkv_reduce { IFKV_REDUCE_MIN, IFKV_REDUCE_MAX, IFKV_REDUCE_SUM } ifkv_reduce;

/* A shift: every rank sends one piece to a rank and receives one from a rank, the `to` of all ranks
 * being a permutation; itself is allowed.  send and recv must not overlap. */
typedef struct ifkv_shift {
    const void *send;
    void *recv;
    size_t send_bytes, recv_bytes;
    int to, from;
} ifkv_shift;

/* A communicator for back-end memory fills what comes before `barrier`; the rest is its control's.
 */
typedef struct ifkv_comm_ops {
    const char *name; /* "self", "thread", "mpi" */
    void (*close)(ifkv_comm *comm);
    ifkv_status (*bcast)(ifkv_comm *comm, void *data, size_t bytes, int root);
    /* Every rank receives every rank's piece: rank r's send_bytes = bytes[r] lands at recv +
     * offset[r].  bytes, offset [size], the same on every rank.  send may be recv + offset[rank]
     * (in place). */
    ifkv_status (*all_gather)(ifkv_comm *comm, const void *send, void *recv, const size_t *bytes,
                              const size_t *offset);
    /* Rank r sends send_bytes[q] bytes at send + send_offset[q] to rank q, and receives
     * recv_bytes[q] from q.
     */
    ifkv_status (*all_to_all)(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                              const size_t *send_offset, void *recv, const size_t *recv_bytes,
                              const size_t *recv_offset);
    /* Start comm->shift, and wait until it is done.  Local and Collective: whether the peers' sizes
     * fit shows in wait. */
    ifkv_status (*shift_begin)(ifkv_comm *comm);
    ifkv_status (*shift_wait)(ifkv_comm *comm);
    /* Memory that moves best, and its release; NULL: the back end's own.  Local. */
    ifkv_status (*alloc)(ifkv_comm *comm, size_t bytes, void **data_p);
    void (*free)(ifkv_comm *comm, void *data);

    ifkv_status (*barrier)(ifkv_comm *comm);
    ifkv_status (*all_reduce_i64)(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op);
    /* Open the communicator for a back end's memory, which is not the host's. */
    ifkv_status (*attach)(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p);
    /* Local: tell the peers that this rank will not come to the next collective. */
    void (*abort)(ifkv_comm *comm, ifkv_status status);
    /* Local: ranks on this node, this one included, and its place among them. */
    int (*node_size)(const ifkv_comm *comm);
    int (*node_rank)(const ifkv_comm *comm);
} ifkv_comm_ops;

struct ifkv_comm {
    const ifkv_comm_ops *ops;
    int rank, size;
    int64_t bytes_received; /* from other ranks, since the caller last set it to 0; payload of all
                               calls but barrier and agree */
    bool is_shifting;
    ifkv_shift shift;        /* the one under way */
    ifkv_comm *control;      /* borrowed: see above; NULL: buffers are host memory */
    bool is_auto;            /* attach decides is_nccl */
    bool is_nccl;            /* back-end memory moves by NCCL, host memory by ops */
    double timeout_s;        /* see ifkv_comm_set_timeout; 0: the default */
    ifkv_backend *backend;   /* borrowed: attached to this rank, whichever memory it computes in */
    ifkv_timeline *timeline; /* borrowed: records this control's calls and its data's; or NULL */
};

/* Open the communicator for the memory of a back end, which is borrowed until detach; comm itself
 * where that is host memory.  has_own_memory: no two ranks compute in one memory, without which
 * NCCL does not work; the same on every rank.  Collective. */
ifkv_status ifkv_comm_attach(ifkv_comm *comm, ifkv_backend *backend, bool has_own_memory,
                             ifkv_comm **data_p);
/* Close it, before the back end and comm.  NULL is accepted.  Collective, but returns without the
 * peers after a while. */
void ifkv_comm_detach(ifkv_comm *data);
/* Memory of an attached back end, released before detach.  Local. */
ifkv_status ifkv_comm_alloc(ifkv_comm *data, ifkv_backend *backend, size_t bytes, void **data_p);
void ifkv_comm_free(ifkv_comm *data, ifkv_backend *backend, void *memory);

ifkv_status ifkv_comm_barrier(ifkv_comm *comm);
ifkv_status ifkv_comm_all_gather(ifkv_comm *comm, const void *send, void *recv, const size_t *bytes,
                                 const size_t *offset);
ifkv_status ifkv_comm_all_to_all(ifkv_comm *comm, const void *send, const size_t *send_bytes,
                                 const size_t *send_offset, void *recv, const size_t *recv_bytes,
                                 const size_t *recv_offset);
ifkv_status ifkv_comm_all_reduce_i64(ifkv_comm *comm, int64_t *value, int n, ifkv_reduce op);
/* Begin to send send_bytes to rank `to` and to receive recv_bytes from rank `from`, zero included;
 * returns at once.  Until the wait, which every rank must come to, the caller may read send and
 * must leave recv alone.  One at a time.  Local.  Errors: USAGE. */
ifkv_status ifkv_comm_shift_begin(ifkv_comm *comm, const void *send, size_t send_bytes, int to,
                                  void *recv, size_t recv_bytes, int from);
ifkv_status ifkv_comm_shift_wait(ifkv_comm *comm);
/* Fail with IFKV_ERR_INTERNAL on every rank unless all ranks hold the same value; `what` names it
 * in the message. */
ifkv_status ifkv_comm_same(ifkv_comm *comm, uint64_t value, const char *what);
void ifkv_comm_abort(ifkv_comm *comm, ifkv_status status);
/* Tell a timeline which phase begins.  Local. */
void ifkv_comm_phase(ifkv_comm *comm, int phase);
/* bytes_received, of calls on back-end memory too.  Local. */
int64_t ifkv_comm_received(const ifkv_comm *comm);
int ifkv_comm_node_size(const ifkv_comm *comm);
int ifkv_comm_node_rank(const ifkv_comm *comm);

/* Implemented by comm_self.c and comm_mpi.c; called by ifkv_comm_open only. */
ifkv_status ifkv_comm_self_open(ifkv_comm **comm_p);
ifkv_status ifkv_comm_mpi_open(ifkv_comm **comm_p);
/* Implemented by comm_nccl.c, over any communicator; called by ifkv_comm_attach only. */
ifkv_status ifkv_comm_nccl_attach(ifkv_comm *comm, ifkv_backend *backend, ifkv_comm **data_p);

#ifdef __cplusplus
}
#endif
#endif
