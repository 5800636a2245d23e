/* Exchanges over ranks that are threads: K/V dealt to ranks in any way, rows at home anywhere.
 *
 * Patterns are chosen so that the answer is exact whatever the number of ranks: keys are codes of
 * +-1 and a query is 100 times one of them, so that the softmax picks that key alone and the output
 * is its value, bit by bit.  Random reals are compared with a float64 attention written here. */
#include "tiny.h"

#include "agree.h"
#include "comm.h"
#include "error_codes.h"
#include "exchange.h"
#include "exchange_kv_route.h"

static const int sizes[] = {1, 2, 3, 5, 8};
enum { N_SIZE = sizeof sizes / sizeof *sizes, N_LAYER = 2, MAX_KEY = 160 };

static const char *const exchanges[] = {"query", "delta", "kv", "local"};
enum { N_EXCHANGE = sizeof exchanges / sizeof *exchanges };

static uint64_t seed;

static uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static bool is_whole(const char *exchange) {
    return ifkv_exchange_find(exchange)->n_slice > 0;
}

static int64_t below(int64_t limit) {
    return (int64_t)(mix(seed++) % (uint64_t)limit);
}

typedef enum value_pattern {
    CODES,   /* the answer is one value, exactly */
    REALS,   /* in [-1, 1) */
    ONE_HOT, /* queries 0; value of the i-th key is 1 in column i: the answer counts keys */
    SEVENS   /* real keys, all values 7 */
} value_pattern;

/* K/V of a context, who stores what, and the rows of one pass.  The same for all ranks. */
typedef struct deal_scene {
    const char *exchange;
    value_pattern pattern;
    uint64_t seed;
    int n_head, n_kv_head, d_head, size;
    int64_t n_prefix, n_key;
    int64_t index[MAX_KEY]; /* ascending */
    int owner[MAX_KEY];
    int64_t n_row;
    int64_t row_key[MAX_KEY]; /* key of each row of the pass */
    int64_t row_index[MAX_KEY];
    int home[MAX_KEY], row_owner[MAX_KEY];
    bool is_fresh[MAX_KEY]; /* the pass stores this key anew */
    bool is_row[MAX_KEY];   /* this key is a row of the pass */
    bool is_storing;
    float *out; /* [N_LAYER, n_row, n_head * d_head], every row written by its home */
    ifkv_exchange_bytes got[8][N_LAYER], plan[8]; /* received by each rank */
} deal_scene;

static uint64_t hash(const deal_scene *it, int what, int layer, int head, int64_t key, int col) {
    uint64_t h = mix(it->seed + (uint64_t)what);
    h = mix(h ^ (uint64_t)layer << 32 ^ (uint64_t)head);
    return mix(h ^ (uint64_t)key << 16 ^ (uint64_t)col);
}

static float real(uint64_t h) {
    return (float)((double)(int64_t)h / 0x1p63);
}

/* A fresh row differs in every element from what was there. */
static float key_at(const deal_scene *it, bool is_fresh, int layer, int head, int64_t key,
                    int col) {
    const uint64_t h = hash(it, is_fresh ? 1 : 0, layer, head, key, col);
    return it->pattern == CODES ? (h & 1 ? 1.0f : -1.0f) : real(h);
}

static float value_at(const deal_scene *it, bool is_fresh, int layer, int head, int64_t key,
                      int col) {
    const uint64_t h = hash(it, is_fresh ? 3 : 2, layer, head, key, col);
    if (it->pattern == CODES)
        return (float)(1 + (int64_t)(h % 1000)) * (h >> 60 & 1 ? 1.0f : -1.0f);
    if (it->pattern == ONE_HOT) return key == col ? 1.0f : 0.0f;
    return it->pattern == SEVENS ? 7.0f : real(h);
}

static bool is_visible(const deal_scene *it, int64_t row, int64_t key) {
    if (it->index[key] > it->row_index[row]) return false;
    if (ifkv_exchange_find(it->exchange)->is_exact) return true;
    if (it->is_row[key] && !strcmp(it->exchange, "kv")) return true;
    return it->owner[key] == it->home[row] || it->index[key] < it->n_prefix;
}

/* The key that a row's query head picks: any visible one. */
static int64_t target_of(const deal_scene *it, int layer, int64_t row, int head) {
    int64_t visible[MAX_KEY], n = 0;
    for (int64_t key = 0; key < it->n_key; key++)
        if (is_visible(it, row, key)) visible[n++] = key;
    return visible[hash(it, 5, layer, head, row, 0) % (uint64_t)n];
}

static void fill_query(const deal_scene *it, int layer, int64_t row, float *q) {
    const int group = it->n_head / it->n_kv_head;
    for (int h = 0; h < it->n_head; h++) {
        const int64_t target = it->pattern == CODES ? target_of(it, layer, row, h) : 0;
        for (int c = 0; c < it->d_head; c++) {
            float *to = q + h * it->d_head + c;
            if (it->pattern == CODES)
                *to = 100 * key_at(it, it->is_fresh[target], layer, h / group, target, c);
            else
                *to = it->pattern == ONE_HOT ? 0 : 4 * real(hash(it, 4, layer, h, row, c));
        }
    }
}

/* One rank's side of a scene. */
typedef struct side {
    const deal_scene *scene;
    ifkv_backend *backend;
    ifkv_kvcache cache;
    int64_t index[MAX_KEY], key[MAX_KEY]; /* of the shard's rows */
    int64_t n_home, row[MAX_KEY];         /* rows of the pass at home here */
    ifkv_placement placement;
    int64_t offset[MAX_KEY + 1]; /* every key is a chunk of its own */
    ifkv_view qkv, out;
    ifkv_exchange *exchange;
    void *memory;
} side;

static void layout(side *it, ifkv_arena *arena) {
    const deal_scene *scene = it->scene;
    const int64_t q = (int64_t)scene->n_head * scene->d_head,
                  kv = (int64_t)scene->n_kv_head * scene->d_head;
    ifkv_kvcache_layout(&it->cache, arena, IFKV_DTYPE_F32, N_LAYER, kv, it->cache.n_row + 1);
    it->qkv = ifkv_arena_view(arena, IFKV_DTYPE_F32, it->n_home, q + 2 * kv);
    it->out = ifkv_arena_view(arena, IFKV_DTYPE_F32, it->n_home, q);
    it->exchange->ops->layout_shared(it->exchange, arena);
    it->exchange->ops->layout(it->exchange, arena);
}

