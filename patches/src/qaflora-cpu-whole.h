// Whole numbers of 8 bits in vectors, and bytes of W outputs as they are multiplied.

#pragma once

#include "qaflora-cpu-vec.h"

namespace QAFLORA_ISA {

#if defined(__AVX2__) || (defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD))
#define QAFLORA_HAS_PRODUCTS

enum { MM_BLOCK = 32, MM_GROUPS = MM_BLOCK/4 };

// W outputs of a matrix
struct mm_source {
#if defined(__aarch64__)
    const uint8_t * row[W];
#else
    const uint8_t * first;
    size_t          stride;
#endif
};

#if defined(__aarch64__)

typedef int32x4_t ivec;
#if defined(__ARM_FEATURE_MATMUL_INT8)
enum { MM_ROWS = 8, MM_PAIR = 2, MM_RUN = 2, MM_AHEAD = 1, MM_KEEPS = 0 };
#else
enum { MM_ROWS = 8, MM_PAIR = 1, MM_RUN = MM_GROUPS, MM_AHEAD = 1, MM_KEEPS = 0 };
#endif

static inline ivec       i_of(uint8x16_t x)  { return vreinterpretq_s32_u8(x); }
static inline uint8x16_t i_bytes(ivec x)     { return vreinterpretq_u8_s32(x); }
static inline uint32x4_t i_bits(ivec x)      { return vreinterpretq_u32_s32(x); }
static inline int64x2_t  i_long(ivec x)      { return vreinterpretq_s64_s32(x); }
static inline int8x16_t  i_numbers(ivec x)   { return vreinterpretq_s8_s32(x); }

static inline ivec i_set1(int32_t x)         { return vdupq_n_s32(x); }
static inline ivec i_load(const void * p)    { return i_of(vld1q_u8((const uint8_t *) p)); }
static inline void i_store(void * p, ivec x) { vst1q_u8((uint8_t *) p, i_bytes(x)); }
static inline vec  i_to_float(ivec x)        { return vcvtq_f32_s32(x); }
static inline ivec i_nearest(vec x)          { return vcvtnq_s32_f32(x); }
static inline ivec i_add(ivec x, ivec y)     { return vaddq_s32(x, y); }
static inline int32_t i_sum(ivec x)          { return vaddvq_s32(x); }
static inline void i_store_8(int8_t * p, ivec x) {
    const int16x4_t narrow = vmovn_s32(x);
    vst1_lane_s32((int32_t *) p, vreinterpret_s32_s8(vmovn_s16(vcombine_s16(narrow, narrow))), 0);
}
static inline float v_largest(vec x, vec y)  { return vmaxvq_f32(vmaxq_f32(vabsq_f32(x), vabsq_f32(y))); }
static inline ivec i_low_32 (ivec x, ivec y) { return vzip1q_s32(x, y); }
static inline ivec i_high_32(ivec x, ivec y) { return vzip2q_s32(x, y); }
static inline ivec i_low_64 (ivec x, ivec y) { return vreinterpretq_s32_s64(vzip1q_s64(i_long(x), i_long(y))); }
static inline ivec i_high_64(ivec x, ivec y) { return vreinterpretq_s32_s64(vzip2q_s64(i_long(x), i_long(y))); }
static inline ivec i_left (ivec x, int n)    { return x << n; }
static inline ivec i_right(ivec x, int n)    { return vreinterpretq_s32_u32(i_bits(x) >> n); }
static inline ivec i_shift(ivec x, int n)    { return n < 0 ? i_left(x, -n) : i_right(x, n); }
static inline ivec i_signed(ivec x, int n)   { return x >> n; }
static inline vec  i_halves(ivec x)          { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(i_bits(x)))); }

static V_INLINE mm_source mm_outputs_at(const uint8_t * w, size_t stride) {
    mm_source source = { { w, w + stride, w + 2*stride, w + 3*stride } };
    for (int o = 0; o < W; ++o) {
        __asm__("" : "+r"(source.row[o])); // an address of its own: what follows are offsets in loads
    }
    return source;
}

// what is loaded after this stands behind what is summed before: there are not registers enough for both
static V_INLINE void mm_wait(mm_source & w, vec sum) {
    for (int o = 0; o < W; ++o) {
        __asm__("" : "+r"(w.row[o]) : "w"(sum));
    }
}

static V_INLINE const uint8_t * mm_row(const mm_source & w, int o) { return w.row[o]; }

