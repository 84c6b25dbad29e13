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

// y [n, rows] = x [n, cols] W^T + bias, x and bias of `dtype`, y of `out_dtype`; rows lie x_stride and y_stride apart.
// bias may be null.
struct Product {
    Matrix m;
    const void* x;
    const void* bias;
    void* y;
    int64_t n, x_stride, y_stride;
    int32_t dtype, out_dtype;
};

// A product with a frozen matrix M [depth, columns] (wide.h). x in bf16, its rows x_stride apart; the depth is even.
struct Term {
    const uint16_t* x;     // [n, depth]
    const uint16_t* w;     // rows w_stride apart: M's, or where `turned` M^T's; null: packed
    const Matrix* packed;  // M, or where `turned` M^T
    int64_t x_stride, w_stride, depth;
    float scale;  // of the first of several, if that has at most LEAD terms to a sum; else it counts as 1
    int32_t turned;
};

// Columns of a result in bf16: y = onto + bias + the sum of its terms. onto and bias may be null.
struct Band {
    const Term* terms;
    const float* bias;
    const uint16_t* onto;
    uint16_t* y;
    int64_t n_terms, cols, onto_stride, y_stride;
};

struct Wide {
    const Band* bands;
    int64_t n_bands, n;
};

struct WideKernels {
    int64_t (*scratch)(int64_t rows);  // bytes that a thread needs for so many rows at a time
    void (*group)(const Band&, int64_t column, int64_t columns, int64_t row0, int64_t row1, void* scratch);
    int64_t span, most;  // columns of a panel, and panels of a group at most
};

// [tokens, heads, dim] of `dtype`: values from token to token and from head to head; features lie side by side.
struct Rows {
    void* at;
    int64_t token, head;
};

// Causal attention within each document [bounds[d], bounds[d + 1]); see attention.h. Query head h reads key-value head
// h / (heads / shared). A token sees itself and the window - 1 before it. g is dO; dq, dk, dv and g are the backward's.
// Document d goes on where document fronts[d] ends, and sees that too; -1: it begins by itself. A front has none.
struct Attention {
    Rows q, k, v, o, g, dq, dk, dv;
    float* lse;             // [heads, tokens]
    const int64_t* bounds;  // [docs + 1]
    const int64_t* fronts;  // [docs], or null: every document begins by itself
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
    Strided logits, out;
    const int64_t* targets;
    float* losses;
    int64_t n, v;
    float scale;
    int32_t dtype;
};

struct Likeliest {  // the largest value of each row and where it first stands
    const float* x;  // [n, v]
    float* best;
    int64_t* at;
    int64_t n, v;
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
    const uint16_t* factor;  // [cols, rank]: value (o, k) is factor[o * factor_row + k * factor_col]
    float* sums;             // [ceil(n / chunk), rank, cols], or null
    int64_t g_stride, u_stride, h_stride, factor_row, factor_col, n, cols, rank, chunk;
    float scale;
};

struct ThinKernels {
    int64_t (*scratch)(const Thin&);                                             // bytes that `prepare` fills
    void (*prepare)(const Thin&, void* scratch);
    void (*back)(const Thin&, const void* scratch, int64_t first, int64_t last);  // chunks of rows
};

// Serving: one step of a Llama-like network (step.h), its products of few rows (rows.h), attention over pages (pages.h).
// What lies between two products is float32; what a product reads is rounded to `dtype` once.

// y [n, rows] = x [n, cols] W^T. Rows of x have zeros up to a multiple of 32 and lie x_stride apart; there is memory for
// a multiple of 4 of them. `type` is x's: BF16 only where the path multiplies pairs.
struct Dense {
    const void* w;  // [rows, cols] of `dtype`
    const void* x;
    float* y;
    const struct Added* added;  // what adapters add, segment by segment in order
    int64_t rows, cols, n, x_stride, y_stride, n_added;
    int32_t dtype, type;
};

// u = A x of rows of a segment: float32, or bf16 where the path multiplies pairs. Memory for a multiple of 16 ranks
struct Low {
    const void *a, *x;
    void* u;
    int64_t rank, cols, n, x_stride, u_stride;
    int32_t dtype, type;
};

struct Added {  // y += B u for rows [first, last)
    const void *b, *u;  // as Change and Low have them; u from row `first` on
    int64_t first, last, rank, u_stride;
    int32_t dtype;
};

// Keys and values in pages of 16 tokens, [page, 16, shared, dim] of `dtype`. Sequence s has rows [bounds[s],
// bounds[s + 1]) of q, which sit behind contexts[s] tokens and see those, the rows before them and themselves, but no
// more than `window` tokens. Its position p stands in page tables[s * width + p / 16].
struct Paged {
    const void* q;  // [n, heads, dim] of `type`, rows q_stride apart
    void* o;        // [n, heads, dim] of `out_type`, rows o_stride apart
    const void *keys, *values;
    const int64_t *bounds, *contexts;
    const int32_t* tables;
    int64_t sequences, width, heads, shared, dim, window, o_stride, q_stride;
    float scale;
    int32_t dtype, type, out_type;
};

// Rows [row, row + rows) of a sequence, all heads, against keys [first, last)
struct PagedPart {
    int64_t sequence, row, rows, first, last;
    float* sums;  // [rows, heads, 16 + dim]: sum, maximum and, from 16 on, weighted values; null: o is written
};

struct Linear {  // one of the two
    const void* dense;
    const Matrix* packed;
    const float* bias;  // [rows] or null
    int64_t rows, cols;
};

