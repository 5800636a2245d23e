/* Memory of the emulated device and pinned memory of the host.
 *
 * Owns the book of what was allocated.  An allocation is pages of its own between pages that nobody
 * may touch; it ends where its last page ends, up to alignment, so that what runs over by much
 * faults at once, and what runs over by little is found by the pattern in the rest of the pages.
 * Device pages can be touched only while stream work runs: a thread of the host that reads them
 * otherwise ends in the report below.  Best effort: the right to touch belongs to the process, so a
 * host thread is not caught while another thread runs stream work. */
#include "standin.h"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

enum : size_t { PAGE = 4096, HUGE_PAGE = 2 << 20, ALIGN = 256, MAX_BOOK = 4096 };
enum : unsigned char { POISON = 0xff, FENCE = 0xb5 };

struct allocation {
    emu::kind kind;
    int device;
    char *pages; /* where the writable pages begin */
    size_t page_bytes, bytes;
    int n_open = 0; /* who may touch it now */
};

struct book {
    std::mutex mutex;
    std::map<const char *, allocation> live; /* by first address */
    std::map<int, size_t> used;
    int n_open = 0;       /* kernels that run now */
    bool has_run = false; /* a kernel, since the fences were looked at */
    const bool is_guarded = !getenv("IFKV_EMU_HOST") || strcmp(getenv("IFKV_EMU_HOST"), "open");
    struct sigaction before = {};
};

book &all() {
    static book &b = *new book; /* threads may outlive static objects */
    return b;
}

/* What the fault handler reads: it must not take a lock. */
struct mark {
    const char *first;
    size_t bytes;
    bool is_freed;
};
mark marks[MAX_BOOK];
int n_mark;
thread_local int depth; /* of open_memory on this thread */

void say_fault(int, siginfo_t *info, void *) {
    const char *at = (const char *)info->si_addr;
    for (int i = n_mark - 1; i >= 0; i--) {
        if (at < marks[i].first - 2 * PAGE || at >= marks[i].first + marks[i].bytes + 2 * PAGE)
            continue;
        char text[256];
        const int n =
            snprintf(text, sizeof text, "emulated device: %s touched byte %td of %s of %zu bytes\n",
                     depth ? "stream work" : "host code", at - marks[i].first,
                     marks[i].is_freed ? "freed device memory" : "device memory", marks[i].bytes);
        if (write(2, text, (size_t)n) < 0) break;
        break;
    }
    sigaction(SIGSEGV, &all().before, nullptr); /* the access is tried again and ends the process */
}

/* At every allocation, because a test's frame may set its own handler for each test; that one comes
 * after ours. */
void arm(book &b) {
    struct sigaction action = {}, before;
    action.sa_sigaction = say_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &before);
    if (before.sa_sigaction != say_fault) b.before = before;
}

void note(const char *first, size_t bytes, bool is_freed) {
    for (int i = 0; i < n_mark; i++)
        if (marks[i].first == first) {
            marks[i] = {first, bytes, is_freed};
            return;
        }
    if (n_mark < (int)MAX_BOOK) marks[n_mark++] = {first, bytes, is_freed};
}

void protect(const allocation &a, int rights) {
    if (mprotect(a.pages, a.page_bytes, rights))
        emu::report("mprotect of %zu bytes: %s", a.page_bytes, strerror(errno));
}

const char *first_bad(const char *begin, const char *end) {
    for (; begin < end; begin++)
        if ((unsigned char)*begin != FENCE) return begin;
    return nullptr;
}

void check(const char *first, const allocation &a) {
    const char *bad = first_bad(a.pages, first);
    if (!bad) bad = first_bad(first + a.bytes, a.pages + a.page_bytes);
    if (bad)
        emu::report("byte %td was written, of an allocation of %zu bytes", bad - first, a.bytes);
}

/* With the lock held. */
void open(book &b, allocation &a) {
    if (a.kind == emu::kind::device && b.is_guarded && a.n_open++ == 0)
        protect(a, PROT_READ | PROT_WRITE);
}
void shut(book &b, allocation &a) {
    if (a.kind == emu::kind::device && b.is_guarded && --a.n_open == 0) protect(a, PROT_NONE);
}

