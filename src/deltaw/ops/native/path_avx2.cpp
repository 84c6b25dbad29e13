// AVX2, FMA and F16C: eight floats. A table of 16 takes two permutes and a blend by bit 3.
#include "native.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(DELTAW_EMULATED_TILES)
#include <immintrin.h>

namespace {

struct V {
    static constexpr const char* NAME = "avx2";
    static constexpr int W = 8, TALL = 4;
    using F = __m256;
    using I = __m256i;
    struct T16 { __m256 low, high; };
    struct H16 { __m256i low, high; };  // the two bytes of each entry, in both 128-bit halves

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static void istore(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }
    static F load_bf16(const uint16_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static void store_bf16(uint16_t* p, F a) {  // nearest, ties to even; NaN stays NaN
        const __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), iset1(1));
        __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, iset1(0x7fff))), 16);
        r = _mm256_blendv_epi8(r, iset1(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
        r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(r));
    }
    static void store_f16(uint16_t* p, F a) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F set1(float a) { return _mm256_set1_ps(a); }
    static I iset1(int32_t a) { return _mm256_set1_epi32(a); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fma_exact(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static F sums(const F* rows) {  // lane i: the sum of rows[i]
        F a[4], b[2];
        for (int r = 0; r < 4; ++r)
            a[r] = add(_mm256_unpacklo_ps(rows[2 * r], rows[2 * r + 1]), _mm256_unpackhi_ps(rows[2 * r], rows[2 * r + 1]));
        for (int r = 0; r < 2; ++r) {
            const __m256d x = _mm256_castps_pd(a[2 * r]), y = _mm256_castps_pd(a[2 * r + 1]);
            b[r] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
        }
        return add(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
    }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I imin(I a, I b) { return _mm256_min_epi32(a, b); }
    template <int N> static I shr(I a) { return _mm256_srli_epi32(a, N); }
    static I shift_right(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
    static I lanes8() { return _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static I cell(F a) {  // NaN converts to the least integer
        return _mm256_min_epi32(_mm256_max_epi32(_mm256_cvttps_epi32(a), iset1(0)), iset1(65535));
    }
    static I bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
    static I dwords(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static I dwords_part(const uint8_t* p, int64_t n) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_epi32((const int*)p, _mm256_cmpgt_epi32(iset1(int(n)), lane));
    }
    static void store_bytes(uint8_t* p, I a) {
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
    }
    static F lookup8(F table, I i) { return _mm256_permutevar8x32_ps(table, i); }
    static T16 table16(const float* p) { return {load(p), load(p + 8)}; }
    static F lookup16(const T16& t, I i) {
        const F low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    }
    static F gather(const float* p, I i) { return _mm256_i32gather_ps(p, i, 4); }
    using T256 = const float*;
    static constexpr int MANY = W;
    static void table256(const float* p, T256& t) { t = p; }
    static void lookup256(T256 t, const uint8_t* p, F (&out)[1]) { out[0] = gather(t, bytes(p)); }
    static I twice_plus(I i, F v, F bound) {  // a true compare is -1
        return _mm256_sub_epi32(_mm256_add_epi32(i, i), _mm256_castps_si256(_mm256_cmp_ps(v, bound, _CMP_GT_OQ)));
    }
    static T16 load16(const float* p) { return table16(p); }
    static H16 load16(const uint16_t* p) {
        const __m256i all = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16(0xff);
        const __m256i low = _mm256_packus_epi16(_mm256_and_si256(all, mask), _mm256_and_si256(all, mask));
        const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(all, 8), _mm256_srli_epi16(all, 8));
        return {_mm256_permute4x64_epi64(low, 0x88), _mm256_permute4x64_epi64(high, 0x88)};
    }
    template <bool PAST> static void put(__m256i* p, __m256i a) {
        PAST ? _mm256_stream_si256(p, a) : _mm256_storeu_si256(p, a);
    }
    template <bool PAST> static void expand32(const T16& t, const uint8_t* p, float* out) {
        for (int k = 0; k < 4; ++k) {  // four bytes to eight codes: each byte twice, then its high and its low nibble
            int four;
            __builtin_memcpy(&four, p + 4 * k, 4);
            const __m256i twice = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            const __m256i i = _mm256_or_si256(_mm256_srli_epi64(twice, 4), _mm256_slli_epi64(twice, 32));
            put<PAST>((__m256i*)(out + 8 * k), _mm256_castps_si256(lookup16(t, i)));
        }
    }
    template <bool PAST> static void expand32(const H16& t, const uint8_t* p, uint16_t* out) {
        const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
        const __m256i low = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(15)), 8);
        const __m256i i = _mm256_or_si256(_mm256_srli_epi16(w, 4), low);
        const __m256i a = _mm256_shuffle_epi8(t.low, i), b = _mm256_shuffle_epi8(t.high, i);
        const __m256i even = _mm256_unpacklo_epi8(a, b), odd = _mm256_unpackhi_epi8(a, b);
        put<PAST>((__m256i*)out, _mm256_permute2x128_si256(even, odd, 0x20));
        put<PAST>((__m256i*)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    }
    static F power(F a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
    static float largest(F a) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    static void turn16(const uint32_t* rows, int64_t from, int64_t n, uint32_t* out, int64_t to) {
        for (int64_t c = 0; c < n; ++c)
            for (int64_t r = 0; r < 16; ++r) out[c * to + r] = rows[r * from + c];
    }
    // for elementwise.h
    static void store_bf16_flushed(uint16_t* p, F a) { store_bf16(p, a); }
    static F scale2(F a, F n) {  // in two steps: one exponent does not reach from 1 to the least subnormal
        const __m256i whole = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(whole, 1);
        return mul(mul(a, two_to(part)), two_to(_mm256_sub_epi32(whole, part)));
    }
    static F two_to(I n) { return _mm256_castsi256_ps(_mm256_slli_epi32(iadd(n, iset1(127)), 23)); }
    static F where_negative(F test, F a, F b) { return _mm256_blendv_ps(b, a, test); }

    static void fence() { _mm_sfence(); }
    // not _mm_prefetch: GCC drops a loop of nothing else
    static void prefetch(const uint8_t* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
};

}  // namespace

#include "kernels.h"
#include "elementwise.h"
#include "pages.h"

const Path* path_avx2() { return &THIS; }

#else
const Path* path_avx2() { return nullptr; }
#endif
