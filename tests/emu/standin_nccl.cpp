/* The stand-in for NCCL: ranks as threads of one process or as processes, over shared memory.
 *
 * Every operation is a list of sends and receives; a pair of ranks has a channel each way, which
 * moves one message after the other.  A communicator's work is a step of its stream that is tried
 * again until all its messages are through, so a peer that does not come leaves the stream where it
 * is, as on a device, until the communicator is aborted; nobody tells the others.  Counts that do
 * not fit hang, as they may with the real one, with a line that says why.
 *
 * A communicator that does not block says ncclInProgress after every group, and its work enters the
 * stream only while it is asked: who does not ask finds nothing there.  The thread of this file
 * drives streams in which other ranks wait for something, and all of them unless work is late.
 *
 * Planned failures (IFKV_EMU_FAIL, see standin.h) beside those of the calls, for all ranks of the
 * process or with /R behind the name for rank R of a communicator: ncclHang, ncclAsync: the N-th
 * piece of work never starts, or fails with CODE (ncclRemoteError); ncclInitHang, ncclAbortHang: an
 * initialisation never ends, an abort takes an hour; ncclVersion: the library is of version CODE.
 */
#include "standin.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <nccl.h>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t CHANNEL_BYTES = 64 << 10;
constexpr int N_ASKED = 2; /* answers of ncclInProgress after a group */

/* One direction between two ranks; zero bytes are its beginning. */
struct channel {
    std::atomic<uint64_t> put, taken;             /* bytes so far */
    std::atomic<uint64_t> n_sending, n_receiving; /* messages that the two sides have come to */
    char data[CHANNEL_BYTES];
};

struct member {
    char place[128]; /* host and bus of its device */
    std::atomic<int> is_here;
};

struct alignas(64) region { /* channels [size, size] by sender and receiver follow */
    std::atomic<int> n_here;
    member members[64];
};

struct transfer {
    bool is_send;
    int peer;
    char *data;
    uint64_t bytes, done;
    bool is_begun; /* the length of the message is through */
};

struct communicator;

struct piece {
    std::vector<transfer> transfers;
    cudaStream_t stream;
    emu::ticket ticket; /* its place in the stream; 0: not there yet */
    bool is_started = false, is_done = false, is_stuck = false;
};

struct communicator {
    std::mutex mutex;
    int rank = 0, size = 0;
    bool is_blocking = true, is_finalized = false;
    std::atomic<bool> is_aborted{false};
    std::atomic<int> error{ncclSuccess};
    std::string name;
    region *shared = nullptr;
    size_t shared_bytes = 0;
    int n_asked = 0; /* answers of ncclInProgress still to give */
    bool is_initialised = false;
    std::deque<std::shared_ptr<piece>> works; /* issued, in order, until they are done */
    std::set<void *> registered;

    channel &between(int sender, int receiver) {
        return reinterpret_cast<channel *>(shared + 1)[sender * size + receiver];
    }
    channel &to(int peer) {
        return between(rank, peer);
    }
    channel &from(int peer) {
        return between(peer, rank);
    }
    ~communicator() {
        if (shared) munmap(shared, shared_bytes);
    }
};
using communicator_ptr = std::shared_ptr<communicator>;

} // namespace

struct ncclComm {
    communicator_ptr inside;
};

namespace {

struct state {
    std::mutex mutex;
    std::set<ncclComm_t> handles;
    std::set<void *> memory; /* of ncclMemAlloc */
    bool has_thread = false;
};

state &all() {
    static state &s = *new state; /* the thread below outlives static objects */
    return s;
}

struct grouped {
    communicator_ptr comm;
    std::shared_ptr<piece> work;
};
thread_local int group_depth;
thread_local const char *last_words = "";
thread_local std::vector<grouped> group;

bool is_failing(const communicator &c, const char *name, int *code_p) {
    const bool is_any = emu::is_failing(name, code_p);
    return emu::is_failing((std::string(name) + "/" + std::to_string(c.rank)).c_str(), code_p) ||
           is_any;
}

communicator_ptr find(ncclComm_t comm) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    if (!all().handles.count(comm)) emu::report("an NCCL communicator that does not exist");
    return comm->inside;
}

/* ---- messages ---- */

