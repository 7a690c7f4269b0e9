// What is refused, so that llama_decode fails and says why.

#include "qaflora-context.h"
#include "qaflora-error.h"

#include "llama-batch.h"

#include <utility>

static bool refuse(const std::string & why) {
    qaflora_set_error(why.c_str());
    return false;
}

bool qaflora_accepts_batch(uint32_t n_token, uint32_t n_token_max, uint32_t n_output, uint32_t n_output_max) {
    qaflora_set_error(""); // what is said from here on is about this batch
    // llama.cpp 0c1e5709: llama_context::decode and output_reserve assert these
    if (n_token > n_token_max) {
        return refuse(qaflora_format("the batch has %u tokens, and this context takes %u at most; decode it in parts", n_token, n_token_max));
    }
    if (n_output > n_output_max) {
        return refuse(qaflora_format("the batch asks for %u outputs, and this context has room for %u; ask for fewer, or make it with a larger n_outputs_max",
                                     n_output, n_output_max));
    }
    return true;
}

bool qaflora_accepts_ubatch(const qaflora_context & qf, const llama_ubatch & ubatch) {
    if (!qf.is_differential()) {
        return true;
    }
    const uint32_t n_seq  = ubatch.n_seqs_unq;
    const uint32_t n_base = ubatch.n_tokens/n_seq; // rows of each sequence
    if (n_seq > 1 && (!ubatch.equal_seqs() || n_seq*n_base != ubatch.n_tokens)) {
        return refuse("the sequences of a differential probe are not told apart by row; make the context without a unified KV, "
                      "and give each token one sequence");
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id expected = i/n_base;
        const uint32_t     base     = i % n_base;
        if (ubatch.seq_id[i][0] != expected) {
            return refuse(qaflora_format("a differential probe was given sequence %d where %d was expected; decode the base, which is sequence 0, "
                                         "and 1, 2, ... with it, as many tokens of each", ubatch.seq_id[i][0], expected));
        }
        if ((ubatch.token && ubatch.token[i] != ubatch.token[base]) || ubatch.pos[i] != ubatch.pos[base] ||
            !ubatch.output[i] != !ubatch.output[base]) {
            return refuse(qaflora_format("sequence %d of a differential probe has another token, position or output than the base at its position %d; "
                                         "decode one query at a time", expected, (int) ubatch.pos[base]));
        }
    }
    return true;
}

bool qaflora_accepts_graph(qaflora_context & qf) {
    if (qf.has_inputs() && qf.n_captured_input != qf.n_layer) {
        return refuse(qaflora_format("the architecture has a query projection of its own in %d of %d blocks; the inputs of all are needed",
                                     qf.n_captured_input, qf.n_layer));
    }
    const std::string why = std::exchange(qf.graph_error, "");
    return why.empty() || refuse(why);
}
