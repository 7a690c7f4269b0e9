#include "qaflora-pack.h"

#include "llama-mmap.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

//
// errors
//

static thread_local std::string g_error;

void qaflora_set_error(const std::string & message) {
    g_error = message;
}

const char * qaflora_last_error(void) {
    return g_error.c_str();
}

std::string qaflora_format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    char buf[1024];
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    return buf;
}

[[noreturn]] static void fail(const std::string & message) {
    throw std::runtime_error(message);
}

static const int64_t RANK_STEP   = 64;
static const int64_t OFFSET_STEP = 4; // floats: GPU kernels load vectors of them; see offset_step()

//
// one adapter file
//

struct adapter_pair {
    const ggml_tensor * a = nullptr;
    const ggml_tensor * b = nullptr;
};

struct adapter_file {
    std::string path;
    float       alpha = 0.0f;

    ggml_context_ptr            meta;
    gguf_context_ptr            gguf;
    std::unique_ptr<llama_file> file;
    std::map<std::string, adapter_pair> pairs; // by the base's tensor name

    std::vector<uint8_t> read(const ggml_tensor * t) const {
        const size_t offset = gguf_get_data_offset(gguf.get()) +
                              gguf_get_tensor_offset(gguf.get(), gguf_find_tensor(gguf.get(), t->name));
        const size_t size   = ggml_nbytes(t);
        if (offset + size < offset || offset + size > file->size()) {
            fail(qaflora_format("%s: tensor '%s' ends at byte %zu but the file has %zu; fetch or convert it again",
                                path.c_str(), t->name, offset + size, file->size()));
        }
        std::vector<uint8_t> data(size);
        file->seek(offset, SEEK_SET);
        file->read_raw(data.data(), size);
        return data;
    }
};

static std::string gguf_str(const gguf_context * ctx, const char * key) {
    const int64_t id = gguf_find_key(ctx, key);
    return id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_STRING ? gguf_get_val_str(ctx, id) : "";
}

static void expect_str(const adapter_file & f, const char * key, const std::string & expected) {
    const std::string found = gguf_str(f.gguf.get(), key);
    if (found != expected) {
        fail(qaflora_format("%s: %s is '%s', expected '%s'; use an adapter converted for this base",
                            f.path.c_str(), key, found.c_str(), expected.c_str()));
    }
}

static bool strip_suffix(std::string & s, const char * suffix) {
    const size_t n = strlen(suffix);
    if (s.size() < n || s.compare(s.size() - n, n, suffix) != 0) {
        return false;
    }
    s.resize(s.size() - n);
    return true;
}

static adapter_file open_adapter(const llama_model & model, const char * path) {
    adapter_file f;
    f.path = path;

    ggml_context * meta = nullptr;
    f.gguf.reset(gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ &meta }));
    f.meta.reset(meta);
    if (!f.gguf) {
        fail(qaflora_format("%s: not a readable GGUF file; convert or fetch it again", path));
    }
    f.file = std::make_unique<llama_file>(path, "rb");

    expect_str(f, "general.type", "adapter");
    expect_str(f, "general.architecture", llm_arch_name(model.arch));
    expect_str(f, "adapter.type", "lora");

    const int64_t id = gguf_find_key(f.gguf.get(), "adapter.lora.alpha");
    f.alpha = id >= 0 && gguf_get_kv_type(f.gguf.get(), id) == GGUF_TYPE_FLOAT32 ? gguf_get_val_f32(f.gguf.get(), id) : 0.0f;
    if (!std::isfinite(f.alpha) || f.alpha == 0.0f) {
        fail(qaflora_format("%s: adapter.lora.alpha is missing, zero or not finite; convert the adapter again", path));
    }
    if (gguf_find_key(f.gguf.get(), "adapter.alora.invocation_tokens") >= 0) {
        fail(qaflora_format("%s: is an activated LoRA (aLoRA), which cannot be fused; use a plain LoRA", path));
    }

    for (ggml_tensor * t = ggml_get_first_tensor(meta); t; t = ggml_get_next_tensor(meta, t)) {
        std::string name(t->name);
        if (strip_suffix(name, ".lora_a")) {
            f.pairs[name].a = t;
        } else if (strip_suffix(name, ".lora_b")) {
            f.pairs[name].b = t;
        } else {
            fail(qaflora_format("%s: tensor '%s' is neither lora_a nor lora_b; only plain LoRA can be fused", path, t->name));
        }
    }
    if (f.pairs.empty()) {
        fail(qaflora_format("%s: has no LoRA tensors; convert the adapter again", path));
    }
    return f;
}

