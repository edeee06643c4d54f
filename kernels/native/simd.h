// Sixteen floats at a time, over float32 and bfloat16 storage.
//
// Written with GCC's vector extensions, so that one source compiles to AVX-512, AVX2 or plain scalar code; AVX-512
// intrinsics stand only where the extensions have no word for the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace headrace {

constexpr int kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline f32x16 splat(float value) { return f32x16{} + value; }
inline f32x16 as_floats(u32x16 bits) { return (f32x16)bits; }
inline u32x16 as_bits(f32x16 value) { return (u32x16)value; }

inline f32x16 widen(u16x16 halves) { return as_floats(__builtin_convertvector(halves, u32x16) << 16); }

// Round to nearest even, as torch does; a NaN stays a NaN.
inline u16x16 narrow(f32x16 value) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)value);
#else
    const u32x16 bits = as_bits(value);
    const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32x16 quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(value == value ? rounded : quiet, u16x16);
#endif
}

inline f32x16 load(const float* from) {
    f32x16 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline f32x16 load(const bf16* from) {
    u16x16 halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
}

inline void store(float* to, f32x16 value) { std::memcpy(to, &value, sizeof value); }

inline void store(bf16* to, f32x16 value) {
    const u16x16 halves = narrow(value);
    std::memcpy(to, &halves, sizeof halves);
}

// The same for the first `count` lanes; memory beyond them is not touched, lanes beyond them read as zero.
template <typename T>
inline f32x16 load(const T* from, int64_t count) {
    if (count >= kLanes) return load(from);
    alignas(64) T lanes[kLanes] = {};
    std::memcpy(lanes, from, count * sizeof(T));
    return load(lanes);
}

template <typename T>
inline void store(T* to, f32x16 value, int64_t count) {
    if (count >= kLanes) return store(to, value);
    alignas(64) T lanes[kLanes];
    store(lanes, value);
    std::memcpy(to, lanes, count * sizeof(T));
}

// The value as storage of type T would keep it.
template <typename T>
inline f32x16 round_to(f32x16 value) {
    T lanes[kLanes];
    store(lanes, value);
    return load(lanes);
}
template <>
inline f32x16 round_to<float>(f32x16 value) { return value; }

inline f32x16 maximum(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);  // which GCC does not make of the comparison
#else
    return a > b ? a : b;
#endif
}

inline float sum(f32x16 value) {
    float total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) total += value[i];
    return total;
}

inline float max_lane(f32x16 value) {
    float largest = value[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
}

// e^x to about one unit in the last place; 0 below the smallest normal result, and the largest finite power above.
// x = n ln 2 + r with |r| <= ln 2 / 2: the Taylor polynomial of degree 7 in r, times 2^n put into the exponent bits.
inline f32x16 exp(f32x16 x) {
    const f32x16 clamped = x < 88.0f ? x : splat(88.0f);
    const f32x16 to_integer = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const f32x16 shifted = clamped * 1.44269504f + to_integer;
    const f32x16 n = shifted - to_integer;
    const f32x16 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact
    f32x16 p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const f32x16 power = as_floats((as_bits(shifted) - as_bits(to_integer) + 127) << 23);
    return x > -87.0f ? p * power : splat(0.0f);
}

constexpr float kLog2E = 1.44269504f;

// 2^x for finite x below 128; 0 or 2^-126 for all below -126. With x = n + f and 0 <= f <= 1: a polynomial in f, times 2^n. The polynomials are the minimax ones for relative
// error (Remez), of degree 6 for float32 (7e-9 as rounded) and 3 for bfloat16 (7.5e-5; storage rounds by up to 2e-3).
template <typename T>
inline f32x16 exp2(f32x16 x) {
#ifdef __AVX512DQ__
    const f32x16 f = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
    const f32x16 to_integer = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const f32x16 clamped = maximum(x, splat(-126.0f));
    const f32x16 shifted = clamped - 0.5f + to_integer;
    const f32x16 f = clamped - (shifted - to_integer);
#endif
    f32x16 p;
    if constexpr (sizeof(T) == 4) {
        p = splat(2.17022554e-4f);
        p = p * f + 1.24396878e-3f;
        p = p * f + 9.678841e-3f;
        p = p * f + 5.5483342e-2f;
        p = p * f + 2.40229836e-1f;
        p = p * f + 6.93146984e-1f;
        p = p * f + 1.0f;
    } else {
        p = splat(7.80245226e-2f);
        p = p * f + 2.26067155e-1f;
        p = p * f + 6.9583354e-1f;
        p = p * f + 9.99925219e-1f;
    }
#ifdef __AVX512DQ__
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)x);  // p times 2 to the floor of x
#else
    return as_floats(as_bits(p) + (as_bits(shifted) << 23));
#endif
}

}  // namespace headrace
