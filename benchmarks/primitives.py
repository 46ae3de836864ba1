"""Times of the primitives, compared with matrix products and torch's functions: ``python -m benchmarks.primitives``.

The variants of a group are interleaved in one process, and ratios are within a group. Defaults: N=2048, V=32000, D=512. Writes
``benchmarks/results/<machine>/primitives.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdkernels as kd
from kdkernels.bench.environment import environment
from kdkernels.bench.measure import quantile, time_interleaved

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]


@dataclass
class Group:
    """Variants that compute the same result. The others are compared with ``yardstick``."""

    name: str
    yardstick: str
    steps: dict[str, Step]
    trained: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if not self.trained else self.trained[0].device)

    def clear_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None


def groups(n: int, v: int, d: int, backend: str, device: str) -> Iterator[Group]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, std, generator=generator).to(dtype)

    hidden, weight = randn(n, d).requires_grad_(), randn(v, d, std=3 * d**-0.5).requires_grad_()
    labels = torch.randint(v, (n,), generator=generator, device=device)
    z, d_hidden, d_weight = (torch.zeros(*shape, device=device) for shape in ((n, v), (n, d), (v, d)))
    head, frozen = kd.LMHead(hidden, weight), kd.LMHead(hidden.detach(), weight.detach())

    def logits() -> None:
        torch.mm(frozen.hidden, frozen.weight.t(), out=z)

    def products() -> None:
        logits()
        torch.mm(z, frozen.weight, out=d_hidden)
        torch.mm(z.t(), frozen.hidden, out=d_weight)

    def backward(loss: Callable[[], Tensor]) -> Step:
        return lambda: loss().backward()  # type: ignore[no-untyped-call]

    yield Group(
        "cross_entropy, forward and backward", "three products",
        {
            "three products": products,
            "kd.cross_entropy": backward(lambda: kd.cross_entropy(head, labels, backend=backend)),
            "eager": backward(lambda: F.cross_entropy(hidden @ weight.t(), labels)),
        },
        [hidden, weight],
    )  # fmt: skip
    topk_teacher = kd.topk_logprobs(randn(n, v, std=3.0), 64, temperature=2.0)
    yield Group(
        "loss against a teacher's 64 most likely, forward and backward", "three products",
        {
            "three products": products,
            "kd.TopK": backward(lambda: kd.distillation_loss(head, topk_teacher, temperature=2.0, backend=backend)),
        },
        [hidden, weight],
    )  # fmt: skip
    yield Group(
        "of a head, forward", "one product",
        {
            "one product": logits,
            "kd.token_logprobs": lambda: kd.token_logprobs(frozen, labels, backend=backend),
            "kd.entropy": lambda: kd.entropy(frozen, backend=backend),
            "kd.logsumexp": lambda: kd.logsumexp(frozen, backend=backend),
        },
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        given, upstream = randn(n, v, std=3.0, dtype=dtype).requires_grad_(), randn(n, v, dtype=dtype)
        for ours, theirs in ((kd.softmax, torch.softmax), (kd.log_softmax, torch.log_softmax)):
            name, dtype_name = ours.__name__, str(dtype).removeprefix("torch.")
            yield Group(
                f"{name} of {dtype_name} logits, forward", "torch",
                {
                    "torch": lambda f=theirs, x=given: f(x.detach(), -1),
                    "kd": lambda f=ours, x=given: f(x.detach(), backend=backend),
                },
            )  # fmt: skip
            yield Group(
                f"{name} of {dtype_name} logits, forward and backward", "torch",
                {
                    "torch": lambda f=theirs, x=given, g=upstream: f(x, -1).backward(g),
                    "kd": lambda f=ours, x=given, g=upstream: f(x, backend=backend).backward(g),
                },
                [given],
            )  # fmt: skip
    given = randn(n, v, std=3.0)
    yield Group(
        "64 most likely of given logits", "torch",
        {
            "torch": lambda: torch.log_softmax(given, -1).topk(64),
            "kd.topk_logprobs": lambda: kd.topk_logprobs(given, 64, backend=backend),
        },
    )  # fmt: skip
    yield Group(
        "a sample of given logits", "torch",
        {
            "torch": lambda: torch.multinomial(torch.softmax(given, -1), 1),
            "kd.sample": lambda: kd.sample(given, backend=backend),
        },
    )  # fmt: skip


def main(
    n: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    v: Annotated[int, typer.Option(help="Vocabulary.")] = 32000,
    d: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    backend: Annotated[str, typer.Option()] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    samples: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure the primitives and write OUT/MACHINE/primitives.json."""
    where = environment(device)  # read the load before the measurements cause it
    settings = {"n": n, "v": v, "d": d, "backend": backend, "device": device, "samples": samples}
    record: dict[str, Any] = {"environment": where, "settings": settings, "groups": []}
    table = Table("what", "variant", "ms p50 [p20, p80]", "x of the yardstick", title=f"{where['machine']}, N={n} V={v} D={d}")
    for group in groups(n, v, d, backend, device):
        samples_ms, failed = time_interleaved(group.steps, group, samples)  # type: ignore[arg-type]  (a group has all that it reads)
        record["groups"].append({"name": group.name, "yardstick": group.yardstick, "samples_ms": samples_ms, "failed": failed})
        yardstick = quantile(samples_ms[group.yardstick], 0.5)
        for name, ms in samples_ms.items():
            low, mid, high = (quantile(ms, q) for q in (0.2, 0.5, 0.8))
            table.add_row(group.name, name, f"{mid:.1f} [{low:.1f}, {high:.1f}]", f"{mid / yardstick:.2f}")
    path = out / where["machine"] / "primitives.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console(width=140)
    console.print(table)
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