void copy_in(channel &c, uint64_t at, const char *from, uint64_t n) {
    const uint64_t place = at % CHANNEL_BYTES, first = std::min(n, CHANNEL_BYTES - place);
    memcpy(c.data + place, from, first);
    memcpy(c.data, from + first, n - first);
}

void copy_out(const channel &c, uint64_t at, char *to, uint64_t n) {
    const uint64_t place = at % CHANNEL_BYTES, first = std::min(n, CHANNEL_BYTES - place);
    memcpy(to, c.data + place, first);
    memcpy(to + first, c.data, n - first);
}

/* What fits of a message; true when it is through. */
bool move_send(channel &c, transfer &t) {
    uint64_t put = c.put.load(), room = CHANNEL_BYTES - (put - c.taken.load());
    if (!t.is_begun) {
        if (room < sizeof t.bytes) return false;
        copy_in(c, put, (const char *)&t.bytes, sizeof t.bytes);
        put += sizeof t.bytes;
        room -= sizeof t.bytes;
        c.put.store(put);
        t.is_begun = true;
    }
    const uint64_t n = std::min(room, t.bytes - t.done);
    if (n) {
        const emu::open_memory memory(t.data, nullptr);
        copy_in(c, put, t.data + t.done, n);
        t.done += n;
        c.put.store(put + n);
    }
    return t.done == t.bytes;
}

bool move_receive(channel &c, transfer &t, piece &w) {
    uint64_t taken = c.taken.load(), there = c.put.load() - taken;
    if (!t.is_begun) {
        uint64_t bytes = 0;
        if (there < sizeof bytes) return false;
        copy_out(c, taken, (char *)&bytes, sizeof bytes);
        if (bytes != t.bytes) {
            fprintf(stderr,
                    "emulated device: rank %d sent %llu bytes where %llu are expected: hanging\n",
                    t.peer, (unsigned long long)bytes, (unsigned long long)t.bytes);
            w.is_stuck = true;
            return false;
        }
        taken += sizeof bytes;
        there -= sizeof bytes;
        c.taken.store(taken);
        t.is_begun = true;
    }
    const uint64_t n = std::min(there, t.bytes - t.done);
    if (n) {
        const emu::open_memory memory(t.data, nullptr);
        copy_out(c, taken, t.data + t.done, n);
        t.done += n;
        c.taken.store(taken + n);
    }
    return t.done == t.bytes;
}

/* ---- work ---- */

void start(communicator &c, piece &w) {
    int code = ncclRemoteError, unused = 0;
    w.is_started = true;
    if (is_failing(c, "ncclAsync", &code)) {
        c.error = code;
        w.is_stuck = true;
    }
    if (is_failing(c, "ncclHang", &unused)) w.is_stuck = true;
    if (w.is_stuck) return;
    for (const transfer &t : w.transfers)
        (t.is_send ? c.to(t.peer).n_sending : c.from(t.peer).n_receiving)++;
}

/* A step of the stream: true when all messages are through, or nobody wants them any more. */
bool step(communicator &c, piece &w) {
    const std::lock_guard<std::mutex> lock(c.mutex);
    if (c.is_aborted) return true;
    if (!w.is_started) start(c, w);
    bool is_done = !w.is_stuck;
    std::set<std::pair<bool, int>> is_busy; /* messages to one peer pass in order */
    for (transfer &t : w.transfers) {
        if (w.is_stuck) break;
        if ((t.is_begun && t.done == t.bytes) || is_busy.count({t.is_send, t.peer})) continue;
        if (t.is_send ? move_send(c.to(t.peer), t) : move_receive(c.from(t.peer), t, w)) continue;
        is_busy.insert({t.is_send, t.peer});
        is_done = false;
    }
    if (is_done) {
        w.is_done = true;
        while (!c.works.empty() && c.works.front()->is_done) c.works.pop_front();
    }
    return is_done;
}

