// The products of a differential probe: x_j - x_0, and rows in two parts.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-vec.h"

#include <math.h>

namespace QAFLORA_ISA {

// to the nearest F16, for numbers that F16 holds without denormals
static inline float round_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits += 0x0fff + ((bits >> 13) & 1);
    bits &= ~0x1fffu;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static void subtract_base(const float * x, float * d, int64_t n, int64_t n_row, int64_t n_base, int ith, int nth) {
    for (int64_t row = n_row*ith/nth; row < n_row*(ith + 1)/nth; ++row) {
        const float * src = x + row*n;
        float * dst = d + row*n;
        if (row < n_base) {
            memcpy(dst, src, n*sizeof(float));
            continue;
        }
        const float * base = x + row % n_base*n;
        for (int64_t i = 0; i < n; ++i) {
            dst[i] = src[i] - base[i];
        }
    }
}

static float block_max(const float * x, int64_t n) {
    float best = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        best = (x[i] < 0.0f ? -x[i] : x[i]) > (best < 0.0f ? -best : best) ? x[i] : best;
    }
    return best;
}

static float rounding_power(const qaflora_rounding & rounding, const float * x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += rounding.block) {
        float lane[W] = {};
        for (int64_t j = i; j < i + rounding.block; j += W) {
            for (int l = 0; l < W; ++l) {
                const float a = x[j + l] < 0.0f ? -x[j + l] : x[j + l];
                lane[l] = a > lane[l] ? a : lane[l];
            }
        }
        float max = 0.0f;
        for (int l = 0; l < W; ++l) {
            max = lane[l] > max ? lane[l] : max;
        }
        sum += max*max; // an even error of one step: step^2/12
    }
    return sum;
}

static void split(const qaflora_rounding & rounding, const float * x, float * rounded, float * rest, int64_t n) {
    for (int64_t i = 0; i < n; i += rounding.block) {
        const float max = block_max(x + i, rounding.block);
        float step = max/127.0f;
        const float inverse = max == 0.0f ? 0.0f : 127.0f/max;
        if (rounding.f16_scale) {
            step = round_f16(step);
        }
        for (int64_t j = i; j < i + rounding.block; ++j) {
            const float xj = x[j]; // rounded may be x
            rounded[j] = rintf(xj*inverse)*step;
            rest[j]    = xj - rounded[j];
        }
    }
}

static void add_rows(float * y, const float * more, const int32_t * rows, int64_t n_rows, int64_t n_out, int ith, int nth) {
    const int64_t n_panel = (n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t begin = n_panel*ith/nth*QAFLORA_PANEL;
    const int64_t end   = n_panel*(ith + 1)/nth*QAFLORA_PANEL;
    for (int64_t i = 0; i < n_rows; ++i) {
        for (int64_t o = begin; o < end && o < n_out; ++o) {
            y[rows[i]*n_out + o] += more[i*n_out + o];
        }
    }
}

} // namespace QAFLORA_ISA
