// Attention of the CPU's kernels in place of llama.cpp's.
// shapes: ggml order, ne[0] first

#include "qaflora-context.h"
#include "qaflora-error.h"
#include "qaflora.h"

#include "llama-graph.h"
#include "llama-model.h"

// Heads that share keys and values, from so many on transposing these costs a single token nothing. ggml's products and ours, ms a
// layer, one thread of a busy Xeon with AVX-512: 7 heads of 64 numbers behind 1536 tokens 0.38, 0.24; 3 heads 0.35, 0.33;
// 2 heads of 128 behind 2048 tokens 2.7, 3.8; 32 heads that share nothing 5.5, 11.7.
static const int64_t N_SHARED_LEAST = 3;

int32_t qaflora_has_attention(const llama_model * model) {
    return qaflora_guarded([&] {
        const auto & h = model->hparams;
        const bool is_plain = !h.attn_soft_cap && h.f_max_alibi_bias == 0.0f && !h.is_mla() && model->arch != LLM_ARCH_GROK;
        if (!qaflora_has_kernels() || !qaflora_best_kernels().attend || !is_plain) {
            return 0;
        }
        for (uint32_t il = 0; il < h.n_layer(); ++il) {
            const auto & layer = model->layers[il];
            const int64_t n_kv_head = h.n_head_kv(il);
            const bool fits = n_kv_head == 0 || (h.n_head(il) % n_kv_head == 0 && h.n_head(il)/n_kv_head >= N_SHARED_LEAST &&
                h.n_embd_head_k(il) % QAFLORA_ATTENTION_UNIT == 0 && h.n_embd_head_v(il) % QAFLORA_ATTENTION_UNIT == 0);
            if (!fits || layer.attn_sinks || layer.attn_rel_b) {
                return 0;
            }
        }
        return 1;
    });
}

static bool is_held(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = (t->view_src ? t->view_src : t)->buffer;
    return buffer && ggml_backend_buffer_is_host(buffer) && t->nb[0] == ggml_type_size(t->type) && (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32);
}

ggml_tensor * qaflora_attend(const llm_graph_context & gctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, float scale, int32_t il) {
    qaflora_context & qf = *gctx.qaflora;
    const bool is_cache = is_held(k) && is_held(v) && k->type == v->type && v->ne[0] == k->ne[1] && k->ne[1] % QAFLORA_ATTENTION_UNIT == 0;
    const bool is_asked = q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && mask && mask->type == GGML_TYPE_F32 && mask->ne[2] == 1;
    if (!is_cache || !is_asked || gctx.cparams.flash_attn || !qaflora_has_attention(qf.pack->model)) {
        return nullptr;
    }
    qf.attention.resize(qf.n_layer);
    qf.attention.at(il) = { qf.pack->kernels, scale };
    ggml_tensor * src[] = { q, k, v, mask };
    return ggml_custom_4d(gctx.ctx0, GGML_TYPE_F32, v->ne[1]*q->ne[2], q->ne[1]*q->ne[3], 1, 1, src, 4, qaflora_op_attend, GGML_N_TASKS_MAX, &qf.attention[il]);
}