static void fill_shard(side *it) {
    const deal_scene *scene = it->scene;
    for (int layer = 0; layer < N_LAYER; layer++) {
        const ifkv_view k = ifkv_kvcache_k(&it->cache, layer),
                        v = ifkv_kvcache_v(&it->cache, layer);
        for (int64_t row = 0; row < it->cache.n_row; row++)
            for (int h = 0; h < scene->n_kv_head; h++)
                for (int c = 0; c < scene->d_head; c++) {
                    const int64_t at = row * k.stride + h * scene->d_head + c;
                    const bool is_fresh = scene->is_fresh[it->key[row]] && !scene->is_storing;
                    ((float *)k.data)[at] = key_at(scene, is_fresh, layer, h, it->key[row], c);
                    ((float *)v.data)[at] = value_at(scene, is_fresh, layer, h, it->key[row], c);
                }
    }
}

static void close_side(side *it) {
    ifkv_exchange_destroy(it->exchange);
    if (it->backend) it->backend->ops->free(it->backend, it->memory);
    ifkv_backend_close(it->backend);
}

/* Half open on error: close_side takes it. */
static ifkv_status open_side(const deal_scene *scene, ifkv_comm *comm, side *it) {
    const int rank = ifkv_comm_rank(comm);
    memset(it, 0, sizeof *it);
    it->scene = scene;
    it->placement = (ifkv_placement){
        .size = scene->size,
        .n_prefix = scene->n_prefix,
        .n_chunk = scene->n_key,
        .n_context = scene->n_key,
        .offset = it->offset,
        .rank = (int *)scene->owner,
        .n_tail_rank = scene->size,
    };
    int64_t n_of[8] = {0}, max_shard = 0;
    for (int64_t key = 0; key < scene->n_key; key++) {
        it->offset[key + 1] = key + 1;
        if (++n_of[scene->owner[key]] > max_shard) max_shard++;
        if (scene->owner[key] != rank) continue;
        it->key[it->cache.n_row] = key;
        it->index[it->cache.n_row++] = scene->index[key];
    }
    it->cache.index = it->index;
    for (int64_t i = 0; i < scene->n_row; i++)
        if (scene->home[i] == rank) it->row[it->n_home++] = i;
    IFKV_TRY(ifkv_backend_open("cpu", 1, 0, &it->backend));
    IFKV_TRY(
        it->backend->ops->prepare(it->backend, scene->n_head, scene->n_kv_head, scene->d_head));
    const ifkv_exchange_shape shape = {
        .n_head = scene->n_head,
        .n_kv_head = scene->n_kv_head,
        .d_head = scene->d_head,
        .n_layer = N_LAYER,
        .max_row = scene->n_row,
        .max_home = it->n_home,
        .max_shard = max_shard,
        .placement = &it->placement,
    };
    IFKV_TRY(ifkv_exchange_create(scene->exchange, it->backend, comm, &it->cache, &shape,
                                  &it->exchange));
    ifkv_arena arena = {0};
    layout(it, &arena);
    IFKV_TRY(it->backend->ops->alloc(it->backend, arena.peak + 1, &it->memory));
    memset(it->memory, 0xff, arena.peak + 1); /* NaN, and no row */
    arena = (ifkv_arena){.base = it->memory};
    layout(it, &arena);
    fill_shard(it);
    return IFKV_OK;
}

/* Every row of the shard holds its pattern: fresh in the layers that were stored, old elsewhere. */
static bool shard_holds(const side *it, int n_stored) {
    const deal_scene *scene = it->scene;
    for (int layer = 0; layer < N_LAYER; layer++) {
        const ifkv_view k = ifkv_kvcache_k(&it->cache, layer),
                        v = ifkv_kvcache_v(&it->cache, layer);
        for (int64_t row = 0; row < it->cache.n_row; row++)
            for (int h = 0; h < scene->n_kv_head; h++)
                for (int c = 0; c < scene->d_head; c++) {
                    const int64_t at = row * k.stride + h * scene->d_head + c, key = it->key[row];
                    const bool is_fresh = scene->is_fresh[key] && layer < n_stored;
                    if (((float *)k.data)[at] != key_at(scene, is_fresh, layer, h, key, c) ||
                        ((float *)v.data)[at] != value_at(scene, is_fresh, layer, h, key, c))
                        return false;
                }
    }
    return true;
}

static ifkv_status store_layer(side *it, int layer) {
    const deal_scene *scene = it->scene;
    const int64_t q = (int64_t)scene->n_head * scene->d_head,
                  kv = (int64_t)scene->n_kv_head * scene->d_head;
    for (int64_t i = 0; i < it->n_home; i++)
        for (int h = 0; h < scene->n_kv_head; h++)
            for (int c = 0; c < scene->d_head; c++) {
                float *to = (float *)it->qkv.data + i * it->qkv.stride + q + h * scene->d_head + c;
                const int64_t key = scene->row_key[it->row[i]];
                to[0] = key_at(scene, true, layer, h, key, c);
                to[kv] = value_at(scene, true, layer, h, key, c);
            }
    const ifkv_view k = ifkv_view_block(&it->qkv, 0, it->n_home, q, kv),
                    v = ifkv_view_block(&it->qkv, 0, it->n_home, q + kv, kv);
    IFKV_TRY(it->exchange->ops->store(it->exchange, layer, &k, &v));
    return agree_true(it->exchange->comm, shard_holds(it, layer + 1));
}

static ifkv_status attend_layer(side *it, int layer) {
    const deal_scene *scene = it->scene;
    const int64_t q = (int64_t)scene->n_head * scene->d_head;
    for (int64_t i = 0; i < it->n_home; i++)
        fill_query(scene, layer, it->row[i], (float *)it->qkv.data + i * it->qkv.stride);
    const ifkv_view query = ifkv_view_block(&it->qkv, 0, it->n_home, 0, q);
    IFKV_TRY(it->exchange->ops->attend(it->exchange, layer, &query, &it->out));
    for (int64_t i = 0; i < it->n_home; i++)
        memcpy(scene->out + (layer * scene->n_row + it->row[i]) * q,
               (float *)it->out.data + i * it->out.stride, (size_t)q * sizeof(float));
    return IFKV_OK;
}

static ifkv_status share_layers(side *it) {
    for (int layer = 0; layer < N_LAYER; layer++)
        IFKV_TRY(it->exchange->ops->share(it->exchange, layer));
    return IFKV_OK;
}

/* Bytes received since the last call. */
static int64_t received(ifkv_comm *comm) {
    const int64_t bytes = comm->bytes_received;
    comm->bytes_received = 0;
    return bytes;
}

