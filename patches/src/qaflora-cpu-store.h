// How the CPU's kernels have A and B stored.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu.h"

#include "ggml.h"

// how numbers of a type are stored: other types than these become F32
qaflora_cpu_type qaflora_cpu_type_of(ggml_type type);
ggml_type        qaflora_stored_type(ggml_type type);

// bytes of a row of A [rank, n_in]. As ggml's, but for Q8_0 and Q4_0: F32 scales of blocks of 32, then their numbers.
size_t qaflora_row_size(qaflora_cpu_type type, int64_t n_in);

// rows: [rank, n_in] in ggml's rows
void qaflora_make_rows(qaflora_cpu_type type, int64_t rank, int64_t n_in, const uint8_t * rows, uint8_t * dst);

// rows: F32 [rank, n_in], n_in a multiple of 32; type: Q8_0 or Q4_0
void qaflora_encode_rows(qaflora_cpu_type type, int64_t rank, int64_t n_in, const float * rows, uint8_t * dst);

// bytes of B [n_out, rank] in panels. Of Q8_0 a panel has for each 32 ranks F16 scales [QAFLORA_PANEL], then int8 [32, QAFLORA_PANEL];
// of Q8_0_PANEL and Q4_0_PANEL for each rank an F32 scale, then the numbers of QAFLORA_PANEL outputs.
size_t qaflora_panel_size(qaflora_cpu_type type, int64_t n_out, int64_t rank);

// rows: [n_out, rank] in ggml's rows; panels: zeros, which the last one keeps beyond n_out
void qaflora_make_panels(qaflora_cpu_type type, int64_t n_out, int64_t rank, const uint8_t * rows, uint8_t * panels);

// rows: F32 [n_out, rank]; type: Q8_0_PANEL or Q4_0_PANEL
void qaflora_encode_panels(qaflora_cpu_type type, int64_t n_out, int64_t rank, const float * rows, uint8_t * panels);
