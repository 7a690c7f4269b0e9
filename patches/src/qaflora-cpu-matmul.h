// W x of many rows: these are rounded to 8 bits in blocks of 32, as ggml does, but that their scales stay F32.
// A tile is W outputs and MM_ROWS rows; what is summed together are 4 bytes of an output, which stand in groups beside each other.
// A row's outputs are the same bits whatever other rows there are.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-matrix.h"

#include <math.h>

namespace QAFLORA_ISA {

#if defined(__AVX2__)

// a block of MM_ROWS rows
struct mm_rows {
    mm_number x[MM_STEPS][MM_ROWS][MM_STEP];
    int32_t   begin[3][MM_ROWS]; // of sums over the block, and over its halves
    float     scale[MM_ROWS];
    float     sum[MM_ROWS];      // of the rounded numbers
};

// a block of W outputs
struct mm_outputs {
    mm_number w[MM_STEPS][W][MM_STEP];
    float     scale[2][W]; // of each half, if they have their own
    float     min[W];      // what the numbers begin at, if not 0
};

static size_t matmul_rounded_size(int64_t n_row, int64_t n_in) {
    return (n_row + MM_ROWS - 1)/MM_ROWS*(n_in/MM_BLOCK)*sizeof(mm_rows);
}

static size_t matmul_room_size(int64_t n_in) {
    return n_in/MM_BLOCK*sizeof(mm_outputs);
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
    for (int j = 0; j < MM_STEPS; ++j) {
        for (int k = 0; k < MM_STEP; ++k) {
            dst->x[j][i][k] = q[mm_place(j, k)];
        }
    }
    dst->begin[0][i] = -MM_OFFSET*(half[0] + half[1]);
    dst->begin[1][i] = -MM_OFFSET*half[0];
    dst->begin[2][i] = -MM_OFFSET*half[1];
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

// Read ahead what W outputs have for a block, of the W outputs that follow: rows take turns, which no hardware foresees.
template <typename T> static inline void mm_fetch(const uint8_t * w, int64_t n_block, int64_t ib) {
    const int64_t n_byte = W*T::block(n_block), n_each = n_byte/n_block;
    for (int64_t i = 0; i < n_each + 64; i += 64) { // lines of the cache
        _mm_prefetch((const char *) w + n_byte + ib*n_each + i, _MM_HINT_T0);
    }
}

// n of W outputs; what follows them is not read, and becomes zeros
template <typename T> static void mm_gather(const uint8_t * w, int64_t n, int64_t n_in, mm_outputs * outputs) {
    const int64_t n_block = n_in/MM_BLOCK;
    int8_t numbers[W][MM_BLOCK] = {};
    const int8_t * q[W];
    for (int o = 0; o < W; ++o) {
        q[o] = numbers[o];
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        mm_fetch<T>(w, n_block, ib);
        mm_outputs * dst = outputs + ib;
        if (n < (int64_t) W) {
            memset(dst->scale, 0, sizeof(dst->scale));
            memset(dst->min, 0, sizeof(dst->min));
        }
        for (int64_t o = 0; o < n; ++o) {
            float scale[2];
            float min = 0.0f;
            const uint8_t * row = w + o*T::block(n_block);
            _mm256_storeu_si256((__m256i *) numbers[o], T::numbers(row, ib));
            T::scales(row, ib, scale, &min);
            for (int i = 0; i < T::N_SCALE; ++i) {
                dst->scale[i][o] = scale[i];
            }
            dst->min[o] = min;
        }
        for (int i = 0; i < MM_BLOCK/16; ++i) {
            ivec turned[4];
            i_turn(q, 16*i, turned);
            for (int j = 0; j < 4; ++j) {
                mm_store(&dst->w[0][0][0] + (4*i + j)*4*W, turned[j]);
            }
        }
    }
}

// y [MM_ROWS] of W outputs
template <typename T> static inline void mm_product(const mm_outputs * outputs, const mm_rows * rows, int64_t n_block, vec * y) {
    for (int i = 0; i < MM_ROWS; ++i) {
        y[i] = v_zero();
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        for (int part = 0; part < T::N_SCALE; ++part) {
            const int32_t * begin = rows[ib].begin[T::N_SCALE == 1 ? 0 : 1 + part];
            ivec sum[MM_ROWS];
            for (int i = 0; i < MM_ROWS; ++i) {
                sum[i] = i_set1(begin[i]);
            }
            for (int j = MM_STEPS*part/T::N_SCALE; j < MM_STEPS*(part + 1)/T::N_SCALE; ++j) {
                const ivec w = i_load(outputs[ib].w[j]);
                for (int i = 0; i < MM_ROWS; ++i) {
                    int32_t x;
                    memcpy(&x, rows[ib].x[j][i], sizeof(x));
                    sum[i] = mm_dot(sum[i], w, i_set1(x));
                }
            }
            const vec scale = v_load(outputs[ib].scale[part]);
            for (int i = 0; i < MM_ROWS; ++i) {
                y[i] = v_fma(i_to_float(sum[i]), v_mul(scale, v_set1(rows[ib].scale[i])), y[i]);
            }
        }
        if (T::HAS_MIN) {
            const vec min = v_load(outputs[ib].min);
            for (int i = 0; i < MM_ROWS; ++i) {
                y[i] = v_fma(min, v_set1(rows[ib].sum[i]), y[i]);
            }
        }
    }
}

#if defined(__AVX512VNNI__)

// What mm_gather() and mm_product() find, the same bits, without storing what rows are multiplied with: the quicker way up to FEW of them.
enum { MATMUL_TAKES_FEW = 1, FEW = 8 };

struct mm_few_rows { // a block of them
    int8_t x[FEW][MM_BLOCK];
};

// What scales() reads of W outputs, of neighbouring blocks. Copied one by one: a gather takes longer.
enum { MM_AHEAD = 8 };
struct mm_words {
    uint32_t of[MM_AHEAD][2][W];
};

static inline vec mm_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
static inline vec mm_bytes(__m512i words, int shift) { return i_to_float(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - shift), 24)); }

