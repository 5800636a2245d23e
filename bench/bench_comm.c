/* `ifkv bench comm`: the operations of a communicator that move bulk data, in back-end memory.
 *
 * Sizes, bandwidths and their meaning are those of nccl-tests: `bytes` is the larger of what a rank
 * sends and receives, its own piece included; algbw is that over the time; busbw corrects it for
 * what a rank keeps, so that it can be held against a link.  Pieces differ by a byte where the
 * ranks do not divide the size, and of all_to_all no two of a rank are meant to be alike.  Every
 * batch moves new data into poisoned memory, and every byte that arrives in the last one is
 * checked. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "placement.h"
#include "random.h"

typedef struct movement {
    bench_stand stand;
    bench_table *table; /* rank 0 */
    ifkv_comm *data;    /* moves back-end memory */
    int rank, size;
    int64_t bytes;
    uint64_t key;          /* of this operation and size */
    void *memory;          /* owned, back-end memory: both of the next */
    char *send, *recv;     /* views [bytes] */
    char *host, *expected; /* owned, host memory [bytes] */
    size_t *count;         /* owned [4, size]: send bytes, send offsets, recv bytes, offsets */
} movement;

typedef struct operation {
    const char *name;
    ifkv_status (*run)(void *movement, int64_t i_call);
    /* What rank `from` sends to rank `to`: its length at most `bytes`, and which stream. */
    void (*piece)(const movement *m, int from, int to, size_t *bytes_p, int *stream_p);
    bool has_own_share; /* 1 / size of the bytes never leaves a rank */
} operation;

/* ---- the operations ---- */

static size_t share(const movement *m, int i) {
    return (size_t)(ifkv_even_begin(m->bytes, m->size, i + 1) -
                    ifkv_even_begin(m->bytes, m->size, i));
}

static void bcast_piece(const movement *m, int from, int to, size_t *bytes_p, int *stream_p) {
    (void)to;
    *bytes_p = from == 0 ? (size_t)m->bytes : 0;
    *stream_p = m->size;
}
static ifkv_status bcast(void *arg, int64_t i_call) {
    movement *m = arg;
    (void)i_call;
    return ifkv_comm_bcast(m->data, m->rank == 0 ? m->send : m->recv, (size_t)m->bytes, 0);
}

static void all_gather_piece(const movement *m, int from, int to, size_t *bytes_p, int *stream_p) {
    (void)to;
    *bytes_p = share(m, from);
    *stream_p = m->size;
}
static ifkv_status all_gather(void *arg, int64_t i_call) {
    movement *m = arg;
    (void)i_call;
    return ifkv_comm_all_gather(m->data, m->send, m->recv, m->count + 2 * m->size,
                                m->count + 3 * m->size);
}

static void all_to_all_piece(const movement *m, int from, int to, size_t *bytes_p, int *stream_p) {
    *bytes_p = share(m, (from + to) % m->size);
    *stream_p = to;
}
static ifkv_status all_to_all(void *arg, int64_t i_call) {
    movement *m = arg;
    const size_t *count = m->count;
    const int size = m->size;
    (void)i_call;
    return ifkv_comm_all_to_all(m->data, m->send, count, count + size, m->recv, count + 2 * size,
                                count + 3 * size);
}

static void shift_piece(const movement *m, int from, int to, size_t *bytes_p, int *stream_p) {
    *bytes_p = to == (from + 1) % m->size ? (size_t)m->bytes : 0;
    *stream_p = to;
}
static ifkv_status shift(void *arg, int64_t i_call) {
    movement *m = arg;
    const size_t bytes = (size_t)m->bytes;
    (void)i_call;
    IFKV_TRY(ifkv_comm_shift_begin(m->data, m->send, bytes, (m->rank + 1) % m->size, m->recv, bytes,
                                   (m->rank + m->size - 1) % m->size));
    return ifkv_comm_shift_wait(m->data);
}

static const operation operations[] = {
    {"bcast", bcast, bcast_piece, false},
    {"all_gather", all_gather, all_gather_piece, true},
    {"all_to_all", all_to_all, all_to_all_piece, true},
    {"shift", shift, shift_piece, false},
};

/* ---- data ---- */

static void fill(uint64_t key, size_t bytes, char *to) {
    for (size_t at = 0; at < bytes; at += sizeof key) {
        const uint64_t word = ifkv_random_u64(key, at / sizeof key);
        memcpy(to + at, &word, bytes - at < sizeof key ? bytes - at : sizeof key);
    }
}

static uint64_t stream_key(const movement *m, int from, int stream) {
    return ifkv_random_u64(m->key, (uint64_t)from << 32 | (uint64_t)stream);
}

