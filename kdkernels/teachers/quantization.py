"""Weights in 8 or 4 bits while a model is loaded, by bitsandbytes on a GPU or by torchao anywhere."""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["QUANTIZATIONS", "check_quantization", "quantization_config"]

QUANTIZATIONS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
"""Names, and the package that each needs."""
GROUP = 32
"""Weights with a scale of their own, of int4."""


def check_quantization(option: str, name: str) -> None:
    """
    Raises:
        ValueError: an unknown name, or a quantisation that this machine lacks; the message names ``option``.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"{option} {name}: choose one of {', '.join(QUANTIZATIONS)}")
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{option} {name} needs {package}: pip install {package}")
    if package == "bitsandbytes":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{option} {name} needs a CUDA GPU, and torch sees none here: take int8 or int4, which run on a CPU too")


def quantization_config(name: str) -> Any:
    """Return the ``quantization_config`` for ``from_pretrained``. The head is not quantised.

    ``int4`` has values of 4 bits with a scale for each 32 of them. They are held in a byte each, as those of ``int8``.
    """
    import torch

    if QUANTIZATIONS[name] == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        if name == "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    int4: Any = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP)))
