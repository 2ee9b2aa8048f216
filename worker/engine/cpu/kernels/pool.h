// Threads that go through the phases of a step together.
//
// POSIX's, not C++'s: those need more of the C++ library than `new` and exceptions, and a compiler that
// brings no built one (zig) takes a minute to make it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "lines.h"

namespace nightherd {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();

    // Runs `body` on all threads, the caller's included; returns when all have ended. Within it
    // every thread calls `each` the same number of times.
    template <class Body>
    void run(const Body& body) {
        run_all([](const void* of) { (*(const Body*)of)(); }, &body);
    }

    // Calls `task(0)` to `task(count - 1)`, shared out among the threads, then waits for all.
    template <class Task>
    void each(int count, const Task& task) {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        meet();
    }

  private:
    void run_all(void (*body)(const void*), const void* of);
    void begin();
    void meet();
    void work();
    void wait_for(std::atomic<uint32_t>& what, uint32_t old);
    void wake();
    void end();

    const int size_;
    Lines<pthread_t> threads_;
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
    void (*body_)(const void*) = nullptr;
    const void* of_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> step_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> sleepers_{0};
};

}  // namespace nightherd
