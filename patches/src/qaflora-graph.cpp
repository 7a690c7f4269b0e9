// The hooks: how adapters enter llama.cpp's graphs.
// shapes: ggml order, ne[0] first

#include "qaflora-context.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <map>

// bits of the graph key
enum {
    GRAPH_DIFFERENTIAL     = 1, // rows of all tokens form [.., n_seq] with the base first
    GRAPH_DIFFERENTIAL_OUT = 2, // so do the output rows
    GRAPH_KEY_BITS         = 2, // above them: how often the lens was used
};

//
// graph input: weights, and which row follows which sequence
//

// tokens of a query of which all products split rows, see rounding_of()
static const int64_t N_SHORT = 16;

struct qaflora_graph_input : public llm_graph_input_i {
    qaflora_graph_input(const qaflora_context & qf, const llm_graph_context & gctx) :
        qf(qf), sched(gctx.sched), n_slot(gctx.ubatch.n_seqs_unq), n_token(gctx.n_tokens), n_output(gctx.n_outputs),
        key(qaflora_graph_key(qf, gctx.ubatch, gctx.n_outputs)),
        captured(qf.n_layer, nullptr), captured_input(qf.n_layer, nullptr), group_product(qf.pack ? qf.pack->groups.size() : 0) {}

    void set_input(const llama_ubatch * ubatch) override;

    // the shapes depend on nothing but llm_graph_params and the graph key
    bool can_reuse(const llm_graph_params &) override { return true; }

    const qaflora_context & qf;
    ggml_backend_sched_t sched;
    const int64_t  n_slot; // distinct sequences
    const int64_t  n_token;
    const int64_t  n_output;
    const uint64_t key;

    // weight of each rank row: F32 [rank, n_slot, n_layer], one tensor per layout and device
    std::map<std::pair<int32_t, ggml_backend_dev_t>, ggml_tensor *> weights;

    // the same for the CPU's kernels: F32 [n_adapter, n_slot, n_layer]
    ggml_tensor * cpu_weights = nullptr;

    ggml_tensor * slot_token  = nullptr; // I32 [n_token]   which slot each token belongs to
    ggml_tensor * slot_output = nullptr; // I32 [n_output]  the same for output rows
    ggml_tensor * output_rows = nullptr; // I32 [n_output]  token of each output row

    std::vector<ggml_tensor *> captured;       // [n_layer] of F32 [n_embd, n_output]
    std::vector<ggml_tensor *> captured_input; // the same for what query projections read

    // while the graph is built: what is shared between modules
    std::map<std::tuple<int32_t, int32_t, bool>, ggml_tensor *> row_weights; // (layout, il, is_output)
    struct product { const ggml_tensor * cur = nullptr; ggml_tensor * t = nullptr; };
    std::vector<product> group_product; // [n_group]
    struct difference {
        const ggml_tensor * cur = nullptr;
        bool          is_cpu = false; // of the weights that it is multiplied with
        ggml_tensor * d     = nullptr;
        ggml_tensor * split = nullptr; // rows that d has in two parts
    };
    difference last_difference;

private:
    void set_cpu_weights(const llama_ubatch & ubatch) const;
    void set_weights(int32_t layout, ggml_tensor * dst, const llama_ubatch & ubatch) const;
};

static int32_t slot_of(const llama_ubatch & ubatch, uint32_t i) {
    return ubatch.seq_idx[ubatch.seq_id[i][0]];
}

