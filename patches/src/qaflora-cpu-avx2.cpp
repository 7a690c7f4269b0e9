// Compiled for AVX2 (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA avx2
#define QAFLORA_ISA_NEEDS __AVX2__
#include "qaflora-cpu-isa.h"
