// Few rows and prompts through a frozen matrix by tiles (tiles.h): what rows.h, prompts.h and product.h do with vectors.
//
// TILED_COLUMNS rows of W, dense or out of few bits, are turned as wide.h turns them, and meet every row of x while they lie
// in the first cache. From FEWEST rows on; fewer wait for memory, not for arithmetic. After pages.h.
#pragma once

namespace {

constexpr int64_t FEWEST = 5;
constexpr int64_t TURNED_TERMS = 512;  // of W's rows at a time

// y += W x for `outs` <= 32 outputs and n rows, from turned W; where there are none before, y = W x
void tile_outputs(const uint32_t* turned, const uint16_t* x, int64_t x_stride, int64_t n, int64_t pairs, int64_t outs,
                  bool fresh, float* y, int64_t y_stride, Fetch& next) {
    const bool whole = outs == TILED_COLUMNS;
    const int64_t some = (next.n + (n + TILED_ROWS - 1) / TILED_ROWS - 1) / ((n + TILED_ROWS - 1) / TILED_ROWS);
    tiled_rows(0, n, [&](auto count, int64_t i, int64_t rows) {
        constexpr int T = decltype(count)::N;
        alignas(64) float part[TILED_ROWS * TILED_COLUMNS];
        float* at = y + i * y_stride;
        next.some(some);
        if (fresh) tiles_zero<T>();
        else if (whole) tiles_load<T>(at, y_stride);
        else {
            for (int64_t r = 0; r < rows; ++r) memcpy(part + r * TILED_COLUMNS, at + r * y_stride, outs * sizeof *y);
            tiles_load<T>(part);
        }
        tiles_add_pairs<T>(x + i * x_stride, x_stride, rows, turned, pairs);
        if (whole) return tiles_store<T>(at, y_stride);
        tiles_store<T>(part);
        for (int64_t r = 0; r < rows; ++r) memcpy(at + r * y_stride, part + r * TILED_COLUMNS, outs * sizeof *y);
    });
}

void tiled_dense(const Dense& t, int64_t first, int64_t last) {
    if (t.type != BF16 || t.n < FEWEST || t.cols % 2) return path_avx512_bf16()->serving->dense(t, first, last);
    alignas(64) uint32_t turned[TURNED_TERMS / 2 * TILED_COLUMNS];
    shape_tiles(16, 16);
    for (int64_t p = first; p < last; p += 2) {
        const int64_t r = p * PANEL, outs = least(least(2, last - p) * PANEL, t.rows - r);
        for (int64_t k = 0; k < t.cols; k += TURNED_TERMS) {
            const auto* w = (const uint16_t*)t.w + r * t.cols + k;
            const int64_t depth = least(TURNED_TERMS, t.cols - k), behind = most(0, least(2 * PANEL, t.rows - r - outs));
            turn_along(w, t.cols, outs, depth, turned);
            fill(turned, depth / 2);
            const int64_t wide = (depth * 2 + 63) / 64;
            Fetch next = {(const uint8_t*)(w + outs * t.cols), t.cols * 2, wide, wide * behind, 0};
            tile_outputs(turned, (const uint16_t*)t.x + k, t.x_stride, t.n, depth / 2, outs, k == 0, t.y + r, t.y_stride,
                         next);
        }
        for (int64_t i = 0; i < t.n_added; ++i) thin(t.added[i], t.y, t.y_stride, t.rows, p, least(p + 2, last), false);
    }
    release_tiles();
}

void tiled_product(const Product& p, const void* scratch, int64_t first, int64_t last) {
    if (p.dtype != BF16 || p.n < FEWEST) return path_avx512_bf16()->product(p, scratch, first, last);
    const bool uniform = is_uniform(p.m), there = reads_x(p);
    const Scales of(p.m);
    const auto* x = (const uint16_t*)(there ? p.x : scratch);
    const int64_t x_stride = there ? p.x_stride : up(p.m.cols, 64);
    alignas(64) uint16_t w[TILED_COLUMNS * DEEP];
    alignas(64) uint32_t turned[DEEP / 2 * TILED_COLUMNS];
    alignas(64) float sums[GROUP * TILED_COLUMNS];
    Fetch next = {};
    shape_tiles(16, 16);
    for (int64_t r = first; r < last; r += TILED_COLUMNS)
        for (int64_t g = 0; g < p.n; g += GROUP) {
            const int64_t outs = least(TILED_COLUMNS, last - r), n = least(GROUP, p.n - g);
            for (int64_t k = 0; k < p.m.cols; k += DEEP) {
                const int64_t depth = least(DEEP, up(p.m.cols - k, DotHalf::K));
                make_dense<DotHalf>(p, uniform, of, r, outs, k, depth, w);
                turn_along(w, depth, outs, depth, turned);
                tile_outputs(turned, x + g * x_stride + k, x_stride, n, depth / 2, TILED_COLUMNS, k == 0, sums, TILED_COLUMNS,
                             next);
            }
            for (int64_t i = 0; i < n; ++i) put_row(p, g + i, r, outs, sums + i * TILED_COLUMNS);
        }
    release_tiles();
}

}  // namespace
