// The largest value of each row and where it first stands, in one pass that does not write; after elementwise.h.
#pragma once
#include "elementwise.h"

namespace {

// NaN where the row has one
void likeliest(const Likeliest& t, int64_t first, int64_t last) {
    constexpr int64_t BLOCK = 256;  // of which only the largest is known at first
    for (int64_t r = first; r < last; ++r) {
        const float* x = t.x + r * t.v;
        float best = -INFINITE;
        int64_t from = 0;
        F odd = V::set1(0);  // NaN from the first value on that is NaN or infinite
        for (int64_t b = 0; b < t.v; b += BLOCK) {
            const int64_t n = least(BLOCK, t.v - b);
            const float found = V::largest(folded(
                n, -INFINITE,
                [&](int64_t k, auto at, F most) {
                    const F v = get<Float32>(x + b, k, at, x[b]);
                    odd = V::fma(v, V::set1(0), odd);
                    return V::max(v, most);
                },
                [](F a, F b) { return V::max(a, b); }));
            if (found > best) best = found, from = b;
        }
        if (V::sum(odd) != 0)
            for (int64_t k = 0; k < t.v; ++k)
                if (x[k] != x[k]) {
                    best = x[k], from = k;
                    break;
                }
        t.best[r] = best;
        while (best == best && x[from] != best) ++from;
        t.at[r] = from;
    }
}

}  // namespace
