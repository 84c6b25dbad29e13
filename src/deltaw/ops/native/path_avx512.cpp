// AVX-512 F, BW, VL, DQ: sixteen floats; a table of 16 is one permute. Built again by path_avx512_bf16.cpp and path_amx.cpp.
#include "native.h"

#if defined(DELTAW_TILES)
#define DELTAW_PATH path_amx
#elif defined(DELTAW_BF16_DOT)
#define DELTAW_PATH path_avx512_bf16
#else
#define DELTAW_PATH path_avx512
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    (defined(__AVX512BF16__) || !defined(DELTAW_BF16_DOT)) && \
    (defined(__AMX_BF16__) || defined(DELTAW_EMULATED_TILES) || !defined(DELTAW_TILES)) && \
    (defined(DELTAW_BF16_DOT) || !defined(DELTAW_EMULATED_TILES))
#include <immintrin.h>

namespace {

struct V {
    static constexpr int W = 16, TALL = 8;
    using F = __m512;
    using I = __m512i;
    using T16 = __m512;
    using H16 = __m512i;  // sixteen entries, twice

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static void istore(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
    static F load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static void store_bf16(uint16_t* p, F a) {  // nearest, ties to even; vcvtneps2bf16 would flush subnormals
        const __m512i u = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), iset1(1));
        __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, iset1(0x7fff))), 16);
        r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), iset1(0x7fc0));
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
    }
    static void store_f16(uint16_t* p, F a) {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F set1(float a) { return _mm512_set1_ps(a); }
    static I iset1(int32_t a) { return _mm512_set1_epi32(a); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fma_exact(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static F sums(const F* rows) {  // lane i: the sum of rows[i]
        F a[8], b[4], c[2];
        for (int r = 0; r < 8; ++r)
            a[r] = add(_mm512_unpacklo_ps(rows[2 * r], rows[2 * r + 1]), _mm512_unpackhi_ps(rows[2 * r], rows[2 * r + 1]));
        for (int r = 0; r < 4; ++r) {
            const __m512d x = _mm512_castps_pd(a[2 * r]), y = _mm512_castps_pd(a[2 * r + 1]);
            b[r] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        for (int r = 0; r < 2; ++r)
            c[r] = add(_mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0x88), _mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0xdd));
        return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I imin(I a, I b) { return _mm512_min_epi32(a, b); }
    template <int N> static I shr(I a) { return _mm512_srli_epi32(a, N); }
    static I shift_right(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
    static I lanes8() { return _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static I cell(F a) {  // NaN converts to the least integer
        return _mm512_min_epi32(_mm512_max_epi32(_mm512_cvttps_epi32(a), iset1(0)), iset1(65535));
    }
    static I bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    static I dwords(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static I dwords_part(const uint8_t* p, int64_t n) {
        return _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
    }
    static void store_bytes(uint8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
    static F lookup8(F table, I i) { return _mm512_permutexvar_ps(i, table); }
    static T16 table16(const float* p) { return load(p); }
    static F lookup16(T16 t, I i) { return _mm512_permutexvar_ps(i, t); }  // reads the low four bits
    static F gather(const float* p, I i) { return _mm512_i32gather_ps(i, p, 4); }
    // 256 floats as two tables of halves: permutes choose among 64, masks among four of those
    struct T256 {
        alignas(64) uint16_t low[256], high[256];
    };
    static constexpr int MANY = 2 * W;
    static void table256(const float* p, T256& t) {
        for (int k = 0; k < 256; k += W) {
            const __m512i a = _mm512_loadu_si512(p + k);
            _mm256_store_si256((__m256i*)(t.low + k), _mm512_cvtepi32_epi16(a));
            _mm256_store_si256((__m256i*)(t.high + k), _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)));
        }
    }
    static void lookup256(const T256& t, const uint8_t* p, F (&out)[2]) {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // so that unpacking restores it
        const __m256i codes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), order);
        const __m512i i = _mm512_cvtepu8_epi16(codes);
        const __mmask32 bit6 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
        const __mmask32 bit7 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(128));
        const auto choose = [&](const uint16_t* t) __attribute__((always_inline)) {
            __m512i of_64[4];
            for (int k = 0; k < 4; ++k, t += 64)
                of_64[k] = _mm512_permutex2var_epi16(_mm512_load_si512(t), i, _mm512_load_si512(t + 32));
            return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, of_64[0], of_64[1]),
                                           _mm512_mask_blend_epi16(bit6, of_64[2], of_64[3]));
        };
        const __m512i low = choose(t.low), high = choose(t.high);
        out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
        out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
    }
    static I twice_plus(I i, F v, F bound) {
        const I twice = _mm512_add_epi32(i, i);
        return _mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), twice, iset1(1));
    }
    static T16 load16(const float* p) { return load(p); }
    static H16 load16(const uint16_t* p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p)); }
    template <bool PAST> static void put(void* p, __m512i a) {
        PAST ? _mm512_stream_si512((__m512i*)p, a) : _mm512_storeu_si512(p, a);
    }
    template <bool PAST> static void expand32(T16 t, const uint8_t* p, float* out) {
        for (int k = 0; k < 2; ++k) {  // a byte in every 64 bits: its high nibble below, the low one above
            const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(p + 8 * k)));
            const __m512i i = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
            put<PAST>(out + 16 * k, _mm512_castps_si512(lookup16(t, i)));
        }
    }
    template <bool PAST> static void expand32(H16 t, const uint8_t* p, uint16_t* out) {
        const __m512i b = bytes(p), i = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
        put<PAST>(out, _mm512_permutexvar_epi16(i, t));  // reads the low five bits: the table is there twice
    }
    static F power(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
    static float largest(F a) { return _mm512_reduce_max_ps(a); }
    // out[c * to + r] = rows[r * from + c] for 16 rows and n <= 16 columns; 16 are read
    static void turn16(const uint32_t* rows, int64_t from, int64_t n, uint32_t* out, int64_t to) {
        __m512i a[16], b[16];
        for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows + r * from);
        for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        }
        for (int r = 0; r < 16; r += 4)  // a[r + c], lane l of 128 bits: rows r to r + 3 of column 4 l + c
            for (int half = 0; half < 2; ++half) {
                a[r + 2 * half] = _mm512_unpacklo_epi64(b[r + half], b[r + 2 + half]);
                a[r + 2 * half + 1] = _mm512_unpackhi_epi64(b[r + half], b[r + 2 + half]);
            }
        for (int c = 0; c < 4; ++c) {
            const __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
            const __m512i odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
            const __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
            const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
            b[c] = _mm512_shuffle_i32x4(even, even2, 0x88), b[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
            b[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88), b[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
        }
        for (int c = 0; c < 16; ++c)
            if (c < n) _mm512_storeu_si512(out + c * to, b[c]);
    }
    // for elementwise.h
    static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
    static F where_negative(F test, F a, F b) {
        return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test)), b, a);
    }

    static void fence() { _mm_sfence(); }
    // not _mm_prefetch: GCC drops a loop of nothing else
    static void prefetch(const uint8_t* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
    static void prefetch_second(const uint8_t* p) { __asm__ volatile("prefetcht1 %0" : : "m"(*p)); }  // second cache

#ifdef DELTAW_BF16_DOT
    static constexpr const char* NAME = "avx512_bf16";
    using H = __m512bh;
    static void store_bf16_flushed(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
    static H load_half(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void store_half(uint16_t* p, H a) { _mm512_storeu_si512(p, (__m512i)a); }
    // Sixteen levels times a scale, rounded to bf16, twice
    static H levels(F table, float scale) {
        const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
        return _mm512_cvtne2ps_pbh(scaled, scaled);
    }
    // Of 64 codes in 32 bytes: the values of the high nibbles and of the low ones. The low five bits choose.
    static void look_up64(H levels, const uint8_t* p, H& high, H& low) {
        const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), (__m512i)levels);
        low = (__m512bh)_mm512_permutexvar_epi16(b, (__m512i)levels);
    }
    static void part_pairs(const uint16_t* p, H& even, H& odd) {  // of 64 values, those at even and at odd places
        const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 32);
        even = (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
        odd = (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
    }
    static F dot_half(H a, H b, F c) { return _mm512_dpbf16_ps(c, a, b); }
    // Pairs, for attention.h. Subnormals are flushed, as the products flush them.
    static H half_pair(const uint16_t* p) {
        int pair;
        __builtin_memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    template <int N>  // N pairs, repeated
    static H half_pairs(const uint16_t* p) {
        if constexpr (N == 1) return half_pair(p);
        if constexpr (N == 2) {
            int64_t two;
            __builtin_memcpy(&two, p, 8);
            return (__m512bh)_mm512_set1_epi64(two);
        }
        if constexpr (N == 4) return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
        if constexpr (N == 8) return (__m512bh)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
        if constexpr (N == 16) return load_half(p);
    }
    static void round_half(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
    static void round_halves(uint16_t* both, F a, F b) {
        _mm512_storeu_si512(both, mingled((__m512i)_mm512_cvtne2ps_pbh(b, a)));
    }
    static void round_halves(uint16_t* both, uint16_t* of_a, uint16_t* of_b, F a, F b) {
        const __m512i two = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        _mm512_storeu_si512(both, mingled(two));
        _mm256_storeu_si256((__m256i*)of_a, _mm512_castsi512_si256(two));
        _mm256_storeu_si256((__m256i*)of_b, _mm512_extracti64x4_epi64(two, 1));
    }
    static void mingle_halves(const uint16_t* a, const uint16_t* b, uint16_t* out) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)a), high = _mm256_loadu_si256((const __m256i*)b);
        _mm512_storeu_si512(out, mingled(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
    }
    static __m512i mingled(__m512i two) {  // values i of the low and of the high half side by side
        const __m512i at = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006,
                                             0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d,
                                             0x1e000e, 0x1f000f);
        return _mm512_permutexvar_epi16(at, two);
    }
#else
    static constexpr const char* NAME = "avx512";
    static void store_bf16_flushed(uint16_t* p, F a) { store_bf16(p, a); }
#endif
};

}  // namespace

#include "kernels.h"
#include "elementwise.h"
#include "pages.h"
#if defined(DELTAW_TILES)
#include "tiled.h"

// That of bf16 pairs but for what tiles do
const Path* path_amx() {
    static Path all;
    static Serving serving;
    if (all.name) return &all;
    serving = *path_avx512_bf16()->serving, serving.dense = tiled_dense;
    all = *path_avx512_bf16(), all.product = tiled_product, all.wide = &WIDE_KERNELS, all.serving = &serving;
    all.name = "amx";
    return &all;
}

#else
#ifdef DELTAW_BF16_DOT
#include "thin.h"
#endif

const Path* DELTAW_PATH() { return &THIS; }

#endif
#else
const Path* DELTAW_PATH() { return nullptr; }
#endif
