// The C interface: which paths this CPU can run, and each operation cut into tasks over torch's own threads.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// Paths ------------------------------------------------------------------------------------------------------------

// Whether the system lets this process use tiles: it is asked, for all its threads (arch_prctl, ARCH_REQ_XCOMP_PERM)
bool may_use_tiles() {
#if defined(DELTAW_EMULATED_TILES)
    return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

// Bits: 1 AVX2 + FMA + F16C, 2 AVX-512 F + BW + DQ + VL, 4 AVX512-BF16, 8 AMX-TILE + BF16; each only if the system saves
// the registers.
int cpu_features() {
#if defined(__x86_64__)
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    const bool avx2 = ymm && fma && f16c && (b >> 5 & 1);
    const bool avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
#if defined(DELTAW_EMULATED_TILES)
    const bool amx = true;
#else
    const bool amx = (d >> 24 & 1) && (d >> 22 & 1) && (low & 0x60000) == 0x60000;
#endif
    const bool bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return avx2 | avx512 << 1 | bf16 << 2 | (bf16 && amx && may_use_tiles()) << 3;
#else
    return 0;
#endif
}

// By number; null where this build or this CPU lacks it.
const Path* path_at(int at) {
    static const int features = cpu_features();
    if (at == 0) return path_scalar();
    if (at == 1 && (features & 1)) return path_avx2();
    if (at == 2 && (features & 2)) return path_avx512();
    if (at == 3 && (features & 4)) return path_avx512_bf16();
    if (at == 4 && (features & 8) && path_avx512_bf16()) return path_amx();
    return nullptr;
}

// Memory -------------------------------------------------------------------------------------------------------------
//
// What a call needs for itself lies in a stretch of the calling thread's own, which stays for its next call. Taken from
// the heap and given back each time, such pieces leave holes: what is small settles between them.

struct OwnRoom {
    char* at = nullptr;
    size_t size = 0;
    ~OwnRoom() {
        if (at) munmap(at, size);
    }
};

// `bytes` at a multiple of 64, valid until this thread's next call of it; null without memory
char* room_of(int64_t bytes) {
    static thread_local OwnRoom own;
    if (own.at && size_t(bytes) <= own.size) return own.at;
    if (own.at) munmap(own.at, own.size);
    own.size = (size_t(bytes) | 0xffff) + 1;
    void* found = mmap(nullptr, own.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    own.at = found == MAP_FAILED ? nullptr : (char*)found;
    if (!own.at) own.size = 0;
    return own.at;
}

// Threads ------------------------------------------------------------------------------------------------------------
//
// GOMP_parallel is what `#pragma omp parallel` calls. Python hands us torch's own copy of it, so there is one pool,
// whatever file torch keeps it in. Without one, everything runs in the calling thread.

using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);
Gomp gomp_parallel = nullptr;

struct Job {
    void (*run)(const void* task, int64_t first, int64_t last);
    const void* task;
    int64_t n, grain, threads, unit, next;
};

// Whoever is free takes the next portion: a core that others want does not hold up the rest. A portion is half of a
// fair share of what is left, so that most of a thread's work is one stream of memory and the ends still meet.
void work(void* data) {
    Job& job = *(Job*)data;
    int64_t first = __atomic_load_n(&job.next, __ATOMIC_RELAXED);
    while (first < job.n) {
        const int64_t fair = (job.n - first) / (2 * job.threads) / job.unit * job.unit;
        const int64_t size = fair > job.grain ? fair : job.grain;
        if (!__atomic_compare_exchange_n(&job.next, &first, first + size, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            continue;  // another took it: `first` is now where the rest begins
        job.run(job.task, first, first + size < job.n ? first + size : job.n);
        first = __atomic_load_n(&job.next, __ATOMIC_RELAXED);
    }
}

// n items worth `cost` bytes each: portions of 64 KB or more, one thread if all is less than two of them.
template <class Task>
void share(const Task& task, int64_t n, int64_t cost, int threads, int64_t unit = 8) {
    int64_t grain = 65536 / (cost < 1 ? 1 : cost);
    grain = grain < 1 ? 1 : (grain + unit - 1) / unit * unit;
    if (threads < 2 || !gomp_parallel || n < 2 * grain) return task(0, n);
    Job job = {[](const void* t, int64_t first, int64_t last) { (*(const Task*)t)(first, last); }, &task, n, grain,
               threads, unit, 0};
    gomp_parallel(work, &job, unsigned(threads), 0);
}

struct Queue {
    void (*run)(const void* task, int64_t at, int64_t thread);
    const void* task;
    int64_t n, next, threads;
};

void serve(void* data) {
    Queue& q = *(Queue*)data;
    const int64_t thread = __atomic_fetch_add(&q.threads, 1, __ATOMIC_RELAXED);
    for (int64_t at; (at = __atomic_fetch_add(&q.next, 1, __ATOMIC_RELAXED)) < q.n;) q.run(q.task, at, thread);
}

// task(at, thread) for each of n, in that order; `thread` below `threads`
template <class Task>
void each(const Task& task, int64_t n, int threads) {
    Queue q = {[](const void* t, int64_t at, int64_t thread) { (*(const Task*)t)(at, thread); }, &task, n, 0, 0};
    if (threads < 2 || !gomp_parallel || n < 2) return serve(&q);
    gomp_parallel(serve, &q, unsigned(threads), 0);
}

struct Two {
    Queue front;
    Job back;
    int64_t threads;
};

void take_two(void* data) {
    Two& two = *(Two*)data;
    if (__atomic_fetch_add(&two.threads, 1, __ATOMIC_RELAXED) % 2) work(&two.back), serve(&two.front);
    else serve(&two.front), work(&two.back);
}

// Both tasks at once: every other thread begins with front(at, thread) for each of n_front, the rest with portions of
// back(first, last); who is done with one helps with the other. For what waits for memory beside what computes.
template <class Front, class Back>
void beside(const Front& front, int64_t n_front, const Back& back, int64_t n_back, int threads) {
    Two two = {{[](const void* t, int64_t at, int64_t thread) { (*(const Front*)t)(at, thread); }, &front, n_front, 0, 0},
               {[](const void* t, int64_t first, int64_t last) { (*(const Back*)t)(first, last); }, &back, n_back, 2,
                threads < 1 ? 1 : threads, 2, 0},
               0};
    if (threads < 2 || !gomp_parallel) return take_two(&two);
    gomp_parallel(take_two, &two, unsigned(threads), 0);
}

}  // namespace

#include "documents.h"
#include "step.h"
#include "bands.h"

#define DELTAW_API extern "C" __attribute__((visibility("default")))

// Every call returns 0, or 1 for a path that is not there, or 2 without memory.

DELTAW_API const char* deltaw_sources() { return "deltaw-sources:" DELTAW_SOURCES; }

DELTAW_API const char* deltaw_path(int at) {
    const Path* path = path_at(at);
    return path ? path->name : nullptr;
}

DELTAW_API void deltaw_threads_from(void* parallel) { gomp_parallel = (Gomp)parallel; }

DELTAW_API int deltaw_quantise(int at, int threads, const Quantise* q) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const int64_t block = int64_t(1) << q->block_log2, n_blocks = (q->n + block - 1) / block;
    share([&](int64_t first, int64_t last) { path->quantise(*q, first, last); }, n_blocks, 4 * block, threads);
    return 0;
}

DELTAW_API int deltaw_quantise_dynamic(int at, int threads, const Dynamic* d) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const int64_t n_blocks = (d->n + d->block - 1) / d->block;
    const auto task = [&](int64_t first, int64_t last) { path->quantise_dynamic(*d, first, last); };
    share(task, n_blocks, 4 * d->block, threads);
    return 0;
}