static ifkv_status run_pass(side *it, deal_scene *scene) {
    ifkv_comm *comm = it->exchange->comm;
    ifkv_exchange_bytes *got = scene->got[comm->rank];
    const ifkv_exchange_rows rows = {.n_row = scene->n_row,
                                     .index = scene->row_index,
                                     .home = scene->home,
                                     .owner = scene->row_owner};
    received(comm);
    for (int layer = 0; layer < N_LAYER; layer++) {
        IFKV_TRY(it->exchange->ops->share(it->exchange, layer));
        got[layer].share = received(comm);
    }
    IFKV_TRY(it->exchange->ops->begin(it->exchange, &rows));
    scene->plan[comm->rank] = it->exchange->ops->bytes(it->exchange);
    for (int layer = 0; layer < N_LAYER; layer++) {
        if (scene->is_storing) IFKV_TRY(store_layer(it, layer));
        got[layer].store = received(comm);
        IFKV_TRY(attend_layer(it, layer));
        got[layer].attend = received(comm);
    }
    return IFKV_OK;
}

static ifkv_status run_rank(ifkv_comm *comm, void *arg) {
    side it;
    ifkv_status status = agree_ok(comm, open_side(arg, comm, &it));
    if (status == IFKV_OK) status = run_pass(&it, arg);
    close_side(&it);
    return status;
}

static void run(deal_scene *it) {
    const int64_t n = N_LAYER * it->n_row * it->n_head * it->d_head;
    it->out = malloc((size_t)n * sizeof *it->out + 1);
    assert_non_null(it->out);
    for (int64_t i = 0; i < n; i++) it->out[i] = NAN;
    assert_ok(ifkv_comm_thread_run(it->size, run_rank, it));
}

/* float64 attention of one row and head over what it sees; out [d_head]. */
static void attend_exactly(const deal_scene *it, int layer, int64_t row, int head, double *out) {
    float q[8 * 128];
    const int kv_head = head / (it->n_head / it->n_kv_head);
    double score[MAX_KEY], max = -INFINITY, sum = 0;
    fill_query(it, layer, row, q);
    for (int64_t key = 0; key < it->n_key; key++) {
        score[key] = 0;
        for (int c = 0; c < it->d_head; c++)
            score[key] += (double)q[head * it->d_head + c] *
                          (double)key_at(it, it->is_fresh[key], layer, kv_head, key, c);
        score[key] = is_visible(it, row, key) ? score[key] / sqrt(it->d_head) : -INFINITY;
        if (score[key] > max) max = score[key];
    }
    for (int c = 0; c < it->d_head; c++) out[c] = 0;
    if (max == -INFINITY) return;
    for (int64_t key = 0; key < it->n_key; key++) {
        const double weight = exp(score[key] - max);
        sum += weight;
        for (int c = 0; c < it->d_head; c++)
            out[c] += weight * (double)value_at(it, it->is_fresh[key], layer, kv_head, key, c);
    }
    for (int c = 0; c < it->d_head; c++) out[c] /= sum;
}

static void assert_equals_reference(const deal_scene *it) {
    double difference = 0, norm = 0, want[128];
    for (int layer = 0; layer < N_LAYER; layer++)
        for (int64_t row = 0; row < it->n_row; row++)
            for (int h = 0; h < it->n_head; h++) {
                attend_exactly(it, layer, row, h, want);
                for (int c = 0; c < it->d_head; c++) {
                    const int64_t at =
                        ((layer * it->n_row + row) * it->n_head + h) * it->d_head + c;
                    difference += (it->out[at] - want[c]) * (it->out[at] - want[c]);
                    norm += want[c] * want[c];
                }
            }
    /* relative L2; scores reach 16, so their rounding of 2^-24 * 16 is what the weights carry */
    const double error = difference == 0 ? 0 : sqrt(difference / norm);
    if (!(error <= 5e-6)) fail_msg("%s over %d ranks: error %.3g", it->exchange, it->size, error);
}

static void assert_equals_targets(const deal_scene *it) {
    const int group = it->n_head / it->n_kv_head;
    for (int layer = 0; layer < N_LAYER; layer++)
        for (int64_t row = 0; row < it->n_row; row++)
            for (int h = 0; h < it->n_head; h++)
                for (int c = 0; c < it->d_head; c++) {
                    const int64_t key = target_of(it, layer, row, h);
                    const float got =
                        it->out[((layer * it->n_row + row) * it->n_head + h) * it->d_head + c];
                    const float want = value_at(it, it->is_fresh[key], layer, h / group, key, c);
                    if (got != want)
                        fail_msg("%s over %d ranks, layer %d, row %lld, head %d, column %d: got "
                                 "%g, want %g of key %lld",
                                 it->exchange, it->size, layer, (long long)row, h, c, (double)got,
                                 (double)want, (long long)key);
                }
}

static void assert_counts_each_key_once(const deal_scene *it) {
    for (int layer = 0; layer < N_LAYER; layer++)
        for (int64_t row = 0; row < it->n_row; row++) {
            int n = 0;
            for (int64_t key = 0; key < it->n_key; key++) n += is_visible(it, row, key);
            for (int h = 0; h < it->n_head; h++)
                for (int64_t key = 0; key < it->d_head; key++) {
                    const double got =
                        it->out[((layer * it->n_row + row) * it->n_head + h) * it->d_head + key];
                    const bool is_seen = key < it->n_key && is_visible(it, row, key);
                    /* a quotient, a weight and a sum are rounded: a few 2^-24 */
                    if (fabs(got * n - is_seen) > (is_seen ? 1e-6 : 0))
                        fail_msg("%s over %d ranks, row %lld sees key %lld %g times", it->exchange,
                                 it->size, (long long)row, (long long)key, got * n);
                }
        }
}

/* A random scene: 1 to max_key keys, dealt to ranks at random, all to one, or all but a few to one;
 * about a third of them are rows of the pass, at home at random, or where they are stored. */
static deal_scene random_scene(const char *exchange, value_pattern pattern, int size,
                               int64_t max_key) {
    static const struct {
        int n_head, n_kv_head, d_head;
    } heads[] = {{2, 2, 64}, {6, 2, 64}, {5, 1, 128}};
    deal_scene it = {.exchange = exchange, .pattern = pattern, .size = size, .is_storing = true};
    const int64_t shape = below(3);
    it.n_head = heads[shape].n_head;
    it.n_kv_head = heads[shape].n_kv_head;
    it.d_head = heads[shape].d_head;
    it.seed = mix(seed++);
    it.n_key = 1 + below(max_key);
    const bool is_home_owner = ifkv_exchange_find(exchange)->is_home_owner;
    const int64_t way = below(4);
    const int one = (int)below(size), first = (int)below(size);
    it.n_prefix = below(it.n_key < 6 ? it.n_key : 6);
    for (int64_t key = 0; key < it.n_key; key++) {
        it.index[key] = key;
        it.owner[key] = way == 0 || (way == 1 && below(12)) ? one : (int)below(size);
        if (key < it.n_prefix || key == 0) it.owner[key] = first; /* a prefix lies in one chunk */
        /* the prefix is lent before the pass stores anything, as nobody recomputes it */
        if (below(3) || (is_home_owner && key < it.n_prefix)) continue;
        it.row_key[it.n_row] = it.row_index[it.n_row] = key;
        it.row_owner[it.n_row] = it.owner[key];
        it.home[it.n_row++] = is_home_owner ? it.owner[key] : (int)below(size);
        it.is_fresh[key] = it.is_row[key] = true;
    }
    return it;
}

