// W x of many rows: these are rounded to 8 bits in blocks of 32, as ggml does, but that their scales stay F32.
// A tile is W outputs and MM_ROWS rows; what is summed together are 4 bytes of an output, which stand in groups beside each other.
// A row's outputs are the same bits whatever other rows there are.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-matrix.h"

#include <math.h>

namespace QAFLORA_ISA {

#if defined(QAFLORA_HAS_PRODUCTS)

// a block of MM_ROWS rows
struct mm_rows {
    int8_t    x[MM_GROUPS/MM_PAIR][MM_ROWS][MM_PAIR][4];
    int32_t   begin[3][MM_ROWS]; // sums over the block, and over its halves, times -1
    float     scale[MM_ROWS];
    float     sum[MM_ROWS];      // of the rounded numbers
};

// Bytes of W [MM_GROUPS] times bytes of MM_PAIR rows from row i on, of N: mm_dots() adds the groups from begin to end to sum [MM_PAIR].
#if defined(__aarch64__)

template <typename T, int N> static inline void mm_dots(ivec * sum, const ivec * w, const mm_rows & rows, int i, int begin, int end) {
    ivec low  = i_set1(0); // of the first two outputs: row i, row i + 1, and so again
    ivec high = i_set1(0);
    for (int pair = begin/2; pair < end/2; ++pair) {
        const int8x16_t x = vld1q_s8(rows.x[pair][i][0]); // two groups of row i, and of row i + 1
        const ivec first  = w[2*pair];
        const ivec second = w[2*pair + 1];
#if defined(__ARM_FEATURE_MATMUL_INT8)
        if (N >= 4) {
            low  = vmmlaq_s32(low,  vreinterpretq_s8_s32(i_low_32 (first, second)), x);
            high = vmmlaq_s32(high, vreinterpretq_s8_s32(i_high_32(first, second)), x);
            continue;
        }
#endif
        for (int row = 0; row < 2 && i + row < N; ++row) {
            const int8x8_t own = row == 0 ? vget_low_s8(x) : vget_high_s8(x);
            sum[row] = vdotq_lane_s32(sum[row], vreinterpretq_s8_s32(first),  own, 0);
            sum[row] = vdotq_lane_s32(sum[row], vreinterpretq_s8_s32(second), own, 1);
        }
    }
    sum[0] = i_add(sum[0], vuzp1q_s32(low, high));
    sum[1] = i_add(sum[1], vuzp2q_s32(low, high));
}

#else

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// a part of a sum goes on with the sum so far
template <typename T> struct mm_n_added { enum { N = MM_GROUPS/T::N_SCALE }; };

static inline ivec mm_part(ivec sum)                { return sum; }
static inline ivec mm_add(ivec, ivec part)          { return part; }
template <typename T> static inline ivec mm_dot(ivec part, ivec w, ivec x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(part, w, x);
#else
    return _mm256_dpbusd_avx_epi32(part, w, x);
#endif
}

#else

// a part is of 16 bits, which N_ADDED groups do not exceed; bytes of W that have a sign give it to x
template <typename T> struct mm_n_added { enum { N = T::N_ADDED }; };

static inline ivec mm_part(ivec) { return i_set1(0); }
#if defined(__AVX512F__)
static inline ivec mm_add(ivec sum, ivec part) { return _mm512_add_epi32(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1))); }
template <typename T> static inline ivec mm_dot(ivec part, ivec w, ivec x) {
    if (T::IS_SIGNED) {
        x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), i_set1(0), x);
        w = _mm512_abs_epi8(w);
    }
    return _mm512_add_epi16(part, _mm512_maddubs_epi16(w, x));
}
#else
static inline ivec mm_add(ivec sum, ivec part) { return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1))); }
template <typename T> static inline ivec mm_dot(ivec part, ivec w, ivec x) {
    if (T::IS_SIGNED) {
        x = _mm256_sign_epi8(x, w);
        w = _mm256_abs_epi8(w);
    }
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(w, x));
}
#endif

