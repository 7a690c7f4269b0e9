// Compiled for NEON with products of four bytes (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA dotprod
#define QAFLORA_ISA_NEEDS __ARM_FEATURE_DOTPROD
#include "qaflora-cpu-isa.h"