template <typename T> static inline void mm_copy_words(T, const uint8_t * w, int64_t n_block, int64_t ib, int64_t n, mm_words * words) {
    for (int o = 0; o < W; ++o) {
        const uint8_t * p = w + o*T::block(n_block) + T::block(ib);
        for (int64_t i = 0; i < n; ++i) {
            memcpy(&words->of[i][0][o], p + T::block(i), sizeof(uint32_t));
        }
    }
}

static inline void mm_copy_words(q6_k_matrix, const uint8_t * w, int64_t n_block, int64_t ib, int64_t n, mm_words * words) {
    for (int o = 0; o < W; ++o) {
        const uint8_t * p = w + o*q6_k_matrix::block(n_block) + q6_k_matrix::block(ib);
        memcpy(&words->of[0][0][o], p + 206, sizeof(uint32_t));
        for (int64_t i = 0; i < n; ++i) {
            uint16_t two;
            memcpy(&two, p + 192 + 2*i, sizeof(two));
            words->of[i][1][o] = two;
        }
    }
}

// d and what minima are scaled by; then the 12 bytes
template <bool FIVE> static inline void mm_copy_words(k_matrix<FIVE>, const uint8_t * w, int64_t n_block, int64_t ib, int64_t, mm_words * words) {
    const int8_t * row[W];
    for (int o = 0; o < W; ++o) {
        row[o] = (const int8_t *) w + o*k_matrix<FIVE>::block(n_block) + k_matrix<FIVE>::block(ib);
    }
    ivec turned[4];
    i_turn(row, 0, turned);
    for (int i = 0; i < 4; ++i) {
        i_store(words->of[i][0], turned[i]);
    }
}

template <typename T> static inline void mm_scales(T, const mm_words & words, int64_t i, vec * scale, vec * min) {
    const __m512i all = i_load(words.of[i][0]);
    scale[0] = mm_halves(all);
    *min = T::HAS_MIN ? mm_halves(_mm512_srli_epi32(all, 16)) : v_zero();
}

static inline void mm_scales(q6_k_matrix, const mm_words & words, int64_t i, vec * scale, vec *) {
    const vec d = mm_halves(_mm512_srli_epi32(i_load(words.of[0][0]), 16));
    const __m512i bytes = i_load(words.of[i][1]);
    scale[0] = v_mul(d, mm_bytes(bytes, 0));
    scale[1] = v_mul(d, mm_bytes(bytes, 8));
}

