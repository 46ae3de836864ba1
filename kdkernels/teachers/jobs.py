"""Run ``kdkernels cache`` and ``kdkernels generate``: read data, run the teacher, write files."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from ..data.agreement import check_ids
from ..data.collator import Collator
from ..data.ending import ended
from ..data.example import Example
from ..data.forms import Learn, Reasoning
from ..data.layouts import training_rows
from ..data.rows import Row, check_fits
from ..data.tokenization import length_limit, load_examples
from ..support.files import Output
from ..support.terminal import progress, shown
from ..tap.weights import embedding_rows, head_width, logit_columns
from .cache.api import from_replies, score, silent_positions, write_topk
from .cache.extend import extend_cache, extendable
from .cache.manifest import Identity, Kind, cached_date, cached_learn, identity_of_model, identity_of_tokenizer
from .cache.text import ROWS_PER_SHARD, write_text_cache
from .cache.writer import Plan, bytes_per_token, check_folder, write_cache
from .generate import requests_of, with_reply
from .http import HTTPModel, Refused
from .loading import load
from .progress import Watched, print_usage, watching
from .replies import is_unmarked_log
from .text import REFUSED, Counted, Reply, Request

__all__ = ["CacheOptions", "cache_of_model", "cache_of_server", "device_of", "generate", "options_of"]

LEFT_OUT = ".left-out.jsonl"
"""Suffix of the file that lists the rows that were left out."""


@dataclass(frozen=True)
class CacheOptions:
    """Options of ``kdkernels cache``; its help describes them."""

    data: Sequence[str]
    out: Path
    teacher: str
    kind: Kind
    k: int
    temperature: float | None
    tokenizer: str
    max_length: int | None
    overlong: str
    columns: str | None
    learn: Learn | None
    reasoning: Reasoning
    batch_size: int
    dtype: str
    precision: str
    device: str
    vocab_size: int | None
    revision: str | None
    seed: int
    max_new_tokens: int
    shard_bytes: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1 or self.shard_bytes < 1 or self.max_new_tokens < 1:
            raise ValueError("-k, --batch-size, --shard-mib and --max-new-tokens must be >= 1")
        if self.kind == "sampled" and self.k > 65535:
            raise ValueError(f"-k {self.k}: a token can have at most 65535 draws")
        if self.temperature is not None and not (0 < self.temperature < float("inf") or (self.kind == "text" and self.temperature == 0)):
            raise ValueError(f"--temperature {self.temperature}: it must be finite and > 0 (0 only for text)")
        if self.kind == "hidden" and self.temperature is not None:
            raise ValueError("--temperature means nothing for kind=hidden, which is exact at every temperature: leave it out")
        if self.precision not in ("float16", "float32"):
            raise ValueError(f"--precision {self.precision}: float16 or float32")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype}: auto, float32, bfloat16 or float16")
        if not self.tokenizer:
            raise ValueError("--teacher is missing (or, with --base-url or --from-replies, --tokenizer)")


def device_of(name: str) -> str:
    """Return the device of ``--device``; for "auto" the GPU if torch sees one.

    Raises:
        ValueError: torch cannot use the device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name}: torch can't use it here ({str(error).splitlines()[0][:200]}): give auto, cpu, cuda or cuda:N"
        ) from None
    return name


def options_of(folder: Path, **options: Any) -> CacheOptions:
    """Return the options that the cache in ``folder`` was made with, updated with ``options``.

    Raises:
        CacheError: see ``extendable``.
    """
    manifest = extendable(folder)
    identity = manifest.identity
    names = {field.name for field in dataclasses.fields(CacheOptions)}
    return CacheOptions(**{
        "out": folder, "kind": identity.kind, "k": identity.k or 1, "temperature": identity.temperature, "max_length": None,
        "reasoning": "learn", "learn": None, "dtype": identity.teacher_dtype,
        "precision": identity.dtype if identity.kind == "topk" else "float16",
        "vocab_size": identity.vocab_size, "seed": identity.seed or 0, "max_new_tokens": 1, "shard_bytes": manifest.shard_bytes,
        **{name: value for name, value in manifest.options.items() if name in names}, **options,
    })  # fmt: skip


