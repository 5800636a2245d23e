/* Options of the command line tool: one table for parsing, environment, run file and help.  See
 * cli.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "json.h"
#include "status.h"

typedef enum option_kind { KIND_FLAG, KIND_TEXT, KIND_COUNT, KIND_SEED, KIND_SIZE } option_kind;

typedef struct option {
    const char *name;
    option_kind kind;
    unsigned set;
    size_t offset;       /* of the value in cli_options */
    size_t has_offset;   /* of a bool that tells whether it was given; 0: none */
    int64_t max;         /* of a count */
    const char *value;   /* how help names it */
    const char *initial; /* default as help shows it, NULL: none */
    const char *help;
} option;

#define AT(field) offsetof(cli_options, field)

static const option table[] = {
    {"model", KIND_TEXT, CLI_MODEL, AT(model), 0, 0, "DIR", NULL,
     "Hugging Face model directory (llama, qwen3)"},
    {"random-weights", KIND_SEED, CLI_MODEL, AT(random_weights), AT(has_random_weights), 0, "SEED",
     NULL, "draw the weights of config.json instead of reading them"},
    {"requests", KIND_TEXT, CLI_REQUESTS, AT(requests), 0, 0, "FILE", NULL,
     "requests, JSONL or HDF5; - reads standard input"},
    {"method", KIND_TEXT, CLI_METHOD, AT(method), 0, 0, "NAME", "infoflow",
     "infoflow, none, all, random, epic, epic_budget, cacheblend: selective, on all ranks; full: "
     "exact, on one; ring, allgather: exact, on all; auto: infoflow if it is estimated to be 3 % "
     "faster than ring (full on one rank), else that"},
    {"ratio", KIND_TEXT, CLI_METHOD, AT(ratio), 0, 0, "R", "0.15",
     "share of the context that is recomputed, 0 to 1"},
    {"exchange", KIND_TEXT, CLI_METHOD, AT(exchange), 0, 0, "NAME", "auto",
     "query, delta: exact; auto: delta if all K/V fit into a rank's memory, else query; kv, local: "
     "not exact, for comparison"},
    {"chunk", KIND_COUNT, CLI_METHOD, AT(chunk), AT(has_chunk), INT32_MAX, "N", NULL,
     "re-cut every context every N tokens (default: as given; 2048 for a request with "
     "\"context\")"},
    {"refit", KIND_FLAG, CLI_METHOD, AT(refit), 0, 0, NULL, NULL,
     "move the rows that are not recomputed by an affine map fitted on those that are; not in the "
     "published method; needs exchange delta or one rank"},
    {"score", KIND_TEXT, CLI_METHOD, AT(score), 0, 0, "FORM", "l2",
     "l2, l1, mass, l2h: how probabilities become a score"},
    {"score-rows", KIND_TEXT, CLI_METHOD, AT(score_rows), 0, 0, "ROWS", "question",
     "question or prompt: whose attention is scored"},
    {"score-layers", KIND_TEXT, CLI_METHOD, AT(score_layers), 0, 0, "SET", "wide",
     "wide (every third from a third of the depth to five sixths), published (22-25, or that "
     "depth) "
     "or a list"},
    {"geometry", KIND_TEXT, CLI_METHOD, AT(geometry), 0, 0, "NAME", "global",
     "global, hl-tp, hl-hp, tl-tp: rotary positions while scoring"},
    {"hp", KIND_TEXT, CLI_METHOD, AT(hp), 0, 0, "PLACE", "shared",
     "shared or per_chunk: where geometry hl-hp puts the question"},
    {"scoring", KIND_TEXT, CLI_METHOD, AT(scoring), 0, 0, "NAME", "exact",
     "exact: the question sees all ranks' context; local: each rank's own, so that the selection "
     "depends on the number of ranks; for comparison"},
    {"local-sink", KIND_FLAG, CLI_METHOD, AT(local_sink), 0, 0, NULL, NULL,
     "under --scoring local, lend the prefix to ranks without the first chunk"},
    {"reorder", KIND_FLAG, CLI_METHOD, AT(reorder), 0, 0, NULL, NULL,
     "put the chunks, independent documents, in ascending order of their scores first; indices "
     "then "
     "count along the new sequence"},
    {"reorder-force", KIND_FLAG, CLI_METHOD, AT(reorder_force), 0, 0, NULL, NULL,
     "the same, also where a context was cut every N tokens"},
    {"placement", KIND_TEXT, CLI_METHOD, AT(placement), 0, 0, "NAME", "auto",
     "auto, zigzag, contiguous, longest: changes time, never results"},
    {"max-new", KIND_COUNT, CLI_METHOD, AT(max_new), 0, INT32_MAX, "N", "32",
     "generated tokens at most; 0: prefill only"},
    {"ride", KIND_TEXT, CLI_METHOD, AT(ride), 0, 0, "ROWS", "both",
     "both, score, prompt or none: scoring rows run through encode (without a chunk store, under "
     "geometry global), the prompt through recompute; changes time, never results"},
    {"epic-k", KIND_COUNT, CLI_METHOD, AT(epic_k), 0, INT32_MAX, "N", "16",
     "rows at the head of each chunk that method epic recomputes; 0: 16"},
    {"seed", KIND_SEED, CLI_METHOD, AT(seed), 0, 0, "S", "0",
     "of method random, and of what a bench draws"},
    {"store", KIND_TEXT, CLI_STORE, AT(store), 0, 0, "DIR", NULL,
     "keep the K/V of chunks there and use those found, at any place of any request"},
    {"store-size", KIND_SIZE, CLI_STORE, AT(store_size), AT(has_store_size), 0, "BYTES", "0",
     "largest size of DIR: N, NK, NM, NG or NT (powers of 1024); 0: no bound"},
    {"store-device", KIND_SIZE, CLI_STORE, AT(store_device), 0, 0, "BYTES", "0",
     "memory in which each rank's device (under cpu the host) keeps the K/V of chunks from request "
     "to request, with or without DIR; those used longest ago go; 0: none"},
    {"out", KIND_TEXT, CLI_OUTPUT, AT(out), 0, 0, "DIR", NULL,
     "results.jsonl, one .h5 a request, manifest.jsonl"},
    {"save-kv", KIND_FLAG, CLI_OUTPUT, AT(save_kv), 0, 0, NULL, NULL, "write every rank's K/V"},
    {"save-logits", KIND_FLAG, CLI_OUTPUT, AT(save_logits), 0, 0, NULL, NULL,
     "write the logits that chose the first token"},
    {"save-scores", KIND_FLAG, CLI_OUTPUT, AT(save_scores), 0, 0, NULL, NULL,
     "write every row's score"},
    {"resume", KIND_FLAG, CLI_OUTPUT, AT(resume), 0, 0, NULL, NULL,
     "skip requests that DIR has finished"},
    {"overwrite", KIND_FLAG, CLI_OUTPUT, AT(overwrite), 0, 0, NULL, NULL,
     "replace the results in DIR"},
    {"lengths", KIND_TEXT, CLI_SCALE, AT(lengths), 0, 0, "N,...", NULL,
     "tokens; of bench prefill context and prompt together, random ids in chunks of --chunk; of "
     "bench comm bytes"},
    {"methods", KIND_TEXT, CLI_BENCH, AT(methods), 0, 0, "LIST", NULL,
     "method[/exchange][/warm|/warm-device],...; warm: chunks from host memory, warm-device: from "
     "the device's (default: full, infoflow and warm tiers, on several ranks every rival)"},
    {"repeat", KIND_COUNT, CLI_BENCH, AT(repeat), 0, 64, "N", "3",
     "measured runs of each method, in turns, or of an operation; the median counts"},
    {"warm-up", KIND_COUNT, CLI_BENCH, AT(warm_up), 0, 64, "N", "1", "runs before them"},
    {"project", KIND_FLAG, CLI_BENCH, AT(project), 0, 0, NULL, NULL,
     "with --ranks P: the ranks take turns on one device; print what P devices would take"},
    {"device", KIND_TEXT, CLI_SCALE, AT(device), 0, 0, "FILE", NULL,
     "rates and memory that a plan assumes (default: configs/devices/h100_sxm.json), and the "
     "floors "
     "of a bench (default: measured)"},
    {"links", KIND_TEXT, CLI_SCALE, AT(links), 0, 0, "FILE", "configs/links/nvlink4.json",
     "how fast devices reach each other, of a plan or a projection"},
    {"backend", KIND_TEXT, CLI_RANKS, AT(backend), 0, 0, "NAME", "auto",
     "auto, cpu, cuda; auto: cuda where there is a device, else cpu"},
    {"comm", KIND_TEXT, CLI_RANKS, AT(comm), 0, 0, "NAME", "auto",
     "auto, self, thread, mpi, nccl; auto: thread with --ranks; mpi under mpirun or srun, nccl "
     "where each rank has a GPU of its own; else self"},
    {"collective-timeout", KIND_COUNT, CLI_RANKS, AT(collective_timeout), 0, 86400, "S", "300",
     "seconds that NCCL waits for the other ranks before the job ends"},
    {"ranks", KIND_COUNT, CLI_RANKS, AT(ranks), 0, 1024, "P", NULL, "ranks of --comm thread"},
    {"threads", KIND_COUNT, CLI_RANKS, AT(threads), 0, 4096, "N", NULL,
     "threads of each rank (default: cores / ranks on this node)"},
    {"run", KIND_TEXT, CLI_RANKS, AT(run), 0, 0, "FILE", NULL,
     "JSON object of options, names without dashes in front; flags and IFKV_* win over it"},
    {"json", KIND_FLAG, CLI_TALK, AT(json), 0, 0, NULL, NULL,
     "one JSON object a request on standard output"},
    {"quiet", KIND_FLAG, CLI_TALK, AT(quiet), 0, 0, NULL, NULL,
     "no table, no progress, no warnings"},
    {"verbose", KIND_FLAG, CLI_TALK, AT(verbose), 0, 0, NULL, NULL, "log what is going on"},
    {"help", KIND_FLAG, ~0u, AT(help), 0, 0, NULL, NULL, "this text"},
};
enum { N_OPTION = sizeof table / sizeof *table };

