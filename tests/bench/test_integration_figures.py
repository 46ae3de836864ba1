"""The table in docs/integrations.md matches its results."""

from __future__ import annotations

from benchmarks import integrations


def test_the_page_shows_the_committed_figures() -> None:
    text = integrations.PAGE.read_text(encoding="utf-8")
    assert integrations.page(text) == text
    for name in integrations.CASES:
        assert f"| {integrations.CASES[name][0]} (" in text
