// How far two distributions over a vocabulary are apart.

#pragma once

#include <cstdint>

// KL(p || q_j), p = softmax(z), q_j = softmax(z + d_j), from sums over a vocabulary that is seen slice by slice.
// With u = d - c for any c: KL = log1p(sum p u + sum p (expm1(u) - u)) - sum p u. c is d where p is largest so far: most of p
// then adds nothing, and u keeps its digits even where p is almost all on one token. Where u is so large that exp(u) would
// overflow, sum p exp(u) is kept by its logarithm: KL = log(sum p exp(u)) - sum p u.
struct qaflora_divergence_sums {
    double z_max = 0.0; // largest z so far
    double s     = 0.0; // sum of exp(z - z_max); 0: nothing was seen
    struct adapter {
        double unit  = 1.0; // of the d that accumulate() is given
        double c     = 0.0;
        double first = 0.0; // sum of exp(z - z_max) u
        double rest  = 0.0; // sum of exp(z - z_max) (expm1(u) - u)
        double scaled = 0.0; // in place of rest, if not 0: sum of exp(z - z_max + u - scaled_max)
        double scaled_max = 0.0;
    } * adapters = nullptr; // [n_adapter]

    double divergence(int64_t ia) const; // NaN where a state was not finite
};