static int by_rank(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

/* For an exchange over whole contexts: every key is a row of the pass, at home where it is stored;
 * anywhere, or in ascending ranks where slices are contiguous. */
static deal_scene whole_scene(const char *exchange, value_pattern pattern, int size,
                              int64_t max_key) {
    deal_scene it = random_scene(exchange, pattern, size, max_key);
    it.n_row = it.n_key;
    if (ifkv_exchange_find(exchange)->n_slice == 1)
        qsort(it.owner, (size_t)it.n_key, sizeof *it.owner, by_rank);
    for (int64_t key = 0; key < it.n_key; key++) {
        it.row_key[key] = it.row_index[key] = key;
        it.home[key] = it.row_owner[key] = it.owner[key];
        it.is_fresh[key] = true;
    }
    return it;
}

static void each(const char *exchange, value_pattern pattern, int64_t max_key,
                 void (*check)(const deal_scene *it)) {
    for (int s = 0; s < N_SIZE; s++)
        for (int round = 0; round < 6; round++) {
            deal_scene it = is_whole(exchange) ? whole_scene(exchange, pattern, sizes[s], max_key)
                                               : random_scene(exchange, pattern, sizes[s], max_key);
            run(&it);
            check(&it);
            free(it.out);
        }
}

/* A row finds every key that its exchange lets it see, wherever it is stored, fresh or not. */
static void rows_find_every_key_they_may_see(void **state) {
    (void)state;
    for (int e = 0; e < N_EXCHANGE; e++) each(exchanges[e], CODES, MAX_KEY, assert_equals_targets);
}

static void results_equal_float64_attention_over_what_rows_see(void **state) {
    (void)state;
    for (int e = 0; e < N_EXCHANGE; e++)
        each(exchanges[e], REALS, MAX_KEY, assert_equals_reference);
}

/* The lent prefix must not count twice on the rank that stores it, nor fresh rows at home. */
static void i24_each_key_counts_once(void **state) {
    (void)state;
    for (int e = 0; e < N_EXCHANGE; e++)
        each(exchanges[e], ONE_HOT, 64, assert_counts_each_key_once);
}

static void i24_equal_values_give_that_value(void **state) {
    (void)state;
    for (int e = 0; e < N_EXCHANGE; e++)
        each(exchanges[e], SEVENS, MAX_KEY, assert_equals_reference);
}

static const char *const whole[] = {"ring", "allgather"};

static void whole_contexts_find_every_key_on_every_rank(void **state) {
    (void)state;
    for (int e = 0; e < 2; e++) each(whole[e], CODES, MAX_KEY, assert_equals_targets);
}

static void whole_contexts_equal_float64_attention(void **state) {
    (void)state;
    for (int e = 0; e < 2; e++) each(whole[e], REALS, MAX_KEY, assert_equals_reference);
}

static void i24_whole_contexts_count_each_key_once(void **state) {
    (void)state;
    for (int e = 0; e < 2; e++) each(whole[e], ONE_HOT, 64, assert_counts_each_key_once);
}

/* Other homes, other order of rows in messages: the same bits for every row. */
static void i07_homes_change_no_bit(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++)
        for (int round = 0; round < 6; round++) {
            deal_scene one = random_scene("query", REALS, sizes[s], MAX_KEY), other = one;
            for (int64_t i = 0; i < other.n_row; i++) other.home[i] = (int)below(other.size);
            run(&one);
            run(&other);
            assert_memory_equal(one.out, other.out,
                                (size_t)(N_LAYER * one.n_row * one.n_head * one.d_head) *
                                    sizeof(float));
            free(one.out);
            free(other.out);
        }
}

/* However the keys are cut into shards, empty ones included. */
static void i13_shards_change_no_result(void **state) {
    (void)state;
    for (int round = 0; round < 6; round++) {
        deal_scene it = random_scene(exchanges[round % 2], REALS, 5, MAX_KEY);
        for (int way = 0; way < 4; way++) {
            deal_scene cut = it;
            for (int64_t key = 0; key < it.n_key; key++)
                cut.owner[key] = way == 0   ? 3                           /* one shard */
                                 : way == 1 ? (int)(key * 5 / it.n_key)   /* five slices */
                                 : way == 2 ? (int)(key % 2 * 4)          /* two combs */
                                            : (int)(key + 1 == it.n_key); /* all but one */
            for (int64_t i = 0; i < it.n_row; i++) cut.row_owner[i] = cut.owner[it.row_key[i]];
            run(&cut);
            assert_equals_reference(&cut);
            free(cut.out);
        }
    }
}

/* Rows below all keys, without a store: nothing to see on any rank is zero, not NaN. */
static void i13_row_that_sees_nothing_is_zero(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        deal_scene it = random_scene("query", REALS, sizes[s], 20);
        it.is_storing = false;
        memset(it.is_fresh, 0, sizeof it.is_fresh);
        for (int64_t key = 0; key < it.n_key; key++) it.index[key] += 100;
        it.n_row = 3;
        for (int64_t i = 0; i < it.n_row; i++) {
            it.row_index[i] = 40 * i; /* the last one is below 100, too */
            it.home[i] = (int)below(it.size);
            it.row_owner[i] = 0;
        }
        run(&it);
        for (int64_t i = 0; i < N_LAYER * it.n_row * it.n_head * it.d_head; i++)
            assert_true(it.out[i] == 0);
        free(it.out);
    }
}

/* Counted, and planned, in every layer. */
static void assert_received(const deal_scene *it, int rank, ifkv_exchange_bytes want) {
    assert_memory_equal(&it->plan[rank], &want, sizeof want);
    for (int layer = 0; layer < N_LAYER; layer++)
        assert_memory_equal(&it->got[rank][layer], &want, sizeof want);
}

