// The sums of a divergence over a slice of a vocabulary.
// float64 throughout: under lens raw, probabilities go down to 1e-200 and still decide a layer

#pragma once

#include "qaflora-cpu.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace QAFLORA_ISA {

enum { N_LANE = 16 }; // independent sums, so that the compiler can use vectors

// 2^n in a double's bits, |n| <= 1022
static inline double power_of_2(uint64_t n) {
    const uint64_t bits = (n + 1023) << 52;
    double res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

struct exp_parts {
    double n_2; // 2^n
    double r;   // |r| <= ln2/2
    double q;   // exp(r) = 1 + r + q r^2
};

// exp(x) = 2^n exp(r) to a few units in the last place; below 1e-307 it is 1e-307
static inline exp_parts exp_of(double x) {
    const double magic = 6755399441055744.0; // 1.5*2^52: adding it rounds, and leaves n in the low bits
    const double t = x*1.4426950408889634 + magic;
    const double n = t - magic;
    uint64_t bits;
    memcpy(&bits, &t, sizeof(bits));
    exp_parts e;
    e.r = (x - n*6.93147180369123816490e-01) - n*1.90821492927058770002e-10;
    e.n_2 = power_of_2(bits);
    double q = 1.0/6227020800.0;
    q = q*e.r + 1.0/479001600.0;
    q = q*e.r + 1.0/39916800.0;
    q = q*e.r + 1.0/3628800.0;
    q = q*e.r + 1.0/362880.0;
    q = q*e.r + 1.0/40320.0;
    q = q*e.r + 1.0/5040.0;
    q = q*e.r + 1.0/720.0;
    q = q*e.r + 1.0/120.0;
    q = q*e.r + 1.0/24.0;
    q = q*e.r + 1.0/6.0;
    e.q = q*e.r + 0.5;
    return e;
}

static inline double within(double x, double limit) {
    x = x < -limit ? -limit : x;
    return x > limit ? limit : x;
}

static inline double exp_double(double x) {
    const exp_parts e = exp_of(within(x, 708.0));
    return e.n_2*(1.0 + e.r + e.q*e.r*e.r);
}

// exp(x) - 1 - x without cancellation for small x: 2^n = 1 there, and x = r
static inline double expm1_minus(double x) {
    const exp_parts e = exp_of(within(x, 708.0));
    return (e.n_2 - 1.0) + (e.n_2*e.r - x) + e.n_2*(e.q*e.r*e.r);
}

static inline double lanes_sum(const double * lane) {
    double sum = 0.0;
    for (int j = 0; j < N_LANE; ++j) {
        sum += lane[j];
    }
    return sum;
}

// beyond it, exp(u) is kept by its logarithm
static const double U_MAX = 300.0;

// s: as it was when rest and first were
static void go_scaled(qaflora_divergence_sums::adapter & a, double s) {
    if (a.scaled == 0.0) {
        a.scaled     = a.rest + a.first + s; // 0 where nothing was seen
        a.scaled_max = 0.0;
        a.rest    = 0.0;
    }
}

// one more slice of it, scaled
static void add_scaled(const qaflora_divergence_sums & sums, qaflora_divergence_sums::adapter & a, const float * z, const float * d, int64_t n) {
    double max = -INFINITY;
    for (int64_t v = 0; v < n; ++v) {
        const double e = (z[v] - sums.z_max) + (a.unit*d[v] - a.c);
        max = e > max ? e : max;
    }
    if (a.scaled == 0.0 || max > a.scaled_max) {
        a.scaled    *= exp_double(a.scaled_max - max);
        a.scaled_max = max;
    }
    for (int64_t v = 0; v < n; ++v) {
        a.scaled += exp_double((z[v] - sums.z_max) + (a.unit*d[v] - a.c) - a.scaled_max);
    }
}

// sums so far, with p and c taken from a token that is likelier than all before
static void move_reference(qaflora_divergence_sums & sums, int64_t n_adapter, double z_max, const float * d, int64_t stride) {
    const double scale = sums.s > 0.0 ? exp(sums.z_max - z_max) : 0.0;
    const double moved = sums.s > 0.0 ? sums.z_max - z_max : 0.0;
    const double s_before = sums.s;
    sums.z_max = z_max;
    sums.s *= scale;
    for (int64_t ia = 0; ia < n_adapter; ++ia) {
        qaflora_divergence_sums::adapter & a = sums.adapters[ia];
        const double c     = a.unit*d[ia*stride];
        const double delta = a.c - c; // u grows by it
        if (delta > U_MAX) {
            go_scaled(a, s_before);
        }
        a.scaled_max += delta + moved;
        const double first = a.first*scale;
        const double rest  = a.rest*scale;
        a.c     = c;
        a.first = first + delta*sums.s;
        a.rest  = sums.s > 0.0 && a.scaled == 0.0 ? exp(delta)*rest + expm1(delta)*first + expm1_minus(delta)*sums.s : 0.0;
    }
}

static void accumulate(qaflora_divergence_sums & sums, int64_t n_adapter, const float * z, const float * d, int64_t stride, int64_t n, double * p) {
    float lane_max[N_LANE];
    for (int j = 0; j < N_LANE; ++j) {
        lane_max[j] = z[0];
    }
    int64_t v = 0;
    for (; v + N_LANE <= n; v += N_LANE) {
        for (int j = 0; j < N_LANE; ++j) {
            lane_max[j] = z[v + j] > lane_max[j] ? z[v + j] : lane_max[j];
        }
    }
    float z_max = z[0];
    for (; v < n; ++v) {
        z_max = z[v] > z_max ? z[v] : z_max;
    }
    for (int j = 0; j < N_LANE; ++j) {
        z_max = lane_max[j] > z_max ? lane_max[j] : z_max;
    }
    if (sums.s == 0.0 || z_max > sums.z_max) {
        int64_t i_max = 0;
        while (i_max < n - 1 && z[i_max] != z_max) {
            ++i_max;
        }
        move_reference(sums, n_adapter, z_max, d + i_max, stride);
    }
    double lane[N_LANE] = {};
    for (v = 0; v + N_LANE <= n; v += N_LANE) {
        for (int j = 0; j < N_LANE; ++j) {
            const double e = exp_double((double) z[v + j] - sums.z_max);
            p[v + j] = e;
            lane[j] += e;
        }
    }
    double s = lanes_sum(lane);
    for (; v < n; ++v) {
        p[v] = exp_double((double) z[v] - sums.z_max);
        s += p[v];
    }
    const double s_before = sums.s;
    sums.s += s;
    for (int64_t ia = 0; ia < n_adapter; ++ia) {
        qaflora_divergence_sums::adapter & a = sums.adapters[ia];
        const float * dj = d + ia*stride;
        const double unit = a.unit;
        const double c    = a.c;
        double lane_first[N_LANE] = {};
        double lane_rest [N_LANE] = {};
        double lane_u    [N_LANE] = {};
        for (v = 0; v + N_LANE <= n; v += N_LANE) {
            for (int j = 0; j < N_LANE; ++j) {
                const double u = unit*dj[v + j] - c;
                lane_first[j] += p[v + j]*u;
                lane_rest [j] += p[v + j]*expm1_minus(u);
                lane_u    [j]  = u > lane_u[j] ? u : lane_u[j];
            }
        }
        double first = lanes_sum(lane_first);
        double rest  = lanes_sum(lane_rest);
        double u_max = 0.0;
        for (int j = 0; j < N_LANE; ++j) {
            u_max = lane_u[j] > u_max ? lane_u[j] : u_max;
        }
        for (; v < n; ++v) {
            const double u = unit*dj[v] - c;
            first += p[v]*u;
            rest  += p[v]*expm1_minus(u);
            u_max  = u > u_max ? u : u_max;
        }
        if (u_max > U_MAX || a.rest > 1e130) {
            go_scaled(a, s_before);
        }
        a.first += first;
        if (u_max > U_MAX || a.scaled != 0.0) {
            add_scaled(sums, a, z, dj, n);
        } else {
            a.rest += rest;
        }
    }
}

} // namespace QAFLORA_ISA
