// Few rows through a frozen matrix, and what lies between two such products; after elementwise.h, over its V.
//
// PANEL rows of W at a time are read once from memory and multiplied with every row of x while they are in the caches;
// the next panel is fetched meanwhile. Both operands run along the columns, so W stays as it is stored. W sums are
// carried at once, each spread over the lanes of a vector, and turned into one vector of sums at the end (V::sums).
#pragma once
#include "elementwise.h"

namespace {

// Operands: S in memory, X of the rows, K values at a time
struct PlainDot {
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

constexpr int64_t THIN_AHEAD = 2048;     // bytes of an adapter's B
constexpr int X_ROWS = W == 16 ? 4 : 2;  // rows of x in a corner, where there are as many
#ifndef NEAR_BYTES
#define NEAR_BYTES 1152
#endif
constexpr int64_t NEAR = NEAR_BYTES;     // bytes of each row of a panel that are fetched before they are read

// `rows` <= PANEL rows of W times N rows of x, from row i on
template <class Dot, int N, bool FETCH>
INLINE void panel_rows(const Dense& t, const typename Dot::S* w, int64_t rows, int64_t i, float* y) {
    constexpr int R = W / N;
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

template <class Dot>
void dense_as(const Dense& t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        const int64_t r = p * PANEL, rows = least(PANEL, t.rows - r);
        const auto* w = (const typename Dot::S*)t.w + r * t.cols;
        float* y = t.y + r;
        if (t.n == 1) panel_rows<Dot, 1, true>(t, w, rows, 0, y);
        else if (t.n == 2) panel_rows<Dot, 2, true>(t, w, rows, 0, y);
        else if (t.n <= X_ROWS) panel_rows<Dot, X_ROWS, true>(t, w, rows, 0, y);
        else {
            const int64_t bytes = PANEL * t.cols * int64_t(sizeof(*w)), groups = (t.n + X_ROWS - 1) / X_ROWS;
            const int64_t slice = up(bytes / groups, 64);
            for (int64_t i = 0, at = bytes; i < t.n; i += X_ROWS) {
                for (int64_t stop = least(at + slice, 2 * bytes); at < stop; at += 64) V::prefetch((const uint8_t*)w + at);
                panel_rows<Dot, X_ROWS, false>(t, w, rows, i, y);
            }
        }
    }
}

void dense(const Dense& t, int64_t first, int64_t last) {
    if (t.dtype == F32) return dense_as<PlainDot>(t, first, last);
    if (t.type == BF16) return dense_as<HalfDot>(t, first, last);
    dense_as<WideDot>(t, first, last);
}

// Between two products -------------------------------------------------------------------------------------------------

// n values of float32 into p + i of `type`, and zeros up to `padded`
INLINE void narrow_row(const float* x, void* p, int64_t i, int64_t n, int64_t padded, int32_t type) {
    const int64_t size = type == F32 ? 4 : 2;
    const auto by = [&](auto d) {
        using D = decltype(d);
        along(n, [&](int64_t k, auto at) { put<D>((typename D::T*)p + i, k, at, get<Float32>(x, k, at)); });
    };
    type == F32 ? by(Float32{}) : by(FlushedBf16{});
    if (padded > n) memset((char*)p + (i + n) * size, 0, (padded - n) * size);
}

void narrow(const float* x, void* y, int64_t n, int64_t x_stride, int64_t y_stride, int64_t cols, int32_t type) {
    for (int64_t r = 0; r < n; ++r) narrow_row(x + r * x_stride, y, r * y_stride, cols, y_stride, type);
}

INLINE float rstd_of(const float* x, int64_t d, float eps) {
    const float squares = total(d, [&](int64_t k, auto at, F sum) {
        const F v = get<Float32>(x, k, at);
        return V::fma(v, v, sum);
    });
    return 1 / __builtin_sqrtf(squares / float(d) + eps);
}

void norm_rows(const Normed& t, int64_t first, int64_t last) {
    const auto by = [&](auto d, int64_t r) {
        using D = decltype(d);
        const float* x = t.x + (t.rows ? t.rows[r] : r) * t.d;
        auto* y = (typename D::T*)t.y + r * t.stride;
        const F rstd = V::set1(rstd_of(x, t.d, t.eps));
        along(t.d, [&](int64_t k, auto at) {
            put<D>(y, k, at, V::mul(V::mul(get<Float32>(x, k, at), rstd), get<Float32>(t.gain, k, at)));
        });
        memset(y + t.d, 0, (t.stride - t.d) * sizeof *y);
    };
    for (int64_t r = first; r < last; ++r) t.type == F32 ? by(Float32{}, r) : by(FlushedBf16{}, r);
}

void gains(const void* x, void* y, const float* gain, int64_t n, int64_t cols, int64_t stride, int32_t type) {
    const auto by = [&](auto d) {
        using D = decltype(d);
        for (int64_t r = 0; r < n; ++r) {
            const auto* from = (const typename D::T*)x + r * stride;
            auto* to = (typename D::T*)y + r * stride;
            along(cols, [&](int64_t k, auto at) {
                const F v = get<D>(from, k, at);
                put<D>(to, k, at, gain ? V::mul(v, get<Float32>(gain, k, at)) : v);
            });
            memset(to + cols, 0, (stride - cols) * sizeof *to);
        }
    };
    type == F32 ? by(Float32{}) : by(FlushedBf16{});
}

// y += u B for a vector of columns from c on and N rows from row i on
template <class D, int N>
INLINE void thin_rows(const Finish& t, const typename D::T* b, int64_t c, int64_t i) {
    const float* u = t.u + i * t.u_stride;
    float* y = t.y + i * t.y_stride + c;
    F sum[N];
    for (int r = 0; r < N; ++r) sum[r] = V::load(y + r * t.y_stride);
    for (int64_t k = 0; k < t.change->rank; ++k) {
        if (N == 1) V::prefetch((const uint8_t*)(b + k * PANEL) + THIN_AHEAD);
        const F w = D::load(b, k * PANEL);
        for (int r = 0; r < N; ++r) sum[r] = V::fma(V::set1(u[r * t.u_stride + k]), w, sum[r]);
    }
    for (int r = 0; r < N; ++r) V::store(y + r * t.y_stride, sum[r]);
}

template <class D>
INLINE void thin_part(const Finish& t, int64_t first, int64_t last) {
    const int64_t rank = t.change->rank;
    for (int64_t c = first; c < last;) {
        const auto* b = (const typename D::T*)t.change->b + c / PANEL * PANEL * rank + c % PANEL;
        if (c % W == 0 && c + W <= last) {
            int64_t i = 0;
            for (; i + 4 <= t.n; i += 4) thin_rows<D, 4>(t, b, c, i);
            if (i + 2 <= t.n) thin_rows<D, 2>(t, b, c, i), i += 2;
            if (i < t.n) thin_rows<D, 1>(t, b, c, i);
            c += W;
            continue;
        }
        for (int64_t i = 0; i < t.n; ++i) {
            float sum = t.y[i * t.y_stride + c];
            for (int64_t k = 0; k < rank; ++k) {
                float w[W];
                read_floats<D>(b, k * PANEL, 1, w);
                sum += t.u[i * t.u_stride + k] * w[0];
            }
            t.y[i * t.y_stride + c] = sum;
        }
        c += 1;
    }
}

#ifdef DELTAW_BF16_DOT
// The same with B in pairs of ranks [panel, rank / 2, 16, 2] and u rounded to bf16: N rows from row i on
template <int N>
INLINE void thin_pairs(const Finish& t, int64_t first, int64_t last, int64_t i) {
    constexpr int64_t MOST = 256;  // ranks at a time
    const int64_t rank = up(t.change->rank, 2);
    for (int64_t k0 = 0; k0 < rank; k0 += MOST) {
        const int64_t ranks = least(MOST, rank - k0);
        alignas(64) uint16_t u[N][MOST];
        for (int r = 0; r < N; ++r)
            narrow_row(t.u + (i + r) * t.u_stride + k0, u[r], 0, least(ranks, t.change->rank - k0), ranks, BF16);
        const auto* b = (const uint16_t*)t.change->b + k0 * PANEL;
        for (int64_t c = first; c < last; c += W) {
            const int64_t skip = c % PANEL, n = least(W - skip, last - c);  // of a panel: whole but for narrow heads
            c -= skip;
            float* y = t.y + i * t.y_stride + c;
            const __mmask16 there = __mmask16(((1u << n) - 1) << skip);
            F sum[N];
            for (int r = 0; r < N; ++r) sum[r] = _mm512_maskz_loadu_ps(there, y + r * t.y_stride);
            for (int64_t k = 0; k < ranks; k += 2) {
                const auto* at = b + c * rank + k * PANEL;
                if (N == 1) V::prefetch((const uint8_t*)at + THIN_AHEAD);
                const V::H w = V::load_half(at);
                for (int r = 0; r < N; ++r) {
                    int32_t both;
                    memcpy(&both, u[r] + k, 4);
                    sum[r] = V::dot_half(w, (V::H)_mm512_set1_epi32(both), sum[r]);
                }
            }
            for (int r = 0; r < N; ++r) _mm512_mask_storeu_ps(y + r * t.y_stride, there, sum[r]);
        }
    }
}

INLINE void thin_half(const Finish& t, int64_t first, int64_t last) {
    int64_t i = 0;
    for (; i + 4 <= t.n; i += 4) thin_pairs<4>(t, first, last, i);
    if (i + 2 <= t.n) thin_pairs<2>(t, first, last, i), i += 2;
    if (i < t.n) thin_pairs<1>(t, first, last, i);
}
#else
INLINE void thin_half(const Finish& t, int64_t first, int64_t last) { thin_part<BFloat16>(t, first, last); }
#endif

void finish(const Finish& t, int64_t first, int64_t last) {
    const float *gain = nullptr, *bias = t.bias;
    if (t.change) {
        if (t.change->b)
            t.dtype == F32 ? thin_part<Float32>(t, first, last) : thin_half(t, first, last);
        gain = t.change->out_gain;
        if (t.change->bias) bias = t.change->bias;
    }
    if (!gain && !bias) return;
    for (int64_t i = 0; i < t.n; ++i) {
        float* y = t.y + i * t.y_stride + first;
        along(last - first, [&](int64_t k, auto at) {
            const F one = gain ? get<Float32>(gain + first, k, at) : V::set1(1);
            const F more = bias ? get<Float32>(bias + first, k, at) : V::set1(0);
            put<Float32>(y, k, at, V::fma(get<Float32>(y, k, at), one, more));
        });
    }
}

void head_norm(float* x, int64_t n, int64_t stride, int64_t d, const float* gain, float eps) {
    for (int64_t i = 0; i < n; ++i) {
        float* row = x + i * stride;
        const F rstd = V::set1(rstd_of(row, d, eps));
        along(d, [&](int64_t k, auto at) {
            put<Float32>(row, k, at, V::mul(V::mul(get<Float32>(row, k, at), rstd), get<Float32>(gain, k, at)));
        });
    }
}

// cos, sin [n, turned]: see elementwise.h
void turn_rows(float* x, int64_t n, int64_t stride, const float* cos, const float* sin, int64_t turned) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < n; ++i) {
        float *a = x + i * stride, *b = a + half;
        const float *c = cos + i * turned, *s = sin + i * turned;
        along(half, [&](int64_t k, auto at) {
            const F one = get<Float32>(a, k, at), two = get<Float32>(b, k, at);
            const F left = V::mul(two, get<Float32>(s, k, at)), right = V::mul(one, get<Float32>(s + half, k, at));
            put<Float32>(a, k, at, V::fma(one, get<Float32>(c, k, at), negative(left)));
            put<Float32>(b, k, at, V::fma(two, get<Float32>(c + half, k, at), right));
        });
    }
}

