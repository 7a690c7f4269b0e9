// The state that one llama_context keeps for us.
// shapes: numpy order

#pragma once

#include "qaflora-hooks.h"
#include "qaflora-pack.h"

#include <memory>
#include <string>
#include <vector>

struct qaflora_lens_state; // what the lens computes with, made when first used

struct qaflora_context {
    const qaflora_pack * pack = nullptr;
    uint32_t flags   = 0;
    int32_t  n_layer = 0;
    int32_t  n_embd  = 0;

    std::vector<std::vector<float>> weights; // [n_seq_max][n_adapter*n_layer]
    std::vector<int32_t> first_layer;        // [n_seq_max] the first whose products an adapter enters; 0 until weights are set
    uint64_t             n_first_layer = 0;  // times that one of them changed

    qaflora_capture capture = QAFLORA_CAPTURE_NONE;
    std::vector<std::vector<double>> states; // [n_seq_max][n_layer*n_embd], the last row or a sum of rows
    std::vector<int64_t>             n_row;  // [n_seq_max] rows seen
    std::vector<std::vector<float>>  inputs; // [n_seq_max][n_row*n_layer*n_embd] of the query projections

    std::vector<qaflora_cpu_attention> attention; // [n_layer], that graphs refer to

    qaflora_stats stats = {};
    std::vector<bool> module_used; // [n_module] whether a graph multiplied with it
    int32_t       n_captured = 0; // blocks whose output the last graph captures
    int32_t       n_captured_input = 0; // query projections whose input the last graph captures
    std::string   graph_error;    // why a graph that was built cannot honour the pack, or empty

    std::shared_ptr<qaflora_lens_state> lens;
    uint64_t n_lens = 0; // times that it was used

    bool is_probe() const        { return flags & QAFLORA_CONTEXT_PROBE; }
    bool is_differential() const { return flags & QAFLORA_CONTEXT_DIFFERENTIAL; }
    bool has_states() const      { return capture <= QAFLORA_CAPTURE_MEAN; }
    bool has_inputs() const      { return capture == QAFLORA_CAPTURE_INPUTS; }
};
