// How adapters enter llama.cpp's products.
// shapes: ggml order, ne[0] first

#include "qaflora-error.h"
#include "qaflora-graph-input.h"

#include "llama-model.h"

#include <algorithm>

uint32_t qaflora_n_nodes(const qaflora_context & qf) {
    // per module: two products, weighting, sum, views and shapes; differential: 13 more per matrix; two per captured layer
    const uint32_t n_module = qf.pack ? (uint32_t) qf.pack->modules.size() : 0;
    return 10u*n_module + (qf.is_differential() ? 16u*(8u*qf.n_layer + 2u) : 0u) + 4u*qf.n_layer + 64u;
}

// those that there are
static std::vector<ggml_tensor *> given(std::vector<ggml_tensor *> src) {
    src.erase(std::remove(src.begin(), src.end(), nullptr), src.end());
    return src;
}

// an operation of the CPU on y, in place where nothing else computes; whole: what y is a view of; n_slot: as many sequences as
// the result is to have, if more than y
static ggml_tensor * cpu_op(const llm_graph_context & gctx, ggml_custom_op_t op, ggml_tensor * y, std::initializer_list<ggml_tensor *> more,
                            const void * userdata, ggml_tensor * whole = nullptr, int64_t n_slot = 0) {
    std::vector<ggml_tensor *> src = given(more);
    if (ggml_backend_sched_get_n_backends(gctx.sched) == 1 && n_slot <= y->ne[2]) {
        return ggml_custom_inplace(gctx.ctx0, y, src.data(), (int) src.size(), op, GGML_N_TASKS_MAX, const_cast<void *>(userdata));
    }
    src.insert(src.begin(), whole ? whole : y); // between devices this may be a copy
    return ggml_custom_4d(gctx.ctx0, GGML_TYPE_F32, y->ne[0], y->ne[1], std::max(n_slot, y->ne[2]), y->ne[3],
                          src.data(), (int) src.size(), op, GGML_N_TASKS_MAX, const_cast<void *>(userdata));
}

// weight * scale * A cur of all modules of the group: [n_rank, n_row]
static ggml_tensor * cpu_product(const llm_graph_context & gctx, qaflora_graph_input & inp, int32_t group, ggml_tensor * cur) {
    auto & product = inp.group_product[group];
    if (product.cur != cur) {
        const auto & g = inp.qf.pack->groups[group].cpu;
        const int64_t n_row = ggml_nrows(cur);
        ggml_tensor * x = ggml_is_contiguous(cur) ? cur : ggml_cont(gctx.ctx0, cur);
        auto src = given({ x, qaflora_cpu_weights(gctx, inp), qaflora_slots_of(gctx, inp, n_row) });
        product = { cur, ggml_custom_4d(gctx.ctx0, GGML_TYPE_F32, g.n_rank, n_row, 1, 1, src.data(), (int) src.size(),
                                        qaflora_op_product, GGML_N_TASKS_MAX, const_cast<qaflora_cpu_module *>(&g)) };
    }
    return product.t;
}

