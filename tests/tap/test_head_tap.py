"""The head tap: measured transform, fallback to logits, cleanup, auxiliary losses, precision, wrappers and memory."""

from __future__ import annotations

import copy
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kdkernels as kd

transformers = pytest.importorskip("transformers")

from families import build  # noqa: E402
from tapped import IDS, ROWS, VOCAB, assert_equals_the_model, assert_same_gradients, gradients, loss_of  # noqa: E402

from kdkernels.tap.head import HeadTap, Tapped  # noqa: E402
from kdkernels.tap.probe import Transform, UnknownTransform, fit, ramp  # noqa: E402

# From head to logits


@pytest.mark.parametrize("columns", [96, 50257])
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 1 / 16, 0.7, 1 / 3, 12.5, 0.0390625])
def test_probe_finds_scale_softcap_and_columns(scale: float, softcap: float | None, columns: int) -> None:
    z = ramp(columns + 11)[None, None] * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    transform = fit(z[..., :columns])
    assert transform == Transform(pytest.approx(scale, rel=1e-6), None if softcap is None else pytest.approx(softcap, rel=1e-6), columns)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda z: z + 1,
    "clamp": lambda z: z.clamp(min=-5),
    "zeros": torch.zeros_like,
    "per column": lambda z: z * torch.linspace(1, 2, z.shape[-1]),
    "nan": lambda z: z * float("nan"),
    "order": lambda z: z.flip(-1),
    "log": lambda z: z.sign() * z.abs().log1p(),
}


@pytest.mark.parametrize("transform", UNKNOWN.values(), ids=UNKNOWN)
def test_probe_raises_for_other_transforms(transform: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnknownTransform):
        fit(transform(ramp(96)[None]))


def test_probe_keeps_random_state_training_mode_and_gradients() -> None:
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    HeadTap(model).prepare(model, IDS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_vocab_size_cuts_the_head() -> None:
    model = build("llama")
    assert HeadTap(model, vocab_size=90)(model, input_ids=IDS).side(ROWS).vocab_size == 90
    with pytest.raises(ValueError, match="vocab_size=97, but the logits of llama have 96 columns"):
        HeadTap(model, vocab_size=97)(model, input_ids=IDS)


def test_side_without_rows_has_every_position() -> None:
    model = build("llama")
    side = HeadTap(model)(model, input_ids=IDS).side()
    torch.testing.assert_close(side.hidden @ side.weight.T, model(input_ids=IDS).logits)


def test_float64_model_with_float32_logits_is_exact() -> None:
    """Mamba casts the head's output to float32."""
    model = build("mamba").double()
    assert model(input_ids=IDS).logits.dtype == torch.float32
    assert_equals_the_model(model)


def test_padding_and_positions_reach_the_model() -> None:
    model = build("llama")
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    assert_equals_the_model(model, attention_mask=mask, position_ids=torch.arange(8).flip(0)[None].expand(2, 8))


# The fallback


def test_unknown_transform_falls_back_with_one_warning() -> None:
    model = build("llama")
    original = type(model).forward

    def shifted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits + 0.5 * torch.arange(output.logits.shape[-1])
        return output

    model.forward = types.MethodType(shifted, model)
    tap = HeadTap(model)
    with pytest.warns(UserWarning, match="llama: dense logits are used.*the step from head to logits is not a scale"):
        tap(model, input_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        side = tap(model, input_ids=IDS).side(ROWS)
    torch.testing.assert_close(side, model(input_ids=IDS).logits.flatten(0, 1)[ROWS])


def test_logits_that_do_not_come_from_the_head_fall_back() -> None:
    """The added term is 0 for the probe's ramp, so only the comparison at a real token detects it."""
    model = build("llama")
    head = model.lm_head
    original = type(model).forward

    def with_added_term(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if not hasattr(head.__dict__.get("forward"), "of_thread") or output.logits.abs().max() < 1e3:
            output.logits = output.logits + 0.01 * output.logits.square()
        return output

    model.forward = types.MethodType(with_added_term, model)
    with pytest.warns(UserWarning, match="differ from what its head gives"):
        side = HeadTap(model)(model, input_ids=IDS).side(ROWS)
    assert isinstance(side, Tensor)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "get_output_embeddings", lambda: None), "names no output embeddings"),
        (lambda m: setattr(m.lm_head, "forward", lambda x: nn.functional.linear(x, m.lm_head.weight)), "not a plain linear layer"),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), "is a Sequential"),
    ],
    ids=["none", "replaced forward", "two stages"],
)
def test_head_that_is_not_a_plain_linear_layer_falls_back(change: Callable[[Any], None], reason: str) -> None:
    model = build("llama")
    change(model)
    with pytest.warns(UserWarning, match=reason):
        side = HeadTap(model, vocab_size=90)(model, input_ids=IDS).side(ROWS)
    torch.testing.assert_close(side, model(input_ids=IDS).logits.flatten(0, 1)[ROWS, :90])


