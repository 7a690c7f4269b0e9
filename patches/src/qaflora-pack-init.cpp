// The C interface of a pack: files are opened and checked, their tensors planned, allocated and filled.
// shapes: ggml order, ne[0] first

#include "qaflora-cpu-store.h"
#include "qaflora-error.h"
#include "qaflora-pack-plan.h"

#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <utility>

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

// the rows of src as dst's type
static std::vector<uint8_t> as_type(std::vector<uint8_t> data, const ggml_tensor * src, ggml_type type) {
    if (src->type == type) {
        return data;
    }
    const int64_t n = ggml_nelements(src);
    std::vector<uint8_t> res(n*sizeof(float));
    ggml_get_type_traits(src->type)->to_float(data.data(), (float *) res.data(), n);
    return res;
}

// rows of all adapters below each other, of each expert
static void fill_rows(const qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_module & m) {
    size_t offset = 0;
    for (const auto & s : pack.layouts[m.layout].segments) {
        const auto & f = files[s.ia];
        const ggml_tensor * t = f.pairs.at(m.name).a;
        const auto data = as_type(f.read(t), t, m.a->type);
        const size_t size = data.size()/m.a->ne[2];
        for (int64_t ie = 0; ie < m.a->ne[2]; ++ie) {
            ggml_backend_tensor_set(m.a, data.data() + ie*size, ie*m.a->nb[2] + offset, size);
        }
        offset += size;
    }
}

// rows of all adapters beside each other
static void fill_columns(const qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_module & m, ggml_tensor * dst, bool is_a) {
    std::vector<uint8_t> stacked(ggml_nbytes(dst));
    const size_t dst_row = ggml_row_size(dst->type, dst->ne[0]);
    size_t offset = 0;
    for (const auto & s : pack.layouts[m.layout].segments) {
        const auto & f = files[s.ia];
        const auto & p = f.pairs.at(m.name);
        const ggml_tensor * t = is_a ? p.a : p.b;
        const auto data = as_type(f.read(t), t, dst->type);
        const size_t src_row = ggml_row_size(dst->type, s.rank);
        for (int64_t ir = 0; ir < ggml_nrows(dst); ++ir) {
            memcpy(stacked.data() + ir*dst_row + offset, data.data() + ir*src_row, src_row);
        }
        offset += src_row;
    }
    ggml_backend_tensor_set(dst, stacked.data(), 0, stacked.size());
}

static void store_a(const qaflora_cpu_segment & s, const ggml_tensor * t, std::vector<uint8_t> data, int64_t n_expert, uint8_t * dst) {
    if (s.type_a == qaflora_cpu_type_of(t->type)) {
        data = as_type(std::move(data), t, qaflora_stored_type(t->type));
        qaflora_make_rows(s.type_a, n_expert*s.rank, t->ne[0], data.data(), dst);
        return;
    }
    data = as_type(std::move(data), t, GGML_TYPE_F32);
    qaflora_encode_rows(s.type_a, n_expert*s.rank, t->ne[0], (const float *) data.data(), dst);
}

static void store_b(const qaflora_cpu_segment & s, const ggml_tensor * t, std::vector<uint8_t> data, int64_t n_expert, uint8_t * dst) {
    const bool is_kept = s.type_b == qaflora_cpu_type_of(t->type);
    data = as_type(std::move(data), t, is_kept ? qaflora_stored_type(t->type) : GGML_TYPE_F32);
    const size_t panels = qaflora_panel_size(s.type_b, t->ne[1], s.rank);
    for (int64_t ie = 0; ie < n_expert; ++ie) {
        const uint8_t * rows = data.data() + ie*(data.size()/n_expert);
        if (is_kept) {
            qaflora_make_panels(s.type_b, t->ne[1], s.rank, rows, dst + ie*panels);
        } else {
            qaflora_encode_panels(s.type_b, t->ne[1], s.rank, (const float *) rows, dst + ie*panels);
        }
    }
}

static void fill_cpu(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_plan & plan) {
    for (const auto & pair : plan.cpu_pairs) {
        auto & m = pack.modules[pair.module];
        auto & s = m.cpu.segments[pair.segment];
        const auto & f = files[s.ia];
        const auto & p = f.pairs.at(m.name);
        store_a(s, p.a, f.read(p.a), m.n_matrix(), (uint8_t *) pair.a->data);
        store_b(s, p.b, f.read(p.b), m.n_matrix(), (uint8_t *) pair.b->data);
        s.a = (const uint8_t *) pair.a->data;
        s.b = (const uint8_t *) pair.b->data;
    }
    for (const auto & m : pack.modules) {
        if (m.group >= 0) {
            auto & segments = pack.groups[m.group].cpu.segments;
            segments.insert(segments.end(), m.cpu.segments.begin(), m.cpu.segments.end());
        }
    }
}

// reads the files into the tensors of the plan, which must have been allocated
static void fill(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_plan & plan) {
    for (const auto & m : pack.modules) {
        if (!m.cpu.segments.empty()) {
            continue;
        }
        if (m.name == "token_embd.weight") {
            fill_columns(pack, files, m, m.a, true);
        } else {
            fill_rows(pack, files, m);
        }
        fill_columns(pack, files, m, m.b, false);
    }
    fill_cpu(pack, files, plan);
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
        fill(*pack, files, plan);
        return pack.release();
    });
}

void qaflora_pack_free(qaflora_pack * pack) {
    delete pack;
}

int32_t qaflora_pack_first_layer(const qaflora_pack * pack, int32_t ia) {
    return pack->first_layer([ia](int32_t other, int32_t) { return other == ia; });
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
