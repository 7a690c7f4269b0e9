#include "qaflora-cpu-store.h"

#define QAFLORA_ISA qaflora_store
#include "qaflora-cpu-numbers.h"

#include <algorithm>
#include <cmath>

qaflora_cpu_type qaflora_cpu_type_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return QAFLORA_CPU_F16;
        case GGML_TYPE_BF16: return QAFLORA_CPU_BF16;
        case GGML_TYPE_Q8_0: return QAFLORA_CPU_Q8_0;
        default:             return QAFLORA_CPU_F32;
    }
}

ggml_type qaflora_stored_type(ggml_type type) {
    return qaflora_cpu_type_of(type) == QAFLORA_CPU_F32 ? GGML_TYPE_F32 : type;
}

size_t qaflora_row_size(qaflora_cpu_type type, int64_t n_in) {
    using namespace qaflora_store;
    switch (type) {
        case QAFLORA_CPU_F32:  return f32_numbers ::row_size(n_in);
        case QAFLORA_CPU_F16:  return f16_numbers ::row_size(n_in);
        case QAFLORA_CPU_BF16: return bf16_numbers::row_size(n_in);
        case QAFLORA_CPU_Q8_0: return q8_0_numbers::row_size(n_in);
        case QAFLORA_CPU_Q4_0: return q4_0_numbers::row_size(n_in);
        case QAFLORA_CPU_Q8_0_PANEL:
        case QAFLORA_CPU_Q4_0_PANEL: break;
    }
    return 0;
}

void qaflora_make_rows(qaflora_cpu_type type, int64_t rank, int64_t n_in, const uint8_t * rows, uint8_t * dst) {
    using q8 = qaflora_store::q8_0_numbers;
    const size_t block_size = ggml_type_size(GGML_TYPE_Q8_0);
    const size_t row_size = qaflora_row_size(type, n_in);
    if (type != QAFLORA_CPU_Q8_0) {
        memcpy(dst, rows, rank*row_size);
        return;
    }
    const int64_t n_block = n_in/q8::BLOCK;
    for (int64_t r = 0; r < rank; ++r) {
        for (int64_t ib = 0; ib < n_block; ++ib) {
            const uint8_t * block = rows + (r*n_block + ib)*block_size;
            uint16_t h;
            memcpy(&h, block, sizeof(h));
            const float scale = qaflora_store::f16_to_f32(h);
            memcpy(dst + r*row_size + ib*4, &scale, sizeof(scale));
            memcpy(dst + r*row_size + n_block*4 + ib*q8::BLOCK, block + 2, q8::BLOCK);
        }
    }
}