static ggml_tensor * cpu_delta(const llm_graph_context & gctx, qaflora_graph_input & inp, const qaflora_module * m, const ggml_tensor * w,
                               ggml_tensor * cur, ggml_tensor * res) {
    if (!qaflora_is_differential(inp, cur)) {
        return !m ? res : cpu_op(gctx, qaflora_op_delta, res,
            { cpu_product(gctx, inp, m->group, cur), qaflora_cpu_weights(gctx, inp), qaflora_slots_of(gctx, inp, ggml_nrows(cur)) }, &m->cpu);
    }
    // res has the rows of cur that were multiplied, and below them those that were split
    const int64_t n_base = ggml_nrows(cur)/inp.n_slot;
    ggml_tensor * y = ggml_view_3d(gctx.ctx0, res, res->ne[0], n_base, qaflora_n_active(inp, w), res->nb[1], n_base*res->nb[1], 0);
    ggml_tensor * split = inp.last_difference.split;
    if (m) {
        y = cpu_op(gctx, qaflora_op_delta_differential, y,
                   { cpu_product(gctx, inp, m->group, cur), qaflora_cpu_weights(gctx, inp), qaflora_slots_of(gctx, inp, ggml_nrows(cur)), split }, &m->cpu, res, inp.n_slot);
    } else {
        y = cpu_op(gctx, qaflora_op_base_differential, y, { split }, inp.qf.pack->kernels, res, inp.n_slot);
    }
    return ggml_reshape_4d(gctx.ctx0, y, res->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

// sums in F32: GPU kernels may sum in F16, and an overflow there would be NaN at weight 0
static ggml_tensor * exact(ggml_tensor * product) {
    ggml_prec_set_acc(product, GGML_PREC_F32);
    return product;
}

// A cur, weighted: [rank, n_row]
static ggml_tensor * weighted_rank(const llm_graph_context & gctx, qaflora_graph_input & inp, ggml_tensor * a, int32_t layout, int32_t il, ggml_tensor * cur) {
    ggml_context * ctx = gctx.ctx0;
    ggml_tensor * t = exact(ggml_mul_mat(ctx, a, cur));
    const int64_t n_row = ggml_nrows(t);
    t = ggml_reshape_2d(ctx, t, t->ne[0], n_row);
    return ggml_mul(ctx, t, qaflora_rows_weights(gctx, inp, layout, il, n_row, a));
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

// Memory that nobody writes or reads, in the shape of one row of logits: architectures add biases of the head to it, or write into it.
static ggml_tensor * no_logits(const llm_graph_context & gctx, const ggml_tensor * head) {
    ggml_tensor * res = ggml_new_tensor_2d(gctx.ctx0, GGML_TYPE_F32, head->ne[1], 1);
    ggml_set_name(res, "qaflora_no_logits");
    ggml_set_input(res);
    return res;
}

ggml_tensor * qaflora_mm_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    qaflora_graph_input & inp = qaflora_get_input(gctx);
    if (qf.is_probe() && w == gctx.qaflora->pack->model->output) {
        ggml_build_forward_expand(gctx.gf, cur); // upstream sets inputs that lead here
        return no_logits(gctx, w); // the head's product stays out of the graph
    }
    if (qf.has_inputs() && cur->ne[0] == qf.n_embd) {
        qaflora_capture_input(gctx, inp, w, cur);
    }
    const auto it = qf.pack->by_weight.find(w);
    if (it == qf.pack->by_weight.end()) {
        return qf.pack->has_kernels(w) ? cpu_delta(gctx, inp, nullptr, w, cur, res) : res;
    }
    const qaflora_module & m = qf.pack->modules[it->second];
    const int64_t n_row = ggml_nrows(cur);
    if (!use_module(gctx, inp, it->second, n_row, false)) {
        return res;
    }
    if (!m.cpu.segments.empty()) {
        return cpu_delta(gctx, inp, &m, w, cur, res);
    }
    const bool is_shared = inp.n_slot == 1 && n_row == 1;
    ggml_tensor * t = is_shared ? shared_rank(gctx, inp, m, cur) : weighted_rank(gctx, inp, m.a, m.layout, m.il, cur);
    ggml_tensor * delta = exact(ggml_mul_mat(gctx.ctx0, m.b, t));
    return ggml_add(gctx.ctx0, res, ggml_reshape_4d(gctx.ctx0, delta, res->ne[0], res->ne[1], res->ne[2], res->ne[3]));
}

ggml_tensor * qaflora_mm_id_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * ids, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    const auto it = qf.pack->by_weight.find(w);
    if (it == qf.pack->by_weight.end()) {
        return res;
    }
    ggml_context * ctx = gctx.ctx0;
    qaflora_graph_input & inp = qaflora_get_input(gctx);
    const qaflora_module & m = qf.pack->modules[it->second];
    const int64_t n_row = ids->ne[1];
    if (!use_module(gctx, inp, it->second, n_row, true)) {
        return res;
    }
    if (!m.cpu.segments.empty()) {
        return cpu_op(gctx, qaflora_op_delta_experts, res,
                      { ggml_is_contiguous_rows(cur) ? cur : ggml_cont(ctx, cur), ids, qaflora_cpu_weights(gctx, inp), qaflora_slots_of(gctx, inp, n_row) }, &m.cpu);
    }
    ggml_tensor * t = exact(ggml_mul_mat_id(ctx, m.a, cur, ids)); // [rank, n_used, n_row]
    ggml_tensor * weights = qaflora_rows_weights(gctx, inp, m.layout, m.il, n_row, m.a);
    t = ggml_mul(ctx, t, ggml_reshape_3d(ctx, weights, weights->ne[0], 1, weights->ne[1]));
    return ggml_add(ctx, res, exact(ggml_mul_mat_id(ctx, m.b, t, ids)));
}

ggml_tensor * qaflora_embd_delta(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * tokens, ggml_tensor * res) {
    const qaflora_context & qf = *gctx.qaflora;
    if (qf.pack->embd < 0 || w != qf.pack->modules[qf.pack->embd].w) {
        return res;
    }
    qaflora_graph_input & inp = qaflora_get_input(gctx);
    const qaflora_module & m = qf.pack->modules[qf.pack->embd];
    gctx.qaflora->module_used[qf.pack->embd] = true;
    ggml_tensor * t = ggml_get_rows(gctx.ctx0, m.a, tokens);
    t = ggml_mul(gctx.ctx0, t, qaflora_rows_weights(gctx, inp, m.layout, m.il, ggml_nrows(t), m.a));
    return ggml_add(gctx.ctx0, res, exact(ggml_mul_mat(gctx.ctx0, m.b, t)));
}
