// Which of the compiled instruction sets runs, and on how many threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "rows.h"

namespace kd {
namespace {

constexpr int kDivergences = 10;
constexpr int64_t kColumnsPerThread = 1 << 16;  // fewer are not worth starting a thread (tens of microseconds) for

struct Target {
    const char* name;
    bool (*supported)();
    void (*rows)(const RowArguments&, int64_t, int64_t, void*);
};

const Target kTargets[] = {
#if defined(__x86_64__)
    {"avx512", [] { return bool(__builtin_cpu_supports("x86-64-v4")); }, avx512::rows},
    {"avx2", [] { return bool(__builtin_cpu_supports("x86-64-v3")); }, avx2::rows},
#endif
    {"baseline", [] { return true; }, baseline::rows},
};

const Target& target(const char* isa) {
    for (const Target& t : kTargets)
        if (t.supported() && (!isa || !std::strcmp(t.name, isa))) return t;
    throw std::invalid_argument(std::string("this processor or build has no instruction set ") + isa);
}

}  // namespace

const char* const* cpu_isas() {
    static const auto names = [] {
        std::vector<const char*> list;
        for (const Target& t : kTargets)
            if (t.supported()) list.push_back(t.name);
        list.push_back(nullptr);
        return list;
    }();
    return names.data();
}

void cpu_rows(const RowArguments& a, int threads, const char* isa) {
    if (a.divergence < 0 || a.divergence >= kDivergences)
        throw std::invalid_argument("no divergence has the id " + std::to_string(a.divergence));
    if (a.rows <= 0 || a.vocab <= 0) return;
    const Target& chosen = target(isa);
    const int64_t useful = std::min<int64_t>({threads, a.rows, a.rows * a.vocab / kColumnsPerThread + 1});
    const size_t bytes = size_t(kScratchRows * scratch_width(a.vocab)) * (a.double_precision ? sizeof(double) : sizeof(float));
    // Allocated here, where running out of memory can still be reported: not in a thread.
    struct Free { void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); } };
    std::vector<std::unique_ptr<void, Free>> scratch;
    for (int64_t i = 0; i < std::max<int64_t>(useful, 1); ++i) scratch.emplace_back(::operator new(bytes, std::align_val_t(64)));

    // Rows are handed out one by one: cores differ in speed, and a short last chunk should not wait for one of them.
    std::atomic<int64_t> next{0};
    const auto work = [&](void* memory) {
        for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < a.rows;) chosen.rows(a, row, row + 1, memory);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(scratch.size());
    try {
        for (size_t i = 1; i < scratch.size(); ++i) helpers.emplace_back(work, scratch[i].get());
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do the work.
    }
    work(scratch[0].get());
    for (std::thread& t : helpers) t.join();
}

}  // namespace kd
