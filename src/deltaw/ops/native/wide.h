// Products of many rows with frozen matrices, and what an adapter adds to them, in bf16 pairs:
//
//   y = onto + bias + x_1 M_1 + x_2 M_2 + ...        for each band of columns; x_i [n, depth_i], M_i [depth_i, columns]
//
// A pair lies along the summed dimension. M is turned a chunk of terms and PANELS panels of SPAN columns at a time, pairs
// [depth / 2, SPAN, 2], so that a lane of a sum belongs to a column; then the rows of x pass in groups of 12, each pair
// spread over the lanes: 24 sums, 14 loads for 24 products. A group's panels and a block of rows of x lie in the second
// cache: 24 products hide what a pair takes from there, and sums that leave their registers for memory, once a chunk,
// cost more. Sums are float32, and wait as such where there are more chunks; y is rounded once.
//
// With tiles a panel's pairs are their B as they lie, and rows of x their A: groups of 32 rows, 4 sums of 16 by 16.
#pragma once
#include "attention.h"
#include "tiles.h"

#ifdef DELTAW_BF16_DOT

namespace {

constexpr int64_t SPAN = 32;         // columns of a panel
constexpr int64_t PANELS = 4;        // panels that a block of rows meets
constexpr int64_t TERMS = 2304;      // terms of a chunk at most
constexpr int64_t LEAD = 256;        // of an adapter's factor, which goes before the first chunk's
constexpr int64_t X_BYTES = 128 << 10;  // bytes of x that stay in the second cache
#ifdef DELTAW_TILES
constexpr int64_t GROUP_ROWS = TILED_ROWS, BLOCK_ROWS = 64;  // at a time, and of a block at least
constexpr int64_t PAIRS_AT_ONCE = TILED_PAIRS;  // where a panel ends with zeros
#else
constexpr int64_t GROUP_ROWS = 12, BLOCK_ROWS = 48, PAIRS_AT_ONCE = 1;
#endif

struct Chunk {  // terms [k0, k0 + depth) of those from `term` on, whose rows of x lie side by side; lead of another before
    int64_t term, k0, depth, lead;
};

inline bool joins(const Term& a, const Term& b) { return b.x == a.x + a.depth && b.x_stride == a.x_stride; }

// Calls visit(chunk, last) for each
template <class Visit>
inline void chunks_of(const Band& b, const Visit& visit) {
    const int64_t first = b.n_terms > 1 && b.terms[0].depth <= LEAD;
    int64_t lead = first ? b.terms[0].depth : 0;
    for (int64_t t = first, end; t < b.n_terms; t = end) {
        int64_t total = b.terms[t].depth;
        for (end = t + 1; end < b.n_terms && joins(b.terms[end - 1], b.terms[end]); ++end) total += b.terms[end].depth;
        const int64_t count = (total + TERMS - 1) / TERMS, each = up((total + count - 1) / count, 32);
        int64_t term = t, at = 0;
        for (int64_t k = 0; k < total; k += each) {
            for (; k - at >= b.terms[term].depth; ++term) at += b.terms[term].depth;
            visit(Chunk{term, k - at, least(each, total - k), lead}, end == b.n_terms && k + each >= total);
            lead = 0;
        }
    }
}

// Turning ------------------------------------------------------------------------------------------------------------

// Pairs of `rows` <= 32 rows from w on, `depth` long, which lie along the terms: zeros where the rows end
inline void turn_along(const uint16_t* w, int64_t stride, int64_t rows, int64_t depth, uint32_t* out) {
    int64_t k = 0;
    if (rows % W == 0 && stride % 2 == 0)
        for (; k + 32 <= depth; k += 32) {
            uint32_t* to = out + k / 2 * SPAN;
            for (int64_t r = 0; r < rows; r += W)
                V::turn16((const uint32_t*)(w + r * stride + k), stride / 2, W, to + r, SPAN);
            for (int64_t p = 0; rows < SPAN && p < W; ++p) V::store((float*)(to + p * SPAN + rows), V::set1(0));
        }
    for (; k < depth; k += 2)
        for (int64_t r = 0; r < SPAN; ++r) {
            uint32_t both = 0;
            if (r < rows) memcpy(&both, w + r * stride + k, 4);
            out[k / 2 * SPAN + r] = both;
        }
}

// Pairs of two rows of up to SPAN columns, which lie along the columns
inline void turn_across(const uint16_t* low, const uint16_t* high, int64_t columns, uint32_t* out) {
    if (columns >= SPAN) {
        V::mingle_halves(low, high, (uint16_t*)out);
        V::mingle_halves(low + W, high + W, (uint16_t*)(out + W));
        return;
    }
    for (int64_t i = 0; i < SPAN; ++i) out[i] = i < columns ? low[i] | uint32_t(high[i]) << 16 : 0;
}

// Terms [k, k + depth) of one matrix for up to SPAN columns from c on
inline void turn(const Term& t, int64_t c, int64_t columns, int64_t k, int64_t depth, uint16_t* room, uint32_t* out) {
    const bool uniform = t.packed && is_uniform(*t.packed);
    const auto decoded = [&](int64_t row, int64_t from, int64_t n, uint16_t* to) {
        const int64_t start = row * t.packed->cols + from;
        decode<BFloat16>(*t.packed, uniform, start, start + n, to);
        return to;
    };
    if (t.turned) {
        if (t.packed)
            for (int64_t r = 0; r < columns; ++r) decoded(c + r, k, depth, room + r * TERMS);
        return turn_along(t.packed ? room : t.w + c * t.w_stride + k, t.packed ? TERMS : t.w_stride, columns, depth, out);
    }
    for (int64_t i = k; i < k + depth; i += 2, out += SPAN) {
        const uint16_t* low = t.packed ? decoded(i, c, columns, room) : t.w + i * t.w_stride + c;
        const uint16_t* high = t.packed ? decoded(i + 1, c, columns, room + SPAN) : low + t.w_stride;
        turn_across(low, high, columns, out);
    }
}

// Zeros behind the last pairs of a panel
inline void fill(uint32_t* panel, int64_t pairs) { memset(panel + pairs * SPAN, 0, (up(pairs, PAIRS_AT_ONCE) - pairs) * SPAN * 4); }

// A chunk's terms, and what leads it
inline void turn_chunk(const Band& b, const Chunk& chunk, int64_t c, int64_t columns, uint16_t* room, uint32_t* lead,
                       uint32_t* panel) {
    if (chunk.lead) turn(b.terms[0], c, columns, 0, chunk.lead, room, lead), fill(lead, chunk.lead / 2);
    for (int64_t t = chunk.term, k = chunk.k0, done = 0; done < chunk.depth; ++t, k = 0) {
        const int64_t depth = least(b.terms[t].depth - k, chunk.depth - done);
        turn(b.terms[t], c, columns, k, depth, room, panel + done / 2 * SPAN);
        done += depth;
    }
    fill(panel, chunk.depth / 2);
}

// The lines of memory behind SPAN columns of a term, of which a few are asked for at a time, long before `turn` reads them
struct Fetch {
    const uint8_t* at;
    int64_t stride, wide, n, done;  // bytes from row to row, lines of a row, lines in all

