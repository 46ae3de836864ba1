// Distributes work item by item to threads with separate scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace kd {

// Calls work(item, scratch) for every item, on up to `threads` threads. Threads take items one by one, because cores differ in speed.
template <class Work> void hand_out(int64_t items, int64_t threads, size_t scratch_bytes, Work&& work_on) {
    // Allocated here instead of in the threads, so that running out of memory can be reported.
    struct Free {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::vector<std::unique_ptr<void, Free>> scratch;
    for (int64_t i = 0; i < std::max<int64_t>(std::min(threads, items), 1); ++i)
        scratch.emplace_back(::operator new(scratch_bytes, std::align_val_t(64)));

    std::atomic<int64_t> next{0};
    const auto work = [&](void* memory) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work_on(item, memory);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(scratch.size());
    try {
        for (size_t i = 1; i < scratch.size(); ++i) helpers.emplace_back(work, scratch[i].get());
    } catch (const std::system_error&) {
        // Thread creation failed: the existing threads do the work.
    }
    work(scratch[0].get());
    for (std::thread& t : helpers) t.join();
}

}  // namespace kd
