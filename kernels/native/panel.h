// The one matrix-product kernel, behind linear layers and attention alike: rows of x times a packed panel.
//
// Everything is counted in *words* of 32 bits along the summed dimension: one float, a pair of neighbouring bfloat16
// values or four int8, which AVX-512 multiplies and adds in one instruction. A panel is [words][32 columns] words. One
// word of x, broadcast, meets 32 columns at a time, so no sum ever runs across lanes, and what a row's sums are does not
// depend on the rows beside it.
#pragma once

#include <type_traits>

#include "simd.h"

namespace headrace {

constexpr int kPanelColumns = 32;
constexpr int64_t kSliceWords = 256;
#ifdef __AVX512F__
constexpr int kRowTile = 12;  // 12 rows x 2 vectors of sums, 2 of the panel: 26 of 32 registers
#else
constexpr int kRowTile = 3;  // the same vectors are two or four registers each, of 16
#endif

// Reads float or bfloat16 storage, which may stand at an odd multiple of two bytes.
using word = uint32_t __attribute__((may_alias, aligned(2)));

template <typename T>
constexpr int64_t words_in(int64_t elements) {
    return (elements * (int64_t)sizeof(T) + (int64_t)sizeof(word) - 1) / (int64_t)sizeof(word);
}

inline u32x16 load_words(const word* from) {
    u32x16 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store_words(word* to, u32x16 value) { std::memcpy(to, &value, sizeof value); }

template <typename T>
struct SumOf {
    using type = f32x16;
};
template <>
struct SumOf<int8_t> {
    using type = i32x16;
};

// sums + columns * x for each of 16 columns, where x is one word in all lanes.
template <typename T>
inline typename SumOf<T>::type multiply_add(typename SumOf<T>::type sums, u32x16 columns, u32x16 x);

template <>
inline f32x16 multiply_add<float>(f32x16 sums, u32x16 columns, u32x16 x) {
    return sums + as_floats(columns) * as_floats(x);
}

template <>
inline f32x16 multiply_add<bf16>(f32x16 sums, u32x16 columns, u32x16 x) {
#ifdef __AVX512BF16__
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)columns, (__m512bh)x);
#else
    const u32x16 high = u32x16{} + 0xffff0000u;
    sums += as_floats(columns & high) * as_floats(x & high);
    return sums + as_floats(columns << 16) * as_floats(x << 16);
#endif
}

// Columns are signed bytes, x unsigned ones.
template <>
inline i32x16 multiply_add<int8_t>(i32x16 sums, u32x16 columns, u32x16 x) {
#ifdef __AVX512VNNI__
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)columns);
#else
    sums += ((i32x16)columns >> 24) * (i32x16)(x >> 24);
    sums += ((i32x16)(columns << 8) >> 24) * (i32x16)(x >> 16 & 255);
    sums += ((i32x16)(columns << 16) >> 24) * (i32x16)(x >> 8 & 255);
    return sums + ((i32x16)(columns << 24) >> 24) * (i32x16)(x & 255);
#endif
}

// Memory that will be read next, fetched into the L2 while a panel is multiplied: `step` bytes, of at most two cache
// lines, for each of its words.
struct Ahead {
    const char* next;
    int64_t step;

    void fetch() {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
        next += step;
    }
};
struct NothingAhead {
    void fetch() {}
};

// sums[row][0..1] += x[row] * panel over some words, for Rows rows of x that stand x_stride words apart.
template <typename T, int Rows, typename Prefetch>
[[gnu::always_inline]] inline void multiply_slice(typename SumOf<T>::type (&sums)[Rows][2], const word* x,
                                                  int64_t x_stride, const word* panel, int64_t words,
                                                  Prefetch& prefetch) {
    for (int64_t w = 0; w < words; ++w, panel += kPanelColumns) {
        prefetch.fetch();
        const u32x16 left = load_words(panel), right = load_words(panel + kLanes);
#pragma GCC unroll 12
        for (int row = 0; row < Rows; ++row) {
            const u32x16 broadcast = u32x16{} + x[row * x_stride + w];
            sums[row][0] = multiply_add<T>(sums[row][0], left, broadcast);
            sums[row][1] = multiply_add<T>(sums[row][1], right, broadcast);
        }
    }
}

