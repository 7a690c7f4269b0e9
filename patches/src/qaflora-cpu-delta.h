// Deltas: y + B t. Those of a differential probe: x_j - x_0, and rows in two parts.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-numbers.h"

#include <math.h>

namespace QAFLORA_ISA {

// acc[i] += sum over r of t[i*n_rank + r] * (row r of the panel)
template <typename T, int NX>
static inline void add_panel(vec (&acc)[NX][NV], const uint8_t * panel, int64_t rank, const float * t, int64_t n_rank) {
    for (int64_t r = 0; r < rank; ++r) {
        vec b[NV];
        for (int v = 0; v < NV; ++v) {
            b[v] = T::panel(panel, r, v*W);
        }
        for (int i = 0; i < NX; ++i) {
            const vec w = v_set1(T::scale(panel, r)*t[i*n_rank + r]);
            for (int v = 0; v < NV; ++v) {
                acc[i][v] = v_fma(b[v], w, acc[i][v]);
            }
        }
    }
}

// the same for one row, in sums of every fourth r so that additions need not wait for each other
template <typename T>
static inline void add_panel(vec (&acc)[1][NV], const uint8_t * panel, int64_t rank, const float * t, int64_t) {
    vec part[4][NV] = {};
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        for (int u = 0; u < 4; ++u) {
            v_prefetch(panel + T::panel_offset(r + u));
            const vec w = v_set1(T::scale(panel, r + u)*t[r + u]);
            for (int v = 0; v < NV; ++v) {
                part[u][v] = v_fma(T::panel(panel, r + u, v*W), w, part[u][v]);
            }
        }
    }
    for (; r < rank; ++r) {
        const vec w = v_set1(T::scale(panel, r)*t[r]);
        for (int v = 0; v < NV; ++v) {
            part[0][v] = v_fma(T::panel(panel, r, v*W), w, part[0][v]);
        }
    }
    for (int v = 0; v < NV; ++v) {
        acc[0][v] = v_add(acc[0][v], v_add(v_add(part[0][v], part[1][v]), v_add(part[2][v], part[3][v])));
    }
}

// n values of NX rows; base: what is added besides, or null
template <int NX>
static inline void store_rows(const vec (&acc)[NX][NV], const float * src, const float * base, float * y, int64_t n, int64_t n_out) {
    for (int i = 0; i < NX; ++i) {
        float sum[QAFLORA_PANEL];
        if (n == QAFLORA_PANEL) {
            for (int v = 0; v < NV; ++v) {
                vec z = v_add(acc[i][v], v_load(src + i*n_out + v*W));
                if (base) {
                    z = v_add(z, v_load(base + i*n_out + v*W));
                }
                v_store(y + i*n_out + v*W, z);
            }
            continue;
        }
        for (int v = 0; v < NV; ++v) {
            v_store(sum + v*W, acc[i][v]);
        }
        for (int64_t o = 0; o < n; ++o) {
            y[i*n_out + o] = sum[o] + src[i*n_out + o] + (base ? base[i*n_out + o] : 0.0f);
        }
    }
}

