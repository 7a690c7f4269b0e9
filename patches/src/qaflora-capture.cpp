// States that a probe keeps while a graph is computed.
// shapes: ggml order, ne[0] first

#include "qaflora-graph-input.h"

#include "llama-model.h"

#include <algorithm>
#include <cstring>

bool qaflora_has_logits(const qaflora_context & qf) {
    return !qf.is_probe();
}

static ggml_tensor * kept(const llm_graph_context & gctx, ggml_tensor * cur) {
    ggml_set_output(cur);
    ggml_build_forward_expand(gctx.gf, cur);
    return cur;
}

static int32_t count(const std::vector<ggml_tensor *> & captured) {
    return (int32_t) std::count_if(captured.begin(), captured.end(), [](const ggml_tensor * t) { return t; });
}

void qaflora_capture_input(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w, ggml_tensor * cur) {
    const auto & layers = gctx.qaflora->pack->model->layers;
    for (int32_t il = 0; il < inp.qf.n_layer; ++il) {
        if (w == layers[il].wq || w == layers[il].wqkv) {
            // a node of its own: llama.cpp plans memory anew only where the number of nodes changes
            inp.captured_input[il] = kept(gctx, ggml_cont(gctx.ctx0, cur));
            gctx.qaflora->n_captured_input = count(inp.captured_input);
            return;
        }
    }
}

void qaflora_capture_block(const llm_graph_context & gctx, ggml_tensor * cur, const char * name, int il) {
    // llama.cpp 0c1e5709: the dense architectures name every block's output l_out
    if (!gctx.qaflora->has_states() || il < 0 || il >= gctx.qaflora->n_layer || strcmp(name, "l_out") != 0 || gctx.n_outputs == 0) {
        return;
    }
    if (cur->ne[0] != gctx.qaflora->n_embd || cur->ne[2] != 1 || cur->ne[3] != 1) {
        return; // several streams side by side, as of gemma3n: no one state is the block's
    }
    qaflora_graph_input & inp = qaflora_get_input(gctx);
    if (cur->ne[1] != gctx.n_outputs) {
        if (!inp.output_rows) {
            inp.output_rows = qaflora_new_index(gctx, gctx.n_outputs, "qaflora_output_rows");
        }
        cur = ggml_get_rows(gctx.ctx0, cur, inp.output_rows);
    }
    inp.captured[il] = kept(gctx, cur);
    gctx.qaflora->n_captured = count(inp.captured);
}

// a sum of output rows, or the last one
static void add_state(const qaflora_context & qf, const float * src, double * dst) {
    for (int32_t j = 0; j < qf.n_embd; ++j) {
        dst[j] = qf.capture == QAFLORA_CAPTURE_MEAN ? dst[j] + src[j] : src[j];
    }
}

void qaflora_extract(qaflora_context & qf, const llm_graph_result & res, const llama_ubatch & ubatch, ggml_backend_sched_t sched) {
    qf.stats.n_decoded++;
    const qaflora_graph_input * inp = qaflora_find_input(res);
    std::vector<llama_seq_id> seq_of_row;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (qf.has_inputs() || (qf.has_states() && ubatch.output[i])) {
            seq_of_row.push_back(ubatch.seq_id[i][0]);
        }
    }
    if (!inp || seq_of_row.empty()) {
        return;
    }
    const auto & captured = qf.has_inputs() ? inp->captured_input : inp->captured;
    if (count(captured) < qf.n_layer) {
        return; // qaflora_accepts_graph() said so
    }
    ggml_backend_sched_synchronize(sched);
    const size_t n_value = (size_t) qf.n_layer*qf.n_embd;
    std::vector<size_t> at_of_row; // of inputs: each row's after those before it
    std::vector<int64_t> n_row = qf.n_row;
    for (const llama_seq_id seq_id : seq_of_row) {
        at_of_row.push_back(n_row[seq_id]++*n_value);
        if (qf.has_inputs()) {
            qf.inputs[seq_id].resize(at_of_row.back() + n_value);
        }
    }
    std::vector<float> rows(seq_of_row.size()*qf.n_embd);
    for (int32_t il = 0; il < qf.n_layer; ++il) {
        ggml_backend_tensor_get(captured[il], rows.data(), 0, rows.size()*sizeof(float));
        for (size_t i = 0; i < seq_of_row.size(); ++i) {
            const float * src = rows.data() + i*qf.n_embd;
            const size_t  at  = (size_t) il*qf.n_embd;
            if (qf.has_inputs()) {
                std::copy_n(src, qf.n_embd, qf.inputs[seq_of_row[i]].data() + at_of_row[i] + at);
            } else {
                add_state(qf, src, qf.states[seq_of_row[i]].data() + at);
            }
        }
    }
    qf.n_row = std::move(n_row);
}
