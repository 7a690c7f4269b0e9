// Vectors of W floats, of the instruction set that a file is compiled for; see qaflora-cpu-isa.h.
// v_load_i4: from the o-th on of 32 numbers, where byte j has number j below and j + 16 above, each 8 too large

#pragma once

#include "qaflora-cpu.h"

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace QAFLORA_ISA {

static inline float bf16_to_f32(uint16_t h) {
    const uint32_t bits = (uint32_t) h << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

#if defined(__AVX2__)

#if defined(__AVX512F__)

#define V_OF(name) _mm512_##name
enum { W = 16 };
typedef __m512 vec;

static inline float v_sum(vec x)                 { return _mm512_reduce_add_ps(x); }
static inline vec   v_load_f16(const uint16_t * p)  { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vec   v_load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
static inline vec   v_load_i8(const int8_t * p)  { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
static inline vec   v_load_i4(const uint8_t * p, int o) {
    const __m128i q = _mm_loadu_si128((const __m128i *) p);
    const __m128i u = _mm_and_si128(o ? _mm_srli_epi16(q, 4) : q, _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(u, _mm_set1_epi8(8))));
}

// x[0] y[0] x[1] y[1] ..: its first half and its second
static inline void  v_interleave(vec x, vec y, vec & first, vec & second) {
    first  = _mm512_permutex2var_ps(x, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), y);
    second = _mm512_permutex2var_ps(x, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), y);
}
static inline float v_top(vec x)                 { return _mm512_reduce_max_ps(x); }
static inline vec   v_round(vec x)               { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec   v_scale_2(vec x, vec n)      { return _mm512_scalef_ps(x, n); }

enum { DOT_ROWS = 4, SUM_ROWS = 8, MIX_ROWS = 6, MIX_DOT_F32 = DOT_ROWS, ATTEND_VECS = 4 };

#else

#define V_OF(name) _mm256_##name
enum { W = 8 };
typedef __m256 vec;

static inline float v_sum(vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vec   v_load_f16(const uint16_t * p)  { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline vec   v_load_bf16(const uint16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
static inline vec   v_load_i8(const int8_t * p)  { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }
static inline vec   v_load_i4(const uint8_t * p, int o) {
    const __m128i q = _mm_loadl_epi64((const __m128i *) (p + o%16));
    const __m128i u = _mm_and_si128(o < 16 ? q : _mm_srli_epi16(q, 4), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(u, _mm_set1_epi8(8))));
}

static inline void  v_interleave(vec x, vec y, vec & first, vec & second) {
    const vec low  = _mm256_unpacklo_ps(x, y); // of each half
    const vec high = _mm256_unpackhi_ps(x, y);
    first  = _mm256_permute2f128_ps(low, high, 0x20);
    second = _mm256_permute2f128_ps(low, high, 0x31);
}
static inline float v_top(vec x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vec   v_round(vec x)               { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for whole n, 0 below 2^-126
static inline vec   v_scale_2(vec x, vec n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(bits)), _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_GE_OQ));
}

enum { DOT_ROWS = 2, SUM_ROWS = 2, MIX_ROWS = 3, MIX_DOT_F32 = DOT_ROWS, ATTEND_VECS = 2 };

#endif

static inline vec   v_set1(float x)              { return V_OF(set1_ps)(x); }
static inline vec   v_load(const float * p)      { return V_OF(loadu_ps)(p); }
static inline void  v_store(float * p, vec x)    { V_OF(storeu_ps)(p, x); }
static inline vec   v_add(vec x, vec y)          { return V_OF(add_ps)(x, y); }
static inline vec   v_mul(vec x, vec y)          { return V_OF(mul_ps)(x, y); }
static inline vec   v_fma(vec x, vec y, vec z)   { return V_OF(fmadd_ps)(x, y, z); }
static inline vec   v_max(vec x, vec y)          { return V_OF(max_ps)(x, y); }
static inline float f16_to_f32(uint16_t h)       { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

#elif defined(__ARM_NEON) && defined(__aarch64__)

enum { W = 4 };
typedef float32x4_t vec;

static inline vec   v_set1(float x)              { return vdupq_n_f32(x); }
static inline vec   v_load(const float * p)      { return vld1q_f32(p); }
static inline void  v_store(float * p, vec x)    { vst1q_f32(p, x); }
static inline vec   v_add(vec x, vec y)          { return vaddq_f32(x, y); }
static inline vec   v_mul(vec x, vec y)          { return vmulq_f32(x, y); }
static inline vec   v_fma(vec x, vec y, vec z)   { return vfmaq_f32(z, x, y); }
static inline float v_sum(vec x)                 { return vaddvq_f32(x); }
static inline vec   v_load_f16(const uint16_t * p)  { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vec   v_load_bf16(const uint16_t * p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vec   v_load_i8(const int8_t * p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof(bytes));
    const int8x8_t q = vreinterpret_s8_s32(vdup_n_s32(bytes));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(q))));
}
static inline vec   v_load_i4(const uint8_t * p, int o) {
    uint32_t bytes;
    memcpy(&bytes, p + o%16, sizeof(bytes));
    const uint8x8_t u = vreinterpret_u8_u32(vdup_n_u32((o < 16 ? bytes : bytes >> 4) & 0x0f0f0f0f));
    const int8x8_t  q = vsub_s8(vreinterpret_s8_u8(u), vdup_n_s8(8));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(q))));
}
static inline float f16_to_f32(uint16_t h) {
    __fp16 x;
    memcpy(&x, &h, sizeof(x));
    return x;
}

