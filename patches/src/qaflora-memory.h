// Where memory is missing: an exception, or a batch that fails, and not the end of the process.

#pragma once

#include <cstdint>
#include <exception>

// llama.cpp 0c1e5709: ggml.c and ggml-alloc.c assert that memory was to be had. From here on they throw std::bad_alloc, which
// llama.cpp catches or lets pass. CMakeLists.txt compiles them so that it may.
void qaflora_ask_for_exceptions(void);

// operations of a graph run on threads that no exception may leave: they are counted, and the batch fails
void     qaflora_note_failed_op(void);
uint64_t qaflora_n_failed_op   (void);

template <typename F> void qaflora_compute(F op) {
    try {
        op();
    } catch (const std::exception &) {
        qaflora_note_failed_op();
    }
}
