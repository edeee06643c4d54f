// One step of a model of the Llama family: from token ids to logits, and the step's keys and values into the cache.
//
// A team of threads runs all layers in one parallel region. Nothing is allocated for a layer; activations live in memory
// that the caller keeps between steps.
#pragma once

#include "attention.h"
#include "linear.h"
#include "rotary.h"

namespace headrace {

// These three are as kernels/llama_step.py fills them. Norm weights and embeddings are of the model's type.
struct LlamaLayer {
    const void* input_norm;
    const void* query_norm;  // [head_dim], or null: heads are not normalised
    const void* key_norm;
    const void* mlp_norm;
    LinearWeight qkv, output, gate_up, down;
    int64_t sliding_window;
};

struct LlamaModel {
    const LlamaLayer* layers;
    const void* embedding;   // [vocab_size][hidden_size]
    const void* final_norm;
    const float* cos;        // [num_positions][head_dim / 2]
    const float* sin;
    LinearWeight lm_head;
    int64_t num_layers, num_heads, num_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size, num_positions;
    float norm_eps, attention_scale;
};

struct LlamaInputs {
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* slots;
    const int64_t* sampling_rows;  // the tokens whose logits are wanted
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    void* cache;
    void* scratch;  // at least scratch_bytes
    float* logits;  // [num_rows][vocab_size]
    int64_t num_tokens, num_rows, num_sequences, max_blocks, layer_stride;
    CacheView view;
};

// Activations. Rows are tokens, and after the last attention only the sampled ones.
template <typename T>
struct LlamaScratch {
    T *residual, *sampled_residual, *normed, *heads, *attended, *hidden;
    QuantizedRows quantized;
    int64_t bytes = 0;

    LlamaScratch(const LlamaModel& model, int64_t num_tokens, int64_t num_rows, void* memory) {
        const int64_t rows = std::max(num_tokens, num_rows), query_size = model.num_heads * model.head_dim;
        const int64_t widest = std::max({model.hidden_size, query_size, model.intermediate_size});
        char* base = (char*)memory;
        const auto take = [&](auto*& pointer, int64_t count) {
            pointer = (std::remove_reference_t<decltype(pointer)>)(base + bytes);
            bytes += round_up(count * (int64_t)sizeof *pointer, 64);
        };
        take(residual, rows * model.hidden_size);
        take(sampled_residual, num_rows * model.hidden_size);
        take(normed, rows * model.hidden_size);
        take(heads, rows * (query_size + 2 * model.num_kv_heads * model.head_dim));
        take(attended, rows * query_size);
        take(hidden, rows * model.intermediate_size);
        take(quantized.bytes, rows * round_up(widest, 4));
        take(quantized.scales, rows * groups_in(widest));
    }
};

}  // namespace headrace