template <bool FIVE> static inline void mm_scales(k_matrix<FIVE>, const mm_words & words, int64_t i, vec * scale, vec * min) {
    const __m512i all  = i_load(words.of[0][0]);
    const __m128i n    = _mm_cvtsi32_si128((int) (i % 4*8));
    const __m512i s    = _mm512_srl_epi32(i_load(words.of[1][0]), n);
    const __m512i m    = _mm512_srl_epi32(i_load(words.of[2][0]), n);
    const __m512i late = _mm512_srl_epi32(i_load(words.of[3][0]), n);
    const __m512i bits_4 = i_set1(15), bits_6 = i_set1(63), above = i_set1(48);
    const __m512i s_all = i < 4 ? _mm512_and_si512(s, bits_6)
        : _mm512_or_si512(_mm512_and_si512(late, bits_4), _mm512_and_si512(_mm512_srli_epi32(s, 2), above));
    const __m512i m_all = i < 4 ? _mm512_and_si512(m, bits_6)
        : _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(late, 4), bits_4), _mm512_and_si512(_mm512_srli_epi32(m, 2), above));
    scale[0] = v_mul(mm_halves(all), i_to_float(s_all));
    *min = v_mul(mm_halves(_mm512_srli_epi32(all, 16)), i_to_float(_mm512_sub_epi32(_mm512_setzero_si512(), m_all)));
}

static inline void mm_few_gather(const mm_rows * rows, int64_t n_block, int n, mm_few_rows * few) {
    for (int64_t ib = 0; ib < n_block; ++ib) {
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < MM_STEPS; ++j) {
                memcpy(few[ib].x[i] + j*MM_STEP, rows[ib].x[j][i], MM_STEP);
            }
        }
    }
}

template <typename T, int N> static inline void mm_few_product(const uint8_t * w, const mm_few_rows * few, const mm_rows * rows, int64_t n_block, vec * y) {
    const __m512i offset = _mm512_set1_epi8((char) MM_OFFSET);
    const __m512i even = _mm512_set_epi32(27, 26, 25, 24, 11, 10,  9,  8, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i odd  = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 23, 22, 21, 20, 7, 6, 5, 4);
    mm_words words;
    for (int i = 0; i < N; ++i) {
        y[i] = v_zero();
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        __m512i numbers[W/2]; // of two outputs
        vec scale[2], min;
        mm_fetch<T>(w, n_block, ib);
        if (ib % MM_AHEAD == 0) {
            mm_copy_words(T(), w, n_block, ib, n_block - ib < (int64_t) MM_AHEAD ? n_block - ib : (int64_t) MM_AHEAD, &words);
        }
        mm_scales(T(), words, ib % MM_AHEAD, scale, &min);
        for (int o = 0; o < W/2; ++o) {
            const uint8_t * row = w + o*T::block(n_block);
            numbers[o] = _mm512_inserti64x4(_mm512_castsi256_si512(T::numbers(row, ib)), T::numbers(row + W/2*T::block(n_block), ib), 1);
            numbers[o] = _mm512_xor_si512(numbers[o], offset);
        }
        for (int i = 0; i < N; ++i) {
            const __m512i x = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) few[ib].x[i]));
            __m512i sum[W/2]; // of each fourth of a register four, whose sums come to stand beside each other
            for (int o = 0; o < W/2; ++o) {
                sum[o] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers[o], x);
            }
            for (int o = 0; o < W/2; o += 2) {
                sum[o] = i_add(i_low_32(sum[o], sum[o + 1]), i_high_32(sum[o], sum[o + 1]));
            }
            for (int o = 0; o < W/2; o += 4) {
                sum[o] = i_add(i_low_64(sum[o], sum[o + 2]), i_high_64(sum[o], sum[o + 2]));
            }
            const __m512i half[] = { _mm512_permutex2var_epi32(sum[0], even, sum[4]), _mm512_permutex2var_epi32(sum[0], odd, sum[4]) };
            for (int part = 0; part < T::N_SCALE; ++part) {
                const __m512i whole = T::N_SCALE == 1 ? i_add(half[0], half[1]) : half[part];
                const __m512i all = i_add(whole, i_set1(rows[ib].begin[T::N_SCALE == 1 ? 0 : 1 + part][i]));
                y[i] = v_fma(i_to_float(all), v_mul(scale[part], v_set1(rows[ib].scale[i])), y[i]);
            }
            if (T::HAS_MIN) {
                y[i] = v_fma(min, v_set1(rows[ib].sum[i]), y[i]);
            }
        }
    }
}

