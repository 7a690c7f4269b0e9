// Adapters of one model, stacked along the rank axis.
// shapes: ggml order, ne[0] first

#pragma once

#include "qaflora.h"
#include "qaflora-base.h"
#include "qaflora-cpu-ops.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

// one adapter's share of a stacked rank axis
struct qaflora_segment {
    int32_t ia; // -1: a gap of rows that weigh 0
    int64_t rank;
    float   scale; // alpha/rank

    bool operator==(const qaflora_segment & other) const {
        return ia == other.ia && rank == other.rank && scale == other.scale;
    }
};

// how a rank axis is divided; many modules share one
struct qaflora_layout {
    std::vector<qaflora_segment> segments;
    int64_t rank = 0; // sum over segments, and rows of zeros up to what the modules' B expect
};

// one adapted matrix of the base
struct qaflora_module {
    std::string   name;
    ggml_tensor * w = nullptr;
    int32_t       il = 0;      // the layer whose weights it follows
    std::vector<int32_t> adapters; // that have it
    int32_t       group  = -1;
    int64_t       n_expert = 0; // 0: a plain matrix. Stacked experts have A and B of three dimensions, the expert last
    qaflora_cpu_module cpu;    // on the CPU the following is empty

    int64_t n_matrix() const { return std::max<int64_t>(1, n_expert); } // that it is a stack of

    int32_t       layout = -1;
    int64_t       offset = 0;  // of its rows in the group's A
    ggml_tensor * a = nullptr; // [n_in, rank], rows of the group's A; of the embedding [rank, n_vocab]
    ggml_tensor * b = nullptr; // [rank, n_out]; the columns beyond the segments are zeros
};

// modules that read the same input, so that one product serves all their A
struct qaflora_group {
    qaflora_cpu_module cpu;    // on the CPU the following is empty

    int32_t       layout = -1;
    ggml_tensor * a = nullptr; // [n_in, rank]: the segments of all modules, then rows of zeros
};

struct qaflora_pack {
    llama_model * model = nullptr;
    int32_t n_adapter = 0;
    int32_t n_layer   = 0;
    ggml_type type    = GGML_TYPE_COUNT; // that A and B are converted to; COUNT: none
    const qaflora_kernels * kernels = nullptr; // null: ggml's operations on the CPU as well
    qaflora_cpu_difference plain;    // for products that are not split
    qaflora_cpu_difference rounded_32;  // for weights whose products round in blocks of 32
    qaflora_cpu_difference rounded_256; // and of 256
    qaflora_cpu_difference rounded_own; // for weights that our own product takes

    std::vector<qaflora_layout> layouts;
    std::vector<qaflora_group>  groups;
    std::vector<qaflora_module> modules;
    std::unordered_map<const ggml_tensor *, int32_t> by_weight; // index in modules, the embedding apart
    int32_t embd = -1;                                          // index in modules, or -1

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;

    // the first layer in which a module has an adapter that is_used(adapter, layer), or n_layer
    template <typename F> int32_t first_layer(F is_used) const {
        int32_t res = n_layer;
        for (const auto & m : modules) {
            if (std::any_of(m.adapters.begin(), m.adapters.end(), [&](int32_t ia) { return is_used(ia, m.il); })) {
                res = std::min(res, m.il);
            }
        }
        return res;
    }

    // whether products with w are those of our kernels
    bool has_kernels(const ggml_tensor * w) const {
        return kernels && qaflora_is_on_cpu(w);
    }

    // whether a device other than the host's holds some of the adapters
    bool is_offloaded() const {
        return std::any_of(bufs.begin(), bufs.end(), [](const auto & buf) { return !ggml_backend_buffer_is_host(buf.get()); });
    }
};
