// Paged attention as one call: a plan and a team of threads for one layer.
#include "attention.h"

namespace headrace {

template void run_attention(AttentionPlan<float>&, const AttentionCall<float>&, AttentionWorker<float>&);
template void run_attention(AttentionPlan<bf16>&, const AttentionCall<bf16>&, AttentionWorker<bf16>&);

namespace {

template <typename T>
int paged_attention(const AttentionCall<T>& call, int64_t num_sequences, int64_t num_tokens, int threads) {
    const Status status = check_attention(call, num_sequences, num_tokens);
    if (status != kOk) return status;
    AttentionPlan<T> plan(call, num_sequences, threads);
#pragma omp parallel num_threads(threads)
    {
        AttentionWorker<T> worker(plan);
        run_attention(plan, call, worker);
    }
    return kOk;
}

}  // namespace
}  // namespace headrace

#define DEFINE(SUFFIX, T)                                                                                             \
    extern "C" int headrace_paged_attention_##SUFFIX(                                                                 \
        const void* query, const void* cache, void* out, const int32_t* query_starts, const int32_t* context_lens,    \
        const int32_t* block_tables, int64_t num_sequences, int64_t num_tokens, int64_t max_blocks,                   \
        int64_t num_heads, int64_t query_stride, float scale, int64_t window, const headrace::CacheView* view,        \
        int threads) {                                                                                                \
        const headrace::AttentionCall<T> call{(const T*)query, (const T*)cache, (T*)out,   query_starts,              \
                                              context_lens,    block_tables,    max_blocks, num_heads,                \
                                              query_stride,    scale,           window,    *view};                    \
        return headrace::paged_attention(call, num_sequences, num_tokens, threads);                                   \
    }
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
