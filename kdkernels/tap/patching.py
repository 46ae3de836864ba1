"""Patch and unwrap models: replace a ``forward`` for one call, run a forward pass without side effects, remove wrappers."""

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
    """The ``forward`` of an instance, replaced in the threads that called :func:`replaced`.

    A module keeps its replacement: ``torch.compile`` would compile again for another object.
    """

    def __init__(self) -> None:
        self.own = False  # the instance had a forward of its own before, as accelerate sets one
        self.original: Callable[..., Any] = self
        self.of_thread: dict[int, list[Callable[..., Any]]] = {}

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        functions = self.of_thread.get(threading.get_ident())
        return functions[-1](self.original, *args, **kwargs) if functions else self.original(*args, **kwargs)


_replacements: WeakKeyDictionary[nn.Module, Replacement] = WeakKeyDictionary()


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Make ``module.forward(...)`` call ``function(original, ...)`` within the block and in this thread. Restore it afterwards."""
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
                replacement.original = replacement  # do not keep the module alive


_measuring: set[int] = set()


def is_measuring() -> bool:
    """Return True while this thread runs :func:`measuring`: recorders ignore its forward passes."""
    return threading.get_ident() in _measuring


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout within the block. Restore the random state and the training flags afterwards."""
    me = threading.get_ident()
    # On some CPUs bitsandbytes packs its weights in the first pass in eval mode, and returns no gradients after that.
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
    """Return the transformers model inside DDP, FSDP, DeepSpeed, ``torch.compile`` and PEFT wrappers.

    Raises:
        TypeError: ``torch.nn.DataParallel``.
        ValueError: a PEFT method that prepends virtual tokens, such as prompt tuning.
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
    """Return the config of the text model; for a text-only model that is the whole config."""
    base: Any = unwrap(model)
    return base.config.get_text_config()


def compiled_parts(model: nn.Module) -> tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Return the module inside a ``torch.compile`` wrapper, and a function that compiles like it.

    The tap compiles the forward pass, not its own work around it.
    """
    context = getattr(model, "dynamo_ctx", None)
    inner = getattr(model, "_orig_mod", None)
    return (inner, context) if isinstance(inner, nn.Module) and context is not None else (model, lambda function: function)


def is_partitioned(parameter: Any) -> bool:
    """Return whether DeepSpeed ZeRO-3 partitions the parameter: it is empty outside the forward passes that use it."""
    return hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP or DeepSpeed ZeRO-3 shards some parameters, which are whole only inside the forward pass."""
    if any(is_partitioned(p) for p in model.parameters()):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for m in model.modules())
