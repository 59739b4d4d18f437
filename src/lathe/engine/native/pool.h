// A few threads that run one function together and wait for one another inside it.
//
// A step of a small model is some sixty pieces of work of ten to a hundred microseconds, so threads wait by spinning:
// waking a sleeping one costs as much as a piece. But a thread that spins keeps its core from whoever else wants it,
// so it spins for a bounded time and then sleeps until it is called.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace lathe {

// Something to wait for: a number that changes. Waits by spinning, then asleep.
class Signal {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void raise();
    void wait_past(uint32_t seen, int spin_microseconds);

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

class Pool {
public:
    ~Pool();
    // Runs work(argument, i) for i in 0 … threads - 1, number 0 on the caller's thread; returns when all are done.
    void run(int threads, void (*work)(void*, int), void* argument);
    // Inside `work`: nobody goes on before all have come.
    void barrier();

    static Pool& shared();  // one for the process; a child of fork() gets its own

private:
    void serve(int number, uint32_t seen);

    std::mutex one_at_a_time_;
    std::vector<std::thread> threads_;
    Signal start_, passed_, done_;
    std::atomic<int> arrived_{0}, finished_{0};
    int active_ = 1;
    bool stopping_ = false;
    void (*work_)(void*, int) = nullptr;
    void* argument_ = nullptr;
};

}  // namespace lathe
