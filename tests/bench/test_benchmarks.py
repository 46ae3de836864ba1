"""Each benchmark variant computes its case, and failures become rows. Shapes are tiny, so times mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benching import HEADS, LOGITS

from kdkernels.bench import measure, plots, processes, suites, table, variants, visits
from kdkernels.bench.cases import Case, Inputs, build
from kdkernels.bench.measure import Job
from kdkernels.bench.peers import PEERS, Peer
from kdkernels.divergences import REGISTRY


@pytest.fixture
def visits_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run visits in this process, so that tests can patch them."""
    monkeypatch.setattr(processes, "ask", processes.answer)


def measure_all(job: Job) -> visits.Measured:
    measured = visits.new(job)
    for number in range(1, job.visits + 1):
        visits.visit(measured, job, number, "cpu")
    assert measured["complete"]
    return measured


def test_quantile_interpolates() -> None:
    assert [measure.quantile([4.0, 1.0, 2.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 4.0]


def test_shapes_are_parsed() -> None:
    assert Case.parse_shape("8,100,4,6") == (8, 100, 4, 6)
    assert Case.parse_shape("8,100") == (8, 100, 0, 0)
    for text in ("8", "8,0", "8;100", "8,100,4", "8,100,4,6,7", "a,b"):
        with pytest.raises(ValueError, match="N,V,Ds,Dt"):
            Case.parse_shape(text)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"ds": 4}, "both"), ({"operation": "sort"}, "operation"), ({"masked": 1.0}, "masked"), ({"ds": 4, "dt": 8, "gap": 0.1}, "gap")],
)
def test_invalid_cases_raise(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Case(8, 100, **arguments)


def test_floor_counts_products_or_bytes() -> None:
    assert Case(8, 100, 4, 6).flop == 2 * 8 * 100 * (3 * 4 + 6)
    assert Case(8, 100, 4, 6, masked=0.5, frozen_head=True).flop == 2 * 4 * 100 * (2 * 4 + 6)
    assert Case(8, 100, 4, 6, operation="cross_entropy").flop == 2 * 8 * 100 * 3 * 4
    assert (LOGITS.flop, LOGITS.floor_bytes) == (0, 3 * 32 * 256 * 4)


def test_gap_is_the_distance_of_the_teacher() -> None:
    def distance(gap: float) -> float:
        inputs = build(Case(64, 256, 16, 16, gap=gap))
        s, t = inputs.student, inputs.teacher
        assert not isinstance(s, torch.Tensor)
        assert not isinstance(t, torch.Tensor)
        assert t.weight.equal(s.weight)
        return float(((t.hidden - s.hidden).norm() / s.hidden.norm()).detach())

    assert distance(0.0) == 0
    assert abs(distance(0.1) - 0.1) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("sizes", [(8, 16), (0, 0)], ids=["heads", "logits"])
@pytest.mark.parametrize(("masked", "frozen"), [(0.0, False), (0.5, True)])
def test_variants_compute_the_case(sizes: tuple[int, int], divergence: str, dtype: str, masked: float, frozen: bool) -> None:
    case = Case(32, 256, *sizes, dtype=dtype, divergence=divergence, masked=masked, frozen_head=frozen)
    rows = [] if case.has_heads or masked else [f"rows:{name}" for name in variants.backends_for("cpu", case.torch_dtype)]
    for name in (*variants.default_variants(case, "cpu"), *rows):
        if name == "floor":
            assert variants.build(name, case, build(case))() is None
        elif name != "compile":  # compile is eager's formula and takes seconds to compile
            error = variants.check(name, case, "cpu")
            assert error is not None
            assert error < (0.05 if dtype == "bfloat16" else 1e-5), name


@pytest.mark.parametrize("divergence", list(REGISTRY))
def test_eager_formula_of_every_divergence(divergence: str) -> None:
    error = variants.check("eager", Case(32, 256, dtype="float32", divergence=divergence), "cpu")
    assert error is not None
    assert error < 1e-5


def test_variants_compute_cross_entropy() -> None:
    case = Case(32, 256, 8, 16, operation="cross_entropy", masked=0.25)
    names = variants.default_variants(case, "cpu")
    assert names[:3] == ["floor", "eager", "compile"]
    assert {"native", "torch"} <= set(names)
    for name in [n for n in names if n not in ("floor", "compile")]:
        error = variants.check(name, case, "cpu")
        assert error is not None
        assert error < 1e-5


def test_options_are_parsed_from_a_variants_name() -> None:
    v = variants.Variant.parse("native/bfloat16@rows=512")
    assert v.options == {"backend": "native", "logits_dtype": torch.bfloat16, "chunk_rows": 512}
    assert variants.Variant.parse("torch@budget=3").options == {"backend": "torch", "memory_budget": 3 << 20}
    assert variants.Variant.parse("rows:cuda").rows_only
    assert table.name_of("native/bfloat16@rows=512") == "kdkernels native, bfloat16 logits, 512 rows"
    for name in ("native@rows", "native@rows=0", "native@speed=9", "native@budget=x"):
        with pytest.raises(ValueError, match="after @"):
            variants.Variant.parse(name)


def test_accounted_memory_is_buffers_and_gradients() -> None:
    case = Case(1024, 256, 8, 16)
    plan = variants.held("torch@rows=128", case, build(case))
    assert (plan["rows_per_chunk"], plan["num_chunks"]) == (128, 8)
    gradients = 4 * 8 * (1024 + 256)
    assert plan["buffer_bytes"] == 2 * 4 * 128 * 256
    assert plan["accounted_bytes"] == gradients + plan["buffer_bytes"]


def test_row_kernel_variants_reuse_their_gradient_and_refuse_heads() -> None:
    inputs = build(LOGITS)
    step = variants.build("rows:torch", LOGITS, inputs)
    step()
    first = inputs.trained[0].grad
    step()
    assert inputs.trained[0].grad is first
    with pytest.raises(ValueError, match="row kernels take logits"):
        variants.build("rows:torch", HEADS, build(HEADS))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_row_kernels_write_a_16_bit_gradient_over_float32_logits(backend: str) -> None:
    """This is the default for a bfloat16 head on a GPU. Each pass restores the logits that the last one overwrote."""
    case = Case(16, 257, dtype="bfloat16")
    name = f"rows:{backend}/float32"
    inputs = build(case)
    step = variants.build(name, case, inputs)
    gradients = []
    for _ in range(2):
        variants.prepare(step)
        step()
        assert inputs.trained[0].grad is not None
        gradients.append(inputs.trained[0].grad.clone())
    assert gradients[0].dtype == torch.bfloat16
    assert gradients[0].equal(gradients[1])
    assert variants.check(name, case, "cpu") < 0.01
    assert variants.Variant.parse(name).floor_bytes(case) == 16 * 257 * (4 + 4 + 2)
    assert variants.Variant.parse(name).floor == "floor/float32"
    with pytest.raises(ValueError, match="in place, the logits are wider"):
        variants.build(f"rows:{backend}/bfloat16", case, inputs)


@pytest.mark.parametrize("case", [HEADS, LOGITS], ids=["heads", "logits"])
def test_variant_with_a_wrong_result_raises(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = variants._eager
    monkeypatch.setitem(variants._BUILDERS, "eager", lambda case, inputs: eager(Case(**{**vars(case), "temperature": 2.1}), inputs))
    with pytest.raises(RuntimeError, match="differs from the float64 reference"):
        variants.check("eager", case, "cpu")


def test_interpreted_triton_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.backends import selection

    monkeypatch.setattr(selection, "unavailable", lambda *_: None)  # as with TRITON_INTERPRET=1
    names = variants.default_variants(HEADS, "cpu")
    assert names[:3] == ["floor", "eager", "compile"]
    assert not {"triton", "cuda"} & set(names)


def test_unknown_variant_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"floor, eager, compile, cuda, triton, native, torch, trl, liger_jsd"):
        variants.build("fast", HEADS, build(HEADS))


def test_each_round_runs_every_variant_without_old_gradients() -> None:
    inputs = build(LOGITS)
    order: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            assert inputs.trained[0].grad is None
            inputs.trained[0].grad = torch.ones(LOGITS.n, LOGITS.v)
            order.append(name)

        return run

    def too_large() -> None:
        raise torch.OutOfMemoryError("no memory\nmore of it")

    samples_by_name, failed = measure.time_interleaved(
        {"big": too_large, **{name: step(name) for name in "abc"}}, inputs, samples=6, warmup=2
    )
    assert failed == {"big": "OutOfMemoryError: no memory"}
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {name: len(samples) for name, samples in samples_by_name.items()} == {"a": 6, "b": 6, "c": 6}
    assert len(rounds) == 8
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_peak_memory_of_a_known_allocation() -> None:
    """The floor of a case with logits writes one [N, V] buffer, which takes 64 MiB here."""
    peak = visits.peak_extra_bytes("floor", Case(1024, 16384))
    assert abs(peak - (64 << 20)) < 2 << 20  # the kernel counts pages in batches


def test_failed_process_raises_with_its_reason() -> None:
    with pytest.raises(processes.OutOfProcessError, match="variant 'fast' is unknown"):
        visits.peak_extra_bytes("fast", HEADS)


def test_deadline_ends_the_rounds_after_one_sample() -> None:
    rounds: list[int] = []
    samples, _ = measure.time_interleaved(
        {"a": lambda: None}, build(LOGITS), samples=9, after_round=lambda t: rounds.append(len(t["a"])), deadline=0.0
    )
    assert len(samples["a"]) == 1
    assert rounds == [0, 1]


def test_rates_of_this_machine_are_plausible() -> None:
    rates = measure.rates("cpu", ["float32"], samples=2)
    assert 0.1 < rates["copy_gb_s"] < 10_000
    assert rates["matrix"]["float32"]["tflop_s"] > 0


# --- peers: other libraries


def fake(monkeypatch: pytest.MonkeyPatch, build_loss: Callable[[Case, Inputs], Callable[[], torch.Tensor]], **options: Any) -> None:
    """Register an installed peer with the name "other"."""
    monkeypatch.setitem(PEERS, "other", Peer("Other", "json", "torch", build_loss, **options))


def dense(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: variants._true_distillation(case, inputs)


def test_unavailable_peers_have_a_reason() -> None:
    for name, peer in PEERS.items():
        assert peer.cannot(LOGITS, "cpu") is not None, name
        if "cpu" not in peer.devices:
            assert peer.absent("cpu") is not None, name
    assert PEERS["fla"].module == "fla"
    missing = Peer("X", "no_such_module_anywhere", "no-such", dense)
    assert missing.absent("cpu") == "no-such is not installed"


@pytest.mark.usefixtures("visits_in_this_process")
def test_peer_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda case, inputs: lambda: 2 * variants._true_distillation(case, inputs))
    measured = measure_all(Job(HEADS, ("eager", "other"), samples=1, memory=False))
    eager, peer = measured["results"]
    assert len(eager["samples_ms"]) == 1
    assert "samples_ms" not in peer
    assert "the loss differs from the float64 reference by 1.0e+00" in peer["skipped"]


@pytest.mark.usefixtures("visits_in_this_process")
def test_failing_peer_gets_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
        raise ImportError("libother.so.1 is missing\nand more")

    fake(monkeypatch, broken, note="it rounds")
    measured = measure_all(Job(HEADS, ("floor", "other"), samples=1, memory=False))
    assert measured["results"][1]["skipped"] == "ImportError: libother.so.1 is missing"
    cells = list(table.rows(measured, None))[1]
    assert cells[1] == "did not run: ImportError: libother.so.1 is missing"
    assert table.notes(measured) == []


@pytest.mark.usefixtures("visits_in_this_process")
def test_bounds_are_checked_and_are_not_best_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda case, inputs: lambda: variants._true_cross_entropy(case, inputs), operation="cross_entropy", note="a bound")
    measured = measure_all(Job(HEADS, ("floor", "other"), samples=1, memory=False))
    assert measured["results"][1]["gradient_error"] < 1e-5
    assert table.best_peer(measured) is None
    assert table.notes(measured) == ["other: a bound."]