enum { DOT_ROWS = 4, SUM_ROWS = 2, MIX_ROWS = 6, MIX_DOT_F32 = DOT_ROWS };

#else

enum { W = 4 };
struct vec { float x[W]; };

static inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t rest = (uint32_t) (h & 0x7fff) << 13;
    float x;
    memcpy(&x, &rest, sizeof(x));
    x *= 5.192296858534828e+33f; // 2^112: the exponent's bias goes from 15 to 127, denormals included
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if ((h & 0x7c00) == 0x7c00) {
        bits |= 0x7f800000;
    }
    bits |= sign;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

#define QAFLORA_EACH(expr) vec res; for (int i = 0; i < W; ++i) { res.x[i] = (expr); } return res
static inline vec   v_set1(float x)              { QAFLORA_EACH(x); }
static inline vec   v_load(const float * p)      { QAFLORA_EACH(p[i]); }
static inline void  v_store(float * p, vec x)    { for (int i = 0; i < W; ++i) { p[i] = x.x[i]; } }
static inline vec   v_add(vec x, vec y)          { QAFLORA_EACH(x.x[i] + y.x[i]); }
static inline vec   v_mul(vec x, vec y)          { QAFLORA_EACH(x.x[i]*y.x[i]); }
static inline vec   v_fma(vec x, vec y, vec z)   { QAFLORA_EACH(x.x[i]*y.x[i] + z.x[i]); }
static inline float v_sum(vec x)                 { return (x.x[0] + x.x[2]) + (x.x[1] + x.x[3]); }
static inline vec   v_load_f16(const uint16_t * p)  { QAFLORA_EACH(f16_to_f32(p[i])); }
static inline vec   v_load_bf16(const uint16_t * p) { QAFLORA_EACH(bf16_to_f32(p[i])); }
static inline vec   v_load_i8(const int8_t * p)  { QAFLORA_EACH((float) p[i]); }
static inline vec   v_load_i4(const uint8_t * p, int o) { QAFLORA_EACH((float) ((o < 16 ? p[o + i] & 15 : p[o - 16 + i] >> 4) - 8)); }
#undef QAFLORA_EACH

enum { DOT_ROWS = 2, SUM_ROWS = 2, MIX_ROWS = 2, MIX_DOT_F32 = 1 };

#endif

// Rows of a tile: DOT_ROWS of products, SUM_ROWS of sums; MIX_ROWS of sums over rows of any slots, and MIX_DOT_F32 of
// products over them where nothing is converted: without vectors, more rows at once only cost registers.
enum { NV = QAFLORA_PANEL/W };

// Adapters are read once a token, in runs too short for the processor to foresee: what comes so many bytes later is asked for now.
enum { PREFETCH = 4096 };

#if defined(__GNUC__)
#define V_INLINE inline __attribute__((always_inline))
static inline void v_prefetch(const void * p)        { __builtin_prefetch((const char *) p + PREFETCH); }
static inline void v_prefetch_first(const void * p)  { __builtin_prefetch(p); }
static inline void v_prefetch_second(const void * p) { __builtin_prefetch(p, 0, 2); } // not into the smallest cache
#elif defined(__AVX2__)
#define V_INLINE __forceinline
static inline void v_prefetch(const void * p)        { _mm_prefetch((const char *) p + PREFETCH, _MM_HINT_T0); }
static inline void v_prefetch_first(const void * p)  { _mm_prefetch((const char *) p, _MM_HINT_T0); }
static inline void v_prefetch_second(const void * p) { _mm_prefetch((const char *) p, _MM_HINT_T1); }
#else
static inline void v_prefetch(const void *)          {}
#endif

} // namespace QAFLORA_ISA
