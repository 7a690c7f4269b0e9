// What decides a graph's topology beside llm_graph_params.

#pragma once

#include "qaflora-context.h"

// bits of the graph key
enum {
    GRAPH_DIFFERENTIAL     = 1, // rows of all tokens form [.., n_seq] with the base first
    GRAPH_DIFFERENTIAL_OUT = 2, // so do the output rows
    GRAPH_INPUTS           = 4, // inputs are captured
    GRAPH_STATES           = 8, // states are captured
    GRAPH_KEY_BITS         = 4, // above them: how often the lens was used, and layers changed from which on adapters are computed
};
