// Compiled for AVX2 (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA avx2
#if !defined(__AVX2__)
#define QAFLORA_ISA_IS_EMPTY
#endif
#include "qaflora-cpu-isa.h"