DELTAW_API int deltaw_dequantise_dynamic(int at, int threads, const Dynamic* d) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const int64_t n_blocks = (d->n + d->block - 1) / d->block;
    const auto task = [&](int64_t first, int64_t last) { path->dequantise_dynamic(*d, first, last); };
    share(task, n_blocks, 4 * d->block, threads);
    return 0;
}

DELTAW_API int deltaw_dequantise(int at, int threads, const Dequantise* d) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const int64_t cost = (d->col1 - d->col0) * (d->dtype == F32 ? 4 : 2);
    share([&](int64_t first, int64_t last) { path->dequantise(*d, first, last); }, d->row1 - d->row0, cost, threads);
    return 0;
}

DELTAW_API int deltaw_product(int at, int threads, const Product* p) {
    const Path* path = path_at(at);
    if (!path) return 1;
    void* scratch = room_of(path->product_scratch(*p));
    if (!scratch) return 2;
    path->product_prepare(*p, scratch);
    const int64_t cost = p->m.cols * p->m.bits / 8 * (p->n < 8 ? 1 : p->n / 4);
    share([&](int64_t first, int64_t last) { path->product(*p, scratch, first, last); }, p->m.rows, cost, threads,
          PANEL);
    return 0;
}

// Bytes of room for a wide product of n rows and so many panels; 0 where there are no such products
DELTAW_API int64_t deltaw_wide_room(int at, int threads, int64_t n, int64_t panels) {
    const Path* path = path_at(at);
    if (!path || !path->wide) return 0;
    const int64_t parts = row_parts(n, panels, threads);
    return up_to(path->wide->scratch((n + parts - 1) / parts), 4096) * threads + 4096;
}

