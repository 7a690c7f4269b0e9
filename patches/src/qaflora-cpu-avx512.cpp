// Compiled for AVX-512 (see CMakeLists.txt); empty on other processors.

#include "qaflora-cpu.h"

#if defined(__AVX512F__)
#define QAFLORA_ISA      qaflora_avx512
#define QAFLORA_ISA_NAME "avx512"
#include "qaflora-cpu-isa.h"

const qaflora_kernels * qaflora_kernels_avx512() { return &qaflora_avx512::kernels; }
#else
const qaflora_kernels * qaflora_kernels_avx512() { return nullptr; }
#endif