# Cleanup


def test_exception_restores_the_model() -> None:
    model = build("llama")
    tap = HeadTap(model)
    tap(model, input_ids=IDS)

    def fail(_: Tapped) -> Tensor:
        raise KeyError("no such row")

    with pytest.raises(KeyError):
        tap(model, fail, input_ids=IDS)
    with pytest.raises((TypeError, ValueError)):
        tap(model, input_ids=IDS, inputs_embeds="nonsense")
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=IDS).logits.shape == (2, 8, VOCAB)


def test_replaced_forward_is_kept() -> None:
    """accelerate's mixed precision sets ``forward`` on the instance."""
    model = build("llama")
    original = model.forward
    forward_calls = []
    model.forward = lambda *args, **kwargs: forward_calls.append(1) or original(*args, **kwargs)
    replaced = model.forward
    assert_equals_the_model(model)
    assert model.forward is replaced
    assert forward_calls


@pytest.mark.parametrize("where", ["head", "finish"])
def test_other_threads_get_the_models_logits(where: str) -> None:
    model = build("llama")
    tap = HeadTap(model)
    tap(model, input_ids=IDS)
    expected = model(input_ids=IDS).logits
    inside, done = threading.Event(), threading.Event()
    logits: list[Tensor] = []

    def dense() -> None:
        assert inside.wait(30)
        logits.append(model(input_ids=IDS).logits)
        done.set()

    def pause(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            inside.set()
            assert done.wait(30)

    def finish(tapped: Tapped) -> Tensor:
        pause()
        return loss_of(tapped.side(ROWS))

    thread = threading.Thread(target=dense)
    thread.start()
    handle = model.lm_head.register_forward_pre_hook(pause) if where == "head" else model.register_forward_hook(lambda *_: None)
    tap(model, finish, input_ids=IDS)
    handle.remove()
    thread.join()
    torch.testing.assert_close(logits[0], expected)
    assert "forward" not in model.lm_head.__dict__
    assert "forward" not in model.__dict__


def test_unsupported_inputs_of_the_tap_raise() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="does not take labels: give them to the loss"):
        HeadTap(model)(model, input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="needs input_ids"):
        HeadTap(model)(model, inputs_embeds=torch.zeros(2, 8, 32))
    with pytest.raises(ValueError, match="made for another LlamaForCausalLM than the one"):
        HeadTap(model)(build("llama"), input_ids=IDS)
    with pytest.raises(TypeError, match="DataParallel"):
        HeadTap(nn.DataParallel(model))


# Mixtures of experts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "jetmoe", "gpt_oss", "phimoe", "jamba"])
def test_auxiliary_loss_equals_the_models(family: str) -> None:
    name = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    model = build(family, output_router_logits=True, **{name: 0.03})
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    added = output.loss - nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tapped = HeadTap(model)(model, input_ids=IDS)
    assert tapped.aux_loss is not None
    assert tapped.aux_loss.item() == pytest.approx(added.item(), rel=1e-3)
    assert tapped.aux_loss.requires_grad
    expected = gradients(model, added)
    router = {name: g for name, g in expected.items() if g.abs().max() > 1e-4 and "head" not in name and "embed" not in name}
    actual = gradients(model, tapped.aux_loss)
    assert router
    assert_same_gradients({name: actual[name] for name in router}, router, 1e-3)