/* ---- nearest name ---- */

static size_t edit_distance(const char *a, const char *b) {
    enum { LONGEST = 32 };
    size_t row[LONGEST + 1];
    const size_t n = strlen(a), m = strlen(b);
    if (n > LONGEST || m > LONGEST) return LONGEST;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            const size_t above = row[j], change = diagonal + (a[i - 1] != b[j - 1]);
            size_t best = above < row[j - 1] ? above + 1 : row[j - 1] + 1;
            row[j] = best < change ? best : change;
            diagonal = above;
        }
    }
    return row[m];
}

static const char *nearest_option(const char *name, unsigned set) {
    const char *best = "help";
    size_t least = SIZE_MAX;
    for (int i = 0; i < N_OPTION; i++) {
        const size_t distance = edit_distance(name, table[i].name);
        if ((table[i].set & set) && distance < least) {
            least = distance;
            best = table[i].name;
        }
    }
    return best;
}

const cli_command *cli_command_find(const char *name, const char **nearest_p) {
    size_t least = SIZE_MAX;
    for (int i = 0; i < cli_n_command; i++) {
        if (!strcmp(cli_commands[i].name, name)) return &cli_commands[i];
        const size_t distance = edit_distance(name, cli_commands[i].name);
        if (distance < least) {
            least = distance;
            *nearest_p = cli_commands[i].name;
        }
    }
    return NULL;
}

