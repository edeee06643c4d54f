// Rotary embedding and the write into the paged cache, in one pass over the tokens.
#include "api.h"
#include "simd.h"

namespace headrace {
namespace {

template <typename T>
void copy(const T* from, T* to, int64_t count) {
    std::memcpy(to, from, count * sizeof(T));
}

// cos and sin hold `half` floats of this token; elements of the head beyond 2 * half are copied.
template <typename T>
void rotate(const T* from, T* to, const float* cos, const float* sin, int64_t half, int64_t head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = half - i;
        const f32x16 first = load(from + i, count), second = load(from + half + i, count);
        const f32x16 c = load(cos + i, count), s = load(sin + i, count);
        store(to + i, first * c - second * s, count);
        store(to + half + i, second * c + first * s, count);
    }
    copy(from + 2 * half, to + 2 * half, head_dim - 2 * half);
}

// With half == 0 keys are stored as they are; with query == nullptr there is nothing but keys and values.
template <typename T>
int rope_and_write(const T* query, const T* key, const T* value, const float* cos, const float* sin, T* rotated_query,
                   T* cache, const int64_t* slots, int64_t num_tokens, int64_t num_heads, int64_t query_stride,
                   int64_t key_stride, int64_t value_stride, int64_t half, const CacheView& view, int threads) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        if (slots[token] < 0 || slots[token] >= view.num_blocks * view.block_size) return kIndexOutOfRange;
    }
    const int64_t head_dim = view.head_dim;
    const int64_t elements = num_tokens * (num_heads + 2 * view.num_kv_heads) * head_dim;
#pragma omp parallel for num_threads(threads_for(elements, threads)) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const float* token_cos = cos + token * half;
        const float* token_sin = sin + token * half;
        for (int64_t head = 0; head < num_heads; ++head) {
            rotate(query + token * query_stride + head * head_dim,
                   rotated_query + (token * num_heads + head) * head_dim, token_cos, token_sin, half, head_dim);
        }
        const int64_t block = slots[token] / view.block_size, offset = slots[token] % view.block_size;
        for (int64_t head = 0; head < view.num_kv_heads; ++head) {
            T* cached_key = cache + view.token_offset(block, head, offset);
            rotate(key + token * key_stride + head * head_dim, cached_key, token_cos, token_sin, half, head_dim);
            copy(value + token * value_stride + head * head_dim, cached_key + view.value_offset, head_dim);
        }
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
