"""The commands ``kdkernels cache`` and ``kdkernels generate``. Their implementation is imported when they run."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..data.values import read_json
from ..support.terminal import Commands, console, failing, say
from .asking import Asking, Server
from .options import COLUMNS, grouped

__all__ = ["cache", "extend", "generate", "info", "register", "verify"]


class ReasoningChoice(str, Enum):
    learn = "learn"
    drop = "drop"


class LearnChoice(str, Enum):
    all = "all"
    last = "last"


class CacheKind(str, Enum):
    """Kinds of caches."""

    topk = "topk"
    sampled = "sampled"
    hidden = "hidden"
    text = "text"


class Api(str, Enum):
    """Interfaces of a server."""

    chat = "chat"
    completions = "completions"


CACHE_EXAMPLES = """
Examples:

- `kdkernels cache --teacher big-model --data train.jsonl --kind topk -k 64 --temperature 2 --out big-top64`

- `kdkernels cache --teacher big-model --data train.jsonl --data held-out.jsonl --kind hidden --out big-hidden` - exact for every divergence
and temperature, for training and evaluation

- `kdkernels cache --teacher served-name --base-url http://localhost:8000/v1 --tokenizer big-model --data train.jsonl -k 20 --out top20`

- `kdkernels cache --from-replies --tokenizer big-model --data answers.jsonl --out top20` - after `kdkernels generate --logprobs 20`

Run the same command again to continue an interrupted run. `kdkernels cache info DIR` describes a cache, `cache verify DIR` checks all its
files, and `cache extend DIR --teacher T --data more.jsonl` adds examples.
"""

EXTEND_EXAMPLES = "Example: `kdkernels cache extend big-top64 --teacher big-model --data more.jsonl`"

GENERATE_EXAMPLES = """
Examples:

- `kdkernels generate --base-url http://localhost:8000/v1 --model big-model --data prompts.jsonl --out answers.jsonl`

- `kdkernels generate --base-url https://api.example.com/v1 --model big --key-variable MY_KEY --data p.jsonl --out a.jsonl --logprobs 20`

- `kdkernels generate --model ./big-model --data prompts.jsonl --out answers.jsonl` - in this process, without a server

Run the same command again to continue an interrupted run. Replies in the log, named like the output with `.log`, are not requested again.
"""


class CacheCommands(Commands):
    """``kdkernels cache`` with its subcommands. Without a subcommand, it creates a cache."""

    DEFAULT = "cache"

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        completing = context.resilient_parsing and not args
        if not completing and (not args or args[0] not in self.commands):
            args = [self.DEFAULT, *args]
        parsed: list[str] = super().parse_args(context, args)
        return parsed


class CreateCommand(TyperCommand):
    """The default command of ``kdkernels cache``. Help and errors name it as the group."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(parent.info_name, args, parent.parent, **extra)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    caches = typer.Typer(name="cache", cls=CacheCommands, help="Run a teacher over the data once, and save its outputs.")
    caches.command(CacheCommands.DEFAULT, cls=CreateCommand, epilog=CACHE_EXAMPLES, hidden=True)(grouped(cache))
    caches.command()(info)
    caches.command()(verify)
    caches.command(epilog=EXTEND_EXAMPLES)(extend)
    app.add_typer(caches)
    app.command(epilog=GENERATE_EXAMPLES)(grouped(generate))