template <class Act>
INLINE F value_of(F x) {
    F value, slope;
    Act::at(x, value, slope);
    return value;
}

template <class Act, class D>
INLINE void gate_as(const float* gate, const float* up, int64_t n, int64_t stride, int64_t cols, void* y,
                    int64_t y_stride) {
    for (int64_t i = 0; i < n; ++i, gate += stride, up += stride) {
        auto* out = (typename D::T*)y + i * y_stride;
        along(cols, [&](int64_t k, auto at) {
            put<D>(out, k, at, V::mul(value_of<Act>(get<Float32>(gate, k, at)), get<Float32>(up, k, at)));
        });
    }
}

void gate_rows(const float* gate, const float* up, int64_t n, int64_t stride, int64_t cols, int32_t act, void* y,
               int64_t y_stride, int32_t type) {
    const auto by = [&](auto d) {
        using D = decltype(d);
        if (act == SILU) gate_as<Silu, D>(gate, up, n, stride, cols, y, y_stride);
        if (act == GELU_TANH) gate_as<GeluTanh, D>(gate, up, n, stride, cols, y, y_stride);
        if (act == GELU) gate_as<Gelu, D>(gate, up, n, stride, cols, y, y_stride);
    };
    type == F32 ? by(Float32{}) : by(FlushedBf16{});
}

// x += by y
void add_rows(float* x, const float* y, int64_t n, int64_t x_stride, int64_t y_stride, int64_t cols, float by) {
    for (int64_t i = 0; i < n; ++i, x += x_stride, y += y_stride)
        along(cols, [&](int64_t k, auto at) {
            put<Float32>(x, k, at, V::fma(get<Float32>(y, k, at), V::set1(by), get<Float32>(x, k, at)));
        });
}

// x = act(x + bias)
void net_act(float* x, int64_t n, int64_t stride, int64_t cols, const float* bias, int32_t act) {
    for (int64_t i = 0; i < n; ++i, x += stride)
        along(cols, [&](int64_t k, auto at) {
            F v = V::add(get<Float32>(x, k, at), get<Float32>(bias, k, at));
            if (act == NET_RELU) v = V::max(v, V::set1(0));
            if (act == NET_GELU) v = value_of<Gelu>(v);
            if (act == NET_SILU) v = value_of<Silu>(v);
            if (act == NET_TANH) {  // 2 s(2 x) - 1
                const F s = sigmoid(V::add(v, v));
                v = V::add(V::add(s, s), V::set1(-1));
            }
            put<Float32>(x, k, at, v);
        });
}

}  // namespace
