// Elementwise operations of transformer blocks over the vector type V of the including file, after kernels.h. All is
// computed in float32 and rounded once. Every row is read in one order whatever the threads are, so results repeat.
#pragma once
#include "kernels.h"

namespace {

constexpr float INFINITE = __builtin_inff();

struct FlushedBf16 {  // values below 1.2e-38 may become zero: so the processor's own rounding does, in fewer steps
    using T = uint16_t;
    static F load(const void* p, int64_t i) { return V::load_bf16((const uint16_t*)p + i); }
    static void store(T* p, F v) { V::store_bf16_flushed(p, v); }
};

// How much of a vector a step takes: all of it, or the n values at the end of a row
struct Full {};
struct Part { int64_t n; };

// step(k, Full or Part) for k = 0, W, 2 W ... below n
template <class Step>
INLINE void along(int64_t n, Step step) {
    int64_t k = 0;
    for (; k + W <= n; k += W) step(k, Full{});
    if (k < n) step(k, Part{n - k});
}

template <class D>
INLINE F get(const void* p, int64_t k, Full, float = 0) { return D::load(p, k); }
template <class D>
INLINE F get(const void* p, int64_t k, Part part, float past = 0) {  // `past` where the row ends
    typename D::T rest[W];
    D::store(rest, V::set1(past));
    memcpy(rest, (const typename D::T*)p + k, part.n * sizeof(typename D::T));
    return D::load(rest, 0);
}

template <class D>
INLINE void put(void* p, int64_t k, Full, F v) { D::store((typename D::T*)p + k, v); }
template <class D>
INLINE void put(void* p, int64_t k, Part part, F v) {
    typename D::T ready[W];
    D::store(ready, v);
    memcpy((typename D::T*)p + k, ready, part.n * sizeof(typename D::T));
}

template <class At>
INLINE F gain_at(const float* gain, int64_t k, At at) { return gain ? get<Float32>(gain, k, at) : V::set1(1); }

template <class D>
INLINE typename D::T* row_of(const Strided& rows, int64_t r, int64_t heads, int64_t d) {
    return (typename D::T*)rows.at + r / heads * rows.stride + r % heads * d;
}

// step(k, Full or Part, sum) along n, in four sums that need not wait for each other, joined by join(a, b)
template <class Step, class Join>
INLINE F folded(int64_t n, float start, Step step, Join join) {
    F sums[4] = {V::set1(start), V::set1(start), V::set1(start), V::set1(start)};
    const int64_t whole = n / (4 * W) * (4 * W);
    for (int64_t k = 0; k < whole; k += 4 * W)
        for (int j = 0; j < 4; ++j) sums[j] = step(k + j * W, Full{}, sums[j]);
    along(n - whole, [&](int64_t k, auto at) { sums[0] = step(whole + k, at, sums[0]); });
    return join(join(sums[0], sums[1]), join(sums[2], sums[3]));
}

template <class Step>
INLINE float total(int64_t n, Step step) {
    return V::sum(folded(n, 0, step, [](F a, F b) { return V::add(a, b); }));
}

// Functions ----------------------------------------------------------------------------------------------------------

// e^x = 2^n e^r, |r| <= ln(2) / 2, with the polynomial of Cephes' expf. ln 2 is taken off in two parts, the first of so
// few digits that its product with n is exact. 0 below -104, infinity above 89; NaN stays.
INLINE F exp(F x) {
    x = V::min(V::set1(89), V::max(V::set1(-104), x));
    const F shift = V::set1(12582912);  // 1.5 * 2^23: a sum with it has no digits after the point
    const F n = V::add(V::fma(x, V::set1(1.44269504f), shift), V::set1(-12582912));
    F r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);
    F p = V::set1(1.9875691500e-4f);
    p = V::fma(p, r, V::set1(1.3981999507e-3f));
    p = V::fma(p, r, V::set1(8.3334519073e-3f));
    p = V::fma(p, r, V::set1(4.1665795894e-2f));
    p = V::fma(p, r, V::set1(1.6666665459e-1f));
    p = V::fma(p, r, V::set1(5.0000001201e-1f));
    p = V::fma(V::mul(r, r), p, r);
    return V::scale2(V::add(p, V::set1(1)), n);
}

