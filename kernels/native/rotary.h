// Rotary embedding and the write into the paged cache, one token at a time: any thread may take any token.
#pragma once

#include "pages.h"

namespace headrace {

template <typename T>
inline void copy(const T* from, T* to, int64_t count) {
    std::memcpy(to, from, count * sizeof(T));
}

// cos and sin hold `half` floats of this token; elements of the head beyond 2 * half are copied. May work in place.
template <typename T>
inline void rotate(const T* from, T* to, const float* cos, const float* sin, int64_t half, int64_t head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = half - i;
        const f32x16 first = load(from + i, count), second = load(from + half + i, count);
        const f32x16 c = load(cos + i, count), s = load(sin + i, count);
        store(to + i, first * c - second * s, count);
        store(to + half + i, second * c + first * s, count);
    }
    if (from != to) copy(from + 2 * half, to + 2 * half, head_dim - 2 * half);
}

// One token's rotated keys and its values (num_kv_heads * head_dim elements each) into its slot of a layer's cache.
// With half == 0 keys are stored as they are.
template <typename T>
inline void rope_and_write_token(const CacheView& view, T* cache, int64_t slot, const T* key, const T* value,
                                 const float* cos, const float* sin, int64_t half) {
    const int64_t block = slot / view.block_size, token = slot % view.block_size, head_dim = view.head_dim;
    for (int64_t head = 0; head < view.num_kv_heads; ++head, key += head_dim, value += head_dim) {
        T* key_page = cache + view.page_offset(block, head);
        T* value_page = key_page + view.value_offset;
        if (view.tiled) {
            alignas(64) T rotated[kMaxTiledHeadDim];
            rotate(key, rotated, cos, sin, half, head_dim);
            write_tiled_key(key_page, token, rotated, head_dim);
            write_tiled_value(value_page, token, value, head_dim);
        } else {
            rotate(key, key_page + token * view.token_stride, cos, sin, half, head_dim);
            copy(value, value_page + token * view.token_stride, head_dim);
        }
    }
}

// One token's query heads, in place or elsewhere.
template <typename T>
inline void rotate_heads(const T* from, T* to, int64_t num_heads, const float* cos, const float* sin, int64_t half,
                         int64_t head_dim) {
    for (int64_t head = 0; head < num_heads; ++head) {
        rotate(from + head * head_dim, to + head * head_dim, cos, sin, half, head_dim);
    }
}

}  // namespace headrace
