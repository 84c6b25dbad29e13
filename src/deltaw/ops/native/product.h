// Products of few rows with a matrix in 4 or 8 bits, after kernels.h. Sums are float32.
#pragma once
#include "corner.h"

namespace {

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
constexpr int64_t ROOM = 1024 * ROWS + V::MANY;  // their scales
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

// The scales of a matrix's blocks, computed where absmax is nested
struct Scales {
    const Matrix& m;
    const int64_t n_blocks;
    typename V::T256 nested;

    explicit Scales(const Matrix& m) : m(m), n_blocks(((m.rows * m.cols - 1) >> m.block_log2) + 1) {
        if (!m.absmax) V::table256(m.nested_table, nested);
    }

    // Of blocks first ... last - 1. W more are read, for lanes whose x is zero: they must be finite. `room`: MANY more.
    const float* of(int64_t first, int64_t last, float* room) const {
        constexpr int MANY = V::MANY;
        if (m.absmax && last + W <= n_blocks) return m.absmax + first;
        int64_t b = first;
        while (!m.absmax && b + MANY <= n_blocks && b < last) {  // MANY at a time, up to where the constant changes
            const int64_t stop = least(last, ((b >> 8) + 1) << 8);
            const F by = V::set1(m.nested[b >> 8]), offset = V::set1(*m.offset);
            for (; b < stop && b + MANY <= n_blocks; b += MANY) {
                F apart[MANY / W];
                V::lookup256(nested, m.absmax_codes + b, apart);
                for (int k = 0; k < MANY / W; ++k)
                    V::store(room + (b - first) + k * W, V::add(V::mul(apart[k], by), offset));
            }
            b = least(b, stop);
        }
        for (; b < last; ++b) room[b - first] = scale_of(m, b);
        V::store(room + (last - first), V::set1(0));
        return room;
    }

