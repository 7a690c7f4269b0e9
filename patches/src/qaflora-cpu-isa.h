// The kernels of qaflora-cpu.h for one instruction set. Included once by each file that is compiled
// for one; QAFLORA_ISA names it and the namespace, so that no two of them share a symbol. For the same
// reason nothing in these files may use a template or inline function from elsewhere.

#pragma once

#include "qaflora-cpu.h"

#define QAFLORA_KERNELS_OF_(isa) qaflora_kernels_##isa
#define QAFLORA_KERNELS_OF(isa)  QAFLORA_KERNELS_OF_(isa)
#define QAFLORA_TEXT_(isa) #isa
#define QAFLORA_TEXT(isa)  QAFLORA_TEXT_(isa)
#if !defined(QAFLORA_ISA_NAME)
#define QAFLORA_ISA_NAME QAFLORA_TEXT(QAFLORA_ISA)
#endif

#if defined(QAFLORA_ISA_NEEDS) && !QAFLORA_ISA_NEEDS // what a compiler defines as 1, if it has that set
const qaflora_kernels * QAFLORA_KERNELS_OF(QAFLORA_ISA)() { return nullptr; }
#else

#include "qaflora-cpu-accumulate.h"
#include "qaflora-cpu-attend.h"
#include "qaflora-cpu-delta.h"
#include "qaflora-cpu-matmul.h"
#include "qaflora-cpu-product.h"

const qaflora_kernels * QAFLORA_KERNELS_OF(QAFLORA_ISA)() {
    using namespace QAFLORA_ISA;
    static const qaflora_kernels kernels = {
        QAFLORA_ISA_NAME, rank_product, add_delta, subtract_base, rounding_power, split, add_rows,
        matmul_rounded_size, matmul_room_size, matmul_round, matmul, attend_room_size, attend, accumulate
    };
    return &kernels;
}

#endif
