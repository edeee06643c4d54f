// How a batch is cut into pieces that threads take one after another.
//
// Where a context is cut depends on the sequence alone, never on the batch or the number of threads: a row's result is
// the same in whatever company it is computed.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention_tile.h"

namespace headrace {

constexpr int64_t kPieceRows = 96;      // query rows of a piece of a prompt: they share what is read into the L1
constexpr int64_t kFewQueries = 16;     // up to so many query tokens are a decode step, or drafts to be verified
constexpr int64_t kDecodeSpan = 256;    // shorter spans cost more in merging than they win in balance
constexpr int64_t kPrefillSpan = 16384;  // partial results take memory: chunk x heads x spans of the context
constexpr int64_t kPiecesPerThread = 2;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// Some query tokens of one sequence and some of its KV heads, over one span of the context.
struct Piece {
    int64_t sequence;
    int64_t first_head, num_heads;     // KV heads
    int64_t first_query, num_queries;  // query tokens, counted within the sequence
    int64_t first_position;            // position of first_query in the context
    int64_t begin, end;                // the span of context positions; begin is a multiple of kChunk
    int64_t cut, span;                 // the span of which cut this is, or cut -1: the span is all there is

    int64_t num_rows(int64_t group) const { return num_heads * num_queries * group; }
};

// Everything one layer's call shares among its pieces.
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
};

// Rows of a piece are ordered by KV head, then by query token, then by query head.
template <typename T>
T* output_row(const AttentionCall<T>& call, const Piece& piece, int64_t row) {
    const int64_t group = call.group(), rows_of_head = piece.num_queries * group;
    const int64_t head = piece.first_head + row / rows_of_head, query = row % rows_of_head / group;
    const int64_t token = call.query_starts[piece.sequence] + piece.first_query + query;
    return call.out + (token * call.num_heads + head * group + row % group) * call.view.head_dim;
}

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

// One row of one span's result.
struct Partial {
    float* output;
    float* maximum;
    float* sum;
};

template <typename T>
class AttentionPlan {
  public:
    AttentionPlan(const AttentionCall<T>& call, int64_t num_sequences, int threads)
        : view_(call.view), group_(call.group()), threads_(threads) {
        for (int64_t s = 0; s < num_sequences; ++s) plan_sequence(call, s, num_sequences);
        std::stable_sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) {
            return (a.end - a.begin) * a.num_queries > (b.end - b.begin) * b.num_queries;  // the longest first
        });
        partials_ = std::make_unique<Buffer<float>>(partial_rows_ * partial_stride());
        spans_left_ = std::make_unique<std::atomic<int64_t>[]>(cuts_.size());
        for (size_t i = 0; i < cuts_.size(); ++i) spans_left_[i] = cuts_[i].num_spans;
    }

    // The next piece for a thread that has ended `runs` runs; nullptr where there is none left in this run. The counter
    // is never reset: in each run it gives every piece once, and every thread one refusal.
    const Piece* take(int64_t runs) {
        const int64_t num_pieces = (int64_t)pieces_.size();
        const int64_t index = taken_.fetch_add(1, std::memory_order_relaxed) - runs * (num_pieces + threads_);
        return index < num_pieces ? &pieces_[index] : nullptr;
    }

    // What the thread that runs a piece will probably take next; the piece itself where there is nothing.
    const Piece& likely_after(const Piece& piece) const {
        const int64_t index = &piece - pieces_.data() + threads_;
        return index < (int64_t)pieces_.size() ? pieces_[index] : piece;
    }

    // Whether all other spans of the piece's cut are done, and their partial results visible here.
    bool is_last_span(const Piece& piece) {
        if (spans_left_[piece.cut].fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
        spans_left_[piece.cut].store(num_spans(piece), std::memory_order_relaxed);  // for the next layer
        return true;
    }

    Partial partial(const Piece& piece, int64_t span, int64_t row) {
        const int64_t index = cuts_[piece.cut].first_row + span * piece.num_rows(group_) + row;
        float* start = partials_->data() + index * partial_stride();
        return {start, start + padded_dim(), start + padded_dim() + 1};
    }

    int64_t num_spans(const Piece& piece) const { return cuts_[piece.cut].num_spans; }
    int64_t max_rows() const { return max_rows_; }
    int64_t padded_dim() const { return round_up(view_.head_dim, kLanes); }
    const CacheView& view() const { return view_; }

  private:
    struct Cut {
        int64_t first_row, num_spans;
    };

    int64_t partial_stride() const { return padded_dim() + kLanes; }

    void plan_sequence(const AttentionCall<T>& call, int64_t s, int64_t num_sequences) {
        const int64_t query_len = call.query_starts[s + 1] - call.query_starts[s], context_len = call.context_lens[s];
        const bool few = query_len <= kFewQueries;
        const int64_t span = few ? kDecodeSpan : kPrefillSpan;
        const int64_t queries = few ? kFewQueries : std::max<int64_t>(1, kPieceRows / group_);
        // One piece reads all heads of a block, which lie side by side, unless threads would go without.
        const int64_t spans = num_sequences * ((context_len + span - 1) / span);
        const int64_t parts = few ? std::clamp<int64_t>(kPiecesPerThread * threads_ / std::max<int64_t>(spans, 1), 1,
                                                        view_.num_kv_heads)
                                  : view_.num_kv_heads;
        for (int64_t first = 0; first < query_len; first += queries) {
            const int64_t count = std::min(queries, query_len - first), position = context_len - query_len + first;
            const int64_t begin = call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t head = view_.num_kv_heads * part / parts;
                const int64_t num_heads = view_.num_kv_heads * (part + 1) / parts - head;
                add({s, head, num_heads, first, count, position, round_down(begin, kChunk), position + count, -1, 0},
                    span);
            }
        }
    }

    // Spans begin at multiples of their length, whatever the window, so that rows meet the same ones in any call.
    void add(Piece piece, int64_t span) {
        const int64_t rows = piece.num_rows(group_), begin = piece.begin, end = piece.end;
        const int64_t num_spans = (end + span - 1) / span - begin / span;
        max_rows_ = std::max(max_rows_, rows);
        if (num_spans > 1) {
            piece.cut = (int64_t)cuts_.size();
            cuts_.push_back({partial_rows_, num_spans});
            partial_rows_ += rows * num_spans;
        }
        for (piece.span = 0; piece.span < num_spans; ++piece.span) {
            const int64_t first = round_down(begin, span) + piece.span * span;
            piece.begin = std::max(begin, first);
            piece.end = std::min(end, first + span);
            pieces_.push_back(piece);
        }
    }

    CacheView view_;
    int64_t group_, threads_;
    std::vector<Piece> pieces_;
    std::vector<Cut> cuts_;
    int64_t partial_rows_ = 0, max_rows_ = 0;
    std::unique_ptr<Buffer<float>> partials_;
    std::unique_ptr<std::atomic<int64_t>[]> spans_left_;  // of each cut, those not done in this run
    std::atomic<int64_t> taken_{0};
};

}  // namespace headrace