@pytest.mark.usefixtures("visits_in_this_process")
def test_killed_process_gets_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> int:
        raise processes.OutOfProcessError("its process was killed by signal 9, memory being short")

    monkeypatch.setattr(visits, "peak_extra_bytes", killed)
    measured = measure_all(Job(HEADS, ("floor", "eager"), samples=1))
    assert "killed by signal 9" in measured["results"][1]["skipped"]
    assert len(measured["results"][0]["samples_ms"]) == 1


@pytest.mark.usefixtures("visits_in_this_process")
def test_cases_larger_than_memory_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "_available_bytes", lambda: 1000)
    measured = measure_all(Job(HEADS, ("floor", "eager", "torch"), samples=1, memory=False))
    assert ["skipped" in r for r in measured["results"]] == [True, True, False]
    assert "are free" in measured["results"][0]["skipped"]


# --- suites


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_grow_and_every_case_has_its_floor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "backends_for", lambda *_: ["native", "torch"])
    sizes = [len(suites.jobs(suite, device)) for suite in suites.SUITES]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    jobs = suites.jobs("full", device)
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        assert ("floor" in job.variants) == bool(job.samples)
        assert str(job.case)
        if job.curve and job.curve != "rows per chunk":
            assert job.curve in plots.CURVES
    rows = {(j.case.divergence, j.case.v) for j in jobs if j.curve == "row kernels"}
    assert rows == {(d, v) for d in REGISTRY for v in suites.ROW_VOCABULARIES}


