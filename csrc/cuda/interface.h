// Functions of the CUDA row kernels that the bindings call. Includes no CUDA header.
#pragma once
#include "../params.h"
#include "heuristics.h"

namespace kd {

// Launch all rows on the current device and the given stream, without waiting. Throw std::invalid_argument for arguments that no kernel
// takes, and std::runtime_error with the CUDA error's name if a launch fails.
void cuda_rows(const RowArguments&, void* stream);
void cuda_head_rows(const HeadArguments&, void* stream);
void cuda_softmax_rows(const SoftmaxArguments&, void* stream);

// Returns the limits of the current device.
const GpuLimits& limits_of_current();

}  // namespace kd
