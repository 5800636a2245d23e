/* Streams and events of the emulated device: queues of work, and who runs it when.
 *
 * Owns order.  There are no worker threads: the thread that waits, or any that comes by, runs the
 * head of a stream.  A step that cannot go on (a collective whose peers have not come) stays at the
 * head and is tried again.  The order between streams is kept by steps that wait for a place in
 * another one; stream 0 is the legacy stream, in front of and behind everything in streams not
 * created as non-blocking. */
#include "standin.h"

#include "emu_stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <vector>

namespace {

enum class timing { early, late, random };

} // namespace

struct emu::queue {
    int device = 0;
    bool is_blocking = false; /* ordered with stream 0 */
    std::deque<std::function<bool()>> steps;
    uint64_t n_queued = 0, n_done = 0;
    bool is_running = false;
    unsigned n_query = 0;
};

using emu::queue;
using queue_ptr = std::shared_ptr<queue>;

struct CUstream_st {
    queue_ptr queue;
};

struct CUevent_st {
    queue_ptr queue; /* null: not recorded */
    uint64_t place = 0;
    bool is_timed = true;
    std::shared_ptr<double> ms; /* when it was reached, by the host's clock */
};

namespace {

struct state {
    std::mutex mutex;
    std::condition_variable moved;
    timing time = timing::early;
    std::mt19937 random;
    std::set<cudaStream_t> streams;                   /* without the legacy ones */
    std::vector<std::unique_ptr<CUstream_st>> legacy; /* by device */
    std::vector<queue_ptr> orphans;                   /* destroyed with work in them */
    std::atomic<cudaError_t> broken{cudaSuccess};
};

void read_time(state &s, const char *spec) {
    if (!spec || !*spec || !strcmp(spec, "early"))
        s.time = timing::early;
    else if (!strcmp(spec, "late"))
        s.time = timing::late;
    else if (!strncmp(spec, "random:", 7)) {
        s.time = timing::random;
        s.random.seed((unsigned)atol(spec + 7));
    } else
        emu::report("IFKV_EMU_TIME: got \"%s\", expected early, late or random:SEED", spec);
}

state &all() {
    static state &s = *new state; /* threads may outlive static objects */
    static std::once_flag once;
    std::call_once(once, [] { read_time(s, getenv("IFKV_EMU_TIME")); });
    return s;
}

thread_local int device_of_thread;
thread_local cudaError_t last_error;

/* The legacy stream of a device. */
CUstream_st *legacy(state &s, int device) {
    while ((int)s.legacy.size() <= device) {
        s.legacy.push_back(std::make_unique<CUstream_st>());
        s.legacy.back()->queue = std::make_shared<queue>();
        s.legacy.back()->queue->device = (int)s.legacy.size() - 1;
    }
    return s.legacy[(size_t)device].get();
}

bool is_legacy(cudaStream_t stream) {
    return !stream || stream == cudaStreamLegacy;
}

queue_ptr queue_of(state &s, cudaStream_t stream) {
    if (is_legacy(stream)) return legacy(s, device_of_thread)->queue;
    if (!s.streams.count(stream)) emu::report("work for a stream that does not exist");
    return stream->queue;
}

bool run_head(std::unique_lock<std::mutex> &lock, queue &q) {
    state &s = all();
    q.is_running = true;
    lock.unlock();
    const bool is_done = q.steps.front()();
    lock.lock();
    q.is_running = false;
    if (is_done) {
        q.steps.pop_front();
        q.n_done++;
    }
    s.moved.notify_all();
    return is_done;
}

/* Run a queue up to a place; false if it cannot get there yet. */
bool run_to(std::unique_lock<std::mutex> &lock, queue &q, uint64_t place) {
    while (q.n_done < place) {
        if (q.is_running)
            all().moved.wait(lock);
        else if (!run_head(lock, q))
            return false;
    }
    return true;
}

/* A step that waits for a place in another queue. */
std::function<bool()> step_after(queue_ptr other, uint64_t place) {
    return [other, place] {
        std::unique_lock<std::mutex> lock(all().mutex);
        return run_to(lock, *other, place);
    };
}

uint64_t push(queue &q, std::function<bool()> step) {
    q.steps.push_back(std::move(step));
    return ++q.n_queued;
}

/* Stream 0 and the blocking streams wait for each other. */
void order_with_legacy(state &s, const queue_ptr &q, bool is_legacy_queue) {
    if (is_legacy_queue) {
        for (cudaStream_t other : s.streams)
            if (other->queue->is_blocking && other->queue->device == q->device &&
                other->queue->n_done < other->queue->n_queued)
                push(*q, step_after(other->queue, other->queue->n_queued));
    } else if (q->is_blocking) {
        const queue_ptr zero = legacy(s, q->device)->queue;
        if (zero->n_done < zero->n_queued) push(*q, step_after(zero, zero->n_queued));
    }
}

/* What a call lets happen by the way. */
void pass_by(std::unique_lock<std::mutex> &lock, queue &q) {
    state &s = all();
    if (s.time == timing::early) run_to(lock, q, q.n_queued);
    if (s.time != timing::random) return;
    std::vector<queue_ptr> busy;
    for (cudaStream_t stream : s.streams)
        if (!stream->queue->steps.empty()) busy.push_back(stream->queue);
    for (const auto &stream : s.legacy)
        if (!stream->queue->steps.empty()) busy.push_back(stream->queue);
    if (busy.empty()) return;
    const queue_ptr chosen = busy[s.random() % busy.size()];
    const uint64_t n = s.random() % 4;
    run_to(lock, *chosen, std::min(chosen->n_done + n, chosen->n_queued));
}

bool is_reached(std::unique_lock<std::mutex> &lock, queue &q, uint64_t place) {
    state &s = all();
    if (q.n_done >= place) return true;
    /* who asks again and again waits; the first answers show what the caller does meanwhile */
    const bool is_driven = s.time == timing::early || ++q.n_query % 3 == 0;
    if (s.time == timing::random) pass_by(lock, q);
    return is_driven && run_to(lock, q, place);
}

void wait_for(std::unique_lock<std::mutex> &lock, queue &q, uint64_t place) {
    while (!run_to(lock, q, place) && all().broken == cudaSuccess)
        all().moved.wait_for(lock, std::chrono::milliseconds(1));
}

/* What a launcher of CUDA programs cannot undo within the process. */
bool is_sticky(cudaError_t error) {
    switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure: return true;
    default: return false;
    }
}

