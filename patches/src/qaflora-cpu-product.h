// Rank products: weight * scale * A x.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-numbers.h"
#include "qaflora-cpu-rows.h"

namespace QAFLORA_ISA {

// t[i*n_rank + m] = weight * (row m of a) . (row i of x)
template <typename T, int NA, int NX>
static inline void dot_tile(const uint8_t * a, const float * x, int64_t n, float weight, float * t, int64_t n_rank) {
    const size_t stride = T::row_size(n);
    vec acc[NA][NX];
    for (int m = 0; m < NA; ++m) {
        for (int i = 0; i < NX; ++i) {
            acc[m][i] = v_zero();
        }
    }
    const int64_t n_whole = n - n % W;
    for (int64_t j = 0; j < n_whole; j += W) {
        vec va[NA];
        for (int m = 0; m < NA; ++m) {
            va[m] = T::load(a + m*stride, j);
        }
        if (NX == 1 && j % 32 == 0) {
            for (int m = 0; m < NA; ++m) {
                v_prefetch(a + m*stride + T::row_size(j));
            }
        }
        for (int i = 0; i < NX; ++i) {
            const vec vx = v_load(x + i*n + j);
            for (int m = 0; m < NA; ++m) {
                acc[m][i] = v_fma(va[m], vx, acc[m][i]);
            }
        }
    }
    for (int m = 0; m < NA; ++m) {
        for (int i = 0; i < NX; ++i) {
            float sum = v_sum(acc[m][i]);
            for (int64_t j = n_whole; j < n; ++j) {
                sum += T::at(a + m*stride, j)*x[i*n + j];
            }
            t[i*n_rank + m] = weight*sum;
        }
    }
}

// the same for rows of Q8_0, whose length is a multiple of the block
template <int NA, int NX>
static inline void dot_tile_q8_0(const uint8_t * a, const float * x, int64_t n, float weight, float * t, int64_t n_rank) {
    enum { BLOCK = q8_0_numbers::BLOCK, NB = BLOCK/W };
    const size_t stride = q8_0_numbers::row_size(n);
    vec acc[NA][NX];
    for (int m = 0; m < NA; ++m) {
        for (int i = 0; i < NX; ++i) {
            acc[m][i] = v_zero();
        }
    }
    for (int64_t ib = 0; ib < n/BLOCK; ++ib) {
        vec vx[NX][NB];
        for (int i = 0; i < NX; ++i) {
            for (int v = 0; v < NB; ++v) {
                vx[i][v] = v_load(x + i*n + ib*BLOCK + v*W);
            }
        }
        for (int m = 0; m < NA; ++m) {
            const int8_t * q = q8_0_numbers::numbers(a + m*stride, n) + ib*BLOCK;
            if (NX == 1 && ib % 2 == 0) {
                v_prefetch(q);
            }
            vec vq[NB];
            for (int v = 0; v < NB; ++v) {
                vq[v] = v_load_i8(q + v*W);
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
            t[i*n_rank + m] = weight*v_sum(acc[m][i]);
        }
    }
}

template <typename T, int NA, int NX> struct dot {
    static void tile(const uint8_t * a, const float * x, int64_t n, float weight, float * t, int64_t n_rank) {
        dot_tile<T, NA, NX>(a, x, n, weight, t, n_rank);
    }
};

template <int NA, int NX> struct dot<q8_0_numbers, NA, NX> {
    static void tile(const uint8_t * a, const float * x, int64_t n, float weight, float * t, int64_t n_rank) {
        dot_tile_q8_0<NA, NX>(a, x, n, weight, t, n_rank);
    }
};

template <typename T, int NX>
static void dot_rows(const uint8_t * a, int64_t n_a, const float * x, int64_t n, float weight, float * t, int64_t n_rank) {
    const size_t stride = T::row_size(n);
    int64_t m = 0;
    for (; m + 4 <= n_a; m += 4) {
        dot<T, 4, NX>::tile(a + m*stride, x, n, weight, t + m, n_rank);
    }
    for (; m < n_a; ++m) {
        dot<T, 1, NX>::tile(a + m*stride, x, n, weight, t + m, n_rank);
    }
}

template <typename T>
static void dot_block(const uint8_t * a, int64_t n_a, const float * x, int64_t n_x, int64_t n, float weight, float * t, int64_t n_rank) {
    int64_t i = 0;
    for (; i + DOT_ROWS <= n_x; i += DOT_ROWS) {
        dot_rows<T, DOT_ROWS>(a, n_a, x + i*n, n, weight, t + i*n_rank, n_rank);
    }
    for (; i < n_x; ++i) {
        dot_rows<T, 1>(a, n_a, x + i*n, n, weight, t + i*n_rank, n_rank);
    }
}

// rows m0 to m1 of the A of one segment
static void segment_product(const qaflora_rank_product & p, const qaflora_cpu_segment & s, int64_t m0, int64_t m1,
                            const float * x, int64_t n_x, float weight, float * t) {
    t += s.offset + m0;
    switch (s.type_a) {
        case QAFLORA_CPU_F32:  dot_block<f32_numbers >(s.a + m0*f32_numbers ::row_size(p.n_in), m1 - m0, x, n_x, p.n_in, weight, t, p.n_rank); break;
        case QAFLORA_CPU_F16:  dot_block<f16_numbers >(s.a + m0*f16_numbers ::row_size(p.n_in), m1 - m0, x, n_x, p.n_in, weight, t, p.n_rank); break;
        case QAFLORA_CPU_BF16: dot_block<bf16_numbers>(s.a + m0*bf16_numbers::row_size(p.n_in), m1 - m0, x, n_x, p.n_in, weight, t, p.n_rank); break;
        case QAFLORA_CPU_Q8_0: dot_block<q8_0_numbers>(s.a + m0*q8_0_numbers::row_size(p.n_in), m1 - m0, x, n_x, p.n_in, weight, t, p.n_rank); break;
    }
}

// rows of x that follow each other and weigh alike, A's rows divided among the threads
static void product_by_rank(const qaflora_rank_product & p, const qaflora_cpu_rows & rows, int64_t row, int64_t n_x,
                            const float * x, float * t, int ith, int nth) {
    int64_t n_active = 0;
    for (int64_t is = 0; is < p.n_segment; ++is) {
        n_active += weight_of(rows, row, p.segments[is]) != 0.0f ? p.segments[is].rank : 0;
    }
    const int64_t step  = 4;
    const int64_t n_all = (n_active + step - 1)/step;
    const int64_t begin = n_all*ith/nth*step;
    const int64_t end   = n_all*(ith + 1)/nth*step;
    int64_t pos = 0;
    for (int64_t is = 0; is < p.n_segment; ++is) {
        const qaflora_cpu_segment & s = p.segments[is];
        const float weight = weight_of(rows, row, s);
        if (weight == 0.0f) {
            continue;
        }
        const int64_t m0 = begin > pos ? begin - pos : 0;
        const int64_t m1 = end - pos < s.rank ? end - pos : s.rank;
        if (m0 < m1) {
            segment_product(p, s, m0, m1, x + row*p.n_in, n_x, weight, t + row*p.n_rank);
        }
        pos += s.rank;
    }
}

static void rank_product(const qaflora_rank_product & p, const qaflora_cpu_rows & rows, const float * x, float * t, int ith, int nth) {
    const int64_t n_chunk = rows.n_row/DOT_ROWS;
    if (n_chunk < 4*nth) {
        for (int64_t row = 0; row < rows.n_row; ) {
            const int64_t n_x = run_length(rows, row, rows.n_row - row);
            product_by_rank(p, rows, row, n_x, x, t, ith, nth);
            row += n_x;
        }
        return;
    }
    int turn = 0;
    for (int64_t row = 0; row < rows.n_row; ) {
        const int64_t left = rows.n_row - row;
        const int64_t n_x  = run_length(rows, row, left < (int64_t) DOT_ROWS ? left : (int64_t) DOT_ROWS);
        if (turn == ith) {
            product_by_rank(p, rows, row, n_x, x, t, 0, 1);
        }
        turn = turn + 1 == nth ? 0 : turn + 1;
        row += n_x;
    }
}

} // namespace QAFLORA_ISA
