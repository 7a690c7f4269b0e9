#include "qaflora-divergence.h"

#include <cmath>

double qaflora_divergence_sums::divergence(int64_t ia) const {
    const double first = adapters[ia].first/s;
    const double rest  = adapters[ia].rest/s;
    const double sum = first + rest;
    double res;
    if (adapters[ia].scaled != 0.0) {
        res = adapters[ia].scaled_max + std::log(adapters[ia].scaled/s) - first;
    } else if (sum > 1.0) {
        res = std::log1p(sum) - first; // rest has no digits left for what follows
    } else {
        // log1p(sum) - first: by its series where the two would cancel
        res = rest + (std::fabs(sum) < 1e-3 ? sum*sum*(-1.0/2 + sum*(1.0/3 + sum*(-1.0/4 + sum*(1.0/5 - sum/6)))) : std::log1p(sum) - sum);
    }
    return res < 0.0 ? 0.0 : res;
}
