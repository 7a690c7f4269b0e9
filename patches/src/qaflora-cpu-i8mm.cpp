// Compiled for NEON with products of matrices of bytes (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA i8mm
#define QAFLORA_ISA_NEEDS __ARM_FEATURE_MATMUL_INT8
#include "qaflora-cpu-isa.h"
