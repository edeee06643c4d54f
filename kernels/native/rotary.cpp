// Rotary embedding and the write into the paged cache, in one pass over the tokens.
#include "rotary.h"

namespace headrace {
namespace {

// With half == 0 keys are stored as they are; with query == nullptr there is nothing but keys and values.
template <typename T>
int rope_and_write(const T* query, const T* key, const T* value, const float* cos, const float* sin, T* rotated_query,
                   T* cache, const int64_t* slots, int64_t num_tokens, int64_t num_heads, int64_t query_stride,
                   int64_t key_stride, int64_t value_stride, int64_t half, const CacheView& view, int threads) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        if (slots[token] < 0 || slots[token] >= view.num_slots()) return kIndexOutOfRange;
    }
    const int64_t head_dim = view.head_dim;
    const int64_t elements = num_tokens * (num_heads + 2 * view.num_kv_heads) * head_dim;
#pragma omp parallel for num_threads(threads_for(elements, threads)) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const float* token_cos = cos + token * half;
        const float* token_sin = sin + token * half;
        rotate_heads(query + token * query_stride, rotated_query + token * num_heads * head_dim, num_heads, token_cos,
                     token_sin, half, head_dim);
        rope_and_write_token(view, cache, slots[token], key + token * key_stride, value + token * value_stride,
                             token_cos, token_sin, half);
    }
    return kOk;
}

}  // namespace
}  // namespace headrace

#define DEFINE(SUFFIX, T)                                                                                           \
    extern "C" int headrace_rope_and_write_kv_##SUFFIX(                                                             \
        const void* query, const void* key, const void* value, const float* cos, const float* sin,                  \
        void* rotated_query, void* cache, const int64_t* slots, int64_t num_tokens, int64_t num_heads,              \
        int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t half,                               \
        const headrace::CacheView* view, int threads) {                                                             \
        return headrace::rope_and_write((const T*)query, (const T*)key, (const T*)value, cos, sin,                  \
                                        (T*)rotated_query, (T*)cache, slots, num_tokens, num_heads, query_stride,   \
                                        key_stride, value_stride, half, *view, threads);                            \
    }
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
