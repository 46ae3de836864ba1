"""The table in docs/integrations.md equals the committed results."""

from __future__ import annotations

from benchmarks import integrations


def test_integrations_page_shows_the_committed_results() -> None:
    text = integrations.PAGE.read_text(encoding="utf-8")
    assert integrations.page(text) == text
    for name in integrations.CASES:
        assert f"| {integrations.CASES[name][0]} (" in text
