"""Selection of a backend, the reasons why others can't run, ``plan``, devices, and backends of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from oracle import make_labels, make_side
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.backends.rows import RowBatch, Stage
from kdkernels.backends.selection import traits
from kdkernels.fused.call import Call

F32 = (torch.float32, torch.float32)
N, V = 300, 1024


def heads(n: int = N, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[kd.LMHead, kd.LMHead]:
    return make_side((n,), V, 8, seed=1, dtype=dtype, device=device), make_side((n,), V, 12, seed=2, dtype=dtype, device=device)


@pytest.fixture
def fresh() -> object:
    """Clear the cached choice before and after tests that change the available backends."""
    selection._select.cache_clear()
    yield
    selection._select.cache_clear()


def test_names_and_order_of_backends() -> None:
    assert set(selection.NAMES) == {"cuda", "triton", "native", "torch", "reference"}
    assert selection.auto_order("cuda") == ("triton", "cuda", "torch")
    assert selection.auto_order("cpu") == ("native", "torch")


@pytest.mark.parametrize("name", selection.NAMES)
def test_explicit_choice_is_honoured_or_raises(name: str, device: str) -> None:
    student, teacher = heads(4, device=device)
    reason = selection.unavailable(name, device, F32)
    if reason is None:
        assert kd.plan(student, teacher, backend=name).backend == name
        assert torch.isfinite(kd.distillation_loss(student, teacher, backend=name))
    else:
        for call in (kd.distillation_loss, kd.plan):
            with pytest.raises(kd.BackendUnavailable) as caught:
                call(student, teacher, backend=name)
            assert reason in str(caught.value)
            assert repr(name) in str(caught.value)


def test_unavailable_backend_always_has_a_reason(monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    monkeypatch.setattr(selection.load("torch"), "unavailable", lambda device, dtypes: "it is Sunday")
    student, teacher = heads(4)
    with pytest.raises(kd.BackendUnavailable, match="'torch' cannot run here: it is Sunday"):
        kd.distillation_loss(student, teacher, backend="torch")


def test_auto_selects_the_first_available(monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    monkeypatch.setattr(selection, "unavailable", lambda name, *_: None if name in ("triton", "torch", "reference") else "no")
    assert selection.select("auto", "cuda", F32) == "triton"
    assert selection.select("auto", "cpu", F32) == "torch"
    assert selection.select("auto", "mps", F32) == "torch"


def test_unknown_backend_lists_the_valid() -> None:
    student, teacher = heads(4)
    with pytest.raises(ValueError, match=r"backend 'jax' is unknown; valid names: auto, cuda, triton, native, torch, reference"):
        kd.distillation_loss(student, teacher, backend="jax")


def test_import_error_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libsomething.so.7: cannot open")

    monkeypatch.setattr(selection, "load", broken)
    assert "libsomething.so.7" in str(selection.unavailable("triton", "cuda", F32))


def test_triton_refuses_float64() -> None:
    assert "float64" in str(selection.unavailable("triton", "cpu", (torch.float64, torch.float32)))
    assert "float64" in str(selection.unavailable("triton", "cuda", (torch.float32, torch.float64)))


def test_plan_names_a_reason_for_every_other_backend(device: str) -> None:
    student, teacher = heads(device=device)
    plan = kd.plan(student, teacher)
    assert plan.backend == selection.select("auto", device, F32)
    assert set(plan.not_chosen) == set(selection.NAMES) - {plan.backend}
    assert all(plan.not_chosen.values())
    assert "checks" in plan.not_chosen["reference"]
    explicit = kd.plan(student, teacher, backend="torch")
    assert "'torch' was selected" in explicit.not_chosen["reference"]
    if device == "cpu":
        assert plan.backend == ("native" if selection.unavailable("native", "cpu", F32) is None else "torch")
        if plan.backend == "native":
            assert plan.not_chosen["torch"] == "native comes first"


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_plan_counts_chunks_and_bytes(backend: str) -> None:
    """Two float32 buffers take 8192 bytes a row. The dense loss holds both logits and, if needed, the student's gradient."""
    student, teacher = heads()
    plan = kd.plan(student, teacher, backend=backend, chunk_rows=128)
    assert (plan.rows_per_chunk, plan.num_chunks) == (128, 3)
    assert plan.buffer_bytes == 128 * 8192
    assert plan.dense_bytes == N * 8192
    assert plan.saved_bytes == plan.dense_bytes - plan.buffer_bytes
    student.hidden.requires_grad_()
    assert kd.plan(student, teacher, backend=backend).dense_bytes == N * 12288
    one_chunk = kd.plan(student, teacher, backend=backend)
    assert (one_chunk.rows_per_chunk, one_chunk.num_chunks, one_chunk.buffer_bytes) == (N, 1, N * 8192)
    tight = kd.plan(student, teacher, backend=backend, memory_budget=130 * 8192)
    assert tight.rows_per_chunk == 128
    assert tight.buffer_bytes <= 130 * 8192