typedef struct prepared {
    movement *m;
    const operation *op;
} prepared;

/* What this rank sends: a piece after the other, once where all ranks get the same. */
static void fill_send(const movement *m, const operation *op) {
    size_t at = 0;
    for (int to = 0; to < m->size; to++) {
        size_t bytes;
        int stream;
        op->piece(m, m->rank, to, &bytes, &stream);
        if (stream == m->size && to > 0) break;
        fill(stream_key(m, m->rank, stream), bytes, m->host + at);
        m->count[to] = bytes;
        m->count[m->size + to] = at;
        at += bytes;
    }
}

static void fill_expected(const movement *m, const operation *op) {
    size_t at = 0;
    for (int from = 0; from < m->size; from++) {
        size_t bytes;
        int stream;
        op->piece(m, from, m->rank, &bytes, &stream);
        fill(stream_key(m, from, stream), bytes, m->expected + at);
        m->count[2 * m->size + from] = bytes;
        m->count[3 * m->size + from] = at;
        at += bytes;
    }
}

static ifkv_status prepare(void *arg) {
    const prepared *p = arg;
    movement *m = p->m;
    ifkv_backend *backend = m->stand.backend;
    fill_expected(m, p->op);
    for (int64_t i = 0; i < m->bytes; i++)
        m->host[i] = (char)~m->expected[i]; /* no byte is right */
    IFKV_TRY(backend->ops->upload(backend, m->recv, m->host, (size_t)m->bytes));
    fill_send(m, p->op);
    return backend->ops->upload(backend, m->send, m->host, (size_t)m->bytes);
}

static ifkv_status run_prepared(void *arg, int64_t i_call) {
    const prepared *p = arg;
    return p->op->run(p->m, i_call);
}

static ifkv_status count_wrong(movement *m, const operation *op, int64_t *n_wrong_p) {
    ifkv_backend *backend = m->stand.backend;
    const bool is_root = op->run == bcast && m->rank == 0;
    int64_t n = 0;
    const ifkv_status status =
        backend->ops->download(backend, m->host, is_root ? m->send : m->recv, (size_t)m->bytes);
    IFKV_TRY(ifkv_comm_agree(m->stand.comm, status, NULL));
    for (int64_t i = 0; i < m->bytes; i++) n += m->host[i] != m->expected[i];
    IFKV_TRY(ifkv_comm_all_reduce_i64(m->stand.comm, &n, 1, IFKV_REDUCE_SUM));
    *n_wrong_p = n;
    return IFKV_OK;
}

/* ---- rows of the table ---- */

static ifkv_status report(movement *m, const operation *op, int64_t n_wrong) {
    const bench_stand *t = &m->stand;
    const double algbw = 1e-6 * (double)m->bytes / t->median_ms;
    const double busbw = algbw * (op->has_own_share ? (double)(m->size - 1) / m->size : 1);
    const int64_t count = op->has_own_share ? (m->bytes + m->size - 1) / m->size : m->bytes;
    char cell[4][32], line[256];
    json_t *row = json_pack("{s:s, s:s, s:I, s:I, s:o, s:o, s:o, s:o, s:I, s:I}", "label", op->name,
                            "movement", ifkv_comm_name(m->data), "bytes", (json_int_t)m->bytes,
                            "count", (json_int_t)count, "time_us", bench_real(1e3 * t->median_ms),
                            "min_us", bench_real(1e3 * t->min_ms), "algbw_gbytes_per_s",
                            bench_real(algbw), "busbw_gbytes_per_s", bench_real(busbw), "checked",
                            (json_int_t)(m->bytes * m->size), "wrong", (json_int_t)n_wrong);
    snprintf(line, sizeof line, "  %12lld %12lld %-10s %s %s %s %s %8lld", (long long)m->bytes,
             (long long)count, op->name, bench_cell(cell[0], 11, "%.2f", 1e3 * t->median_ms),
             bench_cell(cell[1], 11, "%.2f", 1e3 * t->min_ms),
             bench_cell(cell[2], 9, "%.3f", algbw), bench_cell(cell[3], 9, "%.3f", busbw),
             (long long)n_wrong);
    return bench_table_row(m->table, row, line);
}

static ifkv_status measure(movement *m, const operation *op) {
    prepared p = {m, op};
    int64_t n_wrong = 0;
    IFKV_TRY(bench_time(&m->stand, prepare, run_prepared, &p));
    IFKV_TRY(count_wrong(m, op, &n_wrong));
    if (n_wrong) m->stand.median_ms = m->stand.min_ms = NAN;
    const ifkv_status status = m->table ? report(m, op, n_wrong) : IFKV_OK;
    return ifkv_comm_agree(m->stand.comm, status, NULL);
}

