// The C interface of a pack: files are opened and checked, their tensors planned, allocated and filled.

#include "qaflora-adapter.h"
#include "qaflora-error.h"
#include "qaflora-pack.h"
#include "qaflora-pack-fill.h"
#include "qaflora-pack-plan.h"

#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Adapters are read from front to back for every token: with large pages there are fewer addresses to translate.
static void use_huge_pages(ggml_backend_buffer_t buf) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!ggml_backend_buffer_is_host(buf)) {
        return;
    }
    const uintptr_t page  = 2u << 20;
    const uintptr_t base  = (uintptr_t) ggml_backend_buffer_get_base(buf);
    const uintptr_t begin = GGML_PAD(base, page);
    const uintptr_t end   = (base + ggml_backend_buffer_get_size(buf))/page*page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE); // advice: nothing is lost where it is not taken
    }
#else
    GGML_UNUSED(buf);
#endif
}

static void allocate(qaflora_pack & pack, const qaflora_plan & plan) {
    for (const auto & [buft, ctx] : plan.ctx_of) {
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
        if (!buf) {
            qaflora_fail(qaflora_format("no memory for the adapters on %s; use fewer or smaller adapters", ggml_backend_buft_name(buft)));
        }
        use_huge_pages(buf.get());
        ggml_backend_buffer_clear(buf.get(), 0);
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        pack.bufs.push_back(std::move(buf));
    }
}

qaflora_pack * qaflora_pack_init(llama_model * model, const char * const * paths, int32_t n_adapter, enum qaflora_adapter_type type) {
    return qaflora_guarded([&] {
        if (!model || n_adapter < 0) {
            qaflora_fail("a pack needs a model");
        }
        auto pack = std::make_unique<qaflora_pack>();
        pack->model     = model;
        pack->n_adapter = n_adapter;
        pack->type      = type == QAFLORA_ADAPTER_Q8_0 ? GGML_TYPE_Q8_0 : type == QAFLORA_ADAPTER_Q4_0 ? GGML_TYPE_Q4_0 : GGML_TYPE_COUNT;
        pack->n_layer   = model->hparams.n_layer();
        if (qaflora_has_kernels()) {
            pack->kernels     = &qaflora_best_kernels();
            pack->plain       = { pack->kernels, { 0, false }, 0 };
            pack->rounded_32  = { pack->kernels, { 32, true }, 8 };
            pack->rounded_256 = { pack->kernels, { 256, false }, 8 };
            pack->rounded_own = { pack->kernels, { 32, false }, INT64_MAX };
        }

        std::vector<qaflora_adapter_file> files;
        for (int32_t ia = 0; ia < n_adapter; ++ia) {
            files.push_back(qaflora_open_adapter(*model, paths[ia]));
        }
        for (const auto & f : files) {
            qaflora_check_adapter(f, *model, pack->n_layer);
        }
        const qaflora_plan plan = qaflora_make_plan(*pack, files);
        allocate(*pack, plan);
        qaflora_fill_pack(*pack, files, plan);
        return pack.release();
    });
}

void qaflora_pack_free(qaflora_pack * pack) {
    delete pack;
}

int32_t qaflora_pack_first_layer(const qaflora_pack * pack, int32_t ia) {
    int32_t res = pack->n_layer;
    for (const auto & m : pack->modules) {
        if (std::binary_search(m.adapters.begin(), m.adapters.end(), ia)) {
            res = std::min(res, m.il);
        }
    }
    return res;
}

int32_t qaflora_pack_n_alike(const qaflora_pack * pack) {
    const llama_model & model = *pack->model;
    if (!pack->kernels || pack->embd >= 0) {
        return 1;
    }
    for (const auto & [name, w] : model.tensors_by_name) {
        const bool is_looked_up = w == model.tok_embd && w != model.output;
        if (ggml_n_dims(w) > 2 || (ggml_n_dims(w) == 2 && !is_looked_up && !qaflora_has_matmul(pack->kernels, w))) {
            return 1;
        }
    }
    return QAFLORA_FEW;
}

int64_t qaflora_pack_size_bytes(const qaflora_pack * pack) {
    int64_t size = 0;
    for (const auto & buf : pack->bufs) {
        size += ggml_backend_buffer_get_size(buf.get());
    }
    return size;
}