    // Of each 64 of n values from `start` on, where 64 share a block
    const float* by_64(int64_t start, int64_t n, float* room) const {
        const int64_t b0 = start >> m.block_log2, of_64 = m.block_log2 - 6;
        const float* scales = of(b0, ((start + n - 1) >> m.block_log2) + 1, room);
        if (!of_64) return scales;
        float* out = room + ROOM / 2;
        for (int64_t i = 0; i < n / 64; ++i) out[i] = scales[((start / 64 + i) >> of_64) - b0];
        return out;
    }
};

// What the scales of n values need, as many values further on
inline void fetch_scales(const Matrix& m, int64_t block, int64_t further, int64_t n) {
    const int64_t width = m.absmax ? 4 : 1;
    const uint8_t* p = m.absmax ? (const uint8_t*)(m.absmax + block) : m.absmax_codes + block;
    for (int64_t i = 0; i < (n >> m.block_log2) * width; i += 64) V::prefetch(p + (further >> m.block_log2) * width + i);
}

// N rows of W from `row` on, in float32. ALIGNED: rows are whole blocks, so that lanes keep their blocks from step to
// step.
template <int N, bool ALIGNED>
inline void gemv4(const Scales& of, const V::T16& table, const float* x, int64_t row, float* room, float* y) {
    const Matrix& m = of.m;
    const int log2 = m.block_log2;
    const int64_t start = row * m.cols, b0 = start >> log2, mask = (int64_t(1) << log2) - 1;
    const float* scales = of.of(b0, ((start + N * m.cols - 1) >> log2) + 1, room);
    const uint8_t* codes = m.codes + start / 2;
    const int64_t row_bytes = m.cols / 2;
    const int64_t group = N * row_bytes, ahead = (AHEAD + group - 1) / group * group;  // whole groups of rows
    fetch_scales(m, start >> m.block_log2, 2 * ahead, 2 * group);
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
    const Scales of(p.m);
    const V::T16 table = V::table16(p.m.table);
    float room[ROOM];
    int64_t r = first;
    for (; r + ROWS <= last; r += ROWS) gemv4<ROWS, ALIGNED>(of, table, x, r, room, y + r - first);
    for (; r < last; ++r) gemv4<1, ALIGNED>(of, table, x, r, room, y + r - first);
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

// n values of row i of the product, from column r on: the bias is added, then they are rounded
inline void put_row(const Product& p, int64_t i, int64_t r, int64_t n, float* y) {
    float bias[64 + W];  // n at most
    if (p.bias) {
        read_floats(p.dtype, p.bias, r, n, bias);
        for (int64_t k = 0; k < n; ++k) y[k] += bias[k];
    }
    write_floats(p.out_dtype, p.y, i * p.y_stride + r, n, y);
}

void gemv(const Product& p, bool uniform, const float* x, int64_t first, int64_t last) {
    constexpr int64_t PIECE = 64;
    float y[PIECE + W];
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
        put_row(p, 0, r, n, y);
    }
}

// Four bits straight to bf16 pairs -------------------------------------------------------------------------------------
//
// Where 64 columns share a block, 32 bytes of codes become two vectors of weights, level times scale rounded to bf16 as
// `dequantise` does it: those of the high nibbles and those of the low ones. x is laid out to match (product_prepare).

#ifdef DELTAW_BF16_DOT
constexpr bool HAS_HALF = true;
inline bool in_pairs(const Product& p) {
    return p.dtype == BF16 && p.m.bits == 4 && p.m.cols % 64 == 0 && p.m.block_log2 >= 6;
}

inline void part_row(const uint16_t* x, int64_t cols, uint16_t* out) {
    for (int64_t k = 0; k < cols; k += 64) {
        V::H even, odd;
        V::part_pairs(x + k, even, odd);
        V::store_half(out + k, even), V::store_half(out + k + 32, odd);
    }
}

// Columns [k, k + depth) of a row as weights
inline void make_pairs(const Scales& of, F table, int64_t row, int64_t k, int64_t depth, uint16_t* out) {
    const Matrix& m = of.m;
    const int64_t start = row * m.cols + k;
    float room[ROOM];
    const float* scales = of.by_64(start, depth, room);
    const uint8_t* codes = m.codes + start / 2;
    for (int64_t j = 0; j < depth; j += 64) {
        V::H high, low;
        V::look_up64(V::levels(table, scales[j / 64]), codes + j / 2, high, low);
        V::store_half(out + j, high), V::store_half(out + j + 32, low);
        if (j % 128 == 0) V::prefetch(codes + j / 2 + PANEL * m.cols / 2);
    }
}

// How far ahead of what is multiplied codes are fetched: one row of W is one stream, which the second cache holds
inline int64_t ahead_of(int64_t R, int64_t row_bytes) { return R == 1 ? 2 * AHEAD : up(2 * AHEAD, R * row_bytes); }

// R rows of W from `row` on, whose scales are given by 64, times all N rows of x: the weights stay in registers. The lanes
// of each sum are left apart.
template <int R, int N>
INLINE void corner_of_codes(const Matrix& m, F table, const float* scales, const uint16_t* x, int64_t row, int64_t last,
                            F (&total)[N][R]) {
    constexpr int CHAINS = R * N == 1 ? 4 : R * N <= 4 ? 2 : 1;  // a sum waits for itself: several, added at the end
    constexpr int TWICE = CHAINS == 4 ? 2 : 1;
    const int64_t start = row * m.cols, row_bytes = m.cols / 2;
    const uint8_t* codes = m.codes + start / 2;
    const int64_t ahead = ahead_of(R, row_bytes);
    const int64_t to_fetch = (last - row) * row_bytes - ahead;  // what lies behind is another thread's to read
    fetch_scales(m, start >> m.block_log2, 2 * ahead, least(R * m.cols, 2 * to_fetch));
    F sum[CHAINS][N][R];
    for (int c = 0; c < CHAINS; ++c)
        for (int i = 0; i < N; ++i)
            for (int r = 0; r < R; ++r) sum[c][i][r] = V::set1(0);
    const auto add = [&](int64_t k, int c) __attribute__((always_inline)) {  // columns [k, k + 64)
        V::H even[N], odd[N];
        for (int i = 0; i < N; ++i) {
            even[i] = V::load_half(x + i * m.cols + k);
            odd[i] = V::load_half(x + i * m.cols + k + 32);
        }
        for (int r = 0; r < R; ++r) {
            V::H high, low;
            V::look_up64(V::levels(table, scales[(r * m.cols + k) / 64]), codes + r * row_bytes + k / 2, high, low);
            for (int i = 0; i < N; ++i) {
                F &one = sum[c][i][r], &other = sum[(c + 1) % CHAINS][i][r];
                one = V::dot_half(high, even[i], one);
                other = V::dot_half(low, odd[i], other);
            }
        }
    };
    int64_t k = 0;
    for (; k + 64 * TWICE <= m.cols; k += 64 * TWICE) {
        if (k / 2 * R < to_fetch)
            for (int64_t i = 0; i < R * TWICE * 32; i += 64) V::prefetch_second(codes + ahead + k / 2 * R + i);
        add(k, 0);
        if (TWICE == 2) add(k + 64, 2 % CHAINS);
    }
    if (k < m.cols) add(k, 0);
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < R; ++r) {
            total[i][r] = sum[0][i][r];
            for (int c = 1; c < CHAINS; ++c) total[i][r] = V::add(total[i][r], sum[c][i][r]);
        }
}

