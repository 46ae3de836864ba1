"""The head tap: what a causal language model gives its LM head, without the logits.

For the time of one call the head's ``forward`` is a stub that keeps its input and returns a column of zeros. So the ``[N, V]`` logits
never exist, and the model's own forward pass, with whatever it does before its head, is the only one that runs. What lies between head
and logits (a scale, a soft cap, columns that are cut off) is measured once, with a ramp in the place of the head's output; no config
is read for it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..sides import LMHead, Side
from .patching import compiled_parts, is_sharded, measuring, replaced, unwrap
from .probe import Transform, UnknownTransform, fit, ramp
from .weights import HeadWeights, UnsupportedHead, gathered, output_head, read_head

__all__ = ["HeadTap", "Tapped"]

T = TypeVar("T")
PROBE_TOKENS = 4
AUXILIARY = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(eq=False)
class Tapped:
    """One forward pass. :meth:`side` is what a loss takes."""

    output: Any
    """What the model returned. Its ``logits`` mean nothing, unless the tap has fallen back to dense logits."""
    hidden: Tensor | None
    """``[B, L, D]``: what the head received; None on the fallback."""
    aux_loss: Tensor | None
    """0-dim: what the model would add to its own loss (balance of experts), its coefficient included; None if nothing."""
    _head: HeadWeights | None = None
    _transform: Transform = field(default_factory=Transform)
    _vocab: int | None = None
    _autocast: tuple[str, torch.dtype] | None = None
    _differentiable: bool = field(default_factory=torch.is_grad_enabled)

    def side(self, rows: Tensor | None = None) -> Side:
        """A side of :func:`~kdkernels.distillation_loss` and of every primitive.

        Args:
            rows: ``[n]`` int64, positions in the flattened ``[B * L]``, in any order; default: all, as ``[B, L]``.

        Returns:
            An :class:`~kdkernels.LMHead` with leading shape ``[n]`` and the model's own parameters (a tied head is the embeddings'
            Parameter), without gradients if the forward pass was; on the fallback the model's logits ``[n, V]``.
        """
        if self.hidden is None or self._head is None:
            logits: Tensor = self.output.logits[..., : self._vocab]
            return logits if rows is None else logits.reshape(-1, logits.shape[-1]).index_select(0, rows)
        hidden = self.hidden if rows is None else self.hidden.reshape(-1, self.hidden.shape[-1]).index_select(0, rows)
        hidden, weight, bias = self._head.apply_to(hidden)
        if not self._differentiable:
            hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        return LMHead(hidden, weight, bias, scale=self._transform.scale, softcap=self._transform.softcap, vocab_size=self._vocab)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Where :meth:`side` and a loss after the pass belong: under the autocast that the head would have had, a ZeRO-3 head whole.

        A ``finish`` given to the tap needs none. Without autocast and ZeRO-3 it does nothing.
        """
        with self._autocasting(), nullcontext() if self._head is None else gathered(self._head.parameters):
            yield

    def _autocasting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(*self._autocast)

    def _finished(self, finish: Callable[[Tapped], T]) -> T:
        """What ``finish`` gives, still inside the pass."""

        def run(hidden: Tensor) -> T:
            self.hidden = hidden
            with self._autocasting():
                return finish(self)

        if self.hidden is None or self._head is None:
            return finish(self)
        return self._head.inside(self.hidden, run)


