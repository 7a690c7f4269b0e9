// Differential products: y_0 = W x_0 and y_j = y_0 + W (x_j - x_0), so that the rounding of activations is common to both.

#pragma once

#include "qaflora-graph-input.h"

// whether the product with cur is taken differentially
bool qaflora_is_differential(const qaflora_graph_input & inp, const ggml_tensor * cur);

// Sequences, from the base on, whose products with w are computed: the others have no adapter up to its layer, so that
// x_j = x_0 there and y_j = y_0. Prober has those come last.
int64_t qaflora_n_active(const qaflora_graph_input & inp, const ggml_tensor * w);
