"""Options for querying a text model, shared by all commands that do so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..teachers.http import HTTPModel
    from ..teachers.local import LocalModel

__all__ = ["Asking", "Server"]

PANEL = "Requests"
"""Heading of these options in the help."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Options for requests to a server."""

    concurrency: Annotated[int, typer.Option(rich_help_panel=PANEL, help="With --base-url: maximum number of parallel requests.")] = 64
    timeout: Annotated[float, typer.Option(rich_help_panel=PANEL, help="With --base-url: time limit of a request in seconds.")] = 60.0
    retries: Annotated[
        int,
        typer.Option(
            rich_help_panel=PANEL, help="With --base-url: retries of a request after a server error, a time-out or an incomplete answer."
        ),
    ] = 8
    price: Annotated[
        str,
        typer.Option(
            rich_help_panel=PANEL,
            help="With --base-url: prices of a million prompt tokens and a million completion tokens, such as 0.5,1.5, to show the cost.",
        ),
    ] = "0,0"
    key_variable: Annotated[
        str, typer.Option(rich_help_panel=PANEL, help="With --base-url: environment variable that holds the API key.")
    ] = "OPENAI_API_KEY"

    def http(self, base_url: str, model: str, **options: Any) -> HTTPModel:
        """Return the server's model.

        Raises:
            ValueError: an invalid option.
        """
        from ..teachers.http import HTTPModel

        try:
            prompt, completion = (float(price) for price in self.price.split(","))
        except ValueError:
            raise ValueError(f"--price {self.price}: expected two numbers, such as 0.5,1.5") from None
        return HTTPModel(
            base_url, model, key_variable=self.key_variable, concurrency=self.concurrency, timeout=self.timeout, retries=self.retries,
            prices=(prompt, completion), **options,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asking(Server):
    """Options for text generation by a server or in this process."""

    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused", rich_help_panel=PANEL, help="With --base-url: skip rows that the server refuses, and report their number."
        ),
    ] = False
    batch_size: Annotated[int, typer.Option(rich_help_panel=PANEL, help="Without --base-url: rows per batch.")] = 8
    device: Annotated[str, typer.Option(rich_help_panel=PANEL, help="Without --base-url: auto, cpu, cuda or cuda:N.")] = "auto"

    def http(self, base_url: str, model: str, **options: Any) -> HTTPModel:
        return super().http(base_url, model, skip_refused=self.skip_refused, **options)

    def local(self, model: str, seed: int) -> LocalModel:
        """Return a model from a folder or hub id, run in this process."""
        from ..teachers.jobs import device_of
        from ..teachers.local import LocalModel

        return LocalModel(model, device=device_of(self.device), batch_size=self.batch_size, seed=seed)
