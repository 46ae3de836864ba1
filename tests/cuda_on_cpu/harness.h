// Shared by the tests of the kernels: counted runs, removal of synchronisation calls, and main.
//   PROGRAM test [SEEDS] | mutate [SEEDS]; exit status 0: success
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

#include "cuda_on_cpu.h"

namespace {

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
    char line[1000];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

// Returns why a run failed; empty if it passed. `run` returns its largest ratio of an error to its tolerance.
template <class Run> std::string wrong(Run&& run) {
    try {
        if (const double worst = run(); worst > 1) return text("wrong result, %g of tolerance", worst);
    } catch (const emu::Fault& fault) { return fault.what(); }
    return {};
}

struct Tests {
    int runs = 0, failed = 0;
    template <class Run, class Describe> void operator()(Run&& run, Describe&& describe) {
        ++runs;
        const std::string what = wrong(run);
        if (what.empty()) return;
        ++failed;
        std::printf("FAIL %s: %s\n", std::string(describe()).c_str(), what.c_str());
    }
    int status() const {
        std::printf("%d runs, %d failed\n", runs, failed);
        return failed != 0;
    }
};

// Removes each synchronisation call of run(launch, seed) in turn. For each, the run must fail with some seed.
struct Mutations {
    int seeds, calls = 0, unnoticed = 0;
    template <class Run> void operator()(const std::string& name, Run&& run) {
        std::set<emu::Site> sites;
        emu::Launch recording;
        recording.seen = &sites;
        if (const std::string what = wrong([&] { return run(recording, 0u); }); !what.empty()) {
            std::printf("%s is wrong before any mutation: %s\n", name.c_str(), what.c_str());
            ++unnoticed;
        }
        for (const emu::Site& site : sites) {
            std::string noticed;
            emu::Launch launch;
            launch.removed = site;
            for (int seed = 0; seed <= seeds && noticed.empty(); ++seed) noticed = wrong([&] { return run(launch, unsigned(seed)); });
            ++calls, unnoticed += noticed.empty();
            std::printf("%s %s: %s line %d: %.90s\n", noticed.empty() ? "UNNOTICED" : "noticed  ", name.c_str(), site.call, site.line, noticed.c_str());
        }
    }
    int status() const {
        std::printf("%d synchronisation calls, %d removed without notice\n", calls, unnoticed);
        return unnoticed != 0;
    }
};

int run_main(int argc, char** argv, int (*test)(int seeds), int seeds, int (*mutate)(int seeds)) {
    const bool mutation = argc > 1 && std::string(argv[1]) == "mutate";
    if (argc > 2) seeds = std::atoi(argv[2]);
    else if (mutation) seeds = 40;
    return mutation ? mutate(seeds) : test(seeds);
}

}  // namespace
