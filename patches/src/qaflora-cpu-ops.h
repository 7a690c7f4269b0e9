// The CPU's kernels as ggml's custom operations, and what each is given.
// shapes: numpy order, last axis contiguous

#pragma once

#include "qaflora-cpu.h"

#include <atomic>
#include <vector>

struct ggml_tensor;

// operations of a graph run on threads that no exception may leave: those that failed are counted, and the batch fails
inline std::atomic<uint64_t> qaflora_n_failed_op { 0 };

// what the CPU's operations need of a module, and of a group; without segments the module is not on the CPU
struct qaflora_cpu_module {
    const qaflora_kernels * kernels = nullptr;
    int32_t il       = 0;
    int64_t n_in     = 0;
    int64_t n_out    = 0; // of a module
    int64_t n_rank   = 0; // of the group
    int64_t n_expert = 0; // of experts
    std::vector<qaflora_cpu_segment> segments; // of experts: those of the first; of a group: those of its modules
};

// what x_j - x_0 is taken for
struct qaflora_cpu_difference {
    const struct qaflora_kernels * kernels = nullptr;
    qaflora_rounding rounding;
    int64_t n_split = 0; // rows of the base that are split
};

// what attention of a layer is computed with
struct qaflora_cpu_attention {
    const struct qaflora_kernels * kernels = nullptr;
    float scale = 1.0f;
};

// w as matmul() takes it, of type OTHER if it does not
qaflora_matrix qaflora_matrix_of(const ggml_tensor * w);

// ggml_custom_op_t
//   product: src x [n_row, n_in], weights [n_layer, n_slot, n_adapter], slot I32 [n_row] or none. userdata qaflora_cpu_module of the group
//   delta:   src y, t [n_row, n_rank], weights, slot or none. userdata qaflora_cpu_module
//   delta_experts: src y [n_row, n_used, n_out], x [n_row, 1 or n_used, n_in], experts I32 [n_row, n_used], weights, slot or none.
//            userdata qaflora_cpu_module
//   *_differential: dst is [n_slot, n_row/n_slot, n_out]; after the slots of delta, and after y of base, there may be
//            rows I32 [n]: then y has n rows more, to be added to these. y may have fewer slots: the others get the base's rows
//   round: x [n_row, n_in]; dst matmul_rounded_size() bytes. userdata qaflora_kernels
//   matmul: what round made, w [n_out, n_in]; dst [n_row, n_out]. userdata qaflora_kernels
//   attend: q, k, v, mask as ggml_flash_attn_ext takes them, but v with keys first; dst [n_token, n_head*n_value_dim], the tokens of
//            all streams. userdata qaflora_cpu_attention
//   subtract_base: x, rows or none. userdata qaflora_cpu_difference
//   coarsest_rows: x [n_slot, n_base, n_in]; dst I32: rows whose rounding loses most, qaflora_n_split() of each slot.
//            userdata qaflora_cpu_difference
void qaflora_op_product           (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta             (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta_experts     (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta_differential(ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_base_differential (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_round             (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_matmul            (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_attend            (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_subtract_base     (ggml_tensor * dst, int ith, int nth, void * userdata);
int64_t qaflora_n_split(const qaflora_cpu_difference & how, int64_t slot, int64_t n_base); // of n_base rows
void qaflora_op_coarsest_rows     (ggml_tensor * dst, int ith, int nth, void * userdata);