#else

enum { MATMUL_TAKES_FEW = 0, FEW = 0 };
struct mm_few_rows {};
static inline void mm_few_gather(const mm_rows *, int64_t, int, mm_few_rows *) {}
template <typename T, int N> static inline void mm_few_product(const uint8_t *, const mm_few_rows *, const mm_rows *, int64_t, vec *) {}

#endif

// W outputs of each row
template <typename T> static void mm_few_tile(const uint8_t * w, const mm_few_rows * few, const mm_rows * rows, int64_t n_block, int64_t n_row, vec * y) {
    switch (n_row) {
        case 1:  mm_few_product<T, 1>(w, few, rows, n_block, y); break;
        case 2:  mm_few_product<T, 2>(w, few, rows, n_block, y); break;
        case 3:  mm_few_product<T, 3>(w, few, rows, n_block, y); break;
        case 4:  mm_few_product<T, 4>(w, few, rows, n_block, y); break;
        case 5:
        case 6:  mm_few_product<T, 6>(w, few, rows, n_block, y); break;
        default: mm_few_product<T, 8>(w, few, rows, n_block, y);
    }
}

template <typename T> static void mm_tiles(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, mm_outputs * outputs) {
    const int64_t n_block = m.n_in/MM_BLOCK;
    const mm_rows * all = (const mm_rows *) rounded;
    mm_few_rows * few = (mm_few_rows *) outputs;
    const int64_t n_few = n_row <= (int64_t) FEW ? (end - begin)/W*W : 0; // outputs of whole tiles, if there are few rows
    if (n_few) {
        mm_few_gather(all, n_block, (int) n_row, few);
    }
    for (int64_t o = begin; o < begin + n_few; o += W) {
        vec part[MM_ROWS];
        mm_few_tile<T>(m.data + o*T::block(n_block), few, all, n_block, n_row, part);
        for (int64_t i = 0; i < n_row; ++i) {
            v_store(y + i*stride + o - begin, part[i]);
        }
    }
    for (int64_t o = begin + n_few; o < end; o += W) {
        const int64_t n = end - o < (int64_t) W ? end - o : (int64_t) W;
        mm_gather<T>(m.data + o*T::block(n_block), n, m.n_in, outputs);
        for (int64_t row = 0; row < n_row; row += MM_ROWS) {
            vec part[MM_ROWS];
            mm_product<T>(outputs, all + row/MM_ROWS*n_block, n_block, part);
            for (int i = 0; i < MM_ROWS && row + i < n_row; ++i) {
                memcpy(y + (row + i)*stride + o - begin, &part[i], n*sizeof(float));
            }
        }
    }
}

static void matmul(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    mm_outputs * outputs = (mm_outputs *) room;
    switch (m.type) {
        case QAFLORA_MATRIX_Q4_0:  mm_tiles<q4_0_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q4_1:  mm_tiles<q4_1_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q5_0:  mm_tiles<q5_0_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q4_K:  mm_tiles<q4_k_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q5_K:  mm_tiles<q5_k_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q6_K:  mm_tiles<q6_k_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q8_0:  mm_tiles<q8_0_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_OTHER: break;
    }
}

#else

enum { MATMUL_TAKES_FEW = 0 };
static size_t (* const matmul_rounded_size)(int64_t, int64_t) = nullptr;
static size_t (* const matmul_room_size)(int64_t) = nullptr;
static void (* const matmul_round)(const float *, int64_t, int64_t, void *, int, int) = nullptr;
static void (* const matmul)(const qaflora_matrix &, int64_t, int64_t, const void *, int64_t, float *, int64_t, void *) = nullptr;

#endif

} // namespace QAFLORA_ISA