/* Put a communicator's work into its streams, in order even where the streams differ. */
void issue(const communicator_ptr &c) {
    std::vector<std::shared_ptr<piece>> fresh;
    std::shared_ptr<piece> last;
    {
        const std::lock_guard<std::mutex> lock(c->mutex);
        for (const auto &w : c->works) {
            if (w->ticket.place)
                last = w;
            else
                fresh.push_back(w);
        }
    }
    for (const auto &w : fresh) {
        if (last && last->stream != w->stream) emu::enqueue_after(w->stream, last->ticket);
        const emu::ticket ticket = emu::enqueue(w->stream, [c, w] { return step(*c, *w); });
        const std::lock_guard<std::mutex> lock(c->mutex);
        w->ticket = ticket;
        last = w;
    }
}

/* Has a peer come to a message of this work, which has not started? */
bool is_wanted(communicator &c, const piece &w) {
    for (const transfer &t : w.transfers) {
        const channel &to = c.to(t.peer), &from = c.from(t.peer);
        if (t.is_send ? to.n_receiving > to.n_sending : from.n_sending > from.n_receiving)
            return true;
    }
    return false;
}

void look_after(const communicator_ptr &c) {
    emu::ticket ticket;
    {
        const std::lock_guard<std::mutex> lock(c->mutex);
        if (c->works.empty() || !c->works.front()->ticket.place) return;
        const piece &w = *c->works.front();
        if (emu::is_late() && !w.is_started && !is_wanted(*c, w)) return;
        ticket = w.ticket;
    }
    emu::drive(ticket);
}

void run_thread() {
    for (;;) {
        std::vector<communicator_ptr> comms;
        {
            const std::lock_guard<std::mutex> lock(all().mutex);
            for (ncclComm_t comm : all().handles) comms.push_back(comm->inside);
        }
        for (const communicator_ptr &c : comms) look_after(c);
        comms.clear();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
}

/* ---- calls ---- */

ncclResult_t enter(const char *name) {
    int code = ncclInternalError;
    return emu::is_failing(name, &code) ? (ncclResult_t)code : ncclSuccess;
}

ncclResult_t end_group() {
    std::vector<grouped> ended;
    std::vector<communicator_ptr> comms;
    ended.swap(group);
    for (grouped &g : ended) {
        const std::lock_guard<std::mutex> lock(g.comm->mutex);
        g.comm->works.push_back(g.work);
        if (std::find(comms.begin(), comms.end(), g.comm) == comms.end()) comms.push_back(g.comm);
    }
    ncclResult_t result = ncclSuccess;
    for (const communicator_ptr &c : comms) {
        if (c->is_blocking) {
            issue(c);
            continue;
        }
        const std::lock_guard<std::mutex> lock(c->mutex);
        c->n_asked = N_ASKED;
        result = ncclInProgress;
    }
    return result;
}

/* Add transfers to the open group, or be a group. */
ncclResult_t add(const char *name, ncclComm_t comm, cudaStream_t stream,
                 const std::vector<transfer> &transfers) {
    if (const ncclResult_t result = enter(name)) return result;
    const communicator_ptr c = find(comm);
    if (c->error != ncclSuccess) return (ncclResult_t)c->error.load();
    if (!c->is_initialised || c->n_asked)
        emu::report("%s: the communicator is in progress: ask ncclCommGetAsyncError first", name);
    if (c->is_aborted || c->is_finalized) emu::report("%s: the communicator is closed", name);
    for (const transfer &t : transfers) {
        const emu::place place = emu::place_of(t.data);
        if (t.peer < 0 || t.peer >= c->size) return ncclInvalidArgument;
        if (t.bytes && (place.kind != emu::kind::device || place.left < t.bytes))
            return ncclInvalidArgument;
    }
    auto same = [&](const grouped &g) { return g.comm == c && g.work->stream == stream; };
    auto at = std::find_if(group.begin(), group.end(), same);
    if (at == group.end()) {
        group.push_back({c, std::make_shared<piece>()});
        at = group.end() - 1;
        at->work->stream = stream;
    }
    for (const transfer &t : transfers) at->work->transfers.push_back(t);
    return group_depth ? ncclSuccess : end_group();
}

uint64_t bytes_of(size_t count, ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8: return count;
    case ncclFloat16:
    case ncclBfloat16: return 2 * count;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4 * count;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8 * count;
    default: emu::report("NCCL data type %d", (int)type);
    }
}

transfer to_send(const void *data, uint64_t bytes, int peer) {
    return {true, peer, (char *)data, bytes, 0, false};
}

