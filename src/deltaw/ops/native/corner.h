// Products of a panel of W with few rows of x, over the V of kernels.h. Both operands run along the columns, so W stays
// as it is stored. W sums are carried at once, each spread over the lanes of a vector, and turned into one vector of sums
// at the end (V::sums).
#pragma once

namespace {

// Operands: S in memory, X of the rows, K values at a time
struct PlainDot {
    using D = Float32;
    using S = float;
    using X = float;
    using R = F;
    static constexpr int K = W;
    static R load(const S* p) { return V::load(p); }
    static R load_x(const X* p) { return V::load(p); }
    static F dot(R a, R b, F c) { return V::fma(a, b, c); }
};
struct WideDot {  // bf16 in memory, widened
    using S = uint16_t;
    using X = float;
    using R = F;
    static constexpr int K = W;
    static R load(const S* p) { return V::load_bf16(p); }
    static R load_x(const X* p) { return V::load(p); }
    static F dot(R a, R b, F c) { return V::fma(a, b, c); }
};
#ifdef DELTAW_BF16_DOT
struct PairDot {
    using D = BFloat16;
    using S = uint16_t;
    using X = uint16_t;
    using R = V::H;
    static constexpr int K = 2 * W;
    static R load(const S* p) { return V::load_half(p); }
    static R load_x(const X* p) { return V::load_half(p); }
    static F dot(R a, R b, F c) { return V::dot_half(a, b, c); }
};
using HalfDot = PairDot;
#else
using HalfDot = WideDot;
#endif

template <int R, int N>
INLINE void put_sums(const F (&sum)[N][R], float* y, int64_t stride) {
    if constexpr (R * N == W) {
        float lanes[W];
        V::store(lanes, V::sums(&sum[0][0]));
        for (int i = 0; i < N; ++i) memcpy(y + i * stride, lanes + i * R, R * sizeof(float));
    } else {
        for (int i = 0; i < N; ++i)
            for (int r = 0; r < R; ++r) y[i * stride + r] = V::sum(sum[i][r]);
    }
}

// Which part of the memory behind is fetched while a corner is computed: of its own rows, NEAR columns further on, and of
// the next panel's where its rows end
struct Ahead {
    int64_t near, next;  // columns; values from a row to the next panel's less its columns. near 0: nothing
};

// R rows of W times N rows of x
template <class Dot, int R, int N, bool FETCH>
INLINE void corner(const typename Dot::S* w, int64_t w_stride, const typename Dot::X* x, int64_t x_stride, int64_t cols,
                   Ahead ahead, float* y, int64_t y_stride) {
    using S = typename Dot::S;
    F sum[N][R];
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < R; ++r) sum[i][r] = V::set1(0);
    int64_t k = 0;
    for (; k + Dot::K <= cols; k += Dot::K) {
        typename Dot::R xs[N];
        for (int i = 0; i < N; ++i) xs[i] = Dot::load_x(x + i * x_stride + k);
        const int64_t far = k + ahead.near < cols ? ahead.near : ahead.next;
        for (int r = 0; r < R; ++r) {
            const auto ws = Dot::load(w + r * w_stride + k);
            if (FETCH) V::prefetch((const uint8_t*)(w + r * w_stride + k + far));
            for (int i = 0; i < N; ++i) sum[i][r] = Dot::dot(ws, xs[i], sum[i][r]);
        }
    }
    if (k < cols)  // x has zeros here, W goes on
        for (int r = 0; r < R; ++r) {
            S rest[Dot::K] = {};
            memcpy(rest, w + r * w_stride + k, (cols - k) * sizeof(S));
            const auto ws = Dot::load(rest);
            for (int i = 0; i < N; ++i) sum[i][r] = Dot::dot(ws, Dot::load_x(x + i * x_stride + k), sum[i][r]);
        }
    put_sums<R, N>(sum, y, y_stride);
}

constexpr int X_ROWS = W == 16 ? 4 : 2;  // rows of x in a corner, where there are as many
#ifndef NEAR_BYTES
#define NEAR_BYTES 1152
#endif
constexpr int64_t NEAR = NEAR_BYTES;     // bytes of each row of a panel that are fetched before they are read

// `rows` <= PANEL rows of W times N rows of x, from row i on
template <class Dot, int N, bool FETCH>
INLINE void panel_rows(const Dense& t, const typename Dot::S* w, int64_t rows, int64_t i, float* y) {
    constexpr int R = N == 3 ? 4 : W / N;
    const auto* x = (const typename Dot::X*)t.x + i * t.x_stride;
    const int64_t near = least(t.cols, NEAR / int64_t(sizeof(*w)));
    const Ahead ahead = {near, PANEL * t.cols + near - t.cols};
    float spare[4 * PANEL];
    const bool whole = i + N <= t.n;  // else the last rows of x are not there, and their sums are left out
    float* out = whole ? y + i * t.y_stride : spare;
    const int64_t stride = whole ? t.y_stride : PANEL;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        corner<Dot, R, N, FETCH>(w + r * t.cols, t.cols, x, t.x_stride, t.cols, ahead, out + r, stride);
    for (; r < rows; ++r)
        corner<Dot, 1, N, false>(w + r * t.cols, t.cols, x, t.x_stride, t.cols, ahead, out + r, stride);
    if (!whole)
        for (int64_t k = i; k < t.n; ++k) memcpy(y + k * t.y_stride, spare + (k - i) * PANEL, rows * sizeof(float));
}

}  // namespace
