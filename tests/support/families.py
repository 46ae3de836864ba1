"""Tiny random models of every causal family in transformers, and a comparison of the head tap with their logits.

``python tests/support/families.py`` examines all families and writes docs/families.md.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kdkernels as kd
from kdkernels.tap.head import HeadTap
from kdkernels.tap.layers import LayerRecorder, decoder_layers

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, HIDDEN = 96, 32

# Values of config fields by name. Other fields keep their defaults.
SMALL: dict[str, Any] = {}
for _names, _value in (
    ("vocab_size vocab_size_per_layer_input audio_vocab_size", VOCAB),
    ("hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim input_embedding_size output_embedding_size", HIDDEN),
    ("backbone_hidden_size embed_dim hidden_size_global", HIDDEN),
    ("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner dff dim_ff ffn_hidden_size feed_forward_size", 64),
    ("dense_intermediate_size intermediate_size_mlp", 64),
    ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size router_hidden_size", 32),
    ("moe_shared_expert_intermediate_size shared_experts_intermediate_size", 32),
    (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers num_blocks",
        2,
    ),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads", 4),
    ("num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads", 4),
    ("num_key_value_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads index_n_heads indexer_n_heads", 2),
    (
        "head_dim swa_head_dim kv_channels dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim",
        8,
    ),
    ("linear_head_dim index_head_dim indexer_head_dim rotary_dim attention_head_size global_head_dim indexer_budget", 8),
    ("q_lora_rank kv_lora_rank o_lora_rank", 16),
    ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
    ("num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts", 2),
    ("n_group topk_group num_shared_experts n_shared_experts n_groups mamba_n_groups indexer_kv_heads", 1),
    ("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length", 64),
    ("depth mamba_n_heads", 2),
    ("state_size mamba_chunk_size chunk_size mamba_d_state ssm_state_size indexer_compress_ratio", 8),
    ("encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size shape_embed_dim pronunciation_embed_dim", 64),
):
    SMALL.update(dict.fromkeys(_names.split(), _value))

_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
# Fields that some families need, and scales of logits whose default is 1.0.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "logit_scale": 0.25,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma3": {"text_config": {"final_logit_softcapping": 20.0}},
    "gemma3_text": {"final_logit_softcapping": 20.0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "granitemoehybrid": {"logits_scaling": 3.0, **_MIXED},
    "hyperclovax": {"logits_scaling": 0.7},
    "inkling_text": {"unpadded_vocab_size": 90},
    "inkling2_text": {"unpadded_vocab_size": 90},
    "inkling2_loop_text": {"unpadded_vocab_size": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mpt": {"logit_scale": 3.0},  # the model ignores it
    "qwen3_5": {"text_config": _MIXED},
    "qwen3_5_moe": {"text_config": _MIXED},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp": {"text_config": _MIXED},
    "qwen4_exp_text": _MIXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"hidden_size": 64, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


NOT_RUN = {
    "gemma3n": "needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "reads the states of another model",
    "gemma4_unified_assistant": "reads the states of another model",
    "musicgen": "generates codes of audio",
    "musicgen_melody": "generates codes of audio",
}


def shrink(kind: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """Return a config of this class, with nested configs, for a very small model."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    small: dict[str, Any] = {}
    for name, nested in kind.sub_configs.items():
        if nested is AutoConfig:  # use the default's class
            nested = type(getattr(kind(), name, None))
        if issubclass(nested, PretrainedConfig):
            small[name] = shrink(nested, **overrides.pop(name, {}))
    for name, value in SMALL.items():
        if name in fields or name in kind.attribute_map:
            default = fields[name].default if name in fields else value
            small[name] = [value] if isinstance(default, list | tuple) else value
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
        small[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}[name]
    if "kv_lora_rank" in fields:  # latent attention has as many key-value heads as heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    return kind(**{**small, **overrides})