void qaflora_graph_input::set_weights(int32_t layout, ggml_tensor * dst, const llama_ubatch & ubatch) const {
    const auto & segments = qf.pack->layouts[layout].segments;
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
    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

void qaflora_graph_input::set_cpu_weights(const llama_ubatch & ubatch) const {
    const int64_t n_adapter = cpu_weights->ne[0];
    std::vector<float> data;
    data.reserve(ggml_nelements(cpu_weights));
    for (int32_t il = 0; il < qf.n_layer; ++il) {
        for (int64_t s = 0; s < n_slot; ++s) {
            const auto & w = qf.weights[ubatch.seq_id_unq[s]];
            for (int64_t ia = 0; ia < n_adapter; ++ia) {
                data.push_back(w[ia*qf.n_layer + il]);
            }
        }
    }
    ggml_backend_tensor_set(cpu_weights, data.data(), 0, ggml_nbytes(cpu_weights));
}

void qaflora_graph_input::set_input(const llama_ubatch * ubatch) {
    if (qf.pack->is_offloaded()) {
        // a device may still read the memory of these weights: llama.cpp 0c1e5709, llama-context.cpp process_ubatch
        // waits only under pipeline parallelism, for its own inputs lie on the host
        ggml_backend_sched_synchronize(sched);
    }
    if (cpu_weights && cpu_weights->buffer) {
        set_cpu_weights(*ubatch);
    }
    for (const auto & [key, dst] : weights) {
        if (dst->buffer) {
            set_weights(key.first, dst, *ubatch);
        }
    }

    std::vector<int32_t> tokens, outputs, rows;
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        tokens.push_back(slot_of(*ubatch, i));
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

static qaflora_graph_input * find_input(const llm_graph_result & res) {
    for (const auto & inp : res.inputs) {
        if (auto * found = dynamic_cast<qaflora_graph_input *>(inp.get())) {
            return found;
        }
    }
    return nullptr;
}

static qaflora_graph_input & get_input(const llm_graph_context & gctx) {
    qaflora_graph_input * inp = find_input(*gctx.res);
    if (!inp) {
        inp = new qaflora_graph_input(*gctx.qaflora, gctx);
        gctx.res->add_input(llm_graph_input_ptr(inp));
        gctx.qaflora->stats.n_graph_built++;
    }
    return *inp;
}

static ggml_tensor * new_index(const llm_graph_context & gctx, int64_t n, const char * name) {
    ggml_tensor * res = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, n);
    ggml_set_name(res, name);
    ggml_set_input(res);
    return res;
}

static ggml_backend_t find_backend(ggml_backend_sched_t sched, ggml_backend_dev_t dev) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return nullptr;
}

// where a module's products are computed: the device that holds its A
static ggml_backend_dev_t device_of(const ggml_tensor * a) {
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(a->buffer));
}

// which slot each of n_row rows belongs to, or null when there is but one
static ggml_tensor * slots_of(const llm_graph_context & gctx, qaflora_graph_input & inp, int64_t n_row) {
    if (inp.n_slot == 1) {
        return nullptr;
    }
    const bool is_output = n_row != inp.n_token;
    ggml_tensor *& slot = is_output ? inp.slot_output : inp.slot_token;
    if (!slot) {
        slot = new_index(gctx, n_row, is_output ? "qaflora_slot_output" : "qaflora_slot_token");
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
        if (ggml_backend_t backend = find_backend(gctx.sched, dev)) {
            ggml_backend_sched_set_tensor_backend(gctx.sched, all, backend);
        }
    }
    return ggml_view_2d(gctx.ctx0, all, all->ne[0], all->ne[1], all->nb[1], il*all->nb[2]);
}

// weights of each of n_row rows: [rank, n_row], or [rank, 1] when all rows are of one sequence
static ggml_tensor * rows_weights(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t layout, int32_t il, int64_t n_row, const ggml_tensor * a) {
    const bool is_output = n_row != inp.n_token;
    ggml_tensor *& res = inp.row_weights[{ layout, il, is_output }];
    if (res) {
        return res;
    }
    res = layer_weights(gctx, inp, layout, il, device_of(a));
    if (ggml_tensor * slot = slots_of(gctx, inp, n_row)) {
        res = ggml_get_rows(gctx.ctx0, res, slot);
    }
    return res;
}

// an operation of the CPU on y, in place where nothing else computes; whole: what y is a view of
static ggml_tensor * cpu_op(const llm_graph_context & gctx, ggml_custom_op_t op, ggml_tensor * y, std::initializer_list<ggml_tensor *> more,
                            const void * userdata, ggml_tensor * whole = nullptr) {
    std::vector<ggml_tensor *> src;
    for (ggml_tensor * t : more) {
        if (t) {
            src.push_back(t);
        }
    }
    if (ggml_backend_sched_get_n_backends(gctx.sched) == 1) {
        return ggml_custom_inplace(gctx.ctx0, y, src.data(), (int) src.size(), op, GGML_N_TASKS_MAX, const_cast<void *>(userdata));
    }
    src.insert(src.begin(), whole ? whole : y); // between devices this may be a copy
    return ggml_custom_4d(gctx.ctx0, GGML_TYPE_F32, y->ne[0], y->ne[1], y->ne[2], y->ne[3],
                          src.data(), (int) src.size(), op, GGML_N_TASKS_MAX, const_cast<void *>(userdata));
}

