// Many rows through a frozen bf16 matrix, in pairs: what rows.h does for a few, where arithmetic counts and not memory.
//
// BOTH panels of W are turned once, pair by pair of columns [cols / 2, 16 rows, 2], so that a lane of a sum belongs to an
// output: nothing is added across lanes at the end. Then the rows of x pass in groups, each pair spread over the lanes.
#pragma once
#include "rows.h"

namespace {

#ifdef DELTAW_BF16_DOT
constexpr int64_t BOTH = 2;    // panels turned together
constexpr int64_t SLAB = 768;  // columns turned at a time: what many rows have of them fits the second cache

// `rows` rows of W from w on, columns [k0, k0 + depth), as turn16 turns dwords: zeros where they end
void turn_panel(const uint16_t* w, int64_t cols, int64_t rows, int64_t depth, uint32_t* out) {
    constexpr int64_t PAIRS = 16;
    int64_t k = 0;
    if (rows == PANEL && cols % 2 == 0)
        for (; k + 2 * PAIRS <= depth; k += 2 * PAIRS)
            V::turn16((const uint32_t*)(w + k), cols / 2, PAIRS, out + k / 2 * PANEL, PANEL);
    for (; k < depth; k += 2)
        for (int64_t r = 0; r < PANEL; ++r) {
            const uint16_t* at = w + r * cols + k;
            const uint32_t low = r < rows ? at[0] : 0, high = r < rows && k + 1 < depth ? at[1] : 0;
            out[k / 2 * PANEL + r] = low | high << 16;
        }
}

// N rows of x times P panels, and what the rows' adapter adds, or null
template <int P, int N>
__attribute__((noinline)) void many_rows(const Turned& t, const Turned* also, bool more, const int64_t* rows, float* y,
                                         int64_t y_stride) {
    F sum[N][P];
    for (int i = 0; i < N; ++i)
        for (int p = 0; p < P; ++p)
            sum[i][p] = more ? _mm512_maskz_loadu_ps(first_lanes(rows[p]), y + i * y_stride + p * PANEL) : V::set1(0);
    add_pairs<P, N>(t, sum);
    if (also) add_pairs<P, N>(*also, sum);
    for (int i = 0; i < N; ++i)
        for (int p = 0; p < P; ++p) _mm512_mask_storeu_ps(y + i * y_stride + p * PANEL, first_lanes(rows[p]), sum[i][p]);
}

using Many = void (*)(const Turned&, const Turned*, bool, const int64_t*, float*, int64_t);
constexpr int64_t MOST_ROWS = 12;
template <int P>
constexpr Many MANY_OF[MOST_ROWS] = {
    many_rows<P, 1>, many_rows<P, 2>, many_rows<P, 3>, many_rows<P, 4>,  many_rows<P, 5>,  many_rows<P, 6>,
    many_rows<P, 7>, many_rows<P, 8>, many_rows<P, 9>, many_rows<P, 10>, many_rows<P, 11>, many_rows<P, 12>,
};

// P panels from `panel` on, columns [k0, k0 + depth)
template <int P>
INLINE void many_panels(const Dense& t, int64_t panel, int64_t k0, int64_t depth, uint32_t* turned) {
    const auto* w = (const uint16_t*)t.w + panel * PANEL * t.cols + k0;
    const auto* x = (const uint16_t*)t.x + k0;
    float* y = t.y + panel * PANEL;
    const int64_t pairs = (depth + 1) / 2, apart = pairs * PANEL;
    const Added *next = t.added, *end = k0 + depth == t.cols ? next + t.n_added : next;  // with the last columns
    int64_t rows[P], i = 0;
    for (int p = 0; p < P; ++p) {
        rows[p] = least(PANEL, t.rows - (panel + p) * PANEL);
        turn_panel(w + p * PANEL * t.cols, t.cols, rows[p], depth, turned + p * apart);
    }
    const int64_t ahead = least(P * PANEL, t.rows - (panel + P) * PANEL), each = (P * PANEL * 12 + t.n - 1) / t.n;
    int64_t fetched = 0;
    while (i < t.n) {  // groups of much the same size, each of one segment
        while (next < end && next->last <= i) ++next;
        const bool inside = next < end && next->first <= i;
        const int64_t left = (inside ? next->last : next < end ? next->first : t.n) - i;
        const int64_t groups = (left + MOST_ROWS - 1) / MOST_ROWS, n = (left + groups - 1) / groups;
        for (const int64_t stop = least(fetched + each, ahead); fetched < stop; ++fetched)
            for (int64_t k = 0; k < depth; k += 32) V::prefetch((const uint8_t*)(w + (P * PANEL + fetched) * t.cols + k));
        const Turned also = inside ? turned_of(*next, panel, i - next->first) : Turned{};
        MANY_OF<P>[n - 1]({turned, x + i * t.x_stride, apart, t.x_stride, pairs}, inside ? &also : nullptr, k0 > 0, rows,
                          y + i * t.y_stride, t.y_stride);
        i += n;
    }
}

void dense_many(const Dense& t, int64_t first, int64_t last) {
    alignas(64) uint32_t turned[BOTH * PANEL * SLAB / 2];
    for (int64_t k0 = 0; k0 < t.cols; k0 += SLAB) {  // so much of x stays in the second cache while all panels pass
        const int64_t depth = least(SLAB, t.cols - k0);
        int64_t p = first;
        for (; p + BOTH <= last; p += BOTH) many_panels<BOTH>(t, p, k0, depth, turned);
        if (p < last) many_panels<1>(t, p, k0, depth, turned);
    }
}

#endif

}  // namespace
