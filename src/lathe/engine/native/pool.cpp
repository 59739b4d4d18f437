#include "pool.h"

#include <chrono>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace lathe {

namespace {

using Clock = std::chrono::steady_clock;

// Between two steps Python chooses a token, which takes about as long.
constexpr int kIdleSpin = 150;
// Inside a step the others are at most one piece of work behind, unless the machine has taken their core away.
constexpr int kBarrierSpin = 60;

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

}  // namespace

void Signal::raise() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> hold(mutex_);
        changed_.notify_all();
    }
}

void Signal::wait_past(uint32_t seen, int spin_microseconds) {
    for (int i = 0; i < 64; ++i) {
        if (value() != seen) return;
        breathe();
    }
    const auto until = Clock::now() + std::chrono::microseconds(spin_microseconds);
    do {
        for (int i = 0; i < 16; ++i) {
            if (value() != seen) return;
            breathe();
        }
    } while (Clock::now() < until);
    std::unique_lock<std::mutex> hold(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    changed_.wait(hold, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::~Pool() {
    stopping_ = true;
    start_.raise();
    for (auto& thread : threads_) thread.join();
}

void Pool::serve(int number, uint32_t seen) {
    for (;;) {
        start_.wait_past(seen, kIdleSpin);
        seen = start_.value();
        if (stopping_) return;
        if (number >= active_) continue;
        work_(argument_, number);
        if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_ - 1) done_.raise();
    }
}

void Pool::run(int threads, void (*work)(void*, int), void* argument) {
    std::lock_guard<std::mutex> hold(one_at_a_time_);
    if (threads <= 1) {
        active_ = 1;
        work(argument, 0);
        return;
    }
    while (static_cast<int>(threads_.size()) < threads - 1) {
        const int number = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back(&Pool::serve, this, number, start_.value());
    }
    work_ = work;
    argument_ = argument;
    active_ = threads;
    arrived_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint32_t before = done_.value();
    start_.raise();
    work(argument, 0);
    done_.wait_past(before, kBarrierSpin);
}

void Pool::barrier() {
    if (active_ == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.raise();
    } else {
        passed_.wait_past(seen, kBarrierSpin);
    }
}

Pool& Pool::shared() {
    // Never destroyed: threads of a library must not be joined while the process ends. A child of fork() has none of
    // its parent's threads, so it starts over.
    static std::mutex guard;
    static Pool* pool = nullptr;
    static long owner = 0;
#if defined(__unix__) || defined(__APPLE__)
    const long process = static_cast<long>(getpid());
#else
    const long process = 0;
#endif
    std::lock_guard<std::mutex> hold(guard);
    if (pool == nullptr || owner != process) {
        pool = new Pool;
        owner = process;
    }
    return *pool;
}

}  // namespace lathe
