// Compiled for AVX-VNNI: 256 bits, on processors without AVX-512 (see CMakeLists.txt); empty on others.

#include "qaflora-cpu.h"

#if defined(_MSC_VER) && defined(__AVX2__) && !defined(__AVXVNNI__)
#define __AVXVNNI__ 1 // it has no such switch, and compiles every intrinsic
#endif

#if defined(__AVXVNNI__)
#define QAFLORA_ISA      qaflora_avxvnni
#define QAFLORA_ISA_NAME "avxvnni"
#include "qaflora-cpu-isa.h"

const qaflora_kernels * qaflora_kernels_avxvnni() { return &qaflora_avxvnni::kernels; }
#else
const qaflora_kernels * qaflora_kernels_avxvnni() { return nullptr; }
#endif
