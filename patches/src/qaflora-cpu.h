// The CPU's kernels: the products and sums that ggml would need four operations for, in two.
// shapes: numpy order, last axis contiguous

#pragma once

#include <cstddef>
#include <cstdint>

// B is stored in panels of so many outputs
#define QAFLORA_PANEL 32

// up to so many rows of a slot get the same bits as each gets alone
#define QAFLORA_FEW 16

// n_key, n_key_dim and n_value_dim of attention are multiples of it
#define QAFLORA_ATTENTION_UNIT 16

// how the numbers of A or B are stored
enum qaflora_cpu_type {
    QAFLORA_CPU_F32,
    QAFLORA_CPU_F16,
    QAFLORA_CPU_BF16,
    QAFLORA_CPU_Q8_0,
    QAFLORA_CPU_Q4_0,       // of A
    QAFLORA_CPU_Q8_0_PANEL, // of B: a scale for each rank of a panel
    QAFLORA_CPU_Q4_0_PANEL,
};

// one adapter's share of one matrix of the base
struct qaflora_cpu_segment {
    int32_t          ia     = 0;    // adapter
    float            scale  = 0.0f; // alpha/rank
    int64_t          rank   = 0;
    int64_t          offset = 0;    // of its columns in t, see below
    qaflora_cpu_type type_a = QAFLORA_CPU_F32;
    qaflora_cpu_type type_b = QAFLORA_CPU_F32;
    const uint8_t *  a = nullptr;   // [rank, n_in]; Q8_0 and Q4_0: see qaflora-cpu-store.h
    const uint8_t *  b = nullptr;   // [n_panel, rank, QAFLORA_PANEL]; quantised: see qaflora-cpu-store.h
};

// Which rows weigh adapters how. A weight of 0 costs nothing: neither products nor memory are touched.
struct qaflora_cpu_rows {
    int64_t         n_row     = 0;
    const int32_t * slot      = nullptr; // [n_row], or null: all rows are of slot 0
    int64_t         n_adapter = 0;
    const float *   weights   = nullptr; // [n_slot, n_adapter]
};

// A matrix of the base as its file has it [n_out, n_in], of a type that matmul() takes
enum qaflora_matrix_type {
    QAFLORA_MATRIX_OTHER,
    QAFLORA_MATRIX_Q4_0,
    QAFLORA_MATRIX_Q4_1,
    QAFLORA_MATRIX_Q5_0,
    QAFLORA_MATRIX_Q4_K,
    QAFLORA_MATRIX_Q5_K,
    QAFLORA_MATRIX_Q6_K,
    QAFLORA_MATRIX_Q8_0,
};

struct qaflora_matrix {
    qaflora_matrix_type type = QAFLORA_MATRIX_OTHER;
    const uint8_t *     data = nullptr;
    int64_t             n_in = 0;
};

// How ggml's products on the CPU round activations to 8 bits (llama.cpp 0c1e5709: quantize_row_q8_0_ref, _q8_1_ref, _q8_K_ref)
struct qaflora_rounding {
    int64_t block     = 0;     // numbers that share a scale: the largest of them is 127 steps; 0: no rounding
    bool    f16_scale = false; // the step itself is rounded to F16
};

// A and B of several adapters
struct qaflora_cpu_segments {
    const qaflora_cpu_segment * segments = nullptr;
    int64_t n_segment = 0;
    int64_t n_in      = 0; // of rank_product() alone
    int64_t n_out     = 0; // of add_delta() alone
    int64_t n_rank    = 0; // columns of t
};

// [n_stream, n_head, n_row, ..], a row's numbers beside each other; strides in bytes
struct qaflora_strided {
    const uint8_t * data;
    size_t stream, head, row;
};

// attention of one layer
struct qaflora_attention {
    qaflora_strided q;    // F32 [n_stream, n_head, n_token, n_key_dim]
    qaflora_strided k;    // [n_stream, n_kv_head, n_key, n_key_dim]
    qaflora_strided v;    // [n_stream, n_kv_head, n_value_dim, n_key]
    qaflora_strided mask; // F32 [n_stream, 1, n_token, n_key], added to scores
    float *      y;    // [n_stream, n_token, n_head, n_value_dim]
    int64_t n_stream, n_head, n_kv_head, n_token, n_key, n_key_dim, n_value_dim;
    float   scale;
    bool    is_f16;    // k and v, which are F32 else
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
        double scaled = 0.0; // in place of rest, if not 0: sum of exp(z - z_max + u - scaled_max)
        double scaled_max = 0.0;
    } * adapters = nullptr; // [n_adapter]

    double divergence(int64_t ia) const; // NaN where a state was not finite
};

