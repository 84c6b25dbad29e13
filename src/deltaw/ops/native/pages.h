// Causal attention of a sequence's new rows over pages of keys and values, after rows.h.
//
// All heads of a few rows are taken together: a page is one stretch of memory, which the processor fetches ahead. Scores
// exist for ROUND keys at a time, with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
// arXiv:2205.14135) in float32. A long context is cut into parts of fixed size, joined in order, so results depend on
// neither the threads nor the other sequences. Where many queries meet a page its keys are turned first (prompts.h).
#pragma once
#include "likeliest.h"
#include "prompts.h"

namespace {

constexpr int64_t PAGE = 16;
constexpr int64_t ROUND = 8 * PAGE;

inline int64_t padded_dim(int64_t dim) { return up(dim, 32); }

// What a part needs of memory: its queries as the products read them, and scores, sums, maxima, weighted values
template <class Dot>
struct Attending {
    typename Dot::X* q;        // [rows * group, padded]
    typename Dot::S* page;     // [PAGE, padded]: keys whose width is no multiple of K
    float *scores, *sums;      // [rows * group, ROUND], [rows * group, wide + 2]
    uint32_t* turned;          // [ROUND / PAGE, padded / 2, PAGE] pairs of keys
    int64_t padded, wide;
    Attending(Room& room, int64_t queries, int64_t dim) : padded(padded_dim(dim)), wide(up(dim, 16)) {
        q = room.take<typename Dot::X>(queries * padded);
        page = room.take<typename Dot::S>(PAGE * padded);
        scores = room.take<float>(queries * ROUND);
        sums = room.take<float>(queries * (wide + 16));
        turned = room.take<uint32_t>(ROUND * padded / 2);
    }
    int64_t stride() const { return wide + 16; }  // of sums: 0 the sum, 1 the maximum, 16 on the values
};

inline void read_row(int32_t type, const void* p, int64_t i, int64_t n, float* out) {
    type == F32 ? read_floats<Float32>(p, i, n, out) : read_floats<BFloat16>(p, i, n, out);
}

// Scores of one page's keys [16] for one query
template <class Dot>
INLINE void page_scores(const typename Dot::X* q, const typename Dot::S* keys, int64_t stride, int64_t depth, float* out) {
    for (int half = 0; half < PAGE; half += W) {
        F sum[W];
        for (int t = 0; t < W; ++t) sum[t] = V::set1(0);
        for (int64_t d = 0; d < depth; d += Dot::K) {
            const auto x = Dot::load_x(q + d);
            for (int t = 0; t < W; ++t) sum[t] = Dot::dot(Dot::load(keys + (half + t) * stride + d), x, sum[t]);
        }
        V::store(out + half, V::sums(sum));
    }
}

// values[N] += sum over keys of p V, for features [d, d + C W) of N queries; key t lies in pages[t / PAGE]
template <class D, int N, int C>
INLINE void weigh(const float* p, const typename D::T* const* pages, int64_t stride, int64_t keys, int64_t d, float* out,
                  int64_t out_stride) {
    F sum[N][C];
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < C; ++c) sum[i][c] = V::load(out + i * out_stride + d + c * W);
    for (int64_t first = 0; first < keys; first += PAGE, ++pages)
        for (int64_t t = first; t < least(first + PAGE, keys); ++t) {
            F v[C];
            for (int c = 0; c < C; ++c) v[c] = D::load(*pages + (t - first) * stride, d + c * W);
            for (int i = 0; i < N; ++i) {
                const F by = V::set1(p[i * ROUND + t]);
                for (int c = 0; c < C; ++c) sum[i][c] = V::fma(by, v[c], sum[i][c]);
            }
        }
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < C; ++c) V::store(out + i * out_stride + d + c * W, sum[i][c]);
}

