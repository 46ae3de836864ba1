"""The feature loss: layer pairs, distances, projectors and saving."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from families import build  # noqa: E402

from kdkernels.tap.head import HeadTap  # noqa: E402
from kdkernels.tap.layers import LayerRecorder, decoder_layers  # noqa: E402
from kdkernels.trainer.features import FeatureTap, parse_layers  # noqa: E402

IDS = torch.randint(4, 96, (2, 8), generator=torch.Generator().manual_seed(1))
LONGER = torch.cat([torch.full((2, 3), 7), IDS], dim=1)  # the teacher's input: three more tokens first
ROWS = torch.tensor([1, 4, 5, 12, 14])
LONGER_ROWS = ROWS + 3 + 3 * (ROWS // 8)
KINDS = ("mse", "cosine", "normalized_mse")


def features_of(tap: FeatureTap, student: nn.Module, teacher: nn.Module) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    with tap.student.recording(IDS) as student_features:
        student(input_ids=IDS, use_cache=False)
    with torch.no_grad(), tap.teacher.recording(LONGER) as teacher_features:
        teacher(input_ids=LONGER, use_cache=False)
    return student_features, teacher_features


def distance(kind: str, s: Tensor, t: Tensor) -> Tensor:
    """Return the distance of each row, in float64."""
    s, t = s.double(), t.double()
    if kind == "cosine":
        return 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    if kind == "normalized_mse":
        s, t = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() for x in (s, t))
    return ((s - t) ** 2).mean(-1)


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("2:4,5:11", [(2, 4), (5, 11)]),
        (" -1:-1 , 0:0", [(5, 11), (0, 0)]),
        ("last", [(5, 11)]),
        ("all", [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]),
        ([(0, 2), (-2, -3)], [(0, 2), (4, 9)]),
    ],
)
def test_layer_pairs_are_parsed(layers: Any, expected: list[tuple[int, int]]) -> None:
    assert parse_layers(layers, 6, 12) == expected


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (3, 7), (7, 3), (5, 5), (4, 30)])
def test_all_pairs_every_student_layer_in_order_up_to_the_last(student: int, teacher: int) -> None:
    pairs = parse_layers("all", student, teacher)
    assert [s for s, _ in pairs] == list(range(student))
    assert pairs[-1] == (student - 1, teacher - 1)
    assert [t for _, t in pairs] == sorted(t for _, t in pairs)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2:4:6", 'write "student:teacher" pairs'),
        ("first", "feature_layers='first'"),
        ("", "feature_layers=''"),
        ([], "feature_layers is empty"),
        ("6:1", r"layer 6 of the student, which has 6: use -6\.\.5"),
        ("1:-13", r"layer -13 of the teacher, which has 12"),
    ],
)
def test_invalid_layer_pairs_raise(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(layers, 6, 12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "qwen3_next", "gemma3", "phi4_multimodal", "mamba", "bloom"])
def test_decoder_layers_feed_the_head(family: str) -> None:
    """The head reads the normalised output of the last decoder layer. Experts and image towers are not decoder layers."""
    model = build(family)
    layers = decoder_layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    recorder = LayerRecorder(model, [0, len(layers) - 1])
    with recorder.recording(IDS) as features:
        hidden = HeadTap(model)(model, input_ids=IDS).hidden  # the head tap's forward of its own is not recorded
    gradient = torch.autograd.grad(hidden.square().sum() + hidden.sum(), features[len(layers) - 1])[0]
    assert (gradient.abs().sum(-1) > 0).all()


def test_models_without_decoder_layers_raise() -> None:
    with pytest.raises(ValueError, match="XLMWithLMHeadModel has no list of decoder layers"):
        decoder_layers(build("xlm"))
    model = build("xlnet")
    with (
        pytest.raises(ValueError, match=r"layer 1 returns \[8, 2, 32\] for input_ids of \[2, 8\]"),
        LayerRecorder(model, [1]).recording(IDS),
    ):
        model(input_ids=IDS)
    assert not decoder_layers(model)[1]._forward_hooks


# Distances


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_its_definition(kind: Any) -> None:
    student, teacher = build("llama"), build("qwen3", num_hidden_layers=4)
    tap = FeatureTap(student, teacher, "0:1,1:3", kind)
    assert tap.projectors is None
    s, t = features_of(tap, student, teacher)
    weights = torch.rand(len(ROWS))
    expected = sum(
        (distance(kind, s[i].flatten(0, 1)[ROWS], t[j].flatten(0, 1)[LONGER_ROWS]) * weights).sum() / 2 for i, j in ((0, 1), (1, 3))
    )
    loss = tap.loss(s, t, ROWS, LONGER_ROWS, token_weights=weights, num_items=9)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item() / 9, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert not s[0].grad_fn.name().startswith("Detach")


def test_loss_is_divided_like_the_distillation_loss() -> None:
    student, teacher = build("llama"), build("llama")
    tap = FeatureTap(student, teacher, "last")
    s, t = features_of(tap, student, teacher)
    rows, others = ROWS, LONGER_ROWS
    whole = tap.loss(s, t, rows, others)
    parts = [tap.loss(s, t, rows[a:b], others[a:b], num_items=torch.tensor(5)) for a, b in ((0, 2), (2, 5))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
    empty = tap.loss(s, t, rows[:0], others[:0])
    empty.backward()
    assert empty.item() == 0
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_features_are_summed_in_float32(kind: Any) -> None:
    student, teacher = build("llama", dtype=torch.bfloat16), build("llama", dtype=torch.bfloat16, hidden_size=64)
    tap = FeatureTap(student, teacher, "last", kind)
    s, t = features_of(tap, student, teacher)
    loss = tap.loss(s, t, ROWS, LONGER_ROWS)
    assert loss.dtype == torch.float32
    projected = tap.projectors["1_1"](s[1].flatten(0, 1)[ROWS])
    assert projected.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(distance(kind, projected, t[1].flatten(0, 1)[LONGER_ROWS]).mean().item(), rel=1e-5)
    loss.backward()


def test_invalid_calls_raise() -> None:
    student, teacher = build("llama"), build("llama")
    with pytest.raises(ValueError, match="feature loss 'l1': choose one of 'mse'"):
        FeatureTap(student, teacher, "all", "l1")
    tap = FeatureTap(student, teacher, "all")
    s, t = features_of(tap, student, teacher)
    with pytest.raises(ValueError, match=r"student_rows has shape \[5\], teacher_rows \[4\]"):
        tap.loss(s, t, ROWS, LONGER_ROWS[:4])
    with pytest.raises(ValueError, match="layer 0 of the teacher was not recorded"):
        tap.loss(s, {}, ROWS, LONGER_ROWS)


# In a training step


def test_feature_loss_and_head_tap_share_one_forward() -> None:
    """The gradients are the sum of both losses' own, projectors learn, and no hooks remain."""
    student, teacher = build("llama"), build("llama", hidden_size=64)
    tap, heads = FeatureTap(student, teacher, "all"), (HeadTap(student), HeadTap(teacher))
    with torch.no_grad(), tap.teacher.recording(LONGER) as t:
        target = heads[1](teacher, input_ids=LONGER).side(LONGER_ROWS)
    with tap.student.recording(IDS) as s:
        loss = heads[0](
            student,
            lambda tapped: kd.distillation_loss(tapped.side(ROWS), target) + tap.loss(s, t, ROWS, LONGER_ROWS),
            input_ids=IDS,
        )
    assert all(not m._forward_hooks for model in (student, teacher) for m in model.modules())
    loss.backward()
    combined = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    kd.distillation_loss(student(input_ids=IDS).logits.flatten(0, 1)[ROWS], target).backward()
    hidden = [student(input_ids=IDS, output_hidden_states=True).hidden_states[1]]
    with tap.student.recording(IDS) as s:
        student(input_ids=IDS)
    torch.testing.assert_close(hidden[0], s[0])
    tap.loss(s, t, ROWS, LONGER_ROWS).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(combined[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert set(tap.projectors) == {"0_0", "1_1"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(reentrant: bool) -> None:
    student = build("llama").train()
    tap = FeatureTap(student, student, "0:1")
    s, t = features_of(tap, student, student)
    tap.loss(s, t, ROWS, LONGER_ROWS).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    student.enable_input_require_grads()
    s, _ = features_of(tap, student, student)
    tap.loss(s, t, ROWS, LONGER_ROWS).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(student.named_parameters())[name].grad, gradient)


def test_features_without_gradient_raise() -> None:
    """Hooks inside a checkpointed function (transformers before 5.20) record features without a gradient."""
    model = build("llama")
    layer = decoder_layers(model)[0]
    original = type(layer).__call__
    checkpointed = type("Checkpointed", (type(layer),), {"__call__": lambda self, *a, **k: torch.no_grad()(original)(self, *a, **k)})
    layer.__class__ = checkpointed
    with pytest.raises(RuntimeError, match="use_reentrant"), LayerRecorder(model, [0]).recording(IDS):
        model(input_ids=IDS)


def test_other_threads_are_not_recorded() -> None:
    model = build("llama")
    with LayerRecorder(model, [0]).recording(IDS) as features:
        thread = threading.Thread(target=model, kwargs={"input_ids": LONGER})
        thread.start()
        thread.join()
        assert not features
        model(input_ids=IDS)
    assert features[0].shape == (2, 8, 32)


# Projectors


def test_projectors_are_parameters_of_the_student_saved_apart(tmp_path: Path) -> None:
    student, teacher = build("llama"), build("llama", hidden_size=64)
    plain = set(student.state_dict())
    tap = FeatureTap(student, teacher, "0:0,-1:-1")
    assert {name for name, _ in student.named_parameters() if "projector" in name} == {
        "kd_projectors.0_0.weight",
        "kd_projectors.1_1.weight",
    }
    assert all(layer.weight.shape == (64, 32) for layer in tap.projectors.values())
    student.save_pretrained(tmp_path)
    tap.save(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert not [name for name in saved if "projector" in name]
    assert saved.keys() <= plain
    assert sorted(load_file(tmp_path / "projector.safetensors")) == ["0_0.weight", "1_1.weight"]
    assert sorted(p.name for p in tmp_path.iterdir() if "projector" in p.name) == ["projector.safetensors"]

    before = copy.deepcopy(tap.projectors.state_dict())
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    reloaded_tap = FeatureTap(reloaded, teacher, "0:0,-1:-1")
    reloaded_tap.load(tmp_path)
    for name, value in before.items():
        torch.testing.assert_close(reloaded_tap.projectors.state_dict()[name], value)

    with pytest.raises(ValueError, match="but feature_layers and the models' widths need"):
        FeatureTap(reloaded, teacher, "0:0").load(tmp_path)
    with pytest.raises(FileNotFoundError):
        reloaded_tap.load(tmp_path / "elsewhere")
    tap.detach()
    assert set(student.state_dict()) == plain


def test_equal_widths_need_no_projector(tmp_path: Path) -> None:
    student = build("llama")
    tap = FeatureTap(student, build("llama"), "all")
    tap.save(tmp_path)
    tap.load(tmp_path)
    assert tap.projectors is None
    assert not list(tmp_path.iterdir())
    assert not any("projector" in name for name, _ in student.named_parameters())


def test_peft_student_learns_with_projectors() -> None:
    peft = pytest.importorskip("peft")
    student, teacher = build("llama"), build("llama", hidden_size=64)
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tap = FeatureTap(student, teacher, "last")
    s, t = features_of(tap, student, teacher)
    tap.loss(s, t, ROWS, LONGER_ROWS).backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_A" in name for name in trained)
    assert any("kd_projectors" in name for name in trained)
    assert not any("projector" in name for name in peft.get_peft_model_state_dict(student))
