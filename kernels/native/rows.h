// Work on one row of activations: normalisation, the SwiGLU gate, quantisation.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace headrace {

// out = x / rms(x) * weight. Rounded before the weight is applied: the order of transformers' LlamaRMSNorm.
template <typename T>
inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    f32x16 squares = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const f32x16 value = load(x + i, size - i);
        squares += value * value;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
        const f32x16 value = round_to<T>(load(x + i, size - i) * factor);
        store(out + i, value * load(weight + i, size - i), size - i);
    }
}

// silu(gate) * up of values that have been rounded to T; silu is rounded before the product.
template <typename T>
inline f32x16 silu_times(f32x16 gate, f32x16 up) {
    if constexpr (sizeof(T) == 4) return gate / (1.0f + exp(-gate)) * up;
    // What multiplying the exponent loses is lost in storage anyway; beyond 2^126 the quotient is nothing.
    const f32x16 exponent = gate * -kLog2E;
    return round_to<T>(gate / (1.0f + exp2<float>(exponent < 126.0f ? exponent : splat(126.0f)))) * up;
}

constexpr int64_t kScaleGroup = 64;  // neighbouring activations that share a scale
constexpr float kSmallestLimit = 127 * 0x1p-126f;  // a scale is no subnormal number: its inverse would be infinite
constexpr int kZeroPoint = 128;  // what a quantised 0 is stored as: activations are unsigned bytes, weights signed

constexpr int64_t groups_in(int64_t elements) { return (elements + kScaleGroup - 1) / kScaleGroup; }

// x ~ (bytes - 128) * scale, with one scale for each group of kScaleGroup. The last word of bytes is filled up.
template <typename T>
inline void quantize_row(const T* x, uint8_t* bytes, float* scales, int64_t size) {
    for (int64_t first = 0; first < size; first += kScaleGroup) {
        const int64_t end = std::min(first + kScaleGroup, size);
        f32x16 largest = {}, poison = {};
        for (int64_t i = first; i < end; i += kLanes) {
            const f32x16 value = load(x + i, end - i);
            largest = maximum(largest, maximum(value, -value));
            poison += value * 0.0f;  // bytes cannot hold what is not finite: the scale carries it on
        }
        const float limit = std::max(kSmallestLimit, max_lane(largest)), inverse = 127.0f / limit;
        scales[first / kScaleGroup] = limit / 127.0f + sum(poison);
        const f32x16 to_integer = splat(12582912.0f + kZeroPoint);  // 1.5 * 2^23: rounds, and leaves the integer below
        for (int64_t i = first; i < end; i += kLanes) {
            const u32x16 integer = as_bits(load(x + i, end - i) * inverse + to_integer);
            using u8x16 = uint8_t __attribute__((vector_size(16)));
            const u8x16 narrow_integer = __builtin_convertvector(integer, u8x16);
            std::memcpy(bytes + i, &narrow_integer, std::min<int64_t>(kLanes, (end - i + 3) / 4 * 4));
        }
    }
}

}  // namespace headrace
