// The kernels of qaflora-cpu.h for one instruction set. Included once by each file that is compiled
// for one; QAFLORA_ISA names the namespace, so that no two of them share a symbol. For the same
// reason nothing in these files may use a template or inline function from elsewhere.

#pragma once

#include "qaflora-cpu-accumulate.h"
#include "qaflora-cpu-delta.h"
#include "qaflora-cpu-difference.h"
#include "qaflora-cpu-matmul.h"
#include "qaflora-cpu-product.h"

namespace QAFLORA_ISA {

static const qaflora_kernels kernels = {
    QAFLORA_ISA_NAME, rank_product, add_delta, subtract_base, rounding_power, split, add_rows,
    matmul_rounded_size, matmul_room_size, matmul_round, matmul, accumulate
};

} // namespace QAFLORA_ISA