template <class D, int N>
INLINE void weigh_all(const float* p, const typename D::T* const* pages, int64_t stride, int64_t keys, int64_t dim,
                      float* out, int64_t out_stride) {
    constexpr int C = W == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + C * W <= dim; d += C * W) weigh<D, N, C>(p, pages, stride, keys, d, out, out_stride);
    for (; d + W <= dim; d += W) weigh<D, N, 1>(p, pages, stride, keys, d, out, out_stride);
    for (; d < dim; ++d)
        for (int i = 0; i < N; ++i) {
            float sum = out[i * out_stride + d];
            for (int64_t t = 0; t < keys; ++t) {
                float v[W];
                read_floats<D>(pages[t / PAGE], t % PAGE * stride + d, 1, v);
                sum += p[i * ROUND + t] * v[0];
            }
            out[i * out_stride + d] = sum;
        }
}

// One query's scores of keys [j, j + n) become weights: hidden outside of [seen, until), then exp against the maximum
INLINE void soften(const Paged& t, float* s, int64_t j, int64_t n, int64_t seen, int64_t until, float* sums, int64_t wide) {
    for (int64_t c = 0; c < seen - j && c < n; ++c) s[c] = -INFINITY;
    const int64_t end = up(n, W);
    for (int64_t c = most(0, until - j); c < end; ++c) s[c] = -INFINITY;
    F top = V::set1(LEAST);
    for (int64_t c = 0; c < end; c += W) top = V::max(V::load(s + c), top);
    const float scale = t.scale * LOG2E, found = V::largest(top), largest = found > LEAST ? found * scale : LEAST;
    const float before = sums[1], now = largest > before ? largest : before;
    if (now > before) {
        const float by = exp2_of(before - now);
        sums[0] *= by, sums[1] = now;
        for (int64_t d = 0; d < wide; d += W) V::store(sums + 16 + d, V::mul(V::load(sums + 16 + d), V::set1(by)));
    }
    const F by = V::set1(scale), less = V::set1(-now);
    F sum = V::set1(0);
    for (int64_t c = 0; c < end; c += W) {
        const F p = exp2_of(V::fma(V::load(s + c), by, less));
        V::store(s + c, p);
        sum = V::add(sum, p);
    }
    sums[0] += V::sum(sum);
}

template <class D>
INLINE void weigh_queries(const float* p, const typename D::T* const* pages, int64_t stride, int64_t keys, int64_t dim,
                          int64_t queries, float* out, int64_t out_stride) {
    int64_t i = 0;
    const auto some = [&](auto count) {
        constexpr int N = decltype(count)::N;
        weigh_all<D, N>(p + i * ROUND, pages, stride, keys, dim, out + i * out_stride, out_stride), i += N;
    };
    while (i + 6 <= queries) some(Count<6>{});
    if (i + 4 <= queries) some(Count<4>{});
    if (i + 3 <= queries) some(Count<3>{});
    while (i < queries) some(Count<1>{});
}

constexpr int64_t TURNED_FOR = 12;  // queries that read the same keys, from which turning these pays

// A page's keys [PAGE, depth] become [depth / 2, PAGE, 2]
template <class Dot>
INLINE void turn_keys(const typename Dot::S* keys, int64_t stride, int64_t depth, uint32_t* out) {
#ifdef DELTAW_BF16_DOT
    for (int64_t d = 0; d < depth; d += Dot::K)
        V::turn16((const uint32_t*)(keys + d), stride / 2, PAGE, out + d / 2 * PAGE, PAGE);
#endif
}

// Scores of n keys, turned page by page, for queries q: [queries, ROUND]
template <class Dot>
INLINE void turned_scores(const uint32_t* turned, const typename Dot::X* q, int64_t padded, int64_t depth, int64_t n,
                          int64_t queries, float* out) {
#ifdef DELTAW_BF16_DOT
    if constexpr (Dot::K > W) {
        const int64_t apart = padded / 2 * PAGE, whole[2] = {PAGE, PAGE};
        int64_t i = 0;
        const auto some = [&](auto count) {
            constexpr int N = decltype(count)::N;
            for (; i + N <= queries; i += N)
                for (int64_t c = 0; c < n; c += 2 * PAGE) {
                    const auto by = c + PAGE < n ? many_rows<2, N> : many_rows<1, N>;
                    by({turned + c / PAGE * apart, q + i * padded, apart, padded, depth / 2}, nullptr, false, whole,
                       out + i * ROUND + c, ROUND);
                }
        };
        some(Count<12>{}), some(Count<8>{}), some(Count<4>{}), some(Count<1>{});
    }
#endif
}

