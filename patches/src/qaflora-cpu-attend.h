// Attention of rows over keys and values that are held, tile by tile of keys, as flash attention does: no score is stored longer
// than its tile (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).
// A row's outputs are the same bits whatever other rows there are: tiles begin at fixed keys, each sum has one order, and what
// a mask leaves out adds exact zeros.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-numbers.h"

#include <math.h>

namespace QAFLORA_ISA {

#if defined(__AVX2__)

enum {
    ATTEND_KEYS  = 64, // of a tile
    ATTEND_BLOCK = 96, // rows that share a tile: of all heads that read the same keys
    ATTEND_ROWS  = 6,  // that are multiplied at once, with ATTEND_VECS vectors
};

// exp(x) for x <= 0 to two units in the last place, 0 below -87.3 (AVX2) or where it is below the least number
static inline vec v_exp(vec x) {
    x = v_max(x, v_set1(-200.0f));
    const vec n = v_round(v_mul(x, v_set1(1.44269504f)));
    vec r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vec p = v_set1(1.9875691500e-4f); // Cephes, expf
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_fma(v_mul(p, r), r, v_add(r, v_set1(1.0f)));
    return v_scale_2(p, n);
}

// to [n, n_row] = the columns of from [n_row, n]; n_row and n are multiples of W. What lies so many bytes later is asked for.
template <typename T> static void transpose(const uint8_t * from, size_t row_bytes, int64_t n_row, int64_t n, size_t later, float * to) {
    for (int64_t row = 0; row < n_row; row += W) {
        for (int64_t column = 0; column < n; column += W) {
            vec x[2][W];
            for (int i = 0; i < W; ++i) {
                const uint8_t * at_row = from + (row + i)*row_bytes;
                v_prefetch_first(at_row + T::row_size(column) + later);
                x[0][i] = T::load(at_row, column);
            }
            int at = 0;
            for (int step = 1; step < W; step *= 2) { // each interleaves the first half of the rows with the second
                for (int i = 0; i < W/2; ++i) {
                    v_interleave(x[at][i], x[at][i + W/2], x[1 - at][2*i], x[1 - at][2*i + 1]);
                }
                at = 1 - at;
            }
            for (int i = 0; i < W; ++i) {
                v_store(to + (column + i)*n_row + row, x[at][i]);
            }
        }
    }
}

// c [NR, NV*W] of rows of n_c numbers = a [NR, n] b [n, n_b], or += that
template <bool IS_SUM, int NR, int NV> static V_INLINE void multiply_tile(const float * a, int64_t n, const float * b, int64_t n_b, float * c, int64_t n_c) {
    vec acc[NR][NV];
    for (int i = 0; i < NR; ++i) {
        for (int v = 0; v < NV; ++v) {
            acc[i][v] = IS_SUM ? v_load(c + i*n_c + v*W) : v_set1(0.0f);
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        vec vb[NV];
        for (int v = 0; v < NV; ++v) {
            vb[v] = v_load(b + j*n_b + v*W);
        }
        for (int i = 0; i < NR; ++i) {
            const vec va = v_set1(a[i*n + j]);
            for (int v = 0; v < NV; ++v) {
                acc[i][v] = v_fma(va, vb[v], acc[i][v]);
            }
        }
    }
    for (int i = 0; i < NR; ++i) {
        for (int v = 0; v < NV; ++v) {
            v_store(c + i*n_c + v*W, acc[i][v]);
        }
    }
}

// c [n_row, n_b] = a [n_row, n] b [n, n_b], or += that
template <bool IS_SUM, int NR> static void multiply(const float * a, int64_t n_row, int64_t n, const float * b, int64_t n_b, float * c) {
    for (; n_row >= NR; n_row -= NR, a += NR*n, c += NR*n_b) {
        int64_t column = 0;
        for (; column + ATTEND_VECS*W <= n_b; column += ATTEND_VECS*W) {
            multiply_tile<IS_SUM, NR, ATTEND_VECS>(a, n, b + column, n_b, c + column, n_b);
        }
        for (; column < n_b; column += W) {
            multiply_tile<IS_SUM, NR, 1>(a, n, b + column, n_b, c + column, n_b);
        }
    }
    if constexpr (NR > 1) {
        multiply<IS_SUM, NR - 1>(a, n_row, n, b, n_b, c);
    }
}

// A row's softmax so far: the largest score, the sum of exp(score - max), and y [n_y] weighted so. scores [n] become weights.
struct softmax_row {
    float max = -INFINITY;
    float sum = 0.0f;

    void add(float * scores, const float * mask, int64_t n, float * y, int64_t n_y) {
        vec top = v_set1(max);
        for (int64_t j = 0; j < n; j += W) {
            const vec x = v_add(v_load(scores + j), v_load(mask + j));
            v_store(scores + j, x);
            top = v_max(top, x);
        }
        const float max_now = v_top(top);
        if (max_now > max) {
            float factor[W];
            v_store(factor, v_exp(v_set1(max - max_now)));
            for (int64_t j = 0; j < n_y; j += W) {
                v_store(y + j, v_mul(v_load(y + j), v_set1(factor[0])));
            }
            sum *= factor[0];
            max = max_now;
        }
        const vec less = v_set1(max == -INFINITY ? 0.0f : -max); // nothing was seen yet: exp(-INFINITY) = 0
        vec added = v_set1(0.0f);
        for (int64_t j = 0; j < n; j += W) {
            const vec p = v_exp(v_add(v_load(scores + j), less));
            v_store(scores + j, p);
            added = v_add(added, p);
        }
        sum += v_sum(added);
    }
};

// rows of one kv head, from begin to end: row i is token i/n_shared under the head i % n_shared of those that share it
struct attend_block {
    int64_t stream;
    int64_t kv_head;
    int64_t begin;
    int64_t end;
};

static const uint8_t * place(const qaflora_strided & rows, int64_t stream, int64_t head, int64_t row) {
    return rows.data + stream*rows.stream + head*rows.head + row*rows.row;
}

template <typename T> static void attend_to(const qaflora_attention & a, const attend_block & block, float * room) {
    const int64_t n_shared = a.n_head/a.n_kv_head;
    const int64_t n_row    = block.end - block.begin;
    float * q      = room;                             // [n_row, n_key_dim]
    float * y      = q      + ATTEND_BLOCK*a.n_key_dim;   // [n_row, n_value_dim]
    float * scores = y      + ATTEND_BLOCK*a.n_value_dim; // [n_row, n]
    float * keys   = scores + ATTEND_BLOCK*ATTEND_KEYS;   // [n_key_dim, n]
    float * values = keys   + ATTEND_KEYS*a.n_key_dim;    // [n, n_value_dim]
    softmax_row row[ATTEND_BLOCK];
    for (int64_t i = 0; i < n_row; ++i) {
        const int64_t token = (block.begin + i)/n_shared;
        const int64_t head  = block.kv_head*n_shared + (block.begin + i) % n_shared;
        const float * from  = (const float *) place(a.q, block.stream, head, token);
        for (int64_t j = 0; j < a.n_key_dim; j += W) {
            v_store(q + i*a.n_key_dim + j, v_mul(v_load(from + j), v_set1(a.scale)));
        }
        for (int64_t j = 0; j < a.n_value_dim; j += W) {
            v_store(y + i*a.n_value_dim + j, v_set1(0.0f));
        }
    }
    const auto mask_of = [&](int64_t token, int64_t key) { return (const float *) place(a.mask, block.stream, 0, token) + key; };
    for (int64_t key = 0; key < a.n_key; key += ATTEND_KEYS) {
        const int64_t n = a.n_key - key < ATTEND_KEYS ? a.n_key - key : (int64_t) ATTEND_KEYS;
        vec top = v_set1(-INFINITY);
        for (int64_t token = block.begin/n_shared; token <= (block.end - 1)/n_shared; ++token) {
            for (int64_t j = 0; j < n; j += W) {
                top = v_max(top, v_load(mask_of(token, key) + j));
            }
        }
        if (v_top(top) == -INFINITY) {
            continue; // no row sees these keys
        }
        transpose<T>(place(a.k, block.stream, block.kv_head, key), a.k.row, n, a.n_key_dim, n*a.k.row, keys);
        multiply<false, ATTEND_ROWS>(q, n_row, a.n_key_dim, keys, n, scores);
        for (int64_t i = 0; i < n_row; ++i) {
            row[i].add(scores + i*n, mask_of((block.begin + i)/n_shared, key), n, y + i*a.n_value_dim, a.n_value_dim);
        }
        transpose<T>(place(a.v, block.stream, block.kv_head, 0) + T::row_size(key), a.v.row, a.n_value_dim, n, T::row_size(n), values);
        multiply<true, ATTEND_ROWS>(scores, n_row, n, values, a.n_value_dim, y);
    }
    for (int64_t i = 0; i < n_row; ++i) {
        const int64_t token = (block.begin + i)/n_shared;
        const int64_t head  = block.kv_head*n_shared + (block.begin + i) % n_shared;
        float * to = a.y + ((block.stream*a.n_token + token)*a.n_head + head)*a.n_value_dim;
        for (int64_t j = 0; j < a.n_value_dim; j += W) {
            v_store(to + j, v_mul(v_load(y + i*a.n_value_dim + j), v_set1(1.0f/row[i].sum)));
        }
    }
}

static size_t attend_room_size(const qaflora_attention & a) {
    const int64_t n = ATTEND_BLOCK*(a.n_key_dim + a.n_value_dim + ATTEND_KEYS) + ATTEND_KEYS*(a.n_key_dim + a.n_value_dim);
    return n*sizeof(float);
}

static void attend(const qaflora_attention & a, void * room, int ith, int nth) {
    const int64_t n_row   = a.n_head/a.n_kv_head*a.n_token; // of a kv head
    const int64_t n_group = a.n_stream*a.n_kv_head;
    const int64_t n_full  = (n_row + ATTEND_BLOCK - 1)/ATTEND_BLOCK;
    const int64_t n_busy  = (nth + n_group - 1)/n_group;
    const int64_t n_of    = n_full > n_busy ? n_full : n_busy; // blocks of a kv head, so that each thread has one
    for (int64_t i = ith; i < n_group*n_of; i += nth) {
        const attend_block block = { i/n_of/a.n_kv_head, i/n_of % a.n_kv_head, n_row*(i % n_of)/n_of, n_row*(i % n_of + 1)/n_of };
        if (block.begin < block.end) {
            (a.is_f16 ? attend_to<f16_numbers> : attend_to<f32_numbers>)(a, block, (float *) room);
        }
    }
}

#else

static size_t (* const attend_room_size)(const qaflora_attention &) = nullptr;
static void (* const attend)(const qaflora_attention &, void *, int, int) = nullptr;

#endif

} // namespace QAFLORA_ISA
