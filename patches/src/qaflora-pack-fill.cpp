// shapes: ggml order, ne[0] first

#include "qaflora-pack-fill.h"

#include "qaflora-cpu-store.h"

#include <cstring>
#include <utility>

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
        const int64_t n_expert = std::max<int64_t>(1, m.n_expert);
        store_a(s, p.a, f.read(p.a), n_expert, (uint8_t *) pair.a->data);
        store_b(s, p.b, f.read(p.b), n_expert, (uint8_t *) pair.b->data);
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

void qaflora_fill_pack(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_plan & plan) {
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
