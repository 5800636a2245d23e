/* ifkv: sequence-parallel prefill of long contexts, as a library.
 *
 * Owns the public API: status codes, communicators by name, the engine (model + back end +
 * communicator), the session (one request's timeline) and its result.  It is the only installed
 * header and names no MPI, CUDA, HDF5 or JSON type, so that a host can embed ifkv whatever it is
 * built with. The library never prints, exits, calls MPI_Init or MPI_Finalize, or keeps mutable
 * globals; errors and log lines are per thread. Every options struct starts with its size (set it
 * with sizeof): a field that an older caller does not know is read as zero, and zero is always the
 * documented default. Functions marked Collective are called by every rank of the communicator in
 * the same order; the others are Local. */
#ifndef IFKV_SRC_IFKV_H
#define IFKV_SRC_IFKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IFKV_VERSION "0.1.0"

/* The numbers are the exit codes of the command line tool, so that one number means one thing
 * everywhere. */
typedef enum ifkv_status {
    IFKV_OK = 0,
    IFKV_ERR_UNEXPECTED = 1,
    IFKV_ERR_USAGE = 2,        /* an argument, flag or option struct is wrong */
    IFKV_ERR_DATA = 65,        /* model or request malformed */
    IFKV_ERR_NO_INPUT = 66,    /* an input file is missing */
    IFKV_ERR_RESOURCE = 69,    /* device, library or memory not available */
    IFKV_ERR_INTERNAL = 70,    /* an invariant of ours does not hold, or ranks disagree */
    IFKV_ERR_OS = 71,          /* a system call failed unexpectedly */
    IFKV_ERR_CANT_CREATE = 73, /* output cannot be created */
    IFKV_ERR_IO = 74,          /* read or write failed */
    IFKV_ERR_BUSY = 75,        /* interrupted or locked, can be resumed */
    IFKV_ERR_PERMISSION = 77,
    IFKV_ERR_UNSUPPORTED = 78, /* well-formed, but not implemented */
    IFKV_ERR_NUMERIC = 80,     /* NaN or infinity, or a verification mismatch */
    IFKV_ERR_PEER = 81,        /* another rank failed or is gone */
    IFKV_ERR_PARTIAL = 82      /* finished, with failed requests */
} ifkv_status;

/* Name a status: "ok", "data", ...  Never NULL. */
const char *ifkv_status_name(ifkv_status status);

typedef struct ifkv_error {
    ifkv_status status;
    int code;         /* stable cause number, printed as E%04d; see error_codes.h */
    const char *text; /* "<file and field>: <what is wrong>: got <value>, expected <range>" */
    const char *file; /* source file and line that reported it */
    int line;
    int rank; /* lowest rank that failed, where all ranks know of the error; -1: only this one does
               */
} ifkv_error;

/* The calling thread's last error, meaningful right after a call that returned one.  Valid until
 * the thread's next ifkv call that fails. */
const ifkv_error *ifkv_last_error(void);

typedef enum ifkv_log_level {
    IFKV_LOG_WARN = 1,
    IFKV_LOG_INFO = 2,
    IFKV_LOG_DEBUG = 3
} ifkv_log_level;
typedef void (*ifkv_log_fn)(void *arg, ifkv_log_level level, const char *line);

/* Send the calling thread's log lines (no newline at the end) to fn; NULL drops them, which is the
 * default. Local. */
void ifkv_log_set(ifkv_log_fn fn, void *arg, ifkv_log_level max_level);

/* ---- communicators ---- */

typedef struct ifkv_comm ifkv_comm;

/* Open a communicator by name: "self" (one rank), "mpi" (duplicates MPI_COMM_WORLD; the host has
 * called MPI_Init_thread), "nccl" (mpi, and NCCL for what is computed on GPUs), "auto" (nccl where
 * it is built and every rank has a GPU of its own, else mpi).  Collective.  The caller owns
 * *comm_p. Errors: UNSUPPORTED if that half is not built, USAGE if the name is unknown. */