/* Columns of q, of K and V together, in bytes. */
static void i25_query_receives_the_bytes_it_says(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        deal_scene it = random_scene("query", REALS, sizes[s], MAX_KEY);
        const int64_t q = 4 * (int64_t)it.n_head * it.d_head,
                      kv = 8 * (int64_t)it.n_kv_head * it.d_head;
        run(&it);
        for (int r = 0; r < it.size; r++) {
            int64_t n_home = 0, n_fresh = 0;
            for (int64_t i = 0; i < it.n_row; i++) {
                n_home += it.home[i] == r;
                n_fresh += it.row_owner[i] == r && it.home[i] != r;
            }
            const ifkv_exchange_bytes want = {
                .store = n_fresh * kv,
                .attend = (it.n_row - n_home) * q + (it.size - 1) * n_home * (q + 4 * it.n_head)};
            assert_received(&it, r, want);
        }
        free(it.out);
    }
}

/* What is shared while nothing is stored, and what the owners of rows receive of other rows; what
 * `kv` moves of a pass is the claim of tests below. */
static void i25_delta_kv_and_local_receive_the_bytes_they_say(void **state) {
    (void)state;
    for (int e = 1; e < N_EXCHANGE; e++)
        for (int s = 0; s < N_SIZE; s++) {
            deal_scene it = random_scene(exchanges[e], REALS, sizes[s], MAX_KEY);
            const int64_t kv = 8 * (int64_t)it.n_kv_head * it.d_head;
            const bool is_delta = !strcmp(it.exchange, "delta"), is_any = it.n_row > 0;
            run(&it);
            for (int r = 0; r < it.size; r++) {
                int64_t n_home = 0, n_kept = 0;
                for (int64_t i = 0; i < it.n_row; i++) n_home += it.home[i] == r;
                for (int64_t key = 0; key < it.n_key; key++) n_kept += it.owner[key] == r;
                const int64_t lent = it.owner[0] == r ? 0 : it.n_prefix;
                const ifkv_exchange_bytes want = {
                    .share = is_any ? (is_delta ? it.n_key - n_kept : lent) * kv : 0,
                    .store = is_delta ? (it.n_row - n_home) * kv : 0,
                    .attend = strcmp(it.exchange, "kv") ? 0 : it.plan[r].attend};
                assert_received(&it, r, want);
            }
            free(it.out);
        }
}

/* Rows that pulling and asking would move for rank h to see rank o, row by row. */
typedef struct pair_rows {
    int64_t pull, ask;
} pair_rows;

static pair_rows rows_of_pair(int64_t n_row, const int *owner, int h, int o) {
    pair_rows n = {0, 0};
    for (int64_t i = 0; i < n_row; i++) {
        bool is_seen = false, sees = false;
        for (int64_t j = 0; j < n_row; j++) {
            is_seen |= owner[i] == o && owner[j] == h && j > i;
            sees |= owner[i] == h && owner[j] == o && j < i;
        }
        n.pull += is_seen;
        n.ask += sees;
    }
    return n;
}

/* Bytes of a K/V row, a query and an answer. */
typedef struct row_bytes {
    int64_t pull, query, answer;
} row_bytes;

static row_bytes bytes_of_rows(const deal_scene *it) {
    const int64_t q = 4 * (int64_t)it->n_head * it->d_head;
    return (row_bytes){
        .pull = 8 * (int64_t)it->n_kv_head * it->d_head, .query = q, .answer = q + 4 * it->n_head};
}

enum { MAX_PAIR = 12 };

/* Is there a way for every pair, pull or ask, that makes the ranks receive just this? */
static bool some_ways_receive(const deal_scene *it, const int64_t *received) {
    const row_bytes bytes = bytes_of_rows(it);
    int h_of[MAX_PAIR], o_of[MAX_PAIR], n = 0;
    pair_rows rows[MAX_PAIR];
    for (int h = 0; h < it->size; h++)
        for (int o = 0; o < it->size; o++) {
            if (h == o) continue;
            h_of[n] = h;
            o_of[n] = o;
            rows[n++] = rows_of_pair(it->n_row, it->row_owner, h, o);
        }
    for (unsigned ways = 0; ways < 1u << n; ways++) {
        int64_t sum[8] = {0};
        for (int i = 0; i < n; i++) {
            const bool asks = ways >> i & 1;
            sum[h_of[i]] += asks ? rows[i].ask * bytes.answer : rows[i].pull * bytes.pull;
            sum[o_of[i]] += asks ? rows[i].ask * bytes.query : 0;
        }
        if (!memcmp(sum, received, (size_t)it->size * sizeof *sum)) return true;
    }
    return false;
}

/* Counted bytes: every pair pulls or asks, and no rank receives more than the fullest one would if
 * all pulled. */
static void i25_kv_pairs_pull_or_ask(void **state) {
    (void)state;
    int n_asking = 0;
    for (int size = 1; size <= 4; size++)
        for (int round = 0; round < 30; round++) {
            deal_scene it = random_scene("kv", REALS, size, MAX_KEY);
            const row_bytes bytes = bytes_of_rows(&it);
            run(&it);
            int64_t received[8] = {0}, most = 0;
            for (int h = 0; h < size; h++) {
                int64_t all_pull = 0;
                for (int o = 0; o < size; o++)
                    if (o != h)
                        all_pull += rows_of_pair(it.n_row, it.row_owner, h, o).pull * bytes.pull;
                most = all_pull > most ? all_pull : most;
                received[h] = it.got[h][0].attend;
                n_asking += received[h] != all_pull;
            }
            assert_true(some_ways_receive(&it, received));
            for (int r = 0; r < size; r++) assert_true(received[r] <= most);
            free(it.out);
        }
    assert_true(n_asking > 0); /* a quarter of the scenes leave some ranks few rows */
}

/* The plan alone, up to 8 ranks and any bytes: what pairs move is right, it adds up, no rank
 * exceeds the fullest one if all pulled, and the fullest rank has no pair left that would better
 * ask. */
