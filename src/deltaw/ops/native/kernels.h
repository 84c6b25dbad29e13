// The kernels, written once over a small vector type V that the including file defines (path_*.cpp say what V is).
// V::F holds V::W floats, V::I as many 32-bit integers. Sums and products that must equal the reference bit for bit
// (quantise, dequantise) use mul, add and div alone; fma stands where a tolerance is promised (product).
#pragma once
#include <string.h>

#include "native.h"

namespace {

// Without a call in the way, constants stay in registers.
#define INLINE __attribute__((always_inline)) inline

using F = V::F;
using I = V::I;
constexpr int W = V::W;
constexpr int64_t LONGEST = 4096;  // values in a block, at most

template <int C>
struct Count { static constexpr int N = C; };

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
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

}  // namespace

#include "product.h"

namespace {

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
#include "wide.h"

#ifndef DELTAW_TILES  // whose path takes the rest from another
namespace {
extern const Elementwise ELEMENTWISE;  // elementwise.h
extern const Serving SERVING;          // pages.h
#ifdef DELTAW_BF16_DOT
extern const ThinKernels THIN_KERNELS;  // thin.h
constexpr const ThinKernels* THIN = &THIN_KERNELS;
constexpr const WideKernels* WIDE = &WIDE_KERNELS;
#else
constexpr const ThinKernels* THIN = nullptr;
constexpr const WideKernels* WIDE = nullptr;
#endif

const Path THIS = {
    V::NAME, quantise, quantise_dynamic, dequantise_dynamic, dequantise, product_scratch, product_prepare, product,
    read_sum,
    attention_scratch, attend, attend_backward, attention_gather,
    &ELEMENTWISE,
    THIN,
    WIDE,
    &SERVING,
};

}  // namespace
#endif
