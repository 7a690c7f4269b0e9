#include "qaflora-adapter.h"

#include "qaflora-base.h"
#include "qaflora-error.h"

#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

std::vector<uint8_t> qaflora_adapter_file::read(const ggml_tensor * t) const {
    const size_t offset = offsets.at(t);
    const size_t size   = ggml_nbytes(t);
    if (offset + size < offset || offset + size > file->size()) {
        qaflora_fail(qaflora_format("%s: tensor '%s' ends at byte %zu but the file has %zu; fetch or convert it again",
                                    path.c_str(), t->name, offset + size, file->size()));
    }
    std::vector<uint8_t> data(size);
    file->seek(offset, SEEK_SET);
    file->read_raw(data.data(), size);
    return data;
}

static void expect_str(const qaflora_adapter_file & f, const char * key, const std::string & expected) {
    const gguf_context * ctx = f.gguf.get();
    const int64_t id = gguf_find_key(ctx, key);
    const std::string found = id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_STRING ? gguf_get_val_str(ctx, id) : "";
    if (found != expected) {
        qaflora_fail(qaflora_format("%s: %s is '%s', expected '%s'; use an adapter converted for this base",
                                    f.path.c_str(), key, found.c_str(), expected.c_str()));
    }
}

qaflora_adapter_file qaflora_open_adapter(const llama_model & model, const char * path) {
    qaflora_adapter_file f;
    f.path = path;

    ggml_context * meta = nullptr;
    FILE * header = ggml_fopen(path, "rb");
    if (!header) {
        qaflora_fail(qaflora_format("%s: cannot be opened (%s)", path, strerror(errno)));
    }
    f.gguf.reset(gguf_init_from_file_ptr(header, { /*.no_alloc =*/ true, /*.ctx =*/ &meta }));
    fclose(header);
    f.meta.reset(meta);
    if (!f.gguf) {
        qaflora_fail(qaflora_format("%s: not a readable GGUF file; convert or fetch it again", path));
    }
    f.file = std::make_unique<llama_file>(path, "rb");

    expect_str(f, "general.type", "adapter");
    expect_str(f, "general.architecture", llm_arch_name(model.arch));
    expect_str(f, "adapter.type", "lora");

    const int64_t id = gguf_find_key(f.gguf.get(), "adapter.lora.alpha");
    f.alpha = id >= 0 && gguf_get_kv_type(f.gguf.get(), id) == GGUF_TYPE_FLOAT32 ? gguf_get_val_f32(f.gguf.get(), id) : 0.0f;
    if (!std::isfinite(f.alpha) || f.alpha == 0.0f) {
        qaflora_fail(qaflora_format("%s: adapter.lora.alpha is missing, zero or not finite; convert the adapter again", path));
    }
    if (gguf_find_key(f.gguf.get(), "adapter.alora.invocation_tokens") >= 0) {
        qaflora_fail(qaflora_format("%s: is an activated LoRA (aLoRA), which cannot be fused; use a plain LoRA", path));
    }

    int64_t index = 0; // gguf_init_from_file() makes the tensors in the file's order
    for (ggml_tensor * t = ggml_get_first_tensor(meta); t; t = ggml_get_next_tensor(meta, t)) {
        f.offsets[t] = gguf_get_data_offset(f.gguf.get()) + gguf_get_tensor_offset(f.gguf.get(), index++);
        const std::string name(t->name);
        const size_t      end  = std::min(name.rfind(".lora_"), name.size());
        const std::string kind = name.substr(end);
        if (kind == ".lora_a") {
            f.pairs[name.substr(0, end)].a = t;
        } else if (kind == ".lora_b") {
            f.pairs[name.substr(0, end)].b = t;
        } else {
            qaflora_fail(qaflora_format("%s: tensor '%s' is neither lora_a nor lora_b; only plain LoRA can be fused", path, t->name));
        }
    }
    if (f.pairs.empty()) {
        qaflora_fail(qaflora_format("%s: has no LoRA tensors; convert the adapter again", path));
    }
    return f;
}

static void check_pair(const qaflora_adapter_file & f, const std::string & name, const qaflora_adapter_pair & p, const ggml_tensor * w) {
    if (!p.a || !p.b) {
        qaflora_fail(qaflora_format("%s: '%s' has no %s; convert the adapter again", f.path.c_str(), name.c_str(), p.a ? "lora_b" : "lora_a"));
    }
    if (!w) {
        qaflora_fail(qaflora_format("%s: '%s' is not a tensor of the base; use the base that the adapter was trained on", f.path.c_str(), name.c_str()));
    }
    for (const ggml_tensor * t : { p.a, p.b }) {
        if (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float) {
            qaflora_fail(qaflora_format("%s: '%s' is of type %s, expected F32, F16, BF16 or a quantised type; convert the adapter again",
                                        f.path.c_str(), t->name, ggml_type_name(t->type)));
        }
        if (t->ne[3] != 1) {
            qaflora_fail(qaflora_format("%s: '%s' has four dimensions, expected two, or three of experts; convert the adapter again", f.path.c_str(), t->name));
        }
    }
    const bool is_experts = qaflora_is_experts(name);
    if (!is_experts && (w->ne[2] != 1 || w->ne[3] != 1)) {
        qaflora_fail(qaflora_format("%s: '%s' is a stack of matrices in the base, and none of experts; leave it out of the adapter", f.path.c_str(), name.c_str()));
    }
    if (p.a->ne[2] != w->ne[2] || p.b->ne[2] != w->ne[2]) {
        qaflora_fail(qaflora_format("%s: '%s' has %lld matrices in lora_a and %lld in lora_b, the base has %lld; use the base that the adapter was trained on",
                                    f.path.c_str(), name.c_str(), (long long) p.a->ne[2], (long long) p.b->ne[2], (long long) w->ne[2]));
    }
    if (w->type == GGML_TYPE_NVFP4) {
        qaflora_fail(qaflora_format("%s: '%s' is NVFP4 in the base, which cannot carry adapters; use another quantisation", f.path.c_str(), name.c_str()));
    }
    const bool    is_embd = name == "token_embd.weight";
    const int64_t rank_a  = is_embd ? p.a->ne[0] : p.a->ne[1];
    const int64_t n_in    = is_embd ? p.a->ne[1] : p.a->ne[0];
    const int64_t w_in    = is_embd ? w->ne[1] : w->ne[0];
    const int64_t w_out   = is_embd ? w->ne[0] : w->ne[1];
    if (rank_a != p.b->ne[0] || rank_a < 1) {
        qaflora_fail(qaflora_format("%s: '%s' has rank %lld in lora_a and %lld in lora_b; convert the adapter again",
                                    f.path.c_str(), name.c_str(), (long long) rank_a, (long long) p.b->ne[0]));
    }
    if (n_in != w_in || p.b->ne[1] != w_out) {
        qaflora_fail(qaflora_format("%s: '%s' is [%lld, %lld], the base has [%lld, %lld]; use the base that the adapter was trained on",
                                    f.path.c_str(), name.c_str(), (long long) p.b->ne[1], (long long) n_in, (long long) w_out, (long long) w_in));
    }
}

void qaflora_check_adapter(const qaflora_adapter_file & f, const llama_model & model, int32_t n_layer) {
    for (const auto & [name, p] : f.pairs) {
        check_pair(f, name, p, qaflora_base_tensor(model, name));
        if (qaflora_layer_of(name, n_layer) < 0) {
            qaflora_fail(qaflora_format("%s: '%s' belongs to no block, so that no layer's weights apply; leave it out of the adapter",
                                        f.path.c_str(), name.c_str()));
        }
    }
}