static void kv_routes_leave_the_fullest_rank_no_better_way(void **state) {
    (void)state;
    for (int round = 0; round < 100; round++) {
        const int size = 1 + (int)below(8);
        int owner[MAX_KEY];
        int64_t index[MAX_KEY], most = 0, load[8] = {0};
        const int64_t n_row = below(MAX_KEY), skew = below(16);
        for (int64_t i = 0; i < n_row; i++) {
            owner[i] = (int)below(below(1 + skew) ? 1 + size / 3 : size);
            index[i] = 3 * i + 2;
        }
        ifkv_kv_route route = {0};
        assert_ok(ifkv_kv_route_init(&route, size));
        route.pull_bytes = 1 + below(1000);
        route.query_bytes = 1 + below(2000);
        route.answer_bytes = route.query_bytes + below(100);
        const ifkv_exchange_rows rows = {n_row, index, owner, owner};
        ifkv_kv_route_plan(&route, &rows);
        bool is_asking = false;
        for (int h = 0; h < size; h++) {
            int64_t all_pull = 0;
            for (int o = 0; o < size; o++) {
                const pair_rows want =
                    h == o ? (pair_rows){0, 0} : rows_of_pair(n_row, owner, h, o);
                const int64_t pull = route.pull[h * size + o], ask = route.ask[h * size + o];
                assert_true((pull == want.pull && ask == 0) || (pull == 0 && ask == want.ask));
                load[h] += pull * route.pull_bytes + ask * route.answer_bytes;
                load[o] += ask * route.query_bytes;
                all_pull += want.pull * route.pull_bytes;
                is_asking |= ask > 0;
            }
            most = all_pull > most ? all_pull : most;
        }
        assert_true(route.is_asking == is_asking);
        int fullest = 0;
        for (int r = 0; r < size; r++) {
            assert_true(route.load[r] == load[r] && load[r] <= most);
            if (load[r] > load[fullest]) fullest = r;
        }
        for (int o = 0; o < size; o++) {
            const int64_t pull = route.pull[fullest * size + o];
            if (pull == 0) continue;
            const int64_t ask = rows_of_pair(n_row, owner, fullest, o).ask;
            assert_true(load[o] + ask * route.query_bytes >= load[fullest] ||
                        ask * route.answer_bytes >= pull * route.pull_bytes);
        }
        ifkv_kv_route_fini(&route);
    }
}

/* Every key is a row of the pass, owned as given.  Five query heads share a K/V head: a question
 * moves 2.5 times the bytes of a K/V row each way. */
static deal_scene owned_scene(value_pattern pattern, int size, int64_t n_row, const int *owner) {
    deal_scene it = {.exchange = "kv",
                     .pattern = pattern,
                     .size = size,
                     .is_storing = true,
                     .n_head = 5,
                     .n_kv_head = 1,
                     .d_head = 128,
                     .seed = mix(seed++),
                     .n_key = n_row,
                     .n_row = n_row};
    for (int64_t i = 0; i < n_row; i++) {
        it.index[i] = it.row_index[i] = it.row_key[i] = i;
        it.owner[i] = it.home[i] = it.row_owner[i] = owner[i];
        it.is_fresh[i] = it.is_row[i] = true;
    }
    return it;
}

static const int kv_sizes[] = {2, 3, 4, 7};
enum { N_KV_SIZE = 4, KV = 8 * 128, QUERY = 4 * 5 * 128, ANSWER = QUERY + 4 * 5 };

static void assert_attend_bytes(const deal_scene *it, int rank, int64_t attend) {
    assert_received(it, rank, (ifkv_exchange_bytes){.attend = attend});
}

/* 63 rows on rank 0, in the end n_late on the last rank, none between: the few ask. */
static void kv_rank_of_few_late_rows_asks(void **state) {
    (void)state;
    static const value_pattern patterns[] = {CODES, REALS, ONE_HOT, SEVENS};
    for (int s = 0; s < N_KV_SIZE; s++)
        for (int64_t n_late = 1; n_late <= 3; n_late++)
            for (int p = 0; p < 4; p++) {
                int owner[MAX_KEY] = {0};
                const int last = kv_sizes[s] - 1;
                for (int64_t i = 0; i < n_late; i++) owner[63 + i] = last;
                deal_scene it = owned_scene(patterns[p], kv_sizes[s], 63 + n_late, owner);
                run(&it);
                if (patterns[p] == CODES)
                    assert_equals_targets(&it);
                else if (patterns[p] == ONE_HOT)
                    assert_counts_each_key_once(&it);
                else
                    assert_equals_reference(&it);
                for (int r = 0; r <= last; r++)
                    assert_attend_bytes(&it, r,
                                        r == 0      ? n_late * QUERY
                                        : r == last ? n_late * ANSWER
                                                    : 0);
                free(it.out);
            }
}

/* One row before 63 of another rank looks at none of them; they pull it. */
static void kv_rank_of_an_early_row_receives_nothing(void **state) {
    (void)state;
    for (int s = 0; s < N_KV_SIZE; s++) {
        int owner[MAX_KEY] = {0};
        const int last = kv_sizes[s] - 1;
        owner[0] = last;
        deal_scene it = owned_scene(CODES, kv_sizes[s], 64, owner);
        run(&it);
        assert_equals_targets(&it);
        for (int r = 0; r <= last; r++) assert_attend_bytes(&it, r, r == 0 ? KV : 0);
        free(it.out);
    }
}

/* As many rows on every rank: nobody asks, and a rank pulls the rows below its last one only. */
static void kv_pulls_rows_below_the_last_one_only(void **state) {
    (void)state;
    enum { N = 11 };
    for (int s = 0; s < N_KV_SIZE; s++)
        for (int is_comb = 0; is_comb < 2; is_comb++) {
            int owner[MAX_KEY];
            const int size = kv_sizes[s];
            for (int i = 0; i < N * size; i++) owner[i] = is_comb ? i % size : i / N;
            deal_scene it = owned_scene(CODES, size, N * size, owner);
            run(&it);
            assert_equals_targets(&it);
            for (int r = 0; r < size; r++) {
                const int64_t n_below = N * r, n_above = is_comb ? (N - 1) * (size - 1 - r) : 0;
                assert_attend_bytes(&it, r, (n_below + n_above) * KV);
            }
            free(it.out);
        }
}

/* Every key that is not a row of the pass stays out of the answers of another rank. */
static void kv_answers_cover_rows_of_the_pass_only(void **state) {
    (void)state;
    for (int s = 0; s < N_KV_SIZE; s++) {
        int owner[MAX_KEY] = {0};
        owner[40] = kv_sizes[s] - 1;
        deal_scene it = owned_scene(ONE_HOT, kv_sizes[s], 41, owner);
        it.n_row = 0;
        for (int64_t key = 0; key < it.n_key; key++) {
            it.is_fresh[key] = it.is_row[key] = key % 2 == 0;
            if (!it.is_row[key]) continue;
            it.row_key[it.n_row] = it.row_index[it.n_row] = key;
            it.home[it.n_row] = it.row_owner[it.n_row] = owner[key];
            it.n_row++;
        }
        run(&it);
        assert_counts_each_key_once(&it);
        assert_attend_bytes(&it, 0, QUERY);
        assert_attend_bytes(&it, kv_sizes[s] - 1, ANSWER);
        free(it.out);
    }
}

/* Every row of K and V that is not at home, once. */
static void i25_whole_contexts_receive_the_bytes_they_say(void **state) {
    (void)state;
    for (int e = 0; e < 2; e++)
        for (int s = 0; s < N_SIZE; s++) {
            deal_scene it = whole_scene(whole[e], REALS, sizes[s], MAX_KEY);
            run(&it);
            for (int r = 0; r < it.size; r++) {
                int64_t n_away = 0;
                for (int64_t i = 0; i < it.n_row; i++) n_away += it.home[i] != r;
                const ifkv_exchange_bytes want = {.attend = n_away * 8 * it.n_kv_head * it.d_head};
                assert_received(&it, r, want);
            }
            free(it.out);
        }
}

