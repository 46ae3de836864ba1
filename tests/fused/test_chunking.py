"""The chunk planner alone, and results that do not depend on the chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import error, make_labels, make_side, run, truth_of
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from kdkernels.backends.selection import traits
from kdkernels.fused import chunking, engine, gemm, pages
from kdkernels.fused.call import Call, Tensors
from kdkernels.fused.chunking import ROW_MULTIPLE, Chunks, padded_vocab, plan_chunks
from kdkernels.sides.head import HeadForm
from kdkernels.support import memory

rows = st.integers(0, 5000)
per_row = st.integers(1, 10_000)


@given(rows, per_row, st.integers(1, 5_000_000), st.none() | st.integers(1, 3000))
def test_chunks_fit_the_budget(num_rows: int, bytes_per_row: int, budget: int, enough: int | None) -> None:
    if budget < bytes_per_row:
        with pytest.raises(ValueError, match=rf"memory_budget={budget} .*minimum here is {bytes_per_row} bytes"):
            plan_chunks(num_rows, bytes_per_row, budget, None, enough)
        return
    chunks = plan_chunks(num_rows, bytes_per_row, budget, None, enough)
    check_cover(chunks, num_rows)
    fits = min(budget // bytes_per_row, enough or num_rows)
    assert chunks.rows <= max(1, fits)
    if chunks.count > 1:
        # Chunks are multiples of a tile if the budget holds one, and there are no more chunks than necessary.
        step = ROW_MULTIPLE if fits >= ROW_MULTIPLE else 1
        assert chunks.rows % step == 0
        largest = fits // step * step
        assert chunks.count <= -(-num_rows // largest)
        # Chunks are even: at most a tile larger than the same number of equal chunks.
        assert chunks.rows - -(-num_rows // chunks.count) < step
    elif num_rows:
        assert chunks.rows == num_rows


@given(rows, st.integers(1, 6000), per_row)
def test_chunk_rows_overrides_the_budget(num_rows: int, chunk_rows: int, bytes_per_row: int) -> None:
    chunks = plan_chunks(num_rows, bytes_per_row, memory_budget=1, chunk_rows=chunk_rows)
    check_cover(chunks, num_rows)
    assert chunks.rows == max(1, min(chunk_rows, num_rows))


def check_cover(chunks: Chunks, num_rows: int) -> None:
    """Check that chunks are non-empty, cover every row once in order, and have equal sizes except for the last."""
    spans = list(chunks)
    assert len(spans) == chunks.count
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(num_rows))
    sizes = [stop - start for start, stop in spans]
    assert all(size == chunks.rows for size in sizes[:-1])
    assert all(0 < size <= chunks.rows for size in sizes)


def test_chunks_of_known_sizes() -> None:
    assert plan_chunks(0, 100) == Chunks(0, 1)
    assert list(plan_chunks(0, 100)) == []
    assert plan_chunks(1000, 0) == Chunks(1000, 1000)  # both sides dense: no buffer, one chunk
    assert plan_chunks(10_000, 1 << 20) == Chunks(10_000, 1024)  # 1 GiB by default
    assert list(plan_chunks(1025, 1, memory_budget=1024)) == [(0, 640), (640, 1025)]  # not 1024 + 1
    assert list(plan_chunks(10, 1, memory_budget=4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(plan_chunks(9, 1, memory_budget=5)) == [(0, 5), (5, 9)]  # below a tile: even
    assert plan_chunks(4096, 1, memory_budget=200).rows == 128
    assert plan_chunks(4096, 1, memory_budget=4096, enough_rows=1024).rows == 1024


@given(st.integers(1, 300_000), st.sampled_from([2, 4, 8]))
def test_padded_vocab_is_a_multiple_of_64_bytes(vocab: int, itemsize: int) -> None:
    width = padded_vocab(vocab, itemsize)
    assert width >= vocab
    assert width * itemsize % 64 == 0
    assert (width - vocab) * itemsize < 64


def test_default_budget_is_a_gibibyte() -> None:
    assert chunking.DEFAULT_BUDGET == 2**30


# ---- results do not depend on chunks

N, V = 130, 37  # more than a tile of 128, with a last chunk of two rows


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "dims", [(8, 12), (8, None), (None, 12), (None, None)], ids=["head/head", "head/dense", "dense/head", "dense/dense"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_result_does_not_depend_on_chunks(
    dims: tuple[int | None, int | None], reduction: str, masked: bool, engine_backend: str, device: str
) -> None:
    student, teacher = (make_side((N,), V, d, seed=i, device=device, bias=True) for i, d in enumerate(dims))
    labels = make_labels((N,), V, device, masked=masked)
    options = {"labels": labels, "ce_weight": 0.5, "reduction": reduction, "divergence": kd.JSD(), "backend": engine_backend}
    in_one_chunk = run(kd.distillation_loss, student, teacher, {**options, "chunk_rows": N})
    # A row takes 2 * 48 * 4 bytes: two float32 buffers whose rows are padded to 64 bytes. Budgets: one row, three rows, a tile.
    splits = [{"chunk_rows": c} for c in (1, 7, 128, 10_000)] + [{"memory_budget": 384 * r} for r in (1, 3, 128)] + [{}]
    for split in splits:
        actual = run(kd.distillation_loss, student, teacher, {**options, **split})
        for name, value in in_one_chunk.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, w=split, n=name: f"{w} {n}: {m}")


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
def test_chunks_contain_only_valid_rows(chunk_rows: int, backend: str, device: str, calls: dict[str, int]) -> None:
    """Five of seven rows are valid."""
    student, teacher = (make_side((7,), V, d, seed=d, device=device) for d in (8, 12))
    labels = torch.tensor([1, -100, 2, 3, -100, 4, 5], device=device)
    run(kd.distillation_loss, student, teacher, {"labels": labels, "chunk_rows": chunk_rows, "backend": backend})
    assert calls["logits"] == 2 * -(-5 // chunk_rows)


def test_budget_below_one_row_raises(backend: str, device: str) -> None:
    student, teacher = (make_side((7,), V, d, seed=d, device=device) for d in (8, 12))
    with pytest.raises(ValueError, match=r"memory_budget=383 bytes is too small .* minimum here is 384 bytes"):
        kd.distillation_loss(student, teacher, memory_budget=383, backend=backend)
    assert torch.isfinite(kd.distillation_loss(student, teacher, memory_budget=384, backend=backend))


def test_no_buffer_is_larger_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of four rows, no larger tensor is allocated."""
    student, teacher = (make_side((64,), 1024, d, seed=d) for d in (8, 12))
    student.hidden.requires_grad_()
    largest = 0
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "zeros"), (torch, "zeros_like")):
        allocate = getattr(owner, name)

        def recorded(*args: object, allocate: object = allocate, **kwargs: object) -> torch.Tensor:
            nonlocal largest
            tensor = allocate(*args, **kwargs)
            largest = max(largest, tensor.nbytes)
            return tensor

        monkeypatch.setattr(owner, name, recorded)
    monkeypatch.setattr(pages, "_SCRATCH", pages._Scratch())  # discard memory of earlier calls
    kd.distillation_loss(student, teacher, memory_budget=8192 * 4, backend="torch").backward()
    assert 4 * 4096 <= largest <= 4 * 4096 + 32


