// The threads that work on one step together: every one runs the same phases, and a barrier stands between two phases.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace headrace {

// A phase is tens of microseconds, so waiting threads spin; where a thread has lost its core, the others yield theirs.
class Barrier {
  public:
    // Returns when `size` threads have called it.
    void wait(int size) {
        if (size == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        constexpr int kSpins = 1 << 14;
        for (int spin = 0; turn_.load(std::memory_order_acquire) == turn; ++spin) {
            if (spin < kSpins) {
                relax();
            } else {
                sched_yield();
            }
        }
    }

  private:
    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
};

struct Range {
    int64_t begin, end;
};

// One thread's place among the others.
struct Team {
    int thread, size;
    Barrier* barrier;

    // Of the parallel region that calls it: OpenMP may have given fewer threads than were asked for.
    static Team of_region(Barrier* barrier) { return {omp_get_thread_num(), omp_get_num_threads(), barrier}; }

    // This thread's share of `count` equal pieces of work.
    Range share(int64_t count) const { return {count * thread / size, count * (thread + 1) / size}; }
    void wait() const { barrier->wait(size); }
};

}  // namespace headrace
