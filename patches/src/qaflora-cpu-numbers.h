// How numbers are stored: rows of A, panels of B; see qaflora-cpu-store.h.

#pragma once

#include "qaflora-cpu-vec.h"

namespace QAFLORA_ISA {

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

// rows of A have F32 scales first, then the numbers: see qaflora-cpu-store.h
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

} // namespace QAFLORA_ISA
