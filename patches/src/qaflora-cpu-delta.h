// Deltas: y + B t.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-numbers.h"
#include "qaflora-cpu-rows.h"

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
            const vec w = v_set1(t[i*n_rank + r]);
            for (int v = 0; v < NV; ++v) {
                acc[i][v] = v_fma(b[v], w, acc[i][v]);
            }
        }
    }
}

// the same for one row, in sums of every fourth r so that additions need not wait for each other
template <typename T>
static inline void add_panel_row(vec (&acc)[1][NV], const uint8_t * panel, int64_t rank, const float * t) {
    vec part[4][NV];
    for (int u = 0; u < 4; ++u) {
        for (int v = 0; v < NV; ++v) {
            part[u][v] = v_zero();
        }
    }
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        for (int u = 0; u < 4; ++u) {
            v_prefetch(panel + T::panel_offset(r + u));
            const vec w = v_set1(t[r + u]);
            for (int v = 0; v < NV; ++v) {
                part[u][v] = v_fma(T::panel(panel, r + u, v*W), w, part[u][v]);
            }
        }
    }
    for (; r < rank; ++r) {
        const vec w = v_set1(t[r]);
        for (int v = 0; v < NV; ++v) {
            part[0][v] = v_fma(T::panel(panel, r, v*W), w, part[0][v]);
        }
    }
    for (int v = 0; v < NV; ++v) {
        acc[0][v] = v_add(acc[0][v], v_add(v_add(part[0][v], part[1][v]), v_add(part[2][v], part[3][v])));
    }
}

template <typename T>
static inline void add_panel(vec (&acc)[1][NV], const uint8_t * panel, int64_t rank, const float * t, int64_t) {
    add_panel_row<T>(acc, panel, rank, t);
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
static void delta_tile(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row, int64_t panel, const float * t,
                       const float * src, float * y, int64_t n_base) {
    vec acc[NX][NV];
    for (int i = 0; i < NX; ++i) {
        for (int v = 0; v < NV; ++v) {
            acc[i][v] = v_zero();
        }
    }
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
        }
    }
    const int64_t o    = panel*QAFLORA_PANEL;
    const int64_t left = d.n_out - o;
    const bool    is_adapted = n_base > 0 && row >= n_base;
    store_rows<NX>(acc, src + row*d.n_out + o, is_adapted ? src + row % n_base*d.n_out + o : nullptr, y + row*d.n_out + o,
                   left < QAFLORA_PANEL ? left : QAFLORA_PANEL, d.n_out);
}

static bool is_active(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row) {
    for (int64_t is = 0; is < d.n_segment; ++is) {
        if (weight_of(rows, row, d.segments[is]) != 0.0f) {
            return true;
        }
    }
    return false;
}

// rows row0 to row1 of the panels p0 to p1
static void delta_rows(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row0, int64_t row1, int64_t p0, int64_t p1,
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

static void add_delta(const qaflora_delta & d, const qaflora_cpu_rows & rows, const float * t, const float * src, float * y,
                      int64_t n_base, int ith, int nth) {
    const int64_t n_panel = (d.n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t p0 = n_panel*ith/nth;
    const int64_t p1 = n_panel*(ith + 1)/nth;
    // the base last: where y is src, the others need its rows as they were
    delta_rows(d, rows, n_base, rows.n_row, p0, p1, t, src, y, n_base);
    delta_rows(d, rows, 0, n_base, p0, p1, t, src, y, n_base);
}

} // namespace QAFLORA_ISA
