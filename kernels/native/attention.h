// One piece of attention: some query tokens of one sequence and one KV head, over one span of the context.
//
// Flash style: the span is read in chunks of 64 tokens, straight from the paged cache; a chunk is packed into panels
// (keys as columns, values with token pairs in words), scored, and folded into a running maximum, sum and output.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "api.h"
#include "panel.h"

namespace headrace {

constexpr int kChunk = 64;               // context tokens packed and scored at a time
constexpr float kNothingSeen = -1e30f;   // the running maximum before any key; finite, so that differences exist

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Piece {
    int64_t sequence, kv_head;
    int64_t first_query, num_queries;  // query tokens, counted within the sequence
    int64_t first_position;            // position of first_query in the context
    int64_t begin, end;                // the span of context positions
    int64_t partial;                   // index of the first row of a partial result, or -1: the span is all there is
};

// Everything one call shares among its pieces.
template <typename T>
struct AttentionCall {
    const T* query;
    const T* cache;  // at the layer
    T* out;
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t max_blocks, num_heads, query_stride;
    float scale;
    int64_t window;
    CacheView view;

    int64_t group() const { return num_heads / view.num_kv_heads; }  // query heads that share a KV head
    int64_t context_begin(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

// Uninitialised memory that starts on a cache line, so that no vector straddles two.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count) : data_((T*)std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() { return data_; }
    const T* data() const { return data_; }

  private:
    T* data_;
};

// A thread's working memory for one piece. A row is one query token's one head: row = token * group + head in group.
template <typename T>
class PieceWorker {
  public:
    PieceWorker(const AttentionCall<T>& call, int64_t max_rows)
        : call_(call),
          head_dim_(call.view.head_dim),
          padded_dim_(round_up(head_dim_, kPanelColumns)),
          query_(max_rows * head_dim_),
          keys_(words_in<T>(head_dim_) * kChunk),
          values_(words_in<T>(kChunk) * padded_dim_),
          scores_(max_rows * kChunk),
          weights_(max_rows * kChunk),
          output_(max_rows * padded_dim_),
          maxima_(max_rows),
          sums_(max_rows),
          zeros_(head_dim_) {
        std::fill_n((char*)zeros_.data(), head_dim_ * sizeof(T), 0);
    }

    // Leaves the unnormalised output, maximum and sum of every row in this worker.
    void run(const Piece& piece) {
        start(piece);
        const T* keys[kChunk];
        const T* next_keys[kChunk];
        locate(piece, piece.begin, keys);
        for (int64_t begin = piece.begin; begin < piece.end; begin += kChunk) {
            const int64_t count = std::min<int64_t>(kChunk, piece.end - begin);
            const int64_t columns = round_up(count, kPanelColumns);
            locate(piece, begin + kChunk, next_keys);
            prefetch(next_keys, std::min<int64_t>(kChunk, piece.end - begin - kChunk));
            pack_chunk(keys, count, columns);
            score(columns);
            for (int64_t row = 0; row < rows_; ++row) {
                const int64_t position = piece.first_position + row / call_.group();
                const int64_t first = call_.window ? position - call_.window + 1 - begin : 0;
                fold_scores(row, first, std::min(count, position + 1 - begin), columns);
            }
            add_values(columns);
            std::copy_n(next_keys, kChunk, keys);
        }
    }

    int64_t rows() const { return rows_; }
    const float* output(int64_t row) const { return output_.data() + row * padded_dim_; }
    float maximum_of(int64_t row) const { return maxima_.data()[row]; }
    float sum_of(int64_t row) const { return sums_.data()[row]; }

  private:
    void start(const Piece& piece) {
        const int64_t group = call_.group();
        rows_ = piece.num_queries * group;
        for (int64_t token = 0; token < piece.num_queries; ++token) {
            const int64_t flat = call_.query_starts[piece.sequence] + piece.first_query + token;
            std::memcpy(query_.data() + token * group * head_dim_,
                        call_.query + flat * call_.query_stride + piece.kv_head * group * head_dim_,
                        group * head_dim_ * sizeof(T));
        }
        std::fill_n(output_.data(), rows_ * padded_dim_, 0.0f);
        std::fill_n(maxima_.data(), rows_, kNothingSeen);
        std::fill_n(sums_.data(), rows_, 0.0f);
    }

    // Where the keys of the chunk at `begin` lie. Columns past its end point at zeros, not at stale cache memory, whose
    // NaN would survive a weight of 0.
    void locate(const Piece& piece, int64_t begin, const T* (&keys)[kChunk]) const {
        const CacheView& view = call_.view;
        const int32_t* table = call_.block_tables + piece.sequence * call_.max_blocks;
        const int64_t count = std::min<int64_t>(kChunk, piece.end - begin);
        int64_t block = begin / view.block_size, offset = begin % view.block_size;
        for (int64_t i = 0; i < count; ++i) {
            keys[i] = call_.cache + view.token_offset(table[block], piece.kv_head, offset);
            if (++offset == view.block_size) ++block, offset = 0;
        }
        for (int64_t i = std::max<int64_t>(count, 0); i < kChunk; ++i) keys[i] = zeros_.data();
    }

    // Blocks lie far apart, and no hardware prefetcher follows a block table: ask for the next chunk in good time. Into
    // the L2 (the 2): the L1 has no room for two chunks, and measured slower.
    void prefetch(const T* const* keys, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t dim = 0; dim < head_dim_; dim += 64 / (int64_t)sizeof(T)) {
                __builtin_prefetch(keys[i] + dim, 0, 2);
                __builtin_prefetch(keys[i] + call_.view.value_offset + dim, 0, 2);
            }
        }
    }

