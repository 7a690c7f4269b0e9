// Why a call failed: a sentence for qaflora_last_error(), and an exception on the way there.

#pragma once

#include <string>

// sets qaflora_last_error()
void qaflora_set_error(const std::string & message);

// format like printf into a std::string
std::string qaflora_format(const char * fmt, ...);

// throws std::runtime_error
[[noreturn]] void qaflora_fail(const std::string & message);