DELTAW_API int deltaw_wide(int at, int threads, const Wide* w, char* room) {
    const Path* path = path_at(at);
    if (!path || !path->wide) return 1;
    const WideKernels& wide = *path->wide;
    int64_t panels = 0;
    for (int64_t b = 0; b < w->n_bands; ++b) panels += panels_of(*w, b, wide.span);
    const int64_t parts = row_parts(w->n, panels, threads), own = up_to(wide.scratch((w->n + parts - 1) / parts), 4096);
    const int64_t units = panels * parts;
    if (!gomp_parallel || threads < 1) threads = 1;
    char* shelf = room_of(int64_t(sizeof(Stretch)) * (units + 1) + int64_t(sizeof(Share)) * threads);
    if (!shelf) return 2;
    auto* stretches = (Stretch*)shelf;
    auto* shares = (Share*)(stretches + units + 1);
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t n = share_of(*w, wide, panels, parts, units * t / threads, units * (t + 1) / threads, stretches);
        shares[t] = {stretches, n, 0};
        stretches += n;
    }
    room = (char*)up_to((int64_t)room, 4096);
    each([&](int64_t, int64_t thread) {
        serve_shares(shares, threads, thread, [&](const Stretch& s) {
            wide.group(w->bands[s.band], s.column, s.columns, s.row0, s.row1, room + thread * own);
        });
    }, threads, threads);
    return 0;
}

