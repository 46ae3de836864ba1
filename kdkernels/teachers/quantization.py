"""Quantise weights to 8 or 4 bits while a model is loaded: with bitsandbytes on a GPU, with torchao on any device."""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["QUANTIZATIONS", "check_quantization", "quantization_config"]

QUANTIZATIONS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
"""The package of each quantisation."""
GROUP = 32
"""Number of int4 weights that share a scale."""


def check_quantization(option: str, name: str) -> None:
    """Check the value of ``option``.

    Raises:
        ValueError: the name is unknown, or the quantisation cannot run on this machine.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"{option} {name}: choose one of {', '.join(QUANTIZATIONS)}")
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{option} {name} needs {package}: pip install {package}")
    if package == "bitsandbytes":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{option} {name} needs a CUDA GPU, and torch sees none here: take int8 or int4, which also run on a CPU")


def quantization_config(name: str) -> Any:
    """Return the ``quantization_config`` for ``from_pretrained``. The head is not quantised.

    ``int4`` values have 4 bits and one scale for each group of 32, but each value takes a byte, as in ``int8``.
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