template <int N>
inline void from_codes(const Product& p, const uint16_t* x, int64_t first, int64_t last) {
    constexpr int R = N == 1 ? 1 : 4;  // with one row of x memory is waited for, and likes one stream
    constexpr int64_t PIECE = 64;
    const int64_t cols = p.m.cols, at_once = least(W, 64 * (ROOM / 2) / cols);  // rows whose scales are computed together
    const Scales of(p.m);
    const F table = V::load(p.m.table);
    float y[N * PIECE + W], room[ROOM];
    const int64_t start = first * cols, fetched = least(last * cols - start, 2 * ahead_of(R, cols / 2));
    fetch_scales(p.m, start >> p.m.block_log2, 0, fetched);
    for (int64_t i = 0; i < fetched / 2; i += 64) V::prefetch(p.m.codes + start / 2 + i);
    for (int64_t r = first; r < last; r += PIECE) {
        const int64_t n = least(PIECE, last - r);
        int64_t i = 0;
        for (F part[1][W]; N == 1 && i + W <= n; i += W) {  // one by one, their lanes added together
            for (int64_t k = 0; k < W;) {
                const int64_t stop = least(W, k + at_once);
                const float* scales = of.by_64((r + i + k) * cols, (stop - k) * cols, room);
                for (; k < stop; ++k, scales += cols / 64) {
                    F one[1][1];
                    corner_of_codes<1, 1>(p.m, table, scales, x, r + i + k, last, one);
                    part[0][k] = one[0][0];
                }
            }
            put_sums<W, 1>(part, y + i, PIECE);
        }
        for (F four[N][R]; i + R <= n; i += R) {
            const float* scales = of.by_64((r + i) * cols, R * cols, room);
            corner_of_codes<R, N>(p.m, table, scales, x, r + i, last, four);
            put_sums<R, N>(four, y + i, PIECE);
        }
        for (F one[N][1]; i < n; ++i) {
            const float* scales = of.by_64((r + i) * cols, cols, room);
            corner_of_codes<1, N>(p.m, table, scales, x, r + i, last, one);
            put_sums<1, N>(one, y + i, PIECE);
        }
        for (int k = 0; k < N; ++k) put_row(p, k, r, n, y + k * PIECE);
    }
}
using DotHalf = PairDot;
#else
constexpr bool HAS_HALF = false;
inline bool in_pairs(const Product&) { return false; }
using DotHalf = PlainDot;
#endif

// A few rows of x ----------------------------------------------------------------------------------------------------
//
// PANEL rows of W are made dense in the caches, DEEP columns at a time, and multiplied there with up to GROUP rows of x.

constexpr int64_t DEEP = 512;  // the panel stays in the first-level cache
constexpr int64_t GROUP = 64;
constexpr int ABREAST = W == 16 ? 4 : 3;  // rows of x in a corner: 16 vectors of sums, or with 16 registers 12

template <class Dot>
inline void make_dense(const Product& p, bool uniform, const Scales& of, int64_t r, int64_t rows, int64_t k, int64_t depth,
                       typename Dot::D::T* w) {
    const int64_t real = least(depth, p.m.cols - k);
    for (int64_t i = 0; i < rows; ++i) {
#ifdef DELTAW_BF16_DOT
        if constexpr (Dot::K == 2 * W)
            if (in_pairs(p)) {
                make_pairs(of, V::load(p.m.table), r + i, k, depth, w + i * depth);
                continue;
            }
#endif
        const int64_t start = (r + i) * p.m.cols + k;
        decode<typename Dot::D>(p.m, uniform, start, start + real, w + i * depth);
        memset(w + i * depth + real, 0, (depth - real) * sizeof *w);
    }
}

