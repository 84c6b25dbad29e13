// One step of a Llama-like network over the rows of many sequences, in one call: between its stages nothing returns to
// Python. Included by dispatch.cpp, whose `share` and `each` cut the stages into tasks.
//
//   for each layer    n = norm(h)   q k v = maps(n)   o = attention over pages(rope(q), rope(k), v)   h += output(o)
//                     n = norm(h)   h += down(act(gate(n)) up(n))
//
// What adapters add, W' x = gain (W (in_gain x) + B A x) + bias, is done for the rows of each segment: A x beside the
// product of all rows, the rest where the stage behind it reads the columns.
#pragma once
#include <string.h>

#include "native.h"

namespace {

constexpr int64_t SPLIT = 256;    // keys of a part of a long context: fixed, so that results are
constexpr int64_t FEW = 4;        // new rows of a sequence up to which its context is split
constexpr int64_t QUERIES_OF_PART = 144;
constexpr int64_t COLUMNS = 64;   // that are finished together
constexpr int64_t PARTED = 96;    // rows of a step from which adapters' changes are made with the base's product
constexpr int64_t SHORT = 6;      // rows of a segment whose changes are never: reading them takes longer than computing
constexpr int64_t CHUNK = 64;     // rows whose u a thread makes at a time

int64_t up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory in pieces; with base null only their size is counted
struct Pieces {
    char* base;
    int64_t used;
    template <class T>
    T* take(int64_t n) {
        T* out = (T*)(base + used);
        used += up_to(n * int64_t(sizeof(T)), 64);
        return out;
    }
};

// Attention over pages ------------------------------------------------------------------------------------------------

// Calls visit(part, joined, of) for each part: of how many, and that number again at the first of them, else 0
template <class Visit>
void parts_of(const Paged& t, Visit visit) {
    const int64_t block = larger(1, QUERIES_OF_PART / t.heads);
    for (int64_t s = 0; s < t.sequences; ++s) {
        const int64_t rows = t.bounds[s + 1] - t.bounds[s], context = t.contexts[s];
        if (rows <= FEW) {
            const int64_t end = context + rows, start = larger(0, context - t.window + 1);
            const int64_t n = rows ? (end - 1) / SPLIT - start / SPLIT + 1 : 0;
            for (int64_t k = 0; k < n; ++k) {
                const int64_t from = (start / SPLIT + k) * SPLIT;
                visit(PagedPart{s, 0, rows, larger(start, from), smaller(end, from + SPLIT), nullptr}, k ? 0 : n, n);
            }
            continue;
        }
        for (int64_t last = rows; last > 0; last -= smaller(block, last)) {  // the longest first
            const int64_t first = larger(0, last - block), start = larger(0, context + first - t.window + 1);
            visit(PagedPart{s, first, last - first, start, context + last, nullptr}, 1, 1);
        }
    }
}

struct Portion {
    PagedPart part;
    int64_t joined;  // parts of the same rows that begin here; 0: not the first, 1: alone
};

struct PagedRoom {
    Portion* portions;
    float* sums;
    char* scratch;
    int64_t n, own, n_sums;
};

PagedRoom paged_room(const Path* path, const Paged& t, int threads, Pieces& pieces) {
    PagedRoom out = {};
    int64_t most_rows = 0;
    parts_of(t, [&](const PagedPart& part, int64_t, int64_t of) {
        out.n += 1;
        if (of > 1) out.n_sums += part.rows * t.heads * (up_to(t.dim, 16) + 16);
        most_rows = larger(most_rows, part.rows);
    });
    out.own = up_to(path->serving->paged_scratch(t, most_rows), 64);
    out.portions = pieces.take<Portion>(out.n);
    out.sums = pieces.take<float>(out.n_sums);
    out.scratch = pieces.take<char>(out.own * (threads < 1 ? 1 : threads));
    return out;
}

void paged_attention(const Path* path, const Paged& t, const PagedRoom& room, int threads) {
    float* sums = room.sums;
    int64_t n = 0;
    double work = 0;
    bool split = false;
    parts_of(t, [&](PagedPart part, int64_t joined, int64_t of) {
        if (of > 1) part.sums = sums, sums += part.rows * t.heads * (up_to(t.dim, 16) + 16), split = true;
        room.portions[n++] = {part, joined};
        work += double(part.rows) * double(part.last - part.first);
    });
    if (work * double(t.heads * t.dim) < 1 << 16) threads = 1;
    each([&](int64_t at, int64_t thread) {
        path->serving->paged(t, room.portions[at].part, room.scratch + thread * room.own);
    }, n, threads);
    if (!split) return;
    each([&](int64_t at, int64_t) {
        const Portion& p = room.portions[at];
        if (p.joined > 1) path->serving->paged_join(t, p.part, p.joined, p.part.sums);
    }, n, threads);
}

// A step --------------------------------------------------------------------------------------------------------------

struct Task {  // a product of a stage: panels of rows of a matrix
    Dense dense;
    Product product;  // of a matrix in few bits
    void* scratch;
    int64_t panels;
    bool packed;
};

struct Runs {
    const Path* path;
    const Serving& s;
    const Step& t;
    int threads;
    int32_t type;
    int64_t size;  // bytes of a value that products read
    int64_t nx, dx, ox, fx, mx, u_stride, wide;
    char *normed, *other, *attended, *gated, *inner;
    char* u;  // A x of every row
    float *y, *more, *apart;
    bool aside = false;  // whether `apart` holds what adapters add to y for the rows of some segments: B u
    Task* tasks;
    Low* lows;
    Added* added;
    PagedRoom paged;
    Paged attention;

