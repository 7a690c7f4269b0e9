// Compiled for AVX-512 (see CMakeLists.txt); empty elsewhere.

#define QAFLORA_ISA avx512
#if !defined(__AVX512F__)
#define QAFLORA_ISA_IS_EMPTY
#endif
#include "qaflora-cpu-isa.h"