static ggml_tensor * cpu_weights(const llm_graph_context & gctx, qaflora_graph_input & inp) {
    if (!inp.cpu_weights) {
        inp.cpu_weights = ggml_new_tensor_3d(gctx.ctx0, GGML_TYPE_F32, inp.qf.pack->n_adapter, inp.n_slot, inp.qf.n_layer);
        ggml_set_name(inp.cpu_weights, "qaflora_weights");
        ggml_set_input(inp.cpu_weights);
    }
    return inp.cpu_weights;
}

//
// hooks
//

bool qaflora_has_logits(const qaflora_context & qf) {
    return !qf.is_probe();
}

uint32_t qaflora_n_nodes(const qaflora_context & qf) {
    // per module: two products, weighting, sum, views and shapes; differential: 13 more per matrix; two per captured layer
    const uint32_t n_module = qf.pack ? (uint32_t) qf.pack->modules.size() : 0;
    return 10u*n_module + (qf.is_differential() ? 16u*(8u*qf.n_layer + 2u) : 0u) + 4u*qf.n_layer + 64u;
}

// whether output rows are spread evenly over the sequences, in the order of the sequences
static bool is_balanced(const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint32_t n_seq = ubatch.n_seqs_unq;
    if (n_outputs == 0 || n_outputs % n_seq != 0) {
        return false;
    }
    for (uint32_t s = 0; s < n_seq; ++s) {
        uint32_t n = 0;
        for (uint32_t t = 0; t < ubatch.n_seq_tokens; ++t) {
            n += ubatch.output[s*ubatch.n_seq_tokens + t] != 0;
        }
        if (n != n_outputs/n_seq) {
            return false;
        }
    }
    return true;
}

uint64_t qaflora_graph_key(const qaflora_context & qf, const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint64_t key = qf.n_lens << GRAPH_KEY_BITS;
    if (!qf.is_differential() || !ubatch.equal_seqs() || ubatch.n_seqs_unq < 2 ||
        ubatch.n_seqs_unq*ubatch.n_seq_tokens != ubatch.n_tokens || ubatch.seq_id_unq[0] != 0) {
        return key;
    }
    return key | GRAPH_DIFFERENTIAL | (is_balanced(ubatch, n_outputs) ? GRAPH_DIFFERENTIAL_OUT : 0);
}

// whether the product with cur is taken differentially
static bool is_differential(const qaflora_graph_input & inp, const ggml_tensor * cur) {
    const int64_t n_row = ggml_nrows(cur);
    const bool is_token  = n_row == inp.n_token  && (inp.key & GRAPH_DIFFERENTIAL);
    const bool is_output = n_row == inp.n_output && (inp.key & GRAPH_DIFFERENTIAL_OUT);
    return (is_token || is_output) && ggml_is_contiguous(cur);
}

static ggml_tensor * first_sequence(ggml_context * ctx, ggml_tensor * x) {
    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], 1, x->nb[1], x->nb[2], 0);
}

static ggml_tensor * other_sequences(ggml_context * ctx, ggml_tensor * x) {
    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], x->ne[2] - 1, x->nb[1], x->nb[2], x->nb[2]);
}

static bool has_kernels(const qaflora_context & qf, const ggml_tensor * w) {
    return qf.pack->kernels && qaflora_is_on_cpu(w);
}

