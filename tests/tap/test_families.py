"""The head tap on model families: loss and gradients equal those from the model's logits."""

from __future__ import annotations

import pytest
import transformers

pytest.importorskip("peft")  # part of the extra [train]

from families import FAMILIES, PAGE, Finding, examine

# One or two families for each kind of head and body: plain, tied, with bias, scaled, soft-capped, cut, mixture, recurrent.
SELECTED = (
    "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "dory", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_neox", "gpt_oss", "gptj", "granite", "inkling_text", "llama", "llama4_text", "mamba", "minicpm3", "mistral", "mixtral", "mpt",
    "olmo2", "opt", "phi", "phi3", "prophetnet", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "stablelm", "starcoder2", "xlstm",
)  # fmt: skip

# Both losses use the same float32 hidden states and differ in the order of sums. A missing scale, soft cap or bias would change the loss
# of these models by percents.
TOLERANCE = 1e-5


def assert_exact(finding: Finding) -> None:
    print(f"loss {finding.loss_error:.1e}, gradients {finding.gradient_error:.1e}")
    assert finding.loss_error <= TOLERANCE
    assert finding.gradient_error <= TOLERANCE


@pytest.mark.parametrize("family", SELECTED)
def test_tap_of_selected_families_equals_the_logits(family: str) -> None:
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
def test_tap_of_every_family_equals_the_logits(family: str) -> None:
    finding = examine(family)
    assert_exact(finding)
    assert finding.line in PAGE.read_text(), "docs/families.md is stale: python tests/support/families.py"
