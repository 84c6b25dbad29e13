// The kernels, written once over a small vector type V that the including file defines (path_*.cpp say what V is).
// V::F holds V::W floats, V::I as many 32-bit integers. Sums and products that must equal the reference bit for bit
// (quantise, dequantise) use mul, add and div alone; fma stands where a tolerance is promised (product).
#pragma once
#include <string.h>

#include "native.h"

namespace {

using F = V::F;
using I = V::I;
constexpr int W = V::W;
constexpr int64_t LONGEST = 4096;  // values in a block, at most

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements of each dtype -------------------------------------------------------------------------------------------

struct Float32 {
    using T = float;
    static F load(const void* p, int64_t i) { return V::load((const float*)p + i); }
    static void store(T* p, F v) { V::store(p, v); }
};
struct BFloat16 {
    using T = uint16_t;
    static F load(const void* p, int64_t i) { return V::load_bf16((const uint16_t*)p + i); }
    static void store(T* p, F v) { V::store_bf16(p, v); }
};
struct Float16 {
    using T = uint16_t;
    static F load(const void* p, int64_t i) { return V::load_f16((const uint16_t*)p + i); }
    static void store(T* p, F v) { V::store_f16(p, v); }
};

// n values from p + i as floats, zeros up to a multiple of W
template <class D>
inline void read_floats(const void* p, int64_t i, int64_t n, float* out) {
    int64_t k = 0;
    for (; k + W <= n; k += W) V::store(out + k, D::load(p, i + k));
    if (k == n) return;
    typename D::T rest[W] = {};
    memcpy(rest, (const typename D::T*)p + i + k, (n - k) * sizeof(typename D::T));
    V::store(out + k, D::load(rest, 0));
}

inline void read_floats(int32_t dtype, const void* p, int64_t i, int64_t n, float* out) {
    if (dtype == F32) read_floats<Float32>(p, i, n, out);
    if (dtype == BF16) read_floats<BFloat16>(p, i, n, out);
    if (dtype == F16) read_floats<Float16>(p, i, n, out);
}

// n floats, padded to a multiple of W, rounded into p + i
template <class D>
inline void write_floats(void* p, int64_t i, int64_t n, const float* values) {
    int64_t k = 0;
    for (; k + W <= n; k += W) D::store((typename D::T*)p + i + k, V::load(values + k));
    if (k == n) return;
    typename D::T ready[W] = {};
    D::store(ready, V::load(values + k));
    memcpy((typename D::T*)p + i + k, ready, (n - k) * sizeof(typename D::T));
}

inline void write_floats(int32_t dtype, void* p, int64_t i, int64_t n, const float* values) {
    if (dtype == F32) write_floats<Float32>(p, i, n, values);
    if (dtype == BF16) write_floats<BFloat16>(p, i, n, values);
    if (dtype == F16) write_floats<Float16>(p, i, n, values);
}

// Quantise -----------------------------------------------------------------------------------------------------------

// The rank of v is the number of bounds below it: a walk down a binary tree, 2 i + (v > bound) at each level. Level l
// of the tree has 2^l bounds: up to eight fit one permute, below that they are gathered.
struct Tree {
    alignas(64) float level[8][16];
    float flat[256];
    int bits;

    Tree(const float* bounds, int n_bits) : bits(n_bits) {
        for (int l = 0; l < bits; ++l)
            for (int i = 0; i < (1 << l); ++i) {
                float bound = bounds[((2 * i + 1) << (bits - 1 - l)) - 1];
                flat[(1 << l) - 1 + i] = bound;
                if (l < 4) level[l][i] = bound;
            }
    }

