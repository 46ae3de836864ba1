"""Run another library's trainer with and without kdkernels' patch, and compare the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import make_rows, make_tokenizer

ARGUMENTS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
    "dataloader_pin_memory": False, "seed": 3, "bf16": False,
}  # fmt: skip
"""Three steps of SGD on a CPU. Adam would turn the rounding error of a zero gradient into a full step."""
BUDGET, ROWS = 16 << 10, 16
"""Bytes for the chunk buffers, and a number of rows that exceeds what fits in them."""
TIMES = ("runtime", "per_second", "step_time", "epoch", "total_flos", "tokens_per")


def encoded(rows: int = 12) -> list[dict[str, Any]]:
    """Return prompts with responses as token ids, and labels for the responses."""
    tokenizer, data = make_tokenizer(), []
    for row in make_rows(rows):
        prompt, response = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response"))
        response = [*response, tokenizer.eos_token_id]
        data.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return data


def lines_for(heading: str) -> Any:
    """Compile the first block of Python below a heading of docs/integrations.md."""
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    _, _, section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    code = section.partition("```python\n")[2].partition("```")[0]
    assert code
    return compile(code, str(page), "exec")


def needs(*modules: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if one of the packages is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed: make test-integrations")


class Allocations(TorchDispatchMode):
    """Record in ``rows`` the largest number of rows of a new tensor ``[..., vocab]``."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(returned):
            large = isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.vocab
            if large and leaf.untyped_storage().data_ptr() not in inputs:  # a transposed head is a view
                self.rows = max(self.rows, leaf.numel() // self.vocab)
        return returned


@dataclass
class Run:
    """Results of a training run."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list)
    rows_of_logits: int = 0


def run(trainer: Any, vocab: int) -> Run:
    """Train, and return the results."""
    from transformers import TrainerCallback

    results = Run()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if not results.gradients:
                results.gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Look())
    with Allocations(vocab) as allocations:
        trainer.train()
    results.rows_of_logits = allocations.rows
    results.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    results.logs = [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)} for entry in trainer.state.log_history
    ]
    return results


def assert_agree(unpatched: Run, patched: Run, tolerance: float = 1e-5) -> None:
    """Check that losses, logged metrics, gradients of the first step and final weights agree, to a relative 1e-5 in float32."""
    assert len(unpatched.losses) >= 3
    assert min(unpatched.losses) > 1e-3
    assert patched.losses == pytest.approx(unpatched.losses, rel=tolerance)
    assert [entry.keys() for entry in patched.logs] == [entry.keys() for entry in unpatched.logs]
    for entry, expected in zip(patched.logs, unpatched.logs, strict=True):
        assert entry == pytest.approx(expected, rel=10 * tolerance, abs=tolerance)
    for name in ("gradients", "weights"):
        with_patch, without_patch = getattr(patched, name), getattr(unpatched, name)
        assert with_patch.keys() == without_patch.keys()
        assert max(tensor.abs().max() for tensor in without_patch.values()) > 1e-3
        for key, tensor in without_patch.items():
            scale = tensor.abs().max().item()
            torch.testing.assert_close(
                with_patch[key], tensor, rtol=0, atol=tolerance * max(scale, 1e-3), msg=lambda text, k=key: f"{k}: {text}"
            )


def compare(build: Callable[[], Any], patch: Callable[..., Any], vocab: int) -> tuple[Run, Run]:
    """Run the trainer without and with the patch. Check that both agree and that the patched run allocates at most a chunk of logits."""
    torch.manual_seed(0)
    unpatched = run(build(), vocab)
    torch.manual_seed(0)
    with patch(memory_budget=BUDGET):
        patched = run(build(), vocab)
    assert_agree(unpatched, patched)
    assert patched.rows_of_logits <= ROWS
    return unpatched, patched