def cache(
    server: Server,
    data: Annotated[
        list[str], typer.Option(help="Rows: files, folders or data sets of the hub, as for `kdkernels train`. Held in memory.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the cache: a new one, or that of an interrupted run.")],
    teacher: Annotated[str, typer.Option(help="Model: a folder or hub id; with --base-url the server's model name.")] = "",
    kind: Annotated[
        CacheKind,
        typer.Option(help="topk: likeliest tokens. sampled: drawn tokens. hidden: last hidden states. text: responses of the teacher."),
    ] = CacheKind.topk,
    k: Annotated[int, typer.Option("-k", "--k", help="topk: entries per token. sampled: draws per token.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="Temperature of topk, sampled (default 1) or text (default 0, greedy).")] = None,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the data. Default: the teacher's.")] = "",
    base_url: Annotated[str, typer.Option(help="Server for topk (vLLM's prompt_logprobs), such as http://localhost:8000/v1.")] = "",
    from_replies: Annotated[bool, typer.Option("--from-replies", help="Make a topk cache from the teacher_logprobs in the data.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of an example.")] = None,
    overlong: Annotated[str, typer.Option(help="Longer examples: error, drop, truncate or split, as in training.")] = "error",
    reasoning: Annotated[ReasoningChoice, typer.Option(help="Learn or drop a row's reasoning, as in training.")] = ReasoningChoice.learn,
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
    learn: Annotated[LearnChoice | None, typer.Option(help="Turns of a conversation to learn, as in training.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the teacher: auto (as saved), float32, bfloat16 or float16. Hidden states are stored in it.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="topk: dtype of the stored log-probabilities, float16 or float32.")] = "float16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    vocab_size: Annotated[int | None, typer.Option(help="Real vocabulary size, if the head is padded.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model of the hub.")] = None,
    seed: Annotated[int, typer.Option(help="sampled, text: random seed.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="text: maximum tokens of a response.")] = 256,
    shard_mib: Annotated[int, typer.Option(help="MiB of a shard before compression. A kill loses at most one shard.")] = 128,
) -> None:
    """Run a teacher over the data once, and save its outputs for any number of trainings.

    Writes a folder with `manifest.json` and shards with their sha256. Train on it with `kdkernels train --cache FOLDER`. If the command
    is interrupted, run it again: it continues, and the result has the same bytes as an uninterrupted run.
    """
    from ..teachers import jobs

    options = jobs.CacheOptions(
        data=data, out=out, teacher=teacher, kind=kind.value, k=k, temperature=temperature, tokenizer=tokenizer or teacher,
        max_length=max_length, overlong=overlong, reasoning=reasoning.value, columns=columns,
        learn=None if learn is None else learn.value, batch_size=batch_size, dtype=dtype, precision=precision,
        device=device, vocab_size=vocab_size, revision=revision, seed=seed, max_new_tokens=max_new_tokens, shard_bytes=shard_mib << 20,
    )  # fmt: skip
    if base_url or from_replies:
        if kind is not CacheKind.topk or temperature not in (None, 1.0):
            raise ValueError("--base-url and --from-replies give topk at temperature 1: leave out --kind and --temperature")
        model = server.http(base_url, teacher, api="completions") if base_url else None
        jobs.cache_of_server(options, model, console())
    else:
        jobs.cache_of_model(options, console())


CacheFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a cache.")]


def info(folder: CacheFolder, as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False) -> None:
    """Show teacher, tokenizer, kind, examples, tokens and shards of a cache. Reads only its manifest."""
    with failing():
        from ..teachers.cache.inspection import described

        about = described(folder)
        if as_json:
            typer.echo(json.dumps(about, indent=1))
            return
        width = max(map(len, about)) + 2
        for name, value in about.items():
            say(f"{name.replace('_', ' '):<{width}}{f'{value:,}' if type(value) is int else value}")


def verify(folder: CacheFolder) -> None:
    """Compare every file of a cache with its sha256. Lists damaged and missing files, and exits with status 1 if there are any."""
    with failing():
        from ..teachers.cache.inspection import damage

        problems = damage(folder)
        for line in problems:
            say(line)
        if problems:
            raise typer.Exit(1)
        say(f"{folder}: whole")


def extend(
    folder: CacheFolder,
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the model that the cache was made with. Its content is checked.")],
    data: Annotated[list[str], typer.Option(help="Rows: files, folders or data sets of the hub. Rows in the cache are skipped.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the data. Default: the teacher's.")] = "",
    overlong: Annotated[str, typer.Option(help="Examples over the cache's --max-length: error, drop or truncate.")] = "error",
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model of the hub.")] = None,
) -> None:
    """Add examples to a cache, with the cache's settings.

    Existing shards do not change. The cache stays valid if the command is interrupted; run it again to continue. Interrupted trainings
    from the cache can be continued too.
    """
    from ..teachers import jobs

    with failing():
        options = jobs.options_of(
            folder, teacher=teacher, data=data, tokenizer=tokenizer or teacher, overlong=overlong, columns=columns, batch_size=batch_size,
            device=device, revision=revision,
        )  # fmt: skip
        jobs.cache_of_model(options, console(), extend=True)


def generate(
    asking: Asking,
    model: Annotated[
        str, typer.Option(help="Folder or hub id of a model to run in this process; with --base-url the server's model name.")
    ],
    data: Annotated[str, typer.Option(help="Rows with prompt or messages: a file, a folder, or a data set of the hub.")],
    out: Annotated[Path, typer.Option(help="JSONL file of training rows, written when all rows are answered.")],
    base_url: Annotated[str, typer.Option(help="URL of an OpenAI-compatible server, such as http://localhost:8000/v1.")] = "",
    api: Annotated[Api, typer.Option(help="chat applies the model's chat template; completions sends the prompt unchanged.")] = Api.chat,
    logprobs: Annotated[int, typer.Option(help="Number of likeliest tokens to save at each position; 0 for none.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a response.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response. May be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    extra_body: Annotated[str, typer.Option(help="JSON object with further fields of a request.")] = "{}",
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
) -> None:
    """Generate responses with a teacher, on an OpenAI-compatible server or in this process.

    Each reply is logged at once, so that an interrupted run requests, and pays for, no reply twice. The API key is read from the
    environment and is never written.
    """
    from ..data.rows import check_fits
    from ..teachers import jobs

    check_fits(data)
    teacher: Any
    if base_url:
        try:
            extra = read_json(extra_body)
        except ValueError as error:
            raise ValueError(f"--extra-body {extra_body}: a JSON object is needed ({error})") from None
        if not isinstance(extra, dict):
            raise ValueError(f"--extra-body {extra_body}: a JSON object is needed")
        teacher = asking.http(base_url, model, api=api.value, seed=seed, extra_body=extra)
    else:
        from transformers import AutoConfig

        from ..teachers.loading import load

        load(AutoConfig, "model", model)  # raises an error that names the option
        teacher = asking.local(model, seed or 0)
    jobs.generate(teacher, data, out, console(), max_tokens, temperature, tuple(stop or ()), logprobs, columns)
