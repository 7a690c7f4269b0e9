// Choosing the CPU's kernels.

#include "qaflora-cpu.h"

#include "qaflora-error.h"

#include <cstdlib>
#include <string>

#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <intrin.h>
#elif defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

static bool cpu_has_avx2() {
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    return IsProcessorFeaturePresent(40 /* PF_AVX2_INSTRUCTIONS_AVAILABLE */);
#elif defined(__x86_64__) || defined(__i386__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

static bool cpu_has_avx512() {
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    return IsProcessorFeaturePresent(41 /* PF_AVX512F_INSTRUCTIONS_AVAILABLE */);
#elif defined(__x86_64__) || defined(__i386__)
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

static bool cpu_has_avx512vnni() {
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    int leaf_7[4]; // eax, ebx, ecx, edx
    __cpuidex(leaf_7, 7, 0);
    return cpu_has_avx512() && (leaf_7[2] >> 11 & 1);
#elif defined(__x86_64__) || defined(__i386__)
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// 256 bits, as processors without AVX-512 have them
static bool cpu_has_avxvnni() {
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    int leaf_7[4]; // eax, ebx, ecx, edx
    __cpuidex(leaf_7, 7, 1);
    return cpu_has_avx2() && (leaf_7[0] >> 4 & 1);
#elif defined(__x86_64__) || defined(__i386__)
    unsigned eax = 0; // not all compilers' __builtin_cpu_supports() know it
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return cpu_has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
#else
    return false;
#endif
}

static std::string asked_for() {
    const char * name = getenv("QAFLORA_CPU_KERNELS");
    return name ? name : "";
}

static const qaflora_kernels & choose(const std::string & name) {
    const qaflora_kernels * found[] = {
        cpu_has_avx512vnni() ? qaflora_kernels_avx512vnni() : nullptr,
        cpu_has_avxvnni()    ? qaflora_kernels_avxvnni()    : nullptr,
        cpu_has_avx512()     ? qaflora_kernels_avx512()     : nullptr,
        cpu_has_avx2()       ? qaflora_kernels_avx2()       : nullptr,
        qaflora_kernels_portable(),
    };
    std::string names = "ggml";
    for (const auto * kernels : found) {
        if (kernels && (name.empty() || name == "ggml" || name == kernels->name)) {
            return *kernels;
        }
        names += kernels ? std::string(", ") + kernels->name : "";
    }
    qaflora_fail(qaflora_format("QAFLORA_CPU_KERNELS is '%s', expected one of %s; unset it for the fastest", name.c_str(), names.c_str()));
}

const qaflora_kernels & qaflora_best_kernels() {
    return choose(asked_for());
}

bool qaflora_has_kernels() {
    return asked_for() != "ggml";
}
