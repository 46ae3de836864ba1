// Python bindings: plain numbers and addresses. kdkernels/backends/_extension.py, the only importer, checks the tensors behind them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/product.h"
#include "cpu/rows.h"
#include "cuda/interface.h"
#include "divergence.h"

namespace py = pybind11;

namespace {

template <class Class, class Member> auto address(Member Class::* member) {
    return [member](Class& c, uintptr_t value) { c.*member = reinterpret_cast<Member>(value); };
}

template <class Class, class Enum> auto code(Enum Class::* member) {
    return [member](Class& c, int value) { c.*member = static_cast<Enum>(value); };
}

// Write-only: Python sets the fields, C++ reads them.
template <class Class, class Setter> void field(py::class_<Class>& c, const char* name, Setter setter) {
    c.def_property(name, nullptr, setter);
}

template <class Args> Args arguments_of(void (*)(const Args&, int, const char*));

// Kernels run without the GIL, with the processor's best instruction set unless another is named.
template <auto run> void kernel(py::module_& m, const char* name) {
    using Args = decltype(arguments_of(run));
    m.def(
        name,
        [](const Args& a, int threads, const std::optional<std::string>& isa) {
            const py::gil_scoped_release release;
            run(a, threads, isa ? isa->c_str() : nullptr);
        },
        py::arg("arguments"), py::arg("threads"), py::arg("isa") = py::none());
}

// A CUDA kernel is launched on a stream.
template <class Args> void cuda_kernel(py::module_& m, const char* name, void (*run)(const Args&, void*)) {
    m.def(
        name,
        [run](const Args& a, uintptr_t stream) {
            const py::gil_scoped_release release;
            if (!run) throw std::runtime_error("this build has no CUDA kernels");
            run(a, reinterpret_cast<void*>(stream));
        },
        py::arg("arguments"), py::arg("stream"));
}
#ifdef KD_WITH_CUDA
#define KD_IN_CUDA(run) &run
#else
#define KD_IN_CUDA(run) nullptr
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled row kernels of kdkernels; use kdkernels.backends.cpu.";

    py::class_<kd::Side> side(m, "Side");
    side.def(py::init<>());
    field(side, "logits", address(&kd::Side::logits));
    field(side, "bias", address(&kd::Side::bias));
    field(side, "dtype", code(&kd::Side::dtype));
    side.def_readwrite("stride", &kd::Side::stride).def_readwrite("scale", &kd::Side::scale).def_readwrite("softcap", &kd::Side::softcap);

    using Args = kd::RowArguments;
    py::class_<Args> args(m, "RowArguments");
    args.def(py::init<>());
    field(args, "normalizer", code(&Args::normalizer));
    field(args, "dz_dtype", code(&Args::dz_dtype));
    field(args, "labels", address(&Args::labels));
    field(args, "weight", address(&Args::weight));
    field(args, "state", address(&Args::state));
    field(args, "loss", address(&Args::loss));
    field(args, "stats", address(&Args::stats));
    field(args, "dz", address(&Args::dz));
    args.def_readwrite("student", &Args::student)
        .def_readwrite("teacher", &Args::teacher)
        .def_readwrite("rows", &Args::rows)
        .def_readwrite("vocab", &Args::vocab)
        .def_readwrite("divergence", &Args::divergence)
        .def_readwrite("a", &Args::a)
        .def_readwrite("b", &Args::b)
        .def_readwrite("inv_temperature", &Args::inv_temperature)
        .def_readwrite("value_scale", &Args::value_scale)
        .def_readwrite("slope_scale", &Args::slope_scale)
        .def_readwrite("ce_weight", &Args::ce_weight)
        .def_readwrite("dz_scale", &Args::dz_scale)
        .def_readwrite("double_precision", &Args::double_precision)
        .def_readwrite("stages", &Args::stages)
        .def_readwrite("state_stride", &Args::state_stride)
        .def_readwrite("stats_stride", &Args::stats_stride)
        .def_readwrite("dz_stride", &Args::dz_stride);

    using Head = kd::HeadArguments;
    py::class_<Head> head(m, "HeadArguments");
    head.def(py::init<>());
    field(head, "top", address(&Head::top));
    field(head, "log_sum", address(&Head::log_sum));
    field(head, "entropy", address(&Head::entropy));
    field(head, "ids", address(&Head::ids));
    field(head, "logprobs", address(&Head::logprobs));
    field(head, "d_lse", address(&Head::d_lse));
    field(head, "d_entropy", address(&Head::d_entropy));
    field(head, "d_logprobs", address(&Head::d_logprobs));
    field(head, "dz", address(&Head::dz));
    field(head, "dz_dtype", code(&Head::dz_dtype));
    field(head, "top_ids", address(&Head::top_ids));
    field(head, "top_logprobs", address(&Head::top_logprobs));
    field(head, "draws", address(&Head::draws));
    field(head, "seed_at", address(&Head::seed_at));
    head.def_readwrite("side", &Head::side)
        .def_readwrite("rows", &Head::rows)
        .def_readwrite("vocab", &Head::vocab)
        .def_readwrite("inv_temperature", &Head::inv_temperature)
        .def_readwrite("double_precision", &Head::double_precision)
        .def_readwrite("statistics", &Head::statistics)
        .def_readwrite("num_ids", &Head::num_ids)
        .def_readwrite("dz_scale", &Head::dz_scale)
        .def_readwrite("dz_stride", &Head::dz_stride)
        .def_readwrite("num_top", &Head::num_top)
        .def_readwrite("num_draws", &Head::num_draws)
        .def_readwrite("seed", &Head::seed)
        .def_readwrite("first_row", &Head::first_row);

