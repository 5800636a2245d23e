/* Failures on purpose, and the words of a report.  See standin.h. */
#include "standin.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct plan {
    std::string name;
    long first = 0;
    bool is_lasting = false, has_code = false;
    int code = 0;
};

struct state {
    std::mutex mutex;
    std::vector<plan> plans;
    std::map<std::string, long> calls;
};

/* IFKV_EMU_FAIL is read when the first call is counted. */
state &all();

long launcher_rank() {
    for (const char *name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"})
        if (const char *text = getenv(name)) return atol(text);
    return 0;
}

void read_plans(state &s, const char *spec) {
    s.plans.clear();
    s.calls.clear();
    const std::string text = spec ? spec : "";
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        const std::string item = text.substr(at, end - at);
        at = end + 1;
        plan p;
        const size_t colon = item.find(':');
        if (colon == std::string::npos)
            emu::report("IFKV_EMU_FAIL: got \"%s\", expected NAME:N[+][=CODE][@RANK]",
                        item.c_str());
        p.name = item.substr(0, colon);
        char *rest = nullptr;
        p.first = strtol(item.c_str() + colon + 1, &rest, 10);
        if (*rest == '+') p.is_lasting = true, rest++;
        if (*rest == '=') p.has_code = true, p.code = (int)strtol(rest + 1, &rest, 10);
        const long rank = *rest == '@' ? strtol(rest + 1, &rest, 10) : launcher_rank();
        if (*rest || p.first < 1)
            emu::report("IFKV_EMU_FAIL: got \"%s\", expected NAME:N[+][=CODE][@RANK]",
                        item.c_str());
        if (rank == launcher_rank()) s.plans.push_back(p);
    }
}

state &all() {
    static state &s = *new state; /* threads may outlive static objects */
    static std::once_flag once;
    std::call_once(once, [] { read_plans(s, getenv("IFKV_EMU_FAIL")); });
    return s;
}

} // namespace

void emu::report(const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "emulated device: %s\n", text);
    abort();
}

bool emu::is_failing(const char *name, int *code_p) {
    state &s = all();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const long n = ++s.calls[name];
    for (const plan &p : s.plans) {
        if (p.name != name || n < p.first || (n > p.first && !p.is_lasting)) continue;
        if (p.has_code) *code_p = p.code;
        return true;
    }
    return false;
}

long long emu::env_number(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoll(text) : otherwise;
}

void emu_fail(const char *spec) {
    state &s = all();
    const std::lock_guard<std::mutex> lock(s.mutex);
    read_plans(s, spec);
}

long emu_calls(const char *name) {
    state &s = all();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const auto found = s.calls.find(name);
    return found == s.calls.end() ? 0 : found->second;
}