// How the products with w round activations, if rows are to be split for them. Where a token's activations are hundreds of
// times those of others, as some models make them before ffn_down, rounding to 8 bits takes the small ones away, and what
// the adapters are compared with is no longer the base. All products of a short query, where few tokens decide; of a longer
// one those that were seen to matter at a small share of the cost.
static const qaflora_cpu_difference * rounding_of(const qaflora_context & qf, const ggml_tensor * w, int64_t n_base) {
    const auto & layers = qf.pack->model->layers;
    const bool is_sensitive = std::any_of(layers.begin(), layers.end(), [&](const llama_layer & l) {
        return w == l.ffn_down || w == l.wq || w == l.wk || w == l.wv || w == l.wqkv;
    });
    if (!has_kernels(qf, w) || (n_base > N_SHORT && !is_sensitive)) {
        return nullptr;
    }
    switch (w->type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
            return &qf.pack->rounded_32;
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ4_XS:
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
            return &qf.pack->rounded_256;
        default:
            return nullptr;
    }
}

// x_0 of the base, x_j - x_0 of the others [n_in, n_row]; then the rest of the rows that are split
static qaflora_graph_input::difference subtract_base(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w,
                                                     ggml_tensor * cur, ggml_tensor * x) {
    ggml_context * ctx = gctx.ctx0;
    auto & diff = inp.last_difference;
    const bool is_cpu = has_kernels(inp.qf, w);
    if (diff.cur == cur && diff.is_cpu == is_cpu) {
        return diff;
    }
    diff = { cur, is_cpu, nullptr, nullptr };
    if (!is_cpu) {
        ggml_tensor * x0 = first_sequence(ctx, x);
        diff.d = ggml_concat(ctx, x0, ggml_sub(ctx, other_sequences(ctx, x), x0), 2);
        return diff;
    }
    const qaflora_cpu_difference * how = rounding_of(inp.qf, w, x->ne[1]);
    std::vector<ggml_tensor *> src = { x };
    if (how) {
        const int64_t n_split = qaflora_n_split(0, x->ne[1]) + (x->ne[2] - 1)*qaflora_n_split(1, x->ne[1]);
        diff.split = ggml_custom_4d(ctx, GGML_TYPE_I32, n_split, 1, 1, 1, src.data(), 1, qaflora_op_coarsest_rows, GGML_N_TASKS_MAX,
                                    const_cast<qaflora_cpu_difference *>(how));
        src.push_back(diff.split);
    } else {
        how = &inp.qf.pack->plain;
    }
    diff.d = ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], ggml_nrows(x) + (diff.split ? ggml_nelements(diff.split) : 0), 1, 1,
                            src.data(), (int) src.size(), qaflora_op_subtract_base, GGML_N_TASKS_MAX, const_cast<qaflora_cpu_difference *>(how));
    return diff;
}

ggml_tensor * qaflora_mm_base(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res) {
    qaflora_graph_input & inp = get_input(gctx);
    if (!is_differential(inp, cur)) {
        return res;
    }
    ggml_context * ctx = gctx.ctx0;
    ggml_tensor * x = ggml_reshape_3d(ctx, cur, cur->ne[0], ggml_nrows(cur)/inp.n_slot, inp.n_slot);
    // y_0 = W x_0, y_j = y_0 + W (x_j - x_0): rounding of the activations is then common to both
    const auto diff = subtract_base(gctx, inp, w, cur, x);
    if (has_kernels(inp.qf, w)) {
        return ggml_mul_mat(ctx, w, diff.d); // qaflora_mm_delta() adds y_0
    }
    ggml_tensor * y = ggml_mul_mat(ctx, w, ggml_reshape_2d(ctx, diff.d, x->ne[0], x->ne[1]*x->ne[2]));
    if (gctx.prec_policy) {
        gctx.prec_policy->apply(y);
    }
    y = ggml_reshape_3d(ctx, y, y->ne[0], x->ne[1], x->ne[2]);
    ggml_tensor * y0 = first_sequence(ctx, y);
    y = ggml_concat(ctx, y0, ggml_add(ctx, other_sequences(ctx, y), y0), 2);
    return ggml_reshape_4d(ctx, y, res->ne[0], res->ne[1], res->ne[2], res->ne[3]);
}

