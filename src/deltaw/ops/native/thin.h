// Products with a side as thin as an adapter's rank, in bf16 pairs: every wide operand is read once.
//
//   thin_back   h = scale g F        sums = g^T u, over each chunk of rows      g [n, cols], F [cols, rank], u [n, rank]
//   thin_add    y += scale u F^T                                                y [n, cols]
//
// A pair lies along the summed dimension. For h: columns of g, as they lie, spread over a vector of F's ranks. For the
// sums: two rows of g mingled, times u's pairs spread. For y: u's pairs spread, times F's. All sums are float32.
#pragma once
#include "kernels.h"

namespace {

constexpr int64_t FETCHED = 256;  // values of a row that are fetched before they are read
constexpr int64_t TOKENS = 64;  // rows of g that both halves of thin_back take in turn, from the second cache

inline int64_t wide_of(int64_t rank) { return (rank + 15) / 16 * 16; }

int64_t thin_scratch(const Thin& t) {  // of units, shared by the threads: F in pairs
    const int64_t wide = wide_of(t.rank), cols = (t.cols + 31) / 32 * 32;
    return t.y ? (t.rank + 1) / 2 * cols * 4 : (t.cols + 1) / 2 * wide * 4;
}

// F in pairs, and zeros where it ends: for y [rank / 2][cols], else [cols / 2][wide]
void thin_prepare(const Thin& t, void* scratch) {
    auto* out = (uint32_t*)scratch;
    if (!t.factor) return;  // sums alone
    const int64_t summed = t.y ? t.rank : t.cols, along = t.y ? t.cols : t.rank;
    const int64_t wide = t.y ? (t.cols + 31) / 32 * 32 : wide_of(t.rank);
    const int64_t step = t.y ? t.factor_col : t.factor_row, beside = t.y ? t.factor_row : t.factor_col;
    for (int64_t s = 0; s < summed; s += 2, out += wide) {
        const uint16_t* low = t.factor + s * step;
        const uint16_t* high = s + 1 < summed ? low + step : nullptr;
        for (int64_t i = 0; i < along; ++i)
            out[i] = low[i * beside] | (high ? uint32_t(high[i * beside]) << 16 : 0);
        for (int64_t i = along; i < wide; ++i) out[i] = 0;
    }
}

inline __m512bh spread(const uint16_t* pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

// The first `n` of 16 or 32 values; masked stores of halves are slow, so whole ones go without
inline __m256i some16(const uint16_t* p, int64_t n) {
    return n >= 16 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(__mmask16((1 << n) - 1), p);
}
inline __m512i some32(const uint16_t* p, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
}
inline void keep16(uint16_t* p, int64_t n, __m256i v) {
    if (n >= 16) return _mm256_storeu_si256((__m256i*)p, v);
    _mm256_mask_storeu_epi16(p, __mmask16((1 << n) - 1), v);
}
inline void keep32(uint16_t* p, int64_t n, __m512i v) {
    if (n >= 32) return _mm512_storeu_si512(p, v);
    _mm512_mask_storeu_epi16(p, __mmask32((1u << n) - 1), v);
}

inline F widened(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// h of N rows and 16 ranks
template <int N>
inline void rows_of_h(const Thin& t, const uint32_t* factor, int64_t row, int64_t k0) {
    const int64_t wide = wide_of(t.rank);
    const uint16_t* g = t.g + row * t.g_stride;
    F sums[N];
    for (int i = 0; i < N; ++i) sums[i] = V::set1(0);
    for (int64_t line = 0; line < t.cols; line += 32) {  // values of a cache line
        for (int i = 0; i < N; ++i) V::prefetch((const uint8_t*)(g + i * t.g_stride + line + FETCHED));
        for (int64_t o = line; o < least(line + 32, t.cols); o += 2) {
            const __m512bh f = (__m512bh)_mm512_loadu_si512(factor + o / 2 * wide + k0);
            for (int i = 0; i < N; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], spread(g + i * t.g_stride + o), f);
        }
    }
    for (int i = 0; i < N; ++i)
        keep16(t.h + (row + i) * t.h_stride + k0, t.rank - k0,
               (__m256i)_mm512_cvtneps_pbh(V::mul(sums[i], V::set1(t.scale))));
}

// sums[k][o] += g^T u for `count` rows from `row`: 16 columns and up to 16 ranks at a time
inline void rows_of_sums(const Thin& t, int64_t row, int64_t count, float* sums, bool first) {
    alignas(64) uint32_t u[TOKENS / 2 * 16];
    const int64_t pairs = (count + 1) / 2;
    for (int64_t k0 = 0; k0 < t.rank; k0 += 16) {
        const int64_t ranks = least(16, t.rank - k0);
        for (int64_t p = 0; p < pairs; ++p)
            for (int64_t k = 0; k < 16; ++k) {
                const uint16_t* at = t.u + (row + 2 * p) * t.u_stride + k0 + k;
                const uint32_t low = k < ranks ? at[0] : 0;
                const uint32_t high = k < ranks && 2 * p + 1 < count ? at[t.u_stride] : 0;
                u[p * 16 + k] = low | high << 16;
            }
        for (int64_t o = 0; o < t.cols; o += 16) {
            const __mmask16 there = t.cols - o >= 16 ? __mmask16(0xffff) : __mmask16((1 << (t.cols - o)) - 1);
            float* at = sums + k0 * t.cols + o;
            F acc[16];
            for (int k = 0; k < 16; ++k)
                acc[k] = first || k >= ranks ? V::set1(0) : _mm512_maskz_loadu_ps(there, at + k * t.cols);
            const uint16_t* g = t.g + row * t.g_stride + o;
            for (int64_t p = 0; p < pairs; ++p, g += 2 * t.g_stride) {
                const __m256i low = some16(g, t.cols - o);
                const __m256i high = 2 * p + 1 < count ? some16(g + t.g_stride, t.cols - o) : _mm256_setzero_si256();
                const __m512bh two =
                    (__m512bh)V::mingled(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
                for (int k = 0; k < 16; ++k)
                    acc[k] = _mm512_dpbf16_ps(acc[k], two, (__m512bh)_mm512_set1_epi32(int32_t(u[p * 16 + k])));
            }
            for (int k = 0; k < 16; ++k)
                if (k < ranks) _mm512_mask_storeu_ps(at + k * t.cols, there, acc[k]);
        }
    }
}

void thin_back(const Thin& t, const void* scratch, int64_t first, int64_t last) {  // chunks of rows
    for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * t.chunk, end = least(t.n, begin + t.chunk);
        for (int64_t row = begin; row < end; row += TOKENS) {
            const int64_t count = least(TOKENS, end - row);
            if (t.h)
                for (int64_t k0 = 0; k0 < t.rank; k0 += 16) {
                    int64_t i = 0;
                    for (; i + 16 <= count; i += 16) rows_of_h<16>(t, (const uint32_t*)scratch, row + i, k0);
                    for (; i < count; ++i) rows_of_h<1>(t, (const uint32_t*)scratch, row + i, k0);
                }
            if (t.sums) rows_of_sums(t, row, count, t.sums + c * t.rank * t.cols, row == begin);
        }
    }
}

// y of N rows, all columns
template <int N>
inline void rows_of_y(const Thin& t, const uint32_t* factor, int64_t row) {
    const int64_t cols = (t.cols + 31) / 32 * 32;
    const F scale = V::set1(t.scale);
    for (int64_t o = 0; o < t.cols; o += 32) {
        F low[N], high[N];
        for (int i = 0; i < N; ++i) low[i] = high[i] = V::set1(0);
        for (int64_t k = 0; k < t.rank; k += 2) {
            const __m512bh a = (__m512bh)_mm512_loadu_si512(factor + k / 2 * cols + o);
            const __m512bh b = (__m512bh)_mm512_loadu_si512(factor + k / 2 * cols + o + 16);
            for (int i = 0; i < N; ++i) {
                const __m512bh both = spread(t.u + (row + i) * t.u_stride + k);
                low[i] = _mm512_dpbf16_ps(low[i], both, a);
                high[i] = _mm512_dpbf16_ps(high[i], both, b);
            }
        }
        for (int i = 0; i < N; ++i) {
            uint16_t* at = t.y + (row + i) * t.y_stride + o;
            const __m512i y = some32(at, t.cols - o);
            const F l = widened(_mm512_castsi512_si256(y)), h = widened(_mm512_extracti64x4_epi64(y, 1));
            keep32(at, t.cols - o, (__m512i)_mm512_cvtne2ps_pbh(V::fma(high[i], scale, h), V::fma(low[i], scale, l)));
        }
    }
}

void thin_add(const Thin& t, const void* scratch, int64_t first, int64_t last) {  // rows
    int64_t row = first;
    for (; row + 8 <= last; row += 8) rows_of_y<8>(t, (const uint32_t*)scratch, row);
    for (; row < last; ++row) rows_of_y<1>(t, (const uint32_t*)scratch, row);
}

const ThinKernels THIN_KERNELS = {thin_scratch, thin_prepare, thin_back, thin_add};

}  // namespace