//
// the base's side
//

static ggml_tensor * base_tensor(const llama_model & model, const std::string & name) {
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

static int32_t layer_of(const std::string & name, int32_t n_layer) {
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

static void check_pair(const adapter_file & f, const std::string & name, const adapter_pair & p, const ggml_tensor * w) {
    if (!p.a || !p.b) {
        fail(qaflora_format("%s: '%s' has no %s; convert the adapter again", f.path.c_str(), name.c_str(), p.a ? "lora_b" : "lora_a"));
    }
    if (!w) {
        fail(qaflora_format("%s: '%s' is not a tensor of the base; use the base that the adapter was trained on", f.path.c_str(), name.c_str()));
    }
    for (const ggml_tensor * t : { p.a, p.b }) {
        if (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float) {
            fail(qaflora_format("%s: '%s' is of type %s, expected F32, F16, BF16 or a quantised type; convert the adapter again",
                                f.path.c_str(), t->name, ggml_type_name(t->type)));
        }
        if (t->ne[3] != 1) {
            fail(qaflora_format("%s: '%s' has four dimensions, expected two, or three of experts; convert the adapter again", f.path.c_str(), t->name));
        }
    }
    const bool is_experts = qaflora_is_experts(name);
    if (!is_experts && (w->ne[2] != 1 || w->ne[3] != 1)) {
        fail(qaflora_format("%s: '%s' is a stack of matrices in the base, and none of experts; leave it out of the adapter", f.path.c_str(), name.c_str()));
    }
    if (p.a->ne[2] != w->ne[2] || p.b->ne[2] != w->ne[2]) {
        fail(qaflora_format("%s: '%s' has %lld matrices in lora_a and %lld in lora_b, the base has %lld; use the base that the adapter was trained on",
                            f.path.c_str(), name.c_str(), (long long) p.a->ne[2], (long long) p.b->ne[2], (long long) w->ne[2]));
    }
    if (w->type == GGML_TYPE_NVFP4) {
        fail(qaflora_format("%s: '%s' is NVFP4 in the base, which cannot carry adapters; use another quantisation", f.path.c_str(), name.c_str()));
    }
    const bool    is_embd = name == "token_embd.weight";
    const int64_t rank_a  = is_embd ? p.a->ne[0] : p.a->ne[1];
    const int64_t n_in    = is_embd ? p.a->ne[1] : p.a->ne[0];
    const int64_t w_in    = is_embd ? w->ne[1] : w->ne[0];
    const int64_t w_out   = is_embd ? w->ne[0] : w->ne[1];
    if (rank_a != p.b->ne[0] || rank_a < 1) {
        fail(qaflora_format("%s: '%s' has rank %lld in lora_a and %lld in lora_b; convert the adapter again",
                            f.path.c_str(), name.c_str(), (long long) rank_a, (long long) p.b->ne[0]));
    }
    if (n_in != w_in || p.b->ne[1] != w_out) {
        fail(qaflora_format("%s: '%s' is [%lld, %lld], the base has [%lld, %lld]; use the base that the adapter was trained on",
                            f.path.c_str(), name.c_str(), (long long) p.b->ne[1], (long long) n_in, (long long) w_out, (long long) w_in));
    }
}

// where the adapters of w live: beside w, but never in a buffer that repacks its tensors; a device's pinned host memory is the host's
static ggml_backend_buffer_type_t adapter_buft(const ggml_tensor * w) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(w->buffer);
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    if (!dev || ggml_backend_buft_is_host(buft) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
        return ggml_backend_cpu_buffer_type();
    }
    return buft;
}

bool qaflora_is_on_cpu(const ggml_tensor * w) {
    return adapter_buft(w) == ggml_backend_cpu_buffer_type();
}

// how the CPU's kernels store numbers of a type: the others become F32
static qaflora_cpu_type cpu_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return QAFLORA_CPU_F16;
        case GGML_TYPE_BF16: return QAFLORA_CPU_BF16;
        case GGML_TYPE_Q8_0: return QAFLORA_CPU_Q8_0;
        default:             return QAFLORA_CPU_F32;
    }
}