// The sum of n bytes read as floats, by the threads and portions of the others: what bandwidth there is.
DELTAW_API int deltaw_read(int at, int threads, const uint8_t* bytes, int64_t n, float* out) {
    const Path* path = path_at(at);
    if (!path) return 1;
    float total = 0;  // added in whatever order: the sum of ones is exact, others only have to be read
    share(
        [&](int64_t first, int64_t last) {
            const float part = path->read_sum(bytes, first, last);
            float before, after;
            __atomic_load(&total, &before, __ATOMIC_RELAXED);
            do after = before + part;
            while (!__atomic_compare_exchange(&total, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        },
        n / 64, 64, threads);
    *out = total;
    return 0;
}

DELTAW_API int deltaw_attend(int at, int threads, const Attention* t) {
    const Path* path = path_at(at);
    return path ? Attending(path, threads, *t, false).run() : 1;
}

DELTAW_API int deltaw_attend_backward(int at, int threads, const Attention* t) {
    const Path* path = path_at(at);
    return path ? Attending(path, threads, *t, true).run() : 1;
}

// Elementwise operations of transformer blocks -------------------------------------------------------------------------

namespace {

template <class Task>
int share_elementwise(int at, int threads, void (*Elementwise::*kernel)(const Task&, int64_t, int64_t), const Task* task,
                      int64_t n, int64_t cost) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const auto run = path->elementwise->*kernel;
    share([&](int64_t first, int64_t last) { run(*task, first, last); }, n, cost, threads);
    return 0;
}

int64_t bytes(int64_t n, int32_t dtype) { return n * (dtype == F32 ? 4 : 2); }

}  // namespace

DELTAW_API int deltaw_rms_norm(int at, int threads, const RmsNorm* t) {
    return share_elementwise(at, threads, &Elementwise::rms_norm, t, t->n, bytes(2 * t->d, t->dtype));
}

DELTAW_API int deltaw_rms_norm_backward(int at, int threads, const RmsNormBackward* t) {
    const int64_t n_chunks = (t->n + t->chunk - 1) / t->chunk, cost = bytes(3 * t->chunk * t->d, t->dtype);
    return share_elementwise(at, threads, &Elementwise::rms_norm_backward, t, n_chunks, cost);
}

DELTAW_API int deltaw_rotate(int at, int threads, const Rotate* t) {
    return share_elementwise(at, threads, &Elementwise::rotate, t, t->n, bytes(2 * t->heads * t->r, t->dtype));
}

DELTAW_API int deltaw_gated(int at, int threads, const Gated* t) {
    return share_elementwise(at, threads, &Elementwise::gated, t, t->n, bytes(3 * t->f, t->dtype));
}

DELTAW_API int deltaw_gated_backward(int at, int threads, const Gated* t) {
    return share_elementwise(at, threads, &Elementwise::gated_backward, t, t->n, bytes(6 * t->f, t->dtype));
}

DELTAW_API int deltaw_cross_entropy(int at, int threads, const CrossEntropy* t) {
    return share_elementwise(at, threads, &Elementwise::cross_entropy, t, t->n, bytes(3 * t->v, t->dtype));
}

// Products as thin as a rank -------------------------------------------------------------------------------------------

DELTAW_API int deltaw_thin(int at, int threads, const Thin* t) {
    const Path* path = path_at(at);
    if (!path || !path->thin) return 1;
    const ThinKernels& thin = *path->thin;
    void* scratch = room_of(thin.scratch(*t));
    if (!scratch) return 2;
    thin.prepare(*t, scratch);
    share([&](int64_t first, int64_t last) { thin.back(*t, scratch, first, last); }, (t->n + t->chunk - 1) / t->chunk,
          2 * t->cols * t->chunk, threads);
    return 0;
}

DELTAW_API int deltaw_has_thin(int at) {
    const Path* path = path_at(at);
    return path && path->thin;
}

// Serving --------------------------------------------------------------------------------------------------------------

// k and v [n, shared, dim] of `type` into their slots, then attention
DELTAW_API int deltaw_paged(int at, int threads, const Paged* t, const void* k, const void* v, const int64_t* slots) {
    const Path* path = path_at(at);
    if (!path) return 1;
    if (!gomp_parallel) threads = 1;
    const int64_t n = t->bounds[t->sequences], width = t->shared * t->dim;
    path->serving->paged_put(k, width, t->type, (void*)t->keys, width, slots, n, width, t->dtype);
    path->serving->paged_put(v, width, t->type, (void*)t->values, width, slots, n, width, t->dtype);
    Pieces count = {nullptr, 0};
    paged_room(path, *t, threads, count);
    char* room = room_of(count.used + 64);
    if (!room) return 2;
    Pieces pieces = {room, 0};
    paged_attention(path, *t, paged_room(path, *t, threads, pieces), threads);
    return 0;
}

// Bytes of t->room
DELTAW_API int64_t deltaw_step_room(int at, int threads, const Step* t) {
    const Path* path = path_at(at);
    Pieces count = {nullptr, 0};
    if (path) Runs(path, *t, threads, count);
    return count.used;
}

DELTAW_API int deltaw_step(int at, int threads, const Step* t) {
    const Path* path = path_at(at);
    if (!path) return 1;
    Pieces pieces = {(char*)t->room, 0};
    return Runs(path, *t, threads, pieces).all();
}

// One product of a step by itself, for tests and benches
DELTAW_API int deltaw_dense(int at, int threads, const Dense* t) {
    const Path* path = path_at(at);
    if (!path) return 1;
    const int64_t cost = PANEL * t->cols * (t->dtype == F32 ? 4 : 2) * (1 + t->n / 8);
    share([&](int64_t first, int64_t last) { path->serving->dense(*t, first, last); }, (t->rows + PANEL - 1) / PANEL,
          cost, threads, 1);
    return 0;
}

DELTAW_API int deltaw_likeliest(int at, int threads, const Likeliest* t) {
    const Path* path = path_at(at);
    if (!path) return 1;
    share([&](int64_t first, int64_t last) { path->serving->likeliest(*t, first, last); }, t->n, 4 * t->v, threads, 1);
    return 0;
}

DELTAW_API int deltaw_reads_pairs(int at) {
    const Path* path = path_at(at);
    return path && path->serving->pairs;
}