ifkv_status ifkv_comm_open(const char *name, ifkv_comm **comm_p);
void ifkv_comm_close(ifkv_comm *comm);

/* How long NCCL may wait for the other ranks, their computation included, before the call that
 * waits returns IFKV_ERR_PEER; 300 s unless set.  Before the engine is opened, the same on every
 * rank. Local. */
void ifkv_comm_set_timeout(ifkv_comm *comm, double seconds);

typedef ifkv_status (*ifkv_rank_fn)(ifkv_comm *comm, void *arg);

/* Run fn on `size` threads of this process, each with its own rank of a "thread" communicator, and
 * wait for all of them. A rank that returns an error wakes the others out of their collectives with
 * IFKV_ERR_PEER. Returns the status of the lowest rank whose failure is not IFKV_ERR_PEER, and
 * copies that rank's error into the calling thread. */
ifkv_status ifkv_comm_thread_run(int size, ifkv_rank_fn fn, void *arg);

int ifkv_comm_rank(const ifkv_comm *comm);
int ifkv_comm_size(const ifkv_comm *comm);
const char *ifkv_comm_name(const ifkv_comm *comm);

/* Make one rank's error everyone's: all ranks return the same status, that of the lowest failing
 * rank, and *rank_p (may be NULL) is that rank, or -1.  Every rank's last error is then that
 * rank's, with ifkv_error.rank set.  Collective. */
ifkv_status ifkv_comm_agree(ifkv_comm *comm, ifkv_status status, int *rank_p);
/* Copy `bytes` bytes from rank root's buffer to everyone's.  Collective. */
ifkv_status ifkv_comm_bcast(ifkv_comm *comm, void *data, size_t bytes, int root);
/* Gather `bytes` bytes of every rank, in rank order, on every rank: recv [size, bytes]. Collective.
 */
ifkv_status ifkv_comm_gather(ifkv_comm *comm, const void *send, size_t bytes, void *recv);

/* ---- engine ---- */

typedef struct ifkv_engine ifkv_engine;

typedef struct ifkv_engine_options {
    size_t size;
    const char *model_dir; /* Hugging Face directory */
    const char *backend;   /* NULL or "auto", "cpu", "cuda" */
    int n_thread; /* threads of this rank; 0: hardware threads divided by the ranks on this node */
    bool random_weights; /* weights drawn from seed instead of read; config.json is enough then */
    uint64_t seed;
    bool check_only; /* validate config.json, index and every header, and stop before any weight is
                        read */
    uint64_t pool_bytes; /* back-end memory in which this rank keeps chunks from session to session,
                            taken once; 0: none.  A chunk is encoded as for a store, is looked for
                            here first and kept here whether or not there is one; what does not fit
                            is not kept, those used longest ago go */
} ifkv_engine_options;

/* Validate a model directory and, unless check_only, load it.  Collective; comm is borrowed for the
 * engine's life. On error every rank returns the same status. */
ifkv_status ifkv_engine_open(ifkv_comm *comm, const ifkv_engine_options *options,
                             ifkv_engine **engine_p);
void ifkv_engine_close(ifkv_engine *engine);

typedef struct ifkv_model_info {
    size_t size;
    const char *family; /* "llama", "qwen3" */
    int n_layer, n_head, n_kv_head, d_head, d_model, d_ff;
    int64_t n_vocab, max_position, n_parameter;
    double rope_theta;
    bool is_tied;
    size_t weight_bytes;  /* resident, per rank; the ranks of a thread communicator share them */
    uint64_t fingerprint; /* of config and tensor directory; equal on every rank */
    const char *backend;  /* "cpu", "cuda" */
    int n_thread;
    const char *device;   /* what that computes on, for people */
    size_t element_bytes; /* of weights, activations, K and V */
    size_t pool_bytes;    /* of this rank's pool, as taken */
    int64_t pool_rows;    /* context rows that it holds */
} ifkv_model_info;

