"""The teacher and the two students: initial weights, batches, losses, training, held-out evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ... import LMHead, distillation_loss
from ...bench.timing import elapsed
from .settings import DemoError, ModelSize, Settings

__all__ = ["Batches", "Curve", "Evaluation", "Loss", "build", "ce_loss", "compare_to_teacher", "fingerprint", "kd_loss", "train"]

Loss = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]
"""Loss of a model for token ids ``[B, T]`` and labels ``[B, T]``. Position i of the labels is the target of position i."""

_EVALUATION_WINDOWS = 16  # per batch


@dataclass(frozen=True)
class Curve:
    """Training loss of each batch before its step, and held-out cross-entropy in nats per token after ``step`` steps."""

    train: list[float]
    step: list[int]
    held_out: list[float]
    step_seconds: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Means over the tokens of each held-out window, ``[windows]``, in nats at T = 1."""

    cross_entropy: Tensor
    kl_to_teacher: Tensor
    top1_agreement: Tensor


class Batches:
    """Training batches at random positions and fixed held-out windows of two token streams."""

    def __init__(self, train: Tensor, held_out: Tensor, settings: Settings) -> None:
        """Select the held-out windows.

        Raises:
            DemoError: the text is too short for one training window and two held-out windows, which a standard error needs.
        """
        self._span = torch.arange(settings.window + 1)
        self._train, self._settings = train, settings
        last = len(held_out) - len(self._span)
        if len(held_out) < 2 * len(self._span) or len(train) < len(self._span):
            raise DemoError(
                f"--data: its {len(train):,} training and {len(held_out):,} held-out tokens are too few for windows of "
                f"{len(self._span)} tokens. Give more, or less repetitive, text"
            )
        count = min(settings.held_out_windows, len(held_out) // len(self._span))
        starts = torch.linspace(0, last, count).long()
        self.held_out = self._windows(held_out, starts)

    def training(self, steps: int, stream: int) -> list[Tensor]:
        """Return ``steps`` batches ``[B, T + 1]``, which depend only on the settings and the number of the stream."""
        generator = torch.Generator().manual_seed(self._settings.seed * 1000 + stream)
        last = len(self._train) - len(self._span)
        starts = torch.randint(last + 1, (steps, self._settings.batch), generator=generator)
        return [self._windows(self._train, s) for s in starts]

    def _windows(self, stream: Tensor, starts: Tensor) -> Tensor:
        return stream[starts.unsqueeze(-1) + self._span].to(self._settings.device)


def build(size: ModelSize, vocab: int, settings: Settings) -> LlamaForCausalLM:
    """Return a Llama with random weights, which depend only on its size and the seed. The global random state does not change."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=settings.window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config).to(settings.device)


def fingerprint(model: LlamaForCausalLM) -> str:
    """Return the SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def head(model: LlamaForCausalLM, ids: Tensor) -> LMHead:
    """Return the last hidden states and the LM head of a model, without computing logits."""
    return LMHead(model.model(ids).last_hidden_state, model.lm_head.weight)


def ce_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of plain language modelling."""
    return F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())


def kd_loss(teacher: LlamaForCausalLM, settings: Settings) -> Loss:
    """Return a loss with cross-entropy and distillation from the teacher, fused. It calls neither model's LM head."""

    def loss(student: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = head(teacher, ids)
        return distillation_loss(
            head(student, ids),
            target,
            labels=labels,
            divergence=settings.divergence,
            temperature=settings.temperature,
            kd_weight=settings.kd_weight,
            ce_weight=settings.ce_weight,
            backend=settings.backend,
        )

    return loss


def train(
    model: LlamaForCausalLM,
    loss_of: Loss,
    batches: list[Tensor],
    held_out: Tensor,
    lr: float,
    evaluations: int,
    on_step: Callable[[float], None],
) -> Curve:
    """Train with AdamW, linear warm-up and cosine decay, one step per batch. ``on_step`` gets the latest held-out loss.

    Raises:
        DemoError: the loss is not finite.
    """
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = math.ceil(steps / 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, (1 + math.cos(math.pi * s / steps)) / 2))
    evaluated = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
    curve = Curve([], [0], [held_out_loss(model, held_out)], [])
    for step, batch in enumerate(batches, 1):
        with elapsed(batch.device) as timed:
            loss = loss_of(model, batch[:, :-1], batch[:, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            value = loss.item()
        curve.step_seconds.append(timed.seconds)
        if not math.isfinite(value):
            raise DemoError(f"the training loss is {value} at step {step} of {steps}: try another --temperature or --divergence")
        curve.train.append(value)
        if step in evaluated:
            curve.step.append(step)
            curve.held_out.append(held_out_loss(model, held_out))
        on_step(curve.held_out[-1])
    return curve


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: Tensor) -> float:
    """Return the mean cross-entropy of windows ``[windows, T + 1]`` in nats per token."""
    parts = [ce_loss(model, w[:, :-1], w[:, 1:]) * len(w) for w in torch.split(held_out, _EVALUATION_WINDOWS)]
    return float(torch.stack(parts).sum() / len(held_out))


@torch.no_grad()
def compare_to_teacher(student: LlamaForCausalLM, teacher: LlamaForCausalLM, held_out: Tensor, backend: str) -> Evaluation:
    """Return the student's held-out cross-entropy and its divergence from the teacher, per window."""
    columns = []
    for windows in torch.split(held_out, _EVALUATION_WINDOWS):
        ids, labels = windows[:, :-1], windows[:, 1:]
        _, stats = distillation_loss(head(student, ids), head(teacher, ids), labels=labels, backend=backend, return_stats=True)
        columns.append(torch.stack([stats.cross_entropy, stats.divergence, stats.top1_agreement]).mean(-1))
    return Evaluation(*torch.cat(columns, -1).cpu())
