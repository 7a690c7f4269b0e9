#include "qaflora-graph-key.h"

#include "llama-batch.h"

uint64_t qaflora_graph_key(const qaflora_context & qf, const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint64_t key = ((qf.n_lens + (qf.is_differential() ? qf.n_first_layer : 0)) << GRAPH_KEY_BITS) // neither count ever falls
        | (qf.has_inputs() ? GRAPH_INPUTS : 0) | (qf.has_states() ? GRAPH_STATES : 0);
    // that sequences are rows of equal length, the base first, was seen by qaflora_accepts_ubatch()
    if (!qf.is_differential() || ubatch.n_seqs_unq < 2) {
        return key;
    }
    const bool has_outputs = n_outputs > 0 && n_outputs % ubatch.n_seqs_unq == 0; // at a reservation, of some sequences only
    return key | GRAPH_DIFFERENTIAL | (has_outputs ? GRAPH_DIFFERENTIAL_OUT : 0);
}