/* ---- values ---- */

/* Bytes: "N", "NK", "NM", "NG", "NT" in powers of 1024. */
static ifkv_status parse_size(const char *text, const char *from, uint64_t *bytes_p) {
    static const char units[] = "KMGT";
    char *end = NULL, shown[IFKV_QUOTE_BYTES];
    const bool is_number = *text >= '0' && *text <= '9';
    errno = 0;
    const unsigned long long n = is_number ? strtoull(text, &end, 10) : 0;
    const char *unit = is_number && *end ? strchr(units, *end) : NULL;
    const unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    IFKV_REQUIRE(is_number && !errno && (!*end || (unit && !end[1])) && n <= UINT64_MAX >> shift,
                 IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "%s: got \"%s\", expected a number of bytes: N, NK, NM, NG or NT", from,
                 ifkv_quote(text, strlen(text), shown));
    *bytes_p = (uint64_t)n << shift;
    return IFKV_OK;
}

/* Set one option from text; `from` names where the text stands. */
static ifkv_status set_option(cli_options *options, const option *o, const char *text,
                              const char *from) {
    char shown[IFKV_QUOTE_BYTES], *end = NULL;
    void *value = (char *)options + o->offset;
    ifkv_quote(text, strlen(text), shown);
    const bool is_number = *text >= '0' && *text <= '9';
    errno = 0;
    if (o->kind == KIND_TEXT) {
        IFKV_REQUIRE(*text, IFKV_ERR_USAGE, IFKV_E_VALUE, "%s: got an empty value, expected %s",
                     from, o->value);
        *(const char **)value = text;
    } else if (o->kind == KIND_COUNT) {
        const long long n = is_number ? strtoll(text, &end, 10) : -1;
        IFKV_REQUIRE(is_number && !errno && !*end && n <= o->max, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "%s: got \"%s\", expected a whole number from 0 to %" PRId64, from, shown,
                     o->max);
        *(int64_t *)value = n;
    } else if (o->kind == KIND_SEED) {
        const unsigned long long n = is_number ? strtoull(text, &end, 10) : 0;
        IFKV_REQUIRE(is_number && !errno && !*end, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "%s: got \"%s\", expected a whole number below 2^64", from, shown);
        *(uint64_t *)value = n;
    } else if (o->kind == KIND_SIZE) {
        IFKV_TRY(parse_size(text, from, value));
    } else {
        IFKV_REQUIRE(!strcmp(text, "1") || !strcmp(text, "0"), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "%s: got \"%s\", expected 0 or 1", from, shown);
        *(bool *)value = *text == '1';
    }
    if (o->has_offset) *(bool *)((char *)options + o->has_offset) = true;
    return IFKV_OK;
}