// Weighted values divided by the sum of weights, into o from value `at` on
INLINE void write_weighted(const Paged& t, float* sums, int64_t at) {
    const F by = V::set1(1 / sums[0]);
    for (int64_t d = 0; d < up(t.dim, 16); d += W) V::store(sums + 16 + d, V::mul(V::load(sums + 16 + d), by));
    narrow_row(sums + 16, t.o, at, t.dim, t.dim, t.out_type);
}

template <class Dot, class D>
void paged_as(const Paged& t, const PagedPart& part, void* scratch) {
    using S = typename Dot::S;
    const int64_t group = t.heads / t.shared, queries = part.rows * t.heads, token = t.shared * t.dim;
    const int64_t of_head = part.rows * group;  // queries that share a key-value head
    const int64_t start = t.bounds[part.sequence], context = t.contexts[part.sequence];
    const int32_t* table = t.tables + part.sequence * t.width;
    Room room = {(char*)scratch};
    Attending<Dot> a(room, queries, t.dim);
    float row[WIDEST + W];
    // query i: head of keys i / of_head, then row, then head of the group
    const auto row_of_query = [&](int64_t i) { return part.row + i % of_head / group; };
    const auto head_of_query = [&](int64_t i) { return i / of_head * group + i % group; };
    for (int64_t i = 0; i < queries; ++i) {
        read_row(t.type, t.q, (start + row_of_query(i)) * t.q_stride + head_of_query(i) * t.dim, t.dim, row);
        narrow_row(row, a.q, i * a.padded, t.dim, a.padded, sizeof(typename Dot::X) == 4 ? F32 : BF16);
        float* sums = a.sums + i * a.stride();
        memset(sums, 0, a.stride() * sizeof(float));
        sums[1] = LEAST;
    }
    const bool copied = t.dim % Dot::K != 0, turns = Dot::K > W && of_head >= TURNED_FOR;
    const int64_t depth = copied ? a.padded : t.dim;
    for (int64_t j = part.first / PAGE * PAGE; j < part.last; j += ROUND) {
        const int64_t n = least(ROUND, part.last - j);
        // each(g, c): heads of a page after each other where memory counts, pages of a head where arithmetic does
        const auto of_pages = [&](auto each) {
            for (int64_t one = 0; one < (turns ? t.shared : n); one += turns ? 1 : PAGE)
                for (int64_t two = 0; two < (turns ? n : t.shared); two += turns ? PAGE : 1)
                    turns ? each(one, two) : each(two, one);
        };
        const auto place = [&](int64_t g, int64_t c) { return table[(j + c) / PAGE] * PAGE * token + g * t.dim; };
        of_pages([&](int64_t g, int64_t c) {
            const S* keys = (const S*)t.keys + place(g, c);
            if (copied) {
                memset(a.page, 0, PAGE * a.padded * sizeof(S));
                for (int64_t k = 0; k < PAGE; ++k) memcpy(a.page + k * a.padded, keys + k * token, t.dim * sizeof(S));
                keys = a.page;
            }
            const auto* q = a.q + g * of_head * a.padded;
            float* scores = a.scores + g * of_head * ROUND;
            if (turns) {
                turn_keys<Dot>(keys, copied ? a.padded : token, depth, a.turned + c * a.padded / 2);
                if (c + PAGE >= n) turned_scores<Dot>(a.turned, q, a.padded, depth, n, of_head, scores);
            } else {
                for (int64_t i = 0; i < of_head; ++i)
                    page_scores<Dot>(q + i * a.padded, keys, copied ? a.padded : token, depth, scores + i * ROUND + c);
            }
        });
        for (int64_t i = 0; i < queries; ++i) {
            const int64_t at = context + row_of_query(i);  // its own position
            soften(t, a.scores + i * ROUND, j, n, most(part.first, at - t.window + 1), least(part.last, at + 1),
                   a.sums + i * a.stride(), a.wide);
        }
        const typename D::T* values[ROUND / PAGE];
        of_pages([&](int64_t g, int64_t c) {
            const int64_t first = turns ? 0 : c;  // of the keys that are weighed at once, when their last page has come
            values[(c - first) / PAGE] = (const typename D::T*)t.values + place(g, c);
            if (turns && c + PAGE < n) return;
            weigh_queries<D>(a.scores + g * of_head * ROUND + first, values, token, least(c + PAGE, n) - first, t.dim,
                             of_head, a.sums + g * of_head * a.stride() + 16, a.stride());
        });
    }
    for (int64_t i = 0; i < queries; ++i) {
        float* sums = a.sums + i * a.stride();
        if (part.sums) {
            memcpy(part.sums + i * a.stride(), sums, a.stride() * sizeof(float));
            continue;
        }
        const int64_t out = (start + row_of_query(i)) * t.o_stride + head_of_query(i) * t.dim;
        write_weighted(t, sums, out);
    }
}

