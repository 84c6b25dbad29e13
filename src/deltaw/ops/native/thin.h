// Products with a side as thin as an adapter's rank, in bf16 pairs: every wide operand is read once.
//
//   thin_back   h = scale g F        sums = g^T u, over each chunk of rows      g [n, cols], F [cols, rank], u [n, rank]
//
// A pair lies along the summed dimension. For h: columns of g, as they lie, spread over a vector of F's ranks. For the
// sums: two rows of g mingled, times u's pairs spread. All sums are float32. What is added to a wide matrix: wide.h.
#pragma once
#include "kernels.h"

namespace {

constexpr int64_t FETCHED = 256;  // values of a row that are fetched before they are read
constexpr int64_t TOKENS = 64;  // rows of g that both halves of thin_back take in turn, from the second cache

inline int64_t wide_of(int64_t rank) { return (rank + 15) / 16 * 16; }

int64_t thin_scratch(const Thin& t) {  // of units, shared by the threads: F in pairs
    return (t.cols + 1) / 2 * wide_of(t.rank) * 4;
}

// F in pairs [cols / 2][wide], and zeros where it ends
void thin_prepare(const Thin& t, void* scratch) {
    auto* out = (uint32_t*)scratch;
    if (!t.factor) return;  // sums alone
    const int64_t wide = wide_of(t.rank);
    for (int64_t s = 0; s < t.cols; s += 2, out += wide) {
        const uint16_t* low = t.factor + s * t.factor_row;
        const uint16_t* high = s + 1 < t.cols ? low + t.factor_row : nullptr;
        for (int64_t i = 0; i < t.rank; ++i)
            out[i] = low[i * t.factor_col] | (high ? uint32_t(high[i * t.factor_col]) << 16 : 0);
        for (int64_t i = t.rank; i < wide; ++i) out[i] = 0;
    }
}

inline __m512bh spread(const uint16_t* pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

// The first `n` of 16 values; masked stores of halves are slow, so whole ones go without
inline __m256i some16(const uint16_t* p, int64_t n) {
    return n >= 16 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(__mmask16((1 << n) - 1), p);
}
inline void keep16(uint16_t* p, int64_t n, __m256i v) {
    if (n >= 16) return _mm256_storeu_si256((__m256i*)p, v);
    _mm256_mask_storeu_epi16(p, __mmask16((1 << n) - 1), v);
}
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

const ThinKernels THIN_KERNELS = {thin_scratch, thin_prepare, thin_back};

}  // namespace
