// shapes: ggml order, ne[0] first

#include "qaflora-graph-input.h"

uint64_t qaflora_graph_key(const qaflora_context & qf, const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint64_t key = ((qf.n_lens + (qf.is_differential() ? qf.n_first_layer : 0)) << GRAPH_KEY_BITS) // neither count ever falls
        | (qf.has_inputs() ? GRAPH_INPUTS : 0) | (qf.has_states() ? GRAPH_STATES : 0);
    // that sequences are rows of equal length, the base first, was seen by qaflora_accepts_ubatch()
    if (!qf.is_differential() || ubatch.n_seqs_unq < 2) {
        return key;
    }
    const bool has_outputs = n_outputs > 0 && n_outputs % ubatch.n_seqs_unq == 0; // at a reservation, of some sequences only
    return key | GRAPH_DIFFERENTIAL | (has_outputs ? GRAPH_DIFFERENTIAL_OUT : 0);
}

std::vector<float> qaflora_graph_input::values(const std::vector<qaflora_segment> & segments, const ggml_tensor * dst,
                                               const llama_ubatch & ubatch) const {
    std::vector<float> data;
    data.reserve(ggml_nelements(dst));
    for (int32_t il = 0; il < qf.n_layer; ++il) {
        for (int64_t s = 0; s < n_slot; ++s) {
            const auto & w = qf.weights[ubatch.seq_id_unq[s]];
            for (const auto & seg : segments) {
                data.insert(data.end(), seg.rank, seg.ia < 0 ? 0.0f : w[seg.ia*qf.n_layer + il]*seg.scale);
            }
            data.resize((il*n_slot + s + 1)*dst->ne[0], 0.0f);
        }
    }
    return data;
}

void qaflora_graph_input::set_input(const llama_ubatch * ubatch) {
    if (qf.pack->is_offloaded()) {
        // a device may still read the memory of these weights: llama.cpp 0c1e5709, llama-context.cpp process_ubatch
        // waits only under pipeline parallelism, for its own inputs lie on the host
        ggml_backend_sched_synchronize(sched);
    }
    if (cpu_weights && cpu_weights->buffer) {
        std::vector<qaflora_segment> each;
        for (int32_t ia = 0; ia < qf.pack->n_adapter; ++ia) {
            each.push_back({ ia, 1, 1.0f });
        }
        const auto data = values(each, cpu_weights, *ubatch);
        ggml_backend_tensor_set(cpu_weights, data.data(), 0, ggml_nbytes(cpu_weights));
    }
    for (const auto & [key, dst] : weights) {
        if (!dst->buffer) {
            continue;
        }
        auto data = values(qf.pack->layouts[key.first].segments, dst, *ubatch);
        if (weights_there[dst] != data) { // a device may be another machine
            ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
            weights_there[dst] = std::move(data);
        }
    }

    std::vector<int32_t> tokens, outputs, rows;
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        tokens.push_back(ubatch->seq_idx[ubatch->seq_id[i][0]]);
        if (ubatch->output[i]) {
            outputs.push_back(tokens.back());
            rows.push_back(i);
        }
    }
    const auto set = [](ggml_tensor * dst, const std::vector<int32_t> & data) {
        if (dst && dst->buffer && !data.empty()) {
            GGML_ASSERT(ggml_nelements(dst) == (int64_t) data.size());
            ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
        }
    };
    set(slot_token,  tokens);
    set(slot_output, outputs);
    set(output_rows, rows);
}

qaflora_graph_input * qaflora_find_input(const llm_graph_result & res) {
    for (const auto & inp : res.inputs) {
        if (auto * found = dynamic_cast<qaflora_graph_input *>(inp.get())) {
            return found;
        }
    }
    return nullptr;
}

qaflora_graph_input & qaflora_get_input(const llm_graph_context & gctx) {
    qaflora_graph_input * inp = qaflora_find_input(*gctx.res);
    if (!inp) {
        inp = new qaflora_graph_input(*gctx.qaflora, gctx);
        gctx.res->add_input(llm_graph_input_ptr(inp));
        gctx.qaflora->stats.n_graph_built++;
        gctx.qaflora->n_captured_input = 0;
    }
    return *inp;
}

ggml_tensor * qaflora_new_index(const llm_graph_context & gctx, int64_t n, const char * name) {
    ggml_tensor * res = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, n);
    ggml_set_name(res, name);
    ggml_set_input(res);
    return res;
}

ggml_tensor * qaflora_slots_of(const llm_graph_context & gctx, qaflora_graph_input & inp, int64_t n_row) {
    if (inp.n_slot == 1) {
        return nullptr;
    }
    const bool is_output = n_row != inp.n_token;
    ggml_tensor *& slot = is_output ? inp.slot_output : inp.slot_token;
    if (!slot) {
        slot = qaflora_new_index(gctx, n_row, is_output ? "qaflora_slot_output" : "qaflora_slot_token");
    }
    return slot;
}

// weights of one layer: [rank, n_slot], next to the matrices that use them
static ggml_tensor * layer_weights(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t layout, int32_t il, ggml_backend_dev_t dev) {
    ggml_tensor *& all = inp.weights[{ layout, dev }];
    if (!all) {
        all = ggml_new_tensor_3d(gctx.ctx0, GGML_TYPE_F32, inp.qf.pack->layouts[layout].rank, inp.n_slot, inp.qf.n_layer);
        ggml_format_name(all, "qaflora_weights_%d", layout);
        ggml_set_input(all);
        ggml_set_output(all); // its memory is nobody else's, so that it stays
        for (int i = 0; i < ggml_backend_sched_get_n_backends(gctx.sched); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(gctx.sched, i);
            if (ggml_backend_get_device(backend) == dev) {
                ggml_backend_sched_set_tensor_backend(gctx.sched, all, backend);
                break;
            }
        }
    }
    return ggml_view_2d(gctx.ctx0, all, all->ne[0], all->ne[1], all->nb[1], il*all->nb[2]);
}

ggml_tensor * qaflora_rows_weights(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t layout, int32_t il, int64_t n_row, const ggml_tensor * a) {
    const bool is_output = n_row != inp.n_token;
    // where the module's products are computed: the device that holds its A
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(a->buffer));
    ggml_tensor *& res = inp.row_weights[{ layout, il, dev, is_output }];
    if (res) {
        return res;
    }
    res = layer_weights(gctx, inp, layout, il, dev);
    if (ggml_tensor * slot = qaflora_slots_of(gctx, inp, n_row)) {
        res = ggml_get_rows(gctx.ctx0, res, slot);
    }
    return res;
}

ggml_tensor * qaflora_cpu_weights(const llm_graph_context & gctx, qaflora_graph_input & inp) {
    if (!inp.cpu_weights) {
        inp.cpu_weights = ggml_new_tensor_3d(gctx.ctx0, GGML_TYPE_F32, inp.qf.pack->n_adapter, inp.n_slot, inp.qf.n_layer);
        ggml_set_name(inp.cpu_weights, "qaflora_weights");
        ggml_set_input(inp.cpu_weights);
    }
    return inp.cpu_weights;
}
