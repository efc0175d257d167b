// Threads that wait for work: a region runs once in each of them, and its loops are shared piece by piece.
//
// A thread that waits spins for about 50 microseconds and then sleeps or yields, so that engines on the same
// cores all get on. One region runs at a time; whoever comes meanwhile waits.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include "tiles.h"

constexpr int LOOPS = 32;    // most loops of a region
constexpr int SPINS = 4000;  // pauses, about 50 microseconds
constexpr uint64_t SIZES = 1 << 16;

static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team {
  public:
    // Run ``region(member)`` in ``threads`` threads, of which the caller is one.
    template <class Region> void run(int threads, Region &&region);

    // The same in the threads of the OpenMP that torch has loaded, where there is one: behind an operator of torch's
    // they spin for milliseconds, and would keep ours from the processor.
    template <class Region> void run_between_operators(int threads, Region &&region);

    // A forked child has none of its parent's threads, and OpenMP waits for them for ever.
    bool forked = false;

    // A thread inside a region.
    struct Member {
        Team &team;
        int number;
        int next = 0;

        int64_t threads() const { return team.size; }

        // Share [0, count) in pieces of ``piece``; all wait for the last one.
        template <class Body> void loop(int64_t count, int64_t piece, Body &&body) {
            auto &counter = team.counters[next++];
            for (int64_t begin; (begin = counter.fetch_add(piece, std::memory_order_relaxed)) < count;)
                body(begin, std::min(begin + piece, count));
            team.meet();
        }
    };

  private:
    void grow(int threads);
    void work(int number);
    void meet();

    std::mutex alone, asleep;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::function<void(int)> job;
    std::atomic<uint64_t> generation{0};  // regions so far, times SIZES, plus the threads of the newest
    std::atomic<int> size{1};
    std::atomic<int> met{0};
    std::atomic<uint32_t> meeting{0};
    std::atomic<int64_t> counters[LOOPS];
};

inline void Team::meet() {
    const uint32_t now = meeting.load(std::memory_order_acquire);
    const int all = size;  // of this region: once all have met, the next one may have another
    if (met.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
        met.store(0, std::memory_order_relaxed);
        meeting.store(now + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; meeting.load(std::memory_order_acquire) == now; ++spins)
        spins < SPINS ? relax() : static_cast<void>(sched_yield());
}

inline void Team::work(int number) {
    for (uint64_t seen = 0;;) {
        uint64_t current;
        for (int spins = 0; (current = generation.load(std::memory_order_acquire)) == seen; ++spins) {
            relax();
            if (spins < SPINS) continue;
            std::unique_lock<std::mutex> lock(asleep);
            wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
        }
        seen = current;
        if (number < static_cast<int>(current % SIZES)) {
            job(number);
            meet();
        }
    }
}

inline void Team::grow(int threads) {
    while (static_cast<int>(workers.size()) < threads - 1) {
        const int number = static_cast<int>(workers.size()) + 1;
        workers.emplace_back([this, number] { work(number); });
        workers.back().detach();
    }
}

template <class Region> void Team::run(int threads, Region &&region) {
    std::lock_guard<std::mutex> lock(alone);
    grow(threads);
    for (auto &counter : counters) counter.store(0, std::memory_order_relaxed);
    job = [&](int number) {
        Member member{*this, number};
        region(member);
        release_tiles();
    };
    size = threads;
    {
        std::lock_guard<std::mutex> awake(asleep);
        const uint64_t regions = generation.load(std::memory_order_relaxed) / SIZES + 1;
        generation.store(regions * SIZES + static_cast<uint64_t>(threads), std::memory_order_release);
    }
    if (threads > 1) wake.notify_all();
    job(0);
    meet();
}

// A function of the OpenMP that is loaded, or null.
template <class Function> static inline Function *openmp(const char *name) {
    void *library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function *>(dlsym(library, name)) : nullptr;
}

template <class Region> void Team::run_between_operators(int threads, Region &&region) {
    static auto *const parallel = openmp<void(void (*)(void *), void *, unsigned, unsigned)>("GOMP_parallel");
    static auto *const number = openmp<int()>("omp_get_thread_num"), *const all = openmp<int()>("omp_get_num_threads");
    if (forked || !parallel || !number || !all) return run(threads, region);
    std::lock_guard<std::mutex> lock(alone);
    for (auto &counter : counters) counter.store(0, std::memory_order_relaxed);
    auto job = [&] {
        size.store(all(), std::memory_order_relaxed);  // which may be fewer than asked for, inside another region
        Member member{*this, number()};
        region(member);
        meet();
    };
    parallel([](void *own) { (*static_cast<decltype(job) *>(own))(); }, &job, static_cast<unsigned>(threads), 0);
}

// The team of this process. A forked child has none of its parent's threads and begins with a team of its own.
inline Team *current_team = [] {
    pthread_atfork(nullptr, nullptr, [] { current_team = new Team, current_team->forked = true; });
    return new Team;
}();
inline Team &team() { return *current_team; }