// NX rows of one slot, one panel
template <int NX>
static void delta_tile(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, int64_t row, int64_t panel, const float * t,
                       const float * src, float * y, int64_t n_base) {
    vec acc[NX][NV] = {};
    for (int64_t is = 0; is < d.n_segment; ++is) {
        const qaflora_cpu_segment & s = d.segments[is];
        if (weight_of(rows, row, s) == 0.0f) {
            continue;
        }
        const uint8_t * b = s.b + panel*panel_size(s.type_b, s.rank);
        const float * ts = t + row*d.n_rank + s.offset;
        switch (s.type_b) {
            case QAFLORA_CPU_F32:  add_panel<f32_numbers >(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_F16:  add_panel<f16_numbers >(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_BF16: add_panel<bf16_numbers>(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_Q8_0: add_panel<q8_0_numbers>(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_Q8_0_PANEL: add_panel<panel_numbers<q8_0_numbers>>(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_Q4_0_PANEL: add_panel<panel_numbers<q4_0_numbers>>(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_Q4_0: break; // of A only
        }
    }
    const int64_t o    = panel*QAFLORA_PANEL;
    const int64_t left = d.n_out - o;
    const bool    is_adapted = n_base > 0 && row >= n_base;
    store_rows<NX>(acc, src + row*d.n_out + o, is_adapted ? src + row % n_base*d.n_out + o : nullptr, y + row*d.n_out + o,
                   left < QAFLORA_PANEL ? left : QAFLORA_PANEL, d.n_out);
}

static bool is_active(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, int64_t row) {
    for (int64_t is = 0; is < d.n_segment; ++is) {
        if (weight_of(rows, row, d.segments[is]) != 0.0f) {
            return true;
        }
    }
    return false;
}

// rows row0 to row1 of the panels p0 to p1
static void delta_rows(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, int64_t row0, int64_t row1, int64_t p0, int64_t p1,
                       const float * t, const float * src, float * y, int64_t n_base) {
    for (int64_t row = row0; row < row1; ) {
        // rows of one slot; of the base none follow into the next sequence, where the row to be added starts anew
        int64_t n = run_length(rows, row, row1 - row);
        if (n_base > 0 && n > n_base - row % n_base) {
            n = n_base - row % n_base;
        }
        if (!is_active(d, rows, row) && y == src && (n_base == 0 || row < n_base)) {
            row += n; // nothing is added to what is there
            continue;
        }
        for (int64_t p = p0; p < p1; ++p) {
            int64_t i = 0;
            for (; i + SUM_ROWS <= n; i += SUM_ROWS) {
                delta_tile<SUM_ROWS>(d, rows, row + i, p, t, src, y, n_base);
            }
            for (; i < n; ++i) {
                delta_tile<1>(d, rows, row + i, p, t, src, y, n_base);
            }
        }
        row += n;
    }
}

// acc[i] [QAFLORA_PANEL] += the same for NX rows, wherever they are. The sums are those of add_panel() for one row, which gets
// the same bits alone and beside others.
template <typename T, int NX>
static inline void add_panel_mixed(float * const (&acc)[NX], const uint8_t * panel, int64_t rank, const float * const (&t)[NX]) {
    enum { LINE = 64 }; // bytes that are fetched at once
    for (int v = 0; v < NV; ++v) {
        const size_t at = v*T::panel_offset(1)/NV;
        vec part[NX][4] = {};
        int64_t r = 0;
        for (; r + 4 <= rank; r += 4) {
            for (int u = 0; u < 4; ++u) {
                if (at % LINE == 0) {
                    v_prefetch(panel + T::panel_offset(r + u) + at);
                }
                const vec b = T::panel(panel, r + u, v*W);
                for (int i = 0; i < NX; ++i) {
                    part[i][u] = v_fma(b, v_set1(T::scale(panel, r + u)*t[i][r + u]), part[i][u]);
                }
            }
        }
        for (; r < rank; ++r) {
            const vec b = T::panel(panel, r, v*W);
            for (int i = 0; i < NX; ++i) {
                part[i][0] = v_fma(b, v_set1(T::scale(panel, r)*t[i][r]), part[i][0]);
            }
        }
        for (int i = 0; i < NX; ++i) {
            const vec sum = v_add(v_add(part[i][0], part[i][1]), v_add(part[i][2], part[i][3]));
            v_store(acc[i] + v*W, v_add(v_load(acc[i] + v*W), sum));
        }
    }
}

// sums of a panel: what the rows from row0 on get, [ROWS_AT_ONCE, QAFLORA_PANEL]
struct mixed_sums {
    int64_t row0;
    float   sum[ROWS_AT_ONCE*QAFLORA_PANEL];
};

// some rows, in tiles of at most NX
template <typename T, int NX>
static void delta_mixed(const qaflora_cpu_segments & d, const qaflora_cpu_segment & s, const uint8_t * panel, const int64_t * some, int64_t n,
                        const float * t, mixed_sums & sums) {
    for (; n >= NX; n -= NX, some += NX) {
        float *       acc[NX];
        const float * ts[NX];
        for (int i = 0; i < NX; ++i) {
            acc[i] = sums.sum + (some[i] - sums.row0)*QAFLORA_PANEL;
            ts[i]  = t + some[i]*d.n_rank + s.offset;
        }
        add_panel_mixed<T, NX>(acc, panel, s.rank, ts);
    }
    if constexpr (NX > 1) {
        delta_mixed<T, NX - 1>(d, s, panel, some, n, t, sums);
    }
}

// n rows of any slots, from row0 on: of each segment those that have a weight for it, so that its B is read once for all of them
static void delta_mixed_rows(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, int64_t row0, int64_t n, int64_t p0, int64_t p1,
                             const float * t, const float * src, float * y) {
    mixed_sums sums;
    sums.row0 = row0;
    for (int64_t p = p0; p < p1; ++p) {
        memset(sums.sum, 0, n*QAFLORA_PANEL*sizeof(float));
        for (int64_t is = 0; is < d.n_segment; ++is) {
            const qaflora_cpu_segment & s = d.segments[is];
            const uint8_t * panel = s.b + p*panel_size(s.type_b, s.rank);
            int64_t some[ROWS_AT_ONCE];
            const int64_t n_some = weighed_rows(rows, s, row0, n, some);
            switch (s.type_b) {
                case QAFLORA_CPU_F32:  delta_mixed<f32_numbers,  MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_F16:  delta_mixed<f16_numbers,  MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_BF16: delta_mixed<bf16_numbers, MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_Q8_0: delta_mixed<q8_0_numbers, MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_Q8_0_PANEL: delta_mixed<panel_numbers<q8_0_numbers>, MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_Q4_0_PANEL: delta_mixed<panel_numbers<q4_0_numbers>, MIX_ROWS>(d, s, panel, some, n_some, t, sums); break;
                case QAFLORA_CPU_Q4_0: break; // of A only
            }
        }
        const int64_t o    = p*QAFLORA_PANEL;
        const int64_t left = d.n_out - o < QAFLORA_PANEL ? d.n_out - o : (int64_t) QAFLORA_PANEL;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = (row0 + i)*d.n_out + o;
            for (int64_t j = 0; j < left; ++j) {
                y[at + j] = sums.sum[i*QAFLORA_PANEL + j] + src[at + j];
            }
        }
    }
}

static void add_delta(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, const float * t, const float * src, float * y,
                      int64_t n_base, int ith, int nth) {
    const int64_t n_panel = (d.n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t p0 = n_panel*ith/nth;
    const int64_t p1 = n_panel*(ith + 1)/nth;
    if (n_base == 0 && is_mixed(rows)) {
        for (int64_t row = 0; row < rows.n_row; row += ROWS_AT_ONCE) {
            const int64_t left = rows.n_row - row;
            delta_mixed_rows(d, rows, row, left < ROWS_AT_ONCE ? left : (int64_t) ROWS_AT_ONCE, p0, p1, t, src, y);
        }
        return;
    }
    // the base last: where y is src, the others need its rows as they were
    delta_rows(d, rows, n_base, rows.n_row, p0, p1, t, src, y, n_base);
    delta_rows(d, rows, 0, n_base, p0, p1, t, src, y, n_base);
}

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
