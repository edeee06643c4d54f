// Linear layers over a weight packed once: [out_features / 32] panels of [in_features in words][32], zero-padded.
#include <sys/mman.h>

#include "api.h"
#include "panel.h"

namespace headrace {
namespace {

constexpr int64_t kRowBlockBytes = 256 << 10;  // rows of x that stay in a core's L2 while panels stream past

template <typename T>
void pack_weight(const T* weight, word* packed, int64_t out_features, int64_t in_features, int threads) {
    const int64_t words = words_in<T>(in_features);
    const int64_t panels = (out_features + kPanelColumns - 1) / kPanelColumns;
    const int64_t bytes = panels * words * kPanelColumns * (int64_t)sizeof(word);
    // One row streams the whole weight: huge pages spare the address translation. A hint, so its failure is none.
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t first = ((uintptr_t)packed + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = ((uintptr_t)packed + bytes) & ~(kHugePage - 1);
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
        word* target = packed + panel * words * kPanelColumns;
        const word* rows[kPanelColumns];
        const int64_t first_row = panel * kPanelColumns;
        for (int64_t i = 0; i < kPanelColumns; ++i) {
            const int64_t row = first_row + i < out_features ? first_row + i : out_features - 1;
            rows[i] = (const word*)(weight + row * in_features);
        }
        pack_panel(rows, words, target);
    }
}

template <typename T, typename Out>
void linear_block(const T* x, const word* panel, const T* bias, Out* out, int64_t rows, int64_t in_features,
                  int64_t out_features, int64_t column) {
    const int64_t words = words_in<T>(in_features), columns = out_features - column;
    f32x16 start[2] = {};
    if (bias) {
        start[0] = load(bias + column, columns);
        if (columns > kLanes) start[1] = load(bias + column + kLanes, columns - kLanes);
    }
    for_row_tiles(rows, [&](auto tile_rows, int64_t first_row) {
        f32x16 sums[tile_rows][2];
        for (auto& row : sums) row[0] = start[0], row[1] = start[1];
        multiply_panel<T>(sums, (const word*)(x + first_row * in_features), words, panel, words);
        for (int row = 0; row < tile_rows; ++row) {
            Out* target = out + (first_row + row) * out_features + column;
            store(target, sums[row][0], columns);
            if (columns > kLanes) store(target + kLanes, sums[row][1], columns - kLanes);
        }
    });
}

template <typename T, typename Out>
void linear(const T* x, const word* packed, const T* bias, Out* out, int64_t rows, int64_t in_features,
            int64_t out_features, int threads) {
    const int64_t panels = (out_features + kPanelColumns - 1) / kPanelColumns;
    const int64_t panel_words = words_in<T>(in_features) * kPanelColumns;
    const int64_t fitting = kRowBlockBytes / (in_features * (int64_t)sizeof(T)) / kRowTile * kRowTile;
    const int64_t block_rows = std::max<int64_t>(fitting, kRowTile);
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first_row = rows * block / blocks, end_row = rows * (block + 1) / blocks;  // equal shares
            linear_block(x + first_row * in_features, packed + panel * panel_words, bias,
                         out + first_row * out_features, end_row - first_row, in_features, out_features,
                         panel * kPanelColumns);
        }
    }
}

}  // namespace
}  // namespace headrace

#define DEFINE_LINEAR(NAME, T, OUT)                                                                                  \
    extern "C" int headrace_##NAME(const void* x, const void* packed, const void* bias, void* out, int64_t rows,     \
                                   int64_t in_features, int64_t out_features, int threads) {                         \
        headrace::linear((const T*)x, (const headrace::word*)packed, (const T*)bias, (OUT*)out, rows, in_features,   \
                         out_features, threads);                                                                     \
        return headrace::kOk;                                                                                        \
    }
#define DEFINE(SUFFIX, T)                                                                                            \
    extern "C" int headrace_pack_weight_##SUFFIX(const void* weight, void* packed, int64_t out_features,             \
                                                 int64_t in_features, int threads) {                                 \
        headrace::pack_weight((const T*)weight, (headrace::word*)packed, out_features, in_features, threads);        \
        return headrace::kOk;                                                                                        \
    }                                                                                                                \
    DEFINE_LINEAR(linear_##SUFFIX, T, T)                                                                             \
    DEFINE_LINEAR(linear_wide_##SUFFIX, T, float)
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