#endif

// group j of row i, for each of W outputs
static inline ivec mm_group(const mm_rows & rows, int j, int i) {
    int32_t x;
    memcpy(&x, rows.x[j][i], sizeof(x));
    return i_set1(x);
}

template <typename T, int N> static inline void mm_dots(ivec * sum, const ivec * w, const mm_rows & rows, int i, int begin, int end) {
    enum { N_ADDED = mm_n_added<T>::N };
    for (int j = begin; j < end; j += N_ADDED) {
        ivec added = mm_part(*sum);
        for (int k = j; k < j + N_ADDED; ++k) {
            added = mm_dot<T>(added, w[k], mm_group(rows, k, i));
        }
        *sum = mm_add(*sum, added);
    }
}

#endif

// a block of W outputs
struct mm_outputs {
    uint8_t   w[MM_GROUPS][W][4];
    float     scale[2][W]; // of each half, if they have their own
    float     min[W];      // what the numbers begin at, if not 0
};

static size_t matmul_rounded_size(int64_t n_row, int64_t n_in) {
    return (n_row + MM_ROWS - 1)/MM_ROWS*(n_in/MM_BLOCK)*sizeof(mm_rows);
}

static size_t matmul_room_size(int64_t n_in) {
    return n_in/MM_BLOCK*(sizeof(mm_outputs) + W*36); // and what W outputs have in a file, at most
}

static inline void mm_round_block(const float * x, int64_t i, mm_rows * dst) {
    float largest = 0.0f;
    for (int j = 0; j < MM_BLOCK; j += 2*W) {
        const float here = v_largest(v_load(x + j), v_load(x + j + W));
        largest = here > largest ? here : largest;
    }
    const vec inverse = v_set1(largest > 0.0f ? 127.0f/largest : 0.0f);
    int8_t q[MM_BLOCK];
    int32_t half[2];
    for (int h = 0; h < 2; ++h) {
        ivec sum = i_set1(0);
        for (int j = h*MM_BLOCK/2; j < (h + 1)*MM_BLOCK/2; j += W) {
            const ivec nearest = i_nearest(v_mul(v_load(x + j), inverse));
            i_store_8(q + j, nearest);
            sum = i_add(sum, nearest);
        }
        half[h] = i_sum(sum);
    }
    for (int j = 0; j < MM_GROUPS; ++j) {
        memcpy(dst->x[j/MM_PAIR][i][j % MM_PAIR], q + 4*j, 4);
    }
    dst->begin[0][i] = -(half[0] + half[1]);
    dst->begin[1][i] = -half[0];
    dst->begin[2][i] = -half[1];
    dst->scale[i] = largest/127.0f;
    dst->sum[i] = dst->scale[i]*(float) (half[0] + half[1]);
}

static void matmul_round(const float * x, int64_t n_row, int64_t n_in, void * rounded, int ith, int nth) {
    const int64_t n_block = n_in/MM_BLOCK;
    const int64_t n_tile  = (n_row + MM_ROWS - 1)/MM_ROWS;
    for (int64_t tile = n_tile*ith/nth; tile < n_tile*(ith + 1)/nth; ++tile) {
        mm_rows * dst = (mm_rows *) rounded + tile*n_block;
        const int64_t n = n_row - tile*MM_ROWS < (int64_t) MM_ROWS ? n_row - tile*MM_ROWS : (int64_t) MM_ROWS;
        if (n < (int64_t) MM_ROWS) {
            memset(dst, 0, n_block*sizeof(mm_rows));
        }
        for (int64_t ib = 0; ib < n_block; ++ib) {
            for (int64_t i = 0; i < n; ++i) {
                mm_round_block(x + (tile*MM_ROWS + i)*n_in + ib*MM_BLOCK, i, dst + ib);
            }
        }
    }
}

