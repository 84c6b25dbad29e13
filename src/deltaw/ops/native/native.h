// What the translation units share. No torch, no OpenMP headers, no C++ library: plain pointers and loops.
//
//   value[i] = table[code[i]] * scale[i >> block_log2]        W [rows, cols] row by row, flattened
//
// One file per instruction set (path_*.cpp) fills in the small vector type of kernels.h and hands back a Path.
// Everything of kernels.h lies in an unnamed namespace: two units compiled for two CPUs must not share a symbol,
// or the linker keeps the AVX-512 copy for everyone.
#pragma once
#include <stdint.h>

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

// A matrix in 4 or 8 bits. absmax is plain, or null with the next four in its place (double quantisation):
//   scale[b] = nested_table[absmax_codes[b]] * nested[b >> 8] + offset
struct Matrix {
    const uint8_t* codes;
    const float* table;  // [16] or [256]
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* nested;
    const float* nested_table;
    const float* offset;
    int64_t rows, cols;
    int32_t bits, block_log2;
};

// n values of `dtype` to codes and absmax. bounds [n_levels - 1] ascending; order [n_levels]: rank -> code.
struct Quantise {
    const void* values;
    const float* bounds;
    const uint8_t* order;
    uint8_t* codes;
    float* absmax;
    int64_t n;
    int32_t dtype, bits, block_log2;
};

// 8 bits by a table of 65,536 cells over [-1, 1] (bitsandbytes' CPU way), and back by `table` [256].
struct Dynamic {
    float* values;
    uint8_t* codes;
    float* absmax;
    const uint8_t* cells;
    const float* table;
    int64_t n, block;
};

// The rectangle [row0, row1) x [col0, col1) of a matrix into `out`, `stride` values from row to row.
struct Dequantise {
    Matrix m;
    void* out;
    int64_t row0, row1, col0, col1, stride;
    int32_t dtype;
};

// y [n, rows] = x [n, cols] W^T + bias, all of `dtype`; bias may be null.
struct Product {
    Matrix m;
    const void* x;
    const void* bias;
    void* y;
    int64_t n;
    int32_t dtype;
};

// [tokens, heads, dim] of `dtype`: values from token to token and from head to head; features lie side by side.
struct Rows {
    void* at;
    int64_t token, head;
};

// Causal attention within each document [bounds[d], bounds[d + 1]); see attention.h. Query head h reads key-value head
// h / (heads / shared). A token sees itself and the window - 1 before it. g is dO; dq, dk, dv and g are the backward's.
struct Attention {
    Rows q, k, v, o, g, dq, dk, dv;
    float* lse;             // [heads, tokens]
    const int64_t* bounds;  // [docs + 1]
    int64_t tokens, heads, shared, dim, docs, window;
    float scale;
    int32_t dtype;  // F32 or BF16
};

// Query heads [first, last) of a document, which share a key-value head
struct Heads {
    int64_t doc, first, last;
};

// Elementwise operations of transformer blocks (elementwise.h); every dtype in them is F32 or BF16 ---------------------

// Rows of d values: row r lies at token r / heads, head r % heads, which is at + token * stride + head * d.
struct Strided {
    void* at;  // null: not there
    int64_t stride;
};

// y = x rstd gain, rstd = 1 / sqrt(mean(x^2) + eps). gain [d] may be null: ones.
struct RmsNorm {
    Strided x, y;
    const float* gain;
    float* rstd;  // [n]
    int64_t n, heads, d;
    float eps;
    int32_t dtype;
};

// dx = rstd (g gain - x_hat mean(g gain x_hat)) + add, x_hat = x rstd; add may be null.
// partial [ceil(n / chunk), d], or null: the sums of g x_hat over each `chunk` rows.
struct RmsNormBackward {
    Strided g, x, add, dx;
    const float* gain;
    const float* rstd;
    float* partial;
    int64_t n, heads, d, chunk;
    int32_t dtype;
};

// The first r of d features of each head turn, in halves; back: the transposed map.
struct Rotate {
    Strided x;
    const float* cos;  // [n, r]
    const float* sin;
    int64_t n, heads, d, r;
    int32_t dtype, back;
};

