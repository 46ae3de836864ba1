"""Losses and primitives at their limits: temperatures close to 0, certain models, forward mode, vmap, and invalid values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor
from torch.autograd import forward_ad

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.backends.rows import FORWARD, STATE, RowBatch, Stage
from kdkernels.divergences import REGISTRY
from kdkernels.fused.call import Call


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_gradient(z: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    loss = kd.distillation_loss(z, teacher, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


# ---- a temperature close to 0


@pytest.mark.parametrize("temperature", [1e-9, 1e-25, 1e-300])
def test_softmax_and_draws_select_the_largest_logit(any_backend: str, device: str, temperature: float) -> None:
    z = 4 * normal(5, 300).to(device)
    hot = torch.nn.functional.one_hot(z.argmax(-1), 300).to(z.dtype)
    torch.testing.assert_close(kd.softmax(z, temperature, backend=any_backend), hot)
    assert torch.equal(kd.sample(z, 2, temperature, backend=any_backend).ids, z.argmax(-1, keepdim=True).expand(-1, 2).int())
    assert torch.equal(kd.entropy(z, temperature, backend=any_backend), torch.zeros_like(z[:, 0]))
    top = kd.topk_logprobs(z, 2, temperature, backend=any_backend)
    assert torch.equal(top.logprobs[:, 0], torch.zeros_like(z[:, 0]))
    assert bool((top.logprobs[:, 1] < -100).all())
    at_top = kd.token_logprobs(z, z.argmax(-1), temperature, backend=any_backend)
    assert torch.equal(at_top, torch.zeros_like(at_top))
    if temperature > 1e-30:
        torch.testing.assert_close(kd.logsumexp(z, temperature, backend=any_backend), z.amax(-1) / temperature)


@pytest.mark.parametrize("temperature", [1e-9, 1e-20])
def test_equal_largest_logits_share_the_probability(any_backend: str, device: str, temperature: float) -> None:
    z = normal(1, 700).to(device)
    z[0, [3, 400, 699]] = 7.25
    p = kd.softmax(z, temperature, backend=any_backend)
    torch.testing.assert_close(p[0, [3, 400, 699]], torch.full((3,), 1 / 3, device=device))
    torch.testing.assert_close(kd.entropy(z, temperature, backend=any_backend), torch.full((1,), math.log(3), device=device))
    generator = torch.Generator(device).manual_seed(0)
    drawn = kd.sample(z, 20, temperature, generator, backend=any_backend).ids
    assert set(drawn.flatten().tolist()) == {3, 400, 699}


@pytest.mark.parametrize("head", ["logits", "scale", "softcap", "bias"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl"])
def test_losses_at_a_tiny_temperature(any_backend: str, device: str, divergence: str, head: str) -> None:
    """With T^2 the divergences tend to 0. Without it, total variation and JSD tend to those of the two argmax tokens."""
    options = {"logits": {}, "scale": {"scale": 3.7}, "softcap": {"softcap": 5.0}, "bias": {"bias": normal(40, seed=3).to(device)}}[head]
    logits = [4 * normal(6, 40, seed=seed).to(device) for seed in (1, 2)]
    sides = logits if head == "logits" else [kd.LMHead(z, torch.eye(40, device=device), **options) for z in logits]
    logits[0].requires_grad_()
    settings = {"divergence": divergence, "temperature": 1e-11, "reduction": "none", "backend": any_backend}
    loss = kd.distillation_loss(*sides, **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), logits[0])
    assert float(loss.detach().abs().max()) < 1e-8
    assert float(gradient.abs().max()) < 1e-8
    if divergence in ("jsd", "total_variation"):
        unscaled = kd.distillation_loss(*sides, t_squared=False, **settings)
        exact = {"jsd": math.log(2), "total_variation": 1.0}[divergence]
        argmax = [kd.topk_logprobs(side, 1, backend=any_backend).ids[:, 0] for side in sides]
        torch.testing.assert_close(unscaled.detach(), exact * (argmax[0] != argmax[1]).to(unscaled.dtype))


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_ensemble_at_a_tiny_temperature(any_backend: str, device: str, mode: Any) -> None:
    students, teachers = normal(5, 30).to(device), [normal(5, 30, seed=s).to(device) for s in (1, 2, 3)]
    loss, gradient = loss_gradient(students, kd.Ensemble(teachers, mode=mode), temperature=1e-12, backend=any_backend)
    assert float(loss) < 1e-9
    assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("temperature", [1e-8, 1e-12, 1e-40])
def test_renormalised_topk_at_a_tiny_temperature(any_backend: str, device: str, temperature: float) -> None:
    """Two equal tokens of the teacher have probability 1/2 each, although their log-probabilities over T are huge."""
    ids = torch.tensor([[4, 7, 9, -1]], device=device)
    teacher = kd.TopK(ids, torch.tensor([[0.4, 0.4, 0.1, 1.0]], device=device).log(), tail="renorm")
    student = torch.zeros(1, 12, device=device)
    _, gradient = loss_gradient(student, teacher, temperature=temperature, t_squared=False, reduction="sum", backend=any_backend)
    expected = torch.full((1, 12), 1 / 12, device=device)
    expected[0, [4, 7]] -= 0.5
    torch.testing.assert_close(gradient * max(temperature, 2.0**-100), expected)


# ---- slopes and their sum


def certain(rows: int, vocab: int, temperature: float, device: str) -> tuple[Tensor, Tensor]:
    """Return logits of two models that both give probability 1 - 1e-8 to the same token."""
    sides = normal(rows, vocab), normal(rows, vocab, seed=1)
    top = torch.arange(rows) % vocab
    for seed, side in enumerate(sides):
        side[torch.arange(rows), top] = (25 + normal(rows, seed=7 + seed)) * temperature
    return sides[0].to(device), sides[1].to(device)


@pytest.mark.parametrize("divergence", sorted(REGISTRY.keys() - {"logit_mse"}))
def test_gradients_of_certain_models_are_accurate(backend: str, device: str, divergence: str) -> None:
    student, teacher = certain(24, 101, 1.5, device)
    options = {"divergence": divergence, "temperature": 1.5, "t_squared": False, "reduction": "none"}
    _, truth = loss_gradient(student.double(), teacher.double(), backend="reference", **options)
    _, gradient = loss_gradient(student, teacher, backend=backend, **options)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-3, atol=1e-5)
    assert float(gradient.sum(-1).abs().max()) < 1e-5


@pytest.mark.parametrize("softcap", [None, 80.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_head_gradient_of_certain_models_is_accurate(backend: str, device: str, scale: float, softcap: float | None) -> None:
    """Backward computes the logits again, and they may differ from forward's in the last bit."""
    student, teacher = certain(16, 64, 1.5, device)

    def weight_gradient(dtype: torch.dtype, backend: str) -> Tensor:
        weight = torch.eye(64, dtype=dtype, device=device).requires_grad_()
        sides = [
            kd.LMHead(z.to(dtype) / scale, w, scale=scale, softcap=softcap) for z, w in ((student, weight), (teacher, weight.detach()))
        ]
        options = {"divergence": "total_variation", "temperature": 1.5, "t_squared": False, "reduction": "none"}
        kd.distillation_loss(*sides, backend=backend, **options).sum().backward()
        assert weight.grad is not None
        return weight.grad.double()

    assert float((weight_gradient(torch.float32, backend) - weight_gradient(torch.float64, "reference")).abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["torch", "native", "triton", "cuda"])