def test_gpu_suites_measure_every_compiled_backend() -> None:
    backends = ["triton", "cuda", "torch"]
    for job in suites.jobs("rows", "cuda", backends=backends):
        assert set(job.variants) == {"floor", "floor/float32"} | {
            f"rows:{name}{wide}" for name in backends[:2] for wide in ("", "/float32")
        }
    for job in suites.jobs("headline", "cuda", backends=backends, peers=[]):
        assert {"triton@budget=1024", "triton@budget=4096", "cuda/bfloat16@budget=4096", "floor/float32", "eager"} <= set(job.variants)
        assert not {"compile", *PEERS} & set(job.variants)
    assert "cuda/bfloat16" in suites.jobs("smoke", "cuda", backends=backends, peers=[])[0].variants
    for suite in suites.PARTS:
        assert all("rows:native" in job.variants or "native@budget=16" in job.variants for job in suites.jobs(suite, "cpu"))


def test_requested_cases_replace_the_suite() -> None:
    jobs = suites.jobs("smoke", "cpu", shapes=[(8, 100, 4, 6), (8, 100, 0, 0)], divergences=["jsd"], temperature=3.0, peers=[])
    assert [str(j.case) for j in jobs] == ["jsd, float32, N=8 V=100 Ds=4 Dt=6, T=3", "jsd, float32, N=8 V=100 (logits given), T=3"]
    assert not set(jobs[0].variants) & set(PEERS)
    bfloat16_jobs = suites.jobs("smoke", "cpu", dtypes=["bfloat16"], backends=["torch"], peers=[])
    assert {j.case.dtype for j in bfloat16_jobs} == {"bfloat16"}
    assert bfloat16_jobs[0].variants == ("floor", "eager", "compile", "torch", "torch/bfloat16")
