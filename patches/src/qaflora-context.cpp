// The C interface of a context: making one, its weights, its captured states.
// shapes: numpy order

#include "qaflora-context.h"
#include "qaflora-error.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>

#ifndef QAFLORA_BUILD_INFO
#error "QAFLORA_BUILD_INFO must name the llama.cpp commit and the patches"
#endif

// llama.cpp 0c1e5709: ggml.c and ggml-alloc.c assert that memory was to be had. With this they throw std::bad_alloc, which
// llama.cpp catches or lets pass. CMakeLists.txt compiles them so that it may.
static void on_abort(const char * message) {
    for (const char * asserted : { "(ctx->mem_buffer != NULL)", "(galloc != NULL)", "(galloc->" }) {
        if (strstr(message, asserted)) {
            throw std::bad_alloc();
        }
    }
    fprintf(stderr, "%s\n", message);
}

int32_t qaflora_abi_version(void) { // whoever uses the library asks this first
    const ggml_abort_callback_t before = ggml_set_abort_callback(on_abort);
    if (before && before != on_abort) {
        ggml_set_abort_callback(before); // of the program that we are part of
    }
    return QAFLORA_ABI_VERSION;
}

const char * qaflora_build_info(void) {
    return QAFLORA_BUILD_INFO;
}

// llama_context_params has no room for us: the constructor picks the state up from here
static thread_local std::shared_ptr<qaflora_context> g_pending;

std::shared_ptr<qaflora_context> qaflora_context_pending() {
    return g_pending;
}

static std::shared_ptr<qaflora_context> make_context(const llama_model & model, const qaflora_pack & pack, uint32_t n_seq_max, uint32_t flags) {
    auto qf = std::make_shared<qaflora_context>();
    qf->pack    = &pack;
    qf->flags   = flags;
    qf->n_layer = pack.n_layer;
    qf->n_embd  = model.hparams.n_embd;
    qf->module_used.assign(pack.modules.size(), false);
    qf->weights.assign(n_seq_max, std::vector<float>((size_t) pack.n_adapter*pack.n_layer, 0.0f));
    qf->first_layer.assign(n_seq_max, 0);
    if (qf->is_probe()) {
        qf->capture = QAFLORA_CAPTURE_LAST;
        qf->states.assign(n_seq_max, std::vector<double>((size_t) qf->n_layer*qf->n_embd, 0.0));
    }
    qf->inputs.resize(n_seq_max);
    qf->n_row.assign(n_seq_max, 0);
    return qf;
}

// the reservation built the graphs that decoding will use: say now what they cannot honour
static std::string unsupported(const llama_context & ctx, const qaflora_context & qf) {
    if (!qf.graph_error.empty()) {
        return qf.graph_error;
    }
    for (size_t i = 0; i < qf.module_used.size(); ++i) {
        const auto & m = qf.pack->modules[i];
        if (!qf.module_used[i] && !(qf.is_probe() && m.w == qf.pack->model->output)) {
            return qaflora_format("'%s' is adapted, but architecture '%s' does not multiply with it where adapters can enter; leave it out of the adapter",
                                  m.name.c_str(), llm_arch_name(ctx.get_model().arch));
        }
    }
    if (qf.is_probe() && qf.n_captured != qf.n_layer) {
        return qaflora_format("architecture '%s' shows the output of %d of %d blocks; its states cannot be captured",
                              llm_arch_name(ctx.get_model().arch), qf.n_captured, qf.n_layer);
    }
    return "";
}

llama_context * qaflora_context_init(llama_model * model, const llama_context_params * params, qaflora_pack * pack, uint32_t flags) {
    try {
        if (!model || !params || !pack || pack->model != model) {
            qaflora_fail("a context needs the model that its adapters were loaded for");
        }
        // llama.cpp 0c1e5709: output_reserve asserts room for one output of each sequence
        if (params->n_outputs_max > 0 && params->n_outputs_max < params->n_seq_max) {
            qaflora_fail(qaflora_format("n_outputs_max is %u, expected at least the number of sequences, %u", params->n_outputs_max, params->n_seq_max));
        }
        g_pending = make_context(*model, *pack, std::max(1u, params->n_seq_max), flags);
        llama_context * ctx = llama_init_from_model(model, *params);
        const auto qf = std::move(g_pending);
        g_pending.reset();
        if (!ctx) {
            qaflora_fail("the context could not be made: not enough memory for this context size, or options that do not fit the model");
        }
        const std::string why = unsupported(*ctx, *qf);
        if (!why.empty()) {
            llama_free(ctx);
            qaflora_fail(why);
        }
        return ctx;
    } catch (const std::exception & err) {
        g_pending.reset();
        qaflora_explain(err);
        return nullptr;
    }
}

