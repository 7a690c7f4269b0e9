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

// Whether rows are few for their slots, as when sequences are decoded: tiles then take rows of any slot.
static bool is_mixed(const qaflora_cpu_rows & rows) {
    int64_t n_run = 1;
    for (int64_t row = 1; rows.slot && row < rows.n_row; ++row) {
        n_run += rows.slot[row] != rows.slot[row - 1];
    }
    return rows.n_row > 1 && rows.n_row <= QAFLORA_FEW*n_run;
}

enum { ROWS_AT_ONCE = 64 }; // of any slots

// those of n rows from row on for which the segment has a weight; returns how many
static int64_t weighed_rows(const qaflora_cpu_rows & rows, const qaflora_cpu_segment & s, int64_t row, int64_t n, int64_t * weighed) {
    int64_t res = 0;
    for (int64_t i = row; i < row + n; ++i) {
        if (weight_of(rows, i, s) != 0.0f) {
            weighed[res++] = i;
        }
    }
    return res;
}

} // namespace QAFLORA_ISA