    Runs(const Path* p, const Step& step, int n_threads, Pieces& pieces)
        : path(p), s(*p->serving), t(step), threads(n_threads) {
        type = t.dtype == BF16 && s.pairs ? BF16 : F32;
        size = type == BF16 ? 2 : 4;
        nx = t.n + 8;
        const int64_t heads = (t.heads + 2 * t.shared) * t.dim;
        dx = up_to(t.d, 32), ox = up_to(t.heads * t.dim, 32), fx = up_to(t.f, 32);
        wide = larger(larger(heads, 2 * t.f), t.d);
        int64_t rank = 0, m = 0;
        for (int64_t i = 0; i < t.n_segments; ++i)
            for (int64_t l = 0; l < t.n_layers && t.segments[i].worn; ++l) {
                const Worn& worn = t.segments[i].worn[l];
                for (const Changes& c : worn.groups) rank = larger(rank, c.rank);
                for (const Net& net : worn.nets) m = larger(m, net.m);
            }
        for (int64_t i = 0; i < t.n_head_segments; ++i)
            if (t.head_segments[i].head) rank = larger(rank, t.head_segments[i].head->rank);
        u_stride = up_to(rank, 16), mx = up_to(m, 32);
        normed = pieces.take<char>(nx * dx * size);
        other = pieces.take<char>(nx * larger(larger(dx, ox), fx) * size);
        attended = pieces.take<char>(nx * ox * size);
        gated = pieces.take<char>(nx * fx * size);
        inner = pieces.take<char>(nx * mx * size);
        y = pieces.take<float>(nx * wide);
        u = pieces.take<char>(nx * u_stride * size);
        apart = pieces.take<float>(rank ? nx * wide : 0);
        more = pieces.take<float>(m ? nx * larger(mx, t.d) : 0);
        tasks = pieces.take<Task>(3);
        const int64_t segments = larger(t.n_segments, t.n_head_segments);
        lows = pieces.take<Low>(segments + t.n / CHUNK);
        added = pieces.take<Added>(3 * segments);
        attention = {y, attended, nullptr, nullptr, t.bounds, t.contexts, t.tables, t.sequences, t.width, t.heads,
                     t.shared, t.dim, INT64_MAX / 2, ox, heads, t.scale, t.dtype, F32, type};
        paged = paged_room(path, attention, threads, pieces);  // without a window: at least as many parts as with one
    }