/* Describe the model.  Strings are borrowed from the engine.  Local. */
ifkv_status ifkv_engine_info(const ifkv_engine *engine, ifkv_model_info *info);

/* What the machine does in a second, of one rank while all of them are at it. */
typedef struct ifkv_rates {
    size_t size;
    double matmul, attention; /* FLOP/s at the model's shapes */
    double memory;            /* bytes/s of weights, in products of a single row */
    double passes;            /* bytes/s of element-wise passes, read and written */
    double link;              /* bytes/s received by a rank; 0: there is no other */
    double message_s;         /* seconds of a message of no length */
} ifkv_rates;

/* Measure rates, once an engine: products and attention at the model's shapes, element-wise passes,
 * messages of a few sizes up to 16 MiB; the same values on every rank, those of the slowest.  Takes
 * a fraction of a second for a small model.  Collective.  Errors: USAGE without weights, RESOURCE.
 */
ifkv_status ifkv_engine_measure(ifkv_engine *engine, ifkv_rates *rates);

/* ---- chunk store ---- */

/* What a store keeps as one: K before rotation (after the norm of heads, where the model has one)
 * and V of one chunk's own rows, encoded behind the prefix at positions from 0, so that their bits
 * do not depend on the request.  The prefix rows of a sequence are an entry with no token. */
typedef struct ifkv_store_entry {
    size_t size;
    char key[33];            /* 32 hex digits: 128-bit digest of description and ids */
    const char *description; /* one line: format version, model, weights, rotation, back end, type,
                                shape */
    const char *dtype;       /* of an element: "float32", "bfloat16" */
    size_t element_bytes;
    int n_layer, n_kv_head, d_head;
    int64_t n_row;         /* rows kept: n_token, or n_prefix where that is 0 */
    const int32_t *prefix; /* [n_prefix] ids in front while it was encoded */
    int64_t n_prefix;
    const int32_t *token; /* [n_token] */
    int64_t n_token;
} ifkv_store_entry;

/* K and V of one layer, host memory [n_row, n_kv_head, d_head].  False: stop. */
typedef bool (*ifkv_store_layer_fn)(void *arg, int layer, void *k, void *v);

/* A store as the host implements it; ifkv itself opens no file for it.  Each rank calls its own,
 * for its own chunks, while it encodes; ranks in one process may call at the same time.  A store
 * never fails a prefill: what it cannot give is encoded, what it cannot keep is not kept. */
typedef struct ifkv_store {
    size_t size;
    void *arg;
    /* Hand every layer of an entry to `take`, in ascending order.  True only if all of them were
     * given and are, to the bit, what was saved for equal description and ids; else whatever was
     * given is discarded. */
    bool (*load)(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn take,
                 void *take_arg);
    /* Keep an entry: `give` fills the store's own buffers, in ascending order of layers. */
    void (*save)(void *arg, const ifkv_store_entry *entry, ifkv_store_layer_fn give,
                 void *give_arg);
    /* Whether load is likely to give an entry, at little cost; for estimates.  NULL: it is not. */
    bool (*has)(void *arg, const ifkv_store_entry *entry);
} ifkv_store;

/* ---- requests ---- */

/* One request, token ids only; all arrays borrowed.  The sequence is prefix ++ chunks ++ prompt
 * (algorithm 1.1). */
typedef struct ifkv_request {
    size_t size;
    const int32_t
        *prefix; /* [n_prefix], stands in front of every chunk while it is encoded; may be empty */
    int64_t n_prefix;
    const int32_t *chunk_tokens; /* [chunk_offsets[n_chunk]] */
    const int64_t
        *chunk_offsets; /* [n_chunk + 1], first 0, strictly ascending: no chunk is empty */
    int64_t n_chunk;
    const int32_t *prompt; /* [n_prompt], at least one */
    int64_t n_prompt;
    const int32_t *question; /* [n_question] scoring rows; NULL: the prompt */
    int64_t n_question;
} ifkv_request;