    I rank(F v) const {
        I i = V::iset1(0);
        for (int l = 0; l < bits; ++l) {
            F bound = l < 4 ? V::lookup8(V::load(level[l]), i) : V::gather(flat + (1 << l) - 1, i);
            i = V::twice_plus(i, v, bound);
        }
        return i;
    }
};

inline float largest_of(const float* values, int64_t n) {  // n padded to W with zeros
    F most_yet = V::set1(0);
    for (int64_t k = 0; k < n; k += W) most_yet = V::max(most_yet, V::abs(V::load(values + k)));
    float lanes[W], found = 0;
    V::store(lanes, most_yet);
    for (int l = 0; l < W; ++l) found = lanes[l] > found ? lanes[l] : found;
    return found;
}

void quantise(const Quantise& q, int64_t first, int64_t last) {
    const int64_t block = int64_t(1) << q.block_log2;
    const Tree tree(q.bounds, q.bits);
    const F lo = V::set1(-1), hi = V::set1(1);
    alignas(64) float values[LONGEST + W];
    alignas(64) uint8_t codes[LONGEST + W];
    for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * block, n = least(block, q.n - start);
        read_floats(q.dtype, q.values, start, n, values);
        const float largest = largest_of(values, n);
        const float safe = largest < 1e-38f ? 1e-38f : largest;
        // bitsandbytes divides in a short last block, and keeps its absmax above zero
        const bool is_short = n < block;
        q.absmax[b] = is_short ? safe : largest;
        const F factor = V::set1(is_short ? safe : 1.0f / safe);
        for (int64_t k = 0; k < n; k += W) {
            F v = V::load(values + k);
            v = is_short ? V::div(v, factor) : V::mul(v, factor);
            V::store_bytes(codes + k, tree.rank(V::min(hi, V::max(lo, v))));
        }
        if (q.bits == 8) {
            for (int64_t k = 0; k < n; ++k) q.codes[start + k] = q.order[codes[k]];
        } else {  // an odd count ends in the code of zero, which read_floats' padding gave
            for (int64_t k = 0; k < n; ++k) codes[k] = q.order[codes[k]];
            if (n % 2) codes[n] = q.order[codes[n]];
            uint8_t* out = q.codes + start / 2;
            for (int64_t k = 0; k < (n + 1) / 2; ++k) out[k] = uint8_t(codes[2 * k] << 4 | codes[2 * k + 1]);
        }
    }
}

void quantise_dynamic(const Dynamic& d, int64_t first, int64_t last) {
    const F lo = V::set1(-1), hi = V::set1(1), half = V::set1(0.5f), cells = V::set1(65535);
    constexpr int64_t PIECE = 256;
    alignas(64) float values[PIECE + W];
    alignas(64) int32_t at[PIECE + W];
    for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * d.block, end = least(d.n, start + d.block);
        float largest = 0;
        for (int64_t i = start; i < end; i += PIECE) {
            const int64_t n = least(PIECE, end - i);
            read_floats<Float32>(d.values, i, n, values);
            const float found = largest_of(values, n);
            largest = found > largest ? found : largest;
        }
        d.absmax[b] = largest;
        if (largest == 0) {
            memset(d.codes + start, 0, end - start);
            continue;
        }
        const F inverse = V::set1(1.0f / largest);
        for (int64_t i = start; i < end; i += PIECE) {
            const int64_t n = least(PIECE, end - i);
            read_floats<Float32>(d.values, i, n, values);
            for (int64_t k = 0; k < n; k += W) {
                // one rounding at the end; NaN (0 * infinity where 1 / absmax overflows) becomes cell 0
                F v = V::min(hi, V::max(lo, V::mul(V::load(values + k), inverse)));
                v = V::fma_exact(V::mul(V::add(v, hi), half), cells, half);
                V::istore(at + k, V::cell(v));
            }
            for (int64_t k = 0; k < n; ++k) d.codes[i + k] = d.cells[at[k]];
        }
    }
}

void dequantise_dynamic(const Dynamic& d, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * d.block, end = least(d.n, start + d.block);
        const F scale = V::set1(d.absmax[b]);
        int64_t i = start;
        for (; i + W <= end; i += W)
            V::store(d.values + i, V::mul(V::gather(d.table, V::bytes(d.codes + i)), scale));
        for (; i < end; ++i) d.values[i] = d.table[d.codes[i]] * d.absmax[b];
    }
}

// Dequantise ---------------------------------------------------------------------------------------------------------

inline float scale_of(const Matrix& m, int64_t b) {
    if (m.absmax) return m.absmax[b];
    const float apart = m.nested_table[m.absmax_codes[b]] * m.nested[b >> 8];
    return apart + *m.offset;
}

