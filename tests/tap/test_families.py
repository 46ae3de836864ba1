"""The head tap on model families: loss and gradients against those from the model's own logits."""

from __future__ import annotations

import pytest
import transformers

pytest.importorskip("peft")  # of the extras, as transformers is

from families import FAMILIES, PAGE, Finding, examine

# Of every kind of head and body one or two: plain, tied, with bias, scaled, soft-capped, cut off, mixtures, recurrent, decoys, custom.
USUAL = (
    "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "dory", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_neox", "gpt_oss", "gptj", "granite", "inkling_text", "llama", "llama4_text", "mamba", "minicpm3", "mistral", "mixtral", "mpt",
    "olmo2", "opt", "phi", "phi3", "prophetnet", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "stablelm", "starcoder2", "xlstm",
)  # fmt: skip

# Both sides start from the same hidden states in float32 and differ in the order of their sums; a scale, a soft cap or a bias that is
# left out changes the loss of these models by percents.
TOLERANCE = 1e-5


def assert_exact(finding: Finding) -> None:
    print(f"loss {finding.loss_error:.1e}, gradients {finding.gradient_error:.1e}")
    assert finding.loss_error <= TOLERANCE
    assert finding.gradient_error <= TOLERANCE


@pytest.mark.parametrize("family", USUAL)
def test_tapped_side_is_the_model(family: str) -> None:
    finding = examine(family)
    assert_exact(finding)
    assert finding.line in PAGE.read_text(), "docs/families.md is stale: python tests/support/families.py"


def test_page_lists_every_family() -> None:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}:" not in text:
        pytest.skip("docs/families.md was made with another version of transformers")
    assert [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")][2:] == list(FAMILIES)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    finding = examine(family)
    assert_exact(finding)
    assert finding.line in PAGE.read_text(), "docs/families.md is stale: python tests/support/families.py"
