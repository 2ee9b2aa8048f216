// Threads that go through the phases of a step together.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace nightherd {

class Pool {
  public:
    explicit Pool(int threads) : size_(threads < 1 ? 1 : threads) {
        for (int i = 1; i < size_; ++i) threads_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stopping_ = true;
        begin();
        for (auto& thread : threads_) thread.join();
    }

    // Runs `body` on all threads, the caller's included; returns when all have ended. Within it
    // every thread calls `each` the same number of times.
    void run(const std::function<void()>& body) {
        body_ = &body;
        begin();
        body();
        meet();
    }

    // Calls `task(0)` to `task(count - 1)`, shared out among the threads, then waits for all.
    template <class Task>
    void each(int count, const Task& task) {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        meet();
    }

  private:
    static constexpr int SPINS = 4000;  // some tens of microseconds; then the core is given up

    static void wait_for(std::atomic<uint32_t>& what, uint32_t old) {
        for (int i = 0; i < SPINS; ++i) {
            if (what.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        while (what.load(std::memory_order_acquire) == old) what.wait(old, std::memory_order_acquire);
    }

    void begin() {
        if (size_ == 1) return;
        step_.fetch_add(1, std::memory_order_release);
        step_.notify_all();
    }

    void meet() {
        if (size_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            next_.store(0, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            phase_.fetch_add(1, std::memory_order_release);
            phase_.notify_all();
        } else {
            wait_for(phase_, phase);
        }
    }

    void work() {
        for (uint32_t step = 0;; ++step) {
            wait_for(step_, step);
            if (stopping_) return;
            (*body_)();
            meet();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    const std::function<void()>* body_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> step_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> next_{0};
};

}  // namespace nightherd
