// Compiled for AVX-VNNI: 256 bits, on processors without AVX-512 (see CMakeLists.txt); empty elsewhere.

#if defined(_MSC_VER) && defined(__AVX2__) && !defined(__AVXVNNI__)
#define __AVXVNNI__ 1 // it has no such switch, and compiles every intrinsic
#endif
#define QAFLORA_ISA avxvnni
#define QAFLORA_ISA_NEEDS __AVXVNNI__
#include "qaflora-cpu-isa.h"