def test_saved_normalisers_with_other_rounding_keep_gradients_small(name: str, device: str) -> None:
    """Backward sums the slopes that it writes, so a change of the saved normalisers by some ulp does not matter."""
    require(name, device)
    student, teacher = certain(12, 101, 1.5, device)
    problem = Call(kd.TotalVariation(), 101, temperature=1.5, t_squared=False, wants_input=True, backend=name)
    state, loss = torch.empty(len(STATE), 12, device=device), torch.empty(12, device=device)
    module = selection.load(name)
    module.rows(problem, RowBatch(student, teacher, None, None, None, None, state, loss=loss), FORWARD)
    for ulps in (-3, 0, 3):
        changed = state.clone()
        changed[1] += ulps * 6e-8
        dz = torch.full_like(student, math.nan)
        module.rows(problem, RowBatch(student, teacher, None, None, None, None, changed, dz=dz), Stage.SUMS | Stage.GRADIENT)
        assert float(dz.abs().max()) < 1e-5, ulps


# ---- forward-mode derivatives


TEACHER = normal(5, 40, seed=1)
FUNCTIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "distillation_loss": lambda z, b: kd.distillation_loss(z, TEACHER, backend=b),
    "cross_entropy": lambda z, b: kd.cross_entropy(z, torch.arange(5), backend=b),
    "token_logprobs": lambda z, b: kd.token_logprobs(z, torch.arange(5), backend=b).sum(),
    "logsumexp": lambda z, b: kd.logsumexp(z, backend=b).sum(),
    "entropy": lambda z, b: kd.entropy(z, backend=b).sum(),
    "softmax": lambda z, b: kd.softmax(z, backend=b).square().sum(),
    "log_softmax": lambda z, b: kd.log_softmax(z, backend=b).square().sum(),
}


