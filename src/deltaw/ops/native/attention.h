// Attention over packs of documents, forward and backward: causal within a document, nothing across.
//
//   S = scale Q K^T      P = softmax(S)      O = P V       lse = log of the sum of exp(S)
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta) scale, delta = sum(dO O)      dQ = dS K      dK = dS^T Q
//
// One routine multiplies: C += A B, where an operand is made of units, one float or a pair of bf16 that lie side by
// side along the summed dimension. A unit of A is spread over a vector and multiplied with W units of a row of B. The
// operands are copied into panels so that this holds for all seven products:
//
//   turned       [summed / DEPTH][W or more][DEPTH]     K and V for S and dP: transposed
//   interleaved  [summed / DEPTH][dim][DEPTH]           V for O, K for dQ, Q and dO for dK and dV: DEPTH rows mingled
//
// Scores exist for TILE queries at a time, against KEYS keys. The forward keeps a running maximum and sum (Milakov and
// Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135), the backward computes P again from lse. What lies beyond
// the diagonal is left out, a group of TILE queries at a time. Sums are taken in an order that depends on the documents
// alone. A document with a front is computed as the two together, of which only the queries behind the front are its own.
// Included by kernels.h, whose V, F and W these are.
#pragma once
#include <math.h>

#include "native.h"