// Whether an 8-bit table is (code - 127) / 127, 255 repeating 1: then the value is computed, not gathered.
inline bool is_uniform(const Matrix& m) {
    if (m.bits != 8 || m.table[255] != 1.0f) return false;
    for (int c = 0; c < 255; ++c)
        if (m.table[c] != float(c - 127) / 127.0f) return false;
    return true;
}

inline I signed_codes(const uint8_t* p) { return V::iadd(V::imin(V::bytes(p), V::iset1(254)), V::iset1(-127)); }

// Within a block a 4-bit code has one of 16 values. They are scaled and rounded once per block, then looked up: the
// same bits as scaling and rounding each value.
//
// PAST: stores that go past the caches, for a whole matrix that would not stay in them: a quarter less time, measured.
template <class D, bool PAST>
inline void decode4(const Matrix& m, float scale, int64_t start, int64_t end, typename D::T* out) {
    alignas(64) typename D::T of_code[16];
    for (int c = 0; c < 16; c += W) D::store(of_code + c, V::mul(V::load(m.table + c), V::set1(scale)));
    const uint8_t* p = m.codes + start / 2;
    if (start % 2) *out++ = of_code[*p++ & 15], ++start;
    int64_t n = end - start;
    const auto known = V::load16(of_code);
    if (PAST && (uintptr_t)out % 64 == 0)
        for (; n >= 32; n -= 32, p += 16, out += 32) V::expand32<true>(known, p, out);
    for (; n >= 32; n -= 32, p += 16, out += 32) V::expand32<false>(known, p, out);
    for (; n >= 2; n -= 2, ++p) *out++ = of_code[*p >> 4], *out++ = of_code[*p & 15];
    if (n) *out = of_code[*p >> 4];
}

template <class D>
inline void decode8(const Matrix& m, bool uniform, float scale, int64_t start, int64_t end, typename D::T* out) {
    const F by = V::set1(scale), divisor = V::set1(127);
    const uint8_t* p = m.codes + start;
    for (int64_t n = end - start; n > 0; n -= W, p += W, out += W) {
        uint8_t rest[W] = {};
        const bool whole = n >= W;
        if (!whole) memcpy(rest, p, n);
        const uint8_t* from = whole ? p : rest;
        const F level = uniform ? V::div(V::to_float(signed_codes(from)), divisor) : V::gather(m.table, V::bytes(from));
        typename D::T ready[W];
        D::store(whole ? out : ready, V::mul(level, by));
        if (!whole) memcpy(out, ready, n * sizeof(typename D::T));
    }
}

// Values [start, end) of the flattened matrix
template <class D, bool PAST = false>
inline void decode(const Matrix& m, bool uniform, int64_t start, int64_t end, typename D::T* out) {
    while (start < end) {
        const int64_t b = start >> m.block_log2, stop = least(end, (b + 1) << m.block_log2);
        if (m.bits == 4)
            decode4<D, PAST>(m, scale_of(m, b), start, stop, out);
        else
            decode8<D>(m, uniform, scale_of(m, b), start, stop, out);
        out += stop - start;
        start = stop;
    }
}

constexpr int64_t BEYOND_CACHES = 16 << 20;  // bytes

template <class D, bool PAST = false>
inline void dequantise_as(const Dequantise& d, int64_t first, int64_t last) {
    const int64_t bytes = (d.row1 - d.row0) * (d.col1 - d.col0) * int64_t(sizeof(typename D::T));
    if (!PAST && bytes >= BEYOND_CACHES) return dequantise_as<D, true>(d, first, last);
    const bool uniform = is_uniform(d.m);
    for (int64_t r = first; r < last; ++r) {
        const int64_t start = (d.row0 + r) * d.m.cols;
        decode<D, PAST>(d.m, uniform, start + d.col0, start + d.col1, (typename D::T*)d.out + r * d.stride);
    }
    if (PAST) V::fence();
}

void dequantise(const Dequantise& d, int64_t first, int64_t last) {
    if (d.dtype == F32) dequantise_as<Float32>(d, first, last);
    if (d.dtype == BF16) dequantise_as<BFloat16>(d, first, last);
    if (d.dtype == F16) dequantise_as<Float16>(d, first, last);
}