def cache_of_model(options: CacheOptions, console: Console, extend: bool = False) -> None:
    """Make a cache of a model that runs in this process, or ``extend`` an existing one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .live import LiveTeacher

    o = options
    check_folder(o.out)
    check_fits(o.data)
    of_teacher = o.tokenizer == o.teacher
    tokenizer = load(AutoTokenizer, "teacher" if of_teacher else "tokenizer", o.tokenizer, revision=o.revision if of_teacher else None)
    limit = length_limit(o.max_length, [load(AutoConfig, "teacher", o.teacher, revision=o.revision).get_text_config()])
    examples = _examples(o, tokenizer, limit) if o.kind != "text" else []  # before loading the model, so that data errors come early
    model = load(AutoModelForCausalLM, "teacher", o.teacher, dtype=o.dtype, revision=o.revision).to(device_of(o.device)).eval()
    check_ids(examples, tokenizer, embedding_rows(model))
    name, revision = identity_of_model(o.teacher, getattr(model.config, "_commit_hash", None) or o.revision)
    columns, hidden_size = logit_columns(model), head_width(model)
    if o.vocab_size is not None and o.vocab_size > columns:
        raise ValueError(f"--vocab-size {o.vocab_size}: the teacher's head has {columns} rows")
    vocab_size = o.vocab_size or columns
    if o.kind == "topk" and o.k > vocab_size:
        raise ValueError(f"-k {o.k}: the vocabulary has {vocab_size} tokens")
    ran_in = str(model.dtype).removeprefix("torch.")
    identity = Identity(
        teacher=name, revision=revision, teacher_dtype=ran_in, **identity_of_tokenizer(tokenizer),
        vocab_size=vocab_size, padded_vocab_size=columns, kind=o.kind,
        k=o.k if o.kind in ("topk", "sampled") else None,
        temperature=None if o.kind == "hidden" else (0.0 if o.kind == "text" else 1.0) if o.temperature is None else o.temperature,
        dtype={"topk": o.precision, "hidden": ran_in}.get(o.kind), seed=o.seed if o.kind in ("sampled", "text") else None,
        max_new_tokens=o.max_new_tokens if o.kind == "text" else None,
    )  # fmt: skip
    if o.kind == "text":
        _write_text(o, model, tokenizer, identity, console)
    else:
        head = columns * hidden_size * model.dtype.itemsize if o.kind == "hidden" and not extend else 0
        with progress(console, "tokens") as (start, advance, _):
            common: dict[str, Any] = {
                "hidden_size": hidden_size, "batch_size": o.batch_size, "collator": Collator(multiple=16, limit=limit),
                "device": model.device, "report": advance, "started": _announcing(console, o.out, identity, start, hidden_size, head),
            }  # fmt: skip
            source = LiveTeacher(model, vocab_size=vocab_size)
            if extend:
                extend_cache(source, examples, o.out, identity, **common)
            else:
                write_cache(
                    source, examples, o.out, identity, shard_bytes=o.shard_bytes,
                    options={"max_length": limit, "reasoning": o.reasoning, "learn": o.learn}, **common,
                )  # fmt: skip
    console.print(f"{o.out}: complete")


def _write_text(o: CacheOptions, model: Any, tokenizer: Any, identity: Identity, console: Console) -> None:
    """Write a cache of a model's responses."""
    rows = [row.fields for row in training_rows(o.data, o.columns)]
    with progress(console, "rows") as (start, advance, _):

        def announce(plan: Plan) -> None:
            console.print(f"text: {len(plan.source):,} rows of at most {o.max_new_tokens} tokens, about 4 bytes each")
            start(len(plan.source))

        write_text_cache(
            model, tokenizer, rows, o.out, identity,
            batch_size=o.batch_size, rows_per_shard=ROWS_PER_SHARD, started=announce, report=advance,
        )  # fmt: skip


def cache_of_server(options: CacheOptions, model: HTTPModel | None, console: Console) -> None:
    """Make a ``topk`` cache of a server's log-probabilities for the data's tokens; without ``model``, of those saved in the data."""
    from transformers import AutoTokenizer

    o = options
    check_folder(o.out)
    tokenizer = load(AutoTokenizer, "tokenizer", o.tokenizer)
    examples = _examples(o, tokenizer, o.max_length)
    if model is not None:
        with watching(model, console, "examples", len(examples)):
            tops = score(model, examples, o.k, o.out.with_name(o.out.name + ".log"))
        print_usage(console, model.usage)
    else:
        used = {example.where for example in examples}  # without rows that are too long
        rows = [row.fields for row in training_rows(o.data, o.columns) if row.where in used]
        tops, lost = from_replies(rows, examples, tokenizer)
        if lost:
            console.print(
                f"{lost:,} of {len(examples):,} responses are split into other tokens than the teacher's: they have no probabilities"
            )
        silent, ends = silent_positions(examples, tops, tokenizer)
        if silent:
            console.print(
                f"{silent:,} of {sum(len(top[0]) for top in tops):,} positions have no probabilities, {ends:,} of them ends of responses: "
                "distillation teaches nothing there, cross-entropy does (kdkernels train --ce-weight)"
                + (", which is how the student learns to end" if ends else "")
            )
    identity = Identity(
        teacher=o.teacher or "served", revision=o.revision or "", teacher_dtype="", **identity_of_tokenizer(tokenizer),
        vocab_size=o.vocab_size or len(tokenizer), padded_vocab_size=o.vocab_size or len(tokenizer),
        kind="topk", k=max(top[0].shape[1] for top in tops), temperature=1.0, dtype=o.precision,
    )  # fmt: skip
    with progress(console, "tokens") as (start, advance, _):
        write_topk(
            examples, tops, o.out, identity, shard_bytes=o.shard_bytes,
            options={"max_length": o.max_length, "reasoning": o.reasoning, "learn": o.learn}, report=advance,
            started=_announcing(console, o.out, identity, start),
        )  # fmt: skip
    console.print(f"{o.out}: complete")


