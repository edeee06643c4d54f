// RMS normalisation and the SwiGLU gate: one pass over each row, rows shared among threads.
#include <cmath>

#include "api.h"
#include "simd.h"

namespace headrace {
namespace {

template <typename T>
void rms_norm_rows(const T* x, const T* residual, const T* weight, T* normed, T* new_residual, int64_t rows,
                   int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * size, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* source = x + row * size;
        f32x16 squares = {};
        for (int64_t i = 0; i < size; i += kLanes) {
            f32x16 value = load(source + i, size - i);
            if (residual) {
                value = round_to<T>(value + load(residual + row * size + i, size - i));
                store(new_residual + row * size + i, value, size - i);
            }
            squares += value * value;
        }
        if (residual) source = new_residual + row * size;
        const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += kLanes) {
            // Rounded before the weight is applied: the order of transformers' LlamaRMSNorm.
            const f32x16 value = round_to<T>(load(source + i, size - i) * factor);
            store(normed + row * size + i, value * load(weight + i, size - i), size - i);
        }
    }
}

template <typename T>
void silu_and_mul_rows(const T* gate_up, T* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * size, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * size;
        const T* up = gate + size;
        for (int64_t i = 0; i < size; i += kLanes) {
            const f32x16 value = load(gate + i, size - i);
            const f32x16 silu = round_to<T>(value / (1.0f + exp(-value)));
            store(out + row * size + i, silu * load(up + i, size - i), size - i);
        }
    }
}

}  // namespace
}  // namespace headrace

#define DEFINE(SUFFIX, T)                                                                                            \
    extern "C" int headrace_rms_norm_##SUFFIX(const void* x, const void* residual, const void* weight, void* normed, \
                                              void* new_residual, int64_t rows, int64_t size, float eps,             \
                                              int threads) {                                                         \
        headrace::rms_norm_rows((const T*)x, (const T*)residual, (const T*)weight, (T*)normed, (T*)new_residual,     \
                                rows, size, eps, threads);                                                           \
        return headrace::kOk;                                                                                        \
    }                                                                                                                \
    extern "C" int headrace_silu_and_mul_##SUFFIX(const void* gate_up, void* out, int64_t rows, int64_t size,        \
                                                  int threads) {                                                     \
        headrace::silu_and_mul_rows((const T*)gate_up, (T*)out, rows, size, threads);                                \
        return headrace::kOk;                                                                                        \
    }
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