// The functions below, for one instruction set. Thread ith of nth does its share.
struct qaflora_kernels {
    const char * name;

    // t [n_row, n_rank]: weight * scale * A x of every segment, each at its offset; columns of weight 0 are left as they are
    void (*rank_product)(const qaflora_cpu_segments & p, const qaflora_cpu_rows & rows, const float * x, float * t, int ith, int nth);

    // y [n_row, n_out] = src + sum over segments of B t; y may be src.
    // n_base > 0: the first n_base rows are the base's, and row i adds row i % n_base of src to its own.
    void (*add_delta)(const qaflora_cpu_segments & d, const qaflora_cpu_rows & rows, const float * t, const float * src, float * y,
                      int64_t n_base, int ith, int nth);

    // d [n_row, n] = x for the first n_base rows, x - (row i % n_base of x) for the others
    void (*subtract_base)(const float * x, float * d, int64_t n, int64_t n_row, int64_t n_base, int ith, int nth);

    // power of the rounding error of a row x [n] that is rounded to 8 bits in blocks
    float (*rounding_power)(const qaflora_rounding & rounding, const float * x, int64_t n);

    // x [n] = rounded + rest, where rounded is what is left unchanged by rounding
    void (*split)(const qaflora_rounding & rounding, const float * x, float * rounded, float * rest, int64_t n);

    // row rows[i] of y [.., n_out] += row i of more [n_rows, n_out]; threads divide n_out as in add_delta
    void (*add_rows)(float * y, const float * more, const int32_t * rows, int64_t n_rows, int64_t n_out, int ith, int nth);

    // Rows with a matrix of the base; null where this instruction set has nothing quicker than ggml. x [n_row, n_in] is
    // rounded once, into matmul_rounded_size() bytes; then y [n_row, stride] are the outputs begin to end of W x, with
    // matmul_room_size() bytes to work in. What comes out does not depend on how many rows and outputs there are.
    size_t (*matmul_rounded_size)(int64_t n_row, int64_t n_in);
    size_t (*matmul_room_size)(int64_t n_in);
    void   (*matmul_round)(const float * x, int64_t n_row, int64_t n_in, void * rounded, int ith, int nth);
    void   (*matmul)(const qaflora_matrix & m, int64_t begin, int64_t end, const void * rounded, int64_t n_row, float * y, int64_t stride, void * room);

    // Attention; null where this instruction set has nothing quicker than ggml. All three sizes are multiples of QAFLORA_ATTENTION_UNIT.
    // What comes out of a row does not depend on which other rows and streams there are, nor on keys that its mask leaves out.
    // Each thread has attend_room_size() bytes to work in.
    size_t (*attend_room_size)(const qaflora_attention & a);
    void   (*attend)(const qaflora_attention & a, void * room, int ith, int nth);

    // one more slice of a vocabulary: logits of the base z [n], their differences d [n_adapter, stride]; p [n] is room to work in
    void (*accumulate)(qaflora_divergence_sums & sums, int64_t n_adapter, const float * z, const float * d, int64_t stride, int64_t n, double * p);
};

const qaflora_kernels * qaflora_kernels_portable(); // NEON where there is

// null where they were not compiled
const qaflora_kernels * qaflora_kernels_avx2();
const qaflora_kernels * qaflora_kernels_avxvnni();
const qaflora_kernels * qaflora_kernels_avx512();
const qaflora_kernels * qaflora_kernels_avx512vnni();
const qaflora_kernels * qaflora_kernels_dotprod(); // NEON with these
const qaflora_kernels * qaflora_kernels_i8mm();

// The fastest of this processor, or the one that the environment variable QAFLORA_CPU_KERNELS names
// (avx512vnni, avxvnni, avx512, avx2, i8mm, dotprod, neon, portable); throws std::runtime_error if this processor or build lacks it.
const qaflora_kernels & qaflora_best_kernels();

// false under QAFLORA_CPU_KERNELS=ggml: ggml's own operations are used, as on a GPU
bool qaflora_has_kernels();