int32_t qaflora_decode(llama_context * ctx, const llama_batch * batch) {
    const int32_t no_memory = -2; // as llama_decode says it
    const uint64_t n_failed = qaflora_n_failed_op;
    try {
        const int32_t res = llama_decode(ctx, *batch);
        if (res != 0 || qaflora_n_failed_op == n_failed) {
            return res;
        }
        qaflora_explain(std::bad_alloc());
    } catch (const std::exception & err) {
        qaflora_explain(err);
    }
    return no_memory;
}

// call() with the state of ctx, if seq_id is one of its sequences; returns 1, or 0 with an error
template <typename F> static int32_t with_sequence(llama_context * ctx, llama_seq_id seq_id, F call) {
    return qaflora_guarded([&] {
        qaflora_context * qf = ctx ? ctx->qaflora.get() : nullptr;
        if (!qf) {
            qaflora_fail("this context was not made by qaflora_context_init");
        }
        if (seq_id < 0 || seq_id >= (llama_seq_id) qf->weights.size()) {
            qaflora_fail(qaflora_format("sequence %d does not exist, the context has %zu", seq_id, qf->weights.size()));
        }
        call(*qf);
        return 1;
    });
}

int32_t qaflora_set_weights(llama_context * ctx, llama_seq_id seq_id, const float * weights, int64_t n_weight) {
    return with_sequence(ctx, seq_id, [&](qaflora_context & qf) {
        auto & dst = qf.weights[seq_id];
        if (n_weight != (int64_t) dst.size()) {
            qaflora_fail(qaflora_format("%lld weights given, expected %zu: one per adapter and layer", (long long) n_weight, dst.size()));
        }
        for (int64_t i = 0; i < n_weight; ++i) {
            if (!std::isfinite(weights[i])) {
                qaflora_fail(qaflora_format("weight %lld is not finite", (long long) i));
            }
        }
        std::copy(weights, weights + n_weight, dst.begin());
        const int32_t first_layer = qf.pack->first_layer([&](int32_t ia, int32_t il) { return dst[ia*qf.n_layer + il] != 0.0f; });
        qf.n_first_layer += qf.first_layer[seq_id] != first_layer;
        qf.first_layer[seq_id] = first_layer;
    });
}

int32_t qaflora_capture_begin(llama_context * ctx, enum qaflora_capture capture) {
    return with_sequence(ctx, 0, [&](qaflora_context & qf) {
        if (!qf.is_probe() && capture < QAFLORA_CAPTURE_INPUTS) {
            qaflora_fail("this context captures no states; make it with QAFLORA_CONTEXT_PROBE");
        }
        qf.capture = capture;
        for (auto & s : qf.states) {
            std::fill(s.begin(), s.end(), 0.0);
        }
        for (auto & x : qf.inputs) {
            x.clear();
        }
        std::fill(qf.n_row.begin(), qf.n_row.end(), 0);
    });
}

int32_t qaflora_get_states(llama_context * ctx, llama_seq_id seq_id, float * states, int64_t n_state) {
    return with_sequence(ctx, seq_id, [&](qaflora_context & qf) {
        if (!qf.has_states() || qf.n_row[seq_id] == 0) {
            qaflora_fail(qaflora_format("no states were captured for sequence %d", seq_id));
        }
        const auto & src = qf.states[seq_id];
        if (n_state != (int64_t) src.size()) {
            qaflora_fail(qaflora_format("room for %lld state values, expected %zu", (long long) n_state, src.size()));
        }
        const double scale = qf.capture == QAFLORA_CAPTURE_MEAN ? 1.0/qf.n_row[seq_id] : 1.0;
        std::transform(src.begin(), src.end(), states, [scale](double x) { return (float) (x*scale); });
    });
}

int32_t qaflora_get_inputs(llama_context * ctx, llama_seq_id seq_id, float * inputs, int64_t n_input) {
    return with_sequence(ctx, seq_id, [&](qaflora_context & qf) {
        if (!qf.has_inputs() || qf.n_row[seq_id] == 0) {
            qaflora_fail(qaflora_format("no inputs were captured for sequence %d", seq_id));
        }
        const auto & src = qf.inputs[seq_id];
        if (n_input != (int64_t) src.size()) {
            qaflora_fail(qaflora_format("room for %lld input values, expected %zu", (long long) n_input, src.size()));
        }
        std::copy(src.begin(), src.end(), inputs);
    });
}

qaflora_stats qaflora_get_stats(llama_context * ctx) {
    return ctx && ctx->qaflora ? ctx->qaflora->stats : qaflora_stats {};
}
