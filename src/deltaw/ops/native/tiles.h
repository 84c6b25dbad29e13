// Tiles (AMX): 8 registers of 16 rows of 64 bytes. C [16, 16] float32 += A [16, 32] B [32, 16], bf16, B in pairs along the
// summed dimension. How many rows and bytes of each count is set by `shape_tiles`, which makes all of them zeros.
//
// With DELTAW_EMULATED_TILES the same calls compute in memory, by the pseudocode of Intel's manual (order, one rounding
// an addition, subnormals as zeros), and stop at what the processor would refuse: so tests run what uses them anywhere. (Such a
// library leaves out the paths below that of bf16 pairs.)
#pragma once
#ifdef DELTAW_TILES
#include <stdio.h>
#include <stdlib.h>

namespace {

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};

#ifdef DELTAW_EMULATED_TILES

struct Tiles {
    TileShapes shapes;
    alignas(64) uint8_t rows[8][16][64];
};
inline thread_local Tiles tiles_of_thread = {};

inline void need(bool fits, const char* what) {
    if (fits) return;
    fprintf(stderr, "tiles: %s\n", what);
    abort();
}

inline void load_shapes(const TileShapes* s) {
    tiles_of_thread = {};
    tiles_of_thread.shapes = *s;
    for (int t = 0; t < 8; ++t) need(s->palette == 1 && s->rows[t] <= 16 && s->bytes[t] <= 64, "shapes beyond a tile's");
}
inline void release_tiles() { tiles_of_thread = {}; }

inline Tiles& there(int t) {
    need(tiles_of_thread.shapes.rows[t] > 0 && tiles_of_thread.shapes.bytes[t] > 0, "a tile without a shape");
    return tiles_of_thread;
}
template <int T>
void tile_zero() {
    memset(there(T).rows[T], 0, sizeof(Tiles::rows[T]));
}
template <int T>
void tile_load(const void* from, int64_t stride) {
    Tiles& all = there(T);
    memset(all.rows[T], 0, sizeof(all.rows[T]));
    for (int r = 0; r < all.shapes.rows[T]; ++r) memcpy(all.rows[T][r], (const char*)from + r * stride, all.shapes.bytes[T]);
}
template <int T>
void tile_store(void* to, int64_t stride) {
    const Tiles& all = there(T);
    for (int r = 0; r < all.shapes.rows[T]; ++r) memcpy((char*)to + r * stride, all.rows[T][r], all.shapes.bytes[T]);
}