static ggml_type stored_type(ggml_type type) {
    return cpu_type(type) == QAFLORA_CPU_F32 ? GGML_TYPE_F32 : type;
}

// modules that read the same activations: q, k and v; gate and up. 0: reads its own
static int input_kind(const std::string & name) {
    for (const char * part : { ".attn_q.", ".attn_k.", ".attn_v." }) {
        if (name.find(part) != std::string::npos) {
            return 1;
        }
    }
    for (const char * part : { ".ffn_gate.", ".ffn_up." }) {
        if (name.find(part) != std::string::npos) {
            return 2;
        }
    }
    return 0;
}

// The dot products of the CPU take 64 numbers at a time and the rest one by one, which costs more than
// multiplying zeros (llama.cpp 0c1e5709, ggml-cpu vec.cpp ggml_vec_dot_f16). Quantised rows are whole blocks already.
static int64_t padded_rank(int64_t rank, ggml_type type) {
    return ggml_blck_size(type) > 1 ? rank : GGML_PAD(rank, RANK_STEP);
}

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

// Rows between the starts of a group's modules. A device takes a view of A, and of its product, only where it starts at a
// multiple of the device's alignment (llama.cpp 0c1e5709, ggml-vulkan.cpp ggml_vk_tensor_subbuffer aborts otherwise).
static int64_t offset_step(ggml_backend_buffer_type_t buft, size_t row_bytes) {
    int64_t step = OFFSET_STEP;
    if (!ggml_backend_buft_is_host(buft)) {
        const size_t align = ggml_backend_buft_get_alignment(buft); // a power of two
        while (step*sizeof(float) % align != 0 || step*row_bytes % align != 0) {
            step *= 2;
        }
    }
    return step;
}

//
// stacking
//

struct pack_builder {
    qaflora_pack & pack;
    const std::vector<adapter_file> & files;

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_of;
    size_t n_tensor_max = 0;

    // tensors of the CPU's segments until they have addresses
    struct cpu_pair { int32_t module; size_t segment; ggml_tensor * a; ggml_tensor * b; };
    std::vector<cpu_pair> cpu_pairs;

    ggml_context * ctx_for(ggml_backend_buffer_type_t buft) {
        auto it = ctx_of.find(buft);
        if (it == ctx_of.end()) {
            ggml_context * ctx = ggml_init({ n_tensor_max*ggml_tensor_overhead(), nullptr, true });
            if (!ctx) {
                fail("out of memory for the adapters' tensors");
            }
            pack.ctxs.emplace_back(ctx);
            it = ctx_of.emplace(buft, ctx).first;
        }
        return it->second;
    }

    static int64_t stacked_rank(const std::vector<qaflora_segment> & segments) {
        int64_t rank = 0;
        for (const auto & s : segments) {
            rank += s.rank;
        }
        return rank;
    }

    int32_t find_layout(const std::vector<qaflora_segment> & segments, int64_t rank) {
        for (size_t i = 0; i < pack.layouts.size(); ++i) {
            if (pack.layouts[i].segments == segments && pack.layouts[i].rank == rank) {
                return (int32_t) i;
            }
        }
        pack.layouts.push_back({ segments, rank });
        return (int32_t) pack.layouts.size() - 1;
    }

    // stacked as they are when all have one type, else as F32
    ggml_type common_type(const std::vector<std::string> & names, bool is_a) const {
        ggml_type type = GGML_TYPE_COUNT;
        for (const auto & f : files) {
            for (const auto & name : names) {
                auto it = f.pairs.find(name);
                if (it == f.pairs.end()) {
                    continue;
                }
                const ggml_type t = is_a ? it->second.a->type : it->second.b->type;
                if (type != GGML_TYPE_COUNT && type != t) {
                    return GGML_TYPE_F32;
                }
                type = t;
            }
        }
        return type;
    }

