/* Inside of an engine: the model on a back end, a communicator, the one arena its sessions carve
 * from, and the pool of chunks that they leave to each other. */
#ifndef IFKV_SRC_ENGINE_H
#define IFKV_SRC_ENGINE_H

#include "comm.h"
#include "model.h"
#include "pool.h"

struct ifkv_engine {
    ifkv_comm *comm; /* borrowed */
    ifkv_backend *backend;
    ifkv_comm *data; /* owned: the communicator for back-end memory, which may be comm itself */
    ifkv_model model;
    size_t weight_bytes; /* of the weights, this rank's share where ranks share them */
    double *frequency;   /* [d_head / 2] of rope.h */
    void *arena;         /* back-end memory */
    size_t arena_bytes;
    ifkv_pool pool;
    uint64_t most_pool;     /* bytes of a rank's pool, maximum over ranks */
    uint64_t *unit;         /* [size] owned: whose memory each rank uses, see backend.h */
    int n_sharing;          /* ranks that share this one's */
    uint64_t least_share;   /* bytes: a rank's share of such memory, minimum over ranks */
    bool has_session;       /* the arena is in use */
    size_t resident_before; /* bytes of this process before the weights */
    bool has_weights_digest;
    uint64_t weights_digest; /* of ifkv_engine_identify */
    bool has_rates;
    ifkv_rates rates; /* of ifkv_engine_measure */
};

/* Fill weights_digest, once: config and tensor directory do not tell two trainings of one model
 * apart.  Local. */
ifkv_status ifkv_engine_identify(ifkv_engine *engine);

/* The rates of rank 0 while the others wait, as they do beside method `full`; no link.  Not kept.
 * Collective. */
ifkv_status ifkv_engine_measure_alone(ifkv_engine *engine, ifkv_rates *rates);

/* Copy a caller's options struct of its own size into ours: what it does not know is zero.  Errors:
 * USAGE if it is NULL or larger than ours. */
ifkv_status ifkv_struct_read(void *to, size_t to_size, const void *from, const char *name);
/* The other way round, for structs the caller receives: writes only what fits, keeps `size`. */
ifkv_status ifkv_struct_write(void *to, const void *from, size_t from_size, const char *name);

/* RESOURCE, with the plan, unless weights, pool and an arena of this size fit into this rank's
 * share of the memory it computes in.  Local. */
ifkv_status ifkv_engine_check_memory(const ifkv_engine *engine, size_t arena_bytes);

/* Resident bytes of this process now, and at most so far; 0 where the system does not tell. */
size_t ifkv_resident_bytes(void);
size_t ifkv_resident_peak_bytes(void);

#endif