int64_t paged_scratch(const Paged& t, int64_t rows) {
    Room room = {nullptr};
    Attending<PlainDot>(room, rows * t.heads, t.dim);
    return int64_t(room.at - (char*)nullptr);
}

void paged(const Paged& t, const PagedPart& part, void* scratch) {
    if (t.dtype == F32) return paged_as<PlainDot, Float32>(t, part, scratch);
    paged_as<HalfDot, BFloat16>(t, part, scratch);
}

// `parts` parts of the same rows, one after the other in sums, become o
void paged_join(const Paged& t, const PagedPart& part, int64_t parts, float* sums) {
    const int64_t group = t.heads / t.shared, of_head = part.rows * group, queries = part.rows * t.heads;
    const int64_t wide = up(t.dim, 16), stride = wide + 16, apart = queries * stride;
    for (int64_t i = 0; i < queries; ++i) {
        float* whole = sums + i * stride;
        float top = LEAST;
        for (int64_t p = 0; p < parts; ++p) top = whole[p * apart + 1] > top ? whole[p * apart + 1] : top;
        for (int64_t p = 0; p < parts; ++p) {
            const float* one = whole + p * apart;
            const float by = exp2_of(one[1] - top);
            whole[0] = p ? whole[0] + one[0] * by : one[0] * by;
            for (int64_t d = 0; d < wide; d += W) {
                const F scaled = V::mul(V::load(one + 16 + d), V::set1(by));
                V::store(whole + 16 + d, p ? V::add(V::load(whole + 16 + d), scaled) : scaled);
            }
        }
        const int64_t row = t.bounds[part.sequence] + part.row + i % of_head / group;
        write_weighted(t, whole, row * t.o_stride + (i / of_head * group + i % group) * t.dim);
    }
}

// n rows of `width` values, x_stride apart, into places of pages
void paged_put(const void* x, int64_t x_stride, int32_t type, void* pages, int64_t page_stride, const int64_t* slots,
               int64_t n, int64_t width, int32_t dtype) {
    float row[WIDEST + W];
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += WIDEST) {
            const int64_t part = least(WIDEST, width - d);
            read_row(type, x, i * x_stride + d, part, row);
            write_floats(dtype, pages, slots[i] * page_stride + d, part, row);
        }
}

extern const Serving SERVING = {
    HalfDot::K != W, dense, norm_rows, gains, low, thin, finish, head_norm, turn_rows, gate_rows, add_rows, net_act, narrow,
    likeliest, paged_scratch, paged, paged_join, paged_put,
};

}  // namespace