    INLINE void some(int64_t count) {
        for (const int64_t stop = least(n, done + count); done < stop; ++done)
            V::prefetch_second(at + done / wide * stride + done % wide * 64);
    }
};

inline Fetch fetch_of(const Band& b, int64_t c, const Chunk& chunk) {
    const Term& t = b.terms[chunk.term];
    const int64_t depth = least(chunk.depth, t.depth - chunk.k0), columns = least(SPAN, b.cols - c);
    if (t.packed || columns < 1) return {};
    const uint16_t* w = t.w + (t.turned ? c * t.w_stride + chunk.k0 : chunk.k0 * t.w_stride + c);
    const int64_t wide = ((t.turned ? depth : columns) * 2 + 63) / 64;
    return {(const uint8_t*)w, t.w_stride * 2, wide, wide * (t.turned ? columns : depth), 0};
}

// Multiplying --------------------------------------------------------------------------------------------------------

struct Tile {  // of a panel: rows of x by pairs of terms, u of them before
    const uint32_t *lead, *panel;
    const uint16_t *u, *x;
    int64_t u_stride, x_stride, leading, pairs;
    float scale;   // of what the leading terms give
    bool first, last;
    float* sums;  // [rows, SPAN]: of the chunks before, or for those behind
    const float* bias;
    const uint16_t* onto;
    uint16_t* y;
    int64_t onto_stride, y_stride, columns;
};

inline F upper(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// What ends every row of a panel: bias, `onto`, one rounding
struct Ends {
    __mmask32 there;
    F low, high;
};

INLINE Ends ends_of(const Tile& t) {
    const __mmask32 there = t.columns >= SPAN ? ~__mmask32(0) : (__mmask32(1) << t.columns) - 1;
    return {there, t.bias ? _mm512_maskz_loadu_ps(__mmask16(there), t.bias) : V::set1(0),
            t.bias ? _mm512_maskz_loadu_ps(__mmask16(there >> W), t.bias + W) : V::set1(0)};
}

INLINE void end_row(const Tile& t, const Ends& e, int64_t i, F a, F b) {
    if (t.bias) a = V::add(a, e.low), b = V::add(b, e.high);
    if (t.onto) {
        const __m512i o = _mm512_maskz_loadu_epi16(e.there, t.onto + i * t.onto_stride);
        a = V::add(a, upper(_mm512_castsi512_si256(o)));
        b = V::add(b, upper(_mm512_extracti64x4_epi64(o, 1)));
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if (t.columns >= SPAN) _mm512_storeu_si512(t.y + i * t.y_stride, both);  // masked stores of halves are slow
    else _mm512_mask_storeu_epi16(t.y + i * t.y_stride, e.there, both);
}

// Of rows that are done soon; or stores wait for their lines one after the other
INLINE void fetch_ends(const Tile& t, int64_t i, int64_t rows) {
    if (!t.last) return;
    for (int64_t r = i; r < i + rows; ++r) __asm__ volatile("prefetchw %0" : : "m"(t.y[r * t.y_stride]));
    if (t.onto)
        for (int64_t r = i; r < i + rows; ++r) V::prefetch((const uint8_t*)(t.onto + r * t.onto_stride));
}

#ifndef DELTAW_TILES

template <int N>
INLINE void multiply_pairs(const uint32_t* panel, const uint16_t* x, int64_t stride, int64_t pairs, F (&a)[N], F (&b)[N]) {
    for (int64_t k = 0; k < pairs; ++k) {
        const V::H low = V::load_half((const uint16_t*)(panel + k * SPAN));
        const V::H high = V::load_half((const uint16_t*)(panel + k * SPAN + W));
        for (int i = 0; i < N; ++i) {
            const V::H both = V::half_pair(x + i * stride + 2 * k);
            a[i] = V::dot_half(low, both, a[i]), b[i] = V::dot_half(high, both, b[i]);
        }
    }
}

// N rows from row i on
template <int N>
__attribute__((noinline)) void tile(const Tile& t, int64_t i) {
    float* sums = t.sums + i * SPAN;
    F a[N], b[N];
    for (int r = 0; r < N; ++r) {
        a[r] = t.first ? V::set1(0) : V::load(sums + r * SPAN);
        b[r] = t.first ? V::set1(0) : V::load(sums + r * SPAN + W);
    }
    fetch_ends(t, i, N);
    if (!t.first)
        for (int r = 0; r < 2 * N; ++r) V::prefetch((const uint8_t*)(sums + N * SPAN + r * W));
    if (t.leading) {
        multiply_pairs(t.lead, t.u + i * t.u_stride, t.u_stride, t.leading, a, b);
        const F scale = V::set1(t.scale);
        for (int r = 0; r < N; ++r) a[r] = V::mul(a[r], scale), b[r] = V::mul(b[r], scale);
    }
    multiply_pairs(t.panel, t.x + i * t.x_stride, t.x_stride, t.pairs, a, b);
    if (!t.last) {
        for (int r = 0; r < N; ++r) V::store(sums + r * SPAN, a[r]), V::store(sums + r * SPAN + W, b[r]);
        return;
    }
    const Ends ends = ends_of(t);
    for (int r = 0; r < N; ++r) end_row(t, ends, i + r, a[r], b[r]);
}

void multiply_rows(const Tile& t, int64_t first, int64_t last, Fetch& next) {
    const int64_t some = (next.n * 12 + last - first - 1) / (last - first);
    int64_t i = first;
    for (; i + 12 <= last; i += 12) next.some(some), tile<12>(t, i);
    for (; i + 4 <= last; i += 4) tile<4>(t, i);
    for (; i < last; ++i) tile<1>(t, i);
}

#else

// `rows` <= 16 T rows from row i on, for which the tiles have their shapes. A row's sums are its own whatever they are
// computed beside: so they are the same for any number of threads
template <int T>
__attribute__((noinline)) void tile(const Tile& t, int64_t i, int64_t rows) {
    alignas(64) float led[GROUP_ROWS * SPAN], own[GROUP_ROWS * SPAN];
    fetch_ends(t, i, rows);
    if (t.leading) {
        tiles_zero<T>();
        tiles_add_pairs<T>(t.u + i * t.u_stride, t.u_stride, rows, t.lead, t.leading);
        tiles_store<T>(led);
    }
    float* sums = t.sums + i * SPAN;
    if (t.first) tiles_zero<T>();
    else tiles_load<T>(sums);
    tiles_add_pairs<T>(t.x + i * t.x_stride, t.x_stride, rows, t.panel, t.pairs);
    if (t.last) sums = own;
    tiles_store<T>(sums);
    if (!t.last && !t.leading) return;
    const Ends ends = ends_of(t);
    const F scale = V::set1(t.scale);
    for (int64_t r = 0; r < rows; ++r, sums += SPAN) {
        F a = V::load(sums), b = V::load(sums + W);
        if (t.leading) a = V::fma(V::load(led + r * SPAN), scale, a), b = V::fma(V::load(led + r * SPAN + W), scale, b);
        if (t.last) end_row(t, ends, i + r, a, b);
        else V::store(sums, a), V::store(sums + W, b);
    }
}

void multiply_rows(const Tile& t, int64_t first, int64_t last, Fetch& next) {
    const int64_t some = (next.n * GROUP_ROWS + last - first - 1) / (last - first);
    tiled_rows(first, last, [&](auto count, int64_t i, int64_t rows) {
        next.some(some);
        tile<decltype(count)::N>(t, i, rows);
    });
}

#endif

int64_t wide_scratch(int64_t rows) {  // bytes a thread needs for so many rows at a time
    return (PANELS * SPAN * (rows + GROUP_ROWS) + PANELS * SPAN * (TERMS + LEAD) / 2) * 4 + SPAN * TERMS * 2 + 256;
}

// Up to PANELS panels of a band, from column c on, for rows [row0, row1)
void wide_group(const Band& b, int64_t c, int64_t columns, int64_t row0, int64_t row1, void* scratch) {
    Room room = {(char*)scratch};
    const int64_t rows = row1 - row0;
    float* sums = room.take<float>(PANELS * SPAN * (rows + GROUP_ROWS));
    uint32_t* panels = room.take<uint32_t>(PANELS * SPAN * TERMS / 2);
    uint32_t* leads = room.take<uint32_t>(PANELS * SPAN * LEAD / 2);
    uint16_t* decoded = room.take<uint16_t>(SPAN * TERMS);
    bool first = true;
#ifdef DELTAW_TILES
    shape_tiles(16, 16);
#endif
    chunks_of(b, [&](const Chunk& chunk, bool last) {
        const int64_t apart = SPAN * TERMS / 2, leads_apart = SPAN * LEAD / 2;
        const Term& of = b.terms[chunk.term];
        const int64_t fits = X_BYTES / 2 / chunk.depth / GROUP_ROWS * GROUP_ROWS, block = most(fits, BLOCK_ROWS);
        for (int64_t r = 0; r < rows; r += block)
            for (int64_t j = 0; j < columns; j += SPAN) {
                const int64_t p = j / SPAN, at = c + j;
                Fetch next = {};
                if (r == 0) {
                    turn_chunk(b, chunk, at, least(SPAN, columns - j), decoded, leads + p * leads_apart, panels + p * apart);
                    next = fetch_of(b, at + SPAN, chunk);
                }
                const Tile t = {
                    leads + p * leads_apart, panels + p * apart,
                    chunk.lead ? b.terms[0].x + row0 * b.terms[0].x_stride : nullptr, of.x + row0 * of.x_stride + chunk.k0,
                    b.terms[0].x_stride, of.x_stride, chunk.lead / 2, chunk.depth / 2, b.terms[0].scale, first, last,
                    sums + p * (rows + GROUP_ROWS) * SPAN, b.bias ? b.bias + at : nullptr,
                    b.onto ? b.onto + row0 * b.onto_stride + at : nullptr, b.y + row0 * b.y_stride + at,
                    b.onto_stride, b.y_stride, columns - j,
                };
                multiply_rows(t, r, least(rows, r + block), next);
            }
        first = false;
    });
#ifdef DELTAW_TILES
    release_tiles();
#endif
}

const WideKernels WIDE_KERNELS = {wide_scratch, wide_group, SPAN, PANELS};

}  // namespace
#endif
