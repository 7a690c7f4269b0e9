// Which tensors the adapters of a pack are stacked in.

#pragma once

#include "qaflora-adapter.h"
#include "qaflora-pack.h"

#include <map>

struct qaflora_plan {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_of; // the tensors to be allocated there

    // tensors of the CPU's segments until they have addresses
    struct cpu_pair { int32_t module; size_t segment; ggml_tensor * a; ggml_tensor * b; };
    std::vector<cpu_pair> cpu_pairs;
};

// Adds layouts, modules and groups to the pack; the files must have been checked.
qaflora_plan qaflora_make_plan(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files);
