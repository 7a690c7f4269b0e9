// W x of many rows: these are rounded to 8 bits in blocks of 32, as ggml does, but that their scales stay F32.
// A tile is W outputs and MM_ROWS rows; what is summed together are 4 bytes of an output, which stand in groups beside each other.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-vec.h"

#include <math.h>

namespace QAFLORA_ISA {

#if defined(__AVX2__)

enum { MM_BLOCK = 32, MM_GROUPS = MM_BLOCK/4 };

#if defined(__AVX512F__)

typedef __m512i ivec;
enum { MM_ROWS = 12 };

static inline ivec i_set1(int32_t x)         { return _mm512_set1_epi32(x); }
static inline ivec i_load(const void * p)    { return _mm512_loadu_si512(p); }
static inline void i_store(void * p, ivec x) { _mm512_storeu_si512(p, x); }
static inline vec  i_to_float(ivec x)        { return _mm512_cvtepi32_ps(x); }
static inline ivec i_nearest(vec x)          { return _mm512_cvtps_epi32(x); }
static inline ivec i_add(ivec x, ivec y)     { return _mm512_add_epi32(x, y); }
static inline int32_t i_sum(ivec x)          { return _mm512_reduce_add_epi32(x); }
static inline void i_store_8(int8_t * p, ivec x) { _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(x)); }
static inline float v_largest(vec x, vec y)  { return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x), _mm512_abs_ps(y))); }
static inline ivec i_low_32 (ivec x, ivec y) { return _mm512_unpacklo_epi32(x, y); }
static inline ivec i_high_32(ivec x, ivec y) { return _mm512_unpackhi_epi32(x, y); }
static inline ivec i_low_64 (ivec x, ivec y) { return _mm512_unpacklo_epi64(x, y); }
static inline ivec i_high_64(ivec x, ivec y) { return _mm512_unpackhi_epi64(x, y); }

// 16 bytes from each fourth of 16 rows
static inline ivec i_load_rows(const int8_t * const * row, int64_t i) {
    ivec x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) (row[0] + i)));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[4] + i)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[8] + i)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (row[12] + i)), 3);
}

#else

typedef __m256i ivec;
enum { MM_ROWS = 6 };

static inline ivec i_set1(int32_t x)         { return _mm256_set1_epi32(x); }
static inline ivec i_load(const void * p)    { return _mm256_loadu_si256((const __m256i *) p); }
static inline void i_store(void * p, ivec x) { _mm256_storeu_si256((__m256i *) p, x); }
static inline vec  i_to_float(ivec x)        { return _mm256_cvtepi32_ps(x); }
static inline ivec i_nearest(vec x)          { return _mm256_cvtps_epi32(x); }
static inline ivec i_add(ivec x, ivec y)     { return _mm256_add_epi32(x, y); }
static inline int32_t i_sum(ivec x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline void i_store_8(int8_t * p, ivec x) {
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(s, s));
}
static inline float v_largest(vec x, vec y) {
    const vec sign = _mm256_set1_ps(-0.0f);
    const vec z = _mm256_max_ps(_mm256_andnot_ps(sign, x), _mm256_andnot_ps(sign, y));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline ivec i_low_32 (ivec x, ivec y) { return _mm256_unpacklo_epi32(x, y); }
static inline ivec i_high_32(ivec x, ivec y) { return _mm256_unpackhi_epi32(x, y); }
static inline ivec i_low_64 (ivec x, ivec y) { return _mm256_unpacklo_epi64(x, y); }
static inline ivec i_high_64(ivec x, ivec y) { return _mm256_unpackhi_epi64(x, y); }

// 16 bytes from each fourth of 8 rows
static inline ivec i_load_rows(const int8_t * const * row, int64_t i) {
    const __m128i x = _mm_loadu_si128((const __m128i *) (row[0] + i));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_loadu_si128((const __m128i *) (row[4] + i)), 1);
}

#endif

#if defined(__AVX512VNNI__)

// bytes of W are 128 too large, which sums make up for at their beginning
typedef int8_t mm_number;
enum { MM_OFFSET = 128 };

static inline int  mm_place(int step, int k)        { return 4*step + k; } // of a number in its block
static inline void mm_store(mm_number * p, ivec w) { i_store(p, _mm512_xor_si512(w, _mm512_set1_epi8((char) MM_OFFSET))); }
static inline ivec mm_dot(ivec sum, ivec w, ivec x)  { return _mm512_dpbusd_epi32(sum, w, x); }

