// Which rows weigh alike.

#pragma once

#include "qaflora-cpu.h"

namespace QAFLORA_ISA {

static float weight_of(const qaflora_cpu_rows & rows, int64_t row, const qaflora_cpu_segment & s) {
    return s.scale*rows.weights[(rows.slot ? rows.slot[row] : 0)*rows.n_adapter + s.ia];
}

// how many rows from row on are of its slot, at most n
static int64_t run_length(const qaflora_cpu_rows & rows, int64_t row, int64_t n) {
    int64_t res = 1;
    while (res < n && (!rows.slot || rows.slot[row + res] == rows.slot[row])) {
        ++res;
    }
    return res;
}

} // namespace QAFLORA_ISA