    // Products --------------------------------------------------------------------------------------------------------

    Task task(const Linear& map, const void* x, int64_t x_stride, float* out, int64_t out_stride, int64_t n) const {
        Task made = {};
        made.packed = map.packed != nullptr;
        made.panels = up_to(map.rows, PANEL) / PANEL;
        made.dense = {map.dense, x, out, nullptr, map.rows, map.cols, n, x_stride, out_stride, 0, t.dtype, type};
        if (made.packed) made.product = {*map.packed, x, nullptr, out, n, x_stride, out_stride, type, F32};
        return made;
    }

    // The tasks, shared out by panels; beside them front(at, thread) for each of n_front
    int run(int64_t n) const { return run(n, 0, [](int64_t, int64_t) {}); }
    template <class Front>
    int run(int64_t n, int64_t n_front, Front front) const {
        int64_t total = 0, bytes = 0;
        int problem = 0;
        for (int64_t i = 0; i < n; ++i) {
            Task& one = tasks[i];
            total += one.panels;
            bytes += one.panels * PANEL * one.dense.cols * (one.packed ? 1 : t.dtype == F32 ? 4 : 2) * (1 + one.dense.n / 8);
            if (!one.packed) continue;
            one.scratch = aligned_alloc(64, size_t(up_to(path->product_scratch(one.product) + 64, 64)));
            if (!one.scratch) problem = 2;
            else path->product_prepare(one.product, one.scratch);
        }
        const auto panels = [&](int64_t first, int64_t last) {
            for (int64_t i = 0, at = 0; i < n && at < last; at += tasks[i++].panels) {
                const Task& one = tasks[i];
                const int64_t from = larger(first - at, 0), to = smaller(last - at, one.panels);
                if (from >= to) continue;
                if (!one.packed) {
                    s.dense(one.dense, from, to);
                    continue;
                }
                path->product(one.product, one.scratch, from * PANEL, smaller(to * PANEL, one.dense.rows));
                for (int64_t k = 0; k < one.dense.n_added; ++k)
                    s.thin(one.dense.added[k], one.dense.y, one.dense.y_stride, one.dense.rows, from, to, false);
            }
        };
        if (!problem && n_front) beside(front, n_front, panels, total, threads);
        else if (!problem && total) share(panels, total, bytes / total, threads, 2);
        for (int64_t i = 0; i < n; ++i) free(tasks[i].scratch);
        return problem;
    }

    // What adapters add ---------------------------------------------------------------------------------------------

    Low low(const Changes& c, const char* x, int64_t x_stride, int64_t cols, int64_t first, int64_t last) const {
        return {c.a, x + first * x_stride * size, u + first * u_stride * size, c.rank, cols, last - first, x_stride,
                u_stride, t.dtype, type};
    }

    // Of map m for the rows of a segment; b is null where there is nothing
    Added change(const Segment& seg, const Changes& c, int64_t m) const {
        int64_t before = 0;
        for (int64_t k = 0; k < m; ++k) before += c.of[k].rank;
        return {c.of[m].b, u + (seg.first * u_stride + before) * size, seg.first, seg.last, c.of[m].rank, u_stride, t.dtype};
    }

    // Whether what is added to a segment's rows is made apart from y
    bool is_apart(const Segment& seg) const { return aside && (t.n < PARTED || seg.last - seg.first < SHORT); }