// One row of x -------------------------------------------------------------------------------------------------------
//
// 4 bits: a step takes W dwords of eight codes each. Nibble j of every dword gives W weights at once, those of elements
// 8 lane + PLACE[j]: x is laid out to match, once (`arrange`). The codes are never reordered. Lane l holds elements
// 8 l ... 8 l + 7 of the step, which share a block since blocks are multiples of 32 and rows of 8: one fma with a
// vector of scales ends the step.
//
// 8 bits: W codes at a time share a block if rows are multiples of W.

constexpr int STEP = 8 * W;
constexpr int64_t AHEAD = 4096;  // bytes of codes that are fetched before they are read
constexpr int PLACE[8] = {1, 0, 3, 2, 5, 4, 7, 6};  // of nibble j: the high one of a byte comes first

constexpr int ROWS = V::TALL / 2;        // of W at a time: they share the loads of x
constexpr int64_t ROOM = 1024 * ROWS + W;  // their scales
inline bool suits_gemv(const Matrix& m) { return m.bits == 4 ? m.cols % 8 == 0 && m.cols <= 32000 : m.cols % W == 0; }

inline void arrange(const Product& p, float* out) {
    const int64_t padded = (p.m.cols + STEP - 1) / STEP * STEP;
    float* plain = out + padded;
    memset(plain, 0, padded * sizeof(float));
    read_floats(p.dtype, p.x, 0, p.m.cols, plain);
    if (p.m.bits == 8) {
        memcpy(out, plain, padded * sizeof(float));
        return;
    }
    for (int64_t k = 0; k < padded; k += STEP)
        for (int j = 0; j < 8; ++j) V::store(out + k + j * W, V::gather(plain + k + PLACE[j], V::lanes8()));
}

// Scales of the blocks first ... last - 1, computed where absmax is nested. W more are read, for lanes whose x is zero:
// they must be finite.
inline const float* scales_of(const Matrix& m, int64_t first, int64_t last, int64_t n_blocks, float* room) {
    if (m.absmax && last + W <= n_blocks) return m.absmax + first;
    int64_t b = first;
    while (!m.absmax && b + W <= n_blocks && b < last) {  // W at a time, up to where the constant changes
        const int64_t stop = least(last, ((b >> 8) + 1) << 8);
        const F by = V::set1(m.nested[b >> 8]), offset = V::set1(*m.offset);
        for (; b < stop && b + W <= n_blocks; b += W) {
            const F apart = V::mul(V::gather(m.nested_table, V::bytes(m.absmax_codes + b)), by);
            V::store(room + (b - first), V::add(apart, offset));
        }
        b = least(b, stop);
        if (b + W > n_blocks) break;
    }
    for (; b < last; ++b) room[b - first] = scale_of(m, b);
    V::store(room + (last - first), V::set1(0));
    return room;
}

