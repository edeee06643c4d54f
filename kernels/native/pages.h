// How a page of the KV cache stores its tokens: the keys, or the values, of one block, layer and head.
//
// A plain page is [token][head_dim]. A tiled page holds the same number of bytes in the order in which attention
// multiplies them, in words of a pair of bfloat16 values:
//
//     keys    [16-token group][dim pair][16 tokens]    one vector: two dimensions of 16 keys
//     values  [token pair][head_dim]                   one vector: 16 dimensions of two values
//
// so that neither product packs, gathers or sums across lanes. float32 values are words already: their plain pages are
// [token][head_dim] words. Tiled pages have block sizes and head dimensions that are multiples of 16.
#pragma once

#include "api.h"
#include "panel.h"

namespace headrace {

constexpr int kGroup = kLanes;         // tokens of a tile of keys
constexpr int kMaxTiledHeadDim = 512;  // bounds the buffer of one rotated key (kv_cache.py checks it)

inline int64_t tiled_key_index(int64_t token, int64_t dim, int64_t head_dim) {
    return token / kGroup * kGroup * head_dim + dim / 2 * (2 * kGroup) + token % kGroup * 2 + dim % 2;
}

inline int64_t tiled_value_index(int64_t token, int64_t dim, int64_t head_dim) {
    return token / 2 * (2 * head_dim) + dim * 2 + token % 2;
}

// One token's key into a tiled page: one word for each pair of dimensions.
template <typename T>
inline void write_tiled_key(T* page, int64_t token, const T* key, int64_t head_dim) {
    T* target = page + tiled_key_index(token, 0, head_dim);
    for (int64_t dim = 0; dim < head_dim; dim += 2, target += 2 * kGroup) std::memcpy(target, key + dim, 2 * sizeof(T));
}

// One token's value into a tiled page. The other half of each word is another token's, perhaps another thread's: it
// is not touched.
template <typename T>
inline void write_tiled_value(T* page, int64_t token, const T* value, int64_t head_dim) {
    T* target = page + tiled_value_index(token, 0, head_dim);
    for (int64_t dim = 0; dim < head_dim; ++dim) target[2 * dim] = value[dim];
}

// 16 plain keys as one tile. Zeros fill the words that head_dim does not: there are none, as heads are whole words.
template <typename T>
inline void pack_key_tile(const T* const (&keys)[kGroup], int64_t head_dim, word* tile) {
    const int64_t words = words_in<T>(head_dim);
    for (int64_t w = 0; w < words; w += kLanes) {
        const int64_t count = std::min<int64_t>(words - w, kLanes);
        u32x16 square[kGroup] = {};
        if (count == kLanes) {  // constant trip counts keep the square in registers
            for (int i = 0; i < kGroup; ++i) square[i] = load_words((const word*)keys[i] + w);
        } else {
            for (int i = 0; i < kGroup; ++i) std::memcpy(&square[i], (const word*)keys[i] + w, count * sizeof(word));
        }
        transpose(square);
        for (int i = 0; i < count; ++i) store_words(tile + (w + i) * kGroup, square[i]);
    }
}

// 16 plain values as one tile of rows of padded_dim words.
template <typename T>
inline void pack_value_tile(const T* const (&values)[kGroup], int64_t head_dim, int64_t padded_dim, word* tile) {
    constexpr int kStep = 4 / sizeof(T);
    for (int64_t dim = 0; dim < head_dim; dim += kLanes) {
        const int64_t count = head_dim - dim;
        for (int token = 0; token < kGroup; token += kStep) {
            u32x16 words = as_bits(load(values[token] + dim, count));
            if constexpr (kStep == 2) {  // the even token in the low half, where little-endian pairs have it
                words = (words >> 16) | as_bits(load(values[token + 1] + dim, count));
            }
            store_words(tile + token / kStep * padded_dim + dim, words);
        }
    }
}

}  // namespace headrace