typedef enum ifkv_stage {
    IFKV_STAGE_PLACE,
    IFKV_STAGE_ENCODE,
    IFKV_STAGE_SCORE,
    IFKV_STAGE_SELECT,
    IFKV_STAGE_RECOMPUTE,
    IFKV_STAGE_PROMPT,
    IFKV_STAGE_DECODE,
    IFKV_N_STAGE
} ifkv_stage;

/* "place", "encode", ... */
const char *ifkv_stage_name(ifkv_stage stage);

/* A stage that rides is part of the one it rides in. */
typedef void (*ifkv_progress_fn)(void *arg, ifkv_stage stage, int64_t done, int64_t total);
/* True: give up before the next stage.  Asked on every rank; one rank's answer is everybody's. */
typedef bool (*ifkv_stop_fn)(void *arg);

typedef struct ifkv_prefill_options {
    size_t size;
    const char *method;       /* NULL: "infoflow"; "none", "all", "random", "epic", "epic_budget",
                                 "cacheblend", "full"; "ring" and "allgather" are their own exchange;
                                 "auto": infoflow if it is estimated to be 3 % faster than exact
                                 prefill, else that ("full" on one rank, "ring") */
    const char *exchange;     /* NULL: "auto"; "query", "delta"; "kv", "local": not exact */
    const char *ratio;        /* exact decimal in [0, 1], NULL: "0.15" */
    const char *score;        /* NULL: "l2"; "l1", "mass", "l2h" */
    const char *score_rows;   /* NULL: "question"; "prompt" */
    const char *score_layers; /* NULL: "wide"; "published"; "22,23,24,25" */
    const char *placement; /* NULL: "auto"; "zigzag", "contiguous", "longest": changes time, never
                              results */
    int64_t chunk;         /* re-cut the context every so many tokens; 0: as given */
    int64_t max_new; /* generated tokens at most; 0: prefill only, which still chooses the first
                        token */
    uint64_t seed;   /* of method "random" */
    const int64_t *selected; /* given selection instead of the method's own, which then looks at
                                nothing: ascending indices of eligible rows, */
    int64_t n_selected;      /*   borrowed for the session; NULL: the method selects */
    bool keep_scores;        /* result.scores is filled */
    ifkv_progress_fn progress;
    void *progress_arg;
    const ifkv_store *store; /* this rank's chunk store, on every rank or on none; NULL: none.  Bits
                                do not depend on what is in it, nor on whether it is this or the
                                engine's pool.  Not used by exact methods */
    const char *geometry;    /* of scoring; NULL: "global"; "hl-tp", "hl-hp", "tl-tp" */
    const char *hp;          /* of geometry "hl-hp"; NULL: "shared"; "per_chunk" */
    int64_t epic_k;          /* of method "epic": rows at the head of each chunk; 0: 16 */
    ifkv_stop_fn stop;       /* on every rank or on none; a session that stops returns BUSY */
    void *stop_arg;
    const char *ride;    /* NULL: "both"; "score": the scoring rows run through encode where nothing
                            comes from a store and the geometry is "global"; "prompt": the prompt runs
                            through recompute where any row is selected; "none".  Saves a reading of
                            the weights; results agree up to rounding, on the CPU to the bit */
    const char *scoring; /* NULL: "exact"; "local": each rank's question sees that rank's chunks
                            alone, so that the selection depends on placement and rank count */
    bool local_sink;     /* of scoring "local": lend the prefix rows to ranks without chunk 0 */
    const char *reorder; /* NULL: "off"; "on": chunks, which must be independent documents, change
                            places by their scores first, and all that the session tells is
                            about the sequence in the new order; method "infoflow" with geometry
                            "global" only; "force": also chunks that `chunk` cut */
    bool refit; /* rows that are not recomputed are moved by an affine map per layer and K/V head,
                   fitted on those that are; needs exchange "delta" or one rank */
    const char *pool; /* NULL: "on": use the engine's pool, where it has one; "off": leave it alone,
                         as exact methods do.  The same on every rank */
} ifkv_prefill_options;

