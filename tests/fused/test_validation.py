"""Invalid arguments raise the right exception, with name and value, before any computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.fused import engine, gemm

N, V, DS, DT = 6, 33, 8, 12


def student(**changes: Any) -> kd.LMHead:
    return kd.LMHead(**{"hidden": torch.randn(N, DS), "weight": torch.randn(V, DS), **changes})


def teacher(**changes: Any) -> kd.LMHead:
    return kd.LMHead(**{"hidden": torch.randn(N, DT), "weight": torch.randn(V, DT), **changes})


def labels(value: int | None = None) -> Tensor:
    values = torch.arange(N)
    if value is not None:
        values[2] = value
    return values


def ones(value: float | None = None) -> Tensor:
    values = torch.ones(N)
    if value is not None:
        values[3] = value
    return values


# Arguments, exception, and a pattern for the message: name, value and remedy.
INVALID: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    # shapes
    "leading shapes": (lambda: {"teacher": teacher(hidden=torch.randn(2, 3, DT))}, ValueError, r"teacher.*\[2, 3\].*student \[6\]"),
    "leading sizes": (lambda: {"teacher": torch.randn(5, V)}, ValueError, r"teacher.*\[5\].*student \[6\]"),
    "one dimension": (lambda: {"student": torch.randn(V)}, ValueError, r"student must have .*dimensions.*\[33\]"),
    "hidden of one dimension": (lambda: {"student": student(hidden=torch.randn(DS))}, ValueError, r"student\.hidden must .*\[8\]"),
    "hidden size": (lambda: {"student": student(hidden=torch.randn(N, 9))}, ValueError, r"student\.hidden has size 9.*\[33, 8\]"),
    "hidden size 0": (
        lambda: {"student": student(hidden=torch.randn(N, 0), weight=torch.randn(V, 0))},
        ValueError,
        r"student\.hidden has hidden size 0.*\[6, 0\]",
    ),
    "teacher hidden size": (lambda: {"teacher": teacher(weight=torch.randn(V, 5))}, ValueError, r"teacher\.hidden has size 12.*\[33, 5\]"),
    "weight of one dimension": (
        lambda: {"student": student(weight=torch.randn(V))},
        ValueError,
        r"student\.weight must be \[V, D\].*\[33\]",
    ),
    "empty head": (lambda: {"student": student(weight=torch.randn(0, DS))}, ValueError, r"student\.weight.*\[0, 8\]"),
    "empty vocabulary": (lambda: {"student": torch.randn(N, 0)}, ValueError, r"student has an empty vocabulary.*\[6, 0\]"),
    "bias shape": (lambda: {"student": student(bias=torch.randn(V + 1))}, ValueError, r"student\.bias must be \[33\].*\[34\]"),
    "bias of the cut size": (
        lambda: {"student": student(weight=torch.randn(V + 3, DS), bias=torch.randn(V), vocab_size=V)},
        ValueError,
        r"student\.bias.*\[36\].*\[33\]",
    ),
    "vocabularies": (lambda: {"teacher": teacher(weight=torch.randn(40, DT))}, ValueError, r"student 33, teacher 40.*vocab_size="),
    "vocabularies, dense": (lambda: {"student": torch.randn(N, 31)}, ValueError, r"student 31, teacher 33.*vocab_size="),
    "labels shape": (lambda: {"labels": torch.zeros(5, dtype=torch.long)}, ValueError, r"labels must have the leading shape \[6\].*\[5\]"),
    "labels unflattened": (lambda: {"labels": torch.zeros(2, 3, dtype=torch.long)}, ValueError, r"labels.*\[6\].*\[2, 3\]"),
    "token_weights shape": (lambda: {"token_weights": torch.ones(N, 1)}, ValueError, r"token_weights must.*\[6\].*\[6, 1\]"),
    "num_items shape": (lambda: {"num_items": torch.ones(2)}, ValueError, r"num_items must be one number.*\[2\]"),
    # types
    "no tensor": (lambda: {"student": [[1.0]]}, TypeError, "student must be an LMHead or a tensor.*got list"),
    "no teacher": (lambda: {"teacher": None}, TypeError, "teacher must be .*got NoneType"),
    "tuple of hidden and head": (lambda: {"teacher": (torch.ones(2), torch.ones(2))}, TypeError, "teacher must be .*got tuple"),
    "hidden is not a tensor": (lambda: {"student": student(hidden=[1.0])}, TypeError, r"student\.hidden must be a tensor.*list"),
    "weight is a module": (
        lambda: {"student": student(weight=torch.nn.Linear(DS, V))},
        TypeError,
        r"student\.weight must be a tensor.*Linear",
    ),
    "integer logits": (lambda: {"student": torch.ones(N, V, dtype=torch.long)}, TypeError, r"student must be float.*int64.*\.float\(\)"),
    "complex logits": (lambda: {"teacher": torch.ones(N, V, dtype=torch.complex64)}, TypeError, r"teacher must be float.*complex64"),
    "boolean hidden": (lambda: {"student": student(hidden=torch.ones(N, DS, dtype=torch.bool))}, TypeError, r"student\.hidden.*bool"),
    "integer head": (lambda: {"student": student(weight=torch.ones(V, DS, dtype=torch.int8))}, TypeError, r"student\.weight.*int8"),
    "integer bias": (lambda: {"student": student(bias=torch.ones(V, dtype=torch.int))}, TypeError, r"student\.bias.*int32"),
    "head of another dtype": (
        lambda: {"student": student(weight=torch.randn(V, DS).bfloat16())},
        TypeError,
        r"student\.hidden is torch\.float32, student\.weight torch\.bfloat16.*autocast",
    ),
    "float labels": (lambda: {"labels": torch.zeros(N)}, TypeError, r"labels must be integers.*float32"),
    "boolean labels": (lambda: {"labels": torch.ones(N, dtype=torch.bool)}, TypeError, r"labels must be integers.*bool"),
    "labels list": (lambda: {"labels": [1] * N}, TypeError, "labels must be a tensor, got list"),
    "integer token_weights": (lambda: {"token_weights": torch.ones(N, dtype=torch.long)}, TypeError, r"token_weights.*int64.*\.float\(\)"),
    "boolean token_weights": (lambda: {"token_weights": torch.ones(N, dtype=torch.bool)}, TypeError, r"token_weights.*bool"),
    "token_weights that require grad": (lambda: {"token_weights": ones().requires_grad_()}, ValueError, "token_weights require grad.*none"),
    "temperature tensor": (lambda: {"temperature": torch.tensor(2.0)}, TypeError, r"temperature must be a Python number.*Tensor.*item"),
    "temperature text": (lambda: {"temperature": "2"}, TypeError, "temperature must be.*str"),
    "kd_weight None": (lambda: {"kd_weight": None}, TypeError, "kd_weight must be.*NoneType"),
    # values
    **{
        f"temperature {t}": (lambda t=t: {"temperature": t}, ValueError, f"temperature must be finite and > 0, got {t}")
        for t in (0, 0.0, -1.0, math.inf, math.nan)
    },
    **{
        f"ce_weight {w}": (lambda w=w: {"ce_weight": w, "labels": labels()}, ValueError, f"ce_weight.*got {w}")
        for w in (-0.5, math.inf, math.nan)
    },
    **{f"kd_weight {w}": (lambda w=w: {"kd_weight": w}, ValueError, f"kd_weight.*got {w}") for w in (-0.5, math.inf, math.nan)},
    "ce_weight without labels": (lambda: {"ce_weight": 0.5}, ValueError, r"ce_weight=0\.5 needs labels"),
    "label at the vocabulary's size": (
        lambda: {"labels": labels(V)},
        ValueError,
        r"labels contain 33 \(1 such.*\[0, 33\).*ignore_index=-100",
    ),
    "negative label": (lambda: {"labels": labels(-1), "ce_weight": 1.0}, ValueError, r"labels contain -1 .*ignore_index=-100"),
    "label far outside": (lambda: {"labels": labels(2**40)}, ValueError, r"labels contain 1099511627776"),
    **{
        f"token weight {w}": (lambda w=w: {"token_weights": ones(w)}, ValueError, rf"token_weights contain {w} \(1 such")
        for w in (-1.0, math.inf, math.nan)
    },
    "num_items negative": (lambda: {"num_items": -1}, ValueError, "num_items.*-1"),
    "num_items NaN": (lambda: {"num_items": math.nan}, ValueError, "num_items.*nan"),
    "num_items list": (lambda: {"num_items": [3]}, TypeError, "num_items must be a number or a tensor of one, got list"),
    "ignore_index None": (lambda: {"ignore_index": None}, TypeError, "ignore_index must be an int, got None.*-100"),
    "ignore_index float": (lambda: {"ignore_index": 1.5, "labels": labels()}, TypeError, r"ignore_index must be an int, got 1\.5"),
    "t_squared text": (lambda: {"t_squared": "no"}, TypeError, "t_squared must be True or False, got 'no'"),
    "t_squared None": (lambda: {"t_squared": None}, TypeError, "t_squared must be True or False, got None"),
    "return_stats text": (lambda: {"return_stats": "no"}, TypeError, "return_stats must be True or False, got 'no'"),
    "reduction": (lambda: {"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
    "memory_budget below a row": (lambda: {"memory_budget": 100}, ValueError, "memory_budget=100 bytes.*minimum here is 384 bytes"),
    "memory_budget 0": (lambda: {"memory_budget": 0}, ValueError, "memory_budget must be a positive int.*got 0"),
    "memory_budget float": (lambda: {"memory_budget": 1e9}, ValueError, r"memory_budget must be a positive int.*1000000000\.0"),
    "chunk_rows -1": (lambda: {"chunk_rows": -1}, ValueError, "chunk_rows must be a positive int.*-1"),
    "chunk_rows True": (lambda: {"chunk_rows": True}, ValueError, "chunk_rows must be a positive int.*True"),
    "logits_dtype without such heads": (lambda: {"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype=torch.bfloat16.*torch.float32"),
    "logits_dtype int": (lambda: {"logits_dtype": torch.int8}, ValueError, "logits_dtype=torch.int8"),
    "vocab_size 0": (lambda: {"student": student(vocab_size=0)}, ValueError, r"student\.vocab_size.*\[1, 33\].*got 0"),
    "vocab_size too large": (lambda: {"teacher": teacher(vocab_size=34)}, ValueError, r"teacher\.vocab_size.*\[1, 33\].*got 34"),
    "vocab_size float": (lambda: {"teacher": teacher(vocab_size=33.0)}, ValueError, r"teacher\.vocab_size.*33\.0"),
    "scale None": (lambda: {"student": student(scale=None)}, TypeError, r"student\.scale must be a Python number.*NoneType"),
    "scale tensor": (lambda: {"student": student(scale=torch.ones(()))}, TypeError, r"student\.scale must be.*Tensor.*\.item\(\)"),
    "softcap text": (lambda: {"teacher": teacher(softcap="30")}, TypeError, r"teacher\.softcap must be a Python number.*str"),
    "scale 0": (lambda: {"student": student(scale=0.0)}, ValueError, r"student\.scale.*0\.0"),
    "scale NaN": (lambda: {"teacher": teacher(scale=math.nan)}, ValueError, r"teacher\.scale.*nan"),
    "softcap 0": (lambda: {"student": student(softcap=0.0)}, ValueError, r"student\.softcap.*None.*0\.0"),
    "softcap negative": (lambda: {"student": student(softcap=-30.0)}, ValueError, r"student\.softcap.*-30"),
    "softcap infinite": (lambda: {"student": student(softcap=math.inf)}, ValueError, r"student\.softcap.*inf"),
    # choices
    "divergence name": (lambda: {"divergence": "kl"}, ValueError, "divergence 'kl' is unknown.*forward_kl, reverse_kl"),
    "divergence class": (lambda: {"divergence": kd.JSD}, TypeError, r"JSD\(\) instead of JSD"),
    "divergence None": (lambda: {"divergence": None}, TypeError, "divergence.*NoneType"),
    "backend name": (lambda: {"backend": "jax"}, ValueError, "backend 'jax' is unknown.*torch"),
    # devices
    "teacher elsewhere": (
        lambda: {"teacher": torch.randn(N, V, device="meta")},
        ValueError,
        r"teacher is on meta, student on cpu.*\.to\(device\)",
    ),
    "head elsewhere": (lambda: {"student": student(weight=torch.randn(V, DS, device="meta"))}, ValueError, r"student\.weight is on meta"),
    "bias elsewhere": (lambda: {"student": student(bias=torch.randn(V, device="meta"))}, ValueError, r"student\.bias is on meta"),
    "labels elsewhere": (lambda: {"labels": labels().to("meta")}, ValueError, "labels is on meta, student on cpu"),
    "token_weights elsewhere": (lambda: {"token_weights": ones().to("meta")}, ValueError, "token_weights is on meta, student on cpu"),
}


@pytest.fixture
def no_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed before the arguments were checked")

    for name in ("logits", "grad_hidden", "add_grad_weight"):
        monkeypatch.setattr(gemm, name, fail)
    for name in ("mm", "matmul", "softmax", "log_softmax"):
        monkeypatch.setattr(torch, name, fail)
    for name in ("torch", "native"):
        monkeypatch.setattr(selection.load(name), "rows", fail)


@pytest.mark.usefixtures("no_computation")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_raise_before_any_computation(case: str, backend: str) -> None:
    if backend == "reference" and "memory_budget below" in case:
        pytest.skip("the reference ignores the budget")
    make, error, message = INVALID[case]
    torch.manual_seed(0)
    with pytest.raises(error, match=message) as caught:
        kd.distillation_loss(**{"student": student(), "teacher": teacher(), "backend": backend, **make()})
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("case", INVALID)
def test_plan_raises_the_same_errors(case: str) -> None:
    make, error, message = INVALID[case]
    with pytest.raises(error, match=message):
        kd.plan(**{"student": student(), "teacher": teacher(), "backend": "torch", **make()})


def test_unchanged_call_of_the_invalid_cases_is_valid() -> None:
    """Without their change, the invalid calls pass, also with every optional argument."""
    loss = kd.distillation_loss(
        student(bias=torch.randn(V), softcap=3.0), teacher(), labels=labels(), token_weights=ones(), ce_weight=0.5, memory_budget=384
    )
    assert torch.isfinite(loss)


def test_invalid_values_at_ignored_positions_are_accepted() -> None:
    weights = ones(math.nan)
    target = labels()
    target[3] = -100
    assert torch.isfinite(kd.distillation_loss(student(), teacher(), labels=target, token_weights=weights))


def test_invalid_call_leaves_no_gradient() -> None:
    side = student(hidden=torch.randn(N, DS, requires_grad=True))
    with pytest.raises(ValueError, match="labels"):
        kd.distillation_loss(side, teacher(), labels=labels(V)).backward()
    assert side.hidden.grad is None


def test_warning_names_the_callers_file() -> None:
    grad = teacher(hidden=torch.randn(N, DT, requires_grad=True))
    with pytest.warns(UserWarning, match="the teacher requires grad: it is detached") as caught:
        kd.distillation_loss(student(), grad)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_values_are_checked_once_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are selected once for both passes, since each selection synchronises with a GPU."""
    selections = 0
    select = engine.select_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal selections
        selections += 1
        return select(*args, **kwargs)

    monkeypatch.setattr(engine, "select_rows", counted)
    side = student(hidden=torch.randn(N, DS, requires_grad=True), weight=torch.randn(V, DS, requires_grad=True))
    target = labels()
    target[1] = -100
    for reduction in ("sum", "none"):  # backward scales the gradients or computes them
        selections = 0
        kd.distillation_loss(side, teacher(), labels=target, reduction=reduction, backend="torch").sum().backward()
        assert selections == 1