static const option *find_option(const char *name, size_t n, unsigned set) {
    for (int i = 0; i < N_OPTION; i++)
        if ((table[i].set & set) && strlen(table[i].name) == n && !strncmp(table[i].name, name, n))
            return &table[i];
    return NULL;
}

/* ---- environment ---- */

static void environment_name(const char *option_name, char *out) {
    out += sprintf(out, "IFKV_");
    for (; *option_name; option_name++)
        *out++ = *option_name == '-' ? '_' : (char)(*option_name - 'a' + 'A');
    *out = 0;
}

static ifkv_status read_environment(cli_options *options, unsigned set) {
    for (int i = 0; i < N_OPTION; i++) {
        char name[48], from[64];
        environment_name(table[i].name, name);
        const char *text = getenv(name);
        if (!text || !(table[i].set & set) || !strcmp(table[i].name, "help")) continue;
        snprintf(from, sizeof from, "--%s from env %s", table[i].name, name);
        IFKV_TRY(set_option(options, &table[i], text, from));
    }
    return IFKV_OK;
}

/* The variable nearest to `given` of the options' and of CLI_OTHER_VARIABLES, which CMakeLists.txt
 * gives: what the code below this tool reads by itself, words with a space between.  Returns the
 * distance. */
static size_t nearest_variable(const char *given, char best[48]) {
    size_t least = SIZE_MAX;
    char name[48];
    const char *other = CLI_OTHER_VARIABLES;
    for (int i = 0; i < N_OPTION || *other; i++) {
        if (i < N_OPTION) {
            environment_name(table[i].name, name);
        } else {
            const size_t n = strcspn(other, " ");
            snprintf(name, sizeof name, "%.*s", (int)n, other);
            other += n + (other[n] != 0);
        }
        const size_t distance = edit_distance(given, name);
        if (distance >= least) continue;
        least = distance;
        strcpy(best, name);
    }
    return least;
}

