// Launches the one-side kernels for a call's arguments.
#include "interface.h"
#include "one_side_launchers.h"

namespace kd {
namespace {

RowSide side_of(const Side& s) {
    return {s.logits, static_cast<const float*>(s.bias), s.stride, s.dtype, float(s.scale), float(s.softcap)};
}

void check_vocabulary(int64_t vocab) {
    if (vocab >= int64_t(1) << 30) throw std::invalid_argument("a vocabulary of 2^30 or more");
}

Heads heads_of(const HeadArguments& h) {
    if (h.double_precision || h.side.dtype == Dtype::f64 || (h.dz && h.dz_dtype == Dtype::f64))
        throw std::invalid_argument("the CUDA row kernels compute in float32");
    if (h.dz && h.dz_dtype != h.side.dtype && h.side.dtype != Dtype::f32)
        throw std::invalid_argument("dz must have the dtype of 16-bit logits");
    if (h.num_ids >= int64_t(1) << 30) throw std::invalid_argument("2^30 ids or more");
    if (h.num_top < 0 || h.num_top > std::min<int64_t>(h.vocab, kMostTop))
        throw std::invalid_argument("the number of the largest must be between 0 and the vocabulary, and " + std::to_string(kMostTop) +
                                    " at most");
    check_vocabulary(h.vocab);
    Heads a{};
    a.side = side_of(h.side);
    a.top = static_cast<float*>(h.top), a.log_sum = static_cast<float*>(h.log_sum), a.entropy = static_cast<float*>(h.entropy);
    a.ids = h.ids, a.num_ids = int(h.num_ids), a.logprobs = static_cast<float*>(h.logprobs);
    a.d_lse = static_cast<const float*>(h.d_lse), a.d_entropy = static_cast<const float*>(h.d_entropy);
    a.d_logprobs = static_cast<const float*>(h.d_logprobs);
    a.dz = h.dz, a.dz_stride = h.dz_stride, a.dz_dtype = h.dz_dtype, a.dz_scale = float(h.dz_scale);
    a.top_ids = h.top_ids, a.top_logprobs = static_cast<float*>(h.top_logprobs), a.num_top = int(h.num_top);
    a.draws = h.draws, a.num_draws = int(h.num_draws), a.seed = h.seed, a.seed_at = h.seed_at, a.first_row = h.first_row;
    a.rows = h.rows, a.vocab = int(h.vocab), a.statistics = h.statistics;
    a.per_t = float(h.inv_temperature);
    a.exact_per_t = h.inv_temperature, a.exact_scale = h.side.scale, a.exact_softcap = h.side.softcap;
    return a;
}

// Calls run(team) with smaller and smaller clusters until it succeeds.
template <class Run> void launch_fitting(TeamShape shape, Run&& run) {
    for (;; shape.largest /= 2) {
        const TeamLaunch team = choose_team(limits_of_current(), shape);
        if (team.launch.blocks >= int64_t(1) << 31) throw std::invalid_argument("2^31 rows or more, times CTAs per row");
        if (run(team)) return;
        if (team.launch.cluster == 1) throw std::runtime_error("the row kernel does not fit on this GPU");
    }
}

}  // namespace

void cuda_head_rows(const HeadArguments& h, void* stream) {
    if (h.rows <= 0 || h.vocab <= 0) return;
    Heads a = heads_of(h);
    const auto launch_one = a.side.dtype == Dtype::f32    ? launch_heads_f32
                            : a.side.dtype == Dtype::bf16 ? launch_heads_bf16
                                                          : launch_heads_f16;
    const int itemsize = size_of(a.side.dtype), clusters = largest_cluster(limits_of_current().major);
    const auto run = [&](HeadKernel kernel, const TeamShape& shape) {
        launch_fitting(shape, [&](const TeamLaunch& t) {
            a.kept_at = int(t.kept_at), a.draw_parts = t.draw_parts;
            return launch_one(kernel, a, t.launch, static_cast<cudaStream_t>(stream));
        });
    };
    // The gradient comes last, because it may overwrite the logits.
    if (a.num_top) {
        a.top_capacity = top_capacity(a.num_top);
        run(HeadKernel::top,
            {.rows = a.rows, .vocab = a.vocab, .itemsize = itemsize, .sweeps = 2, .more_shared = top_shared_bytes(a.top_capacity)});
    }
    if (a.num_draws)
        run(HeadKernel::draw,
            {.rows = a.rows, .vocab = a.vocab, .itemsize = itemsize, .threads = kDrawThreads, .largest = clusters, .draws = a.num_draws});
    if (a.num_ids || a.entropy || a.dz || !(a.num_top || a.num_draws)) {
        const bool twice = a.statistics && a.dz;
        // If no CTA keeps the logits in shared memory, one CTA must write the whole gradient over them.
        run(HeadKernel::head,
            {.rows = a.rows, .vocab = a.vocab, .itemsize = itemsize, .sweeps = twice ? 2 : 1, .largest = a.statistics ? clusters : 0});
    }
}

void cuda_softmax_rows(const SoftmaxArguments& s, void* stream) {
    if (s.rows <= 0 || s.vocab <= 0) return;
    if (s.double_precision || s.x.dtype == Dtype::f64) throw std::invalid_argument("the CUDA row kernels compute in float32");
    if (s.out_dtype != s.x.dtype || (s.backward && s.dy.dtype != s.x.dtype))
        throw std::invalid_argument("softmax rows must have one dtype");
    check_vocabulary(s.vocab);
    Softmaxes a{};
    a.x = side_of(s.x), a.dy = side_of(s.dy);
    a.x.bias = nullptr, a.x.scale = 1.f, a.x.softcap = 0.f;
    if (!s.backward) a.dy.logits = nullptr;
    a.out = s.out, a.out_stride = s.out_stride, a.rows = s.rows, a.vocab = int(s.vocab);
    a.per_t = float(s.inv_temperature), a.logarithm = s.logarithm;
    const auto launch_one = s.x.dtype == Dtype::f32    ? launch_softmax_f32
                            : s.x.dtype == Dtype::bf16 ? launch_softmax_bf16
                                                       : launch_softmax_f16;
    const TeamShape shape{.rows = a.rows,
                          .vocab = a.vocab,
                          .itemsize = size_of(s.x.dtype),
                          .sweeps = 2,
                          .inputs = s.backward ? 2 : 1,
                          .largest = largest_cluster(limits_of_current().major)};
    launch_fitting(shape, [&](const TeamLaunch& t) {
        a.kept_at = int(t.kept_at), a.kept_bytes = int(t.kept_bytes);
        return launch_one(a, t.launch, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace kd
