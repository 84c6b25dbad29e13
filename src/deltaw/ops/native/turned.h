// Rows times panels of 16 outputs that are stored turned, in bf16 pairs: [cols / 2, 16 outputs, 2]. A lane of a sum belongs
// to an output, so nothing is added across lanes at the end, and a panel is one stream of memory. After elementwise.h.
//
// An adapter's factors lie so from the start (native.h, Changes); a frozen matrix is turned by prompts.h where it pays.
#pragma once
#include "elementwise.h"

namespace {

#ifdef DELTAW_BF16_DOT
constexpr int64_t FACTOR_AHEAD = 8192;  // bytes of an adapter's factors that are fetched before they are read

struct Turned {  // panels `apart` dwords from each other, and the rows they meet
    const uint32_t* w;
    const uint16_t* x;
    int64_t apart, x_stride, pairs;
};

template <int P, int N>
INLINE void add_pairs(const Turned& t, F (&sum)[N][P]) {
    for (int64_t k = 0; k < t.pairs; ++k) {
        V::H w[P];
        for (int p = 0; p < P; ++p) w[p] = V::load_half((const uint16_t*)(t.w + p * t.apart + k * PANEL));
        for (int i = 0; i < N; ++i) {
            const V::H both = V::half_pair(t.x + i * t.x_stride + 2 * k);
            for (int p = 0; p < P; ++p) sum[i][p] = V::dot_half(w[p], both, sum[i][p]);
        }
    }
}

INLINE __mmask16 first_lanes(int64_t n) { return n >= PANEL ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// u of N rows and of a panel of WIDE ranks, whose lines of 64 bytes hold 16 / WIDE pairs of each
template <int WIDE, int N, bool FETCH>
INLINE void low_rows(const Low& t, const uint16_t* a, const uint16_t* x, uint16_t* u) {
    constexpr int S = N >= 4 ? 1 : 4 / N;  // sums that need not wait for each other
    constexpr int64_t COLS = 2 * PANEL / WIDE;
    const int64_t lines = up(t.cols, 32) / COLS;
    F sum[S][N];
    for (int s = 0; s < S; ++s)
        for (int i = 0; i < N; ++i) sum[s][i] = V::set1(0);
    const auto line = [&](int64_t k, int s) {
        if (FETCH) V::prefetch((const uint8_t*)(a + k * 2 * PANEL) + FACTOR_AHEAD);
        const V::H w = V::load_half(a + k * 2 * PANEL);
        for (int i = 0; i < N; ++i)
            sum[s][i] = V::dot_half(w, V::template half_pairs<PANEL / WIDE>(x + i * t.x_stride + k * COLS), sum[s][i]);
    };
    int64_t k = 0;
    for (; k + S <= lines; k += S)
        for (int s = 0; s < S; ++s) line(k + s, s);
    for (; k < lines; ++k) line(k, 0);
    for (int i = 0; i < N; ++i) {
        F all = sum[0][i];
        for (int s = 1; s < S; ++s) all = V::add(all, sum[s][i]);
        if (WIDE < PANEL) {
            float lanes[PANEL], ranks[PANEL] = {};
            V::store(lanes, all);
            for (int l = 0; l < PANEL; ++l) ranks[l * WIDE / PANEL] += lanes[l];
            all = V::load(ranks);
        }
        V::round_half(u + i * t.u_stride, all);
    }
}

template <int WIDE>
void low_panel(const Low& t, const uint16_t* a, uint16_t* u) {
    const auto* x = (const uint16_t*)t.x;
    int64_t i = 0;
    const auto some = [&](auto count) {
        constexpr int N = decltype(count)::N;
        if (i == 0 && N <= t.n) low_rows<WIDE, N, true>(t, a, x, u), i = N;
        for (; i + N <= t.n; i += N) low_rows<WIDE, N, false>(t, a, x + i * t.x_stride, u + i * t.u_stride);
    };
    some(Count<12>{}), some(Count<6>{}), some(Count<4>{}), some(Count<2>{}), some(Count<1>{});
}

void low_pairs(const Low& t) {
    const int64_t cols = up(t.cols, 32);
    for (int64_t r = 0; r < t.rank; r += PANEL) {
        const auto* a = (const uint16_t*)t.a + r * cols;
        auto* u = (uint16_t*)t.u + r;
        const int64_t left = t.rank - r;
        if (left > 8) low_panel<16>(t, a, u);
        else if (left > 4) low_panel<8>(t, a, u);
        else if (left > 2) low_panel<4>(t, a, u);
        else if (left > 1) low_panel<2>(t, a, u);
        else low_panel<1>(t, a, u);
    }
}

INLINE Turned turned_of(const Added& t, int64_t panel, int64_t i) {
    const int64_t pairs = (t.rank + 1) / 2;
    return {(const uint32_t*)t.b + panel * PANEL * pairs, (const uint16_t*)t.u + i * t.u_stride, PANEL * pairs, t.u_stride,
            pairs};
}

// y = u B of one row, panels [first, last): nothing but a stream of memory
void thin_row(const Added& t, float* y, int64_t outs, int64_t first, int64_t last) {
    const Turned all = turned_of(t, 0, 0);
    for (int64_t p = first; p < last; ++p) {
        const auto* b = (const uint16_t*)(all.w + p * all.apart);
        F sum = V::set1(0);
        for (int64_t k = 0; k < all.pairs; ++k, b += 2 * PANEL) {
            V::prefetch((const uint8_t*)b + FACTOR_AHEAD);
            sum = V::dot_half(V::load_half(b), V::half_pair(all.x + 2 * k), sum);
        }
        _mm512_mask_storeu_ps(y + p * PANEL, first_lanes(outs - p * PANEL), sum);
    }
}

// y += u B, or with `fresh` y = u B, for the rows of a segment: panels [first, last) of `outs` columns
void thin_pairs(const Added& t, float* y, int64_t y_stride, int64_t outs, int64_t first, int64_t last, bool fresh) {
    if (fresh && t.last - t.first == 1) return thin_row(t, y + t.first * y_stride, outs, first, last);
    for (int64_t p = first; p < last; ++p) {
        const __mmask16 there = first_lanes(outs - p * PANEL);
        const int64_t n = t.last - t.first;
        int64_t i = 0;
        const auto some = [&](auto count) {
            constexpr int N = decltype(count)::N;
            for (; i + N <= n; i += N) {
                float* at = y + (t.first + i) * y_stride + p * PANEL;
                const Turned one = turned_of(t, p, i);
                F sum[N][1];
                for (int r = 0; r < N; ++r) sum[r][0] = fresh ? V::set1(0) : _mm512_maskz_loadu_ps(there, at + r * y_stride);
                for (int64_t k = 0; i == 0 && k < one.pairs; ++k)
                    V::prefetch((const uint8_t*)(one.w + k * PANEL) + FACTOR_AHEAD);
                add_pairs<1, N>(one, sum);
                for (int r = 0; r < N; ++r) _mm512_mask_storeu_ps(at + r * y_stride, there, sum[r][0]);
            }
        };
        some(Count<12>{}), some(Count<6>{}), some(Count<4>{}), some(Count<2>{}), some(Count<1>{});
    }
}

#endif

}  // namespace