def dual(f: Callable[[Tensor], Tensor], z: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, torch.ones_like(z)))).tangent


FORWARD_MODES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.ones_like(z),)),
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z),
    "linearize": lambda f, z: torch.func.linearize(f, z),
    "hessian": lambda f, z: torch.func.hessian(f)(z),
    "forward_ad": dual,
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_raises_with_the_functions_name(name: str, mode: str) -> None:
    with pytest.raises(RuntimeError, match=rf"kdkernels\.{name} has no forward-mode derivative.*backend=\"reference\""):
        FORWARD_MODES[mode](lambda z: FUNCTIONS[name](z, "torch"), normal(5, 40))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_of_the_reference_equals_the_gradient(name: str) -> None:
    z, direction = normal(5, 40).double(), normal(5, 40, seed=2).double()
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](leaf := z.clone().requires_grad_(), "reference"), leaf)
    _, tangent = torch.func.jvp(lambda x: FUNCTIONS[name](x, "reference"), (z,), (direction,))
    torch.testing.assert_close(tangent, (gradient * direction).sum(), check_dtype=False)


def test_tangents_of_weights_and_out_raise() -> None:
    z, y, weights = normal(5, 40), normal(5, 40, seed=1), torch.rand(5)
    with pytest.raises(RuntimeError, match="token_weights have a forward-mode tangent"):
        torch.func.jvp(lambda w: kd.distillation_loss(z, y, token_weights=w, backend="reference"), (weights,), (weights,))
    with pytest.raises(RuntimeError, match="out= records no forward-mode derivative"):
        torch.func.jvp(lambda x: kd.softmax(x, out=torch.empty_like(z)), (z,), (z,))
    with forward_ad.dual_level():  # an open level without tangents is allowed
        assert torch.isfinite(kd.distillation_loss(z, y))


# ---- numbers of items


@pytest.mark.parametrize("value", [-1, -2.5, math.nan, math.inf])
@pytest.mark.parametrize("function", ["distillation_loss", "cross_entropy"])
def test_invalid_num_items_raise(function: str, value: float) -> None:
    second = normal(4, 30, seed=1) if function == "distillation_loss" else torch.arange(4)
    for items in (value, torch.tensor(value), torch.tensor([value], dtype=torch.float64)):
        with pytest.raises(ValueError, match="num_items must be finite and >= 0"):
            getattr(kd, function)(normal(4, 30), second, num_items=items)


@pytest.mark.parametrize("items", [0, 0.0, torch.tensor(0)])
def test_num_items_0_raises_with_valid_tokens(any_backend: str, device: str, items: Any) -> None:
    z, y = normal(4, 30).to(device), normal(4, 30, seed=1).to(device)
    with pytest.raises(ValueError, match="num_items is 0, but 4 tokens are valid"):
        kd.distillation_loss(z, y, num_items=items, backend=any_backend)
    labels = torch.full((4,), -100, device=device)
    assert float(kd.distillation_loss(z, y, labels=labels, num_items=items, backend=any_backend)) == 0.0
    assert float(kd.cross_entropy(z, labels, num_items=items, backend=any_backend)) == 0.0


@pytest.mark.gpu
def test_num_items_0_on_a_gpu_is_not_read() -> None:
    z, y = normal(4, 30).cuda(), normal(4, 30, seed=1).cuda()
    assert not torch.isfinite(kd.distillation_loss(z, y, num_items=torch.tensor(0, device="cuda")))


# ---- vmap


def test_vmap_of_the_reference_equals_separate_calls() -> None:
    z, y, labels = normal(3, 5, 40), normal(3, 5, 40, seed=1), torch.arange(15).view(3, 5)
    labels[0, 1] = labels[2, 3] = -100
    weights, draws = torch.rand(3, 5), kd.sample(y, 2)
    top = kd.topk_logprobs(y, 4)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "labels": (lambda z, y, c: kd.distillation_loss(z, y, labels=c, ce_weight=0.5, backend="reference"), (z, y, labels)),
        "weights": (lambda z, y, w: kd.distillation_loss(z, y, token_weights=w, backend="reference"), (z, y, weights)),
        "cross-entropy": (lambda z, c: kd.cross_entropy(z, c, backend="reference"), (z, labels)),
        "ids": (lambda z, c: kd.token_logprobs(z, c, backend="reference"), (z, labels.clamp(min=-1))),
        "items": (lambda z, y, n: kd.distillation_loss(z, y, num_items=n, backend="reference"), (z, y, torch.tensor([1.0, 2.0, 3.0]))),
        "top-k": (lambda z, i, p: kd.distillation_loss(z, kd.TopK(i, p), backend="reference"), (z, top.ids, top.logprobs)),
        "draws": (lambda z, i, n: kd.distillation_loss(z, kd.Sampled(i, n), backend="reference"), (z, draws.ids, draws.counts)),
    }
    for name, (function, arguments) in calls.items():
        mapped = torch.func.vmap(function)(*arguments)
        each = torch.stack([function(*row) for row in zip(*arguments, strict=True)])
        torch.testing.assert_close(mapped, each, msg=lambda text, name=name: f"{name}: {text}")