// weight * scale * A cur of all modules of the group: [n_rank, n_row]
static ggml_tensor * cpu_product(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t group, ggml_tensor * cur) {
    auto & product = inp.group_product[group];
    if (product.cur != cur) {
        const auto & g = inp.qf.pack->groups[group].cpu;
        const int64_t n_row = ggml_nrows(cur);
        std::vector<ggml_tensor *> src = { ggml_is_contiguous(cur) ? cur : ggml_cont(gctx.ctx0, cur), cpu_weights(gctx, inp) };
        if (ggml_tensor * slot = slots_of(gctx, inp, n_row)) {
            src.push_back(slot);
        }
        product = { cur, ggml_custom_4d(gctx.ctx0, GGML_TYPE_F32, g.n_rank, n_row, 1, 1, src.data(), (int) src.size(),
                                        qaflora_op_product, GGML_N_TASKS_MAX, const_cast<qaflora_cpu_group *>(&g)) };
    }
    return product.t;
}

static ggml_tensor * cpu_delta(const llm_graph_context & gctx, qaflora_graph_input & inp, const qaflora_module * m, ggml_tensor * cur, ggml_tensor * res) {
    if (!is_differential(inp, cur)) {
        return !m ? res : cpu_op(gctx, qaflora_op_delta, res,
            { cpu_product(gctx, inp, m->group, cur), cpu_weights(gctx, inp), slots_of(gctx, inp, ggml_nrows(cur)) }, &m->cpu);
    }
    // res has the rows of cur, and below them those that were split
    const int64_t n_base = ggml_nrows(cur)/inp.n_slot;
    ggml_tensor * y = ggml_view_3d(gctx.ctx0, res, res->ne[0], n_base, inp.n_slot, res->nb[1], n_base*res->nb[1], 0);
    ggml_tensor * split = inp.last_difference.split;
    if (m) {
        y = cpu_op(gctx, qaflora_op_delta_differential, y,
                   { cpu_product(gctx, inp, m->group, cur), cpu_weights(gctx, inp), slots_of(gctx, inp, ggml_nrows(cur)), split }, &m->cpu, res);
    } else {
        y = cpu_op(gctx, qaflora_op_base_differential, y, { split }, inp.qf.pack->kernels, res);
    }
    return ggml_reshape_4d(gctx.ctx0, y, res->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

// sums in F32: GPU kernels may sum in F16, and an overflow there would be NaN at weight 0
static ggml_tensor * exact_mul_mat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * res = ggml_mul_mat(ctx, a, b);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return res;
}

static ggml_tensor * exact_mul_mat_id(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * ids) {
    ggml_tensor * res = ggml_mul_mat_id(ctx, a, b, ids);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return res;
}

// A cur, weighted: [rank, n_row]
static ggml_tensor * weighted_rank(const llm_graph_context & gctx, qaflora_graph_input & inp, ggml_tensor * a, int32_t layout, int32_t il, ggml_tensor * cur) {
    ggml_context * ctx = gctx.ctx0;
    ggml_tensor * t = exact_mul_mat(ctx, a, cur);
    const int64_t n_row = ggml_nrows(t);
    t = ggml_reshape_2d(ctx, t, t->ne[0], n_row);
    return ggml_mul(ctx, t, rows_weights(gctx, inp, layout, il, n_row, a));
}

// one row: the modules of a group share one product, each takes its part of it
static ggml_tensor * shared_rank(const llm_graph_context & gctx, qaflora_graph_input & inp, const qaflora_module & m, ggml_tensor * cur) {
    const auto & g = inp.qf.pack->groups[m.group];
    auto & product = inp.group_product[m.group];
    if (product.cur != cur) {
        product = { cur, weighted_rank(gctx, inp, g.a, g.layout, m.il, cur) };
    }
    if (m.a->ne[1] == g.a->ne[1]) {
        return product.t;
    }
    return ggml_view_1d(gctx.ctx0, product.t, m.a->ne[1], m.offset*sizeof(float));
}

// output rows of cur, kept until they are read
static ggml_tensor * captured_rows(const llm_graph_context & gctx, qaflora_graph_input & inp, ggml_tensor * cur) {
    if (cur->ne[1] != gctx.n_outputs) {
        if (!inp.output_rows) {
            inp.output_rows = new_index(gctx, gctx.n_outputs, "qaflora_output_rows");
        }
        cur = ggml_get_rows(gctx.ctx0, cur, inp.output_rows);
    }
    ggml_set_output(cur);
    ggml_build_forward_expand(gctx.gf, cur);
    return cur;
}

static int32_t count(const std::vector<ggml_tensor *> & captured) {
    return (int32_t) std::count_if(captured.begin(), captured.end(), [](const ggml_tensor * t) { return t; });
}

static void capture_input(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w, ggml_tensor * cur) {
    const auto & layers = gctx.qaflora->pack->model->layers;
    for (int32_t il = 0; il < inp.qf.n_layer; ++il) {
        if (w == layers[il].wq || w == layers[il].wqkv) {
            inp.captured_input[il] = captured_rows(gctx, inp, cur);
            gctx.qaflora->n_captured_input = count(inp.captured_input);
            return;
        }
    }
}

// Memory that nobody writes or reads, in the shape of one row of logits: architectures add biases of the head to it, or write into it.
static ggml_tensor * no_logits(const llm_graph_context & gctx, const ggml_tensor * head) {
    ggml_tensor * res = ggml_new_tensor_2d(gctx.ctx0, GGML_TYPE_F32, head->ne[1], 1);
    ggml_set_name(res, "qaflora_no_logits");
    ggml_set_input(res);
    return res;
}

// whether a module can enter a product with n_row rows; if so, it is marked as used
static bool use_module(const llm_graph_context & gctx, const qaflora_graph_input & inp, int32_t im, int64_t n_row, bool is_routed) {
    const qaflora_module & m = gctx.qaflora->pack->modules[im];
    if (is_routed != (m.n_expert > 0)) {
        gctx.qaflora->graph_error = qaflora_format("'%s' is adapted as %s, and architecture '%s' does not use it so; leave it out of the adapter",
            m.name.c_str(), is_routed ? "a plain matrix" : "stacked experts", llm_arch_name(gctx.arch));
        return false;
    }
    if (inp.n_slot > 1 && n_row != inp.n_token && n_row != inp.n_output) {
        gctx.qaflora->graph_error = qaflora_format("'%s' is multiplied with %lld rows, neither the %lld tokens nor the %lld outputs",
            m.name.c_str(), (long long) n_row, (long long) inp.n_token, (long long) inp.n_output);
        return false;
    }
    gctx.qaflora->module_used[im] = true;
    return true;
}

ggml_tensor * qaflora_mm_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    qaflora_graph_input & inp = get_input(gctx);
    if (qf.is_probe() && w == gctx.qaflora->pack->model->output) {
        ggml_build_forward_expand(gctx.gf, cur); // upstream sets inputs that lead here
        return no_logits(gctx, w); // the head's product stays out of the graph
    }
    if (qf.has_inputs() && gctx.n_outputs > 0 && cur->ne[0] == qf.n_embd) {
        capture_input(gctx, inp, w, cur);
    }
    const auto it = qf.pack->by_weight.find(w);
    if (it == qf.pack->by_weight.end()) {
        return has_kernels(qf, w) ? cpu_delta(gctx, inp, nullptr, cur, res) : res;
    }
    const qaflora_module & m = qf.pack->modules[it->second];
    const int64_t n_row = ggml_nrows(cur);
    if (!use_module(gctx, inp, it->second, n_row, false)) {
        return res;
    }
    if (!m.cpu.segments.empty()) {
        return cpu_delta(gctx, inp, &m, cur, res);
    }
    const bool is_shared = inp.n_slot == 1 && n_row == 1;
    ggml_tensor * t = is_shared ? shared_rank(gctx, inp, m, cur) : weighted_rank(gctx, inp, m.a, m.layout, m.il, cur);
    ggml_tensor * delta = exact_mul_mat(gctx.ctx0, m.b, t);
    return ggml_add(gctx.ctx0, res, ggml_reshape_4d(gctx.ctx0, delta, res->ne[0], res->ne[1], res->ne[2], res->ne[3]));
}