def test_no_auxiliary_loss_without_router_logits() -> None:
    model = build("mixtral")
    assert HeadTap(model)(model, input_ids=IDS).aux_loss is None


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_low_precision_model_is_as_accurate_as_its_logits(family: str, dtype: torch.dtype) -> None:
    """Compared with the same weights in float32, the tap is as accurate as the model's logits."""
    model = build(family, dtype=dtype)
    truth = loss_of(copy.deepcopy(model).float()(input_ids=IDS).logits.flatten(0, 1)[ROWS]).item()
    tapped = HeadTap(model)(model, input_ids=IDS)
    assert tapped.side(ROWS).weight.dtype == dtype
    error = abs(loss_of(tapped.side(ROWS)).item() - truth)
    dense_error = abs(loss_of(model(input_ids=IDS).logits.flatten(0, 1)[ROWS]).item() - truth)
    print(f"tapped {error:.2e}, dense {dense_error:.2e}")
    assert error <= 2 * dense_error + torch.finfo(dtype).eps * truth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_autocast_of_the_model_reaches_the_loss(family: str, dtype: torch.dtype) -> None:
    """Autocast covers only the model's forward, as in accelerate."""
    model = build(family)
    original = model.forward

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return original(*args, **kwargs)

    truth = loss_of(model(input_ids=IDS).logits.flatten(0, 1)[ROWS]).item()
    model.forward = autocast
    dense = loss_of(model(input_ids=IDS).logits.flatten(0, 1)[ROWS].float()).item()
    states = []

    def finish(tapped: Tapped) -> Tensor:
        states.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return loss_of(tapped.side(ROWS))

    tap = HeadTap(model)
    loss = tap(model, finish, input_ids=IDS)
    assert states == [dtype]
    assert tap.fallback_reason is None
    print(f"tapped {abs(loss.item() - truth):.2e}, dense {abs(dense - truth):.2e}")
    assert abs(loss.item() - truth) <= 2 * abs(dense - truth) + torch.finfo(dtype).eps * truth
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with tap(model, input_ids=IDS).computing():
        assert torch.is_autocast_enabled("cpu")


# Wrappers


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_exact(reentrant: bool) -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_equals_the_model(model)


def test_partitioned_head_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the engine's hooks, ZeRO-3's parameters are empty. ``GatheredParameters`` fills them inside a block."""
    model = build("llama")
    head, full = model.lm_head.weight, model.lm_head.weight.data
    expected = gradients(model, loss_of(model(input_ids=IDS).logits.flatten(0, 1)[ROWS]))
    head.ds_id, head.ds_shape = 7, full.shape
    blocks: list[tuple[list[Tensor], Any]] = []

    @contextmanager
    def gathered_parameters(parameters: list[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
        blocks.append((parameters, modifier_rank))
        parameters[0].data = full
        try:
            yield
        finally:
            parameters[0].data = full.new_empty(0)

    zero = types.SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    # The engine's hooks fill and empty a module's parameters around its forward.
    model.lm_head.register_forward_pre_hook(lambda *_: setattr(head, "data", full))
    model.lm_head.register_forward_hook(lambda *_: setattr(head, "data", full.new_empty(0)))
    head.data = full.new_empty(0)
    tap = HeadTap(model)
    loss = tap(model, lambda tapped: loss_of(tapped.side(ROWS)), input_ids=IDS)
    assert head.numel() == 0
    assert blocks
    assert all(parameters == [head] and rank is None for parameters, rank in blocks)
    head.data = full  # the engine fills it before gradients are accumulated
    assert tap.fallback_reason is None
    assert_same_gradients(gradients(model, loss), expected)


def test_compiled_model_is_compiled_once() -> None:
    model = build("llama", num_hidden_layers=1)
    expected = gradients(model, loss_of(model(input_ids=IDS).logits.flatten(0, 1)[ROWS]))
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    tap = HeadTap(compiled)
    for _ in range(2):
        loss = tap(compiled, lambda tapped: loss_of(tapped.side(ROWS)), input_ids=IDS)
        assert_same_gradients(gradients(model, loss), expected)
    assert len(graphs) == 1
    assert tap.fallback_reason is None


# Memory


class Largest(TorchDispatchMode):
    """Record in ``rows`` the largest number of rows of a tensor with ``columns`` columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.columns:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tap_makes_no_logits(family: str) -> None:
    model = build(family, vocab_size=4001)
    ids = torch.randint(4, 4001, (4, 64))
    rows = torch.arange(255)
    labels = torch.randint(4001, (255,))
    tap = HeadTap(model)
    tap(model, input_ids=ids)
    with Largest(4001) as largest:
        tap(model, lambda tapped: kd.cross_entropy(tapped.side(rows), labels, chunk_rows=32), input_ids=ids).backward()
    assert largest.rows <= 32
    with Largest(4001) as largest:
        model(input_ids=ids)
    assert largest.rows == 256, "the model's own forward makes the logits"
