// W x of many rows: these are rounded to 8 bits in blocks of 32, as ggml does, but that their scales stay F32.
// A tile is W outputs and MM_ROWS rows, or one alone. What is summed together are 4 bytes of an output, a group: on x86 groups
// of W outputs stand beside each other, on ARM those of one output.
// A row's outputs are the same bits whatever other rows there are.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-matrix.h"

namespace QAFLORA_ISA {

#if defined(QAFLORA_HAS_PRODUCTS)

// a block of R rows
template <int R> struct alignas(16) mm_rows {
    enum { PAIR = R > 1 ? MM_PAIR : 1 };
    int8_t    x[MM_GROUPS/MM_RUN][R][MM_RUN][4];
    int32_t   begin[3][R]; // sums over the block, and over its halves, times -1
    float     scale[R];
    float     sum[R];      // of the rounded numbers
};

// Bytes of W [MM_GROUPS] less OFFSET times bytes of PAIR rows from row i on, the groups from begin to end: sum [PAIR]
#if defined(__aarch64__)

template <typename T, int R> static V_INLINE void mm_dots(ivec * sum, const ivec * w, const mm_rows<R> & rows, int i, int begin, int end) {
    const int8x16_t less = vdupq_n_s8(-T::OFFSET);
    ivec first = i_set1(0); // what each sum begins at
    ivec part[W];
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if (R > 1) { // two outputs and two rows at once
        int8x16_t x[MM_GROUPS/2];
        for (int j = begin/2; j < end/2; ++j) {
            x[j] = vld1q_s8(rows.x[j][i][0]);
            first = T::OFFSET == 0 ? first : vmmlaq_s32(first, less, x[j]);
        }
        for (int o = 0; o < W; o += 2) {
            part[o] = first;
            for (int j = begin; j < end; j += 4) {
                part[o] = vmmlaq_s32(part[o], i_numbers(i_low_64 (w[j + o], w[j + o + 1])), x[j/2]);
                part[o] = vmmlaq_s32(part[o], i_numbers(i_high_64(w[j + o], w[j + o + 1])), x[j/2 + 1]);
            }
        }
        sum[0] = vuzp1q_s32(part[0], part[2]);
        sum[1] = vuzp2q_s32(part[0], part[2]);
        return;
    }
#endif
    int8x16_t x[MM_GROUPS/4];
    for (int j = begin/4; j < end/4; ++j) {
        x[j] = vld1q_s8(rows.x[4*j/MM_RUN][i][4*j % MM_RUN]);
        first = T::OFFSET == 0 ? first : vdotq_s32(first, less, x[j]);
    }
    for (int o = 0; o < W; ++o) {
        part[o] = first;
        for (int j = begin; j < end; j += 4) {
            part[o] = vdotq_s32(part[o], i_numbers(w[j + o]), x[j/4]);
        }
    }
    *sum = vpaddq_s32(vpaddq_s32(part[0], part[1]), vpaddq_s32(part[2], part[3]));
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
static inline ivec mm_add(ivec sum, ivec part) { return i_add(sum, V_OF(madd_epi16)(part, V_OF(set1_epi16)(1))); }
template <typename T> static inline ivec mm_dot(ivec part, ivec w, ivec x) {
    if (T::IS_SIGNED) {
#if defined(__AVX512F__)
        x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), i_set1(0), x);
#else
        x = _mm256_sign_epi8(x, w);
#endif
        w = V_OF(abs_epi8)(w);
    }
    return V_OF(add_epi16)(part, V_OF(maddubs_epi16)(w, x));
}

#endif

// group j of row i, for each of W outputs
template <int R> static inline ivec mm_group(const mm_rows<R> & rows, int j, int i) {
    int32_t x;
    memcpy(&x, rows.x[j][i][0], sizeof(x));
    return i_set1(x);
}

template <typename T, int R> static V_INLINE void mm_dots(ivec * sum, const ivec * w, const mm_rows<R> & rows, int i, int begin, int end) {
    enum { N_ADDED = mm_n_added<T>::N };
    *sum = i_set1(T::OFFSET*rows.begin[T::N_SCALE == 1 ? 0 : 1 + 2*begin/MM_GROUPS][i]);
    for (int j = begin; j < end; j += N_ADDED) {
        ivec added = mm_part(*sum);
        for (int k = j; k < j + N_ADDED; ++k) {
            added = mm_dot<T>(added, w[k], mm_group(rows, k, i));
        }
        *sum = mm_add(*sum, added);
    }
}