static ifkv_status make_buffers(movement *m) {
    const size_t bytes = (size_t)m->bytes;
    const size_t aligned = (bytes + 255) / 256 * 256;
    m->host = malloc(bytes);
    m->expected = malloc(bytes);
    m->count = calloc(4 * (size_t)m->size, sizeof *m->count);
    IFKV_REQUIRE(m->host && m->expected && m->count, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "bench: out of host memory");
    IFKV_TRY(ifkv_comm_alloc(m->data, m->stand.backend, 2 * aligned, &m->memory));
    m->send = m->memory;
    m->recv = m->send + aligned;
    return IFKV_OK;
}

static void free_buffers(movement *m) {
    free(m->host);
    free(m->expected);
    free(m->count);
    if (m->memory) ifkv_comm_free(m->data, m->stand.backend, m->memory);
    m->memory = m->host = m->expected = NULL;
    m->count = NULL;
}

static ifkv_status run_sizes(movement *m, const int64_t *bytes, int n) {
    const size_t n_operation = sizeof operations / sizeof *operations;
    ifkv_status status = IFKV_OK;
    for (int i = 0; i < n && status == IFKV_OK; i++) {
        m->bytes = bytes[i];
        status = ifkv_comm_agree(m->stand.comm, make_buffers(m), NULL);
        for (size_t op = 0; op < n_operation && status == IFKV_OK; op++) {
            m->key = ifkv_random_u64(m->stand.options->seed, (uint64_t)bytes[i] * n_operation + op);
            status = measure(m, &operations[op]);
        }
        free_buffers(m);
    }
    if (status == IFKV_OK && m->table) status = bench_table_finish(m->table);
    return ifkv_comm_agree(m->stand.comm, status, NULL);
}

/* ---- ranks and memory ---- */

/* Whether no two ranks compute in one memory, as NCCL needs it. */
static ifkv_status find_sharing(ifkv_comm *comm, const ifkv_backend *backend, bool *has_own_p) {
    const int size = ifkv_comm_size(comm);
    uint64_t *unit = malloc((size_t)size * sizeof *unit);
    ifkv_status status =
        unit ? IFKV_OK : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    int64_t n_sharing = 0;
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = ifkv_comm_gather(comm, &backend->unit, sizeof *unit, unit);
    for (int r = 0; r < size && status == IFKV_OK; r++) n_sharing += unit[r] == backend->unit;
    free(unit);
    IFKV_TRY(status);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &n_sharing, 1, IFKV_REDUCE_MAX));
    *has_own_p = n_sharing == 1;
    return IFKV_OK;
}

static ifkv_status open_table(movement *m) {
    char columns[256];
    snprintf(columns, sizeof columns, "# %12s %12s %-10s %11s %11s %9s %9s %8s", "bytes", "count",
             "operation", "time us", "least", "algbw", "busbw", "#wrong");
    return bench_table_open(m->stand.options, "comm", &m->stand,
                            "bytes of back-end memory that a rank sends or receives, GB/s", columns,
                            &m->table);
}

static ifkv_status run_attached(movement *m, const int64_t *bytes, int n) {
    bool has_own = false;
    IFKV_TRY(find_sharing(m->stand.comm, m->stand.backend, &has_own));
    ifkv_status status = ifkv_comm_attach(m->stand.comm, m->stand.backend, has_own, &m->data);
    status = ifkv_comm_agree(m->stand.comm, status, NULL);
    if (status == IFKV_OK && m->rank == 0) status = open_table(m);
    status = ifkv_comm_agree(m->stand.comm, status, NULL);
    if (status == IFKV_OK) status = run_sizes(m, bytes, n);
    ifkv_comm_detach(m->data);
    return status;
}

ifkv_status bench_comm(ifkv_comm *comm, const cli_options *options) {
    movement m = {.rank = ifkv_comm_rank(comm), .size = ifkv_comm_size(comm)};
    int64_t bytes[BENCH_MAX_LENGTH];
    int n = 0;
    ifkv_backend *backend = NULL;
    ifkv_status status = bench_lengths(
        options->lengths ? options->lengths : "1024,65536,1048576,16777216", 1, bytes, &n);
    if (status == IFKV_OK)
        status = ifkv_backend_open(options->backend ? options->backend : "auto",
                                   options->threads ? (int)options->threads : 1,
                                   ifkv_comm_node_rank(comm), &backend);
    if (status == IFKV_OK) status = bench_stand_init(&m.stand, comm, backend, options);
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = run_attached(&m, bytes, n);
    bench_table_close(m.table);
    ifkv_backend_close(backend);
    return status;
}