/* Passes follow each other on one exchange; what a longer one left behind is not seen. */
static ifkv_status run_shrinking(ifkv_comm *comm, void *arg) {
    deal_scene *it = arg, less = *it;
    side mine;
    ifkv_status status = agree_ok(comm, open_side(it, comm, &mine));
    if (status == IFKV_OK) status = share_layers(&mine);
    while (status == IFKV_OK && less.n_row > 0) {
        less.n_row /= 2; /* down to a pass of no rows, which is a pass all the same */
        for (int64_t i = less.n_row; i < it->n_row; i++) less.is_row[it->row_key[i]] = false;
        mine.scene = &less;
        mine.n_home = 0;
        for (int64_t i = 0; i < less.n_row; i++)
            if (less.home[i] == comm->rank) mine.row[mine.n_home++] = i;
        mine.out.n_row = mine.n_home;
        const ifkv_exchange_rows rows = {less.n_row, less.row_index, less.home, less.row_owner};
        status = mine.exchange->ops->begin(mine.exchange, &rows);
        for (int layer = 0; layer < N_LAYER && status == IFKV_OK; layer++)
            status = attend_layer(&mine, layer);
        /* the next pass writes over this one's output */
        if (status == IFKV_OK) status = ifkv_comm_barrier(comm);
    }
    close_side(&mine);
    return status;
}

static void passes_may_shrink_to_nothing(void **state) {
    (void)state;
    for (int e = 0; e < N_EXCHANGE; e++)
        for (int s = 0; s < N_SIZE; s++) {
            deal_scene it = random_scene(exchanges[e], CODES, sizes[s], MAX_KEY);
            it.is_storing = false; /* the shards hold the fresh rows from the start */
            const int64_t n = N_LAYER * it.n_row * it.n_head * it.d_head;
            it.out = calloc((size_t)n + 1, sizeof *it.out);
            assert_non_null(it.out);
            assert_ok(ifkv_comm_thread_run(it.size, run_shrinking, &it));
            /* the last pass with rows had one */
            if (it.n_row > 1) {
                for (int64_t i = 1; i < it.n_row; i++) it.is_row[it.row_key[i]] = false;
                it.n_row = 1;
                assert_equals_targets(&it);
            }
            free(it.out);
        }
}

/* With queries of zero the log-sum-exp is that of the number of keys. */
typedef struct count_run {
    int64_t n_key, n_row;
    double worst[8];
} count_run;

static ifkv_status merge_counts(ifkv_comm *comm, count_run *run, ifkv_backend *backend,
                                float *memory) {
    const int rank = comm->rank, size = comm->size, d_head = 64;
    const int64_t n = run->n_row, cols = d_head + 1;
    int64_t n_own = 0, begin[8] = {0}, end[8];
    size_t bytes[8], offset[8];
    float *parts = memory, *keys = parts + size * n * cols, *out = keys + run->n_key * d_head;
    for (int64_t i = 0; i < n; i++) end[i] = 0;
    for (int64_t key = 0; key < run->n_key; key++) {
        if (mix((uint64_t)key) % (uint64_t)size != (uint64_t)rank) continue;
        n_own++;
        for (int64_t i = 0; i < n; i++) /* row i sees keys 0 .. key(i) */
            if (key <= run->n_key * i / n) end[i] = n_own;
    }
    for (int64_t i = 0; i < n_own * d_head; i++) keys[i] = (float)(i % 7);
    float *q = out + n * cols;
    memset(q, 0, (size_t)(n * d_head) * sizeof *q);
    ifkv_view views[2 * 8];
    for (int r = 0; r < size; r++) {
        const ifkv_view part = ifkv_view_make(parts + r * n * cols, IFKV_DTYPE_F32, n, cols, cols);
        views[r] = ifkv_view_block(&part, 0, n, 0, d_head);
        views[size + r] = ifkv_view_block(&part, 0, n, d_head, 1);
        bytes[r] = (size_t)(n * cols) * sizeof(float);
        offset[r] = (size_t)r * bytes[r];
    }
    const ifkv_attention_args attention = {
        .n_head = 1,
        .n_kv_head = 1,
        .d_head = d_head,
        .scale = 0.125f,
        .q = ifkv_view_make(q, IFKV_DTYPE_F32, n, d_head, d_head),
        .k = ifkv_view_make(keys, IFKV_DTYPE_F32, n_own, d_head, d_head),
        .v = ifkv_view_make(keys, IFKV_DTYPE_F32, n_own, d_head, d_head),
        .begin = begin,
        .end = end,
        .out = views[rank],
        .lse = views[size + rank],
    };
    IFKV_TRY(backend->ops->attention(backend, &attention));
    IFKV_TRY(ifkv_comm_all_gather(comm, (char *)parts + offset[rank], parts, bytes, offset));
    const ifkv_view merged = ifkv_view_make(out, IFKV_DTYPE_F32, n, cols, cols);
    const ifkv_merge_args merge = {
        .n_head = 1,
        .d_head = d_head,
        .n_part = size,
        .out_part = views,
        .lse_part = views + size,
        .out = ifkv_view_block(&merged, 0, n, 0, d_head),
        .lse = ifkv_view_block(&merged, 0, n, d_head, 1),
    };
    IFKV_TRY(backend->ops->merge(backend, &merge));
    run->worst[rank] = 0;
    for (int64_t i = 0; i < n; i++) {
        const double want = log((double)(run->n_key * i / n + 1));
        const double error = fabs((double)out[i * cols + d_head] - want);
        if (!(error <= run->worst[rank])) run->worst[rank] = error;
    }
    return IFKV_OK;
}

static ifkv_status run_counts(ifkv_comm *comm, void *arg) {
    count_run *run = arg;
    ifkv_backend *backend = NULL;
    float *memory = calloc(1 << 16, sizeof *memory);
    if (!memory) abort();
    ifkv_status status = ifkv_backend_open("cpu", 1, 0, &backend);
    if (status == IFKV_OK) status = backend->ops->prepare(backend, 1, 1, 64);
    status = agree_ok(comm, status);
    if (status == IFKV_OK) status = merge_counts(comm, run, backend, memory);
    ifkv_backend_close(backend);
    free(memory);
    return status;
}

static void i24_merged_lse_of_zero_queries_is_the_log_of_the_count(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++)
        for (int64_t n_key = 1; n_key < 400; n_key += 57) {
            count_run run = {.n_key = n_key, .n_row = 7};
            assert_ok(ifkv_comm_thread_run(sizes[s], run_counts, &run));
            /* parts are rounded to 2^-24 of at most 6, so is the result */
            for (int r = 0; r < sizes[s]; r++) assert_true(run.worst[r] <= 1e-6);
        }
}

