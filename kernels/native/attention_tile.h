// The arithmetic of attention on registers: a few query rows against 64 tokens of one KV head.
//
// A row is one query token's one head. Scores are made for all 64 tokens of a few rows and stay in registers while they
// become weights; the weights, rounded to the storage type, meet the values. Keys and values come as tiles (pages.h),
// so every load is one whole vector of operands. A row's result does not depend on the rows that share its tile.
#pragma once

#include "pages.h"

namespace headrace {

constexpr int kChunkGroups = 4;
constexpr int kChunk = kChunkGroups * kGroup;  // context tokens scored at a time
constexpr float kNothingSeen = -1e30f;         // the running maximum before any key; finite, so that differences exist
constexpr float kHidden = 10 * kNothingSeen;   // a score that is not to be seen; finite too, see exp2
#ifdef __AVX512F__
constexpr int kTileRows = 6;  // 6 rows x 4 vectors of sums, 4 of the tile, 1 of the row: 29 of 32 registers
#else
constexpr int kTileRows = 1;  // the same vectors are two or four registers each, of 16
#endif

// Where the keys and values of one KV head's 64 tokens lie, by groups of 16.
struct Tiles {
    const word* keys[kChunkGroups];    // [words of head_dim][16]
    const word* values[kChunkGroups];  // [words of 16 tokens][value_stride]
};

// The running state of consecutive rows.
struct RowStates {
    float* outputs;   // [rows][output_stride]: weighted sums of values, not yet divided by the sum of weights
    float* maxima;    // [rows]: what the exponents are relative to
    float* sums;      // [rows][16]: sums of weights, lane by lane
    int64_t output_stride;
};

// Whether any lane of a is greater than that of b.
inline bool any_greater(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    const i32x16 greater = a > b;
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= greater[i];
    return any != 0;
#endif
}

// All lanes combined, in all lanes; `combine` takes two vectors.
template <typename Combine>
inline f32x16 across_lanes(f32x16 value, Combine&& combine) {
    value = combine(value, __builtin_shuffle(value, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    value = combine(value, __builtin_shuffle(value, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    value = combine(value, __builtin_shuffle(value, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    return combine(value, __builtin_shuffle(value, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
}

// scores[row][group] = query rows times keys. `words` are those of head_dim; query rows stand that many apart. On the
// way it asks for the keys that come next: blocks lie far apart, and no hardware prefetcher follows a block table.
template <typename T, int Rows, int Groups>
[[gnu::always_inline]] inline void score_rows(f32x16 (&scores)[Rows][Groups], const word* query, int64_t words,
                                              const Tiles& tiles, const Tiles& next) {
    f32x16 sums[Rows][Groups] = {};
    for (int64_t w = 0; w < words; ++w) {
        u32x16 keys[Groups];
#pragma GCC unroll 4
        for (int group = 0; group < Groups; ++group) {
            keys[group] = load_words(tiles.keys[group] + w * kGroup);
            __builtin_prefetch(next.keys[group] + w * kGroup, 0, 2);
        }
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row) {
            const u32x16 broadcast = u32x16{} + query[row * words + w];
#pragma GCC unroll 4
            for (int group = 0; group < Groups; ++group) {
                sums[row][group] = multiply_add<T>(sums[row][group], keys[group], broadcast);
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int group = 0; group < Groups; ++group) scores[row][group] = sums[row][group];
    }
}

// Hides the columns of one row outside [low, high).
template <int Groups>
inline void mask_row(f32x16 (&scores)[Groups], int32_t low, int32_t high) {
    constexpr i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 hidden = splat(kHidden);
#pragma GCC unroll 4
    for (int group = 0; group < Groups; ++group) {
        const i32x16 column = lane + group * kGroup;
        scores[group] = (column >= low) & (column < high) ? scores[group] : hidden;
    }
}

// Turns one row's scores into weights. The exponents stay relative to an old maximum until it is outgrown by 2^8: then,
// which is rare after the first keys, all that the row has gathered is scaled down.
template <typename T, int Groups>
inline void weigh_row(T* weights, const f32x16 (&scores)[Groups], float scale, const RowStates& states, int64_t row) {
    constexpr float kHeadroom = 8.0f;
    f32x16 largest = scores[0];
#pragma GCC unroll 4
    for (int group = 1; group < Groups; ++group) largest = maximum(largest, scores[group]);
    float* sums = states.sums + row * kLanes;
    if (any_greater(largest, splat(states.maxima[row] + kHeadroom / scale))) {
        const float row_maximum = across_lanes(largest, maximum)[0];
        if (states.maxima[row] > kNothingSeen) {
            const f32x16 factor = exp2<float>(splat((states.maxima[row] - row_maximum) * scale));
            float* output = states.outputs + row * states.output_stride;
            for (int64_t i = 0; i < states.output_stride; i += kLanes) store(output + i, load(output + i) * factor);
            store(sums, load(sums) * factor);
        }
        states.maxima[row] = row_maximum;
    }
    const float offset = states.maxima[row] * scale;
    f32x16 total = load(sums);
#pragma GCC unroll 4
    for (int group = 0; group < Groups; ++group) {
        const f32x16 weight = exp2<T>(scores[group] * scale - offset);
        total += weight;
        store(weights + group * kGroup, weight);
    }
    store(sums, total);
}

// outputs[row][dim...] += weights times values, for Vectors * 16 dimensions from `dim`. `words` are those of tokens.
template <typename T, int Rows, int Vectors>
[[gnu::always_inline]] inline void add_values(const RowStates& states, int64_t first_row, const T* weights, int64_t dim,
                                              int64_t words, int64_t value_stride, const Tiles& tiles,
                                              const Tiles& next) {
    constexpr int64_t group_words = words_in<T>(kGroup);
    float* output = states.outputs + first_row * states.output_stride + dim;
    f32x16 sums[Rows][Vectors];
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) sums[row][i] = load(output + row * states.output_stride + i * kLanes);
    }
    const word* values = nullptr;
    const word* next_values = nullptr;
    for (int64_t w = 0; w < words; ++w, values += value_stride, next_values += value_stride) {
        if (w % group_words == 0) {  // one loop, not two: the compiler keeps the sums where they are
            values = tiles.values[w / group_words] + dim;
            next_values = next.values[w / group_words] + dim;
        }
        u32x16 columns[Vectors];
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) {
            columns[i] = load_words(values + i * kLanes);
            __builtin_prefetch(next_values + i * kLanes, 0, 2);
        }
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row) {
            const u32x16 broadcast = u32x16{} + ((const word*)weights)[row * words_in<T>(kChunk) + w];
#pragma GCC unroll 4
            for (int i = 0; i < Vectors; ++i) sums[row][i] = multiply_add<T>(sums[row][i], columns[i], broadcast);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) store(output + row * states.output_stride + i * kLanes, sums[row][i]);
    }
}

}  // namespace headrace
