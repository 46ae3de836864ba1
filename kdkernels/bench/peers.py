"""Other libraries: one adapter each, which calls the library's public function for a case. None of them is a dependency."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import JSD, LMHead
from .cases import IGNORED, Case, Inputs

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD().beta}
"""The ``beta`` of each divergence in the peers. It is defined as in kdkernels: the teacher's share of the mixture."""

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """The adapter of a library.

    Attributes:
        title: name in tables.
        module: module that must be importable.
        distribution: package that contains the module.
        build: returns the loss of a case with heads. Imports the library only when called.
        devices: device types that its kernels support.
        divergences: divergences that it has.
        operation: its operation; in a case of another operation it is a bound.
        note: difference between its work and the case's, shown with its figures.
    """

    title: str
    module: str
    distribution: str
    build: Callable[[Case, Inputs], Loss]
    devices: tuple[str, ...] = ("cpu", "cuda")
    divergences: tuple[str, ...] = tuple(_BETA)
    operation: str = "distillation"
    note: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None if it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def absent(self, device: str) -> str | None:
        """Return the reason why it cannot run on the device, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.distribution} {self.version} has no {self.module}" if self.version else f"{self.distribution} is not installed"
        if device not in self.devices:
            return f"its kernels need {' or '.join(self.devices)}"
        return None

    def cannot(self, case: Case, device: str) -> str | None:
        """Return the reason why it can run neither the case nor a bound of it, or None."""
        if (reason := self.absent(device)) is not None:
            return reason
        if not case.has_heads:
            return "it takes hidden states and heads, not logits"
        if self.operation == "distillation" and case.operation != "distillation":
            return f"it does not compute {case.operation}"
        if self.operation == "distillation" and case.divergence not in self.divergences:
            return f"it has no {case.divergence}"
        return None


def heads(inputs: Inputs) -> tuple[LMHead, LMHead]:
    assert isinstance(inputs.student, LMHead)
    assert isinstance(inputs.teacher, LMHead)
    return inputs.student, inputs.teacher


def _valid(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the hidden states of both sides for the valid tokens, for libraries without an ignore index."""
    s, t = heads(inputs)
    if not case.masked:
        return s.hidden, t.hidden
    valid = inputs.labels != IGNORED
    return s.hidden[valid], t.hidden[valid]


def _trl(case: Case, inputs: Inputs) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    (s, t), beta = heads(inputs), _BETA[case.divergence]

    def loss() -> Tensor:
        h_s, h_t = _valid(case, inputs)
        per_token, _ = ChunkedDivergenceFunction.apply(h_s, s.weight, None, h_t, t.weight, None, beta, case.temperature)
        mean: Tensor = per_token.mean() * case.temperature**2
        return mean

    return loss


def _liger_jsd(case: Case, inputs: Inputs) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    s, t = heads(inputs)
    fused = LigerFusedLinearJSD(jsd_beta=_BETA[case.divergence], temperature=case.temperature, ignore_index=IGNORED)
    labels = inputs.labels if case.masked else None
    return lambda: fused(s.hidden, s.weight, t.hidden, t.weight, labels) * case.temperature**2


def _liger_kl(case: Case, inputs: Inputs) -> Loss:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    s, t = heads(inputs)
    fused = LigerFusedLinearKLDivLoss(temperature=case.temperature)

    def loss() -> Tensor:
        h_s, h_t = _valid(case, inputs)
        with torch.no_grad():
            p = torch.softmax((h_t @ t.weight.t()).float() / case.temperature, dim=-1).to(h_t.dtype)
        value: Tensor = fused(h_s, s.weight, p) * case.temperature**2
        return value

    return loss


def _liger_chunked(case: Case, inputs: Inputs) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    s, t = heads(inputs)
    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA[case.divergence], temperature=case.temperature, ignore_index=IGNORED
    )
    return lambda: fused(s.hidden, s.weight, t.hidden, t.weight, inputs.labels) * case.temperature**2


def _unsloth(case: Case, inputs: Inputs) -> Loss:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_jsd

    (s, t), beta = heads(inputs), _BETA[case.divergence]
    labels = inputs.labels if case.masked else None

    def loss() -> Tensor:
        value = fused_linear_jsd(s.hidden, s.weight, t.hidden, t.weight, labels=labels, beta=beta, temperature=case.temperature)
        scaled: Tensor = value * case.temperature**2
        return scaled

    return loss


def _fla(case: Case, inputs: Inputs) -> Loss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    s, t = heads(inputs)

    def loss() -> Tensor:
        h_s, h_t = (h / case.temperature for h in _valid(case, inputs))
        value: Tensor = fused_kl_div_loss(h_s, h_t, s.weight, t.weight) * case.temperature**2
        return value

    return loss


def _torch_ce(case: Case, inputs: Inputs) -> Loss:
    import torch.nn.functional as F
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    s, _ = heads(inputs)
    options = LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(s.hidden, s.weight, inputs.labels, ignore_index=IGNORED, options=options)


def _quack_ce(case: Case, inputs: Inputs) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    s, _ = heads(inputs)
    return lambda: chunked_linear_cross_entropy(s.hidden, s.weight, inputs.labels, ignore_index=IGNORED)


_BOUND = "cross-entropy of the student alone, without a teacher: a bound, not this loss"
_GPU = ("cuda",)

PEERS: dict[str, Peer] = {
    "trl": Peer("TRL chunked", "trl", "trl", _trl),
    "liger_jsd": Peer("Liger fused linear JSD", "liger_kernel", "liger-kernel", _liger_jsd, _GPU),
    "liger_kl": Peer(
        "Liger fused linear KL", "liger_kernel", "liger-kernel", _liger_kl, _GPU, ("forward_kl",),
        note="it takes the teacher's probabilities: the step makes them first, dense",
    ),
    "liger_chunked": Peer("Liger chunked JSD", "liger_kernel", "liger-kernel", _liger_chunked),
    "unsloth": Peer("Unsloth fused linear JSD", "unsloth_zoo", "unsloth_zoo", _unsloth, _GPU),
    "fla": Peer(
        "fla fused KL", "fla", "flash-linear-attention", _fla, _GPU, ("forward_kl",),
        note="it has no temperature: the hidden states are divided by T first",
    ),
    "torch_ce": Peer(
        "torch linear CE (bound)", "torch.nn.modules.linear_cross_entropy_options", "torch", _torch_ce,
        operation="cross_entropy", note=_BOUND,
    ),
    "quack_ce": Peer("QuACK linear CE (bound)", "quack", "quack-kernels", _quack_ce, _GPU, operation="cross_entropy", note=_BOUND),
}  # fmt: skip
"""The adapters by the name of their variant."""