ggml_tensor * qaflora_mm_id_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * ids, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    const auto it = qf.pack->by_weight.find(w);
    if (it == qf.pack->by_weight.end()) {
        return res;
    }
    ggml_context * ctx = gctx.ctx0;
    qaflora_graph_input & inp = get_input(gctx);
    const qaflora_module & m = qf.pack->modules[it->second];
    const int64_t n_row = ids->ne[1];
    if (!use_module(gctx, inp, it->second, n_row, true)) {
        return res;
    }
    if (!m.cpu.segments.empty()) {
        return cpu_op(gctx, qaflora_op_delta_experts, res,
                      { ggml_is_contiguous_rows(cur) ? cur : ggml_cont(ctx, cur), ids, cpu_weights(gctx, inp), slots_of(gctx, inp, n_row) }, &m.cpu);
    }
    ggml_tensor * t = exact_mul_mat_id(ctx, m.a, cur, ids); // [rank, n_used, n_row]
    ggml_tensor * weights = rows_weights(gctx, inp, m.layout, m.il, n_row, m.a);
    t = ggml_mul(ctx, t, ggml_reshape_3d(ctx, weights, weights->ne[0], 1, weights->ne[1]));
    return ggml_add(ctx, res, exact_mul_mat_id(ctx, m.b, t, ids));
}

