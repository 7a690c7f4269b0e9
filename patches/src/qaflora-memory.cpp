#include "qaflora-memory.h"

#include "ggml.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <new>

static std::atomic<uint64_t> g_n_failed { 0 };

void qaflora_note_failed_op(void) {
    g_n_failed++;
}

uint64_t qaflora_n_failed_op(void) {
    return g_n_failed;
}

static void on_abort(const char * message) {
    for (const char * asserted : { "(ctx->mem_buffer != NULL)", "(galloc != NULL)", "(galloc->" }) {
        if (strstr(message, asserted)) {
            throw std::bad_alloc();
        }
    }
    fprintf(stderr, "%s\n", message);
}

void qaflora_ask_for_exceptions(void) {
    const ggml_abort_callback_t before = ggml_set_abort_callback(on_abort);
    if (before && before != on_abort) {
        ggml_set_abort_callback(before); // of the program that we are part of
    }
}