#endif

// what a block of W outputs is multiplied with
struct mm_outputs {
    ivec numbers[MM_GROUPS];
    vec  scale[2]; // of each half, if they have their own
    vec  min;      // what the numbers begin at, if not 0
};

static size_t matmul_rounded_size(int64_t n_row, int64_t n_in) {
    const int64_t n_block = n_in/MM_BLOCK;
    return n_row == 1 ? n_block*sizeof(mm_rows<1>) : (n_row + MM_ROWS - 1)/MM_ROWS*n_block*sizeof(mm_rows<MM_ROWS>);
}

static size_t matmul_room_size(int64_t n_in) {
    return alignof(mm_outputs) + n_in/MM_BLOCK*(sizeof(mm_outputs) + W*36); // and what W outputs have in a file, at most
}

template <int R> static inline void mm_round_block(const float * x, int64_t i, mm_rows<R> * dst) {
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
        memcpy(dst->x[j/MM_RUN][i][j % MM_RUN], q + 4*j, 4);
    }
    dst->begin[0][i] = -(half[0] + half[1]);
    dst->begin[1][i] = -half[0];
    dst->begin[2][i] = -half[1];
    dst->scale[i] = largest/127.0f;
    dst->sum[i] = dst->scale[i]*(float) (half[0] + half[1]);
}

template <int R> static void mm_round(const float * x, int64_t n_row, int64_t n_in, mm_rows<R> * rounded, int ith, int nth) {
    const int64_t n_block = n_in/MM_BLOCK;
    const int64_t n_tile  = (n_row + R - 1)/R;
    for (int64_t tile = n_tile*ith/nth; tile < n_tile*(ith + 1)/nth; ++tile) {
        mm_rows<R> * dst = rounded + tile*n_block;
        const int64_t n = n_row - tile*R < (int64_t) R ? n_row - tile*R : (int64_t) R;
        if (n < (int64_t) R) {
            memset(dst, 0, n_block*sizeof(mm_rows<R>));
        }
        for (int64_t ib = 0; ib < n_block; ++ib) {
            for (int64_t i = 0; i < n; ++i) {
                mm_round_block(x + (tile*R + i)*n_in + ib*MM_BLOCK, i, dst + ib);
            }
        }
    }
}

static void matmul_round(const float * x, int64_t n_row, int64_t n_in, void * rounded, int ith, int nth) {
    if (n_row == 1) {
        mm_round(x, n_row, n_in, (mm_rows<1> *) rounded, ith, nth);
    } else {
        mm_round(x, n_row, n_in, (mm_rows<MM_ROWS> *) rounded, ith, nth);
    }
}

// Read ahead what W outputs have for a block, of the W outputs that follow: so many rows in turn no hardware foresees. It is
// too much for the smallest cache.
template <typename T> static inline void mm_fetch(const uint8_t * w, int64_t n_block, int64_t ib) {
    const int64_t n_byte = W > 4 ? W*T::block(8)/8 : 0; // of a block
    for (int64_t i = n_byte*ib/64*64; i < n_byte*(ib + 1); i += 64) { // lines of the cache
        v_prefetch_second(w + W*T::block(n_block) + i);
    }
}

// so many of n_block blocks are copied at once from block ib on; on ARM that is known, and what a part needs
#if !defined(__aarch64__)
#define MM_UNROLL
template <typename T> static inline int mm_n_part(int64_t n_block, int64_t ib) { return n_block - ib < (int64_t) T::N_AHEAD ? (int) (n_block - ib) : (int) T::N_AHEAD; }
#else
#if defined(__clang__)
#define MM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MM_UNROLL _Pragma("GCC unroll 8")
#endif
template <typename T> static inline int mm_n_part(int64_t, int64_t) { return T::N_AHEAD; }
#endif

// W outputs block by block: use(number of the block, block) returns something that the next block is read after
template <typename T, typename F> static V_INLINE void mm_take(const uint8_t * w, int64_t n_block, const F & use) {
    const size_t stride = T::block(n_block);
    ivec kept[T::N_KEPT] = {};
    for (int64_t ib = 0; ib < n_block; ib += T::N_AHEAD) {
        mm_source source = mm_outputs_at(w + T::block(ib), stride);
        const int n_part = mm_n_part<T>(n_block, ib);
        mm_words words;
        T::copy(source, n_part, words);
        MM_UNROLL
        for (int part = 0; part < n_part; ++part) {
            mm_outputs block;
            block.scale[1] = v_set1(0.0f);
            block.min      = v_set1(0.0f);
            mm_fetch<T>(w, n_block, ib + part);
            T::numbers(source, part, words, kept, block.numbers);
            T::scales(words, part, block.scale, &block.min);
            mm_wait(source, use(ib + part, block));
        }
    }
}