// Read ahead what W outputs have for a block, of the W outputs that follow: so many rows in turn no hardware foresees. It is
// too much for the smallest cache.
template <typename T> static inline void mm_fetch(const uint8_t * w, int64_t n_block, int64_t ib) {
    const int64_t n_byte = W > 4 ? W*T::block(n_block) : 0;
    for (int64_t i = n_byte*ib/n_block/64*64; i < n_byte*(ib + 1)/n_block; i += 64) { // lines of the cache
        v_prefetch_second(w + n_byte + i);
    }
}

static inline int64_t mm_ahead(int64_t n_block, int64_t ib) { return n_block - ib < (int64_t) MM_AHEAD ? n_block - ib : (int64_t) MM_AHEAD; }

template <typename T> static void mm_gather(const uint8_t * w, int64_t n_block, mm_outputs * outputs) {
    const size_t stride = T::block(n_block);
    mm_words words = {};
    ivec kept[T::N_KEPT] = {};
    for (int64_t ib = 0; ib < n_block; ++ib) {
        vec scale[2], min;
        ivec numbers[MM_GROUPS];
        mm_outputs * dst = outputs + ib;
        mm_fetch<T>(w, n_block, ib);
        if (ib % MM_AHEAD == 0) {
            T::copy(w + T::block(ib), stride, mm_ahead(n_block, ib), words);
        }
        T::numbers(w, stride, ib, words, kept, numbers);
        for (int j = 0; j < MM_GROUPS; ++j) {
            i_store(dst->w[j], numbers[j]);
        }
        T::scales(words, ib % MM_AHEAD, scale, &min);
        for (int i = 0; i < T::N_SCALE; ++i) {
            v_store(dst->scale[i], scale[i]);
        }
        if (T::HAS_MIN) {
            v_store(dst->min, min);
        }
    }
}

// adds a block of W outputs to y [N]
template <typename T, int N> static inline void mm_block(const ivec * w, const vec * scale, vec min, const mm_rows & rows, vec * y) {
    for (int i = 0; i < N; i += MM_PAIR) {
        const int n = N - i < (int) MM_PAIR ? N - i : (int) MM_PAIR;
        for (int part = 0; part < T::N_SCALE; ++part) {
            ivec sum[MM_PAIR];
            for (int p = 0; p < MM_PAIR; ++p) {
                sum[p] = i_set1(T::OFFSET*rows.begin[T::N_SCALE == 1 ? 0 : 1 + part][i + p]);
            }
            mm_dots<T, N>(sum, w, rows, i, MM_GROUPS*part/T::N_SCALE, MM_GROUPS*(part + 1)/T::N_SCALE);
            for (int p = 0; p < n; ++p) {
                y[i + p] = v_fma(i_to_float(sum[p]), v_mul(scale[part], v_set1(rows.scale[i + p])), y[i + p]);
            }
        }
        for (int p = 0; p < n && T::HAS_MIN; ++p) {
            y[i + p] = v_fma(min, v_set1(rows.sum[i + p]), y[i + p]);
        }
    }
}

// y [MM_ROWS] of W outputs
template <typename T> static inline void mm_product(const mm_outputs * outputs, const mm_rows * rows, int64_t n_block, vec * y) {
    for (int i = 0; i < MM_ROWS; ++i) {
        y[i] = v_zero();
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        const mm_outputs & block = outputs[ib];
        const vec scale[2] = { v_load(block.scale[0]), v_load(block.scale[1]) };
        ivec w[MM_GROUPS];
        for (int j = 0; j < MM_GROUPS; ++j) {
            w[j] = i_load(block.w[j]);
        }
        mm_block<T, MM_ROWS>(w, scale, v_load(block.min), rows[ib], y);
    }
}

// What mm_gather() and mm_product() find, the same bits, without storing what rows are multiplied with: the quicker way up to FEW of them.
enum { FEW = MM_ROWS };

