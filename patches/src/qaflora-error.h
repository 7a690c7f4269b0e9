// Why a call failed: a sentence for qaflora_last_error(), and an exception on the way there.

#pragma once

#include <exception>
#include <string>

// sets qaflora_last_error(), without asking for memory
void qaflora_set_error(const char * message);

// sets it to what an exception says
void qaflora_explain(const std::exception & err);

// format like printf into a std::string
std::string qaflora_format(const char * fmt, ...);

// throws std::runtime_error
[[noreturn]] void qaflora_fail(const std::string & message);

// what a call returns; where it throws nothing, and qaflora_last_error() says why
template <typename F> auto qaflora_guarded(F call) -> decltype(call()) {
    try {
        return call();
    } catch (const std::exception & err) {
        qaflora_explain(err);
        return {};
    }
}