    // y = the maps at x, side by side, and what adapters add: B u, u = A x of each segment. `changes` gives those of a
    // segment, or null. Few rows' factors are a stream of memory, read beside the base's arithmetic, and B u lies apart.
    template <class Of>
    int multiply(const Linear* maps, int64_t n_maps, const char* x, int64_t x_stride, float* out, int64_t out_stride,
                 const Segment* segments, int64_t n_segments, int64_t n, Of changes) {
        const int64_t cols = maps[0].cols;
        bool gains = false;
        for (int64_t i = 0; i < n_segments; ++i)
            for (int64_t m = 0; m < n_maps; ++m)
                if (const Changes* c = changes(segments[i])) gains |= c->of[m].in_gain != nullptr;
        aside = !gains && out == y;
        int64_t n_lows = 0, n_apart = 0, pending = 0;
        for (int64_t i = 0; i < n_segments; ++i) {
            const Segment& seg = segments[i];
            const Changes* c = changes(seg);
            if (!c || !c->rank) continue;
            if (is_apart(seg)) n_apart = n_segments;
            else
                for (int64_t at = seg.first; at < seg.last; at += CHUNK)
                    lows[n_lows++] = low(*c, x, x_stride, cols, at, smaller(at + CHUNK, seg.last));
        }
        each([&](int64_t at, int64_t) { s.low(lows[at]); }, n_lows, threads);
        for (int64_t m = 0, at = 0; m < n_maps; at += maps[m++].rows) {
            Added* of_map = added + m * n_segments;
            int64_t n_added = 0;
            bool gained = false;
            for (int64_t i = 0; i < n_segments; ++i)
                if (const Changes* c = changes(segments[i])) {
                    gained |= c->of[m].in_gain != nullptr;
                    if (c->of[m].b && !is_apart(segments[i])) of_map[n_added++] = change(segments[i], *c, m);
                }
            for (int64_t i = 0; gained && i < n_segments; ++i) {
                const Changes* c = changes(segments[i]);
                const int64_t from = segments[i].first * x_stride * size;
                s.gains(x + from, other + from, c ? c->of[m].in_gain : nullptr, segments[i].last - segments[i].first,
                        maps[m].cols, x_stride, type);
            }
            tasks[pending] = task(maps[m], gained ? other : x, x_stride, out + at, out_stride, n);
            tasks[pending].dense.added = of_map, tasks[pending++].dense.n_added = n_added;
            if (gains) {
                if (const int problem = run(pending)) return problem;
                pending = 0;
            }
        }
        if (!pending) return 0;
        return run(pending, n_apart, [&](int64_t i, int64_t) {
            const Segment& seg = segments[i];
            const Changes* c = changes(seg);
            if (!c || !c->rank || !is_apart(seg)) return;
            s.low(low(*c, x, x_stride, cols, seg.first, seg.last));
            float* to = apart;
            for (int64_t m = 0; m < n_maps; to += maps[m++].rows)
                if (c->of[m].b)
                    s.thin(change(seg, *c, m), to, out_stride, maps[m].rows, 0, up_to(maps[m].rows, PANEL) / PANEL, true);
        });
    }

    // Columns [first, last) of map m of a group, for a segment; its output begins at `out`
    void finish(const Segment& seg, const Changes* c, const Linear* maps, int64_t m, float* out, int64_t out_stride,
                int64_t first, int64_t last) const {
        const int64_t rows = seg.last - seg.first, from = seg.first * out_stride;
        if (c && c->of[m].b && is_apart(seg))
            s.add(out + from + first, apart + (out - y) + from + first, rows, out_stride, out_stride, last - first, 1);
        s.finish({out + from, c ? &c->of[m] : nullptr, maps[m].bias, rows, out_stride}, first, last);
    }

    // block(segment, first, last) over all units of every segment, many at a time where there are many
    template <class Block>
    void blocks(const Segment* segments, int64_t n_segments, int64_t n, int64_t units, int64_t cost, Block block) const {
        const int64_t each = smaller(units, larger(1, units * n_segments / (16 * larger(threads, 1))));
        const int64_t of_one = (units + each - 1) / each;
        share([&](int64_t first, int64_t last) {
            for (int64_t at = first; at < last; ++at) {
                const int64_t from = at % of_one * each;
                block(segments[at / of_one], from, smaller(from + each, units));
            }
        }, n_segments * of_one, each * cost * (n / larger(n_segments, 1) + 1), threads, 1);
    }

    static const Changes* of(const Segment& seg, int64_t layer, int group) {
        return seg.worn ? &seg.worn[layer].groups[group] : nullptr;
    }

