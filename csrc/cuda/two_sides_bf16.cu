// The row kernels for a student's logits in bf16.
#include "launchers.h"

namespace kd {
bool launch_bf16(const Rows& a, const Launch& l, int divergence, cudaStream_t stream) {
    return launch_rows<bf16>(a, l, divergence, stream);
}
}  // namespace kd
