// Plain C++ for any CPU: eight lanes as an array, which compilers turn into whatever the target has.
#include <string.h>

#include "native.h"

namespace {

inline float from_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    float out;
    memcpy(&out, &bits, 4);
    if (exponent == 0) {  // subnormal: fraction * 2^-24
        const float small = float(fraction) * 5.9604644775390625e-8f;
        out = sign ? -small : small;
    }
    return out;
}

inline uint16_t to_half(float v) {  // nearest, ties to even
    uint32_t u;
    memcpy(&u, &v, 4);
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (u < 0x38800000) {                       // subnormal: count in units of 2^-24, rounded by the addition
        float a;
        memcpy(&a, &u, 4);
        a += 0.5f;  // 0.5 has units of 2^-24 in its last place
        memcpy(&u, &a, 4);
        return uint16_t(sign | (u - 0x3f000000));
    }
    return uint16_t(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13));
}

inline uint16_t to_bf16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

struct V {
    static constexpr const char* NAME = "scalar";
    static constexpr int W = 8, TALL = 2;
    struct F { float v[W]; };
    struct I { int32_t v[W]; };
    struct T16 { float v[16]; };
    struct H16 { uint16_t v[16]; };

#define EACH(TYPE, EXPRESSION)            \
    TYPE out;                             \
    for (int l = 0; l < W; ++l) out.v[l] = (EXPRESSION); \
    return out

