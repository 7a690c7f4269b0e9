// The kernels of qaflora-cpu.h for one instruction set. Included once by each file that is compiled
// for one; QAFLORA_ISA names the namespace, so that no two of them share a symbol. For the same
// reason nothing here may use a template or inline function from elsewhere.
// shapes: numpy order, last axis contiguous

#include "qaflora-cpu.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace QAFLORA_ISA {

//
// vectors of W floats
//

#if defined(__AVX512F__)

enum { W = 16 };
typedef __m512 vec;

static inline vec   v_zero()                     { return _mm512_setzero_ps(); }
static inline vec   v_set1(float x)              { return _mm512_set1_ps(x); }
static inline vec   v_load(const float * p)      { return _mm512_loadu_ps(p); }
static inline void  v_store(float * p, vec x)    { _mm512_storeu_ps(p, x); }
static inline vec   v_add(vec x, vec y)          { return _mm512_add_ps(x, y); }
static inline vec   v_mul(vec x, vec y)          { return _mm512_mul_ps(x, y); }
static inline vec   v_fma(vec x, vec y, vec z)   { return _mm512_fmadd_ps(x, y, z); }
static inline float v_sum(vec x)                 { return _mm512_reduce_add_ps(x); }
static inline vec   v_load_f16(const uint16_t * p)  { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vec   v_load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
static inline vec   v_load_i8(const int8_t * p)  { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
static inline float f16_to_f32(uint16_t h)       { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

enum { DOT_ROWS = 4, SUM_ROWS = 8 };

#elif defined(__AVX2__)

enum { W = 8 };
typedef __m256 vec;

static inline vec   v_zero()                     { return _mm256_setzero_ps(); }
static inline vec   v_set1(float x)              { return _mm256_set1_ps(x); }
static inline vec   v_load(const float * p)      { return _mm256_loadu_ps(p); }
static inline void  v_store(float * p, vec x)    { _mm256_storeu_ps(p, x); }
static inline vec   v_add(vec x, vec y)          { return _mm256_add_ps(x, y); }
static inline vec   v_mul(vec x, vec y)          { return _mm256_mul_ps(x, y); }
static inline vec   v_fma(vec x, vec y, vec z)   { return _mm256_fmadd_ps(x, y, z); }
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
static inline float f16_to_f32(uint16_t h)       { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

enum { DOT_ROWS = 2, SUM_ROWS = 2 };

#elif defined(__ARM_NEON) && defined(__aarch64__)

enum { W = 4 };
typedef float32x4_t vec;

static inline vec   v_zero()                     { return vdupq_n_f32(0.0f); }
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
static inline float f16_to_f32(uint16_t h) {
    __fp16 x;
    memcpy(&x, &h, sizeof(x));
    return x;
}

enum { DOT_ROWS = 4, SUM_ROWS = 2 };

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
static inline float bf16_to_f32(uint16_t h) {
    const uint32_t bits = (uint32_t) h << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

#define QAFLORA_EACH(expr) vec res; for (int i = 0; i < W; ++i) { res.x[i] = (expr); } return res
static inline vec   v_set1(float x)              { QAFLORA_EACH(x); }
static inline vec   v_zero()                     { return v_set1(0.0f); }
static inline vec   v_load(const float * p)      { QAFLORA_EACH(p[i]); }
static inline void  v_store(float * p, vec x)    { for (int i = 0; i < W; ++i) { p[i] = x.x[i]; } }
static inline vec   v_add(vec x, vec y)          { QAFLORA_EACH(x.x[i] + y.x[i]); }
static inline vec   v_mul(vec x, vec y)          { QAFLORA_EACH(x.x[i]*y.x[i]); }
static inline vec   v_fma(vec x, vec y, vec z)   { QAFLORA_EACH(x.x[i]*y.x[i] + z.x[i]); }
static inline float v_sum(vec x)                 { return (x.x[0] + x.x[2]) + (x.x[1] + x.x[3]); }
static inline vec   v_load_f16(const uint16_t * p)  { QAFLORA_EACH(f16_to_f32(p[i])); }
static inline vec   v_load_bf16(const uint16_t * p) { QAFLORA_EACH(bf16_to_f32(p[i])); }
static inline vec   v_load_i8(const int8_t * p)  { QAFLORA_EACH((float) p[i]); }
#undef QAFLORA_EACH

enum { DOT_ROWS = 2, SUM_ROWS = 2 };

#endif

enum { NV = QAFLORA_PANEL/W };

// Adapters are read once a token, in runs too short for the processor to foresee: what comes so many bytes later is asked for now.
enum { PREFETCH = 4096 };

static inline void v_prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch((const char *) p + PREFETCH);
#elif defined(__AVX2__)
    _mm_prefetch((const char *) p + PREFETCH, _MM_HINT_T0);
#else
    (void) p;
#endif
}

// to the nearest F16, for numbers that F16 holds without denormals
static inline float round_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits += 0x0fff + ((bits >> 13) & 1);
    bits &= ~0x1fffu;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

//
// how numbers are stored: rows of A, panels of B
//

struct f32_numbers {
    static size_t row_size(int64_t n)                  { return n*4; }
    static float  at  (const uint8_t * row, int64_t i) { return ((const float *) row)[i]; }
    static vec    load(const uint8_t * row, int64_t i) { return v_load((const float *) row + i); }
    static vec    panel(const uint8_t * p, int64_t r, int o) { return v_load((const float *) p + r*QAFLORA_PANEL + o); }
    static size_t panel_offset(int64_t r)              { return r*QAFLORA_PANEL*4; }
};

struct f16_numbers {
    static size_t row_size(int64_t n)                  { return n*2; }
    static float  at  (const uint8_t * row, int64_t i) { return f16_to_f32(((const uint16_t *) row)[i]); }
    static vec    load(const uint8_t * row, int64_t i) { return v_load_f16((const uint16_t *) row + i); }
    static vec    panel(const uint8_t * p, int64_t r, int o) { return v_load_f16((const uint16_t *) p + r*QAFLORA_PANEL + o); }
    static size_t panel_offset(int64_t r)              { return r*QAFLORA_PANEL*2; }
};

struct bf16_numbers {
    static size_t row_size(int64_t n) { return n*2; }
    static float  at  (const uint8_t * row, int64_t i) {
        const uint32_t bits = (uint32_t) ((const uint16_t *) row)[i] << 16;
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    }
    static vec    load(const uint8_t * row, int64_t i) { return v_load_bf16((const uint16_t *) row + i); }
    static vec    panel(const uint8_t * p, int64_t r, int o) { return v_load_bf16((const uint16_t *) p + r*QAFLORA_PANEL + o); }
    static size_t panel_offset(int64_t r)              { return r*QAFLORA_PANEL*2; }
};

// rows of A have F32 scales first, then the numbers: see qaflora_row_size()
struct q8_0_numbers {
    enum { BLOCK = 32, BLOCK_SIZE = 34, PANEL_SIZE = 2*QAFLORA_PANEL + BLOCK*QAFLORA_PANEL };

    static size_t         row_size(int64_t n) { return n/BLOCK*4 + n; }
    static size_t         panel_offset(int64_t r) { return r/BLOCK*PANEL_SIZE + r%BLOCK*QAFLORA_PANEL; }
    static const int8_t * numbers (const uint8_t * row, int64_t n) { return (const int8_t *) row + n/BLOCK*4; }
    static vec    panel(const uint8_t * p, int64_t r, int o) {
        const uint8_t * block = p + r/BLOCK*PANEL_SIZE;
        return v_mul(v_load_f16((const uint16_t *) block + o),
                     v_load_i8((const int8_t *) block + 2*QAFLORA_PANEL + r%BLOCK*QAFLORA_PANEL + o));
    }
};

static size_t panel_size(qaflora_cpu_type type, int64_t rank) {
    switch (type) {
        case QAFLORA_CPU_F32:  return rank*QAFLORA_PANEL*4;
        case QAFLORA_CPU_F16:
        case QAFLORA_CPU_BF16: return rank*QAFLORA_PANEL*2;
        case QAFLORA_CPU_Q8_0: return rank/q8_0_numbers::BLOCK*q8_0_numbers::PANEL_SIZE;
    }
    return 0;
}

static float weight_of(const qaflora_cpu_rows & rows, int64_t row, const qaflora_cpu_segment & s) {
    return s.scale*rows.weights[(rows.slot ? rows.slot[row] : 0)*rows.n_adapter + s.ia];
}

// how many rows from row on are of its slot, at most n
static int64_t run_length(const qaflora_cpu_rows & rows, int64_t row, int64_t n) {
    int64_t res = 1;
    while (res < n && (!rows.slot || rows.slot[row + res] == rows.slot[row])) {
        ++res;
    }
    return res;
}

//
// rank product
//

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

//
// delta
//

// acc[i] += sum over r of t[i*n_rank + r] * (row r of the panel)
template <typename T, int NX>
static inline void add_panel(vec (&acc)[NX][NV], const uint8_t * panel, int64_t rank, const float * t, int64_t n_rank) {
    for (int64_t r = 0; r < rank; ++r) {
        vec b[NV];
        for (int v = 0; v < NV; ++v) {
            b[v] = T::panel(panel, r, v*W);
        }
        for (int i = 0; i < NX; ++i) {
            const vec w = v_set1(t[i*n_rank + r]);
            for (int v = 0; v < NV; ++v) {
                acc[i][v] = v_fma(b[v], w, acc[i][v]);
            }
        }
    }
}

// the same for one row, in sums of every fourth r so that additions need not wait for each other
template <typename T>
static inline void add_panel_row(vec (&acc)[1][NV], const uint8_t * panel, int64_t rank, const float * t) {
    vec part[4][NV];
    for (int u = 0; u < 4; ++u) {
        for (int v = 0; v < NV; ++v) {
            part[u][v] = v_zero();
        }
    }
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        for (int u = 0; u < 4; ++u) {
            v_prefetch(panel + T::panel_offset(r + u));
            const vec w = v_set1(t[r + u]);
            for (int v = 0; v < NV; ++v) {
                part[u][v] = v_fma(T::panel(panel, r + u, v*W), w, part[u][v]);
            }
        }
    }
    for (; r < rank; ++r) {
        const vec w = v_set1(t[r]);
        for (int v = 0; v < NV; ++v) {
            part[0][v] = v_fma(T::panel(panel, r, v*W), w, part[0][v]);
        }
    }
    for (int v = 0; v < NV; ++v) {
        acc[0][v] = v_add(acc[0][v], v_add(v_add(part[0][v], part[1][v]), v_add(part[2][v], part[3][v])));
    }
}

template <typename T>
static inline void add_panel(vec (&acc)[1][NV], const uint8_t * panel, int64_t rank, const float * t, int64_t) {
    add_panel_row<T>(acc, panel, rank, t);
}

// n values of NX rows; base: what is added besides, or null
template <int NX>
static inline void store_rows(const vec (&acc)[NX][NV], const float * src, const float * base, float * y, int64_t n, int64_t n_out) {
    for (int i = 0; i < NX; ++i) {
        float sum[QAFLORA_PANEL];
        if (n == QAFLORA_PANEL) {
            for (int v = 0; v < NV; ++v) {
                vec z = v_add(acc[i][v], v_load(src + i*n_out + v*W));
                if (base) {
                    z = v_add(z, v_load(base + i*n_out + v*W));
                }
                v_store(y + i*n_out + v*W, z);
            }
            continue;
        }
        for (int v = 0; v < NV; ++v) {
            v_store(sum + v*W, acc[i][v]);
        }
        for (int64_t o = 0; o < n; ++o) {
            y[i*n_out + o] = sum[o] + src[i*n_out + o] + (base ? base[i*n_out + o] : 0.0f);
        }
    }
}

// NX rows of one slot, one panel
template <int NX>
static void delta_tile(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row, int64_t panel, const float * t,
                       const float * src, float * y, int64_t n_base) {
    vec acc[NX][NV];
    for (int i = 0; i < NX; ++i) {
        for (int v = 0; v < NV; ++v) {
            acc[i][v] = v_zero();
        }
    }
    for (int64_t is = 0; is < d.n_segment; ++is) {
        const qaflora_cpu_segment & s = d.segments[is];
        if (weight_of(rows, row, s) == 0.0f) {
            continue;
        }
        const uint8_t * b = s.b + panel*panel_size(s.type_b, s.rank);
        const float * ts = t + row*d.n_rank + s.offset;
        switch (s.type_b) {
            case QAFLORA_CPU_F32:  add_panel<f32_numbers >(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_F16:  add_panel<f16_numbers >(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_BF16: add_panel<bf16_numbers>(acc, b, s.rank, ts, d.n_rank); break;
            case QAFLORA_CPU_Q8_0: add_panel<q8_0_numbers>(acc, b, s.rank, ts, d.n_rank); break;
        }
    }
    const int64_t o    = panel*QAFLORA_PANEL;
    const int64_t left = d.n_out - o;
    const bool    is_adapted = n_base > 0 && row >= n_base;
    store_rows<NX>(acc, src + row*d.n_out + o, is_adapted ? src + row % n_base*d.n_out + o : nullptr, y + row*d.n_out + o,
                   left < QAFLORA_PANEL ? left : QAFLORA_PANEL, d.n_out);
}

static bool is_active(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row) {
    for (int64_t is = 0; is < d.n_segment; ++is) {
        if (weight_of(rows, row, d.segments[is]) != 0.0f) {
            return true;
        }
    }
    return false;
}

// rows row0 to row1 of the panels p0 to p1
static void delta_rows(const qaflora_delta & d, const qaflora_cpu_rows & rows, int64_t row0, int64_t row1, int64_t p0, int64_t p1,
                       const float * t, const float * src, float * y, int64_t n_base) {
    for (int64_t row = row0; row < row1; ) {
        // rows of one slot; of the base none follow into the next sequence, where the row to be added starts anew
        int64_t n = run_length(rows, row, row1 - row);
        if (n_base > 0 && n > n_base - row % n_base) {
            n = n_base - row % n_base;
        }
        if (!is_active(d, rows, row) && y == src && (n_base == 0 || row < n_base)) {
            row += n; // nothing is added to what is there
            continue;
        }
        for (int64_t p = p0; p < p1; ++p) {
            int64_t i = 0;
            for (; i + SUM_ROWS <= n; i += SUM_ROWS) {
                delta_tile<SUM_ROWS>(d, rows, row + i, p, t, src, y, n_base);
            }
            for (; i < n; ++i) {
                delta_tile<1>(d, rows, row + i, p, t, src, y, n_base);
            }
        }
        row += n;
    }
}

static void add_delta(const qaflora_delta & d, const qaflora_cpu_rows & rows, const float * t, const float * src, float * y,
                      int64_t n_base, int ith, int nth) {
    const int64_t n_panel = (d.n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t p0 = n_panel*ith/nth;
    const int64_t p1 = n_panel*(ith + 1)/nth;
    // the base last: where y is src, the others need its rows as they were
    delta_rows(d, rows, n_base, rows.n_row, p0, p1, t, src, y, n_base);
    delta_rows(d, rows, 0, n_base, p0, p1, t, src, y, n_base);
}

static void subtract_base(const float * x, float * d, int64_t n, int64_t n_row, int64_t n_base, int ith, int nth) {
    for (int64_t row = n_row*ith/nth; row < n_row*(ith + 1)/nth; ++row) {
        const float * src = x + row*n;
        float * dst = d + row*n;
        if (row < n_base) {
            memcpy(dst, src, n*sizeof(float));
            continue;
        }
        const float * base = x + row % n_base*n;
        for (int64_t i = 0; i < n; ++i) {
            dst[i] = src[i] - base[i];
        }
    }
}

static float block_max(const float * x, int64_t n) {
    float best = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        best = (x[i] < 0.0f ? -x[i] : x[i]) > (best < 0.0f ? -best : best) ? x[i] : best;
    }
    return best;
}

static float rounding_power(const qaflora_rounding & rounding, const float * x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += rounding.block) {
        float lane[W] = {};
        for (int64_t j = i; j < i + rounding.block; j += W) {
            for (int l = 0; l < W; ++l) {
                const float a = x[j + l] < 0.0f ? -x[j + l] : x[j + l];
                lane[l] = a > lane[l] ? a : lane[l];
            }
        }
        float max = 0.0f;
        for (int l = 0; l < W; ++l) {
            max = lane[l] > max ? lane[l] : max;
        }
        sum += max*max; // an even error of one step: step^2/12
    }
    return sum;
}

static void split(const qaflora_rounding & rounding, const float * x, float * rounded, float * rest, int64_t n) {
    for (int64_t i = 0; i < n; i += rounding.block) {
        const float max = block_max(x + i, rounding.block);
        float step = max/127.0f;
        const float inverse = max == 0.0f ? 0.0f : 127.0f/max;
        if (rounding.f16_scale) {
            step = round_f16(step);
        }
        for (int64_t j = i; j < i + rounding.block; ++j) {
            const float xj = x[j]; // rounded may be x
            rounded[j] = rintf(xj*inverse)*step;
            rest[j]    = xj - rounded[j];
        }
    }
}

static void add_rows(float * y, const float * more, const int32_t * rows, int64_t n_rows, int64_t n_out, int ith, int nth) {
    const int64_t n_panel = (n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t begin = n_panel*ith/nth*QAFLORA_PANEL;
    const int64_t end   = n_panel*(ith + 1)/nth*QAFLORA_PANEL;
    for (int64_t i = 0; i < n_rows; ++i) {
        for (int64_t o = begin; o < end && o < n_out; ++o) {
            y[rows[i]*n_out + o] += more[i*n_out + o];
        }
    }
}

//
// divergence
//

// float64 throughout: under lens raw, probabilities go down to 1e-200 and still decide a layer

enum { N_LANE = 16 }; // independent sums, so that the compiler can use vectors

// exp(x) to a few units in the last place; below 1e-307 it is 1e-307
static inline double exp_double(double x) {
    const double magic = 6755399441055744.0; // 1.5*2^52: adding it rounds, and leaves n in the low bits
    x = x < -708.0 ? -708.0 : x;
    x = x > 708.0 ? 708.0 : x;
    const double t = x*1.4426950408889634 + magic;
    const double n = t - magic;
    const double r = (x - n*6.93147180369123816490e-01) - n*1.90821492927058770002e-10; // |r| <= ln2/2
    double p = 1.0/479001600.0;
    p = p*r + 1.0/39916800.0;
    p = p*r + 1.0/3628800.0;
    p = p*r + 1.0/362880.0;
    p = p*r + 1.0/40320.0;
    p = p*r + 1.0/5040.0;
    p = p*r + 1.0/720.0;
    p = p*r + 1.0/120.0;
    p = p*r + 1.0/24.0;
    p = p*r + 1.0/6.0;
    p = p*r + 0.5;
    p = p*r + 1.0;
    p = p*r + 1.0;
    uint64_t bits, shift;
    memcpy(&bits,  &p, sizeof(bits));
    memcpy(&shift, &t, sizeof(shift));
    bits += shift << 52; // p*2^n
    double res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

// exp(x) - 1 - x, by its series for |x| < 1/2: no cancellation either way
static inline double expm1_minus(double x) {
    double q = 1.0/6227020800.0;
    q = q*x + 1.0/479001600.0;
    q = q*x + 1.0/39916800.0;
    q = q*x + 1.0/3628800.0;
    q = q*x + 1.0/362880.0;
    q = q*x + 1.0/40320.0;
    q = q*x + 1.0/5040.0;
    q = q*x + 1.0/720.0;
    q = q*x + 1.0/120.0;
    q = q*x + 1.0/24.0;
    q = q*x + 1.0/6.0;
    q = q*x + 0.5;
    const double small = q*x*x;
    const double large = exp_double(x) - 1.0 - x;
    return (x < 0.0 ? -x : x) < 0.5 ? small : large;
}

static inline double lanes_sum(const double * lane) {
    double sum = 0.0;
    for (int j = 0; j < N_LANE; ++j) {
        sum += lane[j];
    }
    return sum;
}

// beyond it, exp(u) is kept by its logarithm
static const double FAR = 300.0;

// s: as it was when rest and first were
static void go_far(qaflora_divergence_sums::adapter & a, double s) {
    if (a.far == 0.0) {
        a.far     = a.rest + a.first + s; // 0 where nothing was seen
        a.far_max = 0.0;
        a.rest    = 0.0;
    }
}

// one more slice of far
static void add_far(const qaflora_divergence_sums & sums, qaflora_divergence_sums::adapter & a, const float * z, const float * d, int64_t n) {
    double max = -INFINITY;
    for (int64_t v = 0; v < n; ++v) {
        const double e = (z[v] - sums.z_max) + (a.unit*d[v] - a.c);
        max = e > max ? e : max;
    }
    if (a.far == 0.0 || max > a.far_max) {
        a.far    *= exp_double(a.far_max - max);
        a.far_max = max;
    }
    for (int64_t v = 0; v < n; ++v) {
        a.far += exp_double((z[v] - sums.z_max) + (a.unit*d[v] - a.c) - a.far_max);
    }
}

// sums so far, with p and c taken from a token that is likelier than all before
static void move_reference(qaflora_divergence_sums & sums, int64_t n_adapter, double z_max, const float * d, int64_t stride) {
    const double scale = sums.s > 0.0 ? exp(sums.z_max - z_max) : 0.0;
    const double moved = sums.s > 0.0 ? sums.z_max - z_max : 0.0;
    const double s_before = sums.s;
    sums.z_max = z_max;
    sums.s *= scale;
    for (int64_t ia = 0; ia < n_adapter; ++ia) {
        qaflora_divergence_sums::adapter & a = sums.adapters[ia];
        const double c     = a.unit*d[ia*stride];
        const double delta = a.c - c; // u grows by it
        if (delta > FAR) {
            go_far(a, s_before);
        }
        a.far_max += delta + moved;
        const double first = a.first*scale;
        const double rest  = a.rest*scale;
        a.c     = c;
        a.first = first + delta*sums.s;
        a.rest  = sums.s > 0.0 && a.far == 0.0 ? exp(delta)*rest + expm1(delta)*first + expm1_minus(delta)*sums.s : 0.0;
    }
}

static void accumulate(qaflora_divergence_sums & sums, int64_t n_adapter, const float * z, const float * d, int64_t stride, int64_t n, double * p) {
    float lane_max[N_LANE];
    for (int j = 0; j < N_LANE; ++j) {
        lane_max[j] = z[0];
    }
    int64_t v = 0;
    for (; v + N_LANE <= n; v += N_LANE) {
        for (int j = 0; j < N_LANE; ++j) {
            lane_max[j] = z[v + j] > lane_max[j] ? z[v + j] : lane_max[j];
        }
    }
    float z_max = z[0];
    for (; v < n; ++v) {
        z_max = z[v] > z_max ? z[v] : z_max;
    }
    for (int j = 0; j < N_LANE; ++j) {
        z_max = lane_max[j] > z_max ? lane_max[j] : z_max;
    }
    if (sums.s == 0.0 || z_max > sums.z_max) {
        int64_t i_max = 0;
        while (i_max < n - 1 && z[i_max] != z_max) {
            ++i_max;
        }
        move_reference(sums, n_adapter, z_max, d + i_max, stride);
    }
    double lane[N_LANE] = {};
    for (v = 0; v + N_LANE <= n; v += N_LANE) {
        for (int j = 0; j < N_LANE; ++j) {
            const double e = exp_double((double) z[v + j] - sums.z_max);
            p[v + j] = e;
            lane[j] += e;
        }
    }
    double s = lanes_sum(lane);
    for (; v < n; ++v) {
        p[v] = exp_double((double) z[v] - sums.z_max);
        s += p[v];
    }
    const double s_before = sums.s;
    sums.s += s;
    for (int64_t ia = 0; ia < n_adapter; ++ia) {
        qaflora_divergence_sums::adapter & a = sums.adapters[ia];
        const float * dj = d + ia*stride;
        const double unit = a.unit;
        const double c    = a.c;
        double lane_first[N_LANE] = {};
        double lane_rest [N_LANE] = {};
        double lane_u    [N_LANE] = {};
        for (v = 0; v + N_LANE <= n; v += N_LANE) {
            for (int j = 0; j < N_LANE; ++j) {
                const double u = unit*dj[v + j] - c;
                lane_first[j] += p[v + j]*u;
                lane_rest [j] += p[v + j]*expm1_minus(u);
                lane_u    [j]  = u > lane_u[j] ? u : lane_u[j];
            }
        }
        double first = lanes_sum(lane_first);
        double rest  = lanes_sum(lane_rest);
        double u_max = 0.0;
        for (int j = 0; j < N_LANE; ++j) {
            u_max = lane_u[j] > u_max ? lane_u[j] : u_max;
        }
        for (; v < n; ++v) {
            const double u = unit*dj[v] - c;
            first += p[v]*u;
            rest  += p[v]*expm1_minus(u);
            u_max  = u > u_max ? u : u_max;
        }
        if (u_max > FAR || a.rest > 1e130) {
            go_far(a, s_before);
        }
        a.first += first;
        if (u_max > FAR || a.far != 0.0) {
            add_far(sums, a, z, dj, n);
        } else {
            a.rest += rest;
        }
    }
}

static const qaflora_kernels kernels = {
    QAFLORA_ISA_NAME, rank_product, add_delta, subtract_base, rounding_power, split, add_rows, accumulate
};

} // namespace QAFLORA_ISA