INLINE F negative(F x) { return V::mul(x, V::set1(-1)); }
INLINE F sigmoid(F x) { return V::div(V::set1(1), V::add(V::set1(1), exp(negative(x)))); }

// An activation gives its value and its derivative; what is not used is not computed.
struct Silu {  // x s(x)
    static INLINE void at(F x, F& value, F& slope) {
        const F s = sigmoid(x), one = V::set1(1);
        value = V::mul(x, s);
        slope = V::mul(s, V::fma(x, V::add(one, negative(s)), one));
    }
};

struct GeluTanh {  // x (1 + tanh u) / 2 = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); s(2 u) is 0 or 1 beyond 30
    static INLINE void at(F x, F& value, F& slope) {
        const F bound = V::set1(30), one = V::set1(1);
        const F z = V::min(bound, V::max(negative(bound), x)), square = V::mul(z, z);
        const F c = V::set1(1.5957691216f), c3 = V::set1(1.5957691216f * 0.044715f);
        const F s = sigmoid(V::mul(z, V::fma(square, c3, c)));
        const F inner = V::mul(z, V::fma(square, V::mul(c3, V::set1(3)), c));  // x d(2 u)/dx
        value = V::mul(x, s);
        slope = V::mul(s, V::fma(inner, V::add(one, negative(s)), one));
    }
};

// x Phi(x), Phi(-a) = e^(-a^2 / 2) t P(t) with t = 1 / (1 + 0.24 a) for 0 <= a <= 15. P was fitted to math.erfc by
// least squares reweighted to the greatest relative error, which is 3e-9. a^2 / 2 is kept in two parts.
struct Gelu {
    static INLINE void at(F x, F& value, F& slope) {
        const F a = V::min(V::set1(15), V::abs(x)), half = V::mul(a, V::set1(0.5f)), high = V::mul(a, half);
        const F low = V::fma_exact(a, half, negative(high));
        F e = exp(negative(high));
        e = V::fma(negative(e), low, e);
        const F one = V::set1(1), t = V::div(one, V::fma(a, V::set1(0.24f), one));
        F p = V::set1(0.0255603673f);
        p = V::fma(p, t, V::set1(-0.124831285f));
        p = V::fma(p, t, V::set1(0.20595714f));
        p = V::fma(p, t, V::set1(-0.144939328f));
        p = V::fma(p, t, V::set1(0.142038279f));
        p = V::fma(p, t, V::set1(0.027820347f));
        p = V::fma(p, t, V::set1(0.0878858769f));
        p = V::fma(p, t, V::set1(0.0889056963f));
        p = V::fma(p, t, V::set1(0.0958610522f));
        p = V::fma(p, t, V::set1(0.0957418557f));
        const F tail = V::mul(e, V::mul(t, p)), phi = V::where_negative(x, tail, V::add(one, negative(tail)));
        value = V::mul(x, phi);
        slope = V::fma(V::mul(x, e), V::set1(0.3989422804f), phi);
    }
};

// RMSNorm ------------------------------------------------------------------------------------------------------------

template <class D>
inline void rms_norm_as(const RmsNorm& t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        const auto* x = row_of<D>(t.x, r, t.heads, t.d);
        auto* y = row_of<D>(t.y, r, t.heads, t.d);
        const float squares = total(t.d, [&](int64_t k, auto at, F sum) {
            const F v = get<D>(x, k, at);
            return V::fma(v, v, sum);
        });
        const float rstd = 1 / __builtin_sqrtf(squares / t.d + t.eps);
        t.rstd[r] = rstd;
        along(t.d, [&](int64_t k, auto at) {
            const F hat = V::mul(get<D>(x, k, at), V::set1(rstd));
            put<D>(y, k, at, V::mul(hat, gain_at(t.gain, k, at)));
        });
    }
}

void rms_norm(const RmsNorm& t, int64_t first, int64_t last) {
    t.dtype == F32 ? rms_norm_as<Float32>(t, first, last) : rms_norm_as<FlushedBf16>(t, first, last);
}

