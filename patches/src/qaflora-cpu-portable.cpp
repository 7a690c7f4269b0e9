// Compiled for what every processor of this kind has: NEON, or plain C++.

#define QAFLORA_ISA portable
#if defined(__ARM_NEON) && defined(__aarch64__)
#define QAFLORA_ISA_NAME "neon"
#endif
#include "qaflora-cpu-isa.h"