namespace {

constexpr int TILE = W == 16 ? 8 : V::TALL;  // rows of C at a time; divides W: groups of rows end where vectors do
constexpr int BROAD = V::TALL < 3 ? 2 : 3;   // vectors of C at a time
constexpr int64_t QUERIES = 64;              // that share a pass over the keys
constexpr int64_t KEYS = 64;                 // whose scores are taken together
constexpr int64_t FORWARD_KEYS = 256;        // the same in the forward
constexpr int64_t AHEAD_ROWS = 64;           // fetched before they are read: of this document, or of the next
constexpr int64_t WIDEST = 256;              // a head at most
constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.693147180559945309;
constexpr float LEAST = -3e38f;  // a maximum before the first score
constexpr float STALE = 8;       // powers of two


// Units ---------------------------------------------------------------------------------------------------------------

struct Whole {  // a float
    using T = float;
    using R = F;
    static constexpr int DEPTH = 1;
    static R one(const T* p) { return V::set1(*p); }
    static R row(const T* p) { return V::load(p); }
    static F dot(R a, R b, F c) { return V::fma(a, b, c); }
    static void along(T* p, F a) { V::store(p, a); }
    static void across(T* p, const F* rows) { V::store(p, rows[0]); }
    static void both(T* across, T* along, int64_t, const F* rows) {
        V::store(across, rows[0]), V::store(along, rows[0]);
    }
    static void mingle(const T* rows, int64_t, T* out) { V::store(out, V::load(rows)); }
};

#ifdef DELTAW_BF16_DOT
struct Paired {  // two bf16; products are exact, sums in float32
    using T = uint16_t;
    using R = V::H;
    static constexpr int DEPTH = 2;
    static R one(const T* p) { return V::half_pair(p); }
    static R row(const T* p) { return V::load_half(p); }
    static F dot(R a, R b, F c) { return V::dot_half(a, b, c); }
    static void along(T* p, F a) { V::round_half(p, a); }
    static void across(T* p, const F* rows) { V::round_halves(p, rows[0], rows[1]); }
    static void both(T* across, T* along, int64_t stride, const F* rows) {
        V::round_halves(across, along, along + stride, rows[0], rows[1]);
    }
    static void mingle(const T* rows, int64_t stride, T* out) { V::mingle_halves(rows, rows + stride, out); }
};
#endif

// C += A B ------------------------------------------------------------------------------------------------------------
//
// A [TILE, depth]: ALONG: unit k of row r is at a + r * stride + k * DEPTH; else at a + k * stride + r * DEPTH.
// B [depth, W * N]: row k at b + k * b_stride.    C [TILE, W * N]: row r at c + r * c_stride.

template <class Op, bool ALONG, int N>
inline void multiply(const typename Op::T* a, int64_t stride, const typename Op::T* b, int64_t b_stride, int64_t depth,
                     float* c, int64_t c_stride, bool add) {
    F sum[TILE][N];
    for (int r = 0; r < TILE; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = add ? V::load(c + r * c_stride + n * W) : V::set1(0);
    for (int64_t k = 0; k < depth; ++k) {
        typename Op::R row[N];
        for (int n = 0; n < N; ++n) row[n] = Op::row(b + k * b_stride + n * W * Op::DEPTH);
        for (int r = 0; r < TILE; ++r) {
            const typename Op::R x = Op::one(ALONG ? a + r * stride + k * Op::DEPTH : a + k * stride + r * Op::DEPTH);
            for (int n = 0; n < N; ++n) sum[r][n] = Op::dot(x, row[n], sum[r][n]);
        }
    }
    for (int r = 0; r < TILE; ++r)
        for (int n = 0; n < N; ++n) V::store(c + r * c_stride + n * W, sum[r][n]);
}

// The same for any number of columns, a multiple of W
template <class Op, bool ALONG>
inline void multiply_wide(const typename Op::T* a, int64_t stride, const typename Op::T* b, int64_t b_stride,
                          int64_t depth, float* c, int64_t c_stride, int64_t columns, bool add) {
    for (int64_t left = columns / W, n; left > 0; left -= n, b += n * W * Op::DEPTH, c += n * W) {
        const int64_t pieces = (left + BROAD - 1) / BROAD;
        n = (left + pieces - 1) / pieces;
        if (n == 1) multiply<Op, ALONG, 1>(a, stride, b, b_stride, depth, c, c_stride, add);
        if (n == 2) multiply<Op, ALONG, 2>(a, stride, b, b_stride, depth, c, c_stride, add);
        if (BROAD > 2 && n == 3) multiply<Op, ALONG, BROAD>(a, stride, b, b_stride, depth, c, c_stride, add);
    }
}

// Panels --------------------------------------------------------------------------------------------------------------

// What a routine needs of a document and a head
struct Place {
    int64_t front;                  // rows of its front, which are its first
    int64_t front_start, start;     // where row 0 lies, and where it would lie if those behind the front went on to it
    int64_t length, padded;         // rows; their number up to a multiple of 16
    int64_t dim, wide;              // features of a head, up to a multiple of 16
    int64_t token(int64_t row) const { return (row < front ? front_start : start) + row; }
};

inline Place place_of(const Attention& t, int64_t doc) {
    const int64_t start = t.bounds[doc], own = t.bounds[doc + 1] - start;
    const int64_t before = t.fronts ? t.fronts[doc] : -1;
    const int64_t front_start = before < 0 ? 0 : t.bounds[before];
    const int64_t front = before < 0 ? 0 : t.bounds[before + 1] - front_start;
    return {front, front_start, start - front, front + own, up(front + own, 16), t.dim, up(t.dim, 16)};
}

// A row that is read soon: they lie too far from each other for the processor to guess
template <class D>
inline void fetch(const Rows& x, const Place& at, int64_t head, int64_t row) {
    const auto* p = (const typename D::T*)x.at + at.token(row) * x.token + head * x.head;
    for (int64_t d = 0; d < at.dim * int64_t(sizeof(*p)); d += 64) V::prefetch((const uint8_t*)p + d);
}

// Rows [first, first + n) of a head of x, with zeros after their features and up to `padded` rows
template <class Op, class D>
inline void copy_rows(const Rows& x, const Place& at, int64_t head, int64_t first, int64_t n, int64_t padded,
                      typename Op::T* out) {
    using T = typename Op::T;
    for (int64_t i = 0; i < n; ++i, out += at.wide) {
        fetch<D>(x, at, head, first + i + AHEAD_ROWS);
        if (at.dim != at.wide) memset(out, 0, at.wide * sizeof(T));
        const int64_t from = at.token(first + i) * x.token + head * x.head;
        if constexpr (sizeof(T) == sizeof(typename D::T)) {
            const T* p = (const T*)x.at + from;
            int64_t d = 0;
            for (; d + 16 <= at.dim; d += 16) memcpy(out + d, p + d, 16 * sizeof(T));
            if (d < at.dim) memcpy(out + d, p + d, (at.dim - d) * sizeof(T));
        } else {
            read_floats<D>(x.at, from, at.dim, out);
        }
    }
    memset(out, 0, (padded - n) * at.wide * sizeof(T));
}

template <class Op>
inline void interleave(const typename Op::T* rows, int64_t n, int64_t wide, typename Op::T* out) {
    for (int64_t i = 0; i < n; i += Op::DEPTH)
        for (int64_t d = 0; d < wide; d += W) Op::mingle(rows + i * wide + d, wide, out + i * wide + d * Op::DEPTH);
}

// 16 rows into a turned panel of `keys` columns; a unit of either kind has 32 bits
template <class Op>
inline void turn(const typename Op::T* rows, int64_t wide, int64_t keys, typename Op::T* out) {
    const int64_t units = wide / Op::DEPTH;
    for (int64_t k = 0; k < units; k += 16)
        V::turn16((const uint32_t*)rows + k, units, least(16, units - k), (uint32_t*)out + k * keys, keys);
}

// All keys (or values) of a head: turned, in tiles of `keys`, and interleaved; either may be null
template <class Op, class D>
inline void pack(const Rows& x, const Place& at, int64_t head, typename Op::T* turned, typename Op::T* mingled,
                 int64_t keys) {
    alignas(64) typename Op::T rows[16 * WIDEST];
    for (int64_t j = 0; j < at.length; j += 16) {
        copy_rows<Op, D>(x, at, head, j, least(16, at.length - j), 16, rows);
        if (turned) turn<Op>(rows, at.wide, keys, turned + j / keys * keys * at.wide + j % keys * Op::DEPTH);
        if (mingled) interleave<Op>(rows, 16, at.wide, mingled + j * at.wide);
    }
}

// n rows of floats, none of them of a front, into a head of x
template <class D>
inline void write_rows(const Rows& x, const Place& at, int64_t head, int64_t first, int64_t n, const float* values) {
    for (int64_t i = 0; i < n; ++i)
        write_floats<D>(x.at, (at.start + first + i) * x.token + head * x.head, at.dim, values + i * at.wide);
}

// Memory, in pieces that begin where a cache line does
struct Room {
    char* at;
    template <class T>
    T* take(int64_t n) {
        T* out = (T*)at;
        at += up(n * int64_t(sizeof(T)), 64);
        return out;
    }
};

// Scores --------------------------------------------------------------------------------------------------------------

// 2^x; 0 below 2^-126. Relative error 2e-7.
inline F exp2_of(F x) {
    x = V::max(V::set1(-127), x);  // in this order NaN stays
    const F shifter = V::set1(12582912 + 127);  // 1.5 * 2^23: the nearest integer is in the last bits of the sum
    const F t = V::add(x, shifter);
    const F f = V::fma(V::add(t, V::set1(-12582912 - 127)), V::set1(-1), x);
    F y = V::set1(0.001326472731307149f);  // least relative error on [-1/2, 1/2], exact at 0
    y = V::fma(y, f, V::set1(0.009671512991189957f));
    y = V::fma(y, f, V::set1(0.05550733581185341f));
    y = V::fma(y, f, V::set1(0.24022242426872253f));
    y = V::fma(y, f, V::set1(0.6931470036506653f));
    y = V::fma(y, f, V::set1(1));
    return V::mul(y, V::power(t));
}

inline float exp2_of(float x) {
    float lanes[W];
    V::store(lanes, exp2_of(V::set1(x)));
    return lanes[0];
}

// The columns of a tile of keys, from key j on, that the TILE queries from i on may see: [first, last), vectors whole
struct Span {
    int64_t first, last;
};

inline Span span_of(const Attention& t, const Place& at, int64_t i, int64_t j, int64_t keys) {
    const int64_t seen = most(0, i - t.window + 1 - j) / W * W;
    return {seen, least(least(keys, at.padded - j), up(i + TILE - j, W))};
}

// -infinity over the scores in `span` that query i may not see
inline void hide(const Attention& t, int64_t i, int64_t j, Span span, float* s) {
    for (int64_t c = span.first; c < i - t.window + 1 - j && c < span.last; ++c) s[c] = -INFINITY;
    for (int64_t c = most(span.first, i + 1 - j); c < span.last; ++c) s[c] = -INFINITY;
}

// Forward -------------------------------------------------------------------------------------------------------------

template <class Op>
struct Forward {
    using T = typename Op::T;
    T *keys, *values, *queries, *probs;
    float *scores, *out, *top, *sum;
    Forward(Room& r, int64_t padded, int64_t wide) {
        keys = r.take<T>(up(padded, FORWARD_KEYS) * wide), values = r.take<T>(padded * wide);
        queries = r.take<T>(QUERIES * wide), probs = r.take<T>(TILE * FORWARD_KEYS);
        scores = r.take<float>(TILE * FORWARD_KEYS), out = r.take<float>(QUERIES * wide);
        top = r.take<float>(QUERIES), sum = r.take<float>(QUERIES);
    }
};

// Probabilities of TILE queries from i on against a tile of keys, as yet without their sum: 2^(s - top), where `top` is
// at most STALE below the maximum so far. It seldom moves; `out` [TILE, wide] and `sum` then follow it.
template <class Op>
inline void soften(const Attention& t, const Place& at, int64_t i, int64_t j, Span span, Forward<Op>& f, float* top,
                   float* sum, float* out) {
    const F by = V::set1(t.scale * LOG2E);
    float found[TILE];
    bool moves = false;
    for (int r = 0; r < TILE; ++r) {
        float* s = f.scores + r * FORWARD_KEYS;
        hide(t, i + r, j, span, s);
        F high = V::load(s + span.first);
        for (int64_t c = span.first + W; c < span.last; c += W) high = V::max(high, V::load(s + c));
        found[r] = V::largest(high) * (t.scale * LOG2E);
        moves |= found[r] > top[r] + STALE;
    }
    if (moves)
        for (int r = 0; r < TILE; ++r) {
            if (!(found[r] > top[r])) continue;
            const float less = exp2_of(top[r] - found[r]);
            top[r] = found[r], sum[r] *= less;
            for (int64_t d = 0; d < at.wide; d += W)
                V::store(out + r * at.wide + d, V::mul(V::load(out + r * at.wide + d), V::set1(less)));
        }
    for (int r = 0; r < TILE; ++r) {
        const float* s = f.scores + r * FORWARD_KEYS;
        typename Op::T* probs = f.probs + r * FORWARD_KEYS;
        const F less = V::set1(-top[r]);
        F all = V::set1(0);
        for (int64_t c = span.first; c < span.last; c += W) {
            const F p = exp2_of(V::fma(V::load(s + c), by, less));
            all = V::add(all, p);
            Op::along(probs + c, p);
        }
        sum[r] += V::sum(all);
    }
}

template <class Op, class D>
inline void attend_queries(const Attention& t, const Place& at, int64_t head, int64_t i0, Forward<Op>& f) {
    const int64_t n = least(QUERIES, at.length - i0), rows = up(n, TILE), end = up(i0 + n, Op::DEPTH);
    copy_rows<Op, D>(t.q, at, head, i0, n, rows, f.queries);
    memset(f.out, 0, rows * at.wide * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) f.top[r] = LEAST, f.sum[r] = 0;
    for (int64_t j = most(0, i0 - t.window + 1) / FORWARD_KEYS * FORWARD_KEYS; j < i0 + n; j += FORWARD_KEYS)
        for (int64_t r = 0; r < rows; r += TILE) {
            const int64_t i = i0 + r;
            const Span span = span_of(t, at, i, j, FORWARD_KEYS);
            if (span.first >= span.last) continue;
            float* out = f.out + r * at.wide;
            const typename Op::T* keys = f.keys + j * at.wide + span.first * Op::DEPTH;
            multiply_wide<Op, true>(f.queries + r * at.wide, at.wide, keys, FORWARD_KEYS * Op::DEPTH,
                                    at.wide / Op::DEPTH, f.scores + span.first, FORWARD_KEYS, span.last - span.first,
                                    false);
            soften(t, at, i, j, span, f, f.top + r, f.sum + r, out);
            const int64_t last = least(least(span.last, up(i + TILE - j, Op::DEPTH)), end - j);
            multiply_wide<Op, true>(f.probs + span.first, FORWARD_KEYS, f.values + (j + span.first) * at.wide,
                                    at.wide * Op::DEPTH, (last - span.first) / Op::DEPTH, out, at.wide, at.wide, true);
        }
    for (int64_t r = 0; r < n; ++r) {
        const F by = V::set1(1 / f.sum[r]);
        float* out = f.out + r * at.wide;
        for (int64_t d = 0; d < at.wide; d += W) V::store(out + d, V::mul(V::load(out + d), by));
        t.lse[head * t.tokens + at.start + i0 + r] = float((double(f.top[r]) + log2f(f.sum[r])) * LN2);
    }
    write_rows<D>(t.o, at, head, i0, n, f.out);
}

template <class Op, class D>
void attend_as(const Attention& t, const Heads& part, void* scratch) {
    const Place at = place_of(t, part.doc);
    const int64_t group = t.heads / t.shared;
    Room room = {(char*)scratch};
    Forward<Op> f(room, at.padded, at.wide);
    for (int64_t h = part.first; h < part.last; ++h) {
        if (h == part.first || h % group == 0) {
            pack<Op, D>(t.k, at, h / group, f.keys, nullptr, FORWARD_KEYS);
            pack<Op, D>(t.v, at, h / group, nullptr, f.values, FORWARD_KEYS);
        }
        for (int64_t i = at.front; i < at.length; i += QUERIES) attend_queries<Op, D>(t, at, h, i, f);
    }
}

// Backward ------------------------------------------------------------------------------------------------------------

template <class Op>
struct Backward {
    using T = typename Op::T;
    T *keys, *values, *key_rows;                        // a document's: turned, turned, interleaved
    T *queries, *grads, *query_rows, *grad_rows;        // of QUERIES tokens: as they are, and interleaved
    T *probs, *slopes, *slope_rows;                     // P and dS interleaved [QUERIES, KEYS]; dS [TILE, KEYS]
    float *scores, *dp, *dq, *lse, *delta, *more, *dk, *dv;
    Backward(Room& r, int64_t padded, int64_t wide) {
        keys = r.take<T>(up(padded, KEYS) * wide), values = r.take<T>(up(padded, KEYS) * wide);
        key_rows = r.take<T>(padded * wide);
        queries = r.take<T>(QUERIES * wide), grads = r.take<T>(QUERIES * wide);
        query_rows = r.take<T>(QUERIES * wide), grad_rows = r.take<T>(QUERIES * wide);
        probs = r.take<T>(QUERIES * KEYS), slopes = r.take<T>(QUERIES * KEYS), slope_rows = r.take<T>(TILE * KEYS);
        scores = r.take<float>(TILE * KEYS), dp = r.take<float>(TILE * KEYS), dq = r.take<float>(QUERIES * wide);
        lse = r.take<float>(QUERIES), delta = r.take<float>(QUERIES);
        dk = r.take<float>(2 * padded * wide), dv = dk + padded * wide, more = r.take<float>(2 * padded * wide);
    }
};

// P and dS of TILE queries, `row` the first of them among QUERIES, from their scores and dP
template <class Op>
inline void slope(const Attention& t, int64_t i, int64_t j, int64_t row, Span span, Backward<Op>& b) {
    const F by = V::set1(t.scale * LOG2E), scale = V::set1(t.scale);
    for (int r = 0; r < TILE; ++r) hide(t, i + r, j, span, b.scores + r * KEYS);
    for (int r = 0; r < TILE; r += Op::DEPTH) {
        F lse[Op::DEPTH], delta[Op::DEPTH];
        for (int k = 0; k < Op::DEPTH; ++k) {
            lse[k] = V::set1(-b.lse[row + r + k]);
            delta[k] = V::set1(-b.delta[row + r + k]);
        }
        const float *s = b.scores + r * KEYS, *dp = b.dp + r * KEYS;
        typename Op::T *probs = b.probs + (row + r) * KEYS, *slopes = b.slopes + (row + r) * KEYS;
        typename Op::T* slope_rows = b.slope_rows + r * KEYS;
        for (int64_t c = span.first; c < span.last; c += W) {
            F p[Op::DEPTH], d[Op::DEPTH];
            for (int k = 0; k < Op::DEPTH; ++k) {
                p[k] = exp2_of(V::fma(V::load(s + k * KEYS + c), by, lse[k]));
                d[k] = V::mul(p[k], V::fma(V::load(dp + k * KEYS + c), scale, delta[k]));
            }
            Op::across(probs + c * Op::DEPTH, p);
            Op::both(slopes + c * Op::DEPTH, slope_rows + c, KEYS, d);
        }
    }
}

// lse in powers of two, and delta times the scale, of n queries; zeros up to `rows`
template <class D>
inline void constants(const Attention& t, const Place& at, int64_t head, int64_t i0, int64_t n, int64_t rows,
                      float* lse, float* delta) {
    alignas(64) float g[WIDEST + W], o[WIDEST + W];
    for (int64_t r = 0; r < rows; ++r) lse[r] = delta[r] = 0;
    for (int64_t r = 0; r < n; ++r) {
        const int64_t token = at.start + i0 + r;
        fetch<D>(t.o, at, head, i0 + r + AHEAD_ROWS);
        read_floats<D>(t.g.at, token * t.g.token + head * t.g.head, at.dim, g);
        read_floats<D>(t.o.at, token * t.o.token + head * t.o.head, at.dim, o);
        F sum = V::set1(0);
        for (int64_t d = 0; d < at.dim; d += W) sum = V::fma(V::load(g + d), V::load(o + d), sum);
        delta[r] = V::sum(sum) * t.scale;
        lse[r] = t.lse[head * t.tokens + token] * LOG2E;
    }
}

// What QUERIES queries from i0 on give to dk and dv [padded, wide], and their dq. The first that sees a key begins its
// sum with a store; behind a front, where queries and keys are cut differently, all sums begin as zeros.
template <class Op, class D>
inline void attend_queries_backward(const Attention& t, const Place& at, int64_t head, int64_t i0, Backward<Op>& b,
                                    float* dk, float* dv) {
    const int64_t n = least(QUERIES, at.length - i0), rows = up(n, TILE), wide = at.wide;
    constexpr int64_t DEPTH = Op::DEPTH;
    copy_rows<Op, D>(t.q, at, head, i0, n, rows, b.queries);
    copy_rows<Op, D>(t.g, at, head, i0, n, rows, b.grads);
    interleave<Op>(b.queries, rows, wide, b.query_rows);
    interleave<Op>(b.grads, rows, wide, b.grad_rows);
    constants<D>(t, at, head, i0, n, rows, b.lse, b.delta);
    memset(b.dq, 0, rows * wide * sizeof(float));
    for (int64_t j = most(0, i0 - t.window + 1) / KEYS * KEYS; j < i0 + n; j += KEYS) {
        for (int64_t r = 0; r < rows; r += TILE) {
            const int64_t i = i0 + r;
            const Span span = span_of(t, at, i, j, KEYS);
            const int64_t columns = span.last - span.first, turned = j * wide + span.first * DEPTH;
            if (columns <= 0) continue;
            multiply_wide<Op, true>(b.queries + r * wide, wide, b.keys + turned, KEYS * DEPTH, wide / DEPTH,
                                    b.scores + span.first, KEYS, columns, false);
            multiply_wide<Op, true>(b.grads + r * wide, wide, b.values + turned, KEYS * DEPTH, wide / DEPTH,
                                    b.dp + span.first, KEYS, columns, false);
            slope(t, i, j, r, span, b);
            const int64_t last = least(span.last, up(i + TILE - j, DEPTH));
            multiply_wide<Op, true>(b.slope_rows + span.first, KEYS, b.key_rows + (j + span.first) * wide,
                                    wide * DEPTH, (last - span.first) / DEPTH, b.dq + r * wide, wide, wide, true);
        }
        for (int64_t c = 0; c < least(KEYS, at.length - j); c += TILE) {
            const int64_t first = most(0, j + c - i0) / DEPTH * DEPTH;
            const int64_t last = up(least(n, j + c + TILE - 1 + t.window - i0), DEPTH);
            if (first >= last) continue;
            const int64_t from = first * KEYS + c * DEPTH;
            multiply_wide<Op, false>(b.probs + from, KEYS * DEPTH, b.grad_rows + first * wide, wide * DEPTH,
                                     (last - first) / DEPTH, dv + (j + c) * wide, wide, wide, at.front || j + c < i0);
            multiply_wide<Op, false>(b.slopes + from, KEYS * DEPTH, b.query_rows + first * wide, wide * DEPTH,
                                     (last - first) / DEPTH, dk + (j + c) * wide, wide, wide, at.front || j + c < i0);
        }
    }
    write_rows<D>(t.dq, at, head, i0, n, b.dq);
}

inline void add(float* sum, const float* more, int64_t n) {
    for (int64_t k = 0; k < n; k += W) V::store(sum + k, V::add(V::load(sum + k), V::load(more + k)));
}

template <class D>
inline void write_keys(const Attention& t, const Place& at, int64_t shared, const float* sums) {
    const int64_t own = at.length - at.front;
    write_rows<D>(t.dk, at, shared, at.front, own, sums + at.front * at.wide);
    write_rows<D>(t.dv, at, shared, at.front, own, sums + (at.padded + at.front) * at.wide);
}

// Each head's dk and dv are summed on their own and then added, head after head: what one thread does for all heads of
// a group has the same bits as `gather` of what several did.
template <class Op, class D>
void attend_backward_as(const Attention& t, const Heads& part, float* sums, void* scratch) {
    const Place at = place_of(t, part.doc);
    const int64_t group = t.heads / t.shared, shared = part.first / group, n = at.padded * at.wide;
    Room room = {(char*)scratch};
    Backward<Op> b(room, at.padded, at.wide);
    float* all = sums && !at.front ? sums : b.dk;
    pack<Op, D>(t.k, at, shared, b.keys, b.key_rows, KEYS);
    pack<Op, D>(t.v, at, shared, b.values, nullptr, KEYS);
    for (int64_t h = part.first; h < part.last; ++h) {
        float* own = h == part.first ? all : b.more;
        if (at.front) memset(own, 0, 2 * n * sizeof(float));
        for (int64_t i = at.front; i < at.length; i += QUERIES)
            attend_queries_backward<Op, D>(t, at, h, i, b, own, own + n);
        if (own == b.more) add(all, b.more, 2 * n);
    }
    if (all == b.dk) write_keys<D>(t, at, shared, all);
    if (!at.front) return;
    add(sums, all, at.front * at.wide);
    add(sums + up(at.front, 16) * at.wide, all + n, at.front * at.wide);
}

// dk and dv of a key-value head from n sums that lie one after the other
template <class D>
void attention_gather_as(const Attention& t, int64_t doc, int64_t shared, float* sums, int64_t n) {
    const Place at = place_of(t, doc);
    const int64_t size = 2 * at.padded * at.wide;
    for (int64_t k = 1; k < n; ++k) add(sums, sums + k * size, size);
    write_keys<D>(t, at, shared, sums);
}

// By dtype ------------------------------------------------------------------------------------------------------------

#ifdef DELTAW_BF16_DOT
using Half = Paired;
#else
using Half = Whole;
#endif

int64_t attention_scratch(const Attention& t, int64_t longest, bool backward) {
    Room room = {nullptr};
    const int64_t padded = up(longest, 16), wide = up(t.dim, 16);
    if (backward) Backward<Whole>(room, padded, wide);  // with the larger units
    else Forward<Whole>(room, padded, wide);
    return int64_t(room.at - (char*)nullptr);
}

void attend(const Attention& t, const Heads& part, void* scratch) {
    if (t.dtype == F32) attend_as<Whole, Float32>(t, part, scratch);
    if (t.dtype == BF16) attend_as<Half, BFloat16>(t, part, scratch);
}

void attend_backward(const Attention& t, const Heads& part, float* sums, void* scratch) {
    if (t.dtype == F32) attend_backward_as<Whole, Float32>(t, part, sums, scratch);
    if (t.dtype == BF16) attend_backward_as<Half, BFloat16>(t, part, sums, scratch);
}

void attention_gather(const Attention& t, int64_t doc, int64_t shared, float* sums, int64_t n) {
    if (t.dtype == F32) attention_gather_as<Float32>(t, doc, shared, sums, n);
    if (t.dtype == BF16) attention_gather_as<BFloat16>(t, doc, shared, sums, n);
}

}  // namespace
