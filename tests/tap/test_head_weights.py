"""Parameters of the head: tied, with bias, adapted by PEFT, quantised. Each is exact, falls back to logits, or raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from families import build  # noqa: E402
from tapped import IDS, ROWS, assert_equals_the_model, assert_falls_back, loss_of  # noqa: E402

from kdkernels.tap.head import HeadTap  # noqa: E402
from kdkernels.tap.weights import embedding_rows, head_width, logit_columns  # noqa: E402


def test_tied_head_is_the_embeddings_parameter() -> None:
    model = build("gemma")
    side = HeadTap(model)(model, input_ids=IDS).side(ROWS)
    assert side.weight is model.model.embed_tokens.weight
    assert_equals_the_model(model)


def test_bias_of_the_head_is_used() -> None:
    model = build("phi")
    assert HeadTap(model)(model, input_ids=IDS).side(ROWS).bias is model.lm_head.bias
    assert_equals_the_model(model)


def lora(model: nn.Module, targets: list[str], **options: Any) -> Any:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, **{"lora_dropout": 0.0, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


def test_lora_on_the_body_keeps_the_head_frozen() -> None:
    model = lora(build("llama"), ["q_proj", "v_proj"])
    tap = assert_equals_the_model(model)
    assert not tap(model, input_ids=IDS).side(ROWS).weight.requires_grad


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"], ids=["plain", "bias", "soft cap"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_lora_on_the_head_is_exact(family: str, options: dict[str, Any]) -> None:
    model = lora(build(family, tie_word_embeddings=False), ["q_proj", "lm_head"], **options)
    assert_equals_the_model(model)
    assert any("lm_head" in name and p.grad.abs().max() > 0 for name, p in model.named_parameters() if p.grad is not None)


def test_two_adapters_on_the_head_are_exact() -> None:
    model = lora(build("llama"), ["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_equals_the_model(model)


def test_dropout_of_an_adapter_on_the_head_is_applied() -> None:
    model = lora(build("llama"), ["lm_head"], lora_dropout=0.5).train()
    tap = HeadTap(model)
    tap(model, input_ids=IDS)
    torch.manual_seed(3)
    loss = tap(model, lambda tapped: loss_of(tapped.side().hidden.flatten(0, 1)[ROWS] @ tapped.side().weight.T), input_ids=IDS)
    torch.manual_seed(3)
    side = tap(model, input_ids=IDS).side()
    torch.manual_seed(3)
    logits = model(input_ids=IDS).logits  # one dropout mask for [B, L], drawn at the same point
    torch.testing.assert_close(side.hidden @ side.weight.T, logits)
    assert loss.isfinite()


def test_disabled_and_merged_adapters_are_exact() -> None:
    model = lora(build("llama"), ["lm_head"])
    tap = HeadTap(model)
    tap(model, input_ids=IDS)
    with model.disable_adapter():
        side = tap(model, input_ids=IDS).side()
        torch.testing.assert_close(side.hidden @ side.weight.T, model(input_ids=IDS).logits)
    expected = model(input_ids=IDS).logits
    model.merge_adapter()
    side = tap(model, input_ids=IDS).side()
    torch.testing.assert_close(side.hidden @ side.weight.T, expected, rtol=1e-4, atol=1e-4)


def test_dora_on_the_head_falls_back() -> None:
    model = lora(build("llama"), ["q_proj", "lm_head"], use_dora=True)
    assert_falls_back(model, "adapter 'default' of its head is DoraLinearVariant and not plain LoRA")
    assert any("lora_magnitude_vector" in name and p.grad.abs().max() > 0 for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "and not LoRA"),
        (peft.LoHaConfig(r=3, target_modules=["lm_head"], init_weights=False), "and not LoRA"),
        (peft.LoraConfig(trainable_token_indices={"lm_head": [3, 7]}), "its head is a TrainableTokensWrapper"),
    ],
    ids=["ia3", "loha", "trainable tokens"],
)
def test_other_adapters_on_the_head_fall_back(config: Any, reason: str) -> None:
    assert_falls_back(peft.get_peft_model(build("llama"), config), reason)


def test_parametrized_head_is_exact() -> None:
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert_equals_the_model(model)


# Quantised heads


class Quantised(nn.Linear):
    """A linear layer with int8 weights and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def test_quantised_head_falls_back() -> None:
    model = build("llama")
    model.lm_head = Quantised(model.lm_head)
    assert_falls_back(model, r"its head is quantised \(torch.int8\)")


def test_head_whose_forward_dequantises_falls_back() -> None:
    model = build("llama")
    head = model.lm_head
    head.weight = nn.Parameter((head.weight * 16).round().to(torch.int8), requires_grad=False)
    head.forward = lambda x: nn.functional.linear(x, head.weight / 16)
    assert_falls_back(model, r"its head is quantised \(torch.int8\)")


