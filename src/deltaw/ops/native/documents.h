// Attention over a pack, shared out among threads. Included by dispatch.cpp.
//
// The query heads of a document that share a key-value head are a task; in a document that would keep a thread busy
// beyond its share, each head is one. Largest first, each taken by whoever is free.
//
// Documents that have a front follow it. Backward, the followers of a front are cut into few bunches, each a task that
// sums what they give to the front's keys and values. These sums and the front's own are added when all are there, in an
// order that no number of threads changes.
#pragma once

namespace {

struct Part {
    Heads heads;           // of the first document
    const int64_t* docs;   // n of them, one after the other
    int64_t n;
    double cost;
    float* sums;           // null: dk and dv are written at once
};

int by_cost(const void* a, const void* b) {
    const Part &x = *(const Part*)a, &y = *(const Part*)b;
    if (x.cost != y.cost) return x.cost < y.cost ? 1 : -1;
    const int64_t order = x.heads.doc != y.heads.doc ? x.heads.doc - y.heads.doc : x.heads.first - y.heads.first;
    return order < 0 ? -1 : 1;
}

class Attending {
   public:
    Attending(const Path* path, int threads, const Attention& t, bool backward)
        : path(path), t(t), threads(threads), backward(backward), group(t.heads / t.shared) {
        for (int64_t doc = 0; doc < t.docs; ++doc) {
            const int64_t all = before(doc) + own(doc);
            total += area(doc) * double(t.heads);
            longest = all > longest ? all : longest;
        }
        if (!gomp_parallel || total * double(t.dim) < 1 << 20) this->threads = 1;
    }

    // 0, or 2 without memory
    int run() {
        const int64_t n_parts = t.docs * (t.heads + t.shared);
        const int64_t scratch_size = up64(path->attention_scratch(t, longest, backward));
        const int64_t lists = up64((2 * t.docs + 1) * int64_t(sizeof(int64_t)));
        int64_t* ends = (int64_t*)calloc(1, size_t(lists));  // small; what comes behind depends on it
        if (!ends) return 2;
        int64_t* order = ends + t.docs + 1;
        sort(ends, order);
        int64_t floats = 0;
        for (int64_t doc = 0; doc < t.docs; ++doc)
            if (front(doc) < 0) floats += t.shared * sums_of(doc, ends[doc + 1] - ends[doc] - 1) * sums_size(doc);
        const int64_t parts_size = up64(n_parts * int64_t(sizeof(Part)));
        char* room = room_of(parts_size + floats * 4 + threads * scratch_size + 64);
        if (room) {
            parts = (Part*)room, gathers = parts + t.docs * t.heads, sums = (float*)(room + parts_size);
            char* scratch = room + parts_size + floats * 4;
            for (int64_t doc = 0; doc < t.docs; ++doc)
                if (front(doc) < 0) plan(order + ends[doc], ends[doc + 1] - ends[doc] - 1);
            qsort(parts, size_t(n), sizeof(Part), by_cost);
            each([&](int64_t at, int64_t thread) { compute(parts[at], scratch + thread * scratch_size); }, n, threads);
            each([&](int64_t at, int64_t) { gather(gathers[at]); }, n_gathers, threads);
        }
        free(ends);
        return room ? 0 : 2;
    }

   private:
    const Path* path;
    const Attention& t;
    int threads;
    bool backward;
    int64_t group, longest = 0, n = 0, n_gathers = 0;
    double total = 0;
    Part *parts = nullptr, *gathers = nullptr;
    float* sums = nullptr;

    static int64_t up64(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    int64_t own(int64_t doc) const { return t.bounds[doc + 1] - t.bounds[doc]; }
    int64_t front(int64_t doc) const { return t.fronts ? t.fronts[doc] : -1; }
    int64_t before(int64_t doc) const { return front(doc) < 0 ? 0 : own(front(doc)); }
    double area(int64_t doc) const {
        const double all = double(before(doc) + own(doc)), not_own = double(before(doc));
        return all * all - not_own * not_own;
    }
    bool is_split(int64_t doc) const {
        return threads > 1 && group > 1 && 2 * threads * area(doc) * double(group) > total;
    }

    // Floats of a sum: dk and dv of one key-value head
    int64_t sums_size(int64_t doc) const { return 2 * ((own(doc) + 15) / 16 * 16) * ((t.dim + 15) / 16 * 16); }
    int64_t bunches(int64_t followers) const {
        const int64_t most = backward ? (16 + t.shared - 1) / t.shared : followers;
        return followers < most ? followers : most;
    }
    // Sums of each key-value head that are gathered: of its query heads where these are tasks, and of each bunch
    int64_t sums_of(int64_t doc, int64_t followers) const {
        if (!backward || (!followers && !is_split(doc))) return 0;
        return (is_split(doc) ? group : 1) + bunches(followers);
    }

    // All documents, each behind its front: those of `doc` and its followers are [ends[doc], ends[doc + 1])
    void sort(int64_t* ends, int64_t* order) const {
        for (int64_t doc = 0; doc < t.docs; ++doc) ++ends[(front(doc) < 0 ? doc : front(doc)) + 1];
        for (int64_t doc = 0; doc < t.docs; ++doc) ends[doc + 1] += ends[doc];
        for (int64_t doc = 0; doc < t.docs; ++doc)
            if (front(doc) < 0) order[ends[doc]++] = doc;
        for (int64_t doc = 0; doc < t.docs; ++doc)
            if (front(doc) >= 0) order[ends[front(doc)]++] = doc;
        for (int64_t doc = t.docs; doc > 0; --doc) ends[doc] = ends[doc - 1];
        ends[0] = 0;
    }

    // The tasks of docs[0], which begins by itself, and of its followers
    void plan(const int64_t* docs, int64_t followers) {
        const int64_t doc = docs[0], kept = sums_of(doc, followers), size = kept ? sums_size(doc) : 0;
        const int64_t step = is_split(doc) ? 1 : group, bunched = bunches(followers);
        for (int64_t first = 0; first < t.heads; first += group) {
            float* at = kept ? sums : nullptr;
            if (kept) gathers[n_gathers++] = {{doc, first, first + group}, docs, kept, 0, sums};
            for (int64_t h = first; h < first + group; h += step, at += size)
                parts[n++] = {{doc, h, h + step}, docs, 1, area(doc) * double(step), at};
            for (int64_t k = 0; k < bunched; ++k, at += size) {
                const int64_t from = 1 + k * followers / bunched, to = 1 + (k + 1) * followers / bunched;
                double cost = 0;
                for (int64_t i = from; i < to; ++i) cost += area(docs[i]) * double(group);
                parts[n++] = {{docs[from], first, first + group}, docs + from, to - from, cost, at};
            }
            sums += kept * size;
        }
    }

    void compute(const Part& part, char* scratch) const {
        if (backward && part.sums && front(part.docs[0]) >= 0)
            memset(part.sums, 0, size_t(sums_size(front(part.docs[0]))) * sizeof(float));
        for (int64_t i = 0; i < part.n; ++i) {
            const Heads heads = {part.docs[i], part.heads.first, part.heads.last};
            if (own(heads.doc) < 1) continue;
            if (backward)
                path->attend_backward(t, heads, part.sums, scratch);
            else
                path->attend(t, heads, scratch);
        }
    }

    void gather(const Part& part) const {
        path->attention_gather(t, part.heads.doc, part.heads.first / group, part.sums, part.n);
    }
};

}  // namespace