// adds a block of W outputs to y [N]
template <typename T, int N, int R> static V_INLINE void mm_block(const mm_outputs & block, const mm_rows<R> & rows, vec * y) {
    enum { PAIR = mm_rows<R>::PAIR };
    for (int i = 0; i < N; i += PAIR) {
        const int n = N - i < (int) PAIR ? N - i : (int) PAIR;
        for (int part = 0; part < T::N_SCALE; ++part) {
            ivec sum[PAIR];
            mm_dots<T>(sum, block.numbers, rows, i, MM_GROUPS*part/T::N_SCALE, MM_GROUPS*(part + 1)/T::N_SCALE);
            for (int p = 0; p < n; ++p) {
                y[i + p] = v_fma(i_to_float(sum[p]), v_mul(block.scale[part], v_set1(rows.scale[i + p])), y[i + p]);
            }
        }
        for (int p = 0; p < n && T::HAS_MIN; ++p) {
            y[i + p] = v_fma(block.min, v_set1(rows.sum[i + p]), y[i + p]);
        }
    }
}

// y [N] of W outputs
template <typename T, int N> static inline void mm_product(const mm_outputs * outputs, const mm_rows<MM_ROWS> * rows, int64_t n_block, vec * y) {
    vec sum[N] = {};
    for (int64_t ib = 0; ib < n_block; ++ib) {
        const mm_outputs block = outputs[ib]; // in registers
        mm_block<T, N>(block, rows[ib], sum);
    }
    memcpy(y, sum, sizeof(sum));
}

// What mm_product() finds, the same bits, without storing what rows are multiplied with: the quicker way up to FEW of them.
template <typename T, int N, int R> static inline void mm_few_product(const uint8_t * w, const mm_rows<R> * rows, int64_t n_block, vec * y) {
    vec sum[N] = {};
    mm_take<T>(w, n_block, [rows, &sum](int64_t ib, const mm_outputs & block) {
        mm_block<T, N>(block, rows[ib], sum);
        return sum[0];
    });
    memcpy(y, sum, sizeof(sum));
}

#if defined(__aarch64__)
enum { FEW = 3 };
#else
enum { FEW = MM_ROWS };
#endif

// W outputs of each row, of N at most
template <typename T, int N> static void mm_few_tile(const uint8_t * w, const void * rounded, int64_t n_block, int64_t n_row, vec * y) {
    if constexpr (N > 1) {
        if (n_row < N) {
            mm_few_tile<T, N - 1>(w, rounded, n_block, n_row, y);
            return;
        }
    }
    mm_few_product<T, N>(w, (const mm_rows<N == 1 ? 1 : MM_ROWS> *) rounded, n_block, y);
}

template <typename T> static void mm_tiles(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    const int64_t n_block = m.n_in/MM_BLOCK;
    const mm_rows<MM_ROWS> * all = (const mm_rows<MM_ROWS> *) rounded;
    mm_outputs * outputs = (mm_outputs *) (((uintptr_t) room + alignof(mm_outputs) - 1)/alignof(mm_outputs)*alignof(mm_outputs));
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
            mm_take<T>(w, n_block, [outputs](int64_t ib, const mm_outputs & block) {
                outputs[ib] = block;
                return block.min;
            });
        }
        for (int64_t row = 0; row < n_row; row += MM_ROWS) {
            vec part[MM_ROWS];
            if (n_row <= (int64_t) FEW) {
                mm_few_tile<T, FEW>(w, rounded, n_block, n_row, part);
            } else if (n_row - row <= MM_ROWS/2) {
                mm_product<T, MM_ROWS/2>(outputs, all + row/MM_ROWS*n_block, n_block, part);
            } else {
                mm_product<T, MM_ROWS>(outputs, all + row/MM_ROWS*n_block, n_block, part);
            }
            for (int i = 0; i < MM_ROWS && row + i < n_row; ++i) {
                float * dst = y + (row + i)*stride + o - begin;
                if (n == (int64_t) W) {
                    v_store(dst, part[i]);
                } else {
                    memcpy(dst, &part[i], n*sizeof(float));
                }
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