transfer to_receive(void *data, uint64_t bytes, int peer) {
    return {false, peer, (char *)data, bytes, 0, false};
}

/* Come to the place where the ranks meet, and say on which device. */
ncclResult_t join(communicator &c) {
    const size_t n = (size_t)c.size * (size_t)c.size;
    c.shared_bytes = sizeof(region) + n * sizeof(channel);
    const int fd = shm_open(c.name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) return ncclSystemError;
    void *at = MAP_FAILED;
    if (ftruncate(fd, (off_t)c.shared_bytes) == 0)
        at = mmap(nullptr, c.shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED) return ncclSystemError;
    c.shared = (region *)at;
    member &me = c.shared->members[c.rank];
    char host[64] = "";
    const char *host_id = getenv("NCCL_HOSTID");
    gethostname(host, sizeof host - 1);
    snprintf(me.place, sizeof me.place, "%s/%d", host_id ? host_id : host, emu::current_device());
    me.is_here = 1;
    if (++c.shared->n_here == c.size) shm_unlink(c.name.c_str());
    return ncclSuccess;
}

/* All here?  Then two on one device are an error, as the real one says. */
void look_for_peers(communicator &c) {
    if (c.is_initialised || !c.shared || c.shared->n_here < c.size) return;
    c.is_initialised = true;
    for (int r = 0; r < c.size; r++)
        for (int q = 0; q < r; q++)
            if (!strcmp(c.shared->members[r].place, c.shared->members[q].place))
                c.error = ncclInvalidUsage, last_words = "Duplicate GPU detected";
}

} // namespace