    // Halves ----------------------------------------------------------------------------------------------------------

    void norm(const float* gain, float eps, const int64_t* rows, char* out, int64_t n) const {
        const Normed task = {t.hidden, out, gain, rows, t.d, dx, eps, type};
        share([&](int64_t first, int64_t last) { s.norm(task, first, last); }, n, 8 * t.d, threads, 1);
    }

    // Heads [first, last) of queries, keys or values (part), which begin at head `before`
    void heads(const Segment& seg, int64_t l, int part, int64_t before, int64_t first, int64_t last) const {
        const Layer& layer = t.layers[l];
        const int64_t stride = (t.heads + 2 * t.shared) * t.dim, n = seg.last - seg.first;
        const bool one = layer.n_inputs == 1;
        const int64_t column = one ? 0 : before * t.dim;
        finish(seg, of(seg, l, 0), layer.inputs, one ? 0 : part, y + column, stride, first * t.dim - column,
               last * t.dim - column);
        const float* gain = part == 0 ? layer.q_norm : part == 1 ? layer.k_norm : nullptr;
        for (int64_t j = first; j < last; ++j) {
            float* at = y + seg.first * stride + j * t.dim;
            if (gain) s.head_norm(at, n, stride, t.dim, gain, layer.head_eps);
            if (part < 2) s.turn(at, n, stride, t.cos + seg.first * t.turned, t.sin + seg.first * t.turned, t.turned);
        }
        if (part == 0) return;
        const int64_t bytes = (first - before) * t.dim * (t.dtype == F32 ? 4 : 2);
        s.paged_put(y + seg.first * stride + first * t.dim, stride, F32,
                    (char*)(part == 1 ? layer.keys : layer.values) + bytes, t.shared * t.dim, t.slots + seg.first, n,
                    (last - first) * t.dim, t.dtype);
    }

    int attend(int64_t l) {
        const Layer& layer = t.layers[l];
        const int64_t stride = (t.heads + 2 * t.shared) * t.dim;
        norm(layer.norm, layer.eps, nullptr, normed, t.n);
        const auto inputs = [&](const Segment& seg) { return of(seg, l, 0); };
        if (const int problem = multiply(layer.inputs, layer.n_inputs, normed, dx, y, stride, t.segments, t.n_segments,
                                         t.n, inputs))
            return problem;
        blocks(t.segments, t.n_segments, t.n, t.heads + 2 * t.shared, 16 * t.dim,
               [&](const Segment& seg, int64_t first, int64_t last) {
                   for (int64_t part = 0, before = 0; part < 3; before += part++ ? t.shared : t.heads) {
                       const int64_t from = larger(first, before);
                       const int64_t to = smaller(last, before + (part ? t.shared : t.heads));
                       if (from < to) heads(seg, l, int(part), before, from, to);
                   }
               });
        Paged task = attention;
        task.keys = layer.keys, task.values = layer.values, task.window = layer.window;
        paged_attention(path, task, paged, threads);
        return output(l, layer.output, 1, attended, ox);
    }

    int feed(int64_t l) {
        const Layer& layer = t.layers[l];
        norm(layer.gate_norm, layer.gate_eps, nullptr, normed, t.n);
        const auto inputs = [&](const Segment& seg) { return of(seg, l, 2); };
        if (const int problem = multiply(layer.gates, layer.n_gates, normed, dx, y, 2 * t.f, t.segments, t.n_segments,
                                         t.n, inputs))
            return problem;
        const int64_t n_blocks = up_to(t.f, COLUMNS) / COLUMNS, stride = 2 * t.f;
        blocks(t.segments, t.n_segments, t.n, n_blocks, 24 * COLUMNS, [&](const Segment& seg, int64_t from, int64_t to) {
            const int64_t first = from * COLUMNS, last = smaller(t.f, to * COLUMNS);
            const Changes* c = inputs(seg);
            finish(seg, c, layer.gates, 0, y, stride, first, last);
            if (layer.n_gates == 1) finish(seg, c, layer.gates, 0, y, stride, t.f + first, t.f + last);
            else finish(seg, c, layer.gates, 1, y + t.f, stride, first, last);
            const float* gate = y + seg.first * stride + first;
            s.gate(gate, gate + t.f, seg.last - seg.first, stride, last - first, t.act,
                   gated + (seg.first * fx + first) * size, fx, type);
        });
        return output(l, layer.down, 3, gated, fx);
    }

