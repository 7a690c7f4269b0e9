// The base's side of an adapter: which tensor a name means, which layer it belongs to, where it is computed.

#pragma once

#include "qaflora-cpu-ops.h"

#include "ggml-backend.h"

#include <cstdint>
#include <string>

struct llama_model;

// null: the base has no tensor of this name
ggml_tensor * qaflora_base_tensor(const llama_model & model, const std::string & name);

// whether the base's tensor of this name holds a layer's experts, which are multiplied by the router's choice
bool qaflora_is_experts(const std::string & name);

// the layer whose weights apply, or -1
int32_t qaflora_layer_of(const std::string & name, int32_t n_layer);

// modules that read the same activations: q, k and v; gate and up. 0: reads its own
int qaflora_input_kind(const std::string & name);

// where the adapters of w live: beside w, but never in a buffer that repacks its tensors; a device's pinned host memory is the host's
ggml_backend_buffer_type_t qaflora_adapter_buft(const ggml_tensor * w);

// whether w is computed on the CPU
bool qaflora_is_on_cpu(const ggml_tensor * w);

// whether kernels multiply w as it is stored: llama.cpp stores some matrices in an order of its own
bool qaflora_has_matmul(const qaflora_kernels * kernels, const ggml_tensor * w);
