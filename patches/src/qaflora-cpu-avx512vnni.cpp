// Compiled for AVX-512 with VNNI (see CMakeLists.txt); empty on other processors.

#include "qaflora-cpu.h"

#if defined(_MSC_VER) && defined(__AVX512F__) && !defined(__AVX512VNNI__)
#define __AVX512VNNI__ 1 // it has no such switch, and compiles every intrinsic
#endif

#if defined(__AVX512VNNI__)
#define QAFLORA_ISA      qaflora_avx512vnni
#define QAFLORA_ISA_NAME "avx512vnni"
#include "qaflora-cpu-isa.h"

const qaflora_kernels * qaflora_kernels_avx512vnni() { return &qaflora_avx512vnni::kernels; }
#else
const qaflora_kernels * qaflora_kernels_avx512vnni() { return nullptr; }
#endif
