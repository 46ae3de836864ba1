// Choice of the compiled instruction set and the number of threads.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../divergence.h"
#include "rows.h"
#include "threads.h"

namespace kd {
namespace {

constexpr int64_t kColumnsPerThread = 1 << 16;  // with fewer, starting a thread (tens of microseconds) costs more than it saves

struct Target {
    const char* name;
    bool (*supported)();
    void (*rows)(const RowArguments&, int64_t, int64_t, void*);
    void (*head_row)(const HeadArguments&, int64_t, void*);
    void (*softmax_row)(const SoftmaxArguments&, int64_t, void*);
};

const Target kTargets[] = {
#if defined(__x86_64__)
    {"avx512", [] { return bool(__builtin_cpu_supports("x86-64-v4")); }, avx512::rows, avx512::head_row, avx512::softmax_row},
    {"avx2", [] { return bool(__builtin_cpu_supports("x86-64-v3")); }, avx2::rows, avx2::head_row, avx2::softmax_row},
#endif
    {"baseline", [] { return true; }, baseline::rows, baseline::head_row, baseline::softmax_row},
};

const Target& target(const char* isa) {
    for (const Target& t : kTargets)
        if (t.supported() && (!isa || !std::strcmp(t.name, isa))) return t;
    throw std::invalid_argument(std::string("this processor or build has no instruction set ") + isa);
}

// Calls work(row, scratch) for every row, with a number of threads that suits the amount of work.
template <class Work> void for_rows(int64_t rows, int64_t vocab, size_t scratch_bytes, int threads, Work&& work_on) {
    if (rows <= 0 || vocab <= 0) return;
    hand_out(rows, std::min<int64_t>(threads, rows * vocab / kColumnsPerThread + 1), scratch_bytes, work_on);
}

size_t element(bool double_precision) { return double_precision ? sizeof(double) : sizeof(float); }

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
    const Target& chosen = target(isa);
    const size_t bytes = size_t(kScratchRows * scratch_width(a.vocab)) * element(a.double_precision);
    for_rows(a.rows, a.vocab, bytes, threads, [&](int64_t row, void* scratch) { chosen.rows(a, row, row + 1, scratch); });
}

void cpu_head_rows(const HeadArguments& a, int threads, const char* isa) {
    if (a.num_top < 0 || a.num_top > a.vocab) throw std::invalid_argument("the number of the largest must be between 0 and the vocabulary");
    const Target& chosen = target(isa);
    const size_t bytes = size_t(head_scratch(a)) * element(a.double_precision);
    for_rows(a.rows, a.vocab, bytes, threads, [&](int64_t row, void* scratch) { chosen.head_row(a, row, scratch); });
}

void cpu_softmax_rows(const SoftmaxArguments& a, int threads, const char* isa) {
    const Target& chosen = target(isa);
    const size_t bytes = size_t(2 * scratch_width(a.vocab)) * element(a.double_precision);
    for_rows(a.rows, a.vocab, bytes, threads, [&](int64_t row, void* scratch) { chosen.softmax_row(a, row, scratch); });
}

}  // namespace kd