    static F load(const float* p) { EACH(F, p[l]); }
    static void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
    static void istore(int32_t* p, I a) { memcpy(p, a.v, sizeof a.v); }
    static F load_bf16(const uint16_t* p) {
        F out;
        for (int l = 0; l < W; ++l) {
            const uint32_t u = uint32_t(p[l]) << 16;
            memcpy(out.v + l, &u, 4);
        }
        return out;
    }
    static F load_f16(const uint16_t* p) { EACH(F, from_half(p[l])); }
    static void store_bf16(uint16_t* p, F a) { for (int l = 0; l < W; ++l) p[l] = to_bf16(a.v[l]); }
    static void store_f16(uint16_t* p, F a) { for (int l = 0; l < W; ++l) p[l] = to_half(a.v[l]); }
    static F set1(float a) { EACH(F, a); }
    static I iset1(int32_t a) { EACH(I, a); }
    static F add(F a, F b) { EACH(F, a.v[l] + b.v[l]); }
    static F mul(F a, F b) { EACH(F, a.v[l] * b.v[l]); }
    static F div(F a, F b) { EACH(F, a.v[l] / b.v[l]); }
    static F fma(F a, F b, F c) { EACH(F, a.v[l] * b.v[l] + c.v[l]); }
    static F fma_exact(F a, F b, F c) { EACH(F, float(double(a.v[l]) * b.v[l] + c.v[l])); }  // exact where it is used
    static F max(F a, F b) { EACH(F, a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }  // b if either is NaN, as x86 has it
    static F min(F a, F b) { EACH(F, a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
    static F abs(F a) { EACH(F, a.v[l] < 0 ? -a.v[l] : a.v[l]); }
    static float sum(F a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }
    static F sums(const F* rows) { EACH(F, sum(rows[l])); }
    static I iadd(I a, I b) { EACH(I, a.v[l] + b.v[l]); }
    static I imin(I a, I b) { EACH(I, a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
    template <int N> static I shr(I a) { EACH(I, int32_t(uint32_t(a.v[l]) >> N)); }
    static I shift_right(I a, int n) { EACH(I, a.v[l] >> n); }
    static I lanes8() { EACH(I, 8 * l); }
    static F to_float(I a) { EACH(F, float(a.v[l])); }
    static I cell(F a) { EACH(I, a.v[l] > 0 ? (a.v[l] < 65535 ? int32_t(a.v[l]) : 65535) : 0); }
    static I bytes(const uint8_t* p) { EACH(I, p[l]); }
    static I dwords(const uint8_t* p) {
        I out;
        memcpy(out.v, p, sizeof out.v);
        return out;
    }
    static I dwords_part(const uint8_t* p, int64_t n) {
        I out = iset1(0);
        memcpy(out.v, p, n * 4);
        return out;
    }
    static void store_bytes(uint8_t* p, I a) { for (int l = 0; l < W; ++l) p[l] = uint8_t(a.v[l]); }
    static F lookup8(F table, I i) { EACH(F, table.v[i.v[l] & 7]); }
    static T16 table16(const float* p) { return load16(p); }
    static F lookup16(const T16& t, I i) { EACH(F, t.v[i.v[l] & 15]); }
    static F gather(const float* p, I i) { EACH(F, p[i.v[l]]); }
    using T256 = const float*;
    static constexpr int MANY = W;
    static void table256(const float* p, T256& t) { t = p; }
    static void lookup256(T256 t, const uint8_t* p, F (&out)[1]) { out[0] = gather(t, bytes(p)); }
    static I twice_plus(I i, F v, F bound) { EACH(I, 2 * i.v[l] + (v.v[l] > bound.v[l])); }
    static T16 load16(const float* p) { T16 t; memcpy(t.v, p, sizeof t.v); return t; }
    static H16 load16(const uint16_t* p) { H16 t; memcpy(t.v, p, sizeof t.v); return t; }
    template <bool PAST> static void expand32(const T16& t, const uint8_t* p, float* out) {
        for (int k = 0; k < 16; ++k) out[2 * k] = t.v[p[k] >> 4], out[2 * k + 1] = t.v[p[k] & 15];
    }
    template <bool PAST> static void expand32(const H16& t, const uint8_t* p, uint16_t* out) {
        for (int k = 0; k < 16; ++k) out[2 * k] = t.v[p[k] >> 4], out[2 * k + 1] = t.v[p[k] & 15];
    }
    static F power(F a) {
        F out;
        for (int l = 0; l < W; ++l) {
            uint32_t u;
            memcpy(&u, a.v + l, 4);
            u <<= 23;
            memcpy(out.v + l, &u, 4);
        }
        return out;
    }
    static float largest(F a) {
        float out = a.v[0];
        for (int l = 1; l < W; ++l) out = a.v[l] > out ? a.v[l] : out;
        return out;
    }
    static void turn16(const uint32_t* rows, int64_t from, int64_t n, uint32_t* out, int64_t to) {
        for (int64_t c = 0; c < n; ++c)
            for (int64_t r = 0; r < 16; ++r) out[c * to + r] = rows[r * from + c];
    }
    // for elementwise.h
    static void store_bf16_flushed(uint16_t* p, F a) { store_bf16(p, a); }
    static I whole(F a) { EACH(I, a.v[l] == a.v[l] ? int32_t(a.v[l]) : 0); }
    static I halved(I a) { EACH(I, a.v[l] >> 1); }
    static I less(I a, I b) { EACH(I, a.v[l] - b.v[l]); }
    static F two_to(I n) {
        uint32_t bits[W];
        for (int l = 0; l < W; ++l) bits[l] = uint32_t(n.v[l] + 127) << 23;
        F out;
        memcpy(out.v, bits, sizeof bits);
        return out;
    }
    static F scale2(F a, F n) {  // in two steps: one exponent does not reach from 1 to the least subnormal
        const I all = whole(n), part = halved(all);
        return mul(mul(a, two_to(part)), two_to(less(all, part)));
    }
    static F where_negative(F test, F a, F b) { EACH(F, test.v[l] < 0 ? a.v[l] : b.v[l]); }

    static void prefetch(const uint8_t*) {}
    static void fence() {}
#undef EACH
};

}  // namespace

#include "kernels.h"
#include "elementwise.h"
#include "pages.h"

const Path* path_scalar() { return &THIS; }