// 16 bytes of row i
static inline ivec i_load_rows(const mm_source & w, size_t at, int i) { return i_load(w.row[i] + at); }

#else

#if defined(__AVX512F__)

typedef __m512i ivec;
enum { MM_ROWS = 12, MM_PAIR = 1, MM_RUN = 1, MM_AHEAD = 8, MM_KEEPS = 1 };

static inline ivec i_load(const void * p)    { return _mm512_loadu_si512(p); }
static inline void i_store(void * p, ivec x) { _mm512_storeu_si512(p, x); }
static inline int32_t i_sum(ivec x)          { return _mm512_reduce_add_epi32(x); }
static inline void i_store_8(int8_t * p, ivec x) { _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(x)); }
static inline float v_largest(vec x, vec y)  { return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x), _mm512_abs_ps(y))); }
static inline ivec i_shift(ivec x, int n)    { return _mm512_rorv_epi32(x, _mm512_set1_epi32(n)); } // left if n < 0; other bits are of no use
static inline vec  i_halves(ivec x)          { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); } // the lower ones, as F16

// bytes of every lane: its byte i four times
static inline ivec i_byte(ivec x, int i) {
    const ivec first = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return _mm512_shuffle_epi8(x, _mm512_add_epi32(first, _mm512_set1_epi32(i*0x01010101)));
}

// x + 16 in bytes whose bit of each is set
static inline ivec i_fifth(ivec x, ivec bits, ivec each) {
    return _mm512_mask_add_epi8(x, _mm512_test_epi8_mask(bits, each), x, _mm512_set1_epi8(16));
}

// 16 bytes from each fourth of 16 rows, from row i on
static inline ivec i_load_rows(const mm_source & w, size_t at, int i) {
    const uint8_t * p = w.first + i*w.stride + at;
    ivec x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 4*w.stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 8*w.stride)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 12*w.stride)), 3);
}

#else

typedef __m256i ivec;
enum { MM_ROWS = 6, MM_PAIR = 1, MM_RUN = 1, MM_AHEAD = 8, MM_KEEPS = 1 };

static inline ivec i_load(const void * p)    { return _mm256_loadu_si256((const __m256i *) p); }
static inline void i_store(void * p, ivec x) { _mm256_storeu_si256((__m256i *) p, x); }
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
    return v_top(_mm256_max_ps(_mm256_andnot_ps(sign, x), _mm256_andnot_ps(sign, y)));
}
static inline ivec i_shift(ivec x, int n) {
    return n < 0 ? _mm256_sllv_epi32(x, _mm256_set1_epi32(-n)) : _mm256_srlv_epi32(x, _mm256_set1_epi32(n));
}
static inline vec  i_halves(ivec x) {
    x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
static inline ivec i_byte(ivec x, int i) {
    const ivec first = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return _mm256_shuffle_epi8(x, _mm256_add_epi32(first, _mm256_set1_epi32(i*0x01010101)));
}
static inline ivec i_fifth(ivec x, ivec bits, ivec each) {
    return _mm256_or_si256(x, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bits, each), each), _mm256_set1_epi8(16)));
}

// 16 bytes from each half of 8 rows, from row i on
static inline ivec i_load_rows(const mm_source & w, size_t at, int i) {
    const uint8_t * p = w.first + i*w.stride + at;
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_loadu_si128((const __m128i *) (p + 4*w.stride)), 1);
}

#endif

static inline ivec i_set1(int32_t x)         { return V_OF(set1_epi32)(x); }
static inline vec  i_to_float(ivec x)        { return V_OF(cvtepi32_ps)(x); }
static inline ivec i_nearest(vec x)          { return V_OF(cvtps_epi32)(x); }
static inline ivec i_add(ivec x, ivec y)     { return V_OF(add_epi32)(x, y); }
static inline ivec i_low_32 (ivec x, ivec y) { return V_OF(unpacklo_epi32)(x, y); }
static inline ivec i_high_32(ivec x, ivec y) { return V_OF(unpackhi_epi32)(x, y); }
static inline ivec i_low_64 (ivec x, ivec y) { return V_OF(unpacklo_epi64)(x, y); }
static inline ivec i_high_64(ivec x, ivec y) { return V_OF(unpackhi_epi64)(x, y); }
static inline ivec i_left (ivec x, int n)    { return V_OF(sllv_epi32)(x, V_OF(set1_epi32)(n)); }
static inline ivec i_right(ivec x, int n)    { return V_OF(srlv_epi32)(x, V_OF(set1_epi32)(n)); }
static inline ivec i_signed(ivec x, int n)   { return V_OF(srav_epi32)(x, V_OF(set1_epi32)(n)); } // to the right