    void pack_chunk(const T* const* keys, int64_t count, int64_t columns) {
        const T* values[kChunk];
        for (int64_t i = 0; i < columns; ++i) values[i] = i < count ? keys[i] + call_.view.value_offset : keys[i];
        for (int64_t column = 0; column < columns; column += kPanelColumns) {
            const word* const* rows = (const word* const*)(keys + column);
            pack_panel(rows, words_in<T>(head_dim_), keys_.data() + column * words_in<T>(head_dim_));
        }
        for (int64_t dim = 0; dim < head_dim_; dim += kLanes) pack_values(values, columns, dim);
    }

    // Dimensions dim to dim + 15 of all tokens: words of the values' panels, [head_dim / 32][token words][32].
    void pack_values(const T* const* values, int64_t columns, int64_t dim) {
        const int64_t panel_words = words_in<T>(columns) * kPanelColumns;
        word* target = values_.data() + dim / kPanelColumns * panel_words + dim % kPanelColumns;
        const int64_t count = head_dim_ - dim;
        for (int64_t token = 0; token < columns; token += 4 / sizeof(T), target += kPanelColumns) {
            u32x16 words = as_bits(load(values[token] + dim, count));
            if constexpr (sizeof(T) == 2) {  // the even token in the low half, where little-endian pairs have it
                words = (words >> 16) | as_bits(load(values[token + 1] + dim, count));
            }
            store_words(target, words);
        }
    }

    void score(int64_t columns) {
        const int64_t words = words_in<T>(head_dim_);
        for (int64_t column = 0; column < columns; column += kPanelColumns) {
            for_row_tiles(rows_, [&](auto tile_rows, int64_t first_row) {
                f32x16 sums[tile_rows][2] = {};
                const word* query = (const word*)(query_.data() + first_row * head_dim_);
                multiply_panel<T>(sums, query, words, keys_.data() + column * words, words);
                for (int row = 0; row < tile_rows; ++row) {
                    float* target = scores_.data() + (first_row + row) * kChunk + column;
                    store(target, sums[row][0] * call_.scale);
                    store(target + kLanes, sums[row][1] * call_.scale);
                }
            });
        }
    }

    // Turns one row's scores into weights, and rescales what the row has gathered; masks columns outside [first, end).
    void fold_scores(int64_t row, int64_t first, int64_t end, int64_t columns) {
        static constexpr i32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        float* scores = scores_.data() + row * kChunk;
        if (first > 0 || end < columns) {
            const f32x16 masked = splat(-std::numeric_limits<float>::infinity());
            const int32_t low = (int32_t)std::max<int64_t>(first, 0), high = (int32_t)std::max<int64_t>(end, 0);
            for (int32_t i = 0; i < columns; i += kLanes) {
                const i32x16 column = kLane + i;
                store(scores + i, (column >= low) & (column < high) ? load(scores + i) : masked);
            }
        }
        f32x16 largest = load(scores);
        for (int64_t i = kLanes; i < columns; i += kLanes) largest = maximum(largest, load(scores + i));
        const float row_maximum = std::max(maxima_.data()[row], max_lane(largest));
        f32x16 total = {};
        for (int64_t i = 0; i < columns; i += kLanes) {
            const f32x16 weight = round_to<T>(exp(load(scores + i) - row_maximum));
            store(weights_.data() + row * kChunk + i, weight);
            total += weight;
        }
        const float rescale = row_maximum == maxima_.data()[row] ? 1.0f : std::exp(maxima_.data()[row] - row_maximum);
        sums_.data()[row] = sums_.data()[row] * rescale + sum(total);
        maxima_.data()[row] = row_maximum;
        if (rescale == 1.0f) return;
        float* output = output_.data() + row * padded_dim_;
        for (int64_t i = 0; i < padded_dim_; i += kLanes) store(output + i, load(output + i) * rescale);
    }

    void add_values(int64_t columns) {
        const int64_t words = words_in<T>(columns);
        for (int64_t dim = 0; dim < padded_dim_; dim += kPanelColumns) {
            for_row_tiles(rows_, [&](auto tile_rows, int64_t first_row) {
                f32x16 sums[tile_rows][2];
                float* output = output_.data() + first_row * padded_dim_ + dim;
                for (int row = 0; row < tile_rows; ++row) {
                    sums[row][0] = load(output + row * padded_dim_);
                    sums[row][1] = load(output + row * padded_dim_ + kLanes);
                }
                const word* weights = (const word*)(weights_.data() + first_row * kChunk);
                multiply_panel<T>(sums, weights, words_in<T>(kChunk), values_.data() + dim * words, words);
                for (int row = 0; row < tile_rows; ++row) {
                    store(output + row * padded_dim_, sums[row][0]);
                    store(output + row * padded_dim_ + kLanes, sums[row][1]);
                }
            });
        }
    }

    const AttentionCall<T>& call_;
    int64_t head_dim_, padded_dim_, rows_ = 0;
    Buffer<T> query_;
    Buffer<uint32_t> keys_, values_;  // panels
    Buffer<float> scores_;            // [rows][kChunk]
    Buffer<T> weights_;               // [rows][kChunk]
    Buffer<float> output_;            // [rows][padded_dim]
    Buffer<float> maxima_, sums_;
    Buffer<T> zeros_;                 // one row of the cache that holds nothing
};

}  // namespace headrace