    // h += the half's output map at x, and its small network
    int output(int64_t l, const Linear& map, int group, const char* x, int64_t x_stride) {
        const auto changes = [&](const Segment& seg) { return of(seg, l, group); };
        if (const int problem = multiply(&map, 1, x, x_stride, y, t.d, t.segments, t.n_segments, t.n, changes))
            return problem;
        blocks(t.segments, t.n_segments, t.n, up_to(t.d, COLUMNS) / COLUMNS, 16 * COLUMNS,
               [&](const Segment& seg, int64_t from, int64_t to) {
                   const int64_t first = from * COLUMNS, last = smaller(t.d, to * COLUMNS);
                   finish(seg, changes(seg), &map, 0, y, t.d, first, last);
                   s.add(t.hidden + seg.first * t.d + first, y + seg.first * t.d + first, seg.last - seg.first, t.d,
                         t.d, last - first, 1);
               });
        for (int64_t i = 0; i < t.n_segments; ++i) {
            const Segment& seg = t.segments[i];
            if (seg.worn && seg.worn[l].nets[group / 2].down)
                if (const int problem = net(seg, seg.worn[l].nets[group / 2])) return problem;
        }
        return 0;
    }

    int net(const Segment& seg, const Net& net) const {
        const int64_t n = seg.last - seg.first;
        if (!net.parallel) s.narrow(y + seg.first * t.d, other, n, t.d, dx, t.d, type);
        const char* x = net.parallel ? normed + seg.first * dx * size : other;
        const int64_t stride = larger(mx, t.d);
        tasks[0] = task({net.down, nullptr, nullptr, net.m, t.d}, x, dx, more, stride, n);
        run(1);
        s.net_act(more, n, stride, net.m, net.down_bias, net.act);
        s.narrow(more, inner, n, stride, mx, net.m, type);
        tasks[0] = task({net.up, nullptr, nullptr, t.d, net.m}, inner, mx, more, stride, n);
        run(1);
        s.finish({more, nullptr, net.up_bias, n, stride}, 0, t.d);
        s.add(t.hidden + seg.first * t.d, more, n, t.d, stride, t.d, net.scale);
        return 0;
    }

    int head() {
        if (!t.n_wanted) return 0;
        norm(t.norm, t.eps, t.wanted, normed, t.n_wanted);
        const auto changes = [](const Segment& seg) { return seg.head; };
        if (const int problem = multiply(&t.head, 1, normed, dx, t.logits, t.head.rows, t.head_segments,
                                         t.n_head_segments, t.n_wanted, changes))
            return problem;
        bool changed = t.head.bias != nullptr;
        for (int64_t i = 0; i < t.n_head_segments; ++i) changed |= t.head_segments[i].head != nullptr;
        if (changed)
            blocks(t.head_segments, t.n_head_segments, t.n_wanted, up_to(t.head.rows, COLUMNS) / COLUMNS, 8 * COLUMNS,
                   [&](const Segment& seg, int64_t from, int64_t to) {
                       finish(seg, seg.head, &t.head, 0, t.logits, t.head.rows, from * COLUMNS,
                              smaller(t.head.rows, to * COLUMNS));
                   });
        return 0;
    }

    int all() {
        if (ox != t.heads * t.dim) memset(attended, 0, nx * ox * size);
        if (fx != t.f) memset(gated, 0, nx * fx * size);
        for (int64_t l = 0; l < t.n_layers; ++l) {
            if (const int problem = attend(l)) return problem;
            if (const int problem = feed(l)) return problem;
        }
        return head();
    }
};

}  // namespace