/* Validate what needs no model: names, ratio, ranges.  Local.  Errors: USAGE, naming the option. */
ifkv_status ifkv_prefill_options_check(const ifkv_prefill_options *options);
/* Bytes of arena this rank needs for a request, under "auto" with either method; validates request
 * and options on the way.  Local, the same checks on every rank.  Errors: USAGE, DATA; RESOURCE,
 * with *bytes_p set, if weights and arena exceed this rank's share of the memory that the back end
 * computes in. */
ifkv_status ifkv_engine_plan(const ifkv_engine *engine, const ifkv_request *request,
                             const ifkv_prefill_options *options, size_t *bytes_p);
/* Grow the engine's arena to at least `bytes` (this rank's).  No session may be open.  Local. */
ifkv_status ifkv_engine_reserve(ifkv_engine *engine, size_t bytes);

/* ---- session ---- */

typedef struct ifkv_session ifkv_session;

/* Prefill one request and choose the first answer token: place, encode, score, select, recompute,
 * prompt. Collective.  The session uses the engine's arena: one open session an engine.  request
 * and options are borrowed for the session's life. An error inside the layer loop can strike one
 * rank alone: the caller must then end the job, the peers already wait. */
ifkv_status ifkv_session_open(ifkv_engine *engine, const ifkv_request *request,
                              const ifkv_prefill_options *options, ifkv_session **session_p);
/* Generate up to options.max_new tokens greedily, the first one included; stops at an end-of-turn
 * id. Collective. */
ifkv_status ifkv_session_decode(ifkv_session *session);
void ifkv_session_close(ifkv_session *session);

typedef struct ifkv_result {
    size_t size;
    const char *method, *exchange, *backend, *comm, *finish; /* finish: "stop" or "length" */
    int n_rank;
    int64_t n_context, n_chunk, n_prompt, n_selected;
    uint64_t selected_digest; /* XXH3-64 of the selected indices as ascending little-endian int64 */
    const int64_t *selected;  /* [n_selected] ascending indices */
    const float *scores;      /* [n_context], NULL unless keep_scores and the method scores */
    const float
        *first_logits; /* [n_vocab] that chose the first answer token; on rank 0, else NULL */
    int64_t n_vocab;
    const int32_t *answer; /* [n_answer] generated ids, the end-of-turn id excluded */
    int64_t n_answer;
    double ms[IFKV_N_STAGE]; /* milliseconds, maximum over ranks */
    double ttft_ms; /* from ids in memory behind a barrier to the first token id on rank 0 */
    int64_t bytes[IFKV_N_STAGE];                        /* received by stage, maximum over ranks */
    int64_t bytes_total;                                /* received, sum over stages and ranks */
    size_t memory_weights, memory_planned, memory_peak; /* bytes, maximum over ranks */
    const char *score_layers; /* as used: "22,23,24,25"; "" if no attention was scored */
    const char *geometry;     /* as used while scoring: "global"; "" if no attention was scored */
    const char *hp;           /* "shared" or "per_chunk" under "hl-hp", else "" */
    bool has_store;           /* a chunk store was used */
    int64_t store_hits, store_misses; /* entries in store or pool, sum over ranks: chunks, and the
                                         prefix rows */
    int64_t store_tokens_hit;         /* context rows that were loaded, of n_context */
    bool rode[IFKV_N_STAGE]; /* stages that rode: score in encode, prompt in recompute, which count
                                their ms; their own is 0 */
    const char *scoring;     /* "exact" or "local"; "" if no attention was scored */
    const char *auto_exact;  /* of method "auto": the exact method that was considered; else "" */
    double auto_exact_ms, auto_infoflow_ms; /* estimates of first tokens, without decode */
    const char *exchange_choice; /* one line on why exchange "auto" took the one it took; else "" */
    const int64_t *chunk_order;  /* [n_chunk] the request's chunk that stands in each place; NULL
                                    without reorder */
    const char *device;          /* what the back end computes on, for people */
    bool has_pool;               /* the engine's pool was used */
    int64_t store_tokens_device; /* of store_tokens_hit: those that came from the pool */
} ifkv_result;