size_t qaflora_panel_size(qaflora_cpu_type type, int64_t n_out, int64_t rank) {
    const int64_t n_panel = (n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    return n_panel*qaflora_store::panel_size(type, rank);
}

template <typename V>
static void transpose(int64_t n_out, int64_t rank, const V * rows, V * panels) {
    for (int64_t o = 0; o < n_out; ++o) {
        V * panel = panels + o/QAFLORA_PANEL*rank*QAFLORA_PANEL + o % QAFLORA_PANEL;
        for (int64_t r = 0; r < rank; ++r) {
            panel[r*QAFLORA_PANEL] = rows[o*rank + r];
        }
    }
}

static void transpose_q8_0(int64_t n_out, int64_t rank, const uint8_t * rows, uint8_t * panels) {
    using q8 = qaflora_store::q8_0_numbers;
    const size_t  block_size = ggml_type_size(GGML_TYPE_Q8_0);
    const int64_t n_block = rank/q8::BLOCK;
    for (int64_t o = 0; o < n_out; ++o) {
        for (int64_t ib = 0; ib < n_block; ++ib) {
            const uint8_t * src = rows + (o*n_block + ib)*block_size;
            uint8_t * dst = panels + (o/QAFLORA_PANEL*n_block + ib)*q8::PANEL_SIZE;
            memcpy(dst + 2*(o % QAFLORA_PANEL), src, 2);
            for (int r = 0; r < q8::BLOCK; ++r) {
                dst[2*QAFLORA_PANEL + r*QAFLORA_PANEL + o % QAFLORA_PANEL] = src[2 + r];
            }
        }
    }
}

void qaflora_make_panels(qaflora_cpu_type type, int64_t n_out, int64_t rank, const uint8_t * rows, uint8_t * panels) {
    switch (type) {
        case QAFLORA_CPU_F32:  transpose(n_out, rank, (const uint32_t *) rows, (uint32_t *) panels); break;
        case QAFLORA_CPU_F16:
        case QAFLORA_CPU_BF16: transpose(n_out, rank, (const uint16_t *) rows, (uint16_t *) panels); break;
        case QAFLORA_CPU_Q8_0: transpose_q8_0(n_out, rank, rows, panels); break;
        case QAFLORA_CPU_Q4_0:
        case QAFLORA_CPU_Q8_0_PANEL:
        case QAFLORA_CPU_Q4_0_PANEL: break; // no file has B so
    }
}

enum { BLOCK = qaflora_store::q8_0_numbers::BLOCK };

// One block: the scale, and the numbers as ggml rounds them (llama.cpp 0c1e5709, quantize_row_q8_0_ref, _q4_0_ref). The
// scale stays F32: adapters have values so small that their scale would lose digits as F16.
static float encode_block(bool is_q4, const float * x, uint8_t * numbers) {
    float largest = 0.0f; // with its sign
    for (int i = 0; i < BLOCK; ++i) {
        largest = std::fabs(x[i]) > std::fabs(largest) ? x[i] : largest;
    }
    const float scale = is_q4 ? largest/-8.0f : std::fabs(largest)/127.0f;
    const float inverse = scale == 0.0f ? 0.0f : 1.0f/scale;
    if (!is_q4) {
        for (int i = 0; i < BLOCK; ++i) {
            numbers[i] = (uint8_t) (int8_t) std::lround(x[i]*inverse);
        }
        return scale;
    }
    const auto nibble = [&](float value) { return (uint8_t) std::min(15, (int) (value*inverse + 8.5f)); };
    for (int i = 0; i < BLOCK/2; ++i) {
        numbers[i] = nibble(x[i]) | nibble(x[i + BLOCK/2]) << 4;
    }
    return scale;
}

void qaflora_encode_rows(qaflora_cpu_type type, int64_t rank, int64_t n_in, const float * rows, uint8_t * dst) {
    const bool is_q4 = type == QAFLORA_CPU_Q4_0;
    const int64_t n_block  = n_in/BLOCK;
    const size_t  row_size = qaflora_row_size(type, n_in);
    for (int64_t r = 0; r < rank; ++r) {
        uint8_t * numbers = dst + r*row_size + n_block*sizeof(float);
        for (int64_t ib = 0; ib < n_block; ++ib) {
            const float scale = encode_block(is_q4, rows + r*n_in + ib*BLOCK, numbers + ib*(is_q4 ? BLOCK/2 : BLOCK));
            memcpy(dst + r*row_size + ib*sizeof(scale), &scale, sizeof(scale));
        }
    }
}

void qaflora_encode_panels(qaflora_cpu_type type, int64_t n_out, int64_t rank, const float * rows, uint8_t * panels) {
    const size_t rank_size = qaflora_store::panel_size(type, 1);
    for (int64_t o = 0; o < n_out; o += QAFLORA_PANEL) {
        for (int64_t r = 0; r < rank; ++r, panels += rank_size) {
            float x[BLOCK] = {};
            for (int64_t i = 0; i < std::min<int64_t>(BLOCK, n_out - o); ++i) {
                x[i] = rows[(o + i)*rank + r];
            }
            const float scale = encode_block(type == QAFLORA_CPU_Q4_0_PANEL, x, panels + sizeof(float));
            memcpy(panels, &scale, sizeof(scale));
        }
    }
}