extern char **environ;

void cli_environment_warn(void) {
    for (char **entry = environ; *entry; entry++) {
        if (strncmp(*entry, "IFKV_", 5)) continue;
        const size_t n = strcspn(*entry, "=");
        char best[48], given[48], shown[IFKV_QUOTE_BYTES];
        snprintf(given, sizeof given, "%.*s", (int)(n < 47 ? n : 47), *entry);
        if (nearest_variable(given, best))
            fprintf(stderr, "ifkv: warning: %s is not a variable of ifkv; the nearest is %s\n",
                    ifkv_quote(*entry, n, shown), best);
    }
}

/* ---- run file ---- */

static ifkv_status set_from_json(cli_options *options, unsigned set, const char *path,
                                 const char *key, json_t *value) {
    char from[IFKV_QUOTE_BYTES + 512], shown[IFKV_QUOTE_BYTES], text[32];
    ifkv_path_quote(path, shown);
    snprintf(from, sizeof from, "%s /%s", shown, key);
    const option *o = find_option(key, strlen(key), ~0u);
    IFKV_REQUIRE(o && strcmp(key, "run") && strcmp(key, "help"), IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                 "%s: unknown option; the nearest is %s", from, nearest_option(key, set));
    if (!(o->set & set)) return IFKV_OK; /* one run file may serve several commands */
    const char *as_text = text;
    if (json_is_string(value))
        as_text = json_string_value(
            value); /* the root is never released: values live as long as the process */
    else if (json_is_integer(value))
        snprintf(text, sizeof text, "%lld", (long long)json_integer_value(value));
    else if (json_is_boolean(value))
        snprintf(text, sizeof text, "%d", json_is_true(value));
    else
        return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_VALUE,
                         "%s: expected text, a whole number or a boolean", from);
    IFKV_REQUIRE(o->kind != KIND_TEXT || json_is_string(value), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "%s: expected text", from);
    return set_option(options, o, as_text, from);
}

static ifkv_status read_run_file(cli_options *options, unsigned set, const char *path) {
    const ifkv_json_limits limits = {
        .max_bytes = 1 << 20, .max_depth = 4, .max_parse_bytes = 64 << 20};
    char *text = NULL, shown[IFKV_QUOTE_BYTES];
    size_t bytes = 0;
    json_t *root = NULL;
    IFKV_TRY(ifkv_file_read(path, limits.max_bytes, IFKV_E_ARGUMENT, &text, &bytes));
    const ifkv_status status =
        ifkv_json_parse(ifkv_path_quote(path, shown), text, bytes, &limits, IFKV_E_VALUE, &root);
    free(text);
    IFKV_TRY(status);
    IFKV_REQUIRE(json_is_object(root), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "%s: expected an object of options", shown);
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) IFKV_TRY(set_from_json(options, set, path, key, value));
    return IFKV_OK;
}

/* ---- argv ---- */

static ifkv_status read_argv(const cli_command *command, int argc, char **argv,
                             cli_options *options) {
    for (int i = 0; i < argc; i++) {
        char shown[IFKV_QUOTE_BYTES], from[64];
        const char *word = argv[i];
        if (!strcmp(word, "-h")) word = "--help";
        if (strncmp(word, "--", 2) || !word[2]) {
            IFKV_REQUIRE(*word != '-' && options->n_argument < command->max_argument,
                         IFKV_ERR_USAGE, IFKV_E_ARGUMENT, "%s: got \"%s\", expected options%s",
                         command->name, ifkv_quote(word, strlen(word), shown), command->synopsis);
            options->argument[options->n_argument++] = word;
            continue;
        }
        const char *name = word + 2, *equals = strchr(name, '=');
        const size_t n = equals ? (size_t)(equals - name) : strlen(name);
        const option *o = find_option(name, n, command->options);
        IFKV_REQUIRE(o, IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                     "%s: unknown option \"--%s\"; the nearest is --%s", command->name,
                     ifkv_quote(name, n, shown), nearest_option(name, command->options));
        snprintf(from, sizeof from, "--%s", o->name);
        const char *text = "1";
        if (equals)
            text = equals + 1;
        else if (o->kind != KIND_FLAG) {
            IFKV_REQUIRE(i + 1 < argc, IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                         "--%s: got no value, expected %s", o->name, o->value);
            text = argv[++i];
        }
        IFKV_TRY(set_option(options, o, text, from));
    }
    return IFKV_OK;
}

