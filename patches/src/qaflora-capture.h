// States that a probe keeps while a graph is computed.
// shapes: ggml order, ne[0] first

#pragma once

#include "qaflora-graph-input.h"

// keeps cur if w is a query projection
void qaflora_capture_input(const llm_graph_context & gctx, qaflora_graph_input & inp, const ggml_tensor * w, ggml_tensor * cur);

// Memory that nobody writes or reads, in the shape of one row of logits: architectures add biases of the head to it, or write into it.
ggml_tensor * qaflora_no_logits(const llm_graph_context & gctx, const ggml_tensor * head);