def test_plan_counts_valid_rows() -> None:
    student, teacher = heads()
    labels = make_labels((N,), V)
    assert kd.plan(student, teacher, labels=labels, backend="torch").rows_per_chunk == 200
    assert kd.plan(student, teacher, labels=torch.full((N,), -100), backend="torch").num_chunks == 0


def test_plan_of_dense_logits_has_no_buffer() -> None:
    plan = kd.plan(torch.zeros(5, 9), torch.zeros(5, 9), backend="torch")
    assert (plan.rows_per_chunk, plan.num_chunks, plan.buffer_bytes, plan.dense_bytes, plan.saved_bytes) == (5, 1, 0, 0, 0)


def test_plan_of_the_reference_is_dense() -> None:
    plan = kd.plan(*heads(), backend="reference")
    assert plan.buffer_bytes == plan.dense_bytes
    assert plan.saved_bytes == 0
    assert (plan.rows_per_chunk, plan.num_chunks) == (N, 1)


def test_plan_of_16_bit_heads() -> None:
    """The default is float32 logits. bfloat16 logits halve the buffer."""
    student, teacher = heads(dtype=torch.bfloat16)
    assert kd.plan(student, teacher, backend="torch").buffer_bytes == N * 8192
    assert kd.plan(student, teacher, backend="torch", logits_dtype=torch.bfloat16).buffer_bytes == N * 4096
    assert kd.plan(student, teacher, backend="torch").dense_bytes == N * 4096


def test_plan_works_on_meta_tensors() -> None:
    """Meta tensors plan shapes that do not fit in memory."""
    student = kd.LMHead(torch.empty(1 << 20, 4096, device="meta"), torch.empty(151936, 4096, device="meta"))
    plan = kd.plan(student, student)
    assert plan.dense_bytes == (1 << 20) * 151936 * 4 * 2
    assert plan.buffer_bytes <= 1 << 30
    assert plan.rows_per_chunk % 128 == 0
    assert plan.num_chunks * plan.rows_per_chunk >= 1 << 20


def test_plan_names_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match=r"plan got temprature; it takes .*temperature"):
        kd.plan(*heads(), temprature=2.0)  # type: ignore[call-overload]


def test_plan_computes_nothing(calls: dict[str, int]) -> None:
    kd.plan(*heads(), labels=make_labels((N,), V), return_stats=True)
    assert not any(calls.values())


