// Whole numbers of 8 bits in vectors, and matrices of the base as their types store them.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-vec.h"

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

// 16 bytes of W rows from i on: turned[j] has the bytes 4*j to 4*j + 3 of each
static inline void i_turn(const int8_t * const * row, int64_t i, ivec * turned) {
    const ivec x0 = i_load_rows(row,     i);
    const ivec x1 = i_load_rows(row + 1, i);
    const ivec x2 = i_load_rows(row + 2, i);
    const ivec x3 = i_load_rows(row + 3, i);
    turned[0] = i_low_64 (i_low_32 (x0, x1), i_low_32 (x2, x3));
    turned[1] = i_high_64(i_low_32 (x0, x1), i_low_32 (x2, x3));
    turned[2] = i_low_64 (i_high_32(x0, x1), i_high_32(x2, x3));
    turned[3] = i_high_64(i_high_32(x0, x1), i_high_32(x2, x3));
}

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

//
// how types store a block of 32 numbers: scale*number + min
//

static inline float mm_f16(const uint8_t * p) {
    uint16_t h;
    memcpy(&h, p, sizeof(h));
    return f16_to_f32(h);
}

static inline __m256i mm_join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

// 16 bytes of two numbers each: the first 16 below, the others above
static inline __m128i mm_low_4 (__m128i x) { return _mm_and_si128(x, _mm_set1_epi8(15)); }
static inline __m128i mm_high_4(__m128i x) { return mm_low_4(_mm_srli_epi16(x, 4)); }

// numbers of a block, signed; its scale, or that of each half; and what the numbers begin at
struct q8_0_matrix {
    enum { N_SCALE = 1, HAS_MIN = 0 };
    static size_t  block(int64_t ib) { return ib*34; }
    static __m256i numbers(const uint8_t * row, int64_t ib) { return _mm256_loadu_si256((const __m256i *) (row + block(ib) + 2)); }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float *) { scale[0] = mm_f16(row + block(ib)); }
};

struct q4_0_matrix {
    enum { N_SCALE = 1, HAS_MIN = 0 };
    static size_t  block(int64_t ib) { return ib*18; }
    static __m256i numbers(const uint8_t * row, int64_t ib) {
        const __m128i x = _mm_loadu_si128((const __m128i *) (row + block(ib) + 2));
        return _mm256_sub_epi8(mm_join(mm_low_4(x), mm_high_4(x)), _mm256_set1_epi8(8));
    }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float *) { scale[0] = mm_f16(row + block(ib)); }
};

struct q4_1_matrix {
    enum { N_SCALE = 1, HAS_MIN = 1 };
    static size_t  block(int64_t ib) { return ib*20; }
    static __m256i numbers(const uint8_t * row, int64_t ib) {
        const __m128i x = _mm_loadu_si128((const __m128i *) (row + block(ib) + 4));
        return mm_join(mm_low_4(x), mm_high_4(x));
    }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float * min) {
        scale[0] = mm_f16(row + block(ib));
        min[0]   = mm_f16(row + block(ib) + 2);
    }
};

struct q5_0_matrix {
    enum { N_SCALE = 1, HAS_MIN = 0 };
    static size_t  block(int64_t ib) { return ib*22; }
    // 16 less where the fifth bit of a number is not set
    static __m256i fifth(const uint8_t * p) {
        int32_t bits;
        memcpy(&bits, p, sizeof(bits));
        const __m256i each = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
        const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
        const __m256i x = _mm256_andnot_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), each);
        return _mm256_and_si256(_mm256_cmpeq_epi8(x, each), _mm256_set1_epi8(-16));
    }
    static __m256i numbers(const uint8_t * row, int64_t ib) {
        const uint8_t * p = row + block(ib);
        const __m128i x = _mm_loadu_si128((const __m128i *) (p + 6));
        return _mm256_or_si256(mm_join(mm_low_4(x), mm_high_4(x)), fifth(p + 2));
    }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float *) { scale[0] = mm_f16(row + block(ib)); }
};

// 256 numbers: a scale and one of minima for all; for each of 8 blocks 6 bits of both, in 12 bytes; for FIVE bits the fifth
// ones; then 128 bytes of 4 bits
template <bool FIVE> struct k_matrix {
    enum { N_SCALE = 1, HAS_MIN = 1 };
    static size_t  block(int64_t ib) { return ib/8*(FIVE ? 176 : 144); }
    static __m256i numbers(const uint8_t * row, int64_t ib) {
        const uint8_t * p = row + block(ib) + 16;
        const int part = (int) (ib % 8);
        const __m256i x = _mm256_loadu_si256((const __m256i *) (p + (FIVE ? 32 : 0) + part/2*32));
        const __m256i low = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(part % 2*4)), _mm256_set1_epi8(15));
        if (!FIVE) {
            return low;
        }
        const __m256i y = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *) p), _mm_cvtsi32_si128(part));
        return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(y, _mm256_set1_epi8(1)), 4));
    }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float * min) {
        const uint8_t * p = row + block(ib);
        const uint8_t * q = p + 4 + ib % 4;
        const bool is_late = ib % 8 > 3; // 4 bits of it are in the last bytes, and 2 above those of an early one
        scale[0] = mm_f16(p)*(float) (is_late ? (q[8] & 15) | q[0] >> 6 << 4 : q[0] & 63);
        min[0]   = mm_f16(p + 2)*(float) -(is_late ? q[8] >> 4 | q[4] >> 6 << 4 : q[4] & 63);
    }
};

typedef k_matrix<false> q4_k_matrix;
typedef k_matrix<true>  q5_k_matrix;

// 256 numbers: 128 bytes of 4 bits, 64 of 2 bits, 16 scales and one for all
struct q6_k_matrix {
    enum { N_SCALE = 2, HAS_MIN = 0 };
    static size_t  block(int64_t ib) { return ib/8*210; }
    static __m256i numbers(const uint8_t * row, int64_t ib) {
        const uint8_t * p = row + block(ib);
        const int part = (int) (ib % 8); // of the 8
        const __m256i x = _mm256_loadu_si256((const __m256i *) (p + part/4*64 + part % 2*32));
        const __m256i y = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *) (p + 128 + part/4*32)), _mm_cvtsi32_si128(part % 4*2));
        const __m256i low = _mm256_and_si256(part % 4 < 2 ? x : _mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
        const __m256i z = _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(y, _mm256_set1_epi8(3)), 4));
        return _mm256_sub_epi8(z, _mm256_set1_epi8(32));
    }
    static void    scales(const uint8_t * row, int64_t ib, float * scale, float *) {
        const uint8_t * p = row + block(ib);
        const float d = mm_f16(p + 208);
        for (int half = 0; half < 2; ++half) {
            scale[half] = d*(float) ((const int8_t *) p)[192 + ib % 8*2 + half];
        }
    }
};

#endif

} // namespace QAFLORA_ISA
