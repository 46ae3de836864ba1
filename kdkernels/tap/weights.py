"""The matrix behind an LM head, whatever holds it: a linear layer, a PEFT adapter on one, a shard of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .patching import Replacement, is_partitioned, replaced, text_config, unwrap

__all__ = [
    "HeadWeights",
    "UnsupportedHead",
    "embedding_rows",
    "gathered",
    "head_width",
    "logit_columns",
    "output_head",
    "read_head",
    "sharded_like",
    "whole",
]


T = TypeVar("T")


class UnsupportedHead(ValueError):
    """The head can't be taken apart into hidden states and a matrix. The message completes "because"."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA on the head: ``scaling * dropout(h) @ A.T @ B.T`` (Hu et al. 2021)."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scaling: float


class HeadWeights:
    """``[V, D]`` and a bias, with their adapters; read anew for each forward pass, since a step changes them."""

    def __init__(self, linear: nn.Module, adapters: Sequence[Adapter] = ()) -> None:
        self.linear, self.adapters = linear, adapters
        self._whole: tuple[Tensor, Tensor | None] | None = None

    @property
    def rows(self) -> int:
        """V, padding included."""
        return _rows(_own(self.linear, "weight"))

    @property
    def modules(self) -> list[nn.Module]:
        """What holds the parameters."""
        return [self.linear, *(m for a in self.adapters for m in (a.a, a.b))]

    @property
    def parameters(self) -> list[Tensor]:
        return [p for module in self.modules for p in module.parameters(recurse=False)]

    def inside(self, hidden: Tensor, function: Callable[[Tensor], T]) -> T:
        """``function(hidden)``; where ZeRO-3 has partitioned the parameters, as the forward pass of each module that holds some.

        DeepSpeed makes a module's parameters whole for its forward pass, and again before their gradients, which it finds by what the
        module takes and returns. So ``hidden`` has to come from here, and the loss has to be what ``function`` returns.
        """
        for module in self.modules:
            if any(is_partitioned(p) for p in module.parameters(recurse=False)):
                function = partial(_as_forward, module, function)
        return function(hidden)

    def apply_to(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias whose product is the head's output, with gradients to every part.

        A LoRA of rank r adds r columns, ``[h, scaling * A dropout(h)] @ [W, B].T``: exact, with dropout too. The matrix is put together
        once for a forward pass.
        """
        extra = []
        for adapter in self.adapters:
            x = adapter.dropout(hidden.to(adapter.a.weight.dtype))
            extra.append(nn.functional.linear(x, whole(adapter.a.weight)) * adapter.scaling)
        if self._whole is None:
            weight, bias = whole(self.linear.weight), whole(self.linear.bias)
            for adapter in self.adapters:
                weight = torch.cat([weight, whole(adapter.b.weight).to(weight.dtype)], dim=1)
                if adapter.b.bias is not None:
                    more = whole(adapter.b.bias) * adapter.scaling
                    bias = more if bias is None else bias + more
            self._whole = weight, bias
        if extra:
            hidden = torch.cat([hidden, *(e.to(hidden.dtype) for e in extra)], dim=-1)
        return hidden, *self._whole


def _as_forward(module: nn.Module, function: Callable[[Tensor], T], hidden: Tensor) -> T:
    with replaced(module, lambda _, x: function(x)):
        result: T = module(hidden)
    return result


def _own(module: nn.Module, name: str) -> Any:
    """A parameter, or None. By ``getattr`` ZeRO-3 would gather it for good, as one that the module whose forward pass runs needs too."""
    return module._parameters.get(name) if name in module._parameters else getattr(module, name, None)


def _rows(weight: Any) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ds_shape: of all partitions of ZeRO-3


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that a causal language model names as its output embeddings; None if it names none."""
    find = getattr(unwrap(model), "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Module) else None


def embedding_rows(*models: nn.Module) -> int | None:
    """Rows of the smallest input embeddings of the models; None if that can't be read off their weights."""
    sizes = [_embedding_rows(model) for model in models]
    return min((size for size in sizes if size is not None), default=None)


def _embedding_rows(model: nn.Module) -> int | None:
    try:
        embeddings = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    shape = _weight_shape(embeddings, "num_embeddings", "embedding_dim")
    return None if shape is None else shape[0]


def logit_columns(model: nn.Module) -> int:
    """Columns of a model's logits, padding included."""
    head: Any = output_head(model)
    shape = None if head is None else _weight_shape(head, "out_features", "in_features")
    return int(getattr(head, "out_features", None) or text_config(model).vocab_size) if shape is None else shape[0]


def head_width(model: nn.Module) -> int:
    """Return the width of the hidden states that a model's head reads."""
    head: Any = output_head(model)
    shape = None if head is None else _weight_shape(head, "out_features", "in_features")
    return int(getattr(head, "in_features", None) or text_config(model).hidden_size) if shape is None else shape[1]


def _weight_shape(module: nn.Module, *sizes: str) -> tuple[int, int] | None:
    """Return the shape ``[rows, columns]`` of a module's weight; None if it packs several numbers into one, as quantised weights do.

    The module's own ``sizes`` can be stale: a library that ties or resizes weights replaces the weight alone. They tell only whether
    integers are packed. Floating-point storage of packed numbers is ``[n, 1]``.
    """
    weight: Any = getattr(module, "weight", None)
    shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    if len(shape) != 2 or shape[1] == 1:
        return None
    claimed = [getattr(module, name, None) for name in sizes]
    packed = not weight.is_floating_point() and None not in claimed and shape[0] * shape[1] != math.prod(claimed)  # type: ignore[arg-type]
    return None if packed else (int(shape[0]), int(shape[1]))


def read_head(head: nn.Module) -> HeadWeights:
    """What the head is made of.

    Raises:
        UnsupportedHead: no plain linear layer, nor one with a plain LoRA or PEFT's ``modules_to_save`` on it.
    """
    peft = sys.modules.get("peft")  # who has not imported it has no adapter
    if peft is not None:
        if isinstance(head, peft.utils.ModulesToSaveWrapper):
            active = [] if head.disable_adapters else head.active_adapters
            return read_head(head.modules_to_save[active[0]] if active else head.original_module)
        if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
            return _with_adapters(head, peft)
    weight = _own(head, "weight")
    for parameter in (weight, _own(head, "bias")):
        if isinstance(parameter, Tensor) and (parameter.is_meta or not parameter.is_floating_point()):
            raise UnsupportedHead(f"its head is {'offloaded' if parameter.is_meta else f'quantised ({parameter.dtype})'}")
    # An instance's own forward is a tap's, or that of a library which moves or converts the weights around the call.
    forward = head.__dict__.get("forward")
    forward = forward.original if isinstance(forward, Replacement) else forward
    if type(head).forward is not nn.Linear.forward or not (forward is None or getattr(forward, "__func__", None) is nn.Linear.forward):
        raise UnsupportedHead(f"its head is a {type(head).__name__} and not a plain linear layer")
    if not _is_plain(weight):
        raise UnsupportedHead(f"its head's weight is a {type(weight).__name__} and not a plain tensor")
    return HeadWeights(head)


def _with_adapters(head: Any, peft: Any) -> HeadWeights:
    base = read_head(head.get_base_layer())
    if head.disable_adapters or not head.active_adapters:
        if head.merged:
            raise UnsupportedHead("the adapters of its head are merged and disabled at once")
        return base
    if head.merged:
        return base
    if not isinstance(head, peft.tuners.lora.Linear):
        raise UnsupportedHead(f"the adapter of its head is a {type(head).__module__}.{type(head).__name__} and not LoRA")
    adapters = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant:
            raise UnsupportedHead(f"the adapter {name!r} of its head is {type(head.lora_variant[name]).__name__} and not plain LoRA")
        adapters.append(Adapter(head.lora_A[name], head.lora_B[name], head.lora_dropout[name], float(head.scaling[name])))
    return HeadWeights(base.linear, adapters)


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) or _is_sharded(weight) or is_partitioned(weight)


def _is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Any:
    """A tensor without its sharding (FSDP2); its gradient is averaged over the ranks, as FSDP averages the others."""
    if tensor is None or not _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    names = tensor.device_mesh.mesh_dim_names or ("",) * tensor.device_mesh.ndim
    return tensor.full_tensor(grad_placements=[Replicate() if name == "tp" else Partial("avg") for name in names])


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` (whole, the same on each rank) as the parameter is sharded."""
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def gathered(parameters: Sequence[Tensor], modified: bool = False) -> AbstractContextManager[Any]:
    """In the block, which is outside of any forward pass, the parameters are whole on every rank where ZeRO-3 has partitioned them.

    Args:
        modified: the block changes them; rank 0's values are kept.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None)
    return context