# ---- shared memory


@pytest.mark.parametrize("function", [kd.softmax, kd.log_softmax])
@pytest.mark.parametrize("bridge", ["numpy", "dlpack"])
def test_overlapping_out_raises(function: Callable[..., Tensor], bridge: str) -> None:
    memory = np.zeros(1001, dtype=np.float32)
    wrap = torch.from_numpy if bridge == "numpy" else torch.from_dlpack
    logits, shifted = wrap(memory[:-1]).view(10, 100), wrap(memory[1:]).view(10, 100)
    with pytest.raises(ValueError, match="out partially overlaps"):
        function(logits, out=shifted)
    logits.copy_(normal(10, 100))
    expected, same = function(logits.clone()), wrap(memory[:-1]).view(10, 100)
    function(logits, out=same)  # exactly the same memory is allowed: in place
    torch.testing.assert_close(logits, expected)


# ---- sparse teachers


def test_impossible_probabilities_raise(any_backend: str, device: str) -> None:
    z = normal(3, 50).to(device)
    ids = torch.tensor([[4, 7, 9]] * 3, device=device)

    def loss(values: list[float], *, tail: Any = "bucket", dtype: torch.dtype = torch.float32, labels: Tensor | None = None) -> Tensor:
        logprobs = torch.tensor([[0.5, 0.2, 0.1], values, [0.5, 0.2, 0.1]], device=device).log().to(dtype)
        return kd.distillation_loss(z, kd.TopK(ids, logprobs, tail=tail), labels=labels, backend=any_backend)

    for tail in ("bucket", "zero"):
        for values, total in (([0.9, 0.8, 0.7], "2.4"), ([0.6, 0.3, 0.15], "1.05"), ([0.5, 0.5, 0.04], "1.04")):
            with pytest.raises(ValueError, match=rf"TopK.logprobs of a position add up to a probability of {total} \(1 such"):
                loss(values, tail=tail)
    labels = torch.tensor([1, -100, 2], device=device)
    assert torch.isfinite(loss([0.9, 0.8, 0.7], labels=labels)), "an ignored row is not checked"
    assert torch.isfinite(loss([0.9, 0.8, 0.7], tail="renorm"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.isfinite(loss([0.7, 0.2, 0.1 + 1e-6], dtype=dtype)), "rounding"
    for tail in ("bucket", "zero", "renorm"):
        with pytest.raises(ValueError, match=r"TopK\.logprobs contain nan"):
            loss([0.5, math.nan, 0.1], tail=tail)
    for count in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=r"Sampled\.counts contain"):
            kd.distillation_loss(z, kd.Sampled(ids, torch.tensor([[1.0, count, 2.0]] * 3, device=device)), backend=any_backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("confidence", [5.0, 12.0, 30.0, 200.0])
def test_backends_equal_the_reference_for_a_confident_student(backend: str, device: str, divergence: str, confidence: float) -> None:
    z = normal(3, 50).to(device)
    z[:, 3] = confidence
    ids = torch.tensor([[3, 8, -1], [3, -1, -1], [8, 3, 5]], device=device)
    teacher = kd.TopK(ids, torch.tensor([[0.6, 0.2, 0.9], [0.9, 0.9, 0.9], [0.2, 0.5, 0.1]], device=device).log())
    reference, gradient = (loss_gradient(z, teacher, divergence=divergence, reduction="none", backend=b)[1] for b in ("reference", backend))
    torch.testing.assert_close(gradient, reference, rtol=2e-3, atol=2e-4)


def test_topk_of_the_whole_vocabulary_equals_the_reference() -> None:
    z, log_p = normal(2, 6), normal(2, 6, seed=1).log_softmax(-1)
    teacher = kd.TopK(torch.arange(6).expand(2, 6), log_p)
    gradients = [loss_gradient(z, teacher, reduction="none", backend=b)[1] for b in ("reference", "torch")]
    torch.testing.assert_close(*gradients)