ncclResult_t ncclGetVersion(int *version_p) {
    if (const ncclResult_t result = enter(__func__)) return result;
    *version_p = NCCL_VERSION_CODE;
    emu::is_failing("ncclVersion", version_p);
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    if (const ncclResult_t result = enter(__func__)) return result;
    static std::atomic<int> n{0};
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/ifkv-emu-%ld-%d", (long)getpid(), n++);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm_p, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    if (const ncclResult_t result = enter(__func__)) return result;
    if (config->magic != 0xcafebeef || config->size != sizeof *config) return ncclInvalidArgument;
    if (size < 1 || size > 64 || rank < 0 || rank >= size || id.internal[0] != '/')
        return ncclInvalidArgument;
    const auto c = std::make_shared<communicator>();
    int unused = 0;
    c->rank = rank;
    c->size = size;
    c->name = id.internal;
    c->is_blocking = config->blocking != 0; /* not set: it blocks */
    if (!is_failing(*c, "ncclInitHang", &unused))
        if (const ncclResult_t result = join(*c)) return result;
    ncclComm_t comm = new ncclComm{c};
    {
        const std::lock_guard<std::mutex> lock(all().mutex);
        all().handles.insert(comm);
        if (!all().has_thread) std::thread(run_thread).detach();
        all().has_thread = true;
    }
    *comm_p = comm;
    if (!c->is_blocking) {
        c->n_asked = N_ASKED;
        return ncclInProgress;
    }
    while (!c->is_initialised) {
        look_for_peers(*c);
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    return (ncclResult_t)c->error.load();
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error_p) {
    if (const ncclResult_t result = enter(__func__)) return result;
    const communicator_ptr c = find(comm);
    {
        const std::lock_guard<std::mutex> lock(c->mutex);
        look_for_peers(*c);
        if (emu::is_broken() && c->error == ncclSuccess) c->error = ncclUnhandledCudaError;
        *error_p = (ncclResult_t)c->error.load();
        if (*error_p != ncclSuccess) return ncclSuccess;
        const bool is_flushing = c->is_finalized && !c->works.empty();
        if (!c->is_initialised || is_flushing || c->n_asked) *error_p = ncclInProgress;
        if (!c->is_initialised || !c->n_asked || --c->n_asked) return ncclSuccess;
    }
    issue(c); /* the last answer of ncclInProgress: the work is there when the next one comes */
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void) {
    if (const ncclResult_t result = enter(__func__)) return result;
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
    if (group_depth < 1) return ncclInvalidUsage;
    if (--group_depth) return ncclSuccess;
    if (const ncclResult_t result = enter(__func__)) {
        group.clear();
        return result;
    }
    return end_group();
}

ncclResult_t ncclSend(const void *data, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    return add(__func__, comm, stream, {to_send(data, bytes_of(count, type), peer)});
}

ncclResult_t ncclRecv(void *data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return add(__func__, comm, stream, {to_receive(data, bytes_of(count, type), peer)});
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
    const communicator_ptr c = find(comm);
    const uint64_t bytes = bytes_of(count, type);
    std::vector<transfer> transfers;
    if (root < 0 || root >= c->size) return ncclInvalidArgument;
    if (c->rank != root) transfers.push_back(to_receive(recv, bytes, root));
    for (int r = 0; r < c->size && c->rank == root; r++) {
        if (r == root && send == recv) continue;
        transfers.push_back(to_send(send, bytes, r));
        if (r == root) transfers.push_back(to_receive(recv, bytes, r));
    }
    return add(__func__, comm, stream, transfers);
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    const communicator_ptr c = find(comm);
    const uint64_t bytes = bytes_of(count, type);
    std::vector<transfer> transfers;
    for (int r = 0; r < c->size; r++) {
        char *piece = (char *)recv + (uint64_t)r * bytes;
        if (r == c->rank && piece == send) continue;
        transfers.push_back(to_send(send, bytes, r));
        transfers.push_back(to_receive(piece, bytes, r));
    }
    return add(__func__, comm, stream, transfers);
}

ncclResult_t ncclMemAlloc(void **data_p, size_t bytes) {
    if (const ncclResult_t result = enter(__func__)) return result;
    if (emu::allocate(emu::kind::device, emu::current_device(), bytes, data_p))
        return ncclUnhandledCudaError;
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().memory.insert(*data_p);
    return ncclSuccess;
}

/* Waits for the device, as cudaFree does. */
ncclResult_t ncclMemFree(void *data) {
    if (const ncclResult_t result = enter(__func__)) return result;
    {
        const std::lock_guard<std::mutex> lock(all().mutex);
        if (!all().memory.erase(data)) return ncclInvalidArgument;
    }
    emu::wait_device(emu::place_of(data).device);
    emu::release(emu::kind::device, data);
    return ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void *data, size_t bytes, void **handle_p) {
    if (const ncclResult_t result = enter(__func__)) return result;
    const communicator_ptr c = find(comm);
    const emu::place place = emu::place_of(data);
    if (place.kind != emu::kind::device || place.left < bytes) return ncclInvalidArgument;
    const std::lock_guard<std::mutex> lock(c->mutex);
    c->registered.insert(data);
    *handle_p = data;
    return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle) {
    const communicator_ptr c = find(comm);
    const std::lock_guard<std::mutex> lock(c->mutex);
    const bool was_registered = c->registered.erase(handle) == 1;
    if (const ncclResult_t result = enter(__func__)) return result;
    return was_registered ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    if (const ncclResult_t result = enter(__func__)) return result;
    const communicator_ptr c = find(comm);
    if (c->error != ncclSuccess)
        emu::report("ncclCommFinalize: the communicator has failed and can only be aborted");
    c->is_finalized = true;
    return c->is_blocking ? ncclSuccess : ncclInProgress;
}

static void forget(ncclComm_t comm) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().handles.erase(comm);
    delete comm;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (const ncclResult_t result = enter(__func__)) return result;
    const communicator_ptr c = find(comm);
    if (c->error != ncclSuccess || !c->is_initialised)
        emu::report("ncclCommDestroy: the communicator has failed and can only be aborted");
    if (!c->works.empty()) emu::report("ncclCommDestroy: work is under way; finalize it first");
    if (!c->registered.empty()) emu::report("ncclCommDestroy: memory is still registered");
    forget(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (const ncclResult_t result = enter(__func__)) return result;
    const communicator_ptr c = find(comm);
    int unused = 0;
    if (is_failing(*c, "ncclAbortHang", &unused)) sleep(3600);
    c->is_aborted = true;
    shm_unlink(c->name.c_str()); /* where the ranks have not all met */
    forget(comm);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    static const char *const words[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return result >= 0 && result < ncclNumResults ? words[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t) {
    return last_words;
}