double now_ms() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}

} // namespace

/* ---- inside ---- */

emu::ticket emu::enqueue(cudaStream_t stream, std::function<bool()> step) {
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    const queue_ptr q = queue_of(s, stream);
    order_with_legacy(s, q, is_legacy(stream));
    const uint64_t place = push(*q, [step = std::move(step)] {
        if (all().broken != cudaSuccess) return true; /* nothing runs on a broken device */
        return step();
    });
    pass_by(lock, *q);
    return {q, place};
}

void emu_enqueue(cudaStream_t stream, std::function<void()> work) {
    emu::enqueue(stream, [work = std::move(work)] {
        int code = cudaErrorLaunchFailure;
        if (emu::is_failing("kernel", &code)) {
            emu::break_device((cudaError_t)code);
            return true;
        }
        const emu::open_memory memory;
        work();
        return true;
    });
}

void emu::enqueue_after(cudaStream_t stream, const ticket &other) {
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    const queue_ptr q = queue_of(s, stream);
    push(*q, step_after(other.queue, other.place));
    pass_by(lock, *q);
}

bool emu::drive(const ticket &to) {
    std::unique_lock<std::mutex> lock(all().mutex);
    return run_to(lock, *to.queue, to.place);
}

bool emu::is_late() {
    const std::lock_guard<std::mutex> lock(all().mutex);
    return all().time == timing::late;
}

void emu::break_device(cudaError_t error) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    if (all().broken == cudaSuccess) all().broken = error;
    all().moved.notify_all();
}

bool emu::is_broken() {
    return all().broken != cudaSuccess;
}

int emu::current_device() {
    return device_of_thread;
}

cudaError_t emu::leave(cudaError_t error) {
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}

cudaError_t emu::enter(const char *name, cudaError_t otherwise) {
    int code = otherwise;
    if (all().broken != cudaSuccess) return leave(all().broken);
    if (!is_failing(name, &code)) return cudaSuccess;
    if (is_sticky((cudaError_t)code)) break_device((cudaError_t)code);
    return leave((cudaError_t)code);
}

