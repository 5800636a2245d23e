/* What methods cost in answer quality: JSON lines of KL, likelihood, answers and K/V errors.
 *
 *   quality --model DIR --requests F.jsonl --configs F.jsonl --out F.jsonl [options]
 *
 * Owns the command line only; quality_loop.h says what a run does, bench/README.md what its files
 * hold. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quality_loop.h"

static const char usage[] =
    "usage: quality --model DIR --requests FILE --configs FILE --out FILE [options]\n"
    "  --gold FILE        lines {\"id\", \"gold\": [ids]}: answers to be forced\n"
    "  --threads N        threads (default 2)\n"
    "  --part P           all, even or odd positions in the request file (default all)\n"
    "  --limit N          requests at most, after --part (default 0: all)\n"
    "  --chunk N          re-cut the context every N tokens (default 0: as given)\n"
    "  --max-answer N     tokens of greedy answers (default 16)\n"
    "  --scores DIR       also write the scores of single layers there, raw float32\n"
    "  --snapshots DIR    keep full prefill and encode of every request there (0.6 GB each here), "
    "and\n"
    "                     read them where they are: of one model, one file of requests and one\n"
    "                     --max-answer\n"
    "Results are appended; pairs that --out holds already are skipped.\n";

typedef struct arguments {
    const char *model;
    int64_t n_thread;
    quality_options run;
} arguments;

static bool parse_count(const char *text, int64_t *value_p) {
    char *end;
    errno = 0;
    *value_p = strtoll(text, &end, 10);
    return !errno && end != text && !*end && *value_p >= 0 && *value_p <= INT32_MAX;
}

static bool parse_part(const char *text, int *parity_p) {
    static const char *const names[] = {"all", "even", "odd"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i])) continue;
        *parity_p = i - 1;
        return true;
    }
    return false;
}

static bool parse_one(arguments *it, const char *flag, const char *value) {
    const struct {
        const char *flag, **text_p;
        int64_t *count_p;
    } known[] = {
        {"--model", &it->model, NULL},
        {"--requests", &it->run.requests, NULL},
        {"--configs", &it->run.configs, NULL},
        {"--out", &it->run.out, NULL},
        {"--gold", &it->run.gold, NULL},
        {"--scores", &it->run.scores, NULL},
        {"--threads", NULL, &it->n_thread},
        {"--limit", NULL, &it->run.limit},
        {"--snapshots", &it->run.snapshots, NULL},
        {"--chunk", NULL, &it->run.chunk},
        {"--max-answer", NULL, &it->run.max_answer},
    };
    if (!strcmp(flag, "--part")) return parse_part(value, &it->run.parity);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(flag, known[i].flag)) continue;
        if (known[i].count_p) return parse_count(value, known[i].count_p);
        *known[i].text_p = value;
        return true;
    }
    return false;
}

static bool parse(int argc, char **argv, arguments *it) {
    *it = (arguments){.n_thread = 2, .run = {.parity = -1, .max_answer = 16}};
    for (int i = 1; i < argc; i += 2)
        if (i + 1 == argc || !parse_one(it, argv[i], argv[i + 1])) return false;
    return it->model && it->run.requests && it->run.configs && it->run.out &&
           it->run.max_answer > 0;
}

static ifkv_status run(const arguments *it) {
    const ifkv_engine_options options = {
        .size = sizeof options, .model_dir = it->model, .n_thread = (int)it->n_thread};
    ifkv_comm *comm = NULL;
    ifkv_engine *engine = NULL;
    int64_t n_made = 0;
    ifkv_status status = ifkv_comm_open("self", &comm);
    if (status == IFKV_OK) status = ifkv_engine_open(comm, &options, &engine);
    if (status == IFKV_OK) status = quality_loop(engine, &it->run, &n_made);
    if (status == IFKV_OK)
        fprintf(stderr, "quality: %lld lines added to %s\n", (long long)n_made, it->run.out);
    ifkv_engine_close(engine);
    ifkv_comm_close(comm);
    return status;
}

int main(int argc, char **argv) {
    arguments it;
    if (!parse(argc, argv, &it)) {
        fputs(usage, stderr);
        return IFKV_ERR_USAGE;
    }
    const ifkv_status status = run(&it);
    if (status != IFKV_OK)
        fprintf(stderr, "quality: error: %s [E%04d]\n", ifkv_last_error()->text,
                ifkv_last_error()->code);
    return (int)status;
}
