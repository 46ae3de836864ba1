"""Tiny random models of every causal family that transformers knows, and what the head tap makes of them.

``python tests/families.py --write`` draws docs/families.md from all of them; names after it limit a run to those families.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, HIDDEN = 96, 32

# What a field of a config becomes, by its name. What is not here keeps its default.
SMALL: dict[str, Any] = {}
for _names, _value in (
    ("vocab_size vocab_size_per_layer_input audio_vocab_size codebook_size", VOCAB),
    ("hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim input_embedding_size output_embedding_size", HIDDEN),
    ("backbone_hidden_size embed_dim hidden_size_global", HIDDEN),
    ("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner dff dim_ff ffn_hidden_size feed_forward_size", 64),
    ("dense_intermediate_size intermediate_size_mlp", 64),
    ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size router_hidden_size", 32),
    ("moe_shared_expert_intermediate_size shared_experts_intermediate_size", 32),
    (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers depth num_blocks",
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
    ("state_size mamba_d_state ssm_state_size indexer_compress_ratio", 8),
    ("encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size shape_embed_dim pronunciation_embed_dim", 64),
):
    SMALL.update(dict.fromkeys(_names.split(), _value))

_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
# Where a family has rules of its own, and where a default of 1.0 would hide that its logits are scaled.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "logit_scale": 0.25,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma3": {"text_config": {"final_logit_softcapping": 20.0}},
    "gemma3_text": {"final_logit_softcapping": 20.0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "granitemoehybrid": {"logits_scaling": 3.0, "mamba_n_heads": 4, **_MIXED},
    "hyperclovax": {"logits_scaling": 0.7},
    "inkling_text": {"unpadded_vocab_size": 90},
    "inkling2_text": {"unpadded_vocab_size": 90},
    "inkling2_loop_text": {"unpadded_vocab_size": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mpt": {"logit_scale": 3.0},  # which the model ignores
    "qwen3_5": {"text_config": _MIXED},
    "qwen3_5_moe": {"text_config": _MIXED},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp": {"text_config": _MIXED},
    "qwen4_exp_text": _MIXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 64, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def shrink(kind: type[PretrainedConfig], **given: Any) -> PretrainedConfig:
    """A config of this kind, nested ones included, whose model is small enough to build in a moment."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    small: dict[str, Any] = {}
    for name, nested in kind.sub_configs.items():
        if nested is AutoConfig:  # of the kind that it has by default
            nested = type(getattr(kind(), name, None))
        if issubclass(nested, PretrainedConfig):
            small[name] = shrink(nested, **given.pop(name, {}))
    for name, value in SMALL.items():
        if name in fields or name in kind.attribute_map:
            default = fields[name].default if name in fields else value
            small[name] = [value] if isinstance(default, list | tuple) else value
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
        small[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}[name]
    if "kv_lora_rank" in fields:  # latent attention has no groups
        small["num_key_value_heads"] = small["num_attention_heads"]
    return kind(**{**small, **given})


def build(family: str, dtype: torch.dtype = torch.float32, **given: Any) -> nn.Module:
    """A random model of the family, in evaluation mode, with logits of a size at which a soft cap can be felt."""
    config = shrink(CONFIG_MAPPING[family], **{**SPECIAL.get(family, {}), **given})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    head = model.get_output_embeddings()
    if head is not None and isinstance(getattr(head, "weight", None), torch.Tensor):
        with torch.no_grad():
            head.weight.normal_(std=0.5)
            if getattr(head, "bias", None) is not None:
                head.bias.normal_()
    return model
