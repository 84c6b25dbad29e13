// Few rows through a frozen matrix, and what lies between two such products; after elementwise.h, over its V.
//
// PANEL rows of W at a time are read once from memory and multiplied with every row of x (corner.h) while they are in the
// caches; the next panel is fetched meanwhile.
#pragma once
#include "turned.h"

namespace {

#ifdef DELTAW_BF16_DOT
constexpr int64_t PROMPT_ROWS = 96;  // rows from which prompts.h's product is the faster one
void dense_many(const Dense& t, int64_t first, int64_t last);
#endif

// What adapters add ------------------------------------------------------------------------------------------------------

// y += u B, B [panel, rank, 16] and u float32: a vector of columns of N rows
template <class D, int N>
INLINE void thin_rows(const typename D::T* b, const float* u, int64_t u_stride, int64_t rank, float* y, int64_t y_stride) {
    F sum[N];
    for (int r = 0; r < N; ++r) sum[r] = V::load(y + r * y_stride);
    for (int64_t k = 0; k < rank; ++k) {
        const F w = D::load(b, k * PANEL);
        for (int r = 0; r < N; ++r) sum[r] = V::fma(V::set1(u[r * u_stride + k]), w, sum[r]);
    }
    for (int r = 0; r < N; ++r) V::store(y + r * y_stride, sum[r]);
}

template <class D>
INLINE void thin_as(const Added& t, float* y, int64_t y_stride, int64_t outs, int64_t first, int64_t last, bool fresh) {
    const int64_t n = t.last - t.first, end = least(outs, last * PANEL);
    for (int64_t r = t.first; fresh && r < t.last; ++r)
        memset(y + r * y_stride + first * PANEL, 0, (end - first * PANEL) * sizeof *y);
    for (int64_t c = first * PANEL; c < end;) {
        const auto* b = (const typename D::T*)t.b + c / PANEL * PANEL * t.rank + c % PANEL;
        const auto* u = (const float*)t.u;
        float* at = y + t.first * y_stride + c;
        if (c + W <= end) {
            int64_t i = 0;
            for (; i + 4 <= n; i += 4) thin_rows<D, 4>(b, u + i * t.u_stride, t.u_stride, t.rank, at + i * y_stride, y_stride);
            for (; i < n; ++i) thin_rows<D, 1>(b, u + i * t.u_stride, t.u_stride, t.rank, at + i * y_stride, y_stride);
            c += W;
            continue;
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < t.rank; ++k) {
                float w[W];
                read_floats<D>(b, k * PANEL, 1, w);
                at[i * y_stride] += u[i * t.u_stride + k] * w[0];
            }
        c += 1;
    }
}

void thin(const Added& t, float* y, int64_t y_stride, int64_t outs, int64_t first, int64_t last, bool fresh) {
    if (t.dtype == F32) return thin_as<Float32>(t, y, y_stride, outs, first, last, fresh);
#ifdef DELTAW_BF16_DOT
    thin_pairs(t, y, y_stride, outs, first, last, fresh);
#else
    thin_as<BFloat16>(t, y, y_stride, outs, first, last, fresh);
#endif
}

// Products ---------------------------------------------------------------------------------------------------------------

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
        for (int64_t i = 0; i < t.n_added; ++i) thin(t.added[i], t.y, t.y_stride, t.rows, p, p + 1, false);
    }
}

void dense(const Dense& t, int64_t first, int64_t last) {
    if (t.dtype == F32) return dense_as<PlainDot>(t, first, last);
#ifdef DELTAW_BF16_DOT
    if (t.type == BF16 && t.n >= PROMPT_ROWS) return dense_many(t, first, last);
#endif
    if (t.type == BF16) return dense_as<HalfDot>(t, first, last);
    dense_as<WideDot>(t, first, last);
}

void low(const Low& t) {
#ifdef DELTAW_BF16_DOT
    if (t.type == BF16) return low_pairs(t);
#endif
    dense({t.a, t.x, (float*)t.u, nullptr, t.rank, t.cols, t.n, t.x_stride, t.u_stride, 0, t.dtype, t.type}, 0,
          (t.rank + PANEL - 1) / PANEL);
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

void finish(const Finish& t, int64_t first, int64_t last) {
    const float *gain = nullptr, *bias = t.bias;
    if (t.change) {
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
