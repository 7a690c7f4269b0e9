// What a graph is given beside llama.cpp's inputs: weights, and which row follows which sequence.
// shapes: ggml order, ne[0] first

#pragma once

#include "qaflora-context.h"

#include "llama-graph.h"

#include <map>
#include <tuple>
#include <utility>
#include <vector>

// bits of the graph key
enum {
    GRAPH_DIFFERENTIAL     = 1, // rows of all tokens form [.., n_seq] with the base first
    GRAPH_DIFFERENTIAL_OUT = 2, // so do the output rows
    GRAPH_INPUTS           = 4, // inputs are captured
    GRAPH_STATES           = 8, // states are captured
    GRAPH_KEY_BITS         = 4, // above them: how often the lens was used, and layers changed from which on adapters are computed
};

struct qaflora_graph_input : public llm_graph_input_i {
    qaflora_graph_input(const qaflora_context & qf, const llm_graph_context & gctx) :
        qf(qf), sched(gctx.sched), n_slot(gctx.ubatch.n_seqs_unq), n_token(gctx.n_tokens), n_output(gctx.n_outputs),
        key(qaflora_graph_key(qf, gctx.ubatch, gctx.n_outputs)),
        captured(qf.n_layer, nullptr), captured_input(qf.n_layer, nullptr), group_product(qf.pack ? qf.pack->groups.size() : 0) {}

    void set_input(const llama_ubatch * ubatch) override;

    // the shapes depend on nothing but llm_graph_params and the graph key
    bool can_reuse(const llm_graph_params &) override { return true; }

    const qaflora_context & qf;
    ggml_backend_sched_t sched;
    const int64_t  n_slot; // distinct sequences
    const int64_t  n_token;
    const int64_t  n_output;
    const uint64_t key;

    // weight of each rank row: F32 [rank, n_slot, n_layer], one tensor per layout and device
    std::map<std::pair<int32_t, ggml_backend_dev_t>, ggml_tensor *> weights;

    // the same for the CPU's kernels: F32 [n_adapter, n_slot, n_layer]
    ggml_tensor * cpu_weights = nullptr;

    ggml_tensor * slot_token  = nullptr; // I32 [n_token]   which slot each token belongs to
    ggml_tensor * slot_output = nullptr; // I32 [n_output]  the same for output rows
    ggml_tensor * output_rows = nullptr; // I32 [n_output]  token of each output row

    std::vector<ggml_tensor *> captured;       // [n_layer] of F32 [n_embd, n_output]
    std::vector<ggml_tensor *> captured_input; // [n_layer] of F32 [n_embd, n_token] that query projections read

    // while the graph is built: what is shared between modules
    std::map<std::tuple<int32_t, int32_t, ggml_backend_dev_t, bool>, ggml_tensor *> row_weights; // (layout, il, device, is_output)
    struct product { const ggml_tensor * cur = nullptr; ggml_tensor * t = nullptr; };
    std::vector<product> group_product; // [n_group]
    struct difference {
        const ggml_tensor * cur = nullptr;
        bool          is_cpu = false; // of the weights that it is multiplied with
        const qaflora_cpu_difference * how = nullptr; // rows are split for them
        int64_t       n_active = 0;
        ggml_tensor * d     = nullptr;
        ggml_tensor * split = nullptr; // rows that d has in two parts
        ggml_tensor * rounded = nullptr; // d for our own product
    };
    difference last_difference;

private:
    // what is set in a tensor of weights [n_layer, n_slot, n]: those of the segments, each as often as its rank, and zeros
    std::vector<float> values(const std::vector<qaflora_segment> & segments, const ggml_tensor * dst, const llama_ubatch & ubatch) const;

    std::map<const ggml_tensor *, std::vector<float>> weights_there; // what a device's tensor of `weights` holds
};

// null: the graph has none
qaflora_graph_input * qaflora_find_input(const llm_graph_result & res);

// that of the graph under construction, made when first asked for
qaflora_graph_input & qaflora_get_input(const llm_graph_context & gctx);

// I32 [n], an input of the graph
ggml_tensor * qaflora_new_index(const llm_graph_context & gctx, int64_t n, const char * name);

// which slot each of n_row rows belongs to, or null when there is but one
ggml_tensor * qaflora_slots_of(const llm_graph_context & gctx, qaflora_graph_input & inp, int64_t n_row);

// weights of each of n_row rows: [rank, n_row], or [rank, 1] when all rows are of one sequence
ggml_tensor * qaflora_rows_weights(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t layout, int32_t il, int64_t n_row, const ggml_tensor * a);

// those that the CPU's kernels take
ggml_tensor * qaflora_cpu_weights(const llm_graph_context & gctx, qaflora_graph_input & inp);

// keeps cur if w is a query projection
void qaflora_capture_input(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w, ggml_tensor * cur);

// Whether the product with cur is taken differentially, y_0 = W x_0 and y_j = y_0 + W (x_j - x_0), so that the rounding of activations is
// common to both.
bool qaflora_is_differential(const qaflora_graph_input & inp, const ggml_tensor * cur);

// Sequences, from the base on, whose products with w are computed: the others have no adapter up to its layer, so that
// x_j = x_0 there and y_j = y_0. Prober has those come last.
int64_t qaflora_n_active(const qaflora_graph_input & inp, const ggml_tensor * w);
