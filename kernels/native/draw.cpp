// One token for each row of logits, by inverting the distribution that kernels/draw.py specifies.
//
// No sort: the rows' weights are whole numbers below 2^31, so a table with a place for each power of two, filled in one
// pass, tells among which weights a cut falls, and only those few are looked at one by one. Sums of whole numbers are
// exact, hence the same in whatever order they are taken.
#include <array>
#include <cmath>
#include <vector>

#include "api.h"
#include "simd.h"

namespace headrace {
namespace {

constexpr float kLikeliest = 1073741824.0f;  // 2^30, the likeliest token's weight
constexpr int kPowers = 31;
constexpr int kTables = 4;
constexpr float kHeavy = 65536.0f;
constexpr int64_t kChunk = 1024;  // tokens whose sum is taken before it is known whether the drawn one is among them

struct Candidate {
    float score, weight;
    double measure;
};

struct Cut {
    int64_t top_k;
    double top_p, min_p;
    bool any() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

int power_of(float weight) {  // weight >= 1
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return (int)(bits >> 23) - 127;
}

// The greatest score at which the measures of all candidates of that score or a higher one reach `wanted`, given that
// `before` precedes them. The least score where they never do.
float score_reaching(std::vector<Candidate>& candidates, double before, double wanted) {
    auto begin = candidates.begin(), end = candidates.end();
    float last = begin->score;
    while (begin != end) {
        const float pivot = (begin + (end - begin) / 2)->score;
        double above = 0, same = 0;
        const auto middle = std::partition(begin, end, [&](const Candidate& c) {
            const bool is_above = c.score > pivot;
            if (is_above) above += c.measure;
            return is_above;
        });
        const auto rest = std::partition(middle, end, [&](const Candidate& c) {
            const bool is_same = c.score == pivot;
            if (is_same) same += c.measure;
            return is_same;
        });
        if (middle != begin && before + above >= wanted) {
            end = middle;
            continue;
        }
        last = pivot;
        if (before + above + same >= wanted) return pivot;
        before += above + same;
        begin = rest;
    }
    return last;
}

// One row at a time; the memory serves all rows of a thread. Only tokens that can be drawn, of weight 1 or more, are kept.
class Row {
  public:
    explicit Row(int64_t vocab_size)
        : vocab_size_(vocab_size), ids_(vocab_size + kLanes), scores_(vocab_size + kLanes), weights_(vocab_size + kLanes) {}

    int64_t draw(const float* logits, float temperature, const Cut& cut, double uniform) {
        weigh(logits, temperature);
        if (count_ == 0) return 0;  // nothing is possible
        return ids_[invert(cut.any() ? floor_of(cut) : -std::numeric_limits<float>::infinity(), uniform)];
    }

  private:
    void weigh(const float* logits, float temperature) {
        f32x16 lanes = splat(-std::numeric_limits<float>::infinity());
        int64_t i = 0;
        for (; i + kLanes <= vocab_size_; i += kLanes) lanes = maximum(lanes, load(logits + i));
        float largest = max_lane(lanes);
        for (; i < vocab_size_; ++i) largest = std::max(largest, logits[i]);
        count_ = 0;
        for (i = 0; i < vocab_size_; i += kLanes) {
            const f32x16 scores = (load(logits + i, vocab_size_ - i) - largest) / temperature;
            // At least 0 and below 2^31: conversion to an integer and back rounds down.
            const i32x16 whole = __builtin_convertvector(exp(scores) * kLikeliest, i32x16);
            append(i, scores, __builtin_convertvector(whole, f32x16));
        }
    }

    // Keeps the tokens first, first + 1, ... that can be drawn; lanes beyond the vocabulary must not count.
    void append(int64_t first, f32x16 scores, f32x16 weights) {
        static constexpr i32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const i32x16 ids = kLane + (int32_t)first;
        const i32x16 live = (weights >= 1.0f) & (ids < (int32_t)vocab_size_);
#ifdef __AVX512F__
        const __mmask16 mask = _mm512_movepi32_mask((__m512i)live);
        // In a register and stored whole: compressing stores take a hundred cycles on some processors.
        _mm512_storeu_si512(ids_.data() + count_, _mm512_maskz_compress_epi32(mask, (__m512i)ids));
        _mm512_storeu_ps(scores_.data() + count_, _mm512_maskz_compress_ps(mask, (__m512)scores));
        _mm512_storeu_ps(weights_.data() + count_, _mm512_maskz_compress_ps(mask, (__m512)weights));
        count_ += __builtin_popcount(mask);
#else
        for (int lane = 0; lane < kLanes; ++lane) {
            ids_[count_] = ids[lane], scores_[count_] = scores[lane], weights_[count_] = weights[lane];
            count_ += live[lane] != 0;
        }
#endif
    }

    // Counts and sums of the weights of each power of two. Neighbours go to tables of their own: additions to one and the
    // same place wait for each other.
    void fill_table() {
        std::array<int64_t, kPowers> counts[kTables] = {};
        std::array<double, kPowers> sums[kTables] = {};
        for (int64_t i = 0; i < count_; ++i) {
            const int power = power_of(weights_[i]);
            ++counts[i % kTables][power];
            sums[i % kTables][power] += weights_[i];
        }
        for (int power = 0; power < kPowers; ++power) {
            counts_[power] = 0, sums_[power] = 0;
            for (int table = 0; table < kTables; ++table) {
                counts_[power] += counts[table][power];
                sums_[power] += sums[table][power];
            }
        }
    }

