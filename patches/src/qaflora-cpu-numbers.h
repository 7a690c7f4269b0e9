// How numbers are stored: rows of A, panels of B; see qaflora-cpu-store.h. Which rows weigh alike.

#pragma once

#include "qaflora-cpu-vec.h"

namespace QAFLORA_ISA {

// what a panel's numbers of one rank are multiplied with
struct no_scale {
    static float scale(const uint8_t *, int64_t) { return 1.0f; }
};

struct as_f32  { typedef float    type; static vec load(const type * p) { return v_load(p); }      static float at(type x) { return x; } };
struct as_f16  { typedef uint16_t type; static vec load(const type * p) { return v_load_f16(p); }  static float at(type x) { return f16_to_f32(x); } };
struct as_bf16 { typedef uint16_t type; static vec load(const type * p) { return v_load_bf16(p); } static float at(type x) { return bf16_to_f32(x); } };

template <typename S> struct plain_numbers : no_scale {
    enum { BLOCK = 1 };
    typedef typename S::type number;
    static size_t row_size(int64_t n)                  { return n*sizeof(number); }
    static float  at  (const uint8_t * row, int64_t i) { return S::at(((const number *) row)[i]); }
    static vec    load(const uint8_t * row, int64_t i) { return S::load((const number *) row + i); }
    static vec    panel(const uint8_t * p, int64_t r, int o) { return S::load((const number *) p + r*QAFLORA_PANEL + o); }
    static size_t panel_offset(int64_t r)              { return r*QAFLORA_PANEL*sizeof(number); }
};

typedef plain_numbers<as_f32>  f32_numbers;
typedef plain_numbers<as_f16>  f16_numbers;
typedef plain_numbers<as_bf16> bf16_numbers;

// rows of A have F32 scales first, then the numbers: see qaflora-cpu-store.h
struct q8_0_numbers : no_scale {
    enum { BLOCK = 32, BLOCK_BYTES = 32, PANEL_SIZE = 2*QAFLORA_PANEL + BLOCK*QAFLORA_PANEL };

    static size_t          row_size(int64_t n) { return n/BLOCK*(4 + BLOCK_BYTES); }
    static const uint8_t * numbers (const uint8_t * row, int64_t n) { return row + n/BLOCK*4; }
    static vec    load_block(const uint8_t * q, int o) { return v_load_i8((const int8_t *) q + o); }
    static size_t panel_offset(int64_t r) { return r/BLOCK*PANEL_SIZE + r%BLOCK*QAFLORA_PANEL; }
    static vec    panel(const uint8_t * p, int64_t r, int o) {
        const uint8_t * block = p + r/BLOCK*PANEL_SIZE;
        return v_mul(v_load_f16((const uint16_t *) block + o),
                     v_load_i8((const int8_t *) block + 2*QAFLORA_PANEL + r%BLOCK*QAFLORA_PANEL + o));
    }
};

struct q4_0_numbers {
    enum { BLOCK = 32, BLOCK_BYTES = 16 };

    static size_t          row_size(int64_t n) { return n/BLOCK*(4 + BLOCK_BYTES); }
    static const uint8_t * numbers (const uint8_t * row, int64_t n) { return row + n/BLOCK*4; }
    static vec    load_block(const uint8_t * q, int o) { return v_load_i4(q, o); }
};

// panels of B of which each rank is a block: its F32 scale, then the numbers of T
template <typename T> struct panel_numbers {
    static_assert((int) T::BLOCK == QAFLORA_PANEL, "a block is a panel's width");

    static size_t panel_offset(int64_t r) { return r*(4 + T::BLOCK_BYTES); }
    static vec    panel(const uint8_t * p, int64_t r, int o) { return T::load_block(p + panel_offset(r) + 4, o); }
    static float  scale(const uint8_t * p, int64_t r) {
        float x;
        memcpy(&x, p + panel_offset(r), sizeof(x));
        return x;
    }
};

static size_t panel_size(qaflora_cpu_type type, int64_t rank) {
    switch (type) {
        case QAFLORA_CPU_F32:  return rank*QAFLORA_PANEL*4;
        case QAFLORA_CPU_F16:
        case QAFLORA_CPU_BF16: return rank*QAFLORA_PANEL*2;
        case QAFLORA_CPU_Q8_0: return rank/q8_0_numbers::BLOCK*q8_0_numbers::PANEL_SIZE;
        case QAFLORA_CPU_Q4_0: break;
        case QAFLORA_CPU_Q8_0_PANEL: return panel_numbers<q8_0_numbers>::panel_offset(rank);
        case QAFLORA_CPU_Q4_0_PANEL: return panel_numbers<q4_0_numbers>::panel_offset(rank);
    }
    return 0;
}

static inline float weight_of(const qaflora_cpu_rows & rows, int64_t row, const qaflora_cpu_segment & s) {
    return s.scale*rows.weights[(rows.slot ? rows.slot[row] : 0)*rows.n_adapter + s.ia];
}

// how many rows from row on are of its slot, at most n
static inline int64_t run_length(const qaflora_cpu_rows & rows, int64_t row, int64_t n) {
    int64_t res = 1;
    while (res < n && (!rows.slot || rows.slot[row + res] == rows.slot[row])) {
        ++res;
    }
    return res;
}

// Whether rows are few for their slots, as when sequences are decoded: tiles then take rows of any slot.
static inline bool is_mixed(const qaflora_cpu_rows & rows) {
    int64_t n_run = 1;
    for (int64_t row = 1; rows.slot && row < rows.n_row; ++row) {
        n_run += rows.slot[row] != rows.slot[row - 1];
    }
    return rows.n_row > 1 && rows.n_row <= QAFLORA_FEW*n_run;
}

enum { ROWS_AT_ONCE = 64 }; // of any slots

// those of n rows from row on for which the segment has a weight; returns how many
static inline int64_t weighed_rows(const qaflora_cpu_rows & rows, const qaflora_cpu_segment & s, int64_t row, int64_t n, int64_t * weighed) {
    int64_t res = 0;
    for (int64_t i = row; i < row + n; ++i) {
        if (weight_of(rows, i, s) != 0.0f) {
            weighed[res++] = i;
        }
    }
    return res;
}

} // namespace QAFLORA_ISA
