// What llama.cpp calls, see patches/0001-call-qaflora-hooks.patch.
// shapes: ggml order, ne[0] first

#pragma once

#include "llama.h"
#include "ggml-backend.h"

#include <cstdint>
#include <memory>

struct llama_ubatch;
struct llm_graph_context;
class  llm_graph_result;
struct qaflora_context;

// the state for the llama_context under construction on this thread, or null
std::shared_ptr<qaflora_context> qaflora_context_pending();

// Before a batch, a micro-batch, and after a graph was built: false, with a sentence in qaflora_last_error(), where llama.cpp
// would end the process, or where it would compute something else than was asked for. llama_decode then fails.
bool qaflora_accepts_batch (uint32_t n_token, uint32_t n_token_max, uint32_t n_output, uint32_t n_output_max);
bool qaflora_accepts_ubatch(const qaflora_context & qf, const llama_ubatch & ubatch);
bool qaflora_accepts_graph (qaflora_context & qf);

bool     qaflora_has_logits(const qaflora_context & qf);
uint32_t qaflora_n_nodes   (const qaflora_context & qf);

// what decides the graph's topology beside llm_graph_params
uint64_t qaflora_graph_key(const qaflora_context & qf, const llama_ubatch & ubatch, uint32_t n_outputs);

// res = W cur [n_out, n_row]; returns it, or the differential product in its place
ggml_tensor * qaflora_mm_base(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res);

// returns res + sum over adapters of weight * scale * B (A cur)
ggml_tensor * qaflora_mm_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res);

// the same for stacked experts: w [n_in, n_out, n_expert], cur [n_in, 1 or n_used, n_row], ids [n_used, n_row], res [n_out, n_used, n_row]
ggml_tensor * qaflora_mm_id_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * ids, ggml_tensor * res);

// the same for the token embedding: res [n_embd, n_token]
ggml_tensor * qaflora_embd_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * tokens, ggml_tensor * res);

// Attention of q [n_key_dim, n_token, n_head, n_stream] over the cache's k [n_key_dim, n_key, n_kv_head, n_stream] and v [n_key,
// n_value_dim, n_kv_head, n_stream] with a mask [n_key, n_token, 1, n_stream]: [n_value_dim*n_head, n_token*n_stream], or null
// where llama.cpp is to compute it. Whether that depends on the model and its place alone: see qaflora_has_attention().
ggml_tensor * qaflora_attend(const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, float scale, int32_t il);

// keeps cur if it is a block's output and states are captured
void qaflora_capture_block(const llm_graph_context & gctx, ggml_tensor * cur, const char * name, int il);

// after a micro-batch: copies captured states to the host
void qaflora_extract(qaflora_context & qf, const llm_graph_result & res, const llama_ubatch & ubatch, ggml_backend_sched_t sched);
