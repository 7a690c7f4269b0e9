// Differential products.
// shapes: ggml order, ne[0] first

#include "qaflora-graph-input.h"

#include "llama-model.h"

#include <algorithm>

// tokens of a query of which all products split rows, see rounding_of()
static const int64_t N_SHORT = 16;

bool qaflora_is_differential(const qaflora_graph_input & inp, const ggml_tensor * cur) {
    const int64_t n_row = ggml_nrows(cur);
    const bool is_token  = n_row == inp.n_token  && (inp.key & GRAPH_DIFFERENTIAL);
    const bool is_output = n_row == inp.n_output && (inp.key & GRAPH_DIFFERENTIAL_OUT);
    return (is_token || is_output) && ggml_is_contiguous(cur);
}

int64_t qaflora_n_active(const qaflora_graph_input & inp, const ggml_tensor * w) {
    const bool is_head = w == inp.qf.pack->model->output; // which may be the token embedding
    const int32_t il = is_head ? inp.qf.n_layer - 1 : qaflora_layer_of(w->name, inp.qf.n_layer);
    int64_t res = inp.n_slot;
    while (il >= 0 && res > 1 && inp.qf.first_layer[res - 1] > il) { // slot i is sequence i, see qaflora_accepts_ubatch()
        --res;
    }
    return res;
}

// n of x [.., n_row, n_seq]
static ggml_tensor * sequences(ggml_context * ctx, ggml_tensor * x, int64_t first, int64_t n) {
    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], first*x->nb[2]);
}

// How the products with w round activations, if rows are to be split for them. Where a token's activations are hundreds of
// times those of others, as some models make them before ffn_down, rounding to 8 bits takes the small ones away, and what
// the adapters are compared with is no longer the base. All products of a short query, where few tokens decide; of a longer
// one those that were seen to matter at a small share of the cost. Our own product is so quick that all of the base is split.
static const qaflora_cpu_difference * rounding_of(const qaflora_context & qf, const ggml_tensor * w, int64_t n_base) {
    const auto & layers = qf.pack->model->layers;
    const bool is_sensitive = std::any_of(layers.begin(), layers.end(), [&](const llama_layer & l) {
        return w == l.ffn_down || w == l.wq || w == l.wk || w == l.wv || w == l.wqkv;
    });
    if (qaflora_has_matmul(qf.pack->kernels, w)) {
        return &qf.pack->rounded_own;
    }
    if (!qf.pack->has_kernels(w) || (n_base > N_SHORT && !is_sensitive)) {
        return nullptr;
    }
    if (w->type == GGML_TYPE_MXFP4 || w->type == GGML_TYPE_TQ1_0 || w->type == GGML_TYPE_TQ2_0) {
        return nullptr;
    }
    // activations are rounded in blocks as long as those of the weights
    const int64_t block = ggml_blck_size(w->type);
    return block == 32 ? &qf.pack->rounded_32 : block == 256 ? &qf.pack->rounded_256 : nullptr;
}

// x_0 of the base, x_j - x_0 of the others [n_in, n_row]; then the rest of the rows that are split
static qaflora_graph_input::difference & subtract_base(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w,
                                                     ggml_tensor * cur, ggml_tensor * x) {
    ggml_context * ctx = gctx.ctx0;
    auto & diff = inp.last_difference;
    const bool is_cpu = inp.qf.pack->has_kernels(w);
    const qaflora_cpu_difference * how = rounding_of(inp.qf, w, x->ne[1]);
    if (diff.cur == cur && diff.is_cpu == is_cpu && diff.how == how && diff.n_active == x->ne[2]) {
        return diff;
    }
    diff = { cur, is_cpu, how, x->ne[2], nullptr, nullptr, nullptr };
    if (!is_cpu) {
        ggml_tensor * x0 = sequences(ctx, x, 0, 1);
        diff.d = x->ne[2] == 1 ? x0 : ggml_concat(ctx, x0, ggml_sub(ctx, sequences(ctx, x, 1, x->ne[2] - 1), x0), 2);
        return diff;
    }
    std::vector<ggml_tensor *> src = { x };
    if (how) {
        const int64_t n_split = qaflora_n_split(*how, 0, x->ne[1]) + (x->ne[2] - 1)*qaflora_n_split(*how, 1, x->ne[1]);
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

// W d, with d rounded once for all matrices that it is multiplied with
static ggml_tensor * own_matmul(ggml_context * ctx, const qaflora_kernels & kernels, ggml_tensor * w, qaflora_graph_input::difference & diff) {
    void * userdata = const_cast<qaflora_kernels *>(&kernels);
    const int64_t n_row = ggml_nrows(diff.d);
    if (!diff.rounded) {
        diff.rounded = ggml_custom_4d(ctx, GGML_TYPE_I8, kernels.matmul_rounded_size(n_row, diff.d->ne[0]), 1, 1, 1, &diff.d, 1,
                                      qaflora_op_round, GGML_N_TASKS_MAX, userdata);
    }
    ggml_tensor * src[] = { diff.rounded, w };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, w->ne[1], n_row, 1, 1, src, 2, qaflora_op_matmul, GGML_N_TASKS_MAX, userdata);
}

ggml_tensor * qaflora_mm_base(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res) {
    qaflora_graph_input & inp = qaflora_get_input(gctx);
    ggml_context * ctx = gctx.ctx0;
    const auto * kernels = inp.qf.pack->kernels;
    if (!qaflora_is_differential(inp, cur)) {
        if (!qaflora_has_matmul(kernels, w) || !ggml_is_contiguous(cur)) {
            return res;
        }
        auto & diff = inp.last_difference;
        if (diff.d != cur) {
            diff = { cur, true, nullptr, 0, cur, nullptr, nullptr };
        }
        return ggml_reshape_4d(ctx, own_matmul(ctx, *kernels, w, diff), res->ne[0], res->ne[1], res->ne[2], res->ne[3]);
    }
    const int64_t n_active = qaflora_n_active(inp, w);
    ggml_tensor * x = ggml_reshape_3d(ctx, cur, cur->ne[0], ggml_nrows(cur)/inp.n_slot, inp.n_slot);
    x = sequences(ctx, x, 0, n_active);
    // y_0 = W x_0, y_j = y_0 + W (x_j - x_0): rounding of the activations is then common to both
    auto & diff = subtract_base(gctx, inp, w, cur, x);
    if (qaflora_has_matmul(kernels, w)) {
        return own_matmul(ctx, *kernels, w, diff); // qaflora_mm_delta() adds y_0
    }
    if (inp.qf.pack->has_kernels(w)) {
        return ggml_mul_mat(ctx, w, diff.d);
    }
    ggml_tensor * y = ggml_mul_mat(ctx, w, ggml_reshape_2d(ctx, diff.d, x->ne[0], x->ne[1]*x->ne[2]));
    if (gctx.prec_policy) {
        gctx.prec_policy->apply(y);
    }
    y = ggml_reshape_3d(ctx, y, y->ne[0], x->ne[1], x->ne[2]);
    ggml_tensor * y0 = sequences(ctx, y, 0, 1);
    if (n_active > 1) {
        y = ggml_concat(ctx, y0, ggml_add(ctx, sequences(ctx, y, 1, n_active - 1), y0), 2);
    }
    if (n_active < inp.n_slot) {
        y = ggml_concat(ctx, y, ggml_repeat_4d(ctx, y0, y0->ne[0], y0->ne[1], inp.n_slot - n_active, 1), 2);
    }
    return ggml_reshape_4d(ctx, y, res->ne[0], res->ne[1], res->ne[2], res->ne[3]);
}