/* The allocation that holds an address, or the end of the book. */
std::map<const char *, allocation>::iterator find(book &b, const char *at) {
    auto next = b.live.upper_bound(at);
    if (next == b.live.begin()) return b.live.end();
    --next;
    return at < next->first + next->second.bytes ? next : b.live.end();
}

} // namespace

emu::place emu::place_of(const void *address) {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    const char *at = (const char *)address;
    const auto found = find(b, at);
    if (found == b.live.end()) return {kind::pageable, SIZE_MAX, -1};
    const allocation &a = found->second;
    return {a.kind, (size_t)(found->first + a.bytes - at), a.device};
}

size_t emu::free_bytes(int device) {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    const size_t total = (size_t)env_number("IFKV_EMU_MEMORY", 8ll << 30);
    return total > b.used[device] ? total - b.used[device] : 0;
}

cudaError_t emu::allocate(emu::kind kind, int device, size_t bytes, void **address_p) {
    book &b = all();
    if (bytes == 0) {
        *address_p = nullptr;
        return cudaSuccess;
    }
    if (kind == kind::device && bytes > free_bytes(device)) return cudaErrorMemoryAllocation;
    const std::lock_guard<std::mutex> lock(b.mutex);
    arm(b);
    const size_t rounded = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    const size_t page_bytes = (rounded + PAGE - 1) / PAGE * PAGE;
    /* large ones in huge pages: rights change with every launch, and small pages change one by one
     */
    const size_t align = page_bytes >= HUGE_PAGE ? HUGE_PAGE : PAGE;
    char *base = (char *)mmap(nullptr, page_bytes + PAGE + align, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return cudaErrorMemoryAllocation;
    char *pages = (char *)(((uintptr_t)base + align) / align * align);
    allocation a = {kind, device, pages, page_bytes, bytes, b.n_open};
    char *first = a.pages + page_bytes - rounded;
    protect(a, PROT_READ | PROT_WRITE);
    if (align == HUGE_PAGE) madvise(a.pages, page_bytes, MADV_HUGEPAGE); /* may be refused */
    memset(a.pages, FENCE, page_bytes);
    memset(first, POISON, bytes);
    if (kind == kind::device && b.is_guarded && !b.n_open) protect(a, PROT_NONE);
    if (kind == kind::device) b.used[device] += bytes;
    b.live[first] = a;
    note(first, bytes, false);
    *address_p = first;
    return cudaSuccess;
}

/* The addresses are not used again: a stale pointer faults. */
cudaError_t emu::release(emu::kind kind, void *address) {
    book &b = all();
    if (!address) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(b.mutex);
    const auto found = b.live.find((const char *)address);
    if (found == b.live.end() || found->second.kind != kind) return cudaErrorInvalidValue;
    allocation &a = found->second;
    open(b, a);
    check(found->first, a);
    if (kind == kind::device) b.used[a.device] -= a.bytes;
    note(found->first, a.bytes, true);
    mmap(a.pages, a.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    b.live.erase(found);
    return cudaSuccess;
}

void emu::check_fences() {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    if (!b.has_run) return;
    b.has_run = false;
    for (auto &[first, a] : b.live) {
        open(b, a);
        check(first, a);
        shut(b, a);
    }
}

emu::open_memory::open_memory() : is_all(true), addresses{} {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    depth++;
    b.n_open++;
    b.has_run = true;
    for (auto &[first, a] : b.live) open(b, a);
}

emu::open_memory::open_memory(const void *one, const void *other)
    : is_all(false), addresses{one, other} {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    depth++;
    for (const void *address : addresses)
        if (const auto found = find(b, (const char *)address); found != b.live.end())
            open(b, found->second);
}

emu::open_memory::~open_memory() {
    book &b = all();
    const std::lock_guard<std::mutex> lock(b.mutex);
    depth--;
    if (is_all) b.n_open--;
    for (auto &[first, a] : b.live)
        if (is_all) shut(b, a);
    for (const void *address : addresses)
        if (const auto found = find(b, (const char *)address); found != b.live.end())
            shut(b, found->second);
}
