"""Run every kernel of a backend once, compare with float64, and print a line for each. Run this first on a new GPU.

    python -m benchmarks.gpu_smoke --backend triton [--device cuda] [--vocab 128256 --vocab 50257 --vocab 777]

The loss runs as in training: bfloat16 hidden states and heads, with float32 logits (overwritten by the gradient) and with bfloat16
logits. A check passes if the error is at most twice that of the torch backend on the same numbers, plus a floor. Lines are flushed, so that
the last one before a crash names the kernel. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor

import kdkernels as kd

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation")
VOCABULARIES = (128256, 50257, 777)
N, DS, DT = 8, 64, 128
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""Relative errors that always pass, by the dtype of the result."""

Check = Callable[[str, bool], dict[str, Tensor]]
"""A function of a backend and of whether to compute in float64, which returns the results by name."""


def sides(vocab: int, device: str) -> tuple[Tensor, ...]:
    """Return bfloat16 hidden states ``[N, D]`` and heads ``[V, D]`` of a student and a teacher. Logits have standard deviation 3."""
    generator = torch.Generator(device).manual_seed(vocab)

    def normal(rows: int, width: int, std: float) -> Tensor:
        return torch.empty(rows, width, device=device).normal_(0, std, generator=generator).bfloat16()

    return normal(N, DS, 1), normal(vocab, DS, 3 * DS**-0.5), normal(N, DT, 1), normal(vocab, DT, 3 * DT**-0.5)


def loss_check(vocab: int, device: str, divergence: str, logits_dtype: torch.dtype) -> Check:
    """Return a check of the loss with labels and token weights, and of the gradients of hidden states and head."""
    tensors = sides(vocab, device)
    labels = torch.arange(N, device=device) * (vocab - 1) // (N - 1)
    weights = torch.linspace(0.5, 1.5, N, device=device)

    def run(backend: str, double: bool) -> dict[str, Tensor]:
        hidden, head, teacher_hidden, teacher_head = (t.double() if double else t for t in tensors)
        hidden, head = (t.detach().clone().requires_grad_() for t in (hidden, head))
        loss = kd.distillation_loss(
            kd.LMHead(hidden, head), kd.LMHead(teacher_hidden, teacher_head), divergence=divergence, temperature=2.0, labels=labels,
            ce_weight=0.5, token_weights=weights.double() if double else weights, backend=backend,
            logits_dtype=None if double else logits_dtype,
        )  # fmt: skip
        loss.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return {"loss": loss.detach(), "dH": hidden.grad, "dW": head.grad}

    return run


def primitive_checks(vocab: int, device: str) -> Iterator[tuple[str, Check]]:
    """Yield checks of the primitives that have kernels of their own."""
    hidden, head, *_ = sides(vocab, device)
    ids = torch.arange(3 * N, device=device).view(N, 3) * 31 % vocab

    def head_check(function: Callable[[kd.LMHead, str], Tensor]) -> Check:
        def run(backend: str, double: bool) -> dict[str, Tensor]:
            h = (hidden.double() if double else hidden).detach().clone().requires_grad_()
            value = function(kd.LMHead(h, head.double() if double else head), backend)
            value.sum().backward()
            assert h.grad is not None
            return {"value": value.detach(), "dH": h.grad}

        return run

    yield "token_logprobs", head_check(lambda side, backend: kd.token_logprobs(side, ids, temperature=1.3, backend=backend))
    yield "entropy", head_check(lambda side, backend: kd.entropy(side, temperature=1.3, backend=backend))
    yield "cross_entropy", head_check(lambda side, backend: kd.cross_entropy(side, ids[:, 0], backend=backend))

    def top(backend: str, double: bool) -> dict[str, Tensor]:
        top_k = kd.topk_logprobs(kd.LMHead(*((hidden.double(), head.double()) if double else (hidden, head))), 8, backend=backend)
        return {"logprobs": top_k.logprobs}

    yield "topk_logprobs", top
    logits = (hidden.float() @ head.float().t()).detach()
    upstream = torch.cos(torch.arange(vocab, device=device) * 0.7)

    def softmax(function: Callable[..., Tensor], dtype: torch.dtype) -> Check:
        def run(backend: str, double: bool) -> dict[str, Tensor]:
            x = logits.to(dtype).to(torch.float64 if double else dtype).clone().requires_grad_()
            y = function(x, temperature=1.3, backend=backend)
            y.backward(upstream.to(y.dtype).expand_as(y))
            assert x.grad is not None
            return {"y": y.detach(), "dx": x.grad}

        return run

    for dtype in (torch.float32, torch.bfloat16):
        yield f"softmax {dtype}", softmax(kd.softmax, dtype)
        yield f"log_softmax {dtype}", softmax(kd.log_softmax, dtype)


def error(result: Tensor, truth: Tensor) -> float:
    """Return the relative error in the Frobenius norm, or infinity if the result is not finite."""
    value = float((result.double() - truth).norm() / truth.norm())
    return math.inf if math.isnan(value) else value


def verdict(check: Check, backend: str) -> tuple[bool, str]:
    """Return whether every result is within twice torch's error, and the errors."""
    truth, ours, eager = check("reference", True), check(backend, False), check("torch", False)
    passed, messages = True, []
    for name, exact in truth.items():
        kernel_error, torch_error = error(ours[name], exact), error(eager[name], exact)
        passed &= kernel_error <= 2 * torch_error + FLOOR.get(ours[name].dtype, 1e-6)
        messages.append(f"{name} {kernel_error:.1e} (torch {torch_error:.1e})")
    return passed, ", ".join(messages)


def draws_agree(vocab: int, device: str, backend: str) -> tuple[bool, str]:
    """Return whether the backend and torch draw the same tokens from the same seed, and how many agree."""
    hidden, head, *_ = sides(vocab, device)
    ids = []
    for name in (backend, "torch"):
        generator = torch.Generator(device).manual_seed(5)
        ids.append(kd.sample(kd.LMHead(hidden, head), num_samples=4, generator=generator, backend=name).ids)
    same = int((ids[0] == ids[1]).sum())
    return same == ids[0].numel(), f"{same} of {ids[0].numel()} draws are those of torch"


def checks(backend: str, device: str, vocabularies: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    for divergence in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16):
            for vocab in vocabularies:
                check = loss_check(vocab, device, divergence, dtype)
                yield f"{divergence}, {str(dtype).removeprefix('torch.')} logits, V={vocab}", lambda c=check: verdict(c, backend)  # type: ignore[misc]
    for vocab in vocabularies:
        for name, check in primitive_checks(vocab, device):
            yield f"{name.replace('torch.', '')}, V={vocab}", lambda c=check: verdict(c, backend)  # type: ignore[misc]
        yield f"sample, V={vocab}", lambda v=vocab: draws_agree(v, device, backend)  # type: ignore[misc]


def main(
    backend: Annotated[str, typer.Option(help="triton, cuda, native or torch.")],
    device: Annotated[str, typer.Option(help="Device of the tensors.")] = "cuda",
    vocab: Annotated[list[int] | None, typer.Option(help=f"Default: {', '.join(map(str, VOCABULARIES))}.")] = None,
) -> None:
    """Run every kernel of a backend once against float64."""
    failed, total, began = 0, 0, time.monotonic()
    for name, run in checks(backend, device, tuple(vocab or VOCABULARIES)):
        total += 1
        try:
            passed, message = run()
        except Exception as problem:  # after a lost context the other checks fail too
            passed, message = False, f"{type(problem).__name__}: {problem}".splitlines()[0]
        failed += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {backend} {name}: {message}", flush=True)
    print(f"{total - failed} passed, {failed} failed in {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
