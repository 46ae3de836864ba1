// Calls of the driver that launchers.h makes for a launch, counted by a runtime that records them.
#include <thread>
#include <vector>

#include "cuda/launchers.h"
#include "harness.h"

namespace {
using namespace kd;

void first_kernel(Rows) {}
void second_kernel(Rows) {}

const Launch kOneRead{true, 16, 4, 256, 160, 90000, 232448}, kTwoRead{false, 1, 0, 256, 40, 768, 0};

// Calls of the driver: attributes set, occupancy questions, launches.
struct Calls {
    int attributes, questions, launches;
    bool operator==(const Calls&) const = default;
};
template <class Run> Calls calls(Run&& run) {
    const Calls before{Driver::attributes, Driver::questions, Driver::launches};
    run();
    return {Driver::attributes - before.attributes, Driver::questions - before.questions, Driver::launches - before.launches};
}

int test(int) {
    Tests tests;
    const auto expect = [&](const char* what, bool holds) { tests([&] { return holds ? 0. : 2.; }, [&] { return what; }); };
    const auto repeated = [](void (*kernel)(Rows), const Launch& l) {
        return [=] { for (int i = 0; i < 3; ++i) launch(kernel, Rows{}, l, nullptr); };
    };

    std::vector<std::thread> threads;
    const Calls first = calls([&] {
        for (int i = 0; i < 8; ++i) threads.emplace_back(repeated(first_kernel, kOneRead));
        for (std::thread& t : threads) t.join();
    });
    expect("once for all threads", first == Calls{2, 1, 24});
    launch(first_kernel, Rows{}, kOneRead, nullptr);
    expect("no more persistent blocks than fit", Driver::blocks == unsigned(Driver::kFit * kOneRead.cluster));

    expect("once more for another kernel", calls(repeated(second_kernel, kOneRead)) == Calls{2, 1, 3});
    Launch smaller = kOneRead;
    smaller.cluster = 8;
    expect("once more for another cluster", calls(repeated(first_kernel, smaller)) == Calls{1, 1, 3});
    smaller.shared_bytes -= 2048;
    expect("once more for other shared memory", calls(repeated(first_kernel, smaller)) == Calls{1, 1, 3});
    Driver::device = 1;
    expect("once more for another device", calls(repeated(first_kernel, kOneRead)) == Calls{2, 1, 3});

    expect("nothing without clusters and much shared memory", calls(repeated(first_kernel, kTwoRead)) == Calls{0, 0, 3});
    expect("and all blocks", Driver::blocks == unsigned(kTwoRead.blocks));

    Driver::largest_cluster = 8, Driver::device = 2;
    bool could = true;
    const int cleared = Driver::cleared;
    expect("a cluster that does not fit is asked for once", calls([&] { for (int i = 0; i < 2; ++i) could = launch(first_kernel, Rows{}, kOneRead, nullptr); }) == Calls{2, 1, 0});
    expect("is refused, and its error cleared", !could && Driver::cleared == cleared + 1);
    expect("a smaller one is launched", launch(first_kernel, Rows{}, smaller, nullptr));
    return tests.status();
}

int mutate(int) { return 0; }  // there is no synchronisation call
}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, test, 0, mutate); }
