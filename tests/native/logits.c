// Logits of the token after a prompt, under adapters that have other weights in each layer, through the C interface.
//     logits FOLDER BASE ADAPTER...
// FOLDER holds the backends, where they are files. Adapter ia has the weight (1 + ia + il) / 8 in layer il. Prints a
// line for each token of the vocabulary, with all digits of a float.

#include "ggml-backend.h"
#include "qaflora.h"

#include <stdio.h>
#include <stdlib.h>

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static int failed(const char * step) {
    fprintf(stderr, "%s failed: %s\n", step, qaflora_last_error());
    return 1;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: logits FOLDER BASE ADAPTER...\n");
        return 2;
    }
    const int n_adapter = argc - 3;
    llama_log_set(quiet, NULL);
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all_from_path(argv[1]);
    }
    llama_backend_init();

    struct llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts = !qaflora_has_products();
    struct llama_model * model = llama_model_load_from_file(argv[2], model_params);
    if (model == NULL) {
        return failed("llama_model_load_from_file");
    }
    struct qaflora_pack * pack = qaflora_pack_init(model, (const char * const *) argv + 3, n_adapter, QAFLORA_ADAPTER_AUTO);
    if (pack == NULL) {
        return failed("qaflora_pack_init");
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; // it rounds to 16 bits
    struct llama_context * ctx = qaflora_context_init(model, &params, pack, 0);
    if (ctx == NULL) {
        return failed("qaflora_context_init");
    }

    const int n_layer = llama_model_n_layer(model);
    float * weights = malloc(sizeof(float) * n_adapter * n_layer);
    if (weights == NULL) {
        return failed("malloc");
    }
    for (int ia = 0; ia < n_adapter; ia++) {
        for (int il = 0; il < n_layer; il++) {
            weights[ia * n_layer + il] = (1 + ia + il) / 8.0f;
        }
    }
    if (!qaflora_set_weights(ctx, 0, weights, (int64_t) n_adapter * n_layer)) {
        return failed("qaflora_set_weights");
    }
    llama_token prompt[24];
    for (int i = 0; i < 24; i++) {
        prompt[i] = 10 + 7 * i;
    }
    // a prompt, and then a token alone: they have kernels of their own
    if (llama_decode(ctx, llama_batch_get_one(prompt, 23)) || llama_decode(ctx, llama_batch_get_one(prompt + 23, 1))) {
        return failed("llama_decode");
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    for (int i = 0; i < llama_vocab_n_tokens(llama_model_get_vocab(model)); i++) {
        printf("%.9g\n", logits[i]);
    }
    fprintf(stderr, "%s\n", qaflora_build_info());

    llama_free(ctx);
    qaflora_pack_free(pack);
    llama_model_free(model);
    llama_backend_free();
    free(weights);
    return 0;
}