class HeadTap:
    """Runs a causal language model and gives its hidden states and head instead of its logits.

    The first call also runs a few tokens twice, without gradients, to measure what the model does to its logits and to check the result
    against them. A model whose head can't be taken apart is used with its dense logits, after one warning that says why.

    Args:
        model: a transformers model, or a PEFT model, DDP, FSDP or compiled wrapper around one.
        vocab_size: real size of the vocabulary; columns beyond it are cut off. Default: all columns of the model's logits.

    Raises:
        TypeError: ``torch.nn.DataParallel``.
        ValueError: a PEFT method that changes the length of the sequence; at the first call a ``vocab_size`` beyond the model's columns.

    Example::

        tap = HeadTap(model)
        tapped = tap(model, input_ids=ids, attention_mask=mask)
        loss = kd.distillation_loss(tapped.side(rows), teacher)
        # Wrapped by DDP, FSDP or DeepSpeed: the loss is computed inside the wrapper's forward.
        loss = tap(ddp_model, lambda tapped: kd.distillation_loss(tapped.side(rows), teacher), input_ids=ids)
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None) -> None:
        self.base = unwrap(model)
        self.vocab_size = vocab_size
        self.transform = Transform()
        self.fallback_reason: str | None = None
        """Why dense logits are used; None where they are not, and before the first call."""
        self.columns: int | None = None
        """Columns of the logits in use; known from the first call on."""
        self.aux_coefficient: float | None = None
        self._ready = self._sharded = False
        # A cache switches off the mask between packed rows, and would be held for nothing.
        self.fixed = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if self.takes(name)}

    @property
    def head(self) -> nn.Module | None:
        """The module whose ``forward`` is replaced."""
        return output_head(self.base)

    @property
    def family(self) -> str:
        return str(getattr(getattr(self.base, "config", None), "model_type", type(self.base).__name__))

    def takes(self, name: str) -> bool:
        """Whether the model's forward pass has an argument of this name."""
        parameters = inspect.signature(type(self.base).forward).parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @overload
    def __call__(self, model: nn.Module, finish: None = None, **inputs: Any) -> Tapped: ...
    @overload
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], T], **inputs: Any) -> T: ...
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], Any] | None = None, **inputs: Any) -> Any:
        """Runs ``model`` on ``inputs``, without a cache.

        Args:
            model: the model itself, or the wrapper that has to see its forward pass.
            finish: called with the :class:`Tapped` inside that forward pass, where sharded parameters are whole. What it returns (a tensor,
                or a dict of them) is what the model, the wrapper and the tap return, so DDP finds every parameter the loss depends on.
                Needed under FSDP and ZeRO-3, where gradients are wanted.
            inputs: ``input_ids`` [B, L] and whatever else the model takes, but no labels.
        """
        if isinstance(model, nn.DataParallel):
            unwrap(model)
        for name, wanted, fix in (
            ("input_ids", True, "the tap counts its rows by them"),
            ("labels", False, "give them to the loss instead"),
        ):
            if (inputs.get(name) is not None) is not wanted:
                raise ValueError(f"the head tap {'needs' if wanted else 'takes no'} {name}: {fix}")
        if not self._ready:
            self.prepare(model, inputs["input_ids"])
        if finish is None and self._sharded and torch.is_grad_enabled():
            raise ValueError(
                "the model is sharded (FSDP, ZeRO-3): give the head tap a finish, so that the loss is computed inside the forward pass"
            )
        model, compiled = compiled_parts(model)
        kept: list[Tapped] = []

        def inner(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tapped = self._forward(compiled(forward), args, kwargs, inputs["input_ids"].shape)
            if finish is None:
                kept.append(tapped)
                return tapped.output
            return tapped._finished(finish)

        with replaced(self.base, inner):
            returned = model(**{**inputs, **self.fixed})
        return kept[0] if finish is None else returned

    def _forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Tapped:
        head = self._readable_head()
        if head is None:
            output = forward(*args, **kwargs)
            return Tapped(output, None, self._auxiliary(output), _vocab=self.columns)
        stub = Stub()
        with replaced(head, stub):
            output = forward(*args, **kwargs)
        if len(stub.inputs) != 1:
            raise RuntimeError(
                f"{self.family}: the head was called {len(stub.inputs)} times in one forward pass, it was once when measured"
            )
        hidden = stub.inputs[0].reshape(*shape, -1)
        return Tapped(output, hidden, self._auxiliary(output), read_head(head), self.transform, self.columns, stub.autocast)

    def _readable_head(self) -> nn.Module | None:
        """The head, unless dense logits have to be used: adapters may have been added or switched since it was checked."""
        head = self.head if self.fallback_reason is None else None
        if head is not None:
            try:
                read_head(head)
            except UnsupportedHead as reason:
                self._fall_back(reason)
                return None
        return head

    def prepare(self, model: nn.Module, input_ids: Tensor) -> None:
        """Measures and checks, on the first few tokens of ``input_ids`` ``[B, L]``. The first call does this by itself.

        Raises:
            ValueError: ``vocab_size`` is larger than the logits, or ``model`` is not the one tapped.
        """
        if all(module is not self.base for module in model.modules()):
            raise ValueError(f"the head tap was made for another {type(self.base).__name__} than the one it is called with")
        model, _ = compiled_parts(model)
        self._sharded = is_sharded(model)
        ids = input_ids[:1, :PROBE_TOKENS]
        with measuring(self.base):
            try:
                self._measure(model, ids)
                output = self.check(model, ids)
            except (UnsupportedHead, UnknownTransform) as reason:
                self._fall_back(reason)
                output = model(input_ids=ids, **self.fixed)
                self.columns = self._columns(output.logits.shape[-1])
            self.aux_coefficient = self._auxiliary_coefficient(model, ids, output)
        self._ready = True

    def _measure(self, model: nn.Module, ids: Tensor) -> None:
        head = self.head
        if head is None:
            raise UnsupportedHead("the model names no output embeddings")
        stub = Stub(ramp(read_head(head).rows))
        with replaced(head, stub):
            output = model(input_ids=ids, **self.fixed)
        if len(stub.inputs) != 1:
            raise UnsupportedHead(f"the head is called {len(stub.inputs)} times in one forward pass")
        self.transform = fit(output.logits)
        self.columns = self._columns(output.logits.shape[-1])

    def _columns(self, found: int) -> int:
        if self.vocab_size is not None and self.vocab_size > found:
            raise ValueError(f"vocab_size={self.vocab_size}, but the logits of {self.family} have {found} columns: give that or less")
        return self.vocab_size or found

    def check(self, model: nn.Module, ids: Tensor) -> Any:
        """Compares the tap's logits with the model's own at the last token of ``ids`` ``[1, L]``; returns the model's output.

        Raises:
            UnsupportedHead: they differ by more than rounding.
        """
        assert self.head is not None
        recorder = Stub(passing=True)
        with replaced(self.head, recorder):
            output = model(input_ids=ids, **self.fixed)
        logits = output.logits
        if len(recorder.inputs) != 1 or recorder.inputs[0].shape[:-1].numel() != ids.numel() or logits.shape[:-1].numel() != ids.numel():
            raise UnsupportedHead("its head does not see one hidden state for each token")
        hidden = recorder.inputs[0].reshape(*ids.shape, -1)
        tapped = Tapped(output, hidden, None, read_head(self.head), self.transform, self.columns, recorder.autocast)
        with tapped.computing():
            side = tapped.side(torch.tensor([ids.numel() - 1], device=hidden.device))
            assert isinstance(side, LMHead)
            product = nn.functional.linear(side.hidden, side.weight, side.bias)
        expected = self.transform(product.double() if product.dtype == torch.float64 else product.float())[:, : self.columns]
        found = logits.reshape(-1, logits.shape[-1])[-1:, : self.columns].to(expected)
        largest, error = expected.abs().max().item(), (found - expected).abs().max().item()
        # Some models narrow what their head gives.
        eps = max(torch.finfo(dtype).eps for dtype in (product.dtype, logits.dtype))
        if not error <= 16 * eps * max(largest, product.abs().max().item() * abs(self.transform.scale)):
            raise UnsupportedHead(f"its logits differ from what its head gives by {error:.3g} (the largest is {largest:.3g})")
        return output

    def _fall_back(self, reason: Exception) -> None:
        self.fallback_reason = str(reason)
        warnings.warn(f"{self.family}: dense logits are used, at the cost of memory and time, because {reason}", stacklevel=4)

    def _auxiliary(self, output: Any) -> Tensor | None:
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            return None
        coefficient = self._named_coefficient() if self.aux_coefficient is None else self.aux_coefficient
        return loss * coefficient if coefficient else None

    def _named_coefficient(self) -> float | None:
        holders = (self.base, getattr(self.base, "config", None))
        values = (getattr(holder, name, None) for holder in holders for name in AUXILIARY)
        return next((float(v) for v in values if isinstance(v, int | float)), None)

    def _auxiliary_coefficient(self, model: nn.Module, ids: Tensor, output: Any) -> float | None:
        """What the model multiplies its auxiliary loss by: its loss with labels, less its cross-entropy, over that loss."""
        named = self._named_coefficient()
        if not isinstance(getattr(output, "aux_loss", None), Tensor) or ids.numel() < 2:
            return named
        labelled = model(input_ids=ids, labels=ids, **self.fixed)
        auxiliary = labelled.aux_loss.double().item()
        cross_entropy = nn.functional.cross_entropy(labelled.logits[0, :-1].float(), ids[0, 1:])
        added = labelled.loss.double().item() - cross_entropy.double().item()
        rounding = 64 * torch.finfo(torch.float32).eps * max(1.0, abs(cross_entropy.item()))
        if named is not None and abs(added - named * auxiliary) <= rounding + 1e-2 * abs(named * auxiliary):
            return named
        measured = added / auxiliary if abs(added) > rounding and auxiliary else 0.0
        warnings.warn(
            f"{self.family}: adds {measured:.4g} times its auxiliary loss to its own loss"
            + (", which is used" if named is None else f", its config says {named}; what it adds is used"),
            stacklevel=4,
        )
        return measured


class Stub:
    """In the head's place: keeps its input, and returns a column of zeros, ``columns`` [V] for each token, or what the head returns."""

    def __init__(self, columns: Tensor | None = None, passing: bool = False) -> None:
        self.inputs: list[Tensor] = []
        self.columns, self.passing = columns, passing
        self.autocast: tuple[str, torch.dtype] | None = None

    def __call__(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(x)
        device = x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        if self.passing:
            return forward(x, *args, **kwargs)
        if self.columns is not None:
            return self.columns.to(x.device).expand(*x.shape[:-1], -1)
        return x[..., :1] * 0  # [..., 1]: the graph stays connected, so that wrappers see the parameters below the head