// N rows of W from `row` on, in float32. ALIGNED: rows are whole blocks, so that lanes keep their blocks from step to
// step.
template <int N, bool ALIGNED>
inline void gemv4(const Matrix& m, const V::T16& table, const float* x, int64_t row, int64_t n_blocks, float* room,
                  float* y) {
    const int log2 = m.block_log2;
    const int64_t start = row * m.cols, b0 = start >> log2, mask = (int64_t(1) << log2) - 1;
    const float* scales = scales_of(m, b0, ((start + N * m.cols - 1) >> log2) + 1, n_blocks, room);
    const uint8_t* codes = m.codes + start / 2;
    const int64_t row_bytes = m.cols / 2;
    const int64_t group = N * row_bytes, ahead = (AHEAD + group - 1) / group * group;  // whole groups of rows
    const uint8_t* constants = m.absmax ? (const uint8_t*)(m.absmax + b0) : m.absmax_codes + b0;
    const int64_t width = m.absmax ? 4 : 1, their_ahead = (2 * ahead >> log2) * width;
    for (int64_t i = 0; i < (2 * group >> log2) * width; i += 64) V::prefetch(constants + their_ahead + i);
    const I fixed = V::shift_right(V::lanes8(), log2);
    F sum[N];
    for (int r = 0; r < N; ++r) sum[r] = V::set1(0);
    for (int64_t k = 0; k < m.cols; k += STEP) {
        const int64_t left = (m.cols - k) / 8;
        I d[N];
        F even[N], odd[N];
        for (int r = 0; r < N; ++r) {
            const uint8_t* p = codes + r * row_bytes + k / 2;
            d[r] = left >= W ? V::dwords(p) : V::dwords_part(p, left);
            V::prefetch(codes + ahead + k / 2 * N + r * (STEP / 2));
        }
#define NIBBLE(J, SUM, HOW)                                                                      \
    for (int r = 0; r < N; ++r) {                                                                \
        const F w = V::lookup16(table, V::shr<4 * J>(d[r])), at = V::load(x + k + J * W);        \
        SUM[r] = HOW;                                                                            \
    }
        NIBBLE(0, even, V::mul(w, at))
        NIBBLE(1, odd, V::mul(w, at))
        NIBBLE(2, even, V::fma(w, at, even[r]))
        NIBBLE(3, odd, V::fma(w, at, odd[r]))
        NIBBLE(4, even, V::fma(w, at, even[r]))
        NIBBLE(5, odd, V::fma(w, at, odd[r]))
        NIBBLE(6, even, V::fma(w, at, even[r]))
        NIBBLE(7, odd, V::fma(w, at, odd[r]))
#undef NIBBLE
        for (int r = 0; r < N; ++r) {
            const int64_t at = start + r * m.cols + k;  // in the flattened matrix
            const I lane_block = ALIGNED ? fixed : V::shift_right(V::iadd(V::lanes8(), V::iset1(int(at & mask))), log2);
            const F scale = V::lookup8(V::load(scales + ((at >> log2) - b0)), lane_block);
            sum[r] = V::fma(V::add(even[r], odd[r]), scale, sum[r]);
        }
    }
    for (int r = 0; r < N; ++r) y[r] = V::sum(sum[r]);
}

template <bool ALIGNED>
inline void gemv4_rows(const Product& p, const float* x, int64_t first, int64_t last, float* y) {
    const int64_t n_blocks = ((p.m.rows * p.m.cols - 1) >> p.m.block_log2) + 1;
    const V::T16 table = V::table16(p.m.table);
    float room[ROOM];
    int64_t r = first;
    for (; r + ROWS <= last; r += ROWS) gemv4<ROWS, ALIGNED>(p.m, table, x, r, n_blocks, room, y + r - first);
    for (; r < last; ++r) gemv4<1, ALIGNED>(p.m, table, x, r, n_blocks, room, y + r - first);
}

inline float gemv8(const Matrix& m, bool uniform, const float* x, int64_t row) {
    const int64_t start = row * m.cols;
    F sum = V::set1(0);
    for (int64_t k = 0; k < m.cols;) {
        const int64_t b = (start + k) >> m.block_log2, stop = least(m.cols, ((b + 1) << m.block_log2) - start);
        F even = V::set1(0), odd = V::set1(0);
        const uint8_t* codes = m.codes + start;
        V::prefetch(codes + k + AHEAD);
        for (; k < stop; k += 2 * W) {
            const bool second = k + W < stop;
            if (uniform) {
                even = V::fma(V::to_float(signed_codes(codes + k)), V::load(x + k), even);
                if (second) odd = V::fma(V::to_float(signed_codes(codes + k + W)), V::load(x + k + W), odd);
            } else {
                even = V::fma(V::gather(m.table, V::bytes(codes + k)), V::load(x + k), even);
                if (second) odd = V::fma(V::gather(m.table, V::bytes(codes + k + W)), V::load(x + k + W), odd);
            }
        }
        k = stop;
        const float scale = scale_of(m, b);
        sum = V::fma(V::add(even, odd), V::set1(uniform ? scale / 127.0f : scale), sum);
    }
    return V::sum(sum);
}

void gemv(const Product& p, bool uniform, const float* x, int64_t first, int64_t last) {
    constexpr int64_t PIECE = 64;
    float y[PIECE + W], bias[PIECE + W] = {};
    const int64_t start = first * p.m.cols, end = least(last * p.m.cols, start + 2 * AHEAD);
    for (int64_t i = start * p.m.bits / 8; i < end * p.m.bits / 8; i += 64) V::prefetch(p.m.codes + i);
    for (int64_t r = first; r < last; r += PIECE) {
        const int64_t n = least(PIECE, last - r);
        if (p.m.bits == 8)
            for (int64_t i = 0; i < n; ++i) y[i] = gemv8(p.m, uniform, x, r + i);
        else if (p.m.cols & ((int64_t(1) << p.m.block_log2) - 1))
            gemv4_rows<false>(p, x, r, r + n, y);
        else
            gemv4_rows<true>(p, x, r, r + n, y);
        if (p.bias) read_floats(p.dtype, p.bias, r, n, bias);
        for (int64_t i = 0; i < n; ++i) y[i] += bias[i];
        write_floats(p.out_dtype, p.y, r, n, y);
    }
}

