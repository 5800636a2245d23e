/* Inside of a session: one request's timeline, planned whole before its first token.
 *
 * Owns the host arrays and lays out the arena; the stages that fill them are in prefill.c.
 * Everything here but the token arrays is a pure function of lengths, options and the
 * communicator's size, so every rank plans the same. */
#ifndef IFKV_SRC_SESSION_H
#define IFKV_SRC_SESSION_H

#include "engine.h"
#include "exchange.h"
#include "refit.h"
#include "reorder.h"
#include "reuse.h"
#include "select.h"

struct ifkv_session {
    ifkv_engine *engine;  /* borrowed */
    ifkv_request request; /* arrays borrowed from the caller */
    ifkv_prefill_options options;
    const char *method, *exchange_name;
    bool is_exact;            /* the method is a pass of its own exchange over the whole context */
    bool rides[IFKV_N_STAGE]; /* the stage's rows run in an earlier one: score in encode, prompt in
                                 recompute */

    int64_t n_context, n_prompt, n_question, max_new,
        n_tail;             /* n_tail: prompt and generated rows with K/V */
    int64_t *given_offsets; /* [n_given + 1] chunk bounds in context tokens, after re-cutting */
    int64_t n_given;        /* chunks of the request; exact methods place one, or slices */
    int64_t *chunk_index;   /* [n_given + 1] the same in index, for the K/V's description */
    int32_t *token;         /* [n_context + n_prompt + max_new] the sequence */
    int32_t *question;      /* [n_question] */
    ifkv_placement placement;

    ifkv_kvcache cache;
    int64_t *cache_index; /* [cache.capacity] */
    int64_t n_kept;       /* context rows of this rank */

    /* Encode: the rows of this rank's chunks, each behind its prefix, or of its slices; behind them
     * scoring rows that ride. */
    ifkv_exchange chunk_exchange;
    ifkv_pass encode;
    int64_t n_encoded, n_chunk;     /* rows and chunks of this rank */
    int64_t n_encode_rider;         /* rows that ride */
    int64_t n_encode_group;         /* row groups: chunks, and the riders' */
    int64_t *encode_begin;          /* [n_encode_group + 1] */
    int32_t *encode_token;          /* [n_encoded + n_encode_rider] */
    int64_t *encode_position;       /* [n_encoded + n_encode_rider] */
    int64_t *span_begin, *span_end; /* [n_encoded] back-end memory */
    int64_t *kept_row;              /* [n_kept] encode row of each shard row; back-end memory */
    ifkv_view encode_lse;           /* [n_encoded, n_head] written, never read */
    int64_t *encode_stage;          /* [3 * n_encoded] host */

    ifkv_reuse reuse; /* where a chunk store or the pool is used or chunks change places: encode
                         goes through it */
    ifkv_reorder reorder;

    /* Select and recompute; an exact method's exchange serves encode instead. */
    ifkv_selector *selector; /* NULL if nothing can be selected */
    int64_t n_selected;
    int64_t *selected; /* [n_selected] */
    float *scores;     /* [n_context]; NULL unless the method scores */
    uint64_t selected_digest;
    uint64_t plan_digest; /* of all that the ranks must have in common before the first message */
    char score_layers[2048]; /* "" unless the question's attention is scored */
    ifkv_geometry geometry;  /* while scoring */
    const char *scoring;     /* "exact", "local"; "" unless the question's attention is scored */
    ifkv_exchange *exchange;
    ifkv_pass recompute; /* a prompt that rides is in it, behind S */
    ifkv_refit refit;    /* rows that are not recomputed */

    /* Prompt and decode. */
    ifkv_exchange *prompt_exchange;
    ifkv_pass prompt;
    ifkv_view logits_view; /* [1, n_vocab] float32; rank 0 */
    float *logits;         /* [n_vocab] host; rank 0: of the last row that ran */
    float *first_logits;   /* [n_vocab] host; rank 0 */

    /* Rows of the current recompute, prompt or decode pass. */
    int64_t *pass_index;
    int *pass_home, *pass_owner;
    int32_t *home_token;
    int64_t *home_position;

    int32_t next_token; /* chosen, not yet run */
    int32_t *answer;    /* [max_new] */
    int64_t n_answer;
    bool is_stopped;

    const char *auto_exact; /* of method auto: what infoflow was compared with; else "" */
    double auto_exact_ms, auto_infoflow_ms;
    char exchange_choice[256]; /* why exchange auto took the one it took; else "" */
    double ms[IFKV_N_STAGE], ttft_ms;
    int64_t bytes[IFKV_N_STAGE];
    uint8_t *recomputed; /* [n_kept] */
    int64_t *position;   /* [n_kept] */
    int32_t *kept_token; /* [n_kept] */
};

enum { IFKV_MAX_CHUNKS = 65536 };

/* Lengths and token ids of a request against a model and max_new further tokens.  Errors: DATA,
 * naming the field; USAGE for NULL. */
ifkv_status ifkv_request_check(const ifkv_config *config, const ifkv_request *request,
                               int64_t max_new);
/* Options by name; NULL is the default.  Errors: USAGE. */
ifkv_status ifkv_session_placement(const char *name, ifkv_placement_kind *kind_p);
ifkv_status ifkv_session_pool(const char *name, bool *is_on_p);
ifkv_status ifkv_scoring_parse(const ifkv_prefill_options *options, bool *is_local_p);
/* Exact prefill on all ranks goes by the name of its exchange. */
bool ifkv_method_is_exact(const char *method);

/* Validate request and options and make the host side of a session; the arena is not touched,
 * *arena_bytes_p is what it must hold.  Local.  Errors: USAGE for options, DATA for the request,
 * RESOURCE. */
ifkv_status ifkv_session_create(const ifkv_engine *engine, const ifkv_request *request,
                                const ifkv_prefill_options *options, ifkv_session **session_p,
                                size_t *arena_bytes_p);
/* Hand out the arena's memory. */
void ifkv_session_layout(ifkv_session *session, ifkv_arena *arena);
/* Fill index and position of the rows this rank keeps, from the placement. */
void ifkv_session_list_rows(ifkv_session *session);
/* Fill what derives from `token` once its ids are final: the rows that encode runs, the rows this
 * rank keeps. */
void ifkv_session_spread_tokens(ifkv_session *session);
void ifkv_session_destroy(ifkv_session *session);

/* The exchange of encode: a row sees its own chunk of this rank; kept rows go to the shard. */
extern const ifkv_exchange_ops ifkv_exchange_chunk_ops;

#endif