#endif

static inline ivec i_and(ivec x, ivec y)     { return x & y; }
static inline ivec i_or (ivec x, ivec y)     { return x | y; }

// 16 bytes of W rows: turned[j] has the bytes 4*j to 4*j + 3 of each
static V_INLINE void i_turn(const mm_source & w, size_t at, ivec * turned) {
    const ivec x0 = i_load_rows(w, at, 0);
    const ivec x1 = i_load_rows(w, at, 1);
    const ivec x2 = i_load_rows(w, at, 2);
    const ivec x3 = i_load_rows(w, at, 3);
    turned[0] = i_low_64 (i_low_32 (x0, x1), i_low_32 (x2, x3));
    turned[1] = i_high_64(i_low_32 (x0, x1), i_low_32 (x2, x3));
    turned[2] = i_low_64 (i_high_32(x0, x1), i_high_32(x2, x3));
    turned[3] = i_high_64(i_high_32(x0, x1), i_high_32(x2, x3));
}

#if defined(__aarch64__)

// 16 bytes of W rows as they are multiplied: of a row each
static V_INLINE void mm_bytes(const mm_source & w, size_t at, ivec * n) {
    for (int o = 0; o < W; ++o) {
        n[o] = i_load_rows(w, at, o);
    }
}

// four bits of each byte: the lower ones, or those above
static V_INLINE ivec mm_four(ivec x, int above) { return above ? i_of(vshrq_n_u8(i_bytes(x), 4)) : i_and(x, i_set1(0x0f0f0f0f)); }

// these, and above them the bits of more from bit place on that the mask leaves
static V_INLINE ivec mm_join(ivec x, int above, ivec more, int place, int mask) {
    if (above) {
        return i_of(vsriq_n_u8(i_bytes(i_and(i_shift(more, place - 4), i_set1(mask))), i_bytes(x), 4));
    }
    return i_and(i_of(vsliq_n_u8(i_bytes(x), i_bytes(more) >> place, 4)), i_set1(mask | 0x0f0f0f0f));
}

// fifth bits of 32 numbers of W rows
static V_INLINE void mm_fifths(ivec bits, ivec * n) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    for (int j = 0; j < MM_GROUPS; ++j) {
        const int first = j % W*4 + j/W*2;
        const uint8x16_t byte = vqtbl1q_u8(i_bytes(bits), vcombine_u8(vdup_n_u8(first), vdup_n_u8(first + 1)));
        n[j] = i_or(n[j], i_of(vandq_u8(vtstq_u8(byte, bit), vdupq_n_u8(16))));
    }
}

#else

// 16 bytes of W rows as they are multiplied: 4 of each row beside each other
static V_INLINE void mm_bytes(const mm_source & w, size_t at, ivec * n) { i_turn(w, at, n); }

static V_INLINE mm_source mm_outputs_at(const uint8_t * w, size_t stride) { return { w, stride }; }
static V_INLINE const uint8_t * mm_row(const mm_source & w, int o)        { return w.first + o*w.stride; }
static V_INLINE void mm_wait(mm_source &, vec)                            {}

static V_INLINE ivec mm_four(ivec x, int above) { return i_and(i_right(x, above*4), i_set1(0x0f0f0f0f)); }

static V_INLINE ivec mm_join(ivec x, int above, ivec more, int place, int mask) {
    return i_or(mm_four(x, above), i_and(i_shift(more, place - 4), i_set1(mask)));
}

static V_INLINE void mm_fifths(ivec bits, ivec * n) {
    for (int j = 0; j < MM_GROUPS; j += 2) {
        const ivec byte = i_byte(bits, j/2);
        n[j]     = i_fifth(n[j],     byte, i_set1(0x08040201));
        n[j + 1] = i_fifth(n[j + 1], byte, i_set1((int32_t) 0x80402010));
    }
}

#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
enum { MM_HALF = 128 }; // bytes of W have no sign
static V_INLINE ivec mm_unsigned(ivec w) { return w ^ i_set1((int32_t) 0x80808080); }
#else
enum { MM_HALF = 0 };
static V_INLINE ivec mm_unsigned(ivec w) { return w; }
#endif

#endif

} // namespace QAFLORA_ISA
