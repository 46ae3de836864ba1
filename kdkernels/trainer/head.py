"""The head tap: what a causal language model gives its LM head, without the logits.

For the time of one call the head's ``forward`` is a stub that keeps its input and returns a column of zeros, so the ``[N, V]`` logits never exist and
the model's own forward pass, with everything it does around the head, is the only one that runs. What lies between head and logits (a scale, a
soft cap, columns that are cut off) is measured once, by feeding a ramp through the stub, not read from a config.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..sides import LMHead, Side
from .probe import Transform, UnknownTransform, fit, ramp
from .weights import HeadWeights, UnsupportedHead, gathered, read_head

__all__ = ["HeadTap", "Tapped", "unwrap"]

T = TypeVar("T")
PROBE_TOKENS = 4


@dataclass(eq=False)
class Tapped:
    """One forward pass. :meth:`side` is what a loss takes."""

    output: Any
    """What the model returned, its ``aux_loss`` included. Its ``logits`` mean nothing unless the tap fell back to dense logits."""
    hidden: Tensor | None
    """``[B, L, D]``: what the head received; None on the dense fallback."""
    aux_loss: Tensor | None
    """0-dim: what the model would add to its own loss (mixture-of-experts load balancing), coefficient included; None if nothing."""
    _head: HeadWeights | None = None
    _transform: Transform = field(default_factory=Transform)
    _vocab: int | None = None
    _autocast: tuple[str, torch.dtype] | None = None

    def side(self, rows: Tensor | None = None) -> Side:
        """The side of a loss at ``rows`` (``[n]`` int64: positions in the flattened ``[B * L]``), or at all ``[B, L]`` positions.

        An :class:`~kdkernels.LMHead` with leading shape ``[n]``; on the fallback the model's own logits ``[n, V]``.
        """
        if self.hidden is None or self._head is None:
            logits: Tensor = self.output.logits[..., : self._vocab]
            return logits if rows is None else logits.reshape(-1, logits.shape[-1]).index_select(0, rows)
        hidden = self.hidden if rows is None else self.hidden.reshape(-1, self.hidden.shape[-1]).index_select(0, rows)
        hidden, weight, bias = self._head.apply_to(hidden)
        return LMHead(hidden, weight, bias, scale=self._transform.scale, softcap=self._transform.softcap, vocab_size=self._vocab)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Where the loss is computed: under the autocast that the head would have run under, with a partitioned head (ZeRO-3) gathered.

        A ``finish`` given to the tap runs in it already.
        """
        with ExitStack() as stack:
            if self._autocast is not None:
                stack.enter_context(torch.autocast(*self._autocast))
            if self._head is not None:
                stack.enter_context(gathered(self._head.parameters))
            yield