#else

// bytes are multiplied as numbers of 16 bits, the 1st and 3rd of a group, and then the 2nd and 4th
typedef int16_t mm_number;
enum { MM_OFFSET = 0 };

static inline int mm_place(int step, int k) { return step/2*4 + step % 2 + 2*k; } // of a number in its block
#if defined(__AVX512F__)
static inline void mm_store(mm_number * p, ivec w) {
    i_store(p, _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
    i_store(p + 2*W, _mm512_srai_epi16(w, 8));
}
static inline ivec mm_dot(ivec sum, ivec w, ivec x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
#else
static inline void mm_store(mm_number * p, ivec w) {
    i_store(p, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    i_store(p + 2*W, _mm256_srai_epi16(w, 8));
}
static inline ivec mm_dot(ivec sum, ivec w, ivec x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
#endif

#endif

enum { MM_STEP = 4/sizeof(mm_number), MM_STEPS = MM_BLOCK/MM_STEP };

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

//
// how types store a block of 32 numbers: scale*number + min
//

static inline float mm_f16(const uint8_t * p) {
    uint16_t h;
    memcpy(&h, p, sizeof(h));
    return f16_to_f32(h);
}

static inline void mm_store_numbers(int8_t * q, __m128i low, __m128i high) {
    _mm_storeu_si128((__m128i *) q, low);
    _mm_storeu_si128((__m128i *) (q + 16), high);
}

// 16 bytes of two numbers each: the first 16 below, the others above
static inline __m128i mm_low_4 (__m128i x) { return _mm_and_si128(x, _mm_set1_epi8(15)); }
static inline __m128i mm_high_4(__m128i x) { return mm_low_4(_mm_srli_epi16(x, 4)); }

struct q8_0_matrix {
    enum { N_SCALE = 1, HAS_MIN = 0 };
    static size_t block(int64_t ib) { return ib*34; }
    static void   read(const uint8_t * row, int64_t ib, int8_t * q, float * scale, float *) {
        const uint8_t * p = row + block(ib);
        scale[0] = mm_f16(p);
        memcpy(q, p + 2, MM_BLOCK);
    }
};

struct q4_1_matrix {
    enum { N_SCALE = 1, HAS_MIN = 1 };
    static size_t block(int64_t ib) { return ib*20; }
    static void   read(const uint8_t * row, int64_t ib, int8_t * q, float * scale, float * min) {
        const uint8_t * p = row + block(ib);
        const __m128i x = _mm_loadu_si128((const __m128i *) (p + 4));
        scale[0] = mm_f16(p);
        min[0]   = mm_f16(p + 2);
        mm_store_numbers(q, mm_low_4(x), mm_high_4(x));
    }
};

struct q5_0_matrix {
    enum { N_SCALE = 1, HAS_MIN = 0 };
    static size_t block(int64_t ib) { return ib*22; }
    // 16 where a bit is set
    static __m128i fifth(const uint8_t * p) {
        uint16_t bits;
        memcpy(&bits, p, sizeof(bits));
        const __m128i each = _mm_set1_epi64x((int64_t) 0x8040201008040201);
        const __m128i x = _mm_shuffle_epi8(_mm_cvtsi32_si128(bits), _mm_set_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
        return _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(x, each), each), _mm_set1_epi8(16));
    }
    static void read(const uint8_t * row, int64_t ib, int8_t * q, float * scale, float *) {
        const uint8_t * p = row + block(ib);
        const __m128i x = _mm_loadu_si128((const __m128i *) (p + 6));
        const __m128i n = _mm_set1_epi8(16);
        scale[0] = mm_f16(p);
        mm_store_numbers(q, _mm_sub_epi8(_mm_or_si128(mm_low_4(x), fifth(p + 2)), n), _mm_sub_epi8(_mm_or_si128(mm_high_4(x), fifth(p + 4)), n));
    }
};

// 256 numbers: 128 bytes of 4 bits, 64 of 2 bits, 16 scales and one for all
struct q6_k_matrix {
    enum { N_SCALE = 2, HAS_MIN = 0 };
    static size_t block(int64_t ib) { return ib/8*210; }
    static void   read(const uint8_t * row, int64_t ib, int8_t * q, float * scale, float *) {
        const uint8_t * p = row + block(ib);
        const int part = (int) (ib % 8); // of the 8
        const uint8_t * low  = p + part/4*64 + part % 2*32;
        const uint8_t * high = p + 128 + part/4*32;
        const int shift = part % 4*2;
        const float d = mm_f16(p + 208);
        for (int half = 0; half < 2; ++half) {
            const __m128i x = _mm_loadu_si128((const __m128i *) (low + 16*half));
            const __m128i y = _mm_srl_epi16(_mm_loadu_si128((const __m128i *) (high + 16*half)), _mm_cvtsi32_si128(shift));
            const __m128i z = _mm_or_si128(part % 4 < 2 ? mm_low_4(x) : mm_high_4(x), _mm_slli_epi16(_mm_and_si128(y, _mm_set1_epi8(3)), 4));
            _mm_storeu_si128((__m128i *) (q + 16*half), _mm_sub_epi8(z, _mm_set1_epi8(32)));
            scale[half] = d*(float) ((const int8_t *) p)[192 + part*2 + half];
        }
    }
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

// n of W outputs; what follows them is not read, and becomes zeros
template <typename T> static void mm_gather(const uint8_t * w, int64_t n, int64_t n_in, mm_outputs * outputs) {
    const int64_t n_block = n_in/MM_BLOCK;
    int8_t numbers[W][MM_BLOCK] = {};
    const int8_t * q[W];
    for (int o = 0; o < W; ++o) {
        q[o] = numbers[o];
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        mm_outputs * dst = outputs + ib;
        if (n < (int64_t) W) {
            memset(dst->scale, 0, sizeof(dst->scale));
            memset(dst->min, 0, sizeof(dst->min));
        }
        for (int64_t o = 0; o < n; ++o) {
            float scale[2];
            float min = 0.0f;
            T::read(w + o*T::block(n_block), ib, numbers[o], scale, &min);
            for (int i = 0; i < T::N_SCALE; ++i) {
                dst->scale[i][o] = scale[i];
            }
            dst->min[o] = min;
        }
        for (int half = 0; half < 2; ++half) { // 4 x 4 groups are transposed
            const ivec x0 = i_load_rows(q,     16*half);
            const ivec x1 = i_load_rows(q + 1, 16*half);
            const ivec x2 = i_load_rows(q + 2, 16*half);
            const ivec x3 = i_load_rows(q + 3, 16*half);
            mm_number * p = &dst->w[0][0][0] + half*16*W;
            mm_store(p,        i_low_64 (i_low_32 (x0, x1), i_low_32 (x2, x3)));
            mm_store(p + 4*W,  i_high_64(i_low_32 (x0, x1), i_low_32 (x2, x3)));
            mm_store(p + 8*W,  i_low_64 (i_high_32(x0, x1), i_high_32(x2, x3)));
            mm_store(p + 12*W, i_high_64(i_high_32(x0, x1), i_high_32(x2, x3)));
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

template <typename T> static void mm_tiles(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, mm_outputs * outputs) {
    const int64_t n_block = m.n_in/MM_BLOCK;
    for (int64_t o = begin; o < end; o += W) {
        const int64_t n = end - o < (int64_t) W ? end - o : (int64_t) W;
        mm_gather<T>(m.data + o*T::block(n_block), n, m.n_in, outputs);
        for (int64_t row = 0; row < n_row; row += MM_ROWS) {
            vec part[MM_ROWS];
            mm_product<T>(outputs, (const mm_rows *) rounded + row/MM_ROWS*n_block, n_block, part);
            for (int i = 0; i < MM_ROWS && row + i < n_row; ++i) {
                memcpy(y + (row + i)*stride + o - begin, &part[i], n*sizeof(float));
            }
        }
    }
}

static void matmul(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    mm_outputs * outputs = (mm_outputs *) room;
    switch (m.type) {
        case QAFLORA_MATRIX_Q4_1:  mm_tiles<q4_1_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q5_0:  mm_tiles<q5_0_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q6_K:  mm_tiles<q6_k_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
        case QAFLORA_MATRIX_Q8_0:  mm_tiles<q8_0_matrix>(m, begin, end, rounded, n_row, y, stride, outputs); break;
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
