// Matrices of the base as their types store them.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu-whole.h"

namespace QAFLORA_ISA {

#if defined(QAFLORA_HAS_PRODUCTS)

// What blocks begin with, of W outputs and neighbouring blocks. Copied one by one: a gather takes longer.
struct mm_words {
    uint32_t of[8][2][W];
};

static V_INLINE void mm_copy(const mm_source & w, size_t at, uint32_t * words) {
    for (int o = 0; o < W; ++o) {
        memcpy(words + o, mm_row(w, o) + at, sizeof(uint32_t));
    }
}

// 32 numbers of W outputs, in 16 bytes of each: the first 16 below and the others above
static V_INLINE void mm_numbers_4(const mm_source & w, size_t at, ivec * n) {
    mm_bytes(w, at, n);
    for (int j = 0; j < 4; ++j) {
        n[4 + j] = mm_four(n[j], 1);
        n[j]     = mm_four(n[j], 0);
    }
}

//
// how types store a block of 32 numbers: scale*(number - OFFSET) + min, with a scale for all or for each half. N_ADDED groups of 4
// numbers times 127 are below 2^15, two and two
//

// copy() takes what n blocks begin with, N_AHEAD at most. numbers() is called for each in turn, as part; it keeps what serves several.

template <int N_BYTE> struct mm_plain { // blocks of N_BYTE bytes, which begin with the scale in F16
    enum { N_AHEAD = MM_AHEAD };
    static size_t block(int64_t ib) { return ib*N_BYTE; }
    static void copy(const mm_source & w, int64_t n, mm_words & words) {
        for (int64_t i = 0; i < n; ++i) {
            mm_copy(w, block(i), words.of[i][0]);
        }
    }
    static void scales(const mm_words & words, int i, vec * scale, vec *) { scale[0] = i_halves(i_load(words.of[i][0])); }
};

struct q8_0_matrix : mm_plain<34> {
    enum { N_SCALE = 1, HAS_MIN = 0, OFFSET = MM_HALF, N_KEPT = 1, IS_SIGNED = 1, N_ADDED = 1 };
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words &, ivec *, ivec * n) {
        mm_bytes(w, block(part) + 2,  n);
        mm_bytes(w, block(part) + 18, n + 4);
        for (int j = 0; j < MM_GROUPS; ++j) {
            n[j] = mm_unsigned(n[j]);
        }
    }
};

struct q4_0_matrix : mm_plain<18> {
    enum { N_SCALE = 1, HAS_MIN = 0, OFFSET = 8, N_KEPT = 1, IS_SIGNED = 0, N_ADDED = 8 };
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words &, ivec *, ivec * n) {
        mm_numbers_4(w, block(part) + 2, n);
    }
};

struct q4_1_matrix : mm_plain<20> {
    enum { N_SCALE = 1, HAS_MIN = 1, OFFSET = 0, N_KEPT = 1, IS_SIGNED = 0, N_ADDED = 8 };
    static void scales(const mm_words & words, int i, vec * scale, vec * min) {
        const ivec both = i_load(words.of[i][0]);
        scale[0] = i_halves(both);
        *min     = i_halves(i_right(both, 16));
    }
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words &, ivec *, ivec * n) {
        mm_numbers_4(w, block(part) + 4, n);
    }
};

// 4 bytes of fifth bits stand before the others
struct q5_0_matrix : mm_plain<22> {
    enum { N_SCALE = 1, HAS_MIN = 0, OFFSET = 16, N_KEPT = 1, IS_SIGNED = 0, N_ADDED = 4 };
    static void copy(const mm_source & w, int64_t n, mm_words & words) {
        for (int64_t i = 0; i < n; ++i) {
            mm_copy(w, block(i),     words.of[i][0]);
            mm_copy(w, block(i) + 2, words.of[i][1]);
        }
    }
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words & words, ivec *, ivec * n) {
        mm_numbers_4(w, block(part) + 6, n);
        mm_fifths(i_load(words.of[part][1]), n);
    }
};

