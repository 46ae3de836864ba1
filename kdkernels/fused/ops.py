"""The custom ops and their autograd.

A loss and its gradient are two ops, so that torch.compile sees neither the chunk loop nor data-dependent shapes. All ops take a call in
its flat form (``call.flatten``). They are defined with ``Library.define`` instead of the ``custom_op`` decorator: that avoids importing
torch._dynamo and most of the decorator's Python overhead in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from .. import reference
from . import engine, one_side
from .call import Call, Tensors, flatten, names_of, rename, restore
from .engine import SAVED, Outputs
from .work import check_values

_NAMESPACE = __name__.partition(".")[0]  # "kdkernels", or the name under which this copy of the package was loaded
_LIBRARY: Any = library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
# The ops read flags and row counts on the host, so torch.compile must split CUDA graphs around them.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name))
_CALL = "Tensor numbers, SymInt[] sizes, str text"

Kernel = Callable[..., Any]


def define(name: str, tensors: str, results: str, kernel: Kernel, fake: Kernel, function: Any = None) -> Any:
    """Define and return a custom op whose arguments are tensors and a call.

    Args:
        tensors, results: parts of the op's schema.
        kernel: implementation for all devices.
        fake: implementation for tensors without values.
        function: ``autograd.Function`` whose arguments are the op without autograd, the call, and the tensors one by one.
    """
    _LIBRARY.define(f"{name}({tensors}, {_CALL}) -> {results}", tags=_TAGS)
    op = getattr(getattr(torch.ops, _NAMESPACE), name).default
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if function is None:
        return op
    in_list = tensors.startswith("Tensor[]")

    def plain(tensors: Sequence[Tensor], *call: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(list(tensors), *call) if in_list else op(*tensors, *call)

    def recorded(*arguments: Any) -> Any:
        *tensors, numbers, sizes, text = (*arguments[0], *arguments[1:]) if in_list else arguments
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function.apply(plain, numbers, sizes, text, *tensors)
        return plain(tensors, numbers, sizes, text)

    _LIBRARY.impl(name, recorded, "Autograd")
    return op


def _opened(function: Callable[[Call, Tensors], Any]) -> Kernel:
    """Wrap a function of a call and its tensors as a kernel. Autocast is disabled: the call already chose all dtypes."""

    def kernel(tensors: Sequence[Tensor], numbers: Tensor, sizes: Sequence[int], text: str) -> Any:
        call, named = restore(tensors, numbers, sizes, text)
        if not torch.is_autocast_enabled(named.student.device.type):
            return function(call, named)
        with torch.autocast(named.student.device.type, enabled=False):
            return function(call, named)

    return kernel


def _faked(function: Callable[[Call, Tensors], Any]) -> Kernel:
    """Wrap a function of a call and its tensors as a fake kernel. The call's numbers are arbitrary there."""
    return lambda tensors, numbers, sizes, text: function(*restore(tensors, None, sizes, text))