void emu::wait_device(int device) {
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    std::vector<queue_ptr> queues = s.orphans;
    queues.push_back(legacy(s, device)->queue);
    for (cudaStream_t stream : s.streams) queues.push_back(stream->queue);
    for (const queue_ptr &q : queues)
        if (q->device == device) wait_for(lock, *q, q->n_queued);
    const auto is_empty = [](const queue_ptr &q) { return q->n_done == q->n_queued; };
    s.orphans.erase(std::remove_if(s.orphans.begin(), s.orphans.end(), is_empty), s.orphans.end());
}

void emu_time(const char *spec) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    read_time(all(), spec);
}

/* ---- the calls ---- */

cudaError_t cudaGetLastError(void) {
    const cudaError_t error = all().broken != cudaSuccess ? all().broken.load() : last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    return all().broken != cudaSuccess ? all().broken.load() : last_error;
}

cudaError_t cudaSetDevice(int device) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    int n = 0;
    if (cudaGetDeviceCount(&n) || device < 0 || device >= n)
        return emu::leave(cudaErrorInvalidDevice);
    device_of_thread = device;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream_p, unsigned flags) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const std::lock_guard<std::mutex> lock(all().mutex);
    cudaStream_t stream = new CUstream_st;
    stream->queue = std::make_shared<queue>();
    stream->queue->device = device_of_thread;
    stream->queue->is_blocking = !(flags & cudaStreamNonBlocking);
    all().streams.insert(stream);
    *stream_p = stream;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream_p) {
    return cudaStreamCreateWithFlags(stream_p, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream_p, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream_p, flags);
}

/* What is in it is still done, at the latest when the device is waited for. */
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    if (!s.streams.count(stream)) return emu::leave(cudaErrorInvalidResourceHandle);
    if (!stream->queue->steps.empty()) s.orphans.push_back(stream->queue);
    s.streams.erase(stream);
    delete stream;
    return s.broken;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    {
        std::unique_lock<std::mutex> lock(all().mutex);
        const queue_ptr q = queue_of(all(), stream);
        order_with_legacy(all(), q, is_legacy(stream));
        wait_for(lock, *q, q->n_queued);
    }
    emu::check_fences();
    return emu::leave(all().broken);
}

cudaError_t cudaDeviceSynchronize(void) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    emu::wait_device(device_of_thread);
    emu::check_fences();
    return emu::leave(all().broken);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    std::unique_lock<std::mutex> lock(all().mutex);
    const queue_ptr q = queue_of(all(), stream);
    const bool is_done = is_reached(lock, *q, q->n_queued);
    if (all().broken != cudaSuccess) return emu::leave(all().broken);
    return is_done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    const queue_ptr q = queue_of(s, stream);
    if (!event->queue || event->queue == q) return cudaSuccess; /* never recorded, or in order */
    push(*q, step_after(event->queue, event->place));
    pass_by(lock, *q);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event_p, unsigned flags) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    *event_p = new CUevent_st;
    (*event_p)->is_timed = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event_p) {
    return cudaEventCreateWithFlags(event_p, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return all().broken;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    state &s = all();
    std::unique_lock<std::mutex> lock(s.mutex);
    const queue_ptr q = queue_of(s, stream);
    const auto ms = std::make_shared<double>(0);
    order_with_legacy(s, q, is_legacy(stream));
    event->queue = q;
    event->ms = ms;
    event->place = push(*q, [ms] {
        *ms = now_ms();
        return true;
    });
    pass_by(lock, *q);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    std::unique_lock<std::mutex> lock(all().mutex);
    if (event->queue) wait_for(lock, *event->queue, event->place);
    return emu::leave(all().broken);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    std::unique_lock<std::mutex> lock(all().mutex);
    const bool is_done = !event->queue || is_reached(lock, *event->queue, event->place);
    if (all().broken != cudaSuccess) return emu::leave(all().broken);
    return is_done ? cudaSuccess : cudaErrorNotReady;
}

/* Of the host's clock: monotonic, and says nothing about a GPU. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    if (const cudaError_t error = emu::enter(__func__)) return error;
    const std::lock_guard<std::mutex> lock(all().mutex);
    if (!start->queue || !end->queue || !start->is_timed || !end->is_timed)
        return emu::leave(cudaErrorInvalidResourceHandle);
    if (start->queue->n_done < start->place || end->queue->n_done < end->place)
        return cudaErrorNotReady;
    *ms = (float)(*end->ms - *start->ms);
    return cudaSuccess;
}