inline float half_of(uint32_t bits) {  // the upper half's value, subnormals as zeros
    bits = bits & 0x7f800000 ? bits & 0xffff0000 : bits & 0x80000000;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float flushed(float value) { return value > -1.17549435e-38f && value < 1.17549435e-38f ? value * 0 : value; }

template <int C, int A, int B>
void tile_dot() {
    Tiles& all = there(C);
    there(A), there(B);
    const TileShapes& s = all.shapes;
    need(s.rows[C] == s.rows[A] && s.bytes[C] == s.bytes[B] && s.bytes[A] == 4 * s.rows[B], "shapes that do not multiply");
    for (int m = 0; m < s.rows[C]; ++m) {
        float sums[2][16] = {};
        for (int k = 0; k < s.rows[B]; ++k)
            for (int n = 0; n < s.bytes[C] / 4; ++n) {
                uint32_t a, b;
                memcpy(&a, all.rows[A][m] + 4 * k, 4), memcpy(&b, all.rows[B][k] + 4 * n, 4);
                sums[0][n] = flushed(__builtin_fmaf(half_of(a << 16), half_of(b << 16), sums[0][n]));
                sums[1][n] = flushed(__builtin_fmaf(half_of(a), half_of(b), sums[1][n]));
            }
        for (int n = 0; n < s.bytes[C] / 4; ++n) {
            float sum;
            memcpy(&sum, all.rows[C][m] + 4 * n, 4);
            sum = flushed(sum + flushed(sums[0][n] + sums[1][n]));
            memcpy(all.rows[C][m] + 4 * n, &sum, 4);
        }
    }
}

#else  // the compilers' own intrinsics do not say that they read memory, and take no number from a template

inline void load_shapes(const TileShapes* s) { __asm__ volatile("ldtilecfg %0" : : "m"(*s)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }
template <int T>
INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

// C of 32 columns in tiles 0 to 3, A in 4 and 5, B of 32 terms in 6 and 7. `upper` rows of A and C in 4, 0 and 1, `lower`
// in 5, 2 and 3: none of these without lower rows
inline void shape_tiles(int64_t upper, int64_t lower) {
    TileShapes s = {};
    s.palette = 1;
    for (int t = 0; t < 8; ++t) {
        const int64_t rows = t >= 6 ? 16 : t == 5 || t == 2 || t == 3 ? lower : upper;
        s.rows[t] = uint8_t(rows > 0 ? rows : 0);
        s.bytes[t] = rows > 0 ? 64 : 0;
    }
    load_shapes(&s);
}

constexpr int64_t TILED_ROWS = 32;     // of A and C at a time
constexpr int64_t TILED_COLUMNS = 32;  // of B and C: rows of B's pairs and of C are so long
constexpr int64_t TILED_PAIRS = 16;    // of terms at a time

// Calls run(count, i, rows) for rows [first, last) in groups: `rows` from row i on, count::N tiles of them, shaped so. Before
// and after it tiles are shaped for groups of 32.
template <class Run>
INLINE void tiled_rows(int64_t first, int64_t last, const Run& run) {
    int64_t i = first;
    for (; i + 32 <= last; i += 32) run(Count<2>{}, i, 32);
    const int64_t rest = last - i;
    if (rest == 16) run(Count<1>{}, i, 16);
    if (rest % 16 == 0) return;
    shape_tiles(least(16, rest), rest - 16);
    if (rest > 16) run(Count<2>{}, i, rest);
    else run(Count<1>{}, i, rest);
    shape_tiles(16, 16);
}

// C += A B for 32 terms: rows of A `stride` bytes apart, T tiles of them
template <int T>
INLINE void tiles_add(const uint16_t* a, int64_t stride, const uint32_t* b) {
    tile_load<4>(a, stride), tile_load<6>(b, 128);
    tile_dot<0, 4, 6>();
    tile_load<7>(b + 16, 128);
    tile_dot<1, 4, 7>();
    if (T < 2) return;
    tile_load<5>((const char*)a + 16 * stride, stride);
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
}

// The same for any number of pairs, of which the last lack terms: zeros stand in B for those, and here for A's
template <int T>
INLINE void tiles_add_pairs(const uint16_t* a, int64_t stride, int64_t rows, const uint32_t* b, int64_t pairs) {
    int64_t k = 0;
    for (; k + TILED_PAIRS <= pairs; k += TILED_PAIRS) tiles_add<T>(a + 2 * k, 2 * stride, b + k * TILED_COLUMNS);
    if (k == pairs) return;
    alignas(64) uint16_t rest[TILED_ROWS * 2 * TILED_PAIRS];
    const __mmask32 there = (__mmask32(1) << 2 * (pairs - k)) - 1;
    for (int64_t r = 0; r < rows; ++r)
        _mm512_store_si512(rest + r * 2 * TILED_PAIRS, _mm512_maskz_loadu_epi16(there, a + r * stride + 2 * k));
    tiles_add<T>(rest, 4 * TILED_PAIRS, b + k * TILED_COLUMNS);
}

template <int T>
INLINE void tiles_zero() {
    tile_zero<0>(), tile_zero<1>();
    if (T == 2) tile_zero<2>(), tile_zero<3>();
}

// C from and to rows of floats
template <int T>
INLINE void tiles_load(const float* c, int64_t stride = TILED_COLUMNS) {
    tile_load<0>(c, 4 * stride), tile_load<1>(c + 16, 4 * stride);
    if (T == 2) tile_load<2>(c + 16 * stride, 4 * stride), tile_load<3>(c + 16 * stride + 16, 4 * stride);
}
template <int T>
INLINE void tiles_store(float* c, int64_t stride = TILED_COLUMNS) {
    tile_store<0>(c, 4 * stride), tile_store<1>(c + 16, 4 * stride);
    if (T == 2) tile_store<2>(c + 16 * stride, 4 * stride), tile_store<3>(c + 16 * stride + 16, 4 * stride);
}

}  // namespace
#endif