static ifkv_status create_unknown(ifkv_comm *comm, void *arg) {
    const ifkv_exchange_shape shape = {.n_head = 1, .n_kv_head = 1, .d_head = 64};
    ifkv_exchange *exchange = NULL;
    return ifkv_exchange_create(arg, NULL, comm, NULL, &shape, &exchange);
}

static void unknown_names_are_refused(void **state) {
    (void)state;
    static const char *const bad[] = {"", "auto", "Query", "query "};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_null(ifkv_exchange_find(bad[i]));
        char name[16];
        snprintf(name, sizeof name, "%s", bad[i]);
        assert_fails(ifkv_comm_thread_run(1, create_unknown, name), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "exchange");
    }
    for (int e = 0; e < N_EXCHANGE; e++)
        assert_string_equal(ifkv_exchange_find(exchanges[e])->name, exchanges[e]);
}

static ifkv_status begin_only(ifkv_comm *comm, void *arg) {
    deal_scene *it = arg, *asked = arg;
    side mine;
    ifkv_status status = agree_ok(comm, open_side(it, comm, &mine));
    const int moved[1] = {1};
    const ifkv_exchange_rows rows = {1, asked->row_index, moved, asked->row_owner};
    if (status == IFKV_OK) status = mine.exchange->ops->begin(mine.exchange, &rows);
    close_side(&mine);
    return status;
}

static void kv_and_local_refuse_rows_away_from_their_keys(void **state) {
    (void)state;
    for (int e = 2; e < N_EXCHANGE; e++) {
        deal_scene it = random_scene(exchanges[e], CODES, 2, 1);
        it.owner[0] = it.home[0] = it.row_owner[0] = 0;
        it.row_index[0] = it.row_key[0] = 0;
        it.n_row = 1;
        assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "is at home on rank 1 and stored on rank 0");
    }
}

static void kv_and_local_refuse_rows_of_the_prefix(void **state) {
    (void)state;
    for (int e = 2; e < N_EXCHANGE; e++) {
        deal_scene it = random_scene(exchanges[e], CODES, 2, 1);
        it.owner[0] = it.home[0] = it.row_owner[0] = 1;
        it.row_index[0] = it.row_key[0] = 0;
        it.n_row = it.n_prefix = 1;
        assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "row 0 is of the prefix");
    }
}

static void delta_refuses_rows_behind_the_context(void **state) {
    (void)state;
    deal_scene it = random_scene("delta", CODES, 2, 1);
    it.owner[0] = it.home[0] = it.row_owner[0] = 1;
    it.row_index[0] = 1;
    it.n_row = 1;
    assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "got row 1, expected context rows below 1");
}

static void query_refuses_more_rows_than_planned(void **state) {
    (void)state;
    deal_scene it = random_scene("query", CODES, 2, 1);
    it.owner[0] = it.home[0] = it.row_owner[0] = 0;
    it.row_index[0] = it.row_key[0] = 0;
    it.n_row = 1; /* planned for rank 0, asked for on rank 1 */
    assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "1 at home, expected");
}

/* A pass that leaves a row out, moves one, or comes in an order that the exchange cannot take. */
static void whole_contexts_refuse_other_passes(void **state) {
    (void)state;
    for (int e = 0; e < 2; e++) {
        deal_scene it = whole_scene(whole[e], CODES, 2, 1);
        it.owner[0] = it.home[0] = it.row_owner[0] = 0;
        assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "is at home on rank 1 and stored on rank 0");
        it.row_owner[0] = 1; /* and so at home, but in the shard of rank 0 */
        assert_fails(ifkv_comm_thread_run(2, begin_only, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "of the shard");
    }
}

static void allgather_refuses_descending_ranks(void **state) {
    (void)state;
    deal_scene it = whole_scene("allgather", CODES, 2, MAX_KEY);
    it.n_key = it.n_row = 2;
    for (int key = 0; key < 2; key++) {
        it.row_key[key] = it.row_index[key] = it.index[key] = key;
        it.owner[key] = it.home[key] = it.row_owner[key] = 1 - key;
    }
    it.out = calloc((size_t)(N_LAYER * 2 * it.n_head * it.d_head), sizeof *it.out);
    assert_non_null(it.out);
    assert_fails(ifkv_comm_thread_run(2, run_rank, &it), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "behind those of a higher rank");
    free(it.out);
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_find_every_key_they_may_see),
        cmocka_unit_test(results_equal_float64_attention_over_what_rows_see),
        cmocka_unit_test(i24_each_key_counts_once),
        cmocka_unit_test(i24_equal_values_give_that_value),
        cmocka_unit_test(whole_contexts_find_every_key_on_every_rank),
        cmocka_unit_test(whole_contexts_equal_float64_attention),
        cmocka_unit_test(i24_whole_contexts_count_each_key_once),
        cmocka_unit_test(i07_homes_change_no_bit),
        cmocka_unit_test(i13_shards_change_no_result),
        cmocka_unit_test(i13_row_that_sees_nothing_is_zero),
        cmocka_unit_test(i25_query_receives_the_bytes_it_says),
        cmocka_unit_test(i25_delta_kv_and_local_receive_the_bytes_they_say),
        cmocka_unit_test(i25_kv_pairs_pull_or_ask),
        cmocka_unit_test(kv_routes_leave_the_fullest_rank_no_better_way),
        cmocka_unit_test(kv_rank_of_few_late_rows_asks),
        cmocka_unit_test(kv_rank_of_an_early_row_receives_nothing),
        cmocka_unit_test(kv_pulls_rows_below_the_last_one_only),
        cmocka_unit_test(kv_answers_cover_rows_of_the_pass_only),
        cmocka_unit_test(i25_whole_contexts_receive_the_bytes_they_say),
        cmocka_unit_test(passes_may_shrink_to_nothing),
        cmocka_unit_test(i24_merged_lse_of_zero_queries_is_the_log_of_the_count),
        cmocka_unit_test(unknown_names_are_refused),
        cmocka_unit_test(kv_and_local_refuse_rows_away_from_their_keys),
        cmocka_unit_test(kv_and_local_refuse_rows_of_the_prefix),
        cmocka_unit_test(delta_refuses_rows_behind_the_context),
        cmocka_unit_test(query_refuses_more_rows_than_planned),
        cmocka_unit_test(whole_contexts_refuse_other_passes),
        cmocka_unit_test(allgather_refuses_descending_ranks),
    };
    return cmocka_run_group_tests_name("exchange", tests, NULL, NULL);
}