@pytest.mark.parametrize("bytes_per_row", [0, 1, 1000, 256_000, 128_000, 10**9])
def test_cpu_limits_rows_to_cheap_bytes(bytes_per_row: int) -> None:
    cpu = traits("cpu")
    rows = chunking.useful_rows(cpu.enough_rows, cpu.cheap_bytes, bytes_per_row)
    assert rows is not None
    assert cpu.enough_rows is not None
    assert rows >= cpu.enough_rows
    assert rows == cpu.enough_rows or rows * bytes_per_row <= cpu.cheap_bytes
    assert chunking.useful_rows(traits("mps").enough_rows, traits("mps").cheap_bytes, bytes_per_row) is None


def test_head_gradient_of_one_bfloat16_chunk_is_as_accurate_as_of_several() -> None:
    """With one chunk the product writes the gradient in bfloat16. With several, they are summed in float32 and rounded once."""
    student, teacher = (make_side((96,), 500, d, seed=d, dtype=torch.bfloat16) for d in (8, 12))
    truth = truth_of(student, teacher, {})["d_weight"]
    errors = []
    for chunk_rows in (96, 24):
        options = {"chunk_rows": chunk_rows, "logits_dtype": torch.bfloat16, "backend": "torch"}
        actual = run(kd.distillation_loss, student, teacher, options)["d_weight"]
        assert actual.dtype == torch.bfloat16
        errors.append(error(actual, truth))
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("gib", "budget_gib"), [(None, 1), (8, 1), (32, 1), (80, 2.5), (141, 141 / 32)])
def test_default_budget_grows_with_gpu_memory(gib: int | None, budget_gib: float) -> None:
    assert chunking.default_budget(None if gib is None else gib << 30) == budget_gib * 2**30


def test_large_gpu_needs_few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    call, bytes_per_row, gpu = Call(kd.ForwardKL(), 128_256), 2 * 4 * 128_256, torch.device("cuda")
    assert engine.plan(call, 8192, bytes_per_row, gpu).count == 8
    monkeypatch.setattr(memory, "total_bytes", lambda device: 141 << 30)
    assert engine.plan(call, 8192, bytes_per_row, gpu).count == 2
    assert engine.plan(replace(call, memory_budget=1 << 30), 8192, bytes_per_row, gpu).count == 8


@pytest.mark.parametrize(("chunk_rows", "dtype"), [(8, torch.bfloat16), (4, torch.float32)])
def test_gpu_accumulates_the_head_gradient_in_float32_over_several_chunks(chunk_rows: int, dtype: torch.dtype) -> None:
    with FakeTensorMode():  # GPU tensors without a GPU
        hidden, weight, teacher = (torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (8, 100, 8))
        form = HeadForm(dtype=torch.bfloat16)
        call = Call(
            kd.ForwardKL(), 100, student=form, teacher=form, wants_input=True, wants_weight=True, chunk_rows=chunk_rows, backend="triton"
        )
        tensors = {"student.input": hidden, "student.weight": weight, "teacher.input": teacher, "teacher.weight": weight}
        outputs = engine.empty_outputs(call, Tensors(tensors))
    assert outputs.d_weight.dtype == dtype


def test_hidden_gradient_is_written_into_out() -> None:
    dz, weight = torch.randn(3, 7), torch.randn(7, 5)
    out = torch.full((3, 5), float("nan"))
    assert gemm.grad_hidden(dz, weight, 1.0, out) is out
    assert out.equal(dz @ weight)
    untouched = torch.full((3, 5), float("nan"))
    narrow = dz.bfloat16(), weight.bfloat16()
    assert gemm.grad_hidden(*narrow, 0.5, untouched).allclose(0.5 * (narrow[0].float() @ narrow[1].float()))
    assert untouched.isnan().all()