// What an adapter makes of a map: y = out_gain (W (in_gain x) + B u) + bias, u its part of A x
struct Change {
    // scale B^T in panels of the step's dtype, [ceil(rows / 16), rank, 16], where bf16 is multiplied in pairs
    // [ceil(rows / 16), ceil(rank / 2), 16, 2]; zeros where it ends
    const void* b;
    const float *out_gain, *in_gain, *bias;  // null: ones, ones, the base's
    int64_t rank;
};

struct Changes {  // of the maps that read one input
    // All their A, [rank, cols]. Where bf16 is multiplied in pairs, in panels of 16 ranks [cols / 2, 16, 2], the last of
    // as many ranks as are left, or the next power of two (w): [cols / 2 / (16 / w), w, 16 / w, 2]. Zeros where they end,
    // and up to a multiple of 32 columns
    const void* a;
    int64_t rank;
    Change of[3];
};

enum NetAct : int32_t { NET_RELU = 0, NET_GELU = 1, NET_SILU = 2, NET_TANH = 3 };

struct Net {  // y += scale (up act(down u + down_bias) + up_bias), u = y or the half's input; down null: none
    const void *down, *up;  // [m, d], [d, m] of the step's dtype
    const float *down_bias, *up_bias;
    int64_t m;
    float scale;
    int32_t act, parallel;
};

struct Worn {  // an adapter at a layer: inputs of attention, its output, inputs of the feed-forward, its output
    Changes groups[4];
    Net nets[2];
};

struct Segment {
    const Worn* worn;  // [layers], or null
    const Changes* head;
    int64_t first, last;
};

struct Layer {
    Linear inputs[3], output, gates[2], down;
    const float *norm, *gate_norm, *q_norm, *k_norm;  // gains [d], [d], [dim] or null, [dim] or null
    void *keys, *values;
    int64_t n_inputs, n_gates, window;
    float eps, gate_eps, head_eps;
    int32_t unused;
};

struct Step {
    const Layer* layers;
    const Segment *segments, *head_segments;
    const int64_t *bounds, *contexts, *slots, *wanted;
    const int32_t* tables;
    const float *cos, *sin;  // [n, turned]
    float* hidden;           // [n, d]: the rows' embeddings; overwritten
    float* logits;           // [n_wanted, head.rows]
    void* room;
    Linear head;
    const float* norm;
    int64_t n_layers, n_segments, n_head_segments, n, n_wanted, sequences, width, d, f, heads, shared, dim, turned;
    float eps, scale;
    int32_t dtype, act;
};

// Between two products: rows and columns of what the last one gave to what the next one reads
struct Normed {
    const float* x;  // [n, d]
    void* y;         // of `type`, rows `stride` apart
    const float* gain;
    const int64_t* rows;  // which rows of x; null: all
    int64_t d, stride;
    float eps;
    int32_t type;
};

struct Finish {  // gains and biases of columns of a map's output, for the rows of a segment
    float* y;
    const Change* change;  // or null
    const float* bias;     // the base's, or null
    int64_t n, y_stride;
};

struct Serving {
    bool pairs;  // whether products of bf16 take rows in bf16: else in float32
    void (*dense)(const Dense&, int64_t first, int64_t last);     // panels of PANEL rows of W
    void (*norm)(const Normed&, int64_t first, int64_t last);     // rows
    void (*gains)(const void* x, void* y, const float* gain, int64_t n, int64_t cols, int64_t stride, int32_t type);
    void (*low)(const Low&);
    // panels of PANEL of a map's `outs` columns; fresh: y = B u
    void (*thin)(const Added&, float* y, int64_t y_stride, int64_t outs, int64_t first, int64_t last, bool fresh);
    void (*finish)(const Finish&, int64_t first, int64_t last);   // columns
    void (*head_norm)(float* x, int64_t n, int64_t stride, int64_t d, const float* gain, float eps);
    void (*turn)(float* x, int64_t n, int64_t stride, const float* cos, const float* sin, int64_t turned);
    void (*gate)(const float* gate, const float* up, int64_t n, int64_t stride, int64_t cols, int32_t act, void* y,
                 int64_t y_stride, int32_t type);
    void (*add)(float* x, const float* y, int64_t n, int64_t x_stride, int64_t y_stride, int64_t cols, float by);
    void (*net_act)(float* x, int64_t n, int64_t stride, int64_t cols, const float* bias, int32_t act);
    void (*narrow)(const float* x, void* y, int64_t n, int64_t x_stride, int64_t y_stride, int64_t cols, int32_t type);
    void (*likeliest)(const Likeliest&, int64_t first, int64_t last);  // rows
    int64_t (*paged_scratch)(const Paged&, int64_t rows);
    void (*paged)(const Paged&, const PagedPart&, void* scratch);
    void (*paged_join)(const Paged&, const PagedPart&, int64_t parts, float* sums);
    void (*paged_put)(const void* x, int64_t x_stride, int32_t type, void* pages, int64_t page_stride,
                      const int64_t* slots, int64_t n, int64_t width, int32_t dtype);
};

constexpr int64_t PANEL = 16;

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
    // dk and dv are written, or with `sums` [2, padded, wide] left there for `attention_gather`. Of a document that has
    // a front, its own are written, and the front's are added to `sums`
    void (*attend_backward)(const Attention&, const Heads&, float* sums, void* scratch);
    void (*attention_gather)(const Attention&, int64_t doc, int64_t shared, float* sums, int64_t n);  // n such sums
    const Elementwise* elementwise;
    const ThinKernels* thin;  // null where there are no products of bf16 pairs
    const WideKernels* wide;  // the same
    const Serving* serving;
};

// Null where this compiler or this architecture cannot make it.
const Path* path_scalar();
const Path* path_avx2();
const Path* path_avx512();
const Path* path_avx512_bf16();
const Path* path_amx();  // called once the one before is known to be there
