#include "qaflora-error.h"

#include "qaflora.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

static thread_local std::string g_error;

void qaflora_set_error(const std::string & message) {
    g_error = message;
}

const char * qaflora_last_error(void) {
    return g_error.c_str();
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