// dx may lie where g, x or add does: a row's sum is taken before any of it is written
template <class D>
inline void rms_norm_backward_as(const RmsNormBackward& t, int64_t r, float* partial) {
    const auto* g = row_of<D>(t.g, r, t.heads, t.d);
    const auto* x = row_of<D>(t.x, r, t.heads, t.d);
    const auto* add = t.add.at ? row_of<D>(t.add, r, t.heads, t.d) : nullptr;
    auto* dx = row_of<D>(t.dx, r, t.heads, t.d);
    const float sum = total(t.d, [&](int64_t k, auto at, F sum) {
        return V::fma(V::mul(get<D>(g, k, at), gain_at(t.gain, k, at)), get<D>(x, k, at), sum);
    });
    const F rstd = V::set1(t.rstd[r]), mean = V::set1(-sum * t.rstd[r] / t.d);
    along(t.d, [&](int64_t k, auto at) {
        const F own = get<D>(g, k, at), hat = V::mul(get<D>(x, k, at), rstd);
        const F inner = V::fma(hat, mean, V::mul(own, gain_at(t.gain, k, at)));
        put<D>(dx, k, at, add ? V::fma(inner, rstd, get<D>(add, k, at)) : V::mul(inner, rstd));
        if (partial) put<Float32>(partial, k, at, V::fma(own, hat, get<Float32>(partial, k, at)));
    });
}

void rms_norm_backward(const RmsNormBackward& t, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
        float* partial = t.partial ? t.partial + c * t.d : nullptr;
        if (partial) memset(partial, 0, t.d * sizeof(float));
        for (int64_t r = c * t.chunk; r < least(t.n, (c + 1) * t.chunk); ++r)
            t.dtype == F32 ? rms_norm_backward_as<Float32>(t, r, partial)
                           : rms_norm_backward_as<FlushedBf16>(t, r, partial);
    }
}

// Rotary positions ---------------------------------------------------------------------------------------------------

// y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2; back: y1 = x1 cos1 + x2 sin2, y2 = x2 cos2 - x1 sin1
template <class D>
inline void rotate_as(const Rotate& t, int64_t first, int64_t last) {
    const int64_t half = t.r / 2;
    for (int64_t i = first; i < last; ++i) {
        auto* x = (typename D::T*)t.x.at + i * t.x.stride;
        const float* cos = t.cos + i * t.r;
        const float* sin = t.sin + i * t.r;
        along(half, [&](int64_t k, auto at) {
            const F cos1 = get<Float32>(cos, k, at), cos2 = get<Float32>(cos + half, k, at);
            const F minus = negative(get<Float32>(sin, k, at)), plus = get<Float32>(sin + half, k, at);
            const F into1 = t.back ? plus : minus, into2 = t.back ? minus : plus;
            for (int64_t h = 0; h < t.heads; ++h) {
                auto* one = x + h * t.d;
                auto* two = one + half;
                const F x1 = get<D>(one, k, at), x2 = get<D>(two, k, at);
                put<D>(one, k, at, V::fma(x2, into1, V::mul(x1, cos1)));
                put<D>(two, k, at, V::fma(x1, into2, V::mul(x2, cos2)));
            }
        });
    }
}

void rotate(const Rotate& t, int64_t first, int64_t last) {
    t.dtype == F32 ? rotate_as<Float32>(t, first, last) : rotate_as<FlushedBf16>(t, first, last);
}

// Gated activations --------------------------------------------------------------------------------------------------

template <class D, class A>
inline void gated_as(const Gated& t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        const auto* gate = row_of<D>(t.gate, r, 1, 0);
        const auto* up = row_of<D>(t.up, r, 1, 0);
        auto* h = row_of<D>(t.h, r, 1, 0);
        along(t.f, [&](int64_t k, auto at) {
            F value, slope;
            A::at(get<D>(gate, k, at), value, slope);
            put<D>(h, k, at, V::mul(value, get<D>(up, k, at)));
        });
    }
}