// A few rows of x ----------------------------------------------------------------------------------------------------
//
// TALL rows of W are dequantised into the first-level cache, DEEP columns at a time, and multiplied there with tiles of
// up to WIDE rows of x. Both operands run along k, so neither is packed; each accumulator is a vector of partial sums.

constexpr int64_t DEEP = 2112;  // columns: no power of two, so that the rows of a panel do not share cache sets
constexpr int64_t GROUP = 64;   // rows of x that share one dequantised panel
constexpr int TALL = V::TALL, WIDE = 3;

struct DotFloat {  // operands in float32
    using D = Float32;
    static constexpr int K = W;
    using R = F;
    static R load(const float* p) { return V::load(p); }
    static F dot(R a, R b, F c) { return V::fma(a, b, c); }
};

template <class Dot, int N>
inline void tile(const typename Dot::D::T* w, const typename Dot::D::T* x, int64_t x_stride, int64_t depth,
                 float* sums) {
    F acc[TALL][N];
    for (int r = 0; r < TALL; ++r)
        for (int i = 0; i < N; ++i) acc[r][i] = V::set1(0);
    for (int64_t k = 0; k < depth; k += Dot::K) {
        typename Dot::R xs[N];
        for (int i = 0; i < N; ++i) xs[i] = Dot::load(x + i * x_stride + k);
        for (int r = 0; r < TALL; ++r) {
            const typename Dot::R ws = Dot::load(w + r * DEEP + k);
            for (int i = 0; i < N; ++i) acc[r][i] = Dot::dot(ws, xs[i], acc[r][i]);
        }
    }
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < TALL; ++r) sums[i * TALL + r] += V::sum(acc[r][i]);
}

inline int64_t padded_cols(const Matrix& m) { return (m.cols + 63) / 64 * 64; }

// y rows of x group [g, g + GROUP) times rows [r, r + n_rows) of W
template <class Dot>
inline void panel(const Product& p, bool uniform, const typename Dot::D::T* x, int64_t g, int64_t r, int n_rows) {
    using T = typename Dot::D::T;
    alignas(64) T w[TALL * DEEP];
    alignas(64) float sums[GROUP * TALL] = {};
    const int64_t stride = padded_cols(p.m), n = least(GROUP, p.n - g);
    for (int64_t k = 0; k < p.m.cols; k += DEEP) {
        const int64_t real = least(DEEP, p.m.cols - k), depth = (real + Dot::K - 1) / Dot::K * Dot::K;
        for (int i = 0; i < TALL; ++i) {
            const int64_t done = i < n_rows ? real : 0, start = (r + i) * p.m.cols + k;
            if (done) decode<typename Dot::D>(p.m, uniform, start, start + real, w + i * DEEP);
            memset(w + i * DEEP + done, 0, (depth - done) * sizeof(T));
        }
        for (int64_t i = 0; i < n; i += WIDE) {
            const T* at = x + (g + i) * stride + k;
            if (n - i >= 3) tile<Dot, 3>(w, at, stride, depth, sums + i * TALL);
            if (n - i == 2) tile<Dot, 2>(w, at, stride, depth, sums + i * TALL);
            if (n - i == 1) tile<Dot, 1>(w, at, stride, depth, sums + i * TALL);
        }
    }
    float bias[TALL + W] = {};
    if (p.bias) read_floats(p.dtype, p.bias, r, n_rows, bias);
    for (int64_t i = 0; i < n; ++i) {
        float y[TALL + W] = {};
        for (int c = 0; c < n_rows; ++c) y[c] = sums[i * TALL + c] + bias[c];
        write_floats(p.out_dtype, p.y, (g + i) * p.y_stride + r, n_rows, y);
    }
}