ggml_tensor * qaflora_embd_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * tokens, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    if (qf.pack->embd < 0 || w != qf.pack->modules[qf.pack->embd].w) {
        return res;
    }
    qaflora_graph_input & inp = get_input(gctx);
    const qaflora_module & m = qf.pack->modules[qf.pack->embd];
    gctx.qaflora->module_used[qf.pack->embd] = true;
    ggml_tensor * t = ggml_get_rows(gctx.ctx0, m.a, tokens);
    t = ggml_mul(gctx.ctx0, t, rows_weights(gctx, inp, m.layout, m.il, ggml_nrows(t), m.a));
    return ggml_add(gctx.ctx0, res, exact_mul_mat(gctx.ctx0, m.b, t));
}

void qaflora_capture_block(const llm_graph_context & gctx, ggml_tensor * cur, const char * name, int il) {
    // llama.cpp 0c1e5709: the dense architectures name every block's output l_out
    if (!gctx.qaflora->is_probe() || il < 0 || il >= gctx.qaflora->n_layer || strcmp(name, "l_out") != 0 || gctx.n_outputs == 0) {
        return;
    }
    if (cur->ne[0] != gctx.qaflora->n_embd || cur->ne[2] != 1 || cur->ne[3] != 1) {
        return; // several streams side by side, as of gemma3n: no one state is the block's
    }
    qaflora_graph_input & inp = get_input(gctx);
    inp.captured[il] = captured_rows(gctx, inp, cur);
    gctx.qaflora->n_captured = count(inp.captured);
}

void qaflora_extract(qaflora_context & qf, const llm_graph_result & res, const llama_ubatch & ubatch, ggml_backend_sched_t sched) {
    qf.stats.n_decoded++;
    const qaflora_graph_input * inp = find_input(res);
    if (!qf.is_probe() || !inp || inp->n_output == 0) {
        return;
    }
    ggml_backend_sched_synchronize(sched);

    std::vector<llama_seq_id> seq_of_row;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.output[i]) {
            seq_of_row.push_back(ubatch.seq_id[i][0]);
        }
    }
    std::vector<float> rows(inp->n_output*qf.n_embd);
    for (int32_t il = 0; il < qf.n_layer; ++il) {
        ggml_backend_tensor_get(inp->captured[il], rows.data(), 0, rows.size()*sizeof(float));
        for (size_t i = 0; i < seq_of_row.size(); ++i) {
            double * dst = qf.states[seq_of_row[i]].data() + (size_t) il*qf.n_embd;
            const float * src = rows.data() + i*qf.n_embd;
            for (int32_t j = 0; j < qf.n_embd; ++j) {
                dst[j] = qf.capture == QAFLORA_CAPTURE_MEAN ? dst[j] + src[j] : src[j];
            }
        }
    }
    for (int32_t il = 0; il < qf.n_layer && qf.has_inputs(); ++il) {
        ggml_backend_tensor_get(inp->captured_input[il], rows.data(), 0, rows.size()*sizeof(float));
        for (size_t i = 0; i < seq_of_row.size(); ++i) {
            std::copy_n(rows.data() + i*qf.n_embd, qf.n_embd, qf.inputs[seq_of_row[i]].data() + (size_t) il*qf.n_embd);
        }
    }
    for (const llama_seq_id seq_id : seq_of_row) {
        qf.n_row[seq_id]++;
    }
}
