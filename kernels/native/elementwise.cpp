// RMS normalisation and the SwiGLU gate as calls of their own, rows shared among threads.
#include "api.h"
#include "rows.h"

namespace headrace {
namespace {

template <typename T>
void rms_norm_rows(const T* x, const T* residual, const T* weight, T* normed, T* new_residual, int64_t rows,
                   int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * size, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* source = x + row * size;
        if (residual) {
            T* total = new_residual + row * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                store(total + i, load(source + i, size - i) + load(residual + row * size + i, size - i), size - i);
            }
            source = total;
        }
        rms_norm_row(source, weight, normed + row * size, size, eps);
    }
}

template <typename T>
void silu_and_mul_rows(const T* gate_up, T* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * size, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * size;
        const T* up = gate + size;
        for (int64_t i = 0; i < size; i += kLanes) {
            const f32x16 product = silu_times<T>(load(gate + i, size - i), load(up + i, size - i));
            store(out + row * size + i, product, size - i);
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
