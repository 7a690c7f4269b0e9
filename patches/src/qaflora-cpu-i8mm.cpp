// Compiled for NEON with products of matrices of bytes (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA i8mm
#if !defined(__ARM_FEATURE_MATMUL_INT8)
#define QAFLORA_ISA_IS_EMPTY
#endif
#include "qaflora-cpu-isa.h"
