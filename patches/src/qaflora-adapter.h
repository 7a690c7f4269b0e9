// One adapter file: what it says, checked against the base.
// shapes: ggml order, ne[0] first

#pragma once

#include "ggml-cpp.h"
#include "llama-mmap.h"

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_model;

struct qaflora_adapter_pair {
    const ggml_tensor * a = nullptr;
    const ggml_tensor * b = nullptr;
};

struct qaflora_adapter_file {
    std::string path;
    float       alpha = 0.0f;

    ggml_context_ptr            meta;
    gguf_context_ptr            gguf;
    std::unique_ptr<llama_file> file;
    std::map<std::string, qaflora_adapter_pair> pairs; // by the base's tensor name
    std::unordered_map<const ggml_tensor *, size_t> offsets; // in the file

    // the bytes of one of its tensors
    std::vector<uint8_t> read(const ggml_tensor * t) const;
};

// Reads the header; throws std::runtime_error naming the file if it is no plain LoRA for an architecture like the model's.
qaflora_adapter_file qaflora_open_adapter(const llama_model & model, const char * path);

// throws std::runtime_error naming the file and the tensor that does not fit the base
void qaflora_check_adapter(const qaflora_adapter_file & f, const llama_model & model, int32_t n_layer);
