"""Record the hidden states of chosen decoder layers by forward hooks. ``output_hidden_states=True`` would keep those of all layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .patching import is_measuring, unwrap

__all__ = ["LayerRecorder", "decoder_layers"]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a causal language model: the longest list of modules that is not inside another list.

    Experts are inside another list. Towers for images and sound are skipped.

    Raises:
        ValueError: the model has no such list, or several lists that together make up a layer (XLM).
    """
    base = unwrap(model)
    lists = _outermost_lists(base)
    longest = max((len(found) for _, found in lists), default=0)
    candidates = [(parent, found) for parent, found in lists if len(found) == longest]
    if len({id(parent) for parent, _ in candidates}) < len(candidates) or not longest:
        raise ValueError(f"{type(base).__name__} has no list of decoder layers: its features can't be tapped, set feature_weight=0")
    return max(candidates, key=lambda candidate: sum(p.numel() for p in candidate[1].parameters()))[1]


def _outermost_lists(module: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return pairs of a parent and a module list in it."""
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found.append((module, child))
        elif getattr(child, "main_input_name", "input_ids") == "input_ids" and "text" in getattr(child, "input_modalities", "text"):
            found += _outermost_lists(child)
    return found


class LayerRecorder:
    """Record the outputs of some decoder layers, for the calls in ``with recorder.recording(input_ids) as features``."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        layers = decoder_layers(model)
        self.layers = {i: layers[i] for i in sorted(set(indices))}

    @contextmanager
    def recording(self, input_ids: Tensor) -> Iterator[dict[int, Tensor]]:
        """Yield a dict that a forward pass of this thread on ``input_ids`` ``[B, L]`` fills: layer -> ``[B, L, D]``.

        Raises:
            ValueError: in the forward pass, if the output of a layer has another shape.
            RuntimeError: in the forward pass, under reentrant gradient checkpointing, where features have no gradient.
        """
        features: dict[int, Tensor] = {}
        thread, grad, shape = threading.get_ident(), torch.is_grad_enabled(), input_ids.shape

        def keep(index: int, output: Any) -> None:
            if threading.get_ident() != thread or is_measuring():
                return
            feature = output[0] if isinstance(output, tuple | list) else output
            if feature.dim() != 3 or feature.shape[:2] != shape:
                raise ValueError(
                    f"layer {index} returns {list(feature.shape)} for input_ids of {list(shape)}, expected [batch, length, width]: "
                    "the features of this model can't be tapped, set feature_weight=0"
                )
            if grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    "features of a layer under reentrant gradient checkpointing have no gradient: "
                    'set gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            features[index] = feature

        def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _inputs, output: keep(index, output)

        handles = [layer.register_forward_hook(hook(index)) for index, layer in self.layers.items()]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()