#ifdef DELTAW_BF16_DOT
struct DotHalf {  // operands in bf16, products and sums in float32
    using D = BFloat16;
    static constexpr int K = 2 * W;
    using R = V::H;
    static R load(const uint16_t* p) { return V::load_half(p); }
    static F dot(R a, R b, F c) { return V::dot_half(a, b, c); }
};
#else
using DotHalf = DotFloat;
#endif
constexpr bool HAS_HALF = DotHalf::K != DotFloat::K;

inline bool one_row(const Product& p) { return p.n == 1 && suits_gemv(p.m); }

// Whether the kernel can read x where it lies
inline bool reads_x(const Product& p) {
    return !one_row(p) && p.m.cols == padded_cols(p.m) && p.x_stride == p.m.cols && (p.dtype == F32 || (HAS_HALF && p.dtype == BF16));
}

int64_t product_scratch(const Product& p) {
    if (reads_x(p)) return 0;
    if (one_row(p)) return 2 * (p.m.cols + STEP) * int64_t(sizeof(float));
    return p.n * padded_cols(p.m) * int64_t(sizeof(float));
}

// x as the kernel reads it: floats (or, for a path with bf16 products, bf16), each row padded with zeros
void product_prepare(const Product& p, void* scratch) {
    if (reads_x(p)) return;
    if (one_row(p)) return arrange(p, (float*)scratch);
    const int64_t stride = padded_cols(p.m), cols = p.m.cols;
    for (int64_t i = 0; i < p.n; ++i) {
        if (HAS_HALF && p.dtype == BF16) {
            uint16_t* row = (uint16_t*)scratch + i * stride;
            memcpy(row, (const uint16_t*)p.x + i * p.x_stride, cols * sizeof(uint16_t));
            memset(row + cols, 0, (stride - cols) * sizeof(uint16_t));
        } else {
            float* row = (float*)scratch + i * stride;
            memset(row + stride - 64, 0, 64 * sizeof(float));
            read_floats(p.dtype, p.x, i * p.x_stride, cols, row);
        }
    }
}

void product(const Product& p, const void* scratch, int64_t first, int64_t last) {
    const bool uniform = is_uniform(p.m);
    if (one_row(p)) return gemv(p, uniform, (const float*)scratch, first, last);
    const void* x = reads_x(p) ? p.x : scratch;
    for (int64_t g = 0; g < p.n; g += GROUP)
        for (int64_t r = first; r < last; r += TALL) {
            const int n_rows = int(least(TALL, last - r));
            if (HAS_HALF && p.dtype == BF16)
                panel<DotHalf>(p, uniform, (const DotHalf::D::T*)x, g, r, n_rows);
            else
                panel<DotFloat>(p, uniform, (const float*)x, g, r, n_rows);
        }
}

// Bandwidth: what a loop that only reads can reach -------------------------------------------------------------------

float read_sum(const uint8_t* bytes, int64_t first, int64_t last) {
    F a = V::set1(0), b = a, c = a, d = a;
    const float* p = (const float*)(bytes + 64 * first);
    const float* end = (const float*)(bytes + 64 * last);
    for (; p + 4 * W <= end; p += 4 * W) {
        V::prefetch((const uint8_t*)p + 2048);
        a = V::add(a, V::load(p)), b = V::add(b, V::load(p + W));
        c = V::add(c, V::load(p + 2 * W)), d = V::add(d, V::load(p + 3 * W));
    }
    return V::sum(V::add(V::add(a, b), V::add(c, d)));
}

}  // namespace

#include "attention.h"

namespace {
extern const Elementwise ELEMENTWISE;  // elementwise.h
extern const Serving SERVING;          // pages.h
#ifdef DELTAW_BF16_DOT
extern const ThinKernels THIN_KERNELS;  // thin.h
constexpr const ThinKernels* THIN = &THIN_KERNELS;
#else
constexpr const ThinKernels* THIN = nullptr;
#endif

const Path THIS = {
    V::NAME, quantise, quantise_dynamic, dequantise_dynamic, dequantise, product_scratch, product_prepare, product,
    read_sum,
    attention_scratch, attend, attend_backward, attention_gather,
    &ELEMENTWISE,
    THIN,
    &SERVING,
};

}  // namespace