    using Softmax = kd::SoftmaxArguments;
    py::class_<Softmax> softmax(m, "SoftmaxArguments");
    softmax.def(py::init<>());
    field(softmax, "out", address(&Softmax::out));
    field(softmax, "out_dtype", code(&Softmax::out_dtype));
    softmax.def_readwrite("x", &Softmax::x)
        .def_readwrite("dy", &Softmax::dy)
        .def_readwrite("out_stride", &Softmax::out_stride)
        .def_readwrite("rows", &Softmax::rows)
        .def_readwrite("vocab", &Softmax::vocab)
        .def_readwrite("inv_temperature", &Softmax::inv_temperature)
        .def_readwrite("logarithm", &Softmax::logarithm)
        .def_readwrite("backward", &Softmax::backward)
        .def_readwrite("double_precision", &Softmax::double_precision);

    m.def("cpu_has_product", &kd::cpu_has_product);
    m.def(
        "cpu_product",
        [](uintptr_t a, uintptr_t b, uintptr_t out, int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride,
           int64_t out_stride, int threads) {
            const py::gil_scoped_release release;
            kd::cpu_product({reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), reinterpret_cast<float*>(out),
                             rows, columns, depth, a_stride, b_stride, out_stride},
                            threads);
        },
        py::arg("a"), py::arg("b"), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a_stride"),
        py::arg("b_stride"), py::arg("out_stride"), py::arg("threads"));

    kernel<&kd::cpu_rows>(m, "cpu_rows");
    kernel<&kd::cpu_head_rows>(m, "cpu_head_rows");
    kernel<&kd::cpu_softmax_rows>(m, "cpu_softmax_rows");

    // Compute capabilities with machine code (the newest also as PTX); empty in a build without CUDA.
    m.def("cuda_targets", [] {
        std::vector<std::string> targets;
#ifdef KD_WITH_CUDA
        std::stringstream list(KD_CUDA_TARGETS);
        for (std::string target; std::getline(list, target, ';');) targets.push_back(target);
#endif
        return targets;
    });

    cuda_kernel<Args>(m, "cuda_rows", KD_IN_CUDA(kd::cuda_rows));
    cuda_kernel<Head>(m, "cuda_head_rows", KD_IN_CUDA(kd::cuda_head_rows));
    cuda_kernel<Softmax>(m, "cuda_softmax_rows", KD_IN_CUDA(kd::cuda_softmax_rows));

    m.def(
        "cuda_launch",
        [](int major, int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int64_t rows, int64_t vocab, int itemsize,
           bool one_read_possible) {
            const kd::GpuLimits gpu{major, multiprocessors, shared_per_block, shared_per_multiprocessor};
            const kd::Launch l = kd::choose_launch(gpu, rows, vocab, itemsize, one_read_possible, kd::largest_cluster(major));
            return py::dict(py::arg("one_read") = l.one_read, py::arg("cluster") = l.cluster, py::arg("slots") = l.slots,
                            py::arg("threads") = l.threads, py::arg("blocks") = l.blocks, py::arg("shared_bytes") = l.shared_bytes);
        },
        py::arg("major"), py::arg("multiprocessors"), py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("rows"),
        py::arg("vocab"), py::arg("itemsize"), py::arg("one_read_possible"));

    m.def(
        "cuda_team",
        [](int major, int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int64_t rows, int64_t vocab, int itemsize,
           int sweeps, int inputs, int threads, size_t more_shared, bool clusters, int64_t draws) {
            const kd::GpuLimits gpu{major, multiprocessors, shared_per_block, shared_per_multiprocessor};
            const kd::TeamLaunch t = kd::choose_team(
                gpu, {rows, vocab, itemsize, sweeps, inputs, threads, more_shared, clusters ? kd::largest_cluster(major) : 0, draws});
            return py::dict(py::arg("kept") = t.kept_at > 0, py::arg("cluster") = t.launch.cluster, py::arg("threads") = t.launch.threads,
                            py::arg("blocks") = t.launch.blocks, py::arg("shared_bytes") = t.launch.shared_bytes,
                            py::arg("kept_at") = t.kept_at, py::arg("kept_bytes") = t.kept_bytes, py::arg("draw_parts") = t.draw_parts);
        },
        py::arg("major"), py::arg("multiprocessors"), py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("rows"),
        py::arg("vocab"), py::arg("itemsize"), py::arg("sweeps"), py::arg("inputs") = 1, py::arg("threads") = kd::kTeamThreads,
        py::arg("more_shared") = 0, py::arg("clusters") = true, py::arg("draws") = 1);
    m.attr("interface") = 4;  // see INTERFACE in kdkernels/backends/_extension.py
    m.attr("cuda_most_top") = kd::kMostTop;

    m.def("cpu_isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = kd::cpu_isas(); *name; ++name) names.emplace_back(*name);
        return names;
    });

    m.def("divergences", [] {
        std::vector<std::tuple<int, std::string, std::optional<double>>> all;
        const auto add = [&](auto d) { all.emplace_back(d.id, d.name, d.knows_slope_sum ? std::optional(d.slope_sum) : std::nullopt); };
        for (int id = 0; kd::with_divergence(id, add); ++id) {}
        return all;
    });

    // One column of a divergence in double, for tests against the Python and Triton definitions.
    m.def("divergence_terms", [](int id, double log_q, double log_p, double q, double p, double a, double b) {
        std::tuple<double, double> out{0.0, 0.0};
        if (!kd::with_divergence(id, [&](auto d) {
                const kd::Terms<double> t = d.terms(log_q, log_p, q, p, a, b);
                out = {t.value, t.slope};
            }))
            throw std::invalid_argument("no divergence has the id " + std::to_string(id));
        return out;
    });
}