class HeadTap:
    """Runs a causal language model and gives its hidden states and head instead of its logits.

    The first call also runs a few tokens of it twice, without gradients, to measure what the model does to its logits and to check the result
    against them. A model whose head can't be taken apart is used with its dense logits, after one warning that says why.

    Args:
        model: a transformers model, or a PEFT model, DDP, FSDP or compiled wrapper around one.
        vocab_size: real size of the vocabulary; columns beyond it are cut off. Default: all columns of the model's logits.

    Raises:
        TypeError: ``torch.nn.DataParallel``.
        ValueError: a PEFT method that changes the length of the sequence; ``vocab_size`` beyond the model's columns (at the first call).

    Example::

        tap = HeadTap(model)
        tapped = tap(model, input_ids=ids, attention_mask=mask)
        loss = kd.distillation_loss(tapped.side(rows), teacher)
        # Wrapped by DDP or FSDP: have the loss computed inside the wrapper's forward.
        loss = tap(ddp_model, lambda tapped: kd.distillation_loss(tapped.side(rows), teacher), input_ids=ids)
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None) -> None:
        self.base = unwrap(model)
        self.vocab_size = vocab_size
        self.transform = Transform()
        self.fallback_reason: str | None = None
        """Why dense logits are used; None where they are not (or before the first call)."""
        self.aux_coefficient: float | None = None
        self.columns: int | None = None
        """Columns of the logits that are used, once known."""
        self._ready = False
        parameters = inspect.signature(type(self.base).forward).parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._fixed = {k: v for k, v in (("use_cache", False), ("return_dict", True)) if k in parameters or any_keyword}

    @property
    def head(self) -> nn.Module | None:
        """The module whose ``forward`` is replaced."""
        get = getattr(self.base, "get_output_embeddings", None)
        head = get() if get is not None else None
        return head if isinstance(head, nn.Module) else None

    @overload
    def __call__(self, model: nn.Module, finish: None = None, **inputs: Any) -> Tapped: ...
    @overload
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], T], **inputs: Any) -> T: ...
    def __call__(self, model: nn.Module, finish: Callable[[Tapped], Any] | None = None, **inputs: Any) -> Any:
        """Runs ``model`` (the model given at first, or the wrapper that has to see its forward pass) on ``inputs``, without cache.

        Args:
            finish: called with the :class:`Tapped` inside the forward pass of the wrapper, where FSDP's parameters are whole; what it returns is
                what the wrapper, and the tap, return. DDP then sees the loss as the output and finds every parameter that it depends on.
            inputs: ``input_ids`` and whatever else the model takes, but no labels.
        """
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "torch.nn.DataParallel copies the model for each call: the head tap needs DistributedDataParallel or one device"
            )
        if "labels" in inputs:
            raise ValueError("labels given to the head tap: the model must not compute a loss of its own; give them to the loss")
        if not self._ready:
            self.prepare(model, inputs)
        return self._run(model, finish, inputs)

    def _run(self, model: nn.Module, finish: Callable[[Tapped], Any] | None, inputs: dict[str, Any]) -> Any:
        kept: list[Tapped] = []

        def inner(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.fallback_reason is not None or self.head is None:
                output = forward(*args, **kwargs)
                tapped = Tapped(output, None, self._auxiliary(output), _vocab=self.columns)
            else:
                stub = Stub()
                with replaced(self.head, stub):
                    output = forward(*args, **kwargs)
                tapped = self._tapped(output, stub, inputs["input_ids"].shape if "input_ids" in inputs else None)
            if finish is not None:
                with tapped.computing():
                    return finish(tapped)
            kept.append(tapped)
            return output

        with replaced(self.base, inner):
            returned = model(**inputs, **self._fixed)
        return kept[0] if finish is None else returned

    def _tapped(self, output: Any, stub: Stub, shape: torch.Size | None) -> Tapped:
        assert self.head is not None
        if len(stub.inputs) != 1:
            raise RuntimeError(f"{self.family}: the head was called {len(stub.inputs)} times in one forward pass, once was expected")
        hidden = stub.inputs[0]
        if shape is not None and hidden.shape[:-1] != shape:
            hidden = hidden.reshape(*shape, hidden.shape[-1])
        return Tapped(output, hidden, self._auxiliary(output), read_head(self.head), self.transform, self.columns, stub.autocast)

    def _auxiliary(self, output: Any) -> Tensor | None:
        loss = getattr(output, "aux_loss", None)
        return loss * self.aux_coefficient if isinstance(loss, Tensor) and self.aux_coefficient else None

    @property
    def family(self) -> str:
        return str(getattr(getattr(self.base, "config", None), "model_type", type(self.base).__name__))

    def prepare(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Measures what lies between head and logits and checks it; the first call does this by itself."""
        ids = inputs["input_ids"][:1, :PROBE_TOKENS]
        with measuring(self.base):
            try:
                self._measure(model, ids)
            except (UnsupportedHead, UnknownTransform) as reason:
                self._fall_back(str(reason))
            if self.fallback_reason is not None:
                logits = model(input_ids=ids, **self._fixed).logits
                self.columns = self._columns(logits.shape[-1])
            self.aux_coefficient = self._auxiliary_coefficient(model, ids)
        self._ready = True

    def _columns(self, found: int) -> int:
        if self.vocab_size is not None and self.vocab_size > found:
            raise ValueError(f"vocab_size={self.vocab_size}, but the logits of {self.family} have {found} columns: give that or less")
        return self.vocab_size or found

    def _measure(self, model: nn.Module, ids: Tensor) -> None:
        head = self.head
        if head is None:
            raise UnsupportedHead("the model names no output embeddings")
        parts = read_head(head)
        stub = Stub(ramp(parts.rows))
        with replaced(head, stub):
            output = model(input_ids=ids, **self._fixed)
        if len(stub.inputs) != 1:
            raise UnsupportedHead(f"the head is called {len(stub.inputs)} times in one forward pass")
        self.transform = fit(output.logits)
        self.columns = self._columns(self.transform.columns)
        self.check(model, ids)

    def check(self, model: nn.Module, input_ids: Tensor) -> None:
        """Compares what the tap would give with the model's own logits at one token of ``input_ids`` [1, L].

        Raises:
            UnsupportedHead: they differ by more than rounding.
        """
        assert self.head is not None
        recorder = Stub(passing=True)
        with replaced(self.head, recorder):
            logits = model(input_ids=input_ids, **self._fixed).logits
        if len(recorder.inputs) != 1 or recorder.inputs[0].numel() // recorder.inputs[0].shape[-1] != input_ids.numel():
            raise UnsupportedHead("the head does not see one hidden state per token")
        tapped = Tapped(None, recorder.inputs[0], None, read_head(self.head), self.transform, self.columns, recorder.autocast)
        with tapped.computing():
            side = tapped.side(torch.tensor([input_ids.numel() - 1], device=input_ids.device))
            assert isinstance(side, LMHead)
            expected = dense(side)
        found = logits.reshape(-1, logits.shape[-1])[-1:, : self.columns].to(expected.dtype)
        scale = max(found.abs().max().item(), expected.abs().max().item())
        error = (found - expected).abs().max().item()
        step = torch.finfo(recorder.dtype or logits.dtype).eps
        if not error <= 16 * step * scale:
            raise UnsupportedHead(f"its logits differ from the tap's by {error:.3g} (largest logit {scale:.3g})")

    def _fall_back(self, reason: str) -> None:
        self.fallback_reason = reason
        warnings.warn(f"{self.family}: dense logits are used, which need more memory and time, because {reason}", stacklevel=5)

    def _auxiliary_coefficient(self, model: nn.Module, ids: Tensor) -> float | None:
        """What the model multiplies its auxiliary loss by: its loss with labels less its cross-entropy, which then names the coefficient."""
        output = model(input_ids=ids, **self._fixed)
        auxiliary = getattr(output, "aux_loss", None)
        if not isinstance(auxiliary, Tensor) or auxiliary.numel() != 1:
            return None
        named = next(
            (getattr(o, "router_aux_loss_coef", None) for o in (self.base, self.base.config) if hasattr(o, "router_aux_loss_coef")), None
        )
        return float(named) if named is not None else None