class Packed(torch.Tensor):
    """A tensor subclass whose linear layer computes something else, like torchao's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0], args[1] * 0.5)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weight_of_another_kind_falls_back() -> None:
    model = build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed), requires_grad=False)
    assert_falls_back(model, "its head's weight is a Packed and not a plain tensor")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_4_bit_head_falls_back(storage: torch.dtype) -> None:
    """Run only where bitsandbytes is installed. It is not in the test environment."""
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama", hidden_size=64)
    linear = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32, quant_storage=storage)
    linear.weight = bnb.nn.Params4bit(model.lm_head.weight.detach(), requires_grad=False, quant_type="nf4", quant_storage=storage)
    model.lm_head = linear.to("cpu")
    model.train()  # in eval mode it has no gradients
    reason = r"its head is quantised \(torch.uint8\)" if storage == torch.uint8 else "its head is a Linear4bit"
    assert_falls_back(model, reason)
    assert_falls_back(lora(model, ["q_proj", "lm_head"]), reason)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_logit_columns_of_packed_weights(storage: torch.dtype) -> None:
    model = build("llama")
    columns = model(input_ids=IDS).logits.shape[-1]
    assert logit_columns(model) == columns
    model.lm_head.weight = nn.Parameter(torch.empty(columns * model.config.hidden_size // 2, 1, dtype=storage), requires_grad=False)
    assert logit_columns(model) == columns
    assert logit_columns(lora(model, ["q_proj"])) == columns


def test_logit_columns_come_from_weights_and_not_from_stale_attributes() -> None:
    """Libraries that tie or resize weights may replace only the weight. PEFT makes a tied head as nn.Linear(*embeddings.shape)."""
    model = build("llama")
    columns, width = model.lm_head.weight.shape
    embeddings = model.get_input_embeddings().weight
    model.lm_head = nn.Linear(*embeddings.shape, bias=False)
    model.lm_head.weight = embeddings
    assert logit_columns(model) == columns == model(input_ids=IDS).logits.shape[-1]
    assert_equals_the_model(model)
    longer = nn.Parameter(torch.randn(columns + 5, width) * 0.02)
    model.lm_head.weight = model.model.embed_tokens.weight = longer
    assert logit_columns(model) == embedding_rows(model) == columns + 5
    as_int8 = nn.Parameter(torch.zeros(columns, width, dtype=torch.int8), requires_grad=False)  # one number for each element
    model.lm_head.weight, model.lm_head.in_features, model.lm_head.out_features = as_int8, width, columns
    assert logit_columns(model) == columns
    model.lm_head.weight = nn.Parameter(
        torch.zeros(columns, width // 2, dtype=torch.uint8), requires_grad=False
    )  # two numbers in each element
    assert logit_columns(model) == columns
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(columns * width // 2, 1, dtype=torch.bfloat16), requires_grad=False)
    assert embedding_rows(model) is None


def test_head_width_of_packed_weights() -> None:
    model = build("llama")
    columns, width = model.lm_head.weight.shape
    assert head_width(model) == width
    for shape, dtype in (
        ((columns * width // 2, 1), torch.uint8),
        ((columns, width // 2), torch.uint8),
        ((width // 8, columns), torch.int32),
    ):
        model.lm_head.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        assert (head_width(model), logit_columns(model)) == (width, columns)
    assert head_width(lora(model, ["q_proj"])) == width
    del model.lm_head.weight  # as if a library stored the weight under another name
    assert head_width(model) == width
    del model.lm_head.in_features
    assert head_width(model) == width == model.config.hidden_size


def test_head_width_comes_from_weights_and_not_from_stale_attributes() -> None:
    model = build("llama")
    columns, width = model.lm_head.weight.shape
    embeddings = model.get_input_embeddings().weight
    model.lm_head = nn.Linear(*embeddings.shape, bias=False)
    model.lm_head.weight = embeddings
    assert model.lm_head.in_features == columns
    assert head_width(model) == width
    model.lm_head.weight = nn.Parameter(torch.zeros(columns, width + 8), requires_grad=False)
    assert head_width(model) == width + 8


def test_adapter_added_after_the_tap_falls_back() -> None:
    base = build("llama")
    tap = HeadTap(base)
    tap(base, input_ids=IDS)
    model = lora(base, ["lm_head"], use_dora=True)
    with pytest.warns(UserWarning, match="not plain LoRA"):
        side = tap(model, input_ids=IDS).side(ROWS)
    torch.testing.assert_close(side, model(input_ids=IDS).logits.flatten(0, 1)[ROWS])


def test_modules_to_save_are_trained_and_exact() -> None:
    model = lora(build("llama"), ["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    assert_equals_the_model(model)
    assert HeadTap(model)(model, input_ids=IDS).side(ROWS).weight.requires_grad


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompt_tuning_raises(kind: str) -> None:
    model = peft.get_peft_model(build("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=f"{kind} prepends virtual tokens"):
        HeadTap(model)
