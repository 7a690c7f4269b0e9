// Rank products: weight * scale * A x.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-numbers.h"

namespace QAFLORA_ISA {

// rows that one tile takes
template <int NX> struct dot_tile_rows {
    const float * x[NX];
    float *       t[NX];
    float         weight[NX];
};

// t[i][m] = weight[i] * (row m of a) . x[i], in sums that do not depend on NA and NX. FETCH: a is read for the first time
template <typename T, int NA, int NX, bool FETCH>
static inline void dot_tile(const uint8_t * a, const dot_tile_rows<NX> & rows, int64_t n, int64_t m0) {
    const size_t stride = T::row_size(n);
    vec acc[NA][NX] = {};
    const int64_t n_whole = n - n % W;
    for (int64_t j = 0; j < n_whole; j += W) {
        vec va[NA];
        for (int m = 0; m < NA; ++m) {
            va[m] = T::load(a + m*stride, j);
        }
        if (FETCH && j % 32 == 0) {
            for (int m = 0; m < NA; ++m) {
                v_prefetch(a + m*stride + T::row_size(j));
            }
        }
        for (int i = 0; i < NX; ++i) {
            const vec vx = v_load(rows.x[i] + j);
            for (int m = 0; m < NA; ++m) {
                acc[m][i] = v_fma(va[m], vx, acc[m][i]);
            }
        }
    }
    for (int m = 0; m < NA; ++m) {
        for (int i = 0; i < NX; ++i) {
            float sum = v_sum(acc[m][i]);
            for (int64_t j = n_whole; j < n; ++j) {
                sum += T::at(a + m*stride, j)*rows.x[i][j];
            }
            rows.t[i][m0 + m] = rows.weight[i]*sum;
        }
    }
}

// the same for rows of blocks, whose length is a multiple of them
template <typename T, int NA, int NX, bool FETCH>
static inline void dot_tile_blocks(const uint8_t * a, const dot_tile_rows<NX> & rows, int64_t n, int64_t m0) {
    enum { BLOCK = T::BLOCK, NB = BLOCK/W, LINE = 64 };
    const size_t stride = T::row_size(n);
    vec acc[NA][NX] = {};
    for (int64_t ib = 0; ib < n/BLOCK; ++ib) {
        vec vx[NX][NB];
        for (int i = 0; i < NX; ++i) {
            for (int v = 0; v < NB; ++v) {
                vx[i][v] = v_load(rows.x[i] + ib*BLOCK + v*W);
            }
        }
        for (int m = 0; m < NA; ++m) {
            const uint8_t * q = T::numbers(a + m*stride, n) + ib*T::BLOCK_BYTES;
            if (FETCH && ib % (LINE/T::BLOCK_BYTES) == 0) {
                v_prefetch(q);
            }
            vec vq[NB];
            for (int v = 0; v < NB; ++v) {
                vq[v] = T::load_block(q, v*W);
            }
            const vec scale = v_set1(((const float *) (a + m*stride))[ib]);
            for (int i = 0; i < NX; ++i) {
                vec sum = v_mul(vq[0], vx[i][0]);
                for (int v = 1; v < NB; ++v) {
                    sum = v_fma(vq[v], vx[i][v], sum);
                }
                acc[m][i] = v_fma(scale, sum, acc[m][i]);
            }
        }
    }
    for (int m = 0; m < NA; ++m) {
        for (int i = 0; i < NX; ++i) {
            rows.t[i][m0 + m] = rows.weight[i]*v_sum(acc[m][i]);
        }
    }
}

template <typename T, int NA, int NX, bool FETCH>
static void dot(const uint8_t * a, const dot_tile_rows<NX> & rows, int64_t n, int64_t m0) {
    if constexpr (T::BLOCK > 1) {
        dot_tile_blocks<T, NA, NX, FETCH>(a, rows, n, m0);
    } else {
        dot_tile<T, NA, NX, FETCH>(a, rows, n, m0);
    }
}

// a: its rows from m0 to m1
template <typename T, int NX, bool FETCH>
static void dot_rows(const uint8_t * a, int64_t m0, int64_t m1, const dot_tile_rows<NX> & rows, int64_t n) {
    const size_t stride = T::row_size(n);
    int64_t m = m0;
    for (; m + 4 <= m1; m += 4) {
        dot<T, 4, NX, FETCH>(a + m*stride, rows, n, m);
    }
    for (; m < m1; ++m) {
        dot<T, 1, NX, FETCH>(a + m*stride, rows, n, m);
    }
}

// some rows of x, wherever they are, in tiles of at most NX
template <typename T, int NX>
static void dot_mixed(const qaflora_cpu_segments & p, const qaflora_cpu_rows & rows, const qaflora_cpu_segment & s, int64_t m0, int64_t m1,
                      const int64_t * some, int64_t n, const float * x, float * t) {
    for (; n >= NX; n -= NX, some += NX) {
        dot_tile_rows<NX> tile;
        for (int i = 0; i < NX; ++i) {
            tile.x[i]      = x + some[i]*p.n_in;
            tile.t[i]      = t + some[i]*p.n_rank + s.offset;
            tile.weight[i] = weight_of(rows, some[i], s);
        }
        dot_rows<T, NX, true>(s.a, m0, m1, tile, p.n_in);
    }
    if constexpr (NX > 1) {
        dot_mixed<T, NX - 1>(p, rows, s, m0, m1, some, n, x, t);
    }
}

// rows of x from row on that have a weight
template <typename T, int NX>
static void segment_product(const qaflora_cpu_segments & p, const qaflora_cpu_rows & rows, const qaflora_cpu_segment & s, int64_t m0, int64_t m1,
                            const float * x, float * t, int64_t row, int64_t n_x) {
    for (int64_t end = row + n_x; row < end; row += ROWS_AT_ONCE) {
        int64_t weighed[ROWS_AT_ONCE];
        const int64_t n = weighed_rows(rows, s, row, end - row < ROWS_AT_ONCE ? end - row : (int64_t) ROWS_AT_ONCE, weighed);
        dot_mixed<T, NX>(p, rows, s, m0, m1, weighed, n, x, t);
    }
}

// whether the segment has a weight for any of n rows
static bool is_weighed(const qaflora_cpu_rows & rows, const qaflora_cpu_segment & s, int64_t row, int64_t n) {
    for (int64_t i = row; i < row + n; ++i) {
        if (weight_of(rows, i, s) != 0.0f) {
            return true;
        }
    }
    return false;
}

// Rows of x that follow each other, A's rows divided among the threads. They weigh alike, or is_mixed.
static void product_by_rank(const qaflora_cpu_segments & p, const qaflora_cpu_rows & rows, int64_t row, int64_t n_x,
                            const float * x, float * t, int ith, int nth, bool is_mixed) {
    int64_t n_active = 0;
    for (int64_t is = 0; is < p.n_segment; ++is) {
        n_active += is_weighed(rows, p.segments[is], row, is_mixed ? n_x : 1) ? p.segments[is].rank : 0;
    }
    const int64_t step  = 4;
    const int64_t n_all = (n_active + step - 1)/step;
    const int64_t begin = n_all*ith/nth*step;
    const int64_t end   = n_all*(ith + 1)/nth*step;
    int64_t pos = 0;
    for (int64_t is = 0; is < p.n_segment; ++is) {
        const qaflora_cpu_segment & s = p.segments[is];
        if (!is_weighed(rows, s, row, is_mixed ? n_x : 1)) {
            continue;
        }
        const int64_t m0 = begin > pos ? begin - pos : 0;
        const int64_t m1 = end - pos < s.rank ? end - pos : s.rank;
        if (m0 < m1) {
            switch (s.type_a) {
                case QAFLORA_CPU_F32:  segment_product<f32_numbers,  MIX_DOT_F32>(p, rows, s, m0, m1, x, t, row, n_x); break;
                case QAFLORA_CPU_F16:  segment_product<f16_numbers,  DOT_ROWS>(p, rows, s, m0, m1, x, t, row, n_x); break;
                case QAFLORA_CPU_BF16: segment_product<bf16_numbers, DOT_ROWS>(p, rows, s, m0, m1, x, t, row, n_x); break;
                case QAFLORA_CPU_Q8_0: segment_product<q8_0_numbers, DOT_ROWS>(p, rows, s, m0, m1, x, t, row, n_x); break;
                case QAFLORA_CPU_Q4_0: segment_product<q4_0_numbers, DOT_ROWS>(p, rows, s, m0, m1, x, t, row, n_x); break;
                case QAFLORA_CPU_Q8_0_PANEL:
                case QAFLORA_CPU_Q4_0_PANEL: break; // of B only
            }
        }
        pos += s.rank;
    }
}

static void rank_product(const qaflora_cpu_segments & p, const qaflora_cpu_rows & rows, const float * x, float * t, int ith, int nth) {
    if (is_mixed(rows)) {
        for (int64_t row = 0; row < rows.n_row; row += ROWS_AT_ONCE) {
            const int64_t left = rows.n_row - row;
            product_by_rank(p, rows, row, left < ROWS_AT_ONCE ? left : (int64_t) ROWS_AT_ONCE, x, t, ith, nth, true);
        }
        return;
    }
    const int64_t n_chunk = rows.n_row/DOT_ROWS;
    if (n_chunk < 4*nth) {
        for (int64_t row = 0; row < rows.n_row; ) {
            const int64_t n_x = run_length(rows, row, rows.n_row - row);
            product_by_rank(p, rows, row, n_x, x, t, ith, nth, false);
            row += n_x;
        }
        return;
    }
    int turn = 0;
    for (int64_t row = 0; row < rows.n_row; ) {
        const int64_t left = rows.n_row - row;
        const int64_t n_x  = run_length(rows, row, left < (int64_t) DOT_ROWS ? left : (int64_t) DOT_ROWS);
        if (turn == ith) {
            product_by_rank(p, rows, row, n_x, x, t, 0, 1, false);
        }
        turn = turn + 1 == nth ? 0 : turn + 1;
        row += n_x;
    }
}

} // namespace QAFLORA_ISA
