// Compiled for AVX2 (see CMakeLists.txt); empty on other processors.

#include "qaflora-cpu.h"

#if defined(__AVX2__)
#define QAFLORA_ISA      qaflora_avx2
#define QAFLORA_ISA_NAME "avx2"
#include "qaflora-cpu-isa.h"

const qaflora_kernels * qaflora_kernels_avx2() { return &qaflora_avx2::kernels; }
#else
const qaflora_kernels * qaflora_kernels_avx2() { return nullptr; }
#endif