// 256 numbers: a scale and one of minima for all, then for each of 8 blocks 6 bits of both, in 12 bytes; for FIVE bits the fifth
// ones; then 128 bytes of 4 bits
template <bool FIVE> struct k_matrix {
    enum { N_AHEAD = 8, N_SCALE = 1, HAS_MIN = 1, OFFSET = 0, N_KEPT = FIVE ? 16 : 8, IS_SIGNED = 0, N_ADDED = FIVE ? 4 : 8 };
    static size_t block(int64_t ib) { return ib/8*(FIVE ? 176 : 144); }
    static void copy(const mm_source & w, int64_t, mm_words & words) {
        ivec turned[4];
        i_turn(w, 0, turned);
        // of the last four blocks 4 bits are in the last bytes, and 2 above those of an early block
        const ivec last[2] = { mm_four(turned[3], 0), mm_four(turned[3], 1) };
        i_store(words.of[0][0], turned[0]);
        for (int i = 0; i < 2; ++i) { // scales, minima
            i_store(words.of[1][i], i_and(turned[1 + i], i_set1(0x3f3f3f3f)));
            i_store(words.of[2][i], i_or(last[i], i_and(i_right(turned[1 + i], 2), i_set1(0x30303030))));
        }
    }
    static void scales(const mm_words & words, int i, vec * scale, vec * min) {
        const ivec both = i_load(words.of[0][0]);
        const ivec s = i_and(i_right(i_load(words.of[1 + i/4][0]), i % 4*8), i_set1(255));
        const ivec m = i_and(i_right(i_load(words.of[1 + i/4][1]), i % 4*8), i_set1(255));
        scale[0] = v_mul(i_halves(both), i_to_float(s));
        *min     = v_mul(v_mul(v_set1(-1.0f), i_halves(i_right(both, 16))), i_to_float(m));
    }
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words &, ivec * kept, ivec * n) {
        const int begin = FIVE ? 48 : 16;
        if (part % 2 == 0) {
            mm_bytes(w, begin + part*16,      kept);
            mm_bytes(w, begin + part*16 + 16, kept + 4);
        }
        if (FIVE && part == 0) {
            mm_bytes(w, 16, kept + 8);
            mm_bytes(w, 32, kept + 12);
        }
        for (int j = 0; j < MM_GROUPS; ++j) {
            n[j] = FIVE ? mm_join(kept[j], part % 2, kept[MM_GROUPS + j], part, 0x10101010) : mm_four(kept[j], part % 2);
        }
    }
};

typedef k_matrix<false> q4_k_matrix;
typedef k_matrix<true>  q5_k_matrix;

// 256 numbers: 128 bytes of 4 bits, 64 of 2 bits, 16 scales and one for all
struct q6_k_matrix {
    enum { N_AHEAD = 8, N_SCALE = 2, HAS_MIN = 0, OFFSET = 32, N_KEPT = 24, IS_SIGNED = 0, N_ADDED = 2 };
    static size_t block(int64_t ib) { return ib/8*210; }
    static void copy(const mm_source & w, int64_t, mm_words & words) {
        ivec turned[4]; // scales of two blocks each
        i_turn(w, 192, turned);
        for (int i = 0; i < 4; ++i) {
            i_store(words.of[i][0], turned[i]);
        }
        mm_copy(w, 206, words.of[0][1]);
    }
    static void scales(const mm_words & words, int i, vec * scale, vec *) {
        const vec d = i_halves(i_right(i_load(words.of[0][1]), 16));
        const ivec four = i_load(words.of[i/2][0]);
        for (int half = 0; half < 2; ++half) {
            scale[half] = v_mul(d, i_to_float(i_signed(i_left(four, 24 - i % 2*16 - half*8), 24)));
        }
    }
    static V_INLINE void numbers(const mm_source & w, int part, const mm_words &, ivec * kept, ivec * n) {
        if (part % 4 == 0 || !MM_KEEPS) {
            for (int i = 0; i < 4; ++i) {
                mm_bytes(w, part/4*64 + i*16, kept + 4*i);
            }
            mm_bytes(w, 128 + part/4*32,      kept + 16);
            mm_bytes(w, 128 + part/4*32 + 16, kept + 20);
        }
        for (int j = 0; j < MM_GROUPS; ++j) {
            n[j] = mm_join(kept[part % 2*MM_GROUPS + j], part % 4/2, kept[2*MM_GROUPS + j], part % 4*2, 0x30303030);
        }
    }
};

#endif

} // namespace QAFLORA_ISA
