// Choosing the CPU's kernels.

#include "qaflora-cpu.h"

#include "qaflora-error.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <intrin.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

// what this processor and its system have
struct cpu_features {
    bool avx2       = false; // with FMA and F16C
    bool avx512     = false; // F, DQ, BW and VL
    bool avx512vnni = false;
    bool avxvnni    = false; // 256 bits, as processors without AVX-512 have them
    bool dotprod    = false;
    bool i8mm       = false;
};

#if defined(__APPLE__) && defined(__aarch64__)
static bool apple_has(const char * name) {
    int32_t has = 0;
    size_t size = sizeof(has);
    return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has;
}
#endif

static cpu_features find_features() {
    cpu_features has;
#if defined(__x86_64__) || defined(__i386__)
    unsigned leaf[4] = {}; // 7, 1: not all compilers' __builtin_cpu_supports() know AVX-VNNI
    has.avx2       = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    has.avx512     = has.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    has.avx512vnni = has.avx512 && __builtin_cpu_supports("avx512vnni");
    has.avxvnni    = has.avx2 && __get_cpuid_count(7, 1, leaf, leaf + 1, leaf + 2, leaf + 3) && (leaf[0] >> 4 & 1);
#elif defined(_M_X64) || defined(_M_IX86)
    int leaf[2][4]; // 7, 0 and 7, 1: eax, ebx, ecx, edx
    __cpuidex(leaf[0], 7, 0);
    __cpuidex(leaf[1], 7, 1);
    has.avx2       = IsProcessorFeaturePresent(40 /* PF_AVX2_INSTRUCTIONS_AVAILABLE */);
    has.avx512     = IsProcessorFeaturePresent(41 /* PF_AVX512F_INSTRUCTIONS_AVAILABLE */);
    has.avx512vnni = has.avx512 && (leaf[0][2] >> 11 & 1);
    has.avxvnni    = has.avx2 && (leaf[1][0] >> 4 & 1);
#elif defined(__APPLE__) && defined(__aarch64__)
    has.dotprod = apple_has("hw.optional.arm.FEAT_DotProd");
    has.i8mm    = has.dotprod && apple_has("hw.optional.arm.FEAT_I8MM");
#elif defined(__linux__) && defined(__aarch64__)
    has.dotprod = getauxval(AT_HWCAP) >> 20 & 1;                 // HWCAP_ASIMDDP
    has.i8mm    = has.dotprod && (getauxval(AT_HWCAP2) >> 13 & 1); // HWCAP2_I8MM
#elif defined(_WIN32)
    has.dotprod = IsProcessorFeaturePresent(43 /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */);
#endif
    return has;
}

static std::string asked_for() {
    const char * name = getenv("QAFLORA_CPU_KERNELS");
    return name ? name : "";
}

static const qaflora_kernels & choose(const std::string & name) {
    static const cpu_features has = find_features();
    const qaflora_kernels * found[] = {
        has.avx512vnni ? qaflora_kernels_avx512vnni() : nullptr,
        has.avxvnni    ? qaflora_kernels_avxvnni()    : nullptr,
        has.avx512     ? qaflora_kernels_avx512()     : nullptr,
        has.avx2       ? qaflora_kernels_avx2()       : nullptr,
        has.i8mm       ? qaflora_kernels_i8mm()       : nullptr,
        has.dotprod    ? qaflora_kernels_dotprod()    : nullptr,
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
