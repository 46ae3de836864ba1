"""The CPU's matrix product of bfloat16 operands into float32: its results for any shape, and when the loss uses it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import error, make_side, run, truth_of
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.fused.call import Call
from kdkernels.fused.work import Form
from kdkernels.sides.head import own_product

_C = pytest.importorskip("kdkernels._C")
if not _C.cpu_has_product():
    pytest.skip("this processor has no AVX-512 BF16 instructions", allow_module_level=True)


def operands(rows: int, columns: int, depth: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, depth, generator=generator).bfloat16() for n in (rows, columns))
    return a, b, torch.full((rows, columns), math.nan)


def check(a: Tensor, b: Tensor, out: Tensor) -> None:
    truth = a.double() @ b.double().t()
    # Error bound: the sum of the products' absolute values times the rounding of about depth / 2 additions.
    bound = (a.double().abs() @ b.double().abs().t()) * 2**-23 * max(1, a.shape[1]) ** 0.5
    assert ((out.double() - truth).abs() <= bound).all()


@given(st.integers(0, 20), st.integers(0, 150), st.integers(0, 40).map(lambda n: 2 * n), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_product_of_any_shape(rows: int, columns: int, depth: int, threads: int) -> None:
    a, b, _ = operands(rows, columns, depth)
    room = torch.full((rows + 1, columns + 5), 7.0)
    out = room[:rows, 2 : 2 + columns]
    _C.cpu_product(a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, columns, depth, a.stride(0), b.stride(0), room.stride(0), threads)
    check(a, b, out)
    room[:rows, 2 : 2 + columns] = 7
    assert (room == 7).all(), "only the result is written"


@pytest.mark.parametrize(("rows", "columns", "depth"), [(33, 1000, 512), (9, 97, 2048), (17, 49, 2050), (8, 48, 5000)])
def test_product_of_deep_and_wide_operands(rows: int, columns: int, depth: int) -> None:
    a, b, out = operands(rows, columns, depth)
    cpu.product(a, b, out)
    check(a, b, out)


def test_product_of_strided_and_non_finite_operands() -> None:
    a, b, out = operands(11, 60, 64)
    wide_a, wide_b = (torch.full((n, 100), math.nan, dtype=torch.bfloat16) for n in (11, 60))
    wide_a[:, 3:67], wide_b[:, 5:69] = a, b
    cpu.product(wide_a[:, 3:67], wide_b[:, 5:69], out)
    check(a, b, out)
    wide_a[4, 10], wide_b[7, 20] = math.nan, math.inf
    cpu.product(wide_a[:, 3:67], wide_b[:, 5:69], out)
    assert out[4].isnan().all()
    assert not out[:, 7].isfinite().any()
    others = torch.ones_like(out, dtype=torch.bool)
    others[4], others[:, 7] = False, False
    assert out[others].isfinite().all()


def test_product_of_odd_depth_raises() -> None:
    a, b, out = operands(2, 3, 5)
    with pytest.raises(ValueError, match="depth of the product must be even"):
        cpu.product(a, b, out)


@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32])
def test_loss_uses_the_product_for_bfloat16_heads(
    student_dtype: torch.dtype, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used for every bfloat16 head with float32 logits. The gradient is as accurate as with operands converted to float32."""
    student, teacher = make_side((40,), 300, 64, seed=1, dtype=student_dtype), make_side((40,), 300, 32, seed=2, dtype=torch.bfloat16)
    calls = []
    product = cpu.product
    monkeypatch.setattr(cpu, "product", lambda *tensors: (calls.append(tensors), product(*tensors))[1])
    truth = truth_of(student, teacher, {})
    result = run(kd.distillation_loss, student, teacher, {"backend": "native", "chunk_rows": chunk_rows})
    assert len(calls) == (1 + (student_dtype == torch.bfloat16)) * (1 if chunk_rows is None else 3)
    monkeypatch.setattr(cpu, "product_of", lambda *arguments: None)
    widened = run(kd.distillation_loss, student, teacher, {"backend": "native", "chunk_rows": chunk_rows})
    for name, true in truth.items():
        rounding = 2**-8 if name.startswith("d_") and student_dtype == torch.bfloat16 else 1e-6
        assert error(result[name], true) <= 2 * error(widened[name], true) + rounding * true.abs().max().item(), name


def test_unsupported_products_use_torch() -> None:
    odd, even = (make_side((4,), 30, d, seed=1, dtype=torch.bfloat16) for d in (7, 8))
    call = Call(kd.ForwardKL(), 30, student=Form(dtype=torch.bfloat16), teacher=Form(dtype=torch.bfloat16), backend="native")
    assert own_product(call, even.weight, torch.bfloat16)
    assert not own_product(call, odd.weight, torch.bfloat16)
    assert not own_product(call, even.weight.t().contiguous().t(), torch.bfloat16)
    assert not own_product(call, even.weight, torch.float32)
    loss = kd.distillation_loss(odd, even, backend="native")
    assert loss.isfinite()