def test_plan_matches_the_run(calls: dict[str, int]) -> None:
    student, teacher = heads()
    options = {"labels": make_labels((N,), V), "memory_budget": 130 * 8192, "backend": "torch"}
    kd.distillation_loss(student, teacher, **options)
    assert calls["logits"] == 2 * kd.plan(student, teacher, **options).num_chunks


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_availability_depends_on_the_gpu_of_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    """Two GPUs, of which only the first supports the backend. "cuda" means the current GPU."""
    module = pytest.importorskip(f"kdkernels.backends.{name}")
    capabilities, current = [(9, 0), (7, 5)], [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    if name == "cuda":
        monkeypatch.setattr(module._extension, "missing", lambda: None)
        monkeypatch.setattr(module._extension, "contents", lambda: {"cuda targets": ["80", "90a"]})
    else:
        monkeypatch.setattr(module, "_INTERPRETED", False)
    for device in (torch.device("cuda:0"), "cuda:0", "cuda"):
        assert selection.select(name, device, F32) == name
    for device in (torch.device("cuda:1"), "cuda:1"):
        with pytest.raises(kd.BackendUnavailable, match=r"cuda:1 has .*7\.5"):
            selection.select(name, device, F32)
    current[0] = 1
    with pytest.raises(kd.BackendUnavailable, match=r"cuda:1 has .*7\.5"):
        selection.select(name, "cuda", F32)


# ---- devices, and backends of other packages


class Entry:
    """An entry point that loads ``backend``, or raises it."""

    def __init__(self, name: str, backend: object) -> None:
        self.name, self.backend = name, backend

    def load(self) -> object:
        if isinstance(self.backend, Exception):
            raise self.backend
        return self.backend


def foreign_backend(**changes: object) -> SimpleNamespace:
    """Return a backend as another package would define it: torch's row kernels, for devices of type xpu."""
    torch_rows = selection.load("torch")
    parts = {name: getattr(torch_rows, name) for name in ("state_scales", "rows", "head_rows", "softmax_rows", "softmax_gradient_rows")}
    return SimpleNamespace(**{"DEVICE_TYPES": ("xpu",), "unavailable": lambda device, dtypes: None, **parts, **changes})


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Register entry points, and return a list that records which groups are read."""

    def forget() -> None:
        for cached in (selection.foreign, selection.load, selection._select):
            cached.cache_clear()

    def register(**backends: object) -> list[str]:
        forget()
        read: list[str] = []

        def entry_points(*, group: str) -> list[Entry]:
            read.append(group)
            return [Entry(name, backend) for name, backend in backends.items()]

        monkeypatch.setattr(selection, "entry_points", entry_points)
        return read

    yield register
    monkeypatch.undo()
    forget()


def test_backend_of_another_package_runs_by_name(entries: Callable[..., list[str]]) -> None:
    calls: list[Stage] = []

    def rows(call: Call, batch: RowBatch, stages: Stage) -> None:
        calls.append(stages)
        selection.load("torch").rows(call, batch, stages)

    read = entries(mine=foreign_backend(rows=rows))
    student, teacher = heads(8)
    loss = kd.distillation_loss(student, teacher, backend="mine")
    assert torch.equal(loss, kd.distillation_loss(student, teacher, backend="torch"))
    assert calls
    assert read == ["kdkernels.backends"], "once"
    assert kd.plan(student, teacher, backend="mine").backend == "mine"
    with pytest.raises(ValueError, match=r"'jax' is unknown; valid names: auto, .*, reference, mine"):
        kd.distillation_loss(student, teacher, backend="jax")


def test_entry_points_are_read_for_unknown_devices_and_names_only(entries: Callable[..., list[str]]) -> None:
    read = entries(mine=foreign_backend(DEVICE_TYPES=("cpu", "xpu")), other=foreign_backend(DEVICE_TYPES=()))
    assert selection.select("auto", "cpu", F32) in ("native", "torch"), "built-in backends come first"
    assert selection.select("torch", "cpu", F32) == "torch"
    assert not read
    assert selection.select("auto", "xpu", F32) == "mine"
    assert selection.select("auto", "hpu", F32) == "torch", "no backend declares this type"
    assert len(read) == 1


def test_auto_skips_unavailable_backends_of_other_packages(entries: Callable[..., list[str]]) -> None:
    entries(
        broken=ImportError("libsycl.so.8: cannot open"), partial=SimpleNamespace(DEVICE_TYPES=("xpu",), rows=print),
        busy=foreign_backend(unavailable=lambda device, dtypes: "it is Sunday"), torch=foreign_backend(),
        misnamed=AttributeError("module 'rows' has no attribute 'backend'"), unlinked=OSError("libcnrt.so: cannot open"),
    )  # fmt: skip
    assert selection.select("auto", "xpu", F32) == "torch"
    assert selection.load("torch").__name__ == "kdkernels.backends.torch", "an entry point can't replace a built-in backend"
    reasons = {
        "broken": "libsycl.so.8", "partial": "has no unavailable, state_scales", "busy": "it is Sunday",
        "misnamed": "'misnamed' of kdkernels.backends cannot be loaded: .*'backend'", "unlinked": "libcnrt.so",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(kd.BackendUnavailable, match=reason):
            selection.select(name, "xpu", F32)
    assert selection.not_chosen("torch", "auto", "xpu", F32)["busy"] == "it is Sunday"


@pytest.mark.parametrize("device_type", ["xpu", "mps", "hpu", "privateuseone"])
def test_unknown_device_has_conservative_traits(device_type: str) -> None:
    unknown = traits(device_type)
    assert unknown.asynchronous
    assert not any((unknown.wide_products, unknown.host_memory, unknown.recycled_pages, unknown.graphs, unknown.narrow_gradients))
    assert selection.auto_order(device_type)[-1] == "torch"
    for name in ("cuda", "triton", "native"):
        assert name not in selection.auto_order(device_type)


@pytest.mark.parametrize("device_type", ["xpu", "mps"])
def test_unknown_device_uses_the_torch_backend(device_type: str) -> None:
    with FakeTensorMode():
        student, teacher = (torch.empty(8, V, device=device_type) for _ in range(2))
        assert kd.distillation_loss(student, teacher).device.type == device_type
        plan = kd.plan(student, teacher)
    assert plan.backend == "torch"
    assert set(plan.not_chosen) == {"cuda", "triton", "native", "reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traits_of_an_unknown_device_do_not_change_results(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the torch backend on a CPU with the traits of an unknown device."""
    results = []
    for device_traits in (selection._KNOWN, {}):
        monkeypatch.setattr(selection, "_KNOWN", device_traits)
        student, teacher = heads(20, dtype)
        for tensor in (student.hidden, student.weight):
            tensor.requires_grad_()
        loss = kd.distillation_loss(student, teacher, labels=make_labels((20,), V), ce_weight=0.3, chunk_rows=8, backend="torch")
        loss.backward()
        results.append((loss.detach(), student.hidden.grad, student.weight.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)
