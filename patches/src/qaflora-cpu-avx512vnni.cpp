// Compiled for AVX-512 with VNNI (see CMakeLists.txt); empty elsewhere.

#if defined(_MSC_VER) && defined(__AVX512F__) && !defined(__AVX512VNNI__)
#define __AVX512VNNI__ 1 // it has no such switch, and compiles every intrinsic
#endif
#define QAFLORA_ISA avx512vnni
#define QAFLORA_ISA_NEEDS __AVX512VNNI__
#include "qaflora-cpu-isa.h"
