"""Models in the hands of a tap: a ``forward`` replaced for one call, a forward pass that leaves no trace, wrappers taken off."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["compiled_parts", "is_measuring", "is_partitioned", "is_sharded", "measuring", "replaced", "text_config", "unwrap"]

_lock = threading.Lock()


class Replacement:
    """An instance's ``forward`` that is another function in the threads that asked for one.

    A module keeps its replacement for the next time, since ``torch.compile`` would compile anew for another object.
    """

    def __init__(self) -> None:
        self.own = False  # an instance's own forward it was, as accelerate leaves one
        self.original: Callable[..., Any] = self
        self.of_thread: dict[int, list[Callable[..., Any]]] = {}

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        functions = self.of_thread.get(threading.get_ident())
        return functions[-1](self.original, *args, **kwargs) if functions else self.original(*args, **kwargs)


_replacements: WeakKeyDictionary[nn.Module, Replacement] = WeakKeyDictionary()


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """In the block and in this thread, ``module.forward(...)`` is ``function(original, ...)``; afterwards it is what it was."""
    me = threading.get_ident()
    with _lock:
        replacement = _replacements.setdefault(module, Replacement())
        if not replacement.of_thread:
            replacement.own, replacement.original = "forward" in module.__dict__, module.forward
            module.__dict__["forward"] = replacement
        replacement.of_thread.setdefault(me, []).append(function)
    try:
        yield
    finally:
        with _lock:
            replacement.of_thread[me].pop()
            if not replacement.of_thread[me]:
                del replacement.of_thread[me]
            if not replacement.of_thread:
                if replacement.own:
                    module.__dict__["forward"] = replacement.original
                else:
                    del module.__dict__["forward"]
                replacement.original = replacement  # holds no module


_measuring: set[int] = set()


def is_measuring() -> bool:
    """This thread runs a model to learn about it: what others record should not hold it."""
    return threading.get_ident() in _measuring


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In the block no gradients and no dropout; afterwards the random state and the training flags are what they were."""
    me = threading.get_ident()
    # bitsandbytes packs its weights in the first pass in eval mode on some CPUs, and gives no gradients from then on.
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes.")]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module in training:
        module.training = False
    try:
        _measuring.add(me)
        with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        _measuring.discard(me)
        for module in training:
            module.training = True


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, ``torch.compile`` and PEFT wrappers.

    Raises:
        TypeError: ``torch.nn.DataParallel``.
        ValueError: a PEFT method that prepends tokens of its own (prompt tuning and its kin).
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "torch.nn.DataParallel runs copies of the model: use DistributedDataParallel (torchrun, accelerate launch) or "
                "one device (CUDA_VISIBLE_DEVICES=0)"
            )
        wrapper: Any = model
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if hasattr(model, "get_base_model"):
            config = wrapper.peft_config.get(wrapper.active_adapter)
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"PEFT's {type(config).__name__} prepends virtual tokens, so that positions no longer agree with the labels: use LoRA, "
                    "or another method that keeps the length"
                )
            inner = wrapper.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def text_config(model: nn.Module) -> Any:
    """The config of the part that reads text: the whole config, where there are no images or sound."""
    base: Any = unwrap(model)
    return base.config.get_text_config()


def compiled_parts(model: nn.Module) -> tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """What ``torch.compile`` has wrapped, and how it compiles: the tap has a forward pass compiled, not its own work around it."""
    context = getattr(model, "dynamo_ctx", None)
    inner = getattr(model, "_orig_mod", None)
    return (inner, context) if isinstance(inner, nn.Module) and context is not None else (model, lambda function: function)


def is_partitioned(parameter: Any) -> bool:
    """DeepSpeed ZeRO-3 has it, empty outside of the forward passes that use it."""
    return hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """FSDP or DeepSpeed ZeRO-3 hold some of it in shards, which are put together only inside the forward pass."""
    if any(is_partitioned(p) for p in model.parameters()):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for m in model.modules())
