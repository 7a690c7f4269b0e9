#include "qaflora-error.h"

#include "qaflora.h"

#include <cstdarg>
#include <cstdio>
#include <new>
#include <stdexcept>

// room for a sentence: setting it must not ask for memory
static thread_local char g_error[1024] = "";

void qaflora_set_error(const char * message) {
    snprintf(g_error, sizeof(g_error), "%s", message);
}

const char * qaflora_last_error(void) {
    return g_error;
}

std::string qaflora_format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    char buf[1024];
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    return buf;
}

void qaflora_fail(const std::string & message) {
    throw std::runtime_error(message);
}

void qaflora_explain(const std::exception & err) {
    const bool is_memory = dynamic_cast<const std::bad_alloc *>(&err);
    qaflora_set_error(is_memory ? "there is not enough memory; close other programs, or take a smaller context, fewer adapters or a smaller base"
                                : err.what());
}
