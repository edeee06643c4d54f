// The phases of a step, one after another, each shared by the whole team.
#include "llama_step.h"

#include <memory>
#include <vector>

namespace headrace {
namespace {

bool within(const int64_t* values, int64_t count, int64_t limit) {
    return std::all_of(values, values + count, [limit](int64_t value) { return value >= 0 && value < limit; });
}

template <typename T>
class LlamaStep {
  public:
    LlamaStep(const LlamaModel& model, const LlamaInputs& inputs)
        : model_(model), in_(inputs), scratch_(model, inputs.num_tokens, inputs.num_rows, inputs.scratch) {}

    Status check() const {
        if (!within(in_.token_ids, in_.num_tokens, model_.vocab_size) ||
            !within(in_.positions, in_.num_tokens, model_.num_positions) ||
            !within(in_.slots, in_.num_tokens, in_.view.num_slots()) ||
            !within(in_.sampling_rows, in_.num_rows, in_.num_tokens)) {
            return kIndexOutOfRange;
        }
        return check_attention(call_of(0), in_.num_sequences, in_.num_tokens);
    }

    // By every thread of the team.
    void run(const Team& team) {
        if (team.thread == 0) make_plans(team.size);
        team.wait();
        std::vector<std::unique_ptr<AttentionWorker<T>>> workers;  // one for each plan
        for (const auto& plan : plans_) workers.push_back(std::make_unique<AttentionWorker<T>>(*plan));
        embed(team);
        T* residual = scratch_.residual;
        int64_t rows = in_.num_tokens;
        for (int64_t index = 0; index < model_.num_layers; ++index) {
            const LlamaLayer& layer = model_.layers[index];
            normalise(team, residual, layer.input_norm, rows);
            linear(team, layer.qkv, scratch_.normed, rows, StoreTo<T>{scratch_.heads, heads_size()});
            rotate_and_write(team, index);
            run_attention(*plans_[plan_of_layer_[index]], call_of(index), *workers[plan_of_layer_[index]]);
            team.wait();
            const T* attended = scratch_.attended;
            if (index == model_.num_layers - 1) {  // nothing attends to the rest of this layer: only sampled rows go on
                gather_sampled(team);
                attended = scratch_.heads, residual = scratch_.sampled_residual, rows = in_.num_rows;
            }
            linear(team, layer.output, attended, rows, AddTo<T>{residual, model_.hidden_size});
            normalise(team, residual, layer.mlp_norm, rows);
            linear(team, layer.gate_up, scratch_.normed, rows, GateTo<T>{scratch_.hidden, model_.intermediate_size});
            linear(team, layer.down, scratch_.hidden, rows, AddTo<T>{residual, model_.hidden_size});
        }
        normalise(team, residual, model_.final_norm, rows);
        linear(team, model_.lm_head, scratch_.normed, rows, StoreTo<float>{in_.logits, model_.vocab_size});
    }

  private:
    int64_t query_size() const { return model_.num_heads * model_.head_dim; }
    int64_t kv_size() const { return model_.num_kv_heads * model_.head_dim; }
    int64_t heads_size() const { return query_size() + 2 * kv_size(); }
    T* cache_of(int64_t layer) const { return (T*)in_.cache + layer * in_.layer_stride; }

    AttentionCall<T> call_of(int64_t layer) const {
        return {scratch_.heads,   cache_of(layer),         scratch_.attended,
                in_.query_starts, in_.context_lens,        in_.block_tables,
                in_.max_blocks,   model_.num_heads,        heads_size(),
                model_.attention_scale, model_.layers[layer].sliding_window, in_.view};
    }

    // Layers of the same window share a plan.
    void make_plans(int threads) {
        std::vector<int64_t> windows;
        for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
            const int64_t window = model_.layers[layer].sliding_window;
            const auto found = std::find(windows.begin(), windows.end(), window);
            plan_of_layer_.push_back(found - windows.begin());
            if (found != windows.end()) continue;
            windows.push_back(window);
            plans_.push_back(std::make_unique<AttentionPlan<T>>(call_of(layer), in_.num_sequences, threads));
        }
    }