enum Act : int32_t { SILU = 0, GELU_TANH = 1, GELU = 2 };

// h = act(gate) up; with dh: gate and up become their gradients, and h may be dh's own memory.
struct Gated {
    Strided gate, up, h, dh;
    int64_t n, f;
    int32_t dtype, act;
};

// losses [n] = logsumexp(logits_i) - logits_i[target_i]; out = scale (softmax - onehot), which may be the logits'
// own memory, or null.
struct CrossEntropy {
    const void* logits;  // [n, v]
    void* out;
    const int64_t* targets;
    float* losses;
    int64_t n, v;
    float scale;
    int32_t dtype;
};

struct Elementwise {
    void (*rms_norm)(const RmsNorm&, int64_t first, int64_t last);                   // rows
    void (*rms_norm_backward)(const RmsNormBackward&, int64_t first, int64_t last);  // chunks of rows
    void (*rotate)(const Rotate&, int64_t first, int64_t last);                      // tokens
    void (*gated)(const Gated&, int64_t first, int64_t last);                        // rows
    void (*gated_backward)(const Gated&, int64_t first, int64_t last);               // rows
    void (*cross_entropy)(const CrossEntropy&, int64_t first, int64_t last);         // rows
};

// ----------------------------------------------------------------------------------------------------------------------

// Products with a side as thin as an adapter's rank (thin.h), in bf16. Rows are `stride` values apart.
struct Thin {
    const uint16_t* g;       // [n, cols]
    const uint16_t* u;       // [n, rank]
    uint16_t* h;             // [n, rank], or null
    uint16_t* y;             // [n, cols]: thin_add's
    const uint16_t* factor;  // [cols, rank]: value (o, k) is factor[o * factor_row + k * factor_col]
    float* sums;             // [ceil(n / chunk), rank, cols], or null
    int64_t g_stride, u_stride, h_stride, y_stride, factor_row, factor_col, n, cols, rank, chunk;
    float scale;
};

struct ThinKernels {
    int64_t (*scratch)(const Thin&);                                             // bytes that `prepare` fills
    void (*prepare)(const Thin&, void* scratch);
    void (*back)(const Thin&, const void* scratch, int64_t first, int64_t last);  // chunks of rows
    void (*add)(const Thin&, const void* scratch, int64_t first, int64_t last);   // rows
};

// Work on items [first, last); items do not depend on each other, so results do not depend on the threads.
struct Path {
    const char* name;
    void (*quantise)(const Quantise&, int64_t first, int64_t last);            // blocks
    void (*quantise_dynamic)(const Dynamic&, int64_t first, int64_t last);     // blocks
    void (*dequantise_dynamic)(const Dynamic&, int64_t first, int64_t last);   // blocks
    void (*dequantise)(const Dequantise&, int64_t first, int64_t last);        // rows, counted from row0
    int64_t (*product_scratch)(const Product&);                                // bytes that `product_prepare` fills
    void (*product_prepare)(const Product&, void* scratch);
    void (*product)(const Product&, const void* scratch, int64_t first, int64_t last);  // rows of W
    float (*read_sum)(const uint8_t* bytes, int64_t first, int64_t last);      // 64-byte lines: bandwidth
    int64_t (*attention_scratch)(const Attention&, int64_t longest, bool backward);  // bytes a thread needs
    void (*attend)(const Attention&, const Heads&, void* scratch);
    // dk and dv are written, or with `sums` [2, padded, wide] left there for `attention_gather`: one head, then
    void (*attend_backward)(const Attention&, const Heads&, float* sums, void* scratch);
    void (*attention_gather)(const Attention&, int64_t doc, int64_t shared, float* sums);
    const Elementwise* elementwise;
    const ThinKernels* thin;  // null where there are no products of bf16 pairs
};

// Null where this compiler or this architecture cannot make it.
const Path* path_scalar();
const Path* path_avx2();
const Path* path_avx512();
const Path* path_avx512_bf16();
