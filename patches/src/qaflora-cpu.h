// Adapters on the CPU: the products and sums that ggml would need four operations for, in two.
// shapes: numpy order, last axis contiguous

#pragma once

#include <cstddef>
#include <cstdint>

struct ggml_tensor;

// B is stored in panels of so many outputs
#define QAFLORA_PANEL 32

// how the numbers of A or B are stored
enum qaflora_cpu_type {
    QAFLORA_CPU_F32,
    QAFLORA_CPU_F16,
    QAFLORA_CPU_BF16,
    QAFLORA_CPU_Q8_0,
};

// one adapter's share of one matrix of the base
struct qaflora_cpu_segment {
    int32_t          ia     = 0;    // adapter
    float            scale  = 0.0f; // alpha/rank
    int64_t          rank   = 0;
    int64_t          offset = 0;    // of its columns in t, see below
    qaflora_cpu_type type_a = QAFLORA_CPU_F32;
    qaflora_cpu_type type_b = QAFLORA_CPU_F32;
    const uint8_t *  a = nullptr;   // [rank, n_in]; Q8_0: see qaflora_row_size()
    const uint8_t *  b = nullptr;   // [n_panel, rank, QAFLORA_PANEL]; Q8_0: see qaflora_panel_size()
};

// Which rows weigh adapters how. A weight of 0 costs nothing: neither products nor memory are touched.
struct qaflora_cpu_rows {
    int64_t         n_row     = 0;
    const int32_t * slot      = nullptr; // [n_row], or null: all rows are of slot 0
    int64_t         n_adapter = 0;
    const float *   weights   = nullptr; // [n_slot, n_adapter]
};

// How ggml's products on the CPU round activations to 8 bits (llama.cpp 0c1e5709: quantize_row_q8_0_ref, _q8_1_ref, _q8_K_ref)
struct qaflora_rounding {
    int64_t block     = 0;     // numbers that share a scale: the largest of them is 127 steps; 0: no rounding
    bool    f16_scale = false; // the step itself is rounded to F16
};

// t [n_row, n_rank]: weight * scale * A x of every segment, each at its offset; columns of weight 0 are left as they are
struct qaflora_rank_product {
    const qaflora_cpu_segment * segments = nullptr;
    int64_t n_segment = 0;
    int64_t n_in      = 0;
    int64_t n_rank    = 0;
};

// y [n_row, n_out] = src + sum over segments of B t
struct qaflora_delta {
    const qaflora_cpu_segment * segments = nullptr;
    int64_t n_segment = 0;
    int64_t n_out     = 0;
    int64_t n_rank    = 0; // columns of t
};

// KL(p || q_j), p = softmax(z), q_j = softmax(z + d_j), from sums over a vocabulary that is seen slice by slice.
// With u = d - c for any c: KL = log1p(sum p u + sum p (expm1(u) - u)) - sum p u. c is d where p is largest so far: most of p
// then adds nothing, and u keeps its digits even where p is almost all on one token. Where u is so large that exp(u) would
// overflow, sum p exp(u) is kept by its logarithm: KL = log(sum p exp(u)) - sum p u.
struct qaflora_divergence_sums {
    double z_max = 0.0; // largest z so far
    double s     = 0.0; // sum of exp(z - z_max); 0: nothing was seen
    struct adapter {
        double unit  = 1.0; // of the d that accumulate() is given
        double c     = 0.0;
        double first = 0.0; // sum of exp(z - z_max) u
        double rest  = 0.0; // sum of exp(z - z_max) (expm1(u) - u)
        double far   = 0.0; // in place of rest, if not 0: sum of exp(z - z_max + u - far_max)
        double far_max = 0.0;
    } * adapters = nullptr; // [n_adapter]

    double divergence(int64_t ia) const; // NaN where a state was not finite
};

// what x_j - x_0 is taken for
struct qaflora_cpu_difference {
    const struct qaflora_kernels * kernels = nullptr;
    qaflora_rounding rounding;
};

// The functions below, for one instruction set. Thread ith of nth does its share.
struct qaflora_kernels {
    const char * name;

    void (*rank_product)(const qaflora_rank_product & p, const qaflora_cpu_rows & rows, const float * x, float * t, int ith, int nth);

