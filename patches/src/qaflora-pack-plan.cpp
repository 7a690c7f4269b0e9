// shapes: ggml order, ne[0] first

#include "qaflora-pack-plan.h"

#include "qaflora-cpu-store.h"
#include "qaflora-error.h"

#include <numeric>
#include <set>
#include <tuple>

static const int64_t RANK_STEP   = 64;
static const int64_t OFFSET_STEP = 4; // floats: GPU kernels load vectors of them; see offset_step()

// The dot products of the CPU take 64 numbers at a time and the rest one by one, which costs more than
// multiplying zeros (llama.cpp 0c1e5709, ggml-cpu vec.cpp ggml_vec_dot_f16). Quantised rows are whole blocks already.
static int64_t padded_rank(int64_t rank, ggml_type type) {
    return ggml_blck_size(type) > 1 ? rank : GGML_PAD(rank, RANK_STEP);
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

struct planner {
    qaflora_pack & pack;
    const std::vector<qaflora_adapter_file> & files;
    qaflora_plan plan;
    size_t n_tensor_max = 0;

    ggml_context * ctx_for(ggml_backend_buffer_type_t buft) {
        auto it = plan.ctx_of.find(buft);
        if (it == plan.ctx_of.end()) {
            ggml_context * ctx = ggml_init({ n_tensor_max*ggml_tensor_overhead(), nullptr, true });
            if (!ctx) {
                qaflora_fail("out of memory for the adapters' tensors");
            }
            pack.ctxs.emplace_back(ctx);
            it = plan.ctx_of.emplace(buft, ctx).first;
        }
        return it->second;
    }

    static int64_t stacked_rank(const std::vector<qaflora_segment> & segments) {
        return std::accumulate(segments.begin(), segments.end(), (int64_t) 0, [](int64_t rank, const auto & s) { return rank + s.rank; });
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

    qaflora_module new_module(const std::string & name) const {
        qaflora_module m;
        m.name = name;
        m.w    = qaflora_base_tensor(*pack.model, name);
        m.il   = qaflora_layer_of(name, pack.n_layer);
        m.n_expert = qaflora_is_experts(name) ? m.w->ne[2] : 0;
        for (size_t ia = 0; ia < files.size(); ++ia) {
            if (files[ia].pairs.count(name)) {
                m.adapters.push_back((int32_t) ia);
            }
        }
        return m;
    }

    qaflora_module make_module(const std::string & name) {
        qaflora_module m = new_module(name);
        std::vector<qaflora_segment> segments;
        for (const int32_t ia : m.adapters) {
            const int64_t rank = files[ia].pairs.at(name).b->ne[0];
            segments.push_back({ ia, rank, files[ia].alpha/rank });
        }
        m.layout = find_layout(segments, padded_rank(stacked_rank(segments), common_type({ name }, false)));
        return m;
    }

    // what a file has in Q4_0 is no order of the kernels
    bool is_converted(const ggml_tensor & t) const {
        return pack.type != GGML_TYPE_COUNT && (t.type != pack.type || t.type == GGML_TYPE_Q4_0);
    }

    void check_kernels(const std::string & name) const {
        if (pack.type != GGML_TYPE_COUNT && !pack.has_kernels(qaflora_base_tensor(*pack.model, name))) {
            qaflora_fail(qaflora_format("adapters cannot be converted to %s: the products with '%s' are not those of the CPU's kernels; "
                                        "load them as they are, or the base with no layers on a device", ggml_type_name(pack.type), name.c_str()));
        }
    }

    qaflora_cpu_segment make_cpu_segment(const std::string & name, size_t ia, int64_t offset) const {
        const qaflora_adapter_pair & p = files[ia].pairs.at(name);
        qaflora_cpu_segment s;
        s.ia     = (int32_t) ia;
        s.rank   = p.b->ne[0];
        s.scale  = files[ia].alpha/s.rank;
        s.offset = offset;
        const bool is_q4 = pack.type == GGML_TYPE_Q4_0;
        s.type_a = !is_converted(*p.a) ? qaflora_cpu_type_of(p.a->type) : is_q4 ? QAFLORA_CPU_Q4_0 : QAFLORA_CPU_Q8_0;
        s.type_b = !is_converted(*p.b) ? qaflora_cpu_type_of(p.b->type) : is_q4 ? QAFLORA_CPU_Q4_0_PANEL : QAFLORA_CPU_Q8_0_PANEL;
        if (is_converted(*p.a) && p.a->ne[0] % QAFLORA_PANEL != 0) {
            qaflora_fail(qaflora_format("%s: '%s' has rows of %lld numbers, expected a multiple of %d to convert it to %s; load the adapter as it is",
                                        files[ia].path.c_str(), p.a->name, (long long) p.a->ne[0], QAFLORA_PANEL, ggml_type_name(pack.type)));
        }
        return s;
    }

    // every adapter keeps its own A and panels of B: of those that weigh 0 nothing is read. Experts share their input with none
    void add_cpu_group(const std::vector<std::string> & names) {
        qaflora_group g;
        g.cpu.kernels = pack.kernels;
        ggml_context * ctx = ctx_for(qaflora_adapter_buft(qaflora_base_tensor(*pack.model, names[0])));
        const size_t first_pair = plan.cpu_pairs.size();
        for (const auto & name : names) {
            qaflora_module m = new_module(name);
            m.group = m.n_expert > 0 ? -1 : (int32_t) pack.groups.size();
            m.cpu.kernels  = pack.kernels;
            m.cpu.il       = m.il;
            m.cpu.n_in     = m.w->ne[0];
            m.cpu.n_out    = m.w->ne[1];
            m.cpu.n_expert = m.n_expert;
            for (const int32_t ia : m.adapters) {
                const qaflora_cpu_segment s = make_cpu_segment(name, ia, g.cpu.n_rank);
                g.cpu.n_rank += s.rank;
                ggml_tensor * a = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, m.n_matrix()*s.rank*qaflora_row_size(s.type_a, m.cpu.n_in));
                plan.cpu_pairs.push_back({ (int32_t) pack.modules.size(), m.cpu.segments.size(), a, nullptr });
                m.cpu.segments.push_back(s);
            }
            g.cpu.il   = m.cpu.il;
            g.cpu.n_in = m.cpu.n_in;
            pack.by_weight[m.w] = (int32_t) pack.modules.size();
            pack.modules.push_back(m);
        }
        // in the order in which they are read: all A of the group, then B
        for (size_t i = first_pair; i < plan.cpu_pairs.size(); ++i) {
            const auto & m = pack.modules[plan.cpu_pairs[i].module];
            const auto & s = m.cpu.segments[plan.cpu_pairs[i].segment];
            plan.cpu_pairs[i].b = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, m.n_matrix()*qaflora_panel_size(s.type_b, m.cpu.n_out, s.rank));
        }
        for (size_t i = 0; i < names.size(); ++i) {
            pack.modules[pack.modules.size() - 1 - i].cpu.n_rank = g.cpu.n_rank;
        }
        if (pack.modules.back().group >= 0) {
            pack.groups.push_back(g);
        }
    }

    void add_group(const std::vector<std::string> & names) {
        const ggml_tensor * w = qaflora_base_tensor(*pack.model, names[0]);
        if (pack.has_kernels(w)) {
            add_cpu_group(names);
            return;
        }
        if (qaflora_is_experts(names[0])) {
            add_experts(names[0]);
            return;
        }
        const ggml_backend_buffer_type_t buft = qaflora_adapter_buft(w);
        const ggml_type type_a = common_type(names, true);
        const int64_t n_in = w->ne[0];
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
        const int64_t rank = pack.layouts[m.layout].rank;
        ggml_context * ctx = ctx_for(qaflora_adapter_buft(m.w));
        m.a = ggml_new_tensor_3d(ctx, common_type({ name }, true),  m.w->ne[0], rank, m.n_expert);
        m.b = ggml_new_tensor_3d(ctx, common_type({ name }, false), rank, m.w->ne[1], m.n_expert);
        ggml_format_name(m.a, "%s.qaflora_a", name.c_str());
        ggml_format_name(m.b, "%s.qaflora_b", name.c_str());
        pack.by_weight[m.w] = (int32_t) pack.modules.size();
        pack.modules.push_back(m);
    }

    void add_embd() {
        qaflora_module m = make_module("token_embd.weight");
        const int64_t rank = pack.layouts[m.layout].rank;
        ggml_context * ctx = ctx_for(qaflora_adapter_buft(m.w));
        m.a = ggml_new_tensor_2d(ctx, common_type({ m.name }, true),  rank, m.w->ne[1]);
        m.b = ggml_new_tensor_2d(ctx, common_type({ m.name }, false), rank, m.w->ne[0]);
        ggml_set_name(m.a, "token_embd.qaflora_a");
        ggml_set_name(m.b, "token_embd.qaflora_b");
        pack.embd = (int32_t) pack.modules.size();
        pack.modules.push_back(m);
    }

    void build() {
        std::set<std::string> names;
        for (const auto & f : files) {
            n_tensor_max += 2*f.pairs.size();
            for (const auto & [name, p] : f.pairs) {
                names.insert(name);
            }
        }
        n_tensor_max += 4*names.size() + 4;

        using shared_input = std::tuple<int32_t, int, int64_t, ggml_backend_buffer_type_t>;
        std::map<shared_input, std::vector<std::string>> shared;
        for (const auto & name : names) {
            const int kind = qaflora_input_kind(name);
            if (name == "token_embd.weight") {
                add_embd();
                continue;
            }
            check_kernels(name);
            if (kind == 0) { // experts too
                add_group({ name });
            } else {
                const ggml_tensor * w = qaflora_base_tensor(*pack.model, name);
                shared[{ qaflora_layer_of(name, pack.n_layer), kind, w->ne[0], qaflora_adapter_buft(w) }].push_back(name);
            }
        }
        for (const auto & it : shared) {
            add_group(it.second);
        }
    }
};

qaflora_plan qaflora_make_plan(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files) {
    planner p { pack, files, {}, 0 };
    p.build();
    return std::move(p.plan);
}