template <class D, class A>
inline void gated_backward_as(const Gated& t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        auto* gate = row_of<D>(t.gate, r, 1, 0);
        auto* up = row_of<D>(t.up, r, 1, 0);
        auto* h = row_of<D>(t.h, r, 1, 0);
        const auto* dh = row_of<D>(t.dh, r, 1, 0);
        along(t.f, [&](int64_t k, auto at) {
            F value, slope;
            A::at(get<D>(gate, k, at), value, slope);
            const F u = get<D>(up, k, at), g = get<D>(dh, k, at);
            put<D>(h, k, at, V::mul(value, u));
            put<D>(up, k, at, V::mul(value, g));
            put<D>(gate, k, at, V::mul(slope, V::mul(g, u)));
        });
    }
}

void gated(const Gated& t, int64_t first, int64_t last) {
    const bool wide = t.dtype == F32;
    if (t.act == SILU) (wide ? gated_as<Float32, Silu> : gated_as<FlushedBf16, Silu>)(t, first, last);
    if (t.act == GELU_TANH) (wide ? gated_as<Float32, GeluTanh> : gated_as<FlushedBf16, GeluTanh>)(t, first, last);
    if (t.act == GELU) (wide ? gated_as<Float32, Gelu> : gated_as<FlushedBf16, Gelu>)(t, first, last);
}

void gated_backward(const Gated& t, int64_t first, int64_t last) {
    const bool wide = t.dtype == F32;
    if (t.act == SILU) (wide ? gated_backward_as<Float32, Silu> : gated_backward_as<FlushedBf16, Silu>)(t, first, last);
    if (t.act == GELU_TANH)
        (wide ? gated_backward_as<Float32, GeluTanh> : gated_backward_as<FlushedBf16, GeluTanh>)(t, first, last);
    if (t.act == GELU) (wide ? gated_backward_as<Float32, Gelu> : gated_backward_as<FlushedBf16, Gelu>)(t, first, last);
}

// Cross-entropy ------------------------------------------------------------------------------------------------------

// Three readings of a row, which the second-level cache holds after the first: the largest, the sum of exponentials (in
// pieces, so that it loses no digits over a long row), and the gradient. A NaN that `max` passes over is in the sum.
template <class D>
inline void cross_entropy_row(const CrossEntropy& t, int64_t r) {
    constexpr int64_t PIECE = 4096;
    const auto* x = row_of<D>(t.logits, r, 1, 0);
    float lanes[W], top = -INFINITE, sum = 0;
    const auto larger = [](F a, F b) { return V::max(a, b); };
    const auto keep = [&](int64_t k, auto at, F a) { return V::max(a, get<D>(x, k, at, -INFINITE)); };
    V::store(lanes, folded(t.v, -INFINITE, keep, larger));
    for (int l = 0; l < W; ++l) top = lanes[l] > top ? lanes[l] : top;
    const F down = V::set1(-top);
    for (int64_t piece = 0; piece < t.v; piece += PIECE)
        sum += total(least(PIECE, t.v - piece), [&](int64_t k, auto at, F s) {
            return V::add(s, exp(V::add(get<D>(x + piece, k, at, -INFINITE), down)));
        });
    const int64_t target = t.targets[r];
    const F wanted = V::add(get<D>(x, target, Part{1}), down);  // in the first lane
    V::store(lanes, wanted);
    t.losses[r] = __builtin_logf(sum) - lanes[0];
    if (!t.out.at) return;
    auto* out = row_of<D>(t.out, r, 1, 0);
    const F scale = V::set1(t.scale / sum);
    along(t.v, [&](int64_t k, auto at) { put<D>(out, k, at, V::mul(exp(V::add(get<D>(x, k, at), down)), scale)); });
    put<D>(out, target, Part{1}, V::fma(exp(wanted), scale, V::set1(-t.scale)));
}

void cross_entropy(const CrossEntropy& t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        t.dtype == F32 ? cross_entropy_row<Float32>(t, r) : cross_entropy_row<FlushedBf16>(t, r);
}

const Elementwise ELEMENTWISE = {rms_norm, rms_norm_backward, rotate, gated, gated_backward, cross_entropy};

}  // namespace