    // n_base > 0: the first n_base rows are the base's, and row i adds row i % n_base of src to its own.
    // y may be src.
    void (*add_delta)(const qaflora_delta & d, const qaflora_cpu_rows & rows, const float * t, const float * src, float * y,
                      int64_t n_base, int ith, int nth);

    // d [n_row, n] = x for the first n_base rows, x - (row i % n_base of x) for the others
    void (*subtract_base)(const float * x, float * d, int64_t n, int64_t n_row, int64_t n_base, int ith, int nth);

    // power of the rounding error of a row x [n] that is rounded to 8 bits in blocks
    float (*rounding_power)(const qaflora_rounding & rounding, const float * x, int64_t n);

    // x [n] = rounded + rest, where rounded is what is left unchanged by rounding
    void (*split)(const qaflora_rounding & rounding, const float * x, float * rounded, float * rest, int64_t n);

    // row rows[i] of y [.., n_out] += row i of more [n_rows, n_out]; threads divide n_out as in add_delta
    void (*add_rows)(float * y, const float * more, const int32_t * rows, int64_t n_rows, int64_t n_out, int ith, int nth);

    // one more slice of a vocabulary: logits of the base z [n], their differences d [n_adapter, stride]; p [n] is room to work in
    void (*accumulate)(qaflora_divergence_sums & sums, int64_t n_adapter, const float * z, const float * d, int64_t stride, int64_t n, double * p);
};

// null where they were not compiled
const qaflora_kernels * qaflora_kernels_avx2();
const qaflora_kernels * qaflora_kernels_avx512();

// The fastest of this processor, or the one that the environment variable QAFLORA_CPU_KERNELS names
// (avx512, avx2, neon, portable); throws std::runtime_error if this processor or build lacks it.
const qaflora_kernels & qaflora_best_kernels();

// false under QAFLORA_CPU_KERNELS=ggml: ggml's own operations are used, as on a GPU
bool qaflora_has_kernels();

// bytes of a row of A [rank, n_in]. As ggml's, but for Q8_0: F32 scales of blocks of 32, then int8.
size_t qaflora_row_size(qaflora_cpu_type type, int64_t n_in);

// rows: [rank, n_in] in ggml's rows
void qaflora_make_rows(qaflora_cpu_type type, int64_t rank, int64_t n_in, const uint8_t * rows, uint8_t * dst);

// bytes of B [n_out, rank] in panels. Of Q8_0 a panel has for each 32 ranks F16 scales [QAFLORA_PANEL], then int8 [32, QAFLORA_PANEL].
size_t qaflora_panel_size(qaflora_cpu_type type, int64_t n_out, int64_t rank);

// rows: [n_out, rank] in ggml's rows
void qaflora_make_panels(qaflora_cpu_type type, int64_t n_out, int64_t rank, const uint8_t * rows, uint8_t * panels);

// ggml_custom_op_t
//   product: src x [n_row, n_in], weights [n_layer, n_slot, n_adapter], slot I32 [n_row] or none. userdata qaflora_cpu_group
//   delta:   src y, t [n_row, n_rank], weights, slot or none. userdata qaflora_cpu_module
//   delta_experts: src y [n_row, n_used, n_out], x [n_row, 1 or n_used, n_in], experts I32 [n_row, n_used], weights, slot or none.
//            userdata qaflora_cpu_module
//   *_differential: y is [n_slot, n_row/n_slot, n_out]; after the slots of delta, and after y of base, there may be
//            rows I32 [n]: then y has n rows more, to be added to these
//   subtract_base: x, rows or none. userdata qaflora_cpu_difference
//   coarsest_rows: x [n_slot, n_base, n_in]; dst I32: rows whose rounding loses most, qaflora_n_split() of each slot.
//            userdata qaflora_cpu_difference
void qaflora_op_product           (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta             (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta_experts     (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_delta_differential(ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_base_differential (ggml_tensor * dst, int ith, int nth, void * userdata);
void qaflora_op_subtract_base     (ggml_tensor * dst, int ith, int nth, void * userdata);
int64_t qaflora_n_split(int64_t slot, int64_t n_base); // of n_base rows
void qaflora_op_coarsest_rows     (ggml_tensor * dst, int ith, int nth, void * userdata);