def _empty_gradients(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised results for ``distill_backward``."""

    def gradient(name: str, wanted: bool) -> Tensor:
        like = tensors.get(name)
        return tensors.student.new_empty(0) if like is None else like.new_empty(like.shape if wanted else (0,))

    wanted = call.wants_input, call.wants_weight, call.wants_bias
    student, weight, bias = map(gradient, TRAINED, wanted)
    return student, weight, bias


TRAINED = ("student.input", "student.weight", "student.bias")
"""Differentiable tensors, in the order of the results of ``distill_backward``."""


_NAMES = {"distillation": "distillation_loss", "logprobs": "token_logprobs"}  # public functions not named like their quantity


def _no_second_derivative(sizes: Sequence[int], text: str) -> NoReturn:
    quantity = restore([], None, sizes, rename(Tensors({}), text))[0].quantity
    raise RuntimeError(
        f"kdkernels.{_NAMES.get(quantity, quantity)} has no second derivative: compute its gradient without create_graph=True, or use "
        'backend="reference", which is plain torch and can be differentiated any number of times (but stores all logits)'
    )


# ---- losses, and other quantities with a gradient


class _Distill(torch.autograd.Function):
    """Autograd of a loss or quantity."""

    @staticmethod
    def forward(ctx: Any, op: Kernel, numbers: Tensor, sizes: Sequence[int], text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = Outputs(*op(tensors, numbers, sizes, text))
        ctx.sizes, ctx.text = sizes, text
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        named = dict(zip(names_of(text), tensors, strict=True))
        if outputs.state.dim() != 2:
            # Without row state, backward only scales gradients and needs neither teacher nor labels. The head is saved for the shape and
            # dtype of its gradient; it is a parameter, so saving it costs no memory.
            named = {name: tensor for name, tensor in named.items() if name.startswith("student.")}
        named |= {f"saved.{name}": getattr(outputs, name) for name in SAVED}
        ctx.names = tuple(named)
        ctx.save_for_backward(numbers, *named.values())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        names = names_of(ctx.text)
        if upstream is None:
            return (None,) * (4 + len(names))
        numbers, *saved = ctx.saved_tensors
        tensors = Tensors({**dict(zip(ctx.names, saved, strict=True)), "upstream": upstream})
        gradients = distill_backward(list(tensors.named.values()), numbers, ctx.sizes, rename(tensors, ctx.text))
        by_name = dict(zip(TRAINED, gradients, strict=True))
        wanted = zip(names, ctx.needs_input_grad[4:], strict=True)
        return None, None, None, None, *[by_name.get(name) if needed else None for name, needed in wanted]


class Gradient(torch.autograd.Function):
    """Autograd of a gradient op: raises, because second derivatives are not supported."""

    @staticmethod
    def forward(ctx: Any, op: Kernel, numbers: Tensor, sizes: Sequence[int], text: str, *tensors: Tensor) -> Any:
        ctx.sizes, ctx.text = sizes, text
        return op(tensors, numbers, sizes, text)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> NoReturn:
        _no_second_derivative(ctx.sizes, ctx.text)


distill = define(
    "distill",
    "Tensor[] tensors",
    f"({', '.join(f'Tensor {name}' for name in Outputs._fields)})",
    _opened(lambda call, tensors: tuple(engine.forward(call, tensors))),
    _faked(lambda call, tensors: tuple(engine.empty_outputs(call, tensors))),
    _Distill,
)
distill_backward = define(
    "distill_backward",
    "Tensor[] tensors",
    "(Tensor input, Tensor weight, Tensor bias)",
    _opened(engine.backward),
    _faked(_empty_gradients),
    Gradient,
)


class _NoTangent(torch.autograd.Function):
    """Raise if forward-mode AD carries a tangent of the argument, at any level of torch.func. Custom ops would silently drop it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, message: str) -> Tensor:
        return tensor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise RuntimeError(ctx.message)


def refuse_tangents(message: str, *tensors: Tensor | None) -> None:
    """Raise ``RuntimeError(message)`` if forward-mode AD differentiates by one of the tensors."""
    if forward_ad._current_level < 0:  # fast path: no dual level is open
        return
    for tensor in tensors:
        if tensor is not None:
            _NoTangent.apply(tensor, message)  # type: ignore[no-untyped-call]


def refuse_forward_mode(call: Call, *tensors: Tensor | None) -> None:
    """Raise ``RuntimeError`` if forward-mode AD differentiates by one of the tensors of a call."""
    refuse_tangents(
        f"kdkernels.{_NAMES.get(call.quantity, call.quantity)} has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode "
        '(backward, grad, jacrev), or backend="reference", which is plain torch (but stores all logits)',
        *tensors,
    )


def run(call: Call, tensors: Tensors, fused: Callable[[Call, Tensors], tuple[Tensor, ...]] | None = None) -> tuple[Tensor, ...]:
    """Compute the quantity of a call with its op or the reference. ``reference.run`` documents the results.

    Args:
        fused: runs the ops of the call; default: the ops of this file.
    """
    if not call.is_dense:
        return (fused or _run_op)(call, tensors)
    check_values(call, tensors)
    return reference.run(call, tensors)


def _run_op(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    if call.quantity in ("topk", "sample"):  # ids are not differentiable
        tensors = Tensors({name: tensor.detach() for name, tensor in tensors.named.items()})
        return topk_logprobs(*flatten(call, tensors)) if call.quantity == "topk" else (sample(*flatten(call, tensors)),)
    refuse_forward_mode(call, *(tensors.get(name) for name in TRAINED))
    return tuple(distill(*flatten(call, tensors))[:3])


# ---- ids


topk_logprobs = define(
    "topk_logprobs", "Tensor[] tensors", "(Tensor ids, Tensor logprobs)", _opened(one_side.topk), _faked(one_side.empty_topk)
)
sample = define("sample", "Tensor[] tensors", "Tensor", _opened(one_side.sample), _faked(one_side.empty_sample))
