// The lens: states through the base's head, and how far two of them are apart.
// shapes: numpy order, but for ggml_new_tensor

#include "qaflora-context.h"
#include "qaflora-error.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <thread>

// logits and rows held at once: they bound the memory of the lens for any vocabulary and depth
static const size_t  LENS_LOGITS_BYTES = 12u << 20;
static const int32_t LENS_ROWS         = 256;
static const int64_t SLICE_STEP        = 1024; // tokens: where a slice begins is aligned for every device
static const int64_t SHARE             = 256;  // tokens that a thread takes of our own product

// the values of a tensor, or none
static std::vector<float> to_host(const ggml_tensor * t) {
    if (!t) {
        return {};
    }
    if (t->type != GGML_TYPE_F32) {
        qaflora_fail(qaflora_format("'%s' is %s, expected F32", t->name, ggml_type_name(t->type)));
    }
    std::vector<float> data(ggml_nelements(t));
    ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
    return data;
}

// task(i, ith) for each i, on n_threads threads numbered ith: a thread that is done takes the next
static void run_parallel(int n_threads, int32_t n_task, const std::function<void(int32_t, int)> & task) {
    n_threads = std::max(1, std::min<int>(n_threads, n_task));
    std::atomic<int32_t> next { 0 };
    const auto work = [&](int ith) {
        for (int32_t i = next++; i < n_task; i = next++) {
            task(i, ith);
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(n_threads);
    int ith = 1;
    try {
        for (; ith < n_threads; ++ith) {
            threads.emplace_back(work, ith);
        }
    } catch (const std::exception &) {
        // no more threads, or memory for them, to be had: those that there are do its share
    }
    work(0);
    for (auto & t : threads) {
        t.join();
    }
}

// final norm, on the host in float64
struct final_norm {
    std::vector<float> weight; // [n_embd] or empty
    std::vector<float> bias;   // [n_embd] or empty
    bool   is_rms = true;
    double eps    = 0.0;

    explicit final_norm(const llama_model & model) {
        weight = to_host(model.output_norm);
        bias   = to_host(model.output_norm_b);
        // llama.cpp 0c1e5709, llama-model.cpp: an architecture reads the epsilon of the norm that it uses
        is_rms = model.hparams.f_norm_rms_eps > 0.0f;
        eps    = is_rms ? model.hparams.f_norm_rms_eps : model.hparams.f_norm_eps;
    }

    void apply(const float * x, double * y, int64_t n) const {
        double mean = 0.0;
        double sq   = 0.0;
        for (int64_t i = 0; i < n && !is_rms; ++i) {
            mean += x[i];
        }
        mean /= n;
        for (int64_t i = 0; i < n; ++i) {
            sq += (x[i] - mean)*(x[i] - mean);
        }
        const double scale = 1.0/std::sqrt(sq/n + eps);
        for (int64_t i = 0; i < n; ++i) {
            y[i] = (x[i] - mean)*scale*(weight.empty() ? 1.0 : weight[i]) + (bias.empty() ? 0.0 : bias[i]);
        }
    }
};

// projection: logits of rows, on the device that holds the head
struct qaflora_lens_state {
    std::vector<float>   bias; // [n_vocab] of the head, or empty
    std::vector<uint8_t> meta;
    std::vector<float>   host; // logits [n_row, n_vocab] when the device's memory cannot be read in place
    const qaflora_kernels * kernels = nullptr; // that take the head as it is stored, or none
    std::vector<float>   parts;   // rows in two: rounded to 8 bits, and the rest
    std::vector<uint8_t> rounded; // these for the kernels
    std::vector<uint8_t> room;    // of each thread

    explicit qaflora_lens_state(const llama_model & model) : bias(to_host(model.output_b)), meta(16*ggml_tensor_overhead() + ggml_graph_overhead_custom(64, false)) {
        const ggml_tensor * w = model.output;
        if (w && qaflora_has_kernels() && qaflora_has_matmul(&qaflora_best_kernels(), w) && !model.output_s) {
            kernels = &qaflora_best_kernels();
        }
    }

    // rows that are multiplied for each
    int32_t n_part() const { return kernels ? 2 : 1; }

    static void set_n_threads(ggml_backend_t backend, int n_threads) {
        ggml_backend_dev_t dev = ggml_backend_get_device(backend);
        ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
        auto * fn = reg ? (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads") : nullptr;
        if (fn) {
            fn(backend, n_threads);
        }
    }

    // logits [n_row, n] of the tokens v0 to v0 + n; valid until the next call, or the next llama_decode: they may lie in the
    // memory that it computes in. The head's bias is part of every bias_step-th row, from the first: the others are differences.
    const float * project(llama_context & ctx, const float * rows, int32_t n_row, int64_t v0, int64_t n, int32_t bias_step) {
        float * logits = kernels ? product(ctx, rows, n_row, v0, n) : ggml_product(ctx, rows, n_row, v0, n);
        for (int32_t i = 0; i < n_row && !bias.empty(); i += bias_step) {
            std::transform(logits + i*n, logits + (i + 1)*n, bias.begin() + v0, logits + i*n, std::plus<>());
        }
        return logits;
    }

private:
    // The rest of a row is rounded to 8 bits in turn: what is lost is a 254th of what rounding once loses.
    float * product(const llama_context & ctx, const float * rows, int32_t n_row, int64_t v0, int64_t n) {
        const ggml_tensor * w = ctx.get_model().output;
        const int n_threads = ctx.n_threads_batch();
        const int64_t n_in  = w->ne[0];
        const size_t n_room = kernels->matmul_room_size(n_in);
        parts.resize(2*n_row*n_in);
        rounded.resize(kernels->matmul_rounded_size(2*n_row, n_in));
        room.resize(n_threads*n_room);
        host.resize(2*n_row*n);
        kernels->split({ 32, false }, rows, parts.data(), parts.data() + n_row*n_in, n_row*n_in);
        kernels->matmul_round(parts.data(), 2*n_row, n_in, rounded.data(), 0, 1);
        run_parallel(n_threads, (n + SHARE - 1)/SHARE, [&](int32_t i, int ith) {
            const int64_t begin = i*SHARE;
            const int64_t end   = std::min(n, begin + SHARE);
            kernels->matmul(qaflora_matrix_of(w), v0 + begin, v0 + end, rounded.data(), 2*n_row, host.data() + begin, n, room.data() + ith*n_room);
            for (int64_t row = 0; row < n_row; ++row) {
                float * y = host.data() + row*n;
                std::transform(y + begin, y + end, y + n_row*n + begin, y + begin, std::plus<>());
            }
        });
        return host.data();
    }

    float * ggml_product(llama_context & ctx, const float * rows, int32_t n_row, int64_t v0, int64_t n) {
        ctx.qaflora->n_lens++; // the last graph's memory is taken: it cannot be used again
        const llama_model & model = ctx.get_model();
        ggml_tensor * w = model.output;
        ggml_context_ptr gctx { ggml_init({ meta.size(), meta.data(), true }) };
        ggml_tensor * x = ggml_new_tensor_2d(gctx.get(), GGML_TYPE_F32, model.hparams.n_embd, n_row);
        ggml_set_input(x);
        if (n < w->ne[1]) {
            w = ggml_view_2d(gctx.get(), w, w->ne[0], n, w->nb[1], v0*w->nb[1]);
        }
        ggml_tensor * z = ggml_mul_mat(gctx.get(), w, x);
        ggml_prec_set_acc(z, GGML_PREC_F32);
        if (model.output_s) {
            z = ggml_mul(gctx.get(), z, model.output_s);
        }
        ggml_set_output(z);
        ggml_cgraph * gf = ggml_new_graph_custom(gctx.get(), 64, false);
        ggml_build_forward_expand(gf, z);

        ggml_backend_sched_t sched = ctx.get_sched();
        ggml_backend_sched_reset(sched);
        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            qaflora_fail("no memory for the lens");
        }
        for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
            set_n_threads(ggml_backend_sched_get_backend(sched, i), ctx.n_threads_batch());
        }
        ggml_backend_tensor_set(x, rows, 0, ggml_nbytes(x));
        if (ggml_backend_sched_graph_compute(sched, gf) != GGML_STATUS_SUCCESS) {
            qaflora_fail("the lens could not be computed");
        }
        float * logits = (float *) z->data;
        if (!ggml_backend_buffer_is_host(z->buffer)) {
            host.resize(ggml_nelements(z));
            ggml_backend_tensor_get(z, host.data(), 0, ggml_nbytes(z));
            logits = host.data();
        }
        return logits;
    }
};

static qaflora_lens_state & lens_of(llama_context * ctx) {
    if (!ctx || !ctx->qaflora) {
        qaflora_fail("this context was not made by qaflora_context_init");
    }
    if (!ctx->get_model().output) {
        qaflora_fail("the base has no head to project states with");
    }
    if (!ctx->qaflora->lens) {
        ctx->qaflora->lens = std::make_shared<qaflora_lens_state>(ctx->get_model());
    }
    ctx->synchronize();
    return *ctx->qaflora->lens;
}

// Tokens of the vocabulary that are projected at once, so that the logits of n_row rows stay small: all of them where the
// head is stored in an order of its own, as repacked buffers do, and rows cannot be told apart.
static int64_t tokens_at_once(const llama_model & model, int64_t n_row) {
    const ggml_tensor * w = model.output;
    if ((qaflora_is_on_cpu(w) && !ggml_backend_buffer_is_host(w->buffer)) || (model.output_s && ggml_nelements(model.output_s) > 1)) {
        return w->ne[1];
    }
    const int64_t n = LENS_LOGITS_BYTES/(n_row*sizeof(float))/SLICE_STEP*SLICE_STEP;
    return std::min(w->ne[1], std::max(n, SLICE_STEP));
}

double qaflora_divergence_sums::divergence(int64_t ia) const {
    const double first = adapters[ia].first/s;
    const double rest  = adapters[ia].rest/s;
    const double sum = first + rest;
    double res;
    if (adapters[ia].scaled != 0.0) {
        res = adapters[ia].scaled_max + std::log(adapters[ia].scaled/s) - first;
    } else if (sum > 1.0) {
        res = std::log1p(sum) - first; // rest has no digits left for what follows
    } else {
        // log1p(sum) - first: by its series where the two would cancel
        res = rest + (std::fabs(sum) < 1e-3 ? sum*sum*(-1.0/2 + sum*(1.0/3 + sum*(-1.0/4 + sum*(1.0/5 - sum/6)))) : std::log1p(sum) - sum);
    }
    return res < 0.0 ? 0.0 : res;
}

// rows [1 + n_adapter, n_embd] of one layer: what the head sees of the base, and how each adapter moves it, divided by
// units [1 + n_adapter]. A unit is a power of two, so that nothing is rounded, and leaves values below 1: kernels that
// take F16, or scales in F16 for blocks of 8 bits, have few digits left for values below 1e-4.
static void lens_rows(const final_norm & norm, bool is_normed, int32_t n_adapter, int32_t n_embd, size_t stride,
                      const float * base, const float * adapted, float * rows, double * units) {
    std::vector<double> x0(n_embd), x(n_embd);
    const auto see = [&](const float * state, std::vector<double> & y) {
        if (is_normed) {
            norm.apply(state, y.data(), n_embd);
        } else {
            std::copy(state, state + n_embd, y.begin());
        }
    };
    see(base, x0);
    std::copy(x0.begin(), x0.end(), rows);
    units[0] = 1.0;
    for (int32_t ia = 0; ia < n_adapter; ++ia) {
        see(adapted + ia*stride, x);
        double largest = 0.0;
        for (int32_t i = 0; i < n_embd; ++i) {
            x[i] -= x0[i];
            largest = std::max(largest, std::fabs(x[i]));
        }
        int exponent = 0;
        std::frexp(largest, &exponent);
        const double unit = std::ldexp(1.0, exponent);
        units[1 + ia] = unit;
        std::transform(x.begin(), x.end(), rows + (size_t) (1 + ia)*n_embd, [unit](double v) { return (float) (v/unit); });
    }
}

// the first layer in which some state of adapted [n_adapter, n_layer, n_embd] is not the base's
static int32_t first_moved(int32_t n_adapter, int32_t n_layer, int32_t n_embd, const float * base, const float * adapted) {
    int32_t res = n_layer;
    for (int32_t ia = 0; ia < n_adapter; ++ia) {
        const float * own = adapted + (size_t) ia*n_layer*n_embd;
        res = std::min<int32_t>(res, (std::mismatch(own, own + (size_t) n_layer*n_embd, base).first - own)/n_embd);
    }
    return res;
}

[[noreturn]] static void fail_unmeasured(int32_t ia, int32_t il) {
    qaflora_fail(qaflora_format("adapter %d moves the state after block %d by more than can be measured, "
        "or one of the two is not finite; leave it out, or convert it again", ia, il));
}

// rounding to 8 bits makes numbers of what is none
static void check_finite(int32_t n_adapter, int32_t n_layer, int32_t n_embd, const float * base, const float * adapted) {
    const auto is_finite = [&](const float * state) {
        return std::all_of(state, state + n_embd, [](float x) { return std::isfinite(x); });
    };
    for (int32_t i = 0; i < n_adapter*n_layer; ++i) {
        if (!is_finite(base + (size_t) (i % n_layer)*n_embd) || !is_finite(adapted + (size_t) i*n_embd)) {
            fail_unmeasured(i/n_layer, i % n_layer);
        }
    }
}

int32_t qaflora_divergence(llama_context * ctx, enum qaflora_lens lens, int32_t n_adapter, const float * base, const float * adapted, double * div) {
    return qaflora_guarded([&] {
        qaflora_lens_state & state = lens_of(ctx);
        qaflora_context & qf = *ctx->qaflora;
        check_finite(n_adapter, qf.n_layer, qf.n_embd, base, adapted);
        const final_norm norm(ctx->get_model());
        const qaflora_kernels & kernels = qaflora_best_kernels();
        const int     n_threads = ctx->n_threads_batch();
        const int64_t n_vocab   = ctx->get_model().output->ne[1];
        const int32_t n_row     = 1 + n_adapter;
        const int32_t n_chunk   = std::min(qf.n_layer, std::max(1, LENS_ROWS/n_row)); // layers
        const int64_t n_slice   = tokens_at_once(ctx->get_model(), (int64_t) n_chunk*n_row*state.n_part());
        const size_t  stride    = (size_t) qf.n_layer*qf.n_embd;

        std::vector<float>  rows((size_t) n_chunk*n_row*qf.n_embd);
        std::vector<double> units((size_t) n_chunk*n_row);
        std::vector<double> probs((size_t) std::min<int>(n_chunk, n_threads)*n_slice); // of each thread
        std::fill_n(div, (size_t) n_adapter*qf.n_layer, 0.0);
        for (int32_t il0 = first_moved(n_adapter, qf.n_layer, qf.n_embd, base, adapted); il0 < qf.n_layer; il0 += n_chunk) {
            const int32_t n = std::min(n_chunk, qf.n_layer - il0);
            std::vector<qaflora_divergence_sums::adapter> adapters((size_t) n*n_adapter);
            std::vector<qaflora_divergence_sums> sums(n);
            for (int32_t i = 0; i < n; ++i) {
                const int32_t il = il0 + i;
                const bool is_normed = lens == QAFLORA_LENS_NORM || il == qf.n_layer - 1;
                lens_rows(norm, is_normed, n_adapter, qf.n_embd, stride, base + (size_t) il*qf.n_embd, adapted + (size_t) il*qf.n_embd,
                          rows.data() + (size_t) i*n_row*qf.n_embd, units.data() + (size_t) i*n_row);
                sums[i].adapters = adapters.data() + (size_t) i*n_adapter;
                for (int32_t ia = 0; ia < n_adapter; ++ia) {
                    sums[i].adapters[ia].unit = units[(size_t) i*n_row + 1 + ia];
                }
            }
            for (int64_t v0 = 0; v0 < n_vocab; v0 += n_slice) {
                const int64_t n_token = std::min(n_slice, n_vocab - v0);
                const int64_t t_start = ggml_time_us();
                const float * logits = state.project(*ctx, rows.data(), n*n_row, v0, n_token, n_row);
                const int64_t t_projected = ggml_time_us();
                run_parallel(n_threads, n, [&](int32_t i, int ith) {
                    const float * z = logits + (size_t) i*n_row*n_token;
                    kernels.accumulate(sums[i], n_adapter, z, z + n_token, n_token, n_token, probs.data() + (size_t) ith*n_slice);
                });
                qf.stats.lens_us       += t_projected - t_start;
                qf.stats.divergence_us += ggml_time_us() - t_projected;
            }
            for (int32_t i = 0; i < n; ++i) {
                for (int32_t ia = 0; ia < n_adapter; ++ia) {
                    const double divergence = sums[i].divergence(ia);
                    if (!std::isfinite(divergence)) {
                        fail_unmeasured(ia, il0 + i);
                    }
                    div[(size_t) ia*qf.n_layer + il0 + i] = divergence;
                }
            }
        }
        return 1;
    });
}

int32_t qaflora_project(llama_context * ctx, int32_t n_row, const float * rows, float * logits) {
    return qaflora_guarded([&] {
        qaflora_lens_state & state = lens_of(ctx);
        const int64_t n_vocab = ctx->get_model().output->ne[1];
        const int32_t n_chunk = (int32_t) std::max<size_t>(1, LENS_LOGITS_BYTES/(n_vocab*sizeof(float)*state.n_part()));
        for (int32_t i = 0; i < n_row; i += n_chunk) {
            const int32_t n = std::min(n_chunk, n_row - i);
            const float * z = state.project(*ctx, rows + (size_t) i*ctx->qaflora->n_embd, n, 0, n_vocab, 1);
            std::copy(z, z + n*n_vocab, logits + i*n_vocab);
        }
        return 1;
    });
}
