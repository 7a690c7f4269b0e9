// Compiled for what every processor of this kind has: NEON, or plain C++.

#include "qaflora-cpu.h"

#define QAFLORA_ISA qaflora_portable
#if defined(__ARM_NEON) && defined(__aarch64__)
#define QAFLORA_ISA_NAME "neon"
#else
#define QAFLORA_ISA_NAME "portable"
#endif
#include "qaflora-cpu-isa.h"

const qaflora_kernels * qaflora_kernels_portable() { return &qaflora_portable::kernels; }
