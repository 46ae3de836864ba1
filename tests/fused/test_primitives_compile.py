"""The primitives under torch.compile, and opcheck of their custom ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import make_side
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.fused import ops, softmax


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LABELS = torch.tensor([[3, -100, 30, 0, 7], [1, 2, -100, -100, 9]])
IDS = torch.tensor([[3, -1, 30, 0, 7], [1, 2, -1, -1, 9]])
MANY = torch.stack([IDS, IDS.flip(0), torch.zeros_like(IDS)], -1)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda side, **kw: kd.cross_entropy(side, LABELS, backend="torch"),
    "cross_entropy, none": lambda side, **kw: kd.cross_entropy(side, LABELS, reduction="none", backend="torch"),
    "token_logprobs": lambda side, **kw: kd.token_logprobs(side, IDS, backend="torch", **kw),
    "token_logprobs of 3": lambda side, **kw: kd.token_logprobs(side, MANY, backend="torch", **kw),
    "logsumexp": lambda side, **kw: kd.logsumexp(side, backend="torch", **kw),
    "entropy": lambda side, **kw: kd.entropy(side, backend="torch", **kw),
}


def compare_compiled(step: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Check that a function compiles into one graph and gives the same value and gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for function in (step, torch.compile(step, backend=counter, fullgraph=True)):
        copies = [t.clone().requires_grad_() for t in leaves]
        value = function(*copies)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), copies)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_heads_compile_into_one_graph(name: str) -> None:
    """Operations before and after the call make a graph break visible as two graphs."""
    head = make_side((2, 5), 31, 8, bias=True)
    assert isinstance(head, kd.LMHead)
    assert head.bias is not None

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 2 * FUNCTIONS[name](kd.LMHead(torch.tanh(hidden), weight, bias, softcap=8.0)).square()

    compare_compiled(step, head.hidden, head.weight, head.bias)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_compile_into_one_graph(name: str) -> None:
    z = make_side((2, 5), 31, None)
    assert isinstance(z, Tensor)
    compare_compiled(lambda x: 2 * FUNCTIONS[name](torch.tanh(x)).square(), z)


@pytest.mark.parametrize("function", [kd.softmax, kd.log_softmax])
def test_softmax_compiles(function: Callable[..., Tensor]) -> None:
    z = torch.randn(2, 3, 31)
    compare_compiled(lambda x: function(2 * x, 0.7, backend="torch").square(), z)

    def in_place(x: Tensor) -> Tensor:
        x = x * 2
        function(x, 0.7, out=x, backend="torch")
        return x + function(x, out=torch.empty_like(x), backend="torch")

    torch.testing.assert_close(torch.compile(in_place, backend="aot_eager", fullgraph=True)(z), in_place(z))


def test_topk_and_sample_compile() -> None:
    head = make_side((2, 5), 31, 8)
    assert isinstance(head, kd.LMHead)

    def ids(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = kd.LMHead(hidden * 2, head.weight)
        top = kd.topk_logprobs(side, 3, backend="torch")
        return top.ids + 1, top.logprobs, kd.sample(side, 2, backend="torch").ids + 1

    compiled = torch.compile(ids, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    compiled_ids = compiled(head.hidden)
    torch.manual_seed(0)
    for a, b in zip(compiled_ids, ids(head.hidden), strict=True):
        assert torch.equal(a, b)


def test_changed_temperature_does_not_recompile() -> None:
    head = make_side((2, 5), 31, 8)
    assert isinstance(head, kd.LMHead)
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, temperature: float) -> Tensor:
        side = kd.LMHead(hidden, head.weight)
        return kd.entropy(side, temperature, backend="torch") + kd.token_logprobs(side, IDS, temperature, backend="torch")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    frames = []
    for i in range(5):
        torch.testing.assert_close(compiled(head.hidden, 2.0 - 0.1 * i), step(head.hidden, 2.0 - 0.1 * i))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[2], frames


def test_inductor_compiles_primitives() -> None:
    """Compile with the default compiler."""
    head = make_side((2, 5), 31, 8)
    assert isinstance(head, kd.LMHead)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        side = kd.LMHead(torch.tanh(hidden), weight)
        return kd.softmax(kd.token_logprobs(side, MANY, backend="torch") * 2, backend="torch").sum(-1) * kd.entropy(side, backend="torch")

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (head.hidden, head.weight)]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_invalid_ids_raise_when_compiled() -> None:
    z, ids = torch.randn(2, 5, 31), IDS.clone()
    ids[0, 0] = 31
    with pytest.raises(ValueError, match="ids contain 31"):
        torch.compile(lambda x: kd.token_logprobs(x, ids, backend="torch"), backend="aot_eager", fullgraph=True)(z)


# ---- the ops themselves


def captured(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], call: Callable[[], Tensor], module: ModuleType = ops
) -> dict[str, tuple[Any, ...]]:
    """Return the arguments that a real call passes to each op."""
    arguments: dict[str, tuple[Any, ...]] = {}
    for name in names:
        op = getattr(module, name)

        def recorded(*args: Any, op: Any = op, name: str = name) -> Any:
            arguments[name] = args
            return op(*args)

        monkeypatch.setattr(module, name, recorded)
    call().sum().backward()
    return arguments


GRADIENT_TESTS = (
    "test_schema",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)  # without the autograd test, since gradient ops raise there


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [8, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_primitives_pass_opcheck(name: str, dim: int | None, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # No ignored rows: then every element of the saved state is defined, and opcheck can compare it.
    for constant, ids in (("LABELS", LABELS), ("IDS", IDS), ("MANY", MANY)):
        monkeypatch.setitem(globals(), constant, ids.clamp(min=0))
    side = make_side((2, 5), 31, dim, bias=True)
    trained = [side] if isinstance(side, Tensor) else [side.hidden] if frozen else [side.hidden, side.weight, side.bias]
    for t in trained:
        assert t is not None
        t.requires_grad_()
    arguments = captured(monkeypatch, ("distill", "distill_backward"), lambda: FUNCTIONS[name](side))
    tensors, *rest = arguments["distill_backward"]
    args = ([t.detach() for t in tensors], *rest)  # before opcheck's own calls are captured
    library.opcheck(torch.ops.kdkernels.distill.default, arguments["distill"])
    with torch.no_grad():
        library.opcheck(torch.ops.kdkernels.distill_backward.default, args, test_utils=GRADIENT_TESTS)


def test_softmax_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, 3, 21, requires_grad=True)
    ops = torch.ops.kdkernels
    arguments = captured(monkeypatch, ("softmax", "softmax_backward"), lambda: kd.softmax(z, 2.0, backend="torch").square(), softmax)
    args = tuple(
        a.detach() if isinstance(a, Tensor) else a for a in arguments["softmax_backward"]
    )  # before opcheck's own calls are captured
    library.opcheck(ops.softmax.default, arguments["softmax"])
    library.opcheck(ops.softmax_backward.default, args, test_utils=GRADIENT_TESTS)
    _, *rest = arguments["softmax"]
    for logits in (z.detach(), None):
        library.opcheck(ops.softmax_out.default, (z.detach().clone(), logits, *rest))


def test_topk_and_sample_pass_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_side((2, 3), 21, 8, bias=True)
    arguments = captured(
        monkeypatch,
        ("topk_logprobs", "sample"),
        lambda: kd.topk_logprobs(head, 4, backend="torch").logprobs.requires_grad_() + kd.sample(head, 4, backend="torch").ids,
    )
    library.opcheck(torch.ops.kdkernels.topk_logprobs.default, arguments["topk_logprobs"])
    library.opcheck(torch.ops.kdkernels.sample.default, arguments["sample"])