def _examples(o: CacheOptions, tokenizer: Any, limit: int | None) -> list[Example]:
    return load_examples(
        o.data,
        tokenizer,
        max_length=limit,
        overlong=o.overlong,
        date=cached_date(o.out),
        reasoning=o.reasoning,
        columns=o.columns,
        learn=o.learn or cast("Learn | None", cached_learn(o.out)),
    )


def _announcing(
    console: Console, out: Path, identity: Identity, start: Callable[[int], None], hidden_size: int | None = None, head: int = 0
) -> Callable[[Plan], None]:
    """Return a function that prints the size of the planned cache and starts the progress bar."""

    def announce(plan: Plan) -> None:
        each, count = bytes_per_token(identity, hidden_size), len(plan.bounds)
        free = shutil.disk_usage(out).free
        console.print(
            f"{identity.kind}: {len(plan.source):,} examples, {plan.tokens:,} tokens of {each:,} bytes: {_size(plan.tokens * each)} before "
            f"compression, in {count:,} shard{'s' * (count > 1)}{f', and a head of {_size(head)}' if head else ''}; {_size(free)} are free"
        )
        if plan.tokens * each + head > free:
            console.print("That may not fit on the disk.", style="bold")
        start(plan.tokens)

    return announce


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def generate(
    model: Counted,
    data: str | Path,
    out: Path,
    console: Console,
    max_tokens: int,
    temperature: float,
    stop: tuple[str, ...],
    logprobs: int,
    columns: str | None = None,
) -> None:
    """Write training rows of ``data`` with the responses of ``model`` to ``out``. The log and the list of skipped rows are beside it.

    Raises:
        FileError: ``out`` is the data, was not made by this command, or was changed since.
        Refused: the server refuses rows, and ``model`` does not skip them.
    """
    log = out.with_name(out.name + ".log")
    with Output(out, "generate", beside=True, adopt=lambda: [out.name] if is_unmarked_log(log) else []) as output:
        output.check([out.name, out.name + LEFT_OUT], {"--data": data})
        rows = list(training_rows(data, columns))
        places = [row.where for row in rows]
        requests = requests_of(
            [row.fields for row in rows], max_tokens=max_tokens, temperature=temperature, stop=stop, logprobs=logprobs, places=places
        )
        replies = _generate(model, rows, requests, output, log, console)
    _print_unfinished(console, replies, max_tokens)
    print_usage(console, model.usage)


def _generate(model: Counted, rows: Sequence[Row], requests: Sequence[Request], output: Output, log: Path, console: Console) -> list[Reply]:
    """Write the rows with the model's replies, and return the replies that were not refused."""
    out = output.path
    where = {request.key: request.where for request in requests}

    def list_left_out(reasons: Mapping[str, str]) -> Path:
        """Write the list of rows that were left out; without any, remove an older list."""
        name = out.name + LEFT_OUT
        if reasons:
            output.write_rows(name, [{"where": where[key], "key": key, "reason": reason} for key, reason in reasons.items()])
        else:
            output.remove(name)
        return out.with_name(name)

    try:
        replies = Watched(model, console, "rows").complete(requests, log)
    except Refused as error:
        left_out = list_left_out(error.reasons)
        advice = "take them out of the data, or give --skip-refused"
        if len(where) > 1 and error.reasons.keys() == where.keys() and len(set(error.reasons.values())) == 1:
            advice = "as every row has the same reason, check --model and the other options"
        raise Refused(f"{str(error).removesuffix('.')}. {left_out} lists them: {advice}", error.reasons) from None
    answered = [(row.fields, reply) for row, reply in zip(rows, replies, strict=True) if reply.finish_reason != REFUSED]
    left_out = list_left_out(model.usage.reasons)
    output.write_rows(out.name, [with_reply(row, reply) for row, reply in answered])
    refused = len(rows) - len(answered)
    note = f", {refused:,} refused and left out: see {left_out}" if refused else ""
    console.print(f"{out}: {len(answered):,} rows{note}", markup=False)
    return [reply for _, reply in answered]


def _print_unfinished(console: Console, replies: Sequence[Reply], max_tokens: int) -> None:
    """Print how many responses are cut off or empty."""
    cut = Counter(reply.finish_reason for reply in replies if not ended(reply.finish_reason))
    if cut:
        reasons = ", ".join(f"{shown(reason)[:60]}: {count:,}" for reason, count in cut.most_common())
        limit = f"; length is --max-tokens {max_tokens}" if "length" in cut else ""
        console.print(
            f"{cut.total():,} responses did not end by themselves (finish_reason {reasons}{limit}): the student learns no end there",
            markup=False,
        )
    if empty := sum(not reply.text for reply in replies):
        console.print(f"{empty:,} responses are empty: remove them before training")