def dense(side: LMHead) -> Tensor:
    """The logits of a side, in float32 or wider but from a product in the head's own dtype."""
    z = nn.functional.linear(side.hidden, side.weight, side.bias)
    return Transform(side.scale, side.softcap, side.vocab_size)(z if z.dtype == torch.float64 else z.float())


class Stub:
    """In the head's place: keeps the input; returns a column of zeros, or ``columns`` [V] for each token, or what the head returns."""

    def __init__(self, columns: Tensor | None = None, passing: bool = False) -> None:
        self.inputs: list[Tensor] = []
        self.columns, self.passing = columns, passing
        self.autocast: tuple[str, torch.dtype] | None = None
        self.dtype: torch.dtype | None = None

    def __call__(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(x)
        device = x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        if self.passing:
            output = forward(x, *args, **kwargs)
            self.dtype = output.dtype
            return output
        if self.columns is not None:
            return self.columns.to(x.device).expand(*x.shape[:-1], -1)
        return x[..., :1] * 0  # [..., 1]: the graph stays connected, so a wrapper sees every parameter below the head


_lock = threading.Lock()


class _Replacement:
    """A ``forward`` that is another one in the threads that asked for it."""

    def __init__(self, module: nn.Module) -> None:
        self.had = "forward" in module.__dict__
        self.original = module.forward
        self.of_thread: dict[int, list[Callable[..., Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        functions = self.of_thread.get(threading.get_ident())
        return functions[-1](self.original, *args, **kwargs) if functions else self.original(*args, **kwargs)


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block and in this thread, ``module.forward(...)`` is ``function(original, ...)``."""
    me = threading.get_ident()
    with _lock:
        current = module.__dict__.get("forward")
        replacement = current if isinstance(current, _Replacement) else _Replacement(module)
        replacement.of_thread.setdefault(me, []).append(function)
        module.__dict__["forward"] = replacement
    try:
        yield
    finally:
        with _lock:
            replacement.of_thread[me].pop()
            if not replacement.of_thread[me]:
                del replacement.of_thread[me]
            if not replacement.of_thread:
                if replacement.had:
                    module.__dict__["forward"] = replacement.original
                else:
                    del module.__dict__["forward"]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and the random state as it was."""
    training = [m for m in model.modules() if m.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fork: AbstractContextManager[Any] = torch.random.fork_rng(sorted(devices, key=str)) if devices else torch.random.fork_rng(devices=[])
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), fork, nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, ``torch.compile`` and PEFT wrappers.

    Raises:
        TypeError: ``torch.nn.DataParallel``.
        ValueError: a PEFT method that prepends tokens of its own (prompt tuning and its kin).
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "torch.nn.DataParallel copies the model for each call: the head tap needs DistributedDataParallel or one device"
            )
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if hasattr(model, "get_base_model"):
            config = model.peft_config[model.active_adapter] if hasattr(model, "peft_config") else None
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"PEFT {getattr(config, 'peft_type', 'prompt learning')} prepends virtual tokens, so positions no longer agree with the labels: "
                    "use LoRA, or another method that keeps the length"
                )
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
