#include "pool.h"

namespace nightherd {

static constexpr int SPINS = 4000;  // some tens of microseconds; then the core is given up

struct NoThread {};

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads) {
    threads_.reserve(size_);
    const auto start = [](void* pool) -> void* {
        ((Pool*)pool)->work();
        return nullptr;
    };
    for (int i = 1; i < size_; ++i) {
        pthread_t made;
        if (pthread_create(&made, nullptr, start, this) != 0) {
            end();
            throw NoThread();
        }
        threads_.push_back(made);
    }
}

Pool::~Pool() { end(); }

void Pool::end() {
    stopping_ = true;
    begin();
    for (auto& thread : threads_) pthread_join(thread, nullptr);
}

void Pool::run_all(void (*body)(const void*), const void* of) {
    body_ = body;
    of_ = of;
    begin();
    body(of);
    meet();
}

void Pool::begin() {
    if (size_ == 1) return;
    step_.fetch_add(1);
    wake();
}

void Pool::meet() {
    if (size_ == 1) {
        next_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        next_.store(0, std::memory_order_relaxed);
        arrived_.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1);
        wake();
    } else {
        wait_for(phase_, phase);
    }
}

void Pool::work() {
    for (uint32_t step = 0;; ++step) {
        wait_for(step_, step);
        if (stopping_) return;
        body_(of_);
        meet();
    }
}

void Pool::wait_for(std::atomic<uint32_t>& what, uint32_t old) {
    for (int i = 0; i < SPINS; ++i) {
        if (what.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    // Who changes it looks for sleepers afterwards: one of the two sees what the other did.
    sleepers_.fetch_add(1);
    pthread_mutex_lock(&mutex_);
    while (what.load() == old) pthread_cond_wait(&changed_, &mutex_);
    pthread_mutex_unlock(&mutex_);
    sleepers_.fetch_sub(1);
}

void Pool::wake() {
    if (sleepers_.load() == 0) return;
    pthread_mutex_lock(&mutex_);
    pthread_mutex_unlock(&mutex_);
    pthread_cond_broadcast(&changed_);
}

}  // namespace nightherd
