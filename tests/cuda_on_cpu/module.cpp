// The CUDA row kernels of two sides for Python: their host code and kernels, run on CPU fibers and memory of the host.
#include <pybind11/pybind11.h>

#include "cuda/interface.h"
#include "cuda_on_cpu.h"
#include "cuda_runtime.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
    pybind11::module_::import("kdkernels._C");  // defines RowArguments
    static bool one_read;                       // the last launch had clusters
    Driver::run = [](const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
        one_read = config.numAttrs;
        emu::Launch launch;
        launch.cluster_size = one_read ? int(config.attrs->val.clusterDim.x) : 1;
        launch.clusters = int(config.gridDim.x) / launch.cluster_size;
        launch.threads = int(config.blockDim.x), launch.shared_bytes = config.dynamicSmemBytes;
        emu::launch(launch, kernel);
    };
    m.def(
        "rows",
        [](const kd::RowArguments& arguments, bool clusters) {
            Driver::device = clusters ? 0 : Driver::kAmpere;
            kd::cuda_rows(arguments, nullptr);
            return one_read;
        },
        pybind11::arg("arguments"), pybind11::arg("clusters"),
        "Run rows as on a GPU with or without clusters. Returns whether the one-read kernel ran.");
}
