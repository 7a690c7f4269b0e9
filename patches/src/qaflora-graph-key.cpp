#include "qaflora-graph-key.h"

#include "llama-batch.h"

// whether output rows are spread evenly over the sequences, in the order of the sequences
static bool is_balanced(const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint32_t n_seq = ubatch.n_seqs_unq;
    if (n_outputs == 0 || n_outputs % n_seq != 0) {
        return false;
    }
    for (uint32_t s = 0; s < n_seq; ++s) {
        uint32_t n = 0;
        for (uint32_t t = 0; t < ubatch.n_seq_tokens; ++t) {
            n += ubatch.output[s*ubatch.n_seq_tokens + t] != 0;
        }
        if (n != n_outputs/n_seq) {
            return false;
        }
    }
    return true;
}

uint64_t qaflora_graph_key(const qaflora_context & qf, const llama_ubatch & ubatch, uint32_t n_outputs) {
    const uint64_t key = qf.n_lens << GRAPH_KEY_BITS;
    if (!qf.is_differential() || !ubatch.equal_seqs() || ubatch.n_seqs_unq < 2 ||
        ubatch.n_seqs_unq*ubatch.n_seq_tokens != ubatch.n_tokens || ubatch.seq_id_unq[0] != 0) {
        return key;
    }
    return key | GRAPH_DIFFERENTIAL | (is_balanced(ubatch, n_outputs) ? GRAPH_DIFFERENTIAL_OUT : 0);
}