// Rows [r, r + rows) of W with rows [g, g + GROUP) of x
template <class Dot>
inline void panel(const Product& p, bool uniform, const Scales& of, const typename Dot::D::T* x, int64_t x_stride, int64_t g,
                  int64_t r, int64_t rows) {
    alignas(64) typename Dot::D::T w[PANEL * DEEP];
    alignas(64) float sums[GROUP * PANEL], part[GROUP * PANEL];
    const int64_t n = least(GROUP, p.n - g);
    for (int64_t k = 0; k < p.m.cols; k += DEEP) {
        const int64_t depth = least(DEEP, up(p.m.cols - k, Dot::K));
        make_dense<Dot>(p, uniform, of, r, rows, k, depth, w);
        const Dense t = {w, x + g * x_stride + k, nullptr, nullptr, rows, depth, n, x_stride, PANEL, 0, 0, 0};
        float* y = k ? part : sums;
        int64_t i = 0;
        for (; n - i > 2; i += ABREAST) panel_rows<Dot, ABREAST, false>(t, w, rows, i, y);
        if (n - i == 2) panel_rows<Dot, 2, false>(t, w, rows, i, y);
        if (n - i == 1) panel_rows<Dot, 1, false>(t, w, rows, i, y);
        for (i = 0; k && i < n * PANEL; i += W) V::store(sums + i, V::add(V::load(sums + i), V::load(part + i)));
    }
    for (int64_t i = 0; i < n; ++i) put_row(p, g + i, r, rows, sums + i * PANEL);
}

inline bool one_row(const Product& p) { return p.n == 1 && suits_gemv(p.m) && !in_pairs(p); }

// Whether the kernel can read x where it lies: whole vectors, and no corner that reaches beyond its rows
inline bool reads_x(const Product& p) {
    const bool as_it_is = p.dtype == F32 || (HAS_HALF && p.dtype == BF16 && !in_pairs(p));
    return as_it_is && !one_row(p) && p.m.cols % 64 == 0 && p.n % ABREAST < 3;
}

int64_t product_scratch(const Product& p) {
    if (reads_x(p)) return 0;
    if (one_row(p)) return 2 * (p.m.cols + STEP) * int64_t(sizeof(float));
    return up(p.n, ABREAST) * up(p.m.cols, 64) * (HAS_HALF && p.dtype == BF16 ? 2 : 4);
}

// x as the kernel reads it: floats (or, for a path with bf16 products, bf16), each row padded with zeros
void product_prepare(const Product& p, void* scratch) {
    if (reads_x(p)) return;
    if (one_row(p)) return arrange(p, (float*)scratch);
    const int64_t stride = up(p.m.cols, 64), cols = p.m.cols, size = HAS_HALF && p.dtype == BF16 ? 2 : 4;
    memset((char*)scratch + p.n * stride * size, 0, (up(p.n, ABREAST) - p.n) * stride * size);
    for (int64_t i = 0; i < p.n; ++i) {
        if (size == 2) {
            const uint16_t* from = (const uint16_t*)p.x + i * p.x_stride;
            uint16_t* row = (uint16_t*)scratch + i * stride;
#ifdef DELTAW_BF16_DOT
            if (in_pairs(p)) {
                part_row(from, cols, row);
                continue;
            }
#endif
            memcpy(row, from, cols * sizeof *row);
            memset(row + cols, 0, (stride - cols) * sizeof *row);
        } else {
            float* row = (float*)scratch + i * stride;
            memset(row + stride - 64, 0, 64 * sizeof(float));
            read_floats(p.dtype, p.x, i * p.x_stride, cols, row);
        }
    }
}

template <class Dot>
inline void panels(const Product& p, const void* x, int64_t x_stride, int64_t first, int64_t last) {
    const bool uniform = is_uniform(p.m);
    const Scales of(p.m);
    for (int64_t g = 0; g < p.n; g += GROUP)
        for (int64_t r = first; r < last; r += PANEL)
            panel<Dot>(p, uniform, of, (const typename Dot::D::T*)x, x_stride, g, r, least(PANEL, last - r));
}

void product(const Product& p, const void* scratch, int64_t first, int64_t last) {
    if (one_row(p)) return gemv(p, is_uniform(p.m), (const float*)scratch, first, last);
#ifdef DELTAW_BF16_DOT
    if (in_pairs(p) && p.n <= 4 && p.m.cols <= 32000) {
        const auto* x = (const uint16_t*)scratch;
        if (p.n == 1) return from_codes<1>(p, x, first, last);
        if (p.n == 2) return from_codes<2>(p, x, first, last);
        return p.n == 3 ? from_codes<3>(p, x, first, last) : from_codes<4>(p, x, first, last);
    }
#endif
    const bool there = reads_x(p);
    const void* x = there ? p.x : scratch;
    const int64_t x_stride = there ? p.x_stride : up(p.m.cols, 64);
    if (HAS_HALF && p.dtype == BF16) return panels<DotHalf>(p, x, x_stride, first, last);
    panels<PlainDot>(p, x, x_stride, first, last);
}

}  // namespace
