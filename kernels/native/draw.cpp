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
constexpr int64_t kChunk = 1024;  // tokens whose sum is taken before it is known whether the drawn one is among them

struct Candidate {
    float score;
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

// One row at a time; the memory serves all rows of a thread.
class Row {
  public:
    explicit Row(int64_t vocab_size) : weights_(vocab_size) {}

    int64_t draw(const float* logits, float temperature, const Cut& cut, double uniform) {
        weigh(logits, temperature);
        const float floor = cut.any() ? floor_of(logits, cut) : -std::numeric_limits<float>::infinity();
        return invert(logits, floor, uniform);
    }

  private:
    int64_t size() const { return (int64_t)weights_.size(); }
    float score(const float* logits, int64_t i) const { return (logits[i] - largest_) / temperature_; }

    void weigh(const float* logits, float temperature) {
        temperature_ = temperature;
        f32x16 largest = splat(-std::numeric_limits<float>::infinity());
        int64_t i = 0;
        for (; i + kLanes <= size(); i += kLanes) largest = maximum(largest, load(logits + i));
        largest_ = max_lane(largest);
        for (; i < size(); ++i) largest_ = std::max(largest_, logits[i]);
        for (i = 0; i < size(); i += kLanes) {
            const f32x16 scores = (load(logits + i, size() - i) - largest_) / temperature;
            // At least 0 and below 2^31: conversion to an integer and back rounds down.
            const i32x16 whole = __builtin_convertvector(exp(scores) * kLikeliest, i32x16);
            store(weights_.data() + i, __builtin_convertvector(whole, f32x16), size() - i);
        }
    }

    // Counts and sums of the weights of each power of two.
    void fill_table() {
        counts_.fill(0);
        sums_.fill(0);
        for (const float weight : weights_) {
            if (weight < 1.0f) continue;
            const int power = power_of(weight);
            ++counts_[power];
            sums_[power] += weight;
        }
    }

    // The least score that is kept.
    float floor_of(const float* logits, const Cut& cut) {
        fill_table();
        float floor = (float)std::log(cut.min_p);
        double kept = 0;
        for (const double sum : sums_) kept += sum;
        float least = -std::numeric_limits<float>::infinity();
        if (cut.top_k > 0) {
            double before = 0;
            const int power = power_reaching(counts_, (double)cut.top_k, before);
            gather(logits, power, least, [](float) { return 1.0; });
            if (before + (double)candidates_.size() >= (double)cut.top_k) {
                least = score_reaching(candidates_, before, (double)cut.top_k);
                kept = kept_from(logits, power, least);
            }
        }
        floor = std::max(floor, least);
        if (cut.top_p < 1.0) {
            double before = 0;
            const double wanted = cut.top_p * kept;
            const int power = power_reaching(sums_, wanted, before);
            gather(logits, power, least, [](float weight) { return (double)weight; });
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
    void gather(const float* logits, int power, float least, Measure measure) {
        candidates_.clear();
        for (int64_t i = 0; i < size(); ++i) {
            if (weights_[i] < 1.0f || power_of(weights_[i]) != power) continue;
            const float s = score(logits, i);
            if (s >= least) candidates_.push_back({s, measure(weights_[i])});
        }
    }

    // The sum of the weights whose score is `least` or more; their powers of two are `power` or more.
    double kept_from(const float* logits, int power, float least) {
        double sum = 0;
        for (int above = power + 1; above < kPowers; ++above) sum += sums_[above];
        for (int64_t i = 0; i < size(); ++i) {
            if (weights_[i] >= 1.0f && power_of(weights_[i]) == power && score(logits, i) >= least) sum += weights_[i];
        }
        return sum;
    }

    // The first token whose running sum exceeds uniform * total.
    int64_t invert(const float* logits, float floor, double uniform) {
        chunk_sums_.clear();
        double total = 0;
        for (int64_t begin = 0; begin < size(); begin += kChunk) {
            const int64_t end = std::min(begin + kChunk, size());
            uint64_t sum = 0;
            for (int64_t i = begin; i < end; ++i) {
                if (!(score(logits, i) >= floor)) weights_[i] = 0;
                sum += (uint64_t)(uint32_t)weights_[i];
            }
            total += (double)sum;
            chunk_sums_.push_back(total);
        }
        const double target = std::min(std::floor(uniform * total), total - 1.0);  // the product may round up to the total
        const auto chunk = std::upper_bound(chunk_sums_.begin(), chunk_sums_.end(), target);
        int64_t i = (chunk - chunk_sums_.begin()) * kChunk;
        double sum = chunk == chunk_sums_.begin() ? 0.0 : *(chunk - 1);
        for (; i + 1 < size(); ++i) {
            sum += weights_[i];
            if (sum > target) break;
        }
        return i;
    }

    std::vector<float> weights_;
    std::array<int64_t, kPowers> counts_{};
    std::array<double, kPowers> sums_{};
    std::vector<Candidate> candidates_;
    std::vector<double> chunk_sums_;
    float largest_ = 0, temperature_ = 1;
};

}  // namespace
}  // namespace headrace

extern "C" int headrace_draw_f32(const float* logits, const float* temperatures, const int64_t* top_k,
                                 const double* top_p, const double* min_p, const double* uniforms, int64_t* tokens,
                                 int64_t num_rows, int64_t vocab_size, int threads) {
#pragma omp parallel num_threads(std::min<int64_t>(threads, num_rows))
    {
        headrace::Row row(vocab_size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_rows; ++i) {
            tokens[i] = row.draw(logits + i * vocab_size, temperatures[i], {top_k[i], top_p[i], min_p[i]}, uniforms[i]);
        }
    }
    return headrace::kOk;
}
