"""Tap the LM head of a causal language model: hidden states and head, without the ``[N, V]`` logits.

During one call the head's ``forward`` is a stub that keeps its input and returns a column of zeros. The rest of the model's own forward
pass runs unchanged. The step from head to logits (a scale, a soft cap, columns that are cut off) is measured once, by replacing the
head's output with a ramp; configs are not read for it.
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
    """One forward pass. :meth:`side` returns the argument for a loss."""

    output: Any
    """The model's return value. Its ``logits`` are meaningless unless the tap uses dense logits."""
    hidden: Tensor | None
    """``[B, L, D]``: the head's input; None if the tap uses dense logits."""
    aux_loss: Tensor | None
    """0-dim: the auxiliary loss (balance of experts) times its coefficient, as the model adds it to its own loss; None without one."""
    _head: HeadWeights | None = None
    _transform: Transform = field(default_factory=Transform)
    _vocab: int | None = None
    _autocast: tuple[str, torch.dtype] | None = None
    _differentiable: bool = field(default_factory=torch.is_grad_enabled)

    def side(self, rows: Tensor | None = None) -> Side:
        """Return a side for :func:`~kdkernels.distillation_loss` and every primitive.

        Args:
            rows: ``[n]`` int64, positions in the flattened ``[B * L]``, in any order; default: all, as ``[B, L]``.

        Returns:
            An :class:`~kdkernels.LMHead` with leading shape ``[n]`` and the model's own parameters (a tied head is the embeddings'
            Parameter), detached if the forward pass ran without gradients. With dense logits: the model's logits ``[n, V]``.
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
        """Enter the autocast of the head, and gather a ZeRO-3 head, for :meth:`side` and a loss after the forward pass.

        A ``finish`` given to the tap does not need it. Without autocast and ZeRO-3 it does nothing.
        """
        with self._autocasting(), nullcontext() if self._head is None else gathered(self._head.parameters):
            yield

    def _autocasting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(*self._autocast)

    def _finished(self, finish: Callable[[Tapped], T]) -> T:
        """Return the result of ``finish``, called inside the forward pass."""

        def run(hidden: Tensor) -> T:
            self.hidden = hidden
            with self._autocasting():
                return finish(self)

        if self.hidden is None or self._head is None:
            return finish(self)
        return self._head.inside(self.hidden, run)


class HeadTap:
    """Run a causal language model and return its hidden states and head instead of its logits.

    The first call also runs a few tokens twice, without gradients, to measure the step from head to logits and to check the result. If
    the head is not a plain linear layer, the model's dense logits are used, with one warning giving the reason.

    Args:
        model: a transformers model, or a PEFT model, DDP, FSDP or compiled wrapper around one.
        vocab_size: size of the vocabulary without padding; further columns are cut off. Default: all columns of the model's logits.

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
        """The reason for dense logits; None if they are not used, and before the first call."""
        self.columns: int | None = None
        """Columns of the logits in use; set by the first call."""
        self.aux_coefficient: float | None = None
        self._ready = self._sharded = False
        # A key-value cache would waste memory, and disables the mask between packed examples.
        self.fixed = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if self.takes(name)}

    @property
    def head(self) -> nn.Module | None:
        """The module whose ``forward`` is replaced."""
        return output_head(self.base)

    @property
    def family(self) -> str:
        return str(getattr(getattr(self.base, "config", None), "model_type", type(self.base).__name__))

    def takes(self, name: str) -> bool:
        """Return whether the model's forward pass has an argument of this name."""
        parameters = inspect.signature(type(self.base).forward).parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @overload
    def __call__(self, model: nn.Module, finish: None = None, **inputs: Any) -> Tapped: ...
    @overload
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], T], **inputs: Any) -> T: ...
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], Any] | None = None, **inputs: Any) -> Any:
        """Run ``model`` on ``inputs``, without a key-value cache.

        Args:
            model: the model itself, or the wrapper whose forward pass must run.
            finish: called with the :class:`Tapped` inside that forward pass, where sharded parameters are whole. Its result (a tensor or a
                dict of tensors) is returned by the model, the wrapper and the tap, so DDP finds every parameter that the loss depends on.
                Required for gradients under FSDP and ZeRO-3.
            inputs: ``input_ids`` ``[B, L]`` and the model's other arguments, without labels.
        """
        if isinstance(model, nn.DataParallel):
            unwrap(model)
        for name, wanted, fix in (
            ("input_ids", True, "the tap takes the number of rows from them"),
            ("labels", False, "give them to the loss instead"),
        ):
            if (inputs.get(name) is not None) is not wanted:
                raise ValueError(f"the head tap {'needs' if wanted else 'does not take'} {name}: {fix}")
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
        """Return the head, or None for dense logits. Adapters may have been added or switched since the last call."""
        head = self.head if self.fallback_reason is None else None
        if head is not None:
            try:
                read_head(head)
            except UnsupportedHead as reason:
                self._fall_back(reason)
                return None
        return head

    def prepare(self, model: nn.Module, input_ids: Tensor) -> None:
        """Measure and check on the first few tokens of ``input_ids`` ``[B, L]``. The first call does this automatically.

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
        """Compare the tap's logits with the model's own at the last token of ``ids`` ``[1, L]``, and return the model's output.

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
        # Some models convert their logits to a narrower dtype.
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
        """Return the model's factor of its auxiliary loss: (its loss with labels - its cross-entropy) / the auxiliary loss."""
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
    """Replace a head's forward: keep its input; return a column of zeros, ``columns`` ``[V]`` for each token, or the head's output."""

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
