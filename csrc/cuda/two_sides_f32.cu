// The row kernels for a student's logits in f32.
#include "launchers.h"

namespace kd {
bool launch_f32(const Rows& a, const Launch& l, int divergence, cudaStream_t stream) {
    return launch_rows<float>(a, l, divergence, stream);
}
}  // namespace kd
