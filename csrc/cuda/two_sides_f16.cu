// The row kernels for a student's logits in f16.
#include "launchers.h"

namespace kd {
bool launch_f16(const Rows& a, const Launch& l, int divergence, cudaStream_t stream) { return launch_rows<half>(a, l, divergence, stream); }
}  // namespace kd