/* The result so far, the same on every rank except first_logits; arrays borrowed from the session.
 * Collective. */
ifkv_status ifkv_session_result(ifkv_session *session, ifkv_result *result);

/* This rank's context rows, in ascending index. */
typedef struct ifkv_kv_rows {
    size_t size;
    int n_layer, n_kv_head, d_head;
    int64_t n_row, n_chunk;
    const int64_t *index;         /* [n_row] place in the sequence */
    const int64_t *position;      /* [n_row] rotary position */
    const int32_t *token;         /* [n_row] */
    const uint8_t *recomputed;    /* [n_row] 1 if recompute rewrote the row in every layer but 0 */
    const int64_t *chunk_offsets; /* [n_chunk + 1] of the whole context, in index */
    const int64_t *chunk_order;   /* [n_chunk] see ifkv_result */
} ifkv_kv_rows;

ifkv_status ifkv_session_kv_rows(const ifkv_session *session, ifkv_kv_rows *rows);
/* Copy this rank's K (rotated at the row's position) and V of one layer to host memory, float32
 * [n_row, n_kv_head, d_head]. */
ifkv_status ifkv_session_kv_read(const ifkv_session *session, int layer, float *k, float *v);
/* Assemble one layer's K and V of all context rows, in index order, on rank 0: float32 [n_context,
 * n_kv_head, d_head]; k and v may be NULL on other ranks.  Collective. */
ifkv_status ifkv_session_kv_gather(ifkv_session *session, int layer, float *k, float *v);

/* ---- projection: P devices from one ---- */

/* How fast ranks reach each other. */
typedef struct ifkv_link {
    double alpha_us;     /* microseconds of a movement of back-end memory before its first byte */
    double gbytes_per_s; /* 1e9 bytes a second that a rank receives */
    double control_us;   /* microseconds in which all ranks agree on a host value */
} ifkv_link;

typedef struct ifkv_projection {
    double total_ms;         /* from placement to the first token, projected */
    double ms[IFKV_N_STAGE]; /* from the end of the stage before to the end of this one */
    double exposed_ms;       /* of total_ms: the last rank waited for movements and other ranks */
    double compute_ms;       /* measured, sum over ranks */
} ifkv_projection;

typedef struct ifkv_timeline ifkv_timeline;

/* A record of what `size` ranks of a "thread" communicator do.  The caller owns it. */
ifkv_status ifkv_timeline_create(int size, ifkv_timeline **timeline_p);
void ifkv_timeline_destroy(ifkv_timeline *timeline);
/* From here to the end this rank computes only in its turn, alone on the machine, and its times and
 * movements are recorded, those of an earlier recording forgotten.  Between the two a session is
 * opened, by every rank.  Local. */
void ifkv_timeline_begin(ifkv_timeline *timeline, ifkv_comm *comm);
void ifkv_timeline_end(ifkv_comm *comm);
/* When that many devices with such links would have done the recorded work.  After every rank has
 * ended.  Contention of movements with compute is not in it.  Local.  Errors: INTERNAL if the ranks
 * made different calls. */
ifkv_status ifkv_timeline_project(const ifkv_timeline *timeline, const ifkv_link *link,
                                  ifkv_projection *projection);

#ifdef __cplusplus
}
#endif
#endif