    void embed(const Team& team) {
        const Range share = team.share(in_.num_tokens);
        for (int64_t row = share.begin; row < share.end; ++row) {
            const T* source = (const T*)model_.embedding + in_.token_ids[row] * model_.hidden_size;
            copy(source, scratch_.residual + row * model_.hidden_size, model_.hidden_size);
        }
        team.wait();
    }

    void normalise(const Team& team, const T* residual, const void* weight, int64_t rows) {
        const Range share = team.share(rows);
        const int64_t size = model_.hidden_size;
        for (int64_t row = share.begin; row < share.end; ++row) {
            rms_norm_row(residual + row * size, (const T*)weight, scratch_.normed + row * size, size, model_.norm_eps);
        }
        team.wait();
    }

    template <typename Use>
    void linear(const Team& team, const LinearWeight& weight, const T* x, int64_t rows, const Use& use) {
        apply_linear(team, weight, x, rows, scratch_.quantized, use);
        team.wait();
    }

    void normalise_heads(T* heads, const void* weight, int64_t count) const {
        const int64_t size = model_.head_dim;
        for (T* head = heads; head < heads + count * size; head += size) {
            rms_norm_row(head, (const T*)weight, head, size, model_.norm_eps);
        }
    }

    void rotate_and_write(const Team& team, int64_t index) {
        const LlamaLayer& layer = model_.layers[index];
        const int64_t half = model_.head_dim / 2;
        const Range share = team.share(in_.num_tokens);
        for (int64_t token = share.begin; token < share.end; ++token) {
            T* query = scratch_.heads + token * heads_size();
            T* key = query + query_size();
            if (layer.query_norm) {
                normalise_heads(query, layer.query_norm, model_.num_heads);
                normalise_heads(key, layer.key_norm, model_.num_kv_heads);
            }
            const float* cos = model_.cos + in_.positions[token] * half;
            const float* sin = model_.sin + in_.positions[token] * half;
            rotate_heads(query, query, model_.num_heads, cos, sin, half, model_.head_dim);
            rope_and_write_token(in_.view, cache_of(index), in_.slots[token], key, key + kv_size(), cos, sin, half);
        }
        team.wait();
    }

    // The sampled rows of what was attended, where the heads were, and of the residual.
    void gather_sampled(const Team& team) {
        const Range share = team.share(in_.num_rows);
        const int64_t hidden = model_.hidden_size;
        for (int64_t row = share.begin; row < share.end; ++row) {
            const int64_t token = in_.sampling_rows[row];
            copy(scratch_.attended + token * query_size(), scratch_.heads + row * query_size(), query_size());
            copy(scratch_.residual + token * hidden, scratch_.sampled_residual + row * hidden, hidden);
        }
        team.wait();
    }

    const LlamaModel& model_;
    const LlamaInputs& in_;
    const LlamaScratch<T> scratch_;
    std::vector<std::unique_ptr<AttentionPlan<T>>> plans_;
    std::vector<int64_t> plan_of_layer_;
};

template <typename T>
int llama_step(const LlamaModel& model, const LlamaInputs& inputs, int threads) {
    LlamaStep<T> step(model, inputs);
    const Status status = step.check();
    if (status != kOk) return status;
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    step.run(Team::of_region(&barrier));
    return kOk;
}

}  // namespace
}  // namespace headrace

#define DEFINE(SUFFIX, T)                                                                                            \
    extern "C" int headrace_llama_scratch_##SUFFIX(const headrace::LlamaModel* model, int64_t num_tokens,            \
                                                   int64_t num_rows, int64_t* bytes) {                               \
        *bytes = headrace::LlamaScratch<T>(*model, num_tokens, num_rows, nullptr).bytes;                             \
        return headrace::kOk;                                                                                        \
    }                                                                                                                \
    extern "C" int headrace_llama_step_##SUFFIX(const headrace::LlamaModel* model,                                   \
                                                const headrace::LlamaInputs* inputs, int threads) {                  \
        return headrace::llama_step<T>(*model, *inputs, threads);                                                    \
    }
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
