"""The compiled CPU kernels: conversions, instruction sets, threads and argument checks. tests/fused compares results of all backends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import divergences
from kdkernels.backends import _extension, cpu
from kdkernels.backends.rows import FORWARD, STATE, HeadBatch, RowBatch, Stage
from kdkernels.fused.call import Call
from kdkernels.fused.work import Form

_C = pytest.importorskip("kdkernels._C")


def test_compiled_divergences_equal_the_registry() -> None:
    assert _C.divergences() == sorted((cls.id, name, cls.slope_sum) for name, cls in divergences.REGISTRY.items())


def test_copy_without_the_extension_names_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone shadows the installed package where Python is started in it."""
    installed, clone = tmp_path / "site" / "kdkernels", tmp_path / "clone" / "kdkernels"
    for folder in (installed, clone, tmp_path / "site" / "kdkernels-0.1.0.dist-info"):
        folder.mkdir(parents=True)
    (installed.parent / "kdkernels-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kdkernels\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    assert _extension.shadowed(clone) != installed
    (installed / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    assert _extension.shadowed(clone) == installed
    assert _extension.shadowed(installed) != installed


PARAMETERS = [
    *(cls() for cls in divergences.REGISTRY.values()),
    kd.SymmetricKL(0.9), kd.JSD(0.01), kd.JSD(0.99), kd.SkewKL(0.7), kd.SkewReverseKL(0.7), kd.AlphaDivergence(-0.5),
    kd.AlphaDivergence(2.0), kd.ABDivergence(0.5, -0.2), kd.ABDivergence(1.5, 1.5),
]  # fmt: skip


@pytest.mark.parametrize("divergence", PARAMETERS, ids=str)
def test_columns_equal_the_python_terms(divergence: divergences.Divergence) -> None:
    """Compare single columns in float64, with probabilities of 0, p = q, and p near q."""
    a, b = divergence.kernel_parameters
    logs = [0.0, -1e-9, -0.3, -5.0, -5.0 - 1e-7, -40.0, -600.0, -math.inf]
    for log_q in logs:
        for log_p in logs:
            lq, lp = (torch.tensor([x], dtype=torch.float64) for x in (log_q, log_p))
            expected = divergence.terms(lq, lp, lq.exp(), lp.exp())
            actual = _C.divergence_terms(divergence.id, log_q, log_p, lq.exp().item(), lp.exp().item(), a, b)
            # A value near p = q is a difference of two numbers of this size.
            size = max(math.exp(log_q), math.exp(log_p))
            for value, expected_value in zip(actual, expected, strict=True):
                assert value == pytest.approx(expected_value.item(), rel=1e-13, abs=4e-16 * size, nan_ok=True), (log_q, log_p)


def run_rows(student: Tensor, teacher: Tensor, divergence: divergences.Divergence, dz_dtype: torch.dtype, **options: float) -> RowBatch:
    count, vocab = student.shape
    problem = Call(divergence, vocab, student=Form(dtype=student.dtype), teacher=Form(dtype=teacher.dtype), t_squared=False, **options)  # type: ignore[arg-type]
    dtype = problem.compute_dtype
    batch = RowBatch(
        student, teacher, None, None, None, None, torch.zeros(len(STATE), count, dtype=dtype), torch.empty(count, dtype=dtype), None,
        torch.empty(count, vocab, dtype=dz_dtype),
    )  # fmt: skip
    cpu.rows(problem, batch, FORWARD | Stage.GRADIENT)
    return batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    """The gradient of LogitMSE against zeros is the logits. All 65536 bit patterns are read and written."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    dz = run_rows(patterns, torch.zeros_like(patterns), kd.LogitMSE(), dtype).dz
    assert dz is not None
    same = (dz == patterns) | (dz.isnan() & patterns.isnan())
    assert same.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_rounded_like_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (64, 4096), generator=generator).to(torch.int32).view(torch.float32)
    near_ties = (torch.randn(64, 4096, generator=generator).to(dtype).float().view(torch.int32) + torch.randint(-1, 2, (64, 4096))).view(
        torch.float32
    )
    for logits in (bits, near_ties, bits * 1e-30):
        dz = run_rows(logits, torch.zeros_like(logits), kd.LogitMSE(), dtype).dz
        assert dz is not None
        expected = logits.to(dtype)
        assert ((dz == expected) | (dz.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree_for_two_sides(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(9, 1037, generator=generator, dtype=dtype) * 5 for _ in range(2))
    best = run_rows(student, teacher, kd.JSD(0.3), dtype, temperature=2.0)
    rows = _C.cpu_rows
    monkeypatch.setattr(_C, "cpu_rows", lambda arguments, threads: rows(arguments, threads, isa))
    result = run_rows(student, teacher, kd.JSD(0.3), dtype, temperature=2.0)
    close = {"rtol": 64 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(result.loss, best.loss, **close)
    torch.testing.assert_close(result.dz, best.dz, **close)


def test_number_of_threads_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(64, 4099, generator=generator) for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with_one_thread = run_rows(student, teacher, kd.SkewKL(), torch.float32)
        torch.set_num_threads(5)
        with_five_threads = run_rows(student, teacher, kd.SkewKL(), torch.float32)
    finally:
        torch.set_num_threads(before)
    assert with_one_thread.dz is not None
    assert with_five_threads.dz is not None
    assert torch.equal(with_one_thread.dz, with_five_threads.dz)
    assert torch.equal(with_one_thread.state, with_five_threads.state)


def test_arguments_of_compiled_kernels_are_checked() -> None:
    logits = torch.randn(4, 8)
    with pytest.raises(ValueError, match="unit stride"):
        run_rows(torch.randn(8, 4).t(), logits, kd.ForwardKL(), torch.float32)
    batch = RowBatch(logits, logits, None, None, None, None, torch.empty(len(STATE), 4), dz=torch.empty(4, 7))
    with pytest.raises(ValueError, match=r"dz must be .* of shape \[4, 8\]"):
        cpu.rows(Call(kd.ForwardKL(), 8), batch, FORWARD | Stage.GRADIENT)
    arguments = _C.RowArguments()
    arguments.divergence = 99
    with pytest.raises(ValueError, match="id 99"):
        _C.cpu_rows(arguments, 1)
    arguments.divergence, arguments.rows, arguments.vocab = 0, 1, 1
    with pytest.raises(ValueError, match="no instruction set mmx"):
        _C.cpu_rows(arguments, 1, "mmx")


def head_rows(logits: Tensor, **replaced: Tensor) -> HeadBatch:
    """Return a batch with all outputs of the one-side kernel. ``replaced`` overrides its tensors."""
    count, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    problem = Call(kd.ForwardKL(), vocab, quantity="entropy", temperature=1.3, student=Form(dtype=logits.dtype))
    ids = torch.arange(3 * count).view(count, 3) % vocab
    parts = {
        "entropy": torch.empty(count, dtype=dtype), "ids": ids, "logprobs": torch.empty(count, 3, dtype=dtype),
        "d_lse": torch.ones(count, dtype=dtype), "d_entropy": torch.ones(count, dtype=dtype),
        "d_logprobs": torch.ones(count, 3, dtype=dtype), "dz": torch.empty(count, vocab, dtype=dtype),
        "top_ids": torch.empty(count, 5, dtype=torch.int32), "top_logprobs": torch.empty(count, 5, dtype=dtype),
        "draws": torch.empty(count, 4, dtype=torch.int32), "seed": torch.tensor(7),
    }  # fmt: skip
    batch = HeadBatch(logits, None, torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype), **{**parts, **replaced})
    cpu.head_rows(problem, batch, FORWARD | Stage.GRADIENT)
    return batch


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree_for_one_side(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws and top-k ids are identical; the rest agrees up to rounding."""
    logits = torch.randn(9, 1037, generator=torch.Generator().manual_seed(1), dtype=dtype) * 5
    best = head_rows(logits)
    softmax = kd.softmax(logits, 0.7, backend="native")
    for name in ("cpu_head_rows", "cpu_softmax_rows"):
        run = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda arguments, threads, run=run: run(arguments, threads, isa))
    result = head_rows(logits)
    close = {"rtol": 64 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}  # log q is a difference of numbers of up to 20
    for name in ("top", "log_sum", "entropy", "logprobs", "dz", "top_logprobs"):
        torch.testing.assert_close(getattr(result, name), getattr(best, name), **close)
    for name in ("top_ids", "draws"):
        assert torch.equal(getattr(result, name), getattr(best, name)), name
    torch.testing.assert_close(kd.softmax(logits, 0.7, backend="native"), softmax, **close)


def test_arguments_of_one_side_kernels_are_checked() -> None:
    logits = torch.randn(4, 8)
    with pytest.raises(ValueError, match="logprobs must be contiguous"):
        head_rows(logits, logprobs=torch.empty(3, 4).t())
    with pytest.raises(ValueError, match=r"entropy must be torch.float32 of shape \[4\]"):
        head_rows(logits, entropy=torch.empty(5))
    with pytest.raises(ValueError, match=r"out must be .* of shape \[4, 8\]"):
        cpu.softmax_rows(logits, torch.empty(4, 9), 1.0, False)
    arguments = _C.HeadArguments()
    arguments.rows, arguments.vocab, arguments.num_top = 1, 4, 5
    with pytest.raises(ValueError, match="the number of the largest"):
        _C.cpu_head_rows(arguments, 1)
