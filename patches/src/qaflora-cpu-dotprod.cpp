// Compiled for NEON with products of four bytes (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA dotprod
#if !defined(__ARM_FEATURE_DOTPROD)
#define QAFLORA_ISA_IS_EMPTY
#endif
#include "qaflora-cpu-isa.h"