template <typename T, int N> static inline void mm_few_product(const uint8_t * w, const mm_rows * rows, int64_t n_block, vec * y) {
    const size_t stride = T::block(n_block);
    mm_words words = {};
    ivec kept[T::N_KEPT] = {};
    for (int i = 0; i < N; ++i) {
        y[i] = v_zero();
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        vec scale[2];
        vec min = v_zero();
        ivec numbers[MM_GROUPS];
        mm_fetch<T>(w, n_block, ib);
        if (ib % MM_AHEAD == 0) {
            T::copy(w + T::block(ib), stride, mm_ahead(n_block, ib), words);
        }
        T::numbers(w, stride, ib, words, kept, numbers);
        T::scales(words, ib % MM_AHEAD, scale, &min);
        mm_block<T, N>(numbers, scale, min, rows[ib], y);
    }
}

// W outputs of each row
template <typename T> static void mm_few_tile(const uint8_t * w, const mm_rows * rows, int64_t n_block, int64_t n_row, vec * y) {
    switch (n_row) {
        case 1:  mm_few_product<T, 1>(w, rows, n_block, y); break;
        case 2:  mm_few_product<T, 2>(w, rows, n_block, y); break;
        case 3:  mm_few_product<T, 3>(w, rows, n_block, y); break;
        case 4:  mm_few_product<T, 4>(w, rows, n_block, y); break;
        case 5:
        case 6:  mm_few_product<T, 6>(w, rows, n_block, y); break;
        case 7:
        case 8:  mm_few_product<T, MM_ROWS < 8 ? MM_ROWS : 8>(w, rows, n_block, y); break;
        default: mm_few_product<T, MM_ROWS>(w, rows, n_block, y);
    }
}

template <typename T> static void mm_tiles(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    const int64_t n_block = m.n_in/MM_BLOCK;
    const mm_rows * all = (const mm_rows *) rounded;
    mm_outputs * outputs = (mm_outputs *) room;
    for (int64_t o = begin; o < end; o += W) {
        const int64_t n = end - o < (int64_t) W ? end - o : (int64_t) W;
        const uint8_t * w = m.data + o*T::block(n_block);
        if (n < (int64_t) W) { // zeros follow
            uint8_t * copy = (uint8_t *) (outputs + n_block);
            memset(copy, 0, W*T::block(n_block));
            memcpy(copy, w, n*T::block(n_block));
            w = copy;
        }
        if (n_row > (int64_t) FEW) {
            mm_gather<T>(w, n_block, outputs);
        }
        for (int64_t row = 0; row < n_row; row += MM_ROWS) {
            vec part[MM_ROWS];
            if (n_row > (int64_t) FEW) {
                mm_product<T>(outputs, all + row/MM_ROWS*n_block, n_block, part);
            } else {
                mm_few_tile<T>(w, all, n_block, n_row, part);
            }
            for (int i = 0; i < MM_ROWS && row + i < n_row; ++i) {
                memcpy(y + (row + i)*stride + o - begin, &part[i], n*sizeof(float));
            }
        }
    }
}

static void matmul(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    switch (m.type) {
        case QAFLORA_MATRIX_Q4_0:  mm_tiles<q4_0_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q4_1:  mm_tiles<q4_1_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q5_0:  mm_tiles<q5_0_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q4_K:  mm_tiles<q4_k_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q5_K:  mm_tiles<q5_k_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q6_K:  mm_tiles<q6_k_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_Q8_0:  mm_tiles<q8_0_matrix>(m, begin, end, rounded, n_row, y, stride, room); break;
        case QAFLORA_MATRIX_OTHER: break;
    }
}

#else

static size_t (* const matmul_rounded_size)(int64_t, int64_t) = nullptr;
static size_t (* const matmul_room_size)(int64_t) = nullptr;
static void (* const matmul_round)(const float *, int64_t, int64_t, void *, int, int) = nullptr;
static void (* const matmul)(const qaflora_matrix &, int64_t, int64_t, const void *, int64_t, float *, int64_t, void *) = nullptr;

#endif

} // namespace QAFLORA_ISA
