// qaflora-edge: several LoRA adapters on one context, weighted per sequence and per layer.
// shapes in this file: numpy order, last axis contiguous
//
// Functions that can fail return 0 or a null pointer on failure, unless said otherwise, and
// leave a sentence in qaflora_last_error().

#pragma once

#include "llama.h"

#include <stdint.h>

#define QAFLORA_ABI_VERSION 9

#ifdef __cplusplus
extern "C" {
#endif

struct qaflora_pack;

enum qaflora_context_flags {
    QAFLORA_CONTEXT_PROBE        = 1, // states are captured and no logits are computed
    QAFLORA_CONTEXT_DIFFERENTIAL = 2, // sequence 0 is the base: others add W (x_j - x_0) to its products
};

enum qaflora_capture {
    QAFLORA_CAPTURE_LAST   = 0, // of a probe: states of the last output row of each sequence
    QAFLORA_CAPTURE_MEAN   = 1, // of a probe: states as the mean over the output rows of each sequence
    QAFLORA_CAPTURE_INPUTS = 2, // what the query projections read, of every row
    QAFLORA_CAPTURE_NONE   = 3,
};

enum qaflora_lens {
    QAFLORA_LENS_RAW  = 0, // the head sees raw states, final-normed at the last layer only
    QAFLORA_LENS_NORM = 1, // the head sees final-normed states at every layer
};

struct qaflora_stats {
    int64_t n_graph_built; // graphs built by this context, those of a reservation included
    int64_t n_decoded;     // micro-batches computed by this context
    int64_t lens_us;       // spent in qaflora_divergence() on projecting, in microseconds
    int64_t divergence_us; // and on what follows
};

LLAMA_API int32_t      qaflora_abi_version(void);
LLAMA_API const char * qaflora_build_info (void); // "llama.cpp COMMIT, patches HASH"
LLAMA_API const char * qaflora_last_error (void); // of the calling thread, never null

// Whether to load models with use_extra_bufts false: 1 where the CPU's kernels multiply matrices as files store them. Rearranged
// by llama.cpp, for AMX too, some are multiplied otherwise alone than in company, and lie in memory twice.
LLAMA_API int32_t      qaflora_has_products(void);

// Whether attention of this model over a cache in memory, in F16 or F32 and without flash attention, is that of the CPU's kernels: 1,
// and its scores need no memory.
LLAMA_API int32_t      qaflora_has_attention(const struct llama_model * model);

// the CPU's kernels that adapters are computed with, "ggml" for llama.cpp's own; null, with qaflora_last_error(), for unknown ones
LLAMA_API const char * qaflora_kernels_name(void);

// attributes [n_token], of enum llama_token_attr, of a vocabulary's first tokens
LLAMA_API void         qaflora_vocab_attributes(const struct llama_vocab * vocab, int32_t n_token, int32_t * attributes);

// how A and B of adapters are stored
enum qaflora_adapter_type {
    QAFLORA_ADAPTER_AUTO = 0, // as the files have them; what the CPU's kernels do not know, such as Q4_0, as F32
    QAFLORA_ADAPTER_Q8_0 = 1, // converted, where the CPU's kernels multiply with them: 8 bits, a scale for each 32 numbers
    QAFLORA_ADAPTER_Q4_0 = 2, // 4 bits
};

// Reads n_adapter adapter files (none is allowed) and stacks them along the rank axis, beside the base's weights.
// Fails where a matrix is to be converted whose products are not those of the CPU's kernels; the token embedding's stay.
// The model must outlive the pack, the pack every context made with it.
LLAMA_API struct qaflora_pack * qaflora_pack_init(struct llama_model * model, const char * const * paths, int32_t n_adapter, enum qaflora_adapter_type type);
LLAMA_API void                  qaflora_pack_free(struct qaflora_pack * pack);
LLAMA_API int64_t               qaflora_pack_size_bytes(const struct qaflora_pack * pack);

// the first layer with a module of an adapter: where n_layer, it has none
LLAMA_API int32_t               qaflora_pack_first_layer(const struct qaflora_pack * pack, int32_t ia);

// How many rows of a sequence one llama_decode may have so that each gets the same bits as in one of its own, without flash
// attention; 1 where that is not known: kernels without products of the base, matrices that are not quantised, experts.
LLAMA_API int32_t               qaflora_pack_n_alike(const struct qaflora_pack * pack);

// A context whose sequences use the pack; all weights start at 0. Free it with llama_free.
// llama_decode with it leaves qaflora_last_error() empty, or says there why it returned
//   -1  for a batch with more tokens or outputs than the context has room for
//   -3  for sequences of a differential probe that cannot be subtracted: each micro-batch must have the sequences 0, 1, ... m
//       with the same tokens, positions and outputs. 0 alone is the base; m may be smaller than the number of adapters.
// An earlier micro-batch of the same batch stays in memory, as llama.h says of every failure.
LLAMA_API struct llama_context * qaflora_context_init(struct llama_model * model, const struct llama_context_params * params,
                                                      struct qaflora_pack * pack, uint32_t flags);

// llama_decode, which also returns -2, with qaflora_last_error(), where memory ran out in the middle.
LLAMA_API int32_t qaflora_decode(struct llama_context * ctx, const struct llama_batch * batch);

// weights [n_adapter, n_layer] of one sequence, used from the next llama_decode on. Returns 1 on success.
LLAMA_API int32_t qaflora_set_weights(struct llama_context * ctx, llama_seq_id seq_id, const float * weights, int64_t n_weight);

// Forget what was captured and capture in this way from now on: LAST at first in a probe, NONE in other contexts. Returns 1 on success.
// llama_decode fails with QAFLORA_CAPTURE_INPUTS where some block has no query projection of its own.
LLAMA_API int32_t qaflora_capture_begin(struct llama_context * ctx, enum qaflora_capture capture);

// states [n_layer, n_embd] of one sequence after each block. Returns 1 on success.
LLAMA_API int32_t qaflora_get_states(struct llama_context * ctx, llama_seq_id seq_id, float * states, int64_t n_state);

// inputs [n, n_layer, n_embd] of the query projections: of each row of one sequence since qaflora_capture_begin(). Returns 1 on success.
LLAMA_API int32_t qaflora_get_inputs(struct llama_context * ctx, llama_seq_id seq_id, float * inputs, int64_t n_input);

// divergence [n_adapter, n_layer] = KL(base || adapter) in nats of the next-token distributions that the
// base's head gives to the states base [n_layer, n_embd] and adapted [n_adapter, n_layer, n_embd]. Returns 1 on success.
LLAMA_API int32_t qaflora_divergence(struct llama_context * ctx, enum qaflora_lens lens, int32_t n_adapter,
                                     const float * base, const float * adapted, double * divergence);

// logits [n_row, n_vocab] = head of the rows [n_row, n_embd], as they are. Returns 1 on success.
LLAMA_API int32_t qaflora_project(struct llama_context * ctx, int32_t n_row, const float * rows, float * logits);

LLAMA_API struct qaflora_stats qaflora_get_stats(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
