"""Read the matrix of an LM head: of a linear layer, of a PEFT adapter on one, or of a shard."""

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
    """Raised if a head is not a product of hidden states and a matrix. The message completes "because"."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA on the head: ``scaling * dropout(h) @ A.T @ B.T`` (Hu et al. 2021)."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scaling: float


class HeadWeights:
    """Weight ``[V, D]``, bias and adapters of a head. Read again for each forward pass, since an optimizer step changes them."""

    def __init__(self, linear: nn.Module, adapters: Sequence[Adapter] = ()) -> None:
        self.linear, self.adapters = linear, adapters
        self._whole: tuple[Tensor, Tensor | None] | None = None

    @property
    def rows(self) -> int:
        """V, padding included."""
        return _rows(_own(self.linear, "weight"))

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that hold the parameters."""
        return [self.linear, *(m for a in self.adapters for m in (a.a, a.b))]

    @property
    def parameters(self) -> list[Tensor]:
        return [p for module in self.modules for p in module.parameters(recurse=False)]

    def inside(self, hidden: Tensor, function: Callable[[Tensor], T]) -> T:
        """Return ``function(hidden)``, run under ZeRO-3 as the forward pass of each module that holds partitioned parameters.

        DeepSpeed gathers a module's parameters for its forward pass and for its backward pass, which it hooks through the module's input
        and output. So ``hidden`` must be the input, and the loss must be the result.
        """
        for module in self.modules:
            if any(is_partitioned(p) for p in module.parameters(recurse=False)):
                function = partial(_as_forward, module, function)
        return function(hidden)

    def apply_to(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden states, weight and bias whose product is the head's output, with gradients to every part.

        A LoRA of rank r adds r columns, ``[h, scaling * A dropout(h)] @ [W, B].T``, which is exact also with dropout. ``[W, B]`` is built
        once for each forward pass.
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
    """Return a parameter, or None. ``getattr`` would make ZeRO-3 gather it for the module whose forward pass runs, and keep it."""
    return module._parameters.get(name) if name in module._parameters else getattr(module, name, None)


def _rows(weight: Any) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ds_shape: of all partitions of ZeRO-3


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a causal language model; None if it has none."""
    find = getattr(unwrap(model), "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Module) else None


def embedding_rows(*models: nn.Module) -> int | None:
    """Return the rows of the smallest input embeddings of the models; None if their weights do not show it."""
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
    """Return the columns of a model's logits, padding included."""
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

    The module's own ``sizes`` can be stale, since libraries that tie or resize weights replace the weight alone: they only show whether
    integers are packed. Packed numbers in floating-point storage have shape ``[n, 1]``.
    """
    weight: Any = getattr(module, "weight", None)
    shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    if len(shape) != 2 or shape[1] == 1:
        return None
    claimed = [getattr(module, name, None) for name in sizes]
    packed = not weight.is_floating_point() and None not in claimed and shape[0] * shape[1] != math.prod(claimed)  # type: ignore[arg-type]
    return None if packed else (int(shape[0]), int(shape[1]))


def read_head(head: nn.Module) -> HeadWeights:
    """Return the weight, bias and adapters of a head.

    Raises:
        UnsupportedHead: the head is not a plain linear layer, with or without a plain LoRA or PEFT's ``modules_to_save``.
    """
    peft = sys.modules.get("peft")  # without peft imported there are no adapters
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
    # A forward set on the instance belongs to a tap, or to a library that moves or converts the weights around the call.
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
    """Return a DTensor (FSDP2) as a full tensor, whose gradient is averaged over the ranks like FSDP's other gradients."""
    if tensor is None or not _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    names = tensor.device_mesh.mesh_dim_names or ("",) * tensor.device_mesh.ndim
    return tensor.full_tensor(grad_placements=[Replicate() if name == "tp" else Partial("avg") for name in names])


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` (full, the same on each rank), sharded like the parameter."""
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def gathered(parameters: Sequence[Tensor], modified: bool = False) -> AbstractContextManager[Any]:
    """Gather ZeRO-3's partitioned parameters on every rank within the block, which must be outside of a forward pass.

    Args:
        modified: the block changes them; rank 0's values are kept.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None)
    return context