    // Forgets the tokens of weight below kHeavy where the cut falls above them; returns the weight of all. Most cuts keep few
    // tokens, and the table is what takes time.
    double drop_light(const Cut& cut) {
        int64_t total = 0, heavy = 0, num_heavy = 0;
        for (int64_t i = 0; i < count_; ++i) {
            const int64_t weight = (int32_t)weights_[i];
            const bool is_heavy = weights_[i] >= kHeavy;
            total += weight, heavy += is_heavy ? weight : 0, num_heavy += is_heavy;
        }
        const bool is_top_k = cut.top_k > 0 && cut.top_k < count_;
        const bool is_top_p = cut.top_p < 1.0 && (double)heavy >= cut.top_p * (double)total;
        if (is_top_k ? num_heavy > cut.top_k : is_top_p) {
            const int64_t before = count_;
            count_ = 0;
            for (int64_t i = 0; i < before; ++i) {
                ids_[count_] = ids_[i], scores_[count_] = scores_[i], weights_[count_] = weights_[i];
                count_ += weights_[i] >= kHeavy;
            }
        }
        return (double)total;
    }

    // The least score that is kept.
    float floor_of(const Cut& cut) {
        double kept = drop_light(cut);
        fill_table();
        float least = -std::numeric_limits<float>::infinity();
        if (cut.top_k > 0 && cut.top_k < count_) {
            double before = 0;
            const int power = power_reaching(counts_, (double)cut.top_k, before);
            gather(power, least, [](float) { return 1.0; });
            least = score_reaching(candidates_, before, (double)cut.top_k);
            kept = kept_from(power, least);
        }
        float floor = std::max((float)std::log(cut.min_p), least);
        if (cut.top_p < 1.0) {
            double before = 0;
            const double wanted = cut.top_p * kept;
            const int power = power_reaching(sums_, wanted, before);
            gather(power, least, [](float weight) { return (double)weight; });
            floor = std::max(floor, score_reaching(candidates_, before, wanted));
        }
        return floor;
    }

    // The highest power of two down to which a table's entries reach `wanted`; `before`: the sum of those above it.
    template <typename Table>
    static int power_reaching(const Table& table, double wanted, double& before) {
        int lowest = kPowers - 1;
        double sum = 0;
        for (int power = kPowers - 1; power >= 0; --power) {
            if (table[power] == 0) continue;
            lowest = power;
            before = sum;
            sum += (double)table[power];
            if (sum >= wanted) break;
        }
        return lowest;
    }

    template <typename Measure>
    void gather(int power, float least, Measure measure) {
        candidates_.clear();
        for (int64_t i = 0; i < count_; ++i) {
            if (power_of(weights_[i]) == power && scores_[i] >= least) {
                candidates_.push_back({scores_[i], weights_[i], measure(weights_[i])});
            }
        }
    }

    // The sum of the weights whose score is `least` or more; their powers of two are `power` or more.
    double kept_from(int power, float least) const {
        double sum = 0;
        for (int above = power + 1; above < kPowers; ++above) sum += sums_[above];
        for (const Candidate& candidate : candidates_) {
            if (candidate.score >= least) sum += candidate.weight;
        }
        return sum;
    }

    // The place, among the tokens that can be drawn, of the first whose running sum exceeds uniform * total.
    int64_t invert(float floor, double uniform) {
        chunk_sums_.clear();
        double total = 0;
        for (int64_t begin = 0; begin < count_; begin += kChunk) {
            const int64_t end = std::min(begin + kChunk, count_);
            uint64_t sum = 0;
            for (int64_t i = begin; i < end; ++i) {
                weights_[i] = scores_[i] >= floor ? weights_[i] : 0.0f;
                sum += (uint64_t)(int64_t)(int32_t)weights_[i];
            }
            total += (double)sum;
            chunk_sums_.push_back(total);
        }
        const double target = std::min(std::floor(uniform * total), total - 1.0);  // the product may round up to the total
        const auto chunk = std::upper_bound(chunk_sums_.begin(), chunk_sums_.end(), target);
        int64_t i = (chunk - chunk_sums_.begin()) * kChunk;
        double sum = chunk == chunk_sums_.begin() ? 0.0 : *(chunk - 1);
        for (; i + 1 < count_; ++i) {
            sum += weights_[i];
            if (sum > target) break;
        }
        return i;
    }

    int64_t vocab_size_, count_ = 0;
    std::vector<int32_t> ids_;
    std::vector<float> scores_, weights_;
    std::array<int64_t, kPowers> counts_{};
    std::array<double, kPowers> sums_{};
    std::vector<Candidate> candidates_;
    std::vector<double> chunk_sums_;
};

}  // namespace
}  // namespace headrace

extern "C" int headrace_draw_f32(const float* logits, const float* temperatures, const int64_t* top_k,
                                 const double* top_p, const double* min_p, const double* uniforms, int64_t* tokens,
                                 int64_t num_rows, int64_t vocab_size, int threads) {
    // All threads or one: a team of another size would end the surplus threads, and the next call start them again.
#pragma omp parallel num_threads(num_rows > 1 ? threads : 1)
    {
        headrace::Row row(vocab_size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_rows; ++i) {
            tokens[i] = row.draw(logits + i * vocab_size, temperatures[i], {top_k[i], top_p[i], min_p[i]}, uniforms[i]);
        }
    }
    return headrace::kOk;
}
