// Who computes which part of a wide product (wide.h): columns by panels, and rows where panels alone do not divide.
#pragma once

namespace {

struct Stretch {
    int64_t band, column, columns, row0, row1;
};

constexpr int64_t FEWEST_ROWS = 96;  // of a part

inline int64_t panels_of(const Wide& w, int64_t band, int64_t span) { return (w.bands[band].cols + span - 1) / span; }

// Parts of the rows: so many that no thread has over 4 % more than its share
inline int64_t row_parts(int64_t n, int64_t panels, int64_t threads) {
    int64_t parts = 1;
    for (; n / (parts + 1) >= FEWEST_ROWS; ++parts) {
        const int64_t units = panels * parts, most = (units + threads - 1) / threads * threads;
        if (most * 25 <= units * 26) break;
    }
    return parts;
}

// A thread's share of the units (part of the rows, panel), in stretches of one band and at most `most` panels
inline int64_t share_of(const Wide& w, const WideKernels& k, int64_t panels, int64_t parts, int64_t first, int64_t last,
                        Stretch* out) {
    int64_t n = 0;
    for (int64_t unit = first, rest; unit < last; unit += rest) {
        int64_t band = 0, panel = unit % panels;
        for (; panel >= panels_of(w, band, k.span); ++band) panel -= panels_of(w, band, k.span);
        rest = smaller(last - unit, panels_of(w, band, k.span) - panel);
        const int64_t part = unit / panels, groups = (rest + k.most - 1) / k.most, size = (rest + groups - 1) / groups;
        for (int64_t p = panel; p < panel + rest; p += size) {
            const int64_t end = smaller(smaller(p + size, panel + rest) * k.span, w.bands[band].cols);
            out[n++] = {band, p * k.span, end - p * k.span, w.n * part / parts, w.n * (part + 1) / parts};
        }
    }
    return n;
}

struct Share {
    Stretch* stretches;
    int64_t n, next;
};

// Calls run(stretch) for each, a thread's own first: whoever is done helps the next one
template <class Run>
inline void serve_shares(Share* shares, int64_t threads, int64_t own, const Run& run) {
    for (int64_t d = 0; d < threads; ++d) {
        Share& s = shares[(own + d) % threads];
        for (int64_t at; (at = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED)) < s.n;) run(s.stretches[at]);
    }
}

}  // namespace
