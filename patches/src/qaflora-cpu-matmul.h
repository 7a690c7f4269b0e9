// W x of a matrix in Q8_0: rows x are rounded to 8 bits in blocks of 32 as ggml does, but that their scales stay F32.
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

static inline int  mm_place(int j)                  { return j; }
static inline void mm_store(mm_number * p, ivec w) { i_store(p, _mm512_xor_si512(w, _mm512_set1_epi8((char) MM_OFFSET))); }
static inline ivec mm_dot(ivec sum, ivec w, ivec x)  { return _mm512_dpbusd_epi32(sum, w, x); }

#else

// bytes are multiplied as numbers of 16 bits, the 1st and 3rd of a group, and then the 2nd and 4th
typedef int16_t mm_number;
enum { MM_OFFSET = 0 };

static inline int mm_place(int j) { return j % 2*2 + j/2; }
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
    int32_t   begin[MM_ROWS]; // of a sum
    float     scale[MM_ROWS];
};

// a block of W outputs
struct mm_outputs {
    mm_number w[MM_STEPS][W][MM_STEP];
    float     scale[W];
};

static size_t matmul_rounded_size(int64_t n_row, int64_t n_in) {
    return (n_row + MM_ROWS - 1)/MM_ROWS*(n_in/MM_BLOCK)*sizeof(mm_rows);
}

static size_t matmul_room_size(int64_t n_in) {
    return n_in/MM_BLOCK*sizeof(mm_outputs);
}

static void matmul_round(const float * rows, int64_t n_row, int64_t n_in, void * rounded) {
    const int64_t n_block = n_in/MM_BLOCK;
    memset(rounded, 0, matmul_rounded_size(n_row, n_in));
    for (int64_t row = 0; row < n_row; ++row) {
        const int64_t i = row % MM_ROWS;
        for (int64_t ib = 0; ib < n_block; ++ib) {
            const float * x = rows + row*n_in + ib*MM_BLOCK;
            mm_rows * dst = (mm_rows *) rounded + row/MM_ROWS*n_block + ib;
            float largest = 0.0f;
            for (int j = 0; j < MM_BLOCK; ++j) {
                largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
            }
            const float inverse = largest > 0.0f ? 127.0f/largest : 0.0f;
            int32_t sum = 0;
            for (int j = 0; j < MM_BLOCK; ++j) {
                const int32_t q = (int32_t) nearbyintf(x[j]*inverse);
                const int place = j/4*4 + mm_place(j % 4);
                dst->x[place/MM_STEP][i][place % MM_STEP] = (mm_number) q;
                sum += q;
            }
            dst->begin[i] = -MM_OFFSET*sum;
            dst->scale[i] = largest/127.0f;
        }
    }
}

// n of W outputs; what follows them is not read, and becomes zeros
static inline void mm_gather(const uint8_t * w, int64_t n, int64_t n_block, mm_outputs * outputs) {
    enum { BYTES = 2 + MM_BLOCK };
    static const uint8_t zeros[BYTES] = {};
    for (int64_t ib = 0; ib < n_block; ++ib) {
        const int8_t * q[W];
        uint16_t scale[W];
        for (int o = 0; o < W; ++o) {
            const uint8_t * block = o < n ? w + (o*n_block + ib)*BYTES : zeros;
            memcpy(&scale[o], block, 2);
            q[o] = (const int8_t *) block + 2;
        }
        v_store(outputs[ib].scale, v_load_f16(scale));
        for (int half = 0; half < 2; ++half) { // 4 x 4 groups are transposed
            const ivec x0 = i_load_rows(q,     16*half);
            const ivec x1 = i_load_rows(q + 1, 16*half);
            const ivec x2 = i_load_rows(q + 2, 16*half);
            const ivec x3 = i_load_rows(q + 3, 16*half);
            mm_number * dst = &outputs[ib].w[0][0][0] + half*16*W;
            mm_store(dst,        i_low_64 (i_low_32 (x0, x1), i_low_32 (x2, x3)));
            mm_store(dst + 4*W,  i_high_64(i_low_32 (x0, x1), i_low_32 (x2, x3)));
            mm_store(dst + 8*W,  i_low_64 (i_high_32(x0, x1), i_high_32(x2, x3)));
            mm_store(dst + 12*W, i_high_64(i_high_32(x0, x1), i_high_32(x2, x3)));
        }
    }
}

// y [MM_ROWS] of W outputs
static inline void mm_product(const mm_outputs * outputs, const mm_rows * rows, int64_t n_block, vec * y) {
    for (int i = 0; i < MM_ROWS; ++i) {
        y[i] = v_zero();
    }
    for (int64_t ib = 0; ib < n_block; ++ib) {
        ivec sum[MM_ROWS];
        for (int i = 0; i < MM_ROWS; ++i) {
            sum[i] = i_set1(rows[ib].begin[i]);
        }
        for (int j = 0; j < MM_STEPS; ++j) {
            const ivec w = i_load(outputs[ib].w[j]);
            for (int i = 0; i < MM_ROWS; ++i) {
                int32_t x;
                memcpy(&x, rows[ib].x[j][i], sizeof(x));
                sum[i] = mm_dot(sum[i], w, i_set1(x));
            }
        }
        const vec scale = v_load(outputs[ib].scale);
        for (int i = 0; i < MM_ROWS; ++i) {
            y[i] = v_fma(i_to_float(sum[i]), v_mul(scale, v_set1(rows[ib].scale[i])), y[i]);
        }
    }
}

static void matmul(const uint8_t * w, int64_t n_out, int64_t n_in, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room) {
    const int64_t n_block = n_in/MM_BLOCK;
    mm_outputs * outputs = (mm_outputs *) room;
    for (int64_t o = 0; o < n_out; o += W) {
        const int64_t n = n_out - o < (int64_t) W ? n_out - o : (int64_t) W;
        mm_gather(w + o*n_block*(2 + MM_BLOCK), n, n_block, outputs);
        for (int64_t row = 0; row < n_row; row += MM_ROWS) {
            vec part[MM_ROWS];
            mm_product(outputs, (const mm_rows *) rounded + row/MM_ROWS*n_block, n_block, part);
            for (int i = 0; i < MM_ROWS && row + i < n_row; ++i) {
                memcpy(y + (row + i)*stride + o, &part[i], n*sizeof(float));
            }
        }
    }
}

#else

static size_t (* const matmul_rounded_size)(int64_t, int64_t) = nullptr;
static size_t (* const matmul_room_size)(int64_t) = nullptr;
static void (* const matmul_round)(const float *, int64_t, int64_t, void *) = nullptr;
static void (* const matmul)(const uint8_t *, int64_t, int64_t, const void *, int64_t, float *, int64_t, void *) = nullptr;

#endif

} // namespace QAFLORA_ISA
