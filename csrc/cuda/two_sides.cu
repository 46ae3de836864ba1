// Launches the two-side kernels for a call's arguments.
#include <algorithm>
#include <array>
#include <mutex>

#include "launchers.h"
#include "interface.h"

namespace kd {
namespace {

bool starts_at_16(const void* p, int64_t stride, Dtype dtype) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

RowSide side_of(const Side& s) {
    return {s.logits, static_cast<const float*>(s.bias), s.stride, s.dtype, float(s.scale), float(s.softcap)};
}

Rows rows_of(const RowArguments& r) {
    if (r.double_precision || r.student.dtype == Dtype::f64 || r.teacher.dtype == Dtype::f64 || (r.dz && r.dz_dtype == Dtype::f64))
        throw std::invalid_argument("the CUDA row kernels compute in float32");
    if (r.dz && r.dz_dtype != r.student.dtype && r.student.dtype != Dtype::f32)
        throw std::invalid_argument("dz must have the dtype of 16-bit logits");
    if (r.vocab >= int64_t(1) << 30) throw std::invalid_argument("a vocabulary of 2^30 or more");
    if (r.rows >= int64_t(1) << 31) throw std::invalid_argument("2^31 rows or more");
    Rows a{};
    a.student = side_of(r.student), a.teacher = side_of(r.teacher);
    a.dz = r.dz, a.labels = r.labels, a.weight = static_cast<const float*>(r.weight);
    a.state = static_cast<float*>(r.state), a.loss = static_cast<float*>(r.loss), a.stats = r.stats;
    a.rows = r.rows, a.dz_stride = r.dz_stride, a.state_stride = r.state_stride, a.stats_stride = r.stats_stride;
    a.vocab = int(r.vocab), a.dz_dtype = r.dz_dtype;
    a.a = float(r.a), a.b = float(r.b);
    a.inv_temperature = float(r.inv_temperature);
    a.value_scale = float(r.value_scale), a.slope_scale = float(r.slope_scale), a.ce_weight = float(r.ce_weight);
    a.dz_scale = float(r.dz_scale);
    a.normalizer = r.normalizer, a.stages = r.stages;
    a.aligned = starts_at_16(r.student.logits, r.student.stride, r.student.dtype) &&
                starts_at_16(r.teacher.logits, r.teacher.stride, r.teacher.dtype) && (!r.dz || starts_at_16(r.dz, r.dz_stride, r.dz_dtype));
    return a;
}

Launch plan(const GpuLimits& gpu, const Rows& a, int largest) {
    const bool together = (a.stages & kForward) == kForward;
    const bool possible = together && a.aligned && a.normalizer == Normalizer::softmax && a.student.dtype == a.teacher.dtype;
    return choose_launch(gpu, a.rows, a.vocab, size_of(a.student.dtype), possible, largest);
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "limits of the GPU");
    return value;
}

}  // namespace

const GpuLimits& limits_of_current() {
    constexpr int kDevices = 64;
    static std::array<std::once_flag, kDevices> once;
    static std::array<GpuLimits, kDevices> limits;
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    if (device >= kDevices) throw std::runtime_error("more than 64 GPUs in one process");
    std::call_once(once[device], [&] {
        limits[device] = {attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrMultiProcessorCount, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
    });
    return limits[device];
}

void cuda_rows(const RowArguments& r, void* stream) {
    if (r.rows <= 0 || r.vocab <= 0) return;
    const Rows a = rows_of(r);
    const GpuLimits& gpu = limits_of_current();
    const auto launch_one = a.student.dtype == Dtype::f32 ? launch_f32 : a.student.dtype == Dtype::bf16 ? launch_bf16 : launch_f16;
    for (int largest = largest_cluster(gpu.major);; largest /= 2) {
        const Launch l = plan(gpu, a, largest);
        if (launch_one(a, l, r.divergence, static_cast<cudaStream_t>(stream))) return;
        if (!l.one_read) throw std::invalid_argument("no divergence has the id " + std::to_string(r.divergence));
    }
}

}  // namespace kd
