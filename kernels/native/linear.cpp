// Packing of weights, and linear layers as calls of their own.
#include <vector>

#include "linear.h"

namespace headrace {
namespace {

// One group of an int8 panel begins with what takes the activations' zero point out of the sums again.
void write_corrections(const word* const* rows, int64_t words, word* target) {
    for (int column = 0; column < kPanelColumns; ++column) {
        const int8_t* weights = (const int8_t*)rows[column];
        int32_t total = 0;
        for (int64_t i = 0; i < words * (int64_t)sizeof(word); ++i) total += weights[i];
        target[column] = (uint32_t)(-kZeroPoint * total);
    }
}

// `weight` is [rows][words]: out_features rows, or with a gate twice as many. Columns beyond the last repeat it.
template <typename W>
void pack_weight(const word* weight, word* packed, const LinearWeight& shape, int threads) {
    const int64_t words = words_in<W>(shape.in_features), size = panel_words<W>(shape.in_features);
    const int64_t panels = shape.panels(), last = shape.out_features - 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
        const word* rows[kPanelColumns];
        for (int64_t i = 0; i < kPanelColumns; ++i) {
            const int64_t in_gate = std::min(panel * kLanes + i % kLanes, last);
            const int64_t row = shape.gated ? in_gate + (i < kLanes ? 0 : shape.out_features)
                                            : std::min(panel * kPanelColumns + i, last);
            rows[i] = weight + row * words;
        }
        word* target = packed + panel * size;
        const int64_t step = sizeof(W) == 1 ? words_in<W>(kScaleGroup) : words;
        for (int64_t first = 0; first < words; first += step) {
            const int64_t count = std::min(step, words - first);
            if (sizeof(W) == 1) {
                write_corrections(rows, count, target);
                target += kPanelColumns;
            }
            pack_panel(rows, count, target);
            target += count * kPanelColumns;
            for (const word*& row : rows) row += count;
        }
    }
}

template <typename T, typename Out>
void linear(const T* x, const LinearWeight& weight, Out* out, int64_t rows, int threads) {
    std::vector<uint8_t> bytes;
    std::vector<float> scales;
    if (weight.is_int8()) {
        bytes.resize(rows * words_in<int8_t>(weight.in_features) * sizeof(word));
        scales.resize(rows * groups_in(weight.in_features));
    }
    const QuantizedRows room{bytes.data(), scales.data()};
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const Team team = Team::of_region(&barrier);
        if constexpr (std::is_same_v<T, Out>) {
            if (weight.gated) {
                apply_linear(team, weight, x, rows, room, GateTo<T>{out, weight.out_features});
            } else {
                apply_linear(team, weight, x, rows, room, StoreTo<T>{out, weight.out_features});
            }
        } else {
            apply_linear(team, weight, x, rows, room, StoreTo<Out>{out, weight.out_features});
        }
    }
}

}  // namespace
}  // namespace headrace

#define DEFINE_LINEAR(NAME, T, OUT)                                                                                 \
    extern "C" int headrace_##NAME(const void* x, const headrace::LinearWeight* weight, void* out, int64_t rows,    \
                                   int threads) {                                                                   \
        headrace::linear((const T*)x, *weight, (OUT*)out, rows, threads);                                           \
        return headrace::kOk;                                                                                       \
    }
#define DEFINE_PACK(SUFFIX, W)                                                                                      \
    extern "C" int headrace_pack_weight_##SUFFIX(const void* weight, void* packed,                                  \
                                                 const headrace::LinearWeight* shape, int threads) {                \
        headrace::pack_weight<W>((const headrace::word*)weight, (headrace::word*)packed, *shape, threads);          \
        return headrace::kOk;                                                                                       \
    }
DEFINE_LINEAR(linear_f32, float, float)
DEFINE_LINEAR(linear_wide_f32, float, float)
DEFINE_LINEAR(linear_bf16, headrace::bf16, headrace::bf16)
DEFINE_LINEAR(linear_wide_bf16, headrace::bf16, float)
DEFINE_PACK(f32, float)
DEFINE_PACK(bf16, headrace::bf16)
DEFINE_PACK(i8, int8_t)