// The same over a whole panel, in slices: one running sum over thousands of products would lose two bits of float32
// against a library's matrix product.
template <typename T, int Rows, typename Prefetch = NothingAhead>
[[gnu::always_inline]] inline void multiply_panel(f32x16 (&sums)[Rows][2], const word* x, int64_t x_stride,
                                                  const word* panel, int64_t words, Prefetch prefetch = {}) {
    for (int64_t first = 0; first < words; first += kSliceWords) {
        const int64_t count = words - first < kSliceWords ? words - first : kSliceWords;
        f32x16 slice[Rows][2] = {};
        multiply_slice<T>(slice, x + first, x_stride, panel + first * kPanelColumns, count, prefetch);
        for (int row = 0; row < Rows; ++row) sums[row][0] += slice[row][0], sums[row][1] += slice[row][1];
    }
}

// Calls use(std::integral_constant<int, rows>, first_row): the number of rows, at most Rows, as a constant.
template <int Rows = kRowTile, typename Use>
inline void with_constant(int64_t rows, int64_t first_row, Use&& use) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return with_constant<Rows - 1>(rows, first_row, use);
    }
    use(std::integral_constant<int, Rows>{}, first_row);
}

// One step of a transposition: exchanges the blocks of Distance x Distance words off the diagonal.
template <int Distance>
inline void exchange(u32x16 (&rows)[kLanes]) {
    constexpr auto index = [](int lane, bool upper) {
        const bool in_upper = lane & Distance;
        return in_upper == upper ? lane + (upper ? kLanes : 0) : lane + (upper ? Distance : kLanes - Distance);
    };
    constexpr auto pattern = [index](bool upper) {
        return u32x16{(uint32_t)index(0, upper),  (uint32_t)index(1, upper),  (uint32_t)index(2, upper),
                      (uint32_t)index(3, upper),  (uint32_t)index(4, upper),  (uint32_t)index(5, upper),
                      (uint32_t)index(6, upper),  (uint32_t)index(7, upper),  (uint32_t)index(8, upper),
                      (uint32_t)index(9, upper),  (uint32_t)index(10, upper), (uint32_t)index(11, upper),
                      (uint32_t)index(12, upper), (uint32_t)index(13, upper), (uint32_t)index(14, upper),
                      (uint32_t)index(15, upper)};
    };
    constexpr u32x16 keep_lower = pattern(false), keep_upper = pattern(true);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & Distance) continue;
        const u32x16 lower = rows[i], upper = rows[i + Distance];
        rows[i] = __builtin_shuffle(lower, upper, keep_lower);
        rows[i + Distance] = __builtin_shuffle(lower, upper, keep_upper);
    }
}

// Row i of the 16 x 16 words becomes column i.
inline void transpose(u32x16 (&rows)[kLanes]) {
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

// Packs 32 rows of `words` words each as the columns of one panel.
inline void pack_panel(const word* const* rows, int64_t words, word* panel) {
    for (int half = 0; half < kPanelColumns; half += kLanes) {
        for (int64_t w = 0; w < words; w += kLanes) {
            const int64_t count = words - w < kLanes ? words - w : kLanes;
            u32x16 square[kLanes] = {};
            word* target = panel + w * kPanelColumns + half;
            if (count == kLanes) {  // constant trip counts keep the square in registers
                for (int i = 0; i < kLanes; ++i) square[i] = load_words(rows[half + i] + w);
                transpose(square);
                for (int i = 0; i < kLanes; ++i) store_words(target + i * kPanelColumns, square[i]);
            } else {
                for (int i = 0; i < kLanes; ++i) std::memcpy(&square[i], rows[half + i] + w, count * sizeof(word));
                transpose(square);
                for (int i = 0; i < count; ++i) store_words(target + i * kPanelColumns, square[i]);
            }
        }
    }
}

}  // namespace headrace
