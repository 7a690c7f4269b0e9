// Compiled for AVX-512 (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA avx512
#define QAFLORA_ISA_NEEDS __AVX512F__
#include "qaflora-cpu-isa.h"