def build(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """Return a random model of the family in evaluation mode, whose logits are large enough for a soft cap to matter."""
    config = shrink(CONFIG_MAPPING[family], **{**SPECIAL.get(family, {}), **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    head = model.get_output_embeddings()
    if head is not None and isinstance(getattr(head, "weight", None), torch.Tensor):
        with torch.no_grad():
            head.weight.normal_(std=0.5)
            if getattr(head, "bias", None) is not None:
                head.bias.normal_()
    return model


@dataclass(frozen=True)
class Finding:
    """A row of docs/families.md."""

    family: str
    way: str  # "tap" | "dense" | "not run"
    scale: float = 1.0
    softcap: float | None = None
    cut: int = 0  # columns of the head beyond the logits
    bias: bool = False
    tied: bool = False
    features: bool = False
    note: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0

    @property
    def line(self) -> str:
        cells = (
            self.family,
            self.way,
            "" if self.scale == 1 else f"{self.scale:.4g}",
            "" if self.softcap is None else f"{self.softcap:g}",
            str(self.cut or ""),
            "yes" if self.bias else "",
            "yes" if self.tied else "",
            "yes" if self.features else "",
            self.note,
        )
        return "| " + " | ".join(cells) + " |"


def examine(family: str) -> Finding:
    """Build a model of the family. Compare loss and gradients of its tapped side with those of its dense logits."""
    try:
        model = build(family)
        ids = torch.randint(4, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
        tap = HeadTap(model)
        options = {key: False for key in tap.fixed if key == "use_cache"}
        with torch.no_grad():
            model(input_ids=ids, **options)
    except Exception as error:
        reason = NOT_RUN.get(family)
        if reason is None:
            raise
        return Finding(family, "not run", note=f"{reason} ({type(error).__name__})")
    if family == "reformer":
        model.train()  # it has no backward in evaluation mode
    rows = torch.tensor([1, 4, 5, 12, 14])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tapped = tap(model, input_ids=ids)
    teacher = 3 * torch.randn(len(rows), tap.columns or 0, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "labels": ids.flatten()[rows + 1], "backend": "torch"}

    def gradients(side: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = kd.distillation_loss(side, teacher, **settings)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradient = gradients(tapped.side(rows))
    expected_loss, expected = gradients(model(input_ids=ids, **options).logits.flatten(0, 1)[rows])
    assert gradient.keys() == expected.keys(), gradient.keys() ^ expected.keys()
    head = model.get_output_embeddings()
    largest = max(g.abs().max().item() for g in expected.values())
    return Finding(
        family,
        "tap" if tap.fallback_reason is None else "dense",
        tap.transform.scale,
        tap.transform.softcap,
        cut=0 if head is None or tap.columns is None else getattr(head, "weight", torch.empty(tap.columns)).shape[0] - tap.columns,
        bias=getattr(head, "bias", None) is not None,
        tied=head is not None and getattr(head, "weight", None) is getattr(model.get_input_embeddings(), "weight", 0),
        features=_features_work(model, ids, options),
        note="" if tap.fallback_reason is None else f"because {tap.fallback_reason}",
        loss_error=abs(loss.item() / expected_loss.item() - 1),
        gradient_error=max((gradient[name] - g).abs().max().item() for name, g in expected.items()) / largest,
    )


def _features_work(model: nn.Module, ids: torch.Tensor, options: dict[str, Any]) -> bool:
    try:
        layers = decoder_layers(model)
        recorder = LayerRecorder(model, range(len(layers)))
        with torch.no_grad(), recorder.recording(ids) as features:
            model(input_ids=ids, **options)
    except ValueError:
        return False
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return features.keys() == recorder.layers.keys() and all(f.shape[-1] == width for f in features.values())


HEADER = """# Model families

Check that your model family works without logits. The table has every causal family of transformers {version}: a small random model is
built, and the loss and all gradients with the tap are compared with those from the model's dense logits. `pytest -m sweep` repeats the
comparison, and `python tests/support/families.py` writes this page.

- **tap**: the loss gets hidden states and head; the logits never exist.
- **dense**: the head is not a plain linear layer, so the model's dense logits are used, with one warning giving the reason.
- **not run**: such a model could not be built, or does not run on token ids alone.
- Scale, soft cap and cut columns are measured on the model, with the values of the config in the test. An empty cell means none.
- Features: "yes" if the outputs of the decoder layers are `[batch, length, width]`, so `feature_layers` works.

{count}

| family | way | scale | soft cap | cut columns | bias | tied | features | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(findings: Iterable[Finding]) -> str:
    findings = list(findings)
    ways = {way: sum(f.way == way for f in findings) for way in ("tap", "dense", "not run")}
    count = f"{len(findings)} families: " + ", ".join(f"{n} {way}" for way, n in ways.items()) + "."
    lines = [f.line for f in findings]
    return HEADER.format(version=transformers.__version__, count=count) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    findings = []
    for name in sys.argv[1:] or FAMILIES:
        start = time.perf_counter()
        try:
            findings.append(examine(name))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        print(
            f"{findings[-1].line} {findings[-1].loss_error:.1e} {findings[-1].gradient_error:.1e} {time.perf_counter() - start:.2f} s",
            flush=True,
        )
    if not sys.argv[1:]:
        PAGE.write_text(page(findings))