    qaflora_module make_module(const std::string & name) {
        qaflora_module m;
        m.name = name;
        m.w    = base_tensor(*pack.model, name);
        m.il   = layer_of(name, pack.n_layer);
        std::vector<qaflora_segment> segments;
        for (size_t ia = 0; ia < files.size(); ++ia) {
            auto it = files[ia].pairs.find(name);
            if (it != files[ia].pairs.end()) {
                const int64_t rank = it->second.b->ne[0];
                segments.push_back({ (int32_t) ia, rank, files[ia].alpha/rank });
            }
        }
        m.n_expert = qaflora_is_experts(name) ? m.w->ne[2] : 0;
        m.layout = find_layout(segments, padded_rank(stacked_rank(segments), common_type({ name }, false)));
        return m;
    }

    qaflora_cpu_segment make_cpu_segment(const std::string & name, size_t ia, int64_t offset) const {
        const adapter_pair & p = files[ia].pairs.at(name);
        qaflora_cpu_segment s;
        s.ia     = (int32_t) ia;
        s.rank   = p.b->ne[0];
        s.scale  = files[ia].alpha/s.rank;
        s.offset = offset;
        s.type_a = cpu_type(p.a->type);
        s.type_b = cpu_type(p.b->type);
        return s;
    }

    // every adapter keeps its own A and panels of B: of those that weigh 0 nothing is read
    void add_cpu_group(const std::vector<std::string> & names) {
        qaflora_group g;
        g.cpu.kernels = pack.kernels;
        ggml_context * ctx = ctx_for(adapter_buft(base_tensor(*pack.model, names[0])));
        const size_t first_pair = cpu_pairs.size();
        for (const auto & name : names) {
            qaflora_module m;
            m.name  = name;
            m.w     = base_tensor(*pack.model, name);
            m.il    = layer_of(name, pack.n_layer);
            m.group = (int32_t) pack.groups.size();
            m.cpu.kernels = pack.kernels;
            m.cpu.il      = m.il;
            m.cpu.n_out   = m.w->ne[1];
            for (size_t ia = 0; ia < files.size(); ++ia) {
                if (!files[ia].pairs.count(name)) {
                    continue;
                }
                const qaflora_cpu_segment s = make_cpu_segment(name, ia, g.cpu.n_rank);
                g.cpu.n_rank += s.rank;

                ggml_tensor * a = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, s.rank*qaflora_row_size(s.type_a, m.w->ne[0]));
                cpu_pairs.push_back({ (int32_t) pack.modules.size(), m.cpu.segments.size(), a, nullptr });
                m.cpu.segments.push_back(s);
            }
            g.il       = m.il;
            g.cpu.n_in = m.w->ne[0];
            pack.by_weight[m.w] = (int32_t) pack.modules.size();
            pack.modules.push_back(m);
        }
        // in the order in which they are read: all A of the group, then B
        for (size_t i = first_pair; i < cpu_pairs.size(); ++i) {
            const auto & m = pack.modules[cpu_pairs[i].module].cpu;
            const auto & s = m.segments[cpu_pairs[i].segment];
            cpu_pairs[i].b = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, qaflora_panel_size(s.type_b, m.n_out, s.rank));
        }
        g.cpu.il = g.il;
        for (size_t i = 0; i < names.size(); ++i) {
            pack.modules[pack.modules.size() - 1 - i].cpu.n_rank = g.cpu.n_rank;
        }
        pack.groups.push_back(g);
    }

    void fill_cpu() {
        for (const auto & pair : cpu_pairs) {
            auto & m = pack.modules[pair.module];
            auto & s = m.cpu.segments[pair.segment];
            const auto & f = files[s.ia];
            const auto & p = f.pairs.at(m.name);
            const auto a = as_type(f.read(p.a), p.a, stored_type(p.a->type));
            const auto b = as_type(f.read(p.b), p.b, stored_type(p.b->type));
            const int64_t n_expert = std::max<int64_t>(1, m.n_expert);
            qaflora_make_rows(s.type_a, n_expert*s.rank, m.w->ne[0], a.data(), (uint8_t *) pair.a->data);
            const size_t panels = qaflora_panel_size(s.type_b, m.cpu.n_out, s.rank);
            for (int64_t ie = 0; ie < n_expert; ++ie) {
                qaflora_make_panels(s.type_b, m.cpu.n_out, s.rank, b.data() + ie*(b.size()/n_expert), (uint8_t *) pair.b->data + ie*panels);
            }
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

    void add_group(const std::vector<std::string> & names) {
        if (pack.kernels && qaflora_is_on_cpu(base_tensor(*pack.model, names[0]))) {
            add_cpu_group(names);
            return;
        }
        const ggml_backend_buffer_type_t buft = adapter_buft(base_tensor(*pack.model, names[0]));
        const ggml_type type_a = common_type(names, true);
        const int64_t n_in = base_tensor(*pack.model, names[0])->ne[0];
        const int64_t step = offset_step(buft, ggml_row_size(type_a, n_in));
        qaflora_group g;
        int64_t rank = 0;
        std::vector<qaflora_module>  modules;
        std::vector<qaflora_segment> segments;
        for (const auto & name : names) {
            qaflora_module m = make_module(name);
            const auto & layout = pack.layouts[m.layout];
            m.group  = (int32_t) pack.groups.size();
            const int64_t used = stacked_rank(segments);
            m.offset = GGML_PAD(used, step);
            if (m.offset > used) {
                segments.push_back({ -1, m.offset - used, 0.0f });
            }
            rank = std::max(rank, m.offset + layout.rank);
            segments.insert(segments.end(), layout.segments.begin(), layout.segments.end());
            modules.push_back(m);
        }
        g.il     = modules[0].il;
        g.layout = find_layout(segments, rank);

        ggml_context * ctx = ctx_for(buft);
        g.a = ggml_new_tensor_2d(ctx, type_a, n_in, pack.layouts[g.layout].rank);
        ggml_format_name(g.a, "%s.qaflora_a", names[0].c_str());
        for (auto & m : modules) {
            const int64_t rank = pack.layouts[m.layout].rank;
            m.a = ggml_view_2d(ctx, g.a, g.a->ne[0], rank, g.a->nb[1], m.offset*g.a->nb[1]);
            m.b = ggml_new_tensor_2d(ctx, common_type({ m.name }, false), rank, m.w->ne[1]);
            ggml_format_name(m.b, "%s.qaflora_b", m.name.c_str());
            pack.by_weight[m.w] = (int32_t) pack.modules.size();
            pack.modules.push_back(m);
        }
        pack.groups.push_back(g);
    }

    // Experts: like a module that shares its input with none, with a third dimension
    void add_experts(const std::string & name) {
        qaflora_module m = make_module(name);
        const ggml_backend_buffer_type_t buft = adapter_buft(m.w);
        ggml_context * ctx = ctx_for(buft);
        if (pack.kernels && qaflora_is_on_cpu(m.w)) {
            m.cpu.kernels  = pack.kernels;
            m.cpu.il       = m.il;
            m.cpu.n_in     = m.w->ne[0];
            m.cpu.n_out    = m.w->ne[1];
            m.cpu.n_expert = m.n_expert;
            for (const auto & segment : pack.layouts[m.layout].segments) {
                const auto s = make_cpu_segment(name, segment.ia, m.cpu.n_rank);
                m.cpu.n_rank += s.rank;
                ggml_tensor * a = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, m.n_expert*s.rank*qaflora_row_size(s.type_a, m.cpu.n_in));
                ggml_tensor * b = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, m.n_expert*qaflora_panel_size(s.type_b, m.cpu.n_out, s.rank));
                cpu_pairs.push_back({ (int32_t) pack.modules.size(), m.cpu.segments.size(), a, b });
                m.cpu.segments.push_back(s);
            }
        } else {
            const int64_t rank = pack.layouts[m.layout].rank;
            m.a = ggml_new_tensor_3d(ctx, common_type({ name }, true),  m.w->ne[0], rank, m.n_expert);
            m.b = ggml_new_tensor_3d(ctx, common_type({ name }, false), rank, m.w->ne[1], m.n_expert);
            ggml_format_name(m.a, "%s.qaflora_a", name.c_str());
            ggml_format_name(m.b, "%s.qaflora_b", name.c_str());
        }
        pack.by_weight[m.w] = (int32_t) pack.modules.size();
        pack.modules.push_back(m);
    }

    void add_embd() {
        qaflora_module m = make_module("token_embd.weight");
        const int64_t rank = pack.layouts[m.layout].rank;
        ggml_context * ctx = ctx_for(adapter_buft(m.w));
        m.a = ggml_new_tensor_2d(ctx, common_type({ m.name }, true),  rank, m.w->ne[1]);
        m.b = ggml_new_tensor_2d(ctx, common_type({ m.name }, false), rank, m.w->ne[0]);
        ggml_set_name(m.a, "token_embd.qaflora_a");
        ggml_set_name(m.b, "token_embd.qaflora_b");
        pack.embd = (int32_t) pack.modules.size();
        pack.modules.push_back(m);
    }

    void allocate() {
        for (const auto & [buft, ctx] : ctx_of) {
            ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
            if (!buf) {
                fail(qaflora_format("no memory for the adapters on %s; use fewer or smaller adapters", ggml_backend_buft_name(buft)));
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
    void fill_rows(const qaflora_module & m) {
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
    void fill_columns(const qaflora_module & m, ggml_tensor * dst, bool is_a) {
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

    void fill() {
        for (const auto & m : pack.modules) {
            if (!m.cpu.segments.empty()) {
                continue;
            }
            if (m.name == "token_embd.weight") {
                fill_columns(m, m.a, true);
            } else {
                fill_rows(m);
            }
            fill_columns(m, m.b, false);
        }
        fill_cpu();
    }

    void build() {
        std::set<std::string> names;
        for (const auto & f : files) {
            for (const auto & [name, p] : f.pairs) {
                const ggml_tensor * w = base_tensor(*pack.model, name);
                check_pair(f, name, p, w);
                if (layer_of(name, pack.n_layer) < 0) {
                    fail(qaflora_format("%s: '%s' belongs to no block, so that no layer's weights apply; leave it out of the adapter",
                                        f.path.c_str(), name.c_str()));
                }
                names.insert(name);
            }
        }
        n_tensor_max = 4*names.size() + 4;
        for (const auto & f : files) {
            n_tensor_max += 2*f.pairs.size();
        }

        using shared_input = std::tuple<int32_t, int, int64_t, ggml_backend_buffer_type_t>;
        std::map<shared_input, std::vector<std::string>> shared;
        for (const auto & name : names) {
            const int kind = input_kind(name);
            if (name == "token_embd.weight") {
                add_embd();
            } else if (qaflora_is_experts(name)) {
                add_experts(name);
            } else if (kind == 0) {
                add_group({ name });
            } else {
                const ggml_tensor * w = base_tensor(*pack.model, name);
                shared[{ layer_of(name, pack.n_layer), kind, w->ne[0], adapter_buft(w) }].push_back(name);
            }
        }
        for (const auto & it : shared) {
            add_group(it.second);
        }
        allocate();
        fill();
    }
};

qaflora_pack * qaflora_pack_init(llama_model * model, const char * const * paths, int32_t n_adapter) {
    try {
        if (!model || n_adapter < 0) {
            fail("a pack needs a model");
        }
        auto pack = std::make_unique<qaflora_pack>();
        pack->model     = model;
        pack->n_adapter = n_adapter;
        pack->n_layer   = model->hparams.n_layer();
        if (qaflora_has_kernels()) {
            pack->kernels     = &qaflora_best_kernels();
            pack->plain       = { pack->kernels, { 0, false } };
            pack->rounded_32  = { pack->kernels, { 32, true } };
            pack->rounded_256 = { pack->kernels, { 256, false } };
        }

        std::vector<adapter_file> files;
        for (int32_t ia = 0; ia < n_adapter; ++ia) {
            files.push_back(open_adapter(*model, paths[ia]));
        }
        pack_builder { *pack, files, {}, 0, {} }.build();
        return pack.release();
    } catch (const std::exception & err) {
        qaflora_set_error(err.what());
        return nullptr;
    }
}

void qaflora_pack_free(qaflora_pack * pack) {
    delete pack;
}

int64_t qaflora_pack_size_bytes(const qaflora_pack * pack) {
    int64_t size = 0;
    for (const auto & buf : pack->bufs) {
        size += ggml_backend_buffer_get_size(buf.get());
    }
    return size;
}
