// The CUDA row kernels as the bindings see them: no CUDA header.
#pragma once
#include "../params.h"
#include "heuristics.h"

namespace kd {

// Processes all rows on the current device and the given stream, asynchronously. Throws std::invalid_argument for arguments
// that no kernel takes, std::runtime_error with the CUDA error's name if a launch fails.
void cuda_rows(const RowArguments&, void* stream);
void cuda_head_rows(const HeadArguments&, void* stream);
void cuda_softmax_rows(const SoftmaxArguments&, void* stream);

const GpuLimits& limits_of_current();  // of the current device

}  // namespace kd