ifkv_status cli_options_read(const cli_command *command, int argc, char **argv,
                             cli_options *options) {
    cli_options first = {0};
    *options = (cli_options){.max_new = 32, .repeat = 3, .warm_up = 1};
    options->argument = calloc((size_t)argc + 1, sizeof *options->argument);
    first.argument = options->argument;
    IFKV_REQUIRE(options->argument, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "options: out of memory");
    IFKV_TRY(read_argv(command, argc, argv,
                       &first)); /* errors of the command line come first; finds --run */
    const char *run = first.run                      ? first.run
                      : command->options & CLI_RANKS ? getenv("IFKV_RUN")
                                                     : NULL;
    if (run) IFKV_TRY(read_run_file(options, command->options, run));
    IFKV_TRY(read_environment(options, command->options));
    IFKV_TRY(read_argv(command, argc, argv, options));
    IFKV_REQUIRE(!options->resume || !options->overwrite, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "--resume and --overwrite exclude each other");
    IFKV_REQUIRE(!options->quiet || !options->verbose, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "--quiet and --verbose exclude each other");
    return IFKV_OK;
}

/* ---- help ---- */

static void print_options(unsigned set, const char *title) {
    printf("\n%s\n", title);
    for (int i = 0; i < N_OPTION; i++) {
        if (table[i].set != set) continue;
        char left[40];
        snprintf(left, sizeof left, "--%s%s%s", table[i].name, table[i].value ? " " : "",
                 table[i].value ? table[i].value : "");
        printf("  %-22s %s", left, table[i].help);
        if (table[i].initial) printf(" [%s]", table[i].initial);
        printf("\n");
    }
}

void cli_help(const cli_command *command) {
    static const struct {
        unsigned set;
        const char *title;
    } groups[] = {
        {CLI_MODEL, "Model"},   {CLI_REQUESTS, "Input"},
        {CLI_METHOD, "Method"}, {CLI_SCALE, "Scale"},
        {CLI_BENCH, "Bench"},   {CLI_STORE, "Chunk store"},
        {CLI_OUTPUT, "Output"}, {CLI_RANKS, "Ranks and device"},
        {CLI_TALK, "Talk"},
    };
    if (!command) {
        printf("ifkv %s: sequence-parallel prefill of long contexts\n\nusage: ifkv COMMAND "
               "[options]\n\n",
               IFKV_VERSION);
        for (int i = 0; i < cli_n_command; i++)
            printf("  %-9s %s\n", cli_commands[i].name, cli_commands[i].summary);
        printf("\nifkv COMMAND --help lists its options.  A first run, after launch/quickstart.sh "
               "has fetched a model:\n"
               "  mpirun -n 4 ifkv prefill --model DIR --requests requests.jsonl --out OUT\n"
               "Every option can also be set by IFKV_<OPTION>, for example IFKV_RATIO=0.3.\n");
        return;
    }
    printf("usage: ifkv %s%s\n%s\n", command->name, command->synopsis, command->summary);
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
        if (command->options & groups[i].set) print_options(groups[i].set, groups[i].title);
    printf("\nExit codes: 0 done, 2 usage, 65 bad data, 66 input missing, 69 no such resource, 73 "
           "cannot create output,\n"
           "74 I/O error, 75 busy or interrupted: try again, 78 not supported, 80 numeric check "
           "failed, 81 a rank died.\n");
}
