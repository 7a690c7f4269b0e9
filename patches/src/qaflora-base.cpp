#include "qaflora-base.h"

#include "qaflora.h"
#include "qaflora-error.h"

#include "llama-model.h"

#include <cstdio>
#include <utility>

ggml_tensor * qaflora_base_tensor(const llama_model & model, const std::string & name) {
    if (name == "output.weight") {
        return model.output; // under a tied head the base stores no tensor of this name
    }
    if (name == "token_embd.weight") {
        return model.tok_embd; // a tied head may be a second tensor of this name
    }
    return const_cast<ggml_tensor *>(model.get_tensor(name.c_str()));
}

bool qaflora_is_experts(const std::string & name) {
    for (const char * kind : { "gate_exps", "up_exps", "down_exps", "gate_up_exps", "gate_chexps", "up_chexps", "down_chexps" }) {
        int32_t il = -1;
        if (sscanf(name.c_str(), "blk.%d.", &il) == 1 && name == qaflora_format("blk.%d.ffn_%s.weight", il, kind)) {
            return true;
        }
    }
    return false;
}

int32_t qaflora_layer_of(const std::string & name, int32_t n_layer) {
    int32_t il = -1;
    if (sscanf(name.c_str(), "blk.%d.", &il) == 1 && il >= 0 && il < n_layer) {
        return il;
    }
    if (name == "token_embd.weight") {
        return 0;
    }
    if (name == "output.weight") {
        return n_layer - 1;
    }
    return -1;
}

int qaflora_input_kind(const std::string & name) {
    const std::pair<const char *, int> parts[] = { { ".attn_q.", 1 }, { ".attn_k.", 1 }, { ".attn_v.", 1 }, { ".ffn_gate.", 2 }, { ".ffn_up.", 2 } };
    for (const auto & [part, kind] : parts) {
        if (name.find(part) != std::string::npos) {
            return kind;
        }
    }
    return 0;
}

ggml_backend_buffer_type_t qaflora_adapter_buft(const ggml_tensor * w) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(w->buffer);
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    if (!dev || ggml_backend_buft_is_host(buft) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
        return ggml_backend_cpu_buffer_type();
    }
    return buft;
}

bool qaflora_has_matmul(const qaflora_kernels * kernels, const ggml_tensor * w) {
    return kernels && kernels->matmul && qaflora_is_on_cpu(w) && ggml_backend_buffer_is_host(w->buffer) && qaflora_matrix_of(w).type != QAFLORA_MATRIX_OTHER;
}

int32_t qaflora_has_products(void) { // qaflora_pack_init() fails of it too
    return qaflora_guarded([] { return (int32_t) (qaflora_has_kernels() && qaflora_best_kernels().matmul); });
}

const char * qaflora_kernels_name(void) {
    return qaflora_guarded([] { return qaflora_has_kernels() ? qaflora_best_kernels().name : "ggml"; });
}

void qaflora_vocab_attributes(const llama_vocab * vocab, int32_t n_token, int32_t * attributes) {
    for (int32_t i = 0; i < n_token; ++i) {
        attributes[i] = llama_vocab_get_attr(vocab, i);
    }
}

bool qaflora_is_on_cpu(const ggml_tensor * w) {
    return qaflora_adapter_buft(w) == ggml_backend_cpu_buffer_type();
}
