"""The manifest of a cache: the teacher, the tokenizer, what is kept, and the shards that hold it. All of it is checked before any is used.

Version 2 added to the identity what decides tokens beside the tokenizer's definition (``special_tokens``, ``rules``), and to the manifest
``date`` and ``options``. A manifest of version 1 is read with None in their place, and its keys are salted without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...data.tokenization import RULES
from ...support.errors import UserError
from ...support.files import digest, digest_file, write_whole
from ..adapters import find_adapter

__all__ = [
    "CacheError", "Head", "Identity", "Kind", "Manifest", "Shard", "identity_of_model", "identity_of_tokenizer", "kept_date",
    "kept_learn", "learnt", "model_files", "template_hash", "tokenizer_hash",
]  # fmt: skip

FORMAT, VERSION, READABLE = "kdkernels-cache", 2, (1, 2)
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
POSITION = "row t scores token t+1"
Kind = Literal["topk", "sampled", "hidden", "text"]
FLOATS = ("float16", "float32", "bfloat16", "float64")


NAMES = {
    "teacher_dtype": "the teacher's dtype", "revision": "the teacher's revision", "tokenizer": "the tokenizer",
    "chat_template": "the chat template", "vocab_size": "the vocabulary", "padded_vocab_size": "the padded vocabulary",
    "position": "the position convention", "special_tokens": "the tokens that begin and end a text", "rules": "the rules of tokenisation",
}  # fmt: skip
"""How a message names a field, where the field's own name is not clear."""
HASHES = ("revision", "tokenizer", "chat_template")
ADDED = ("special_tokens", "rules")
"""Fields of the identity that version 1 lacks."""


class CacheError(UserError):
    """A cache that is damaged, unfinished, in use, or made from something else; the message names what differs and the way out."""


@dataclass(frozen=True)
class Identity:
    """Everything that decides the content of a cache: two caches with equal identities store the same for an example."""

    teacher: str
    """Name of the teacher: a hub id, or the name of its folder."""
    revision: str
    """Commit of the hub, or sha256 over the weights of the folder."""
    teacher_dtype: str
    tokenizer: str
    """sha256, see ``tokenizer_hash``."""
    chat_template: str
    """sha256, see ``template_hash``."""
    vocab_size: int
    """Real size of the vocabulary: what the targets are over."""
    padded_vocab_size: int
    """Rows of the teacher's head."""
    kind: Kind
    k: int | None = None
    """Entries per token of ``topk``, draws per token of ``sampled``."""
    temperature: float | None = None
    """Temperature of the log-probabilities or draws; None if the kind holds for any."""
    dtype: str | None = None
    """Dtype of the stored log-probabilities or hidden states."""
    seed: int | None = None
    """Seed of draws and sampled text."""
    max_new_tokens: int | None = None
    """Largest number of tokens of a text."""
    position: str = POSITION
    special_tokens: str | None = None
    """The tokenizer's begin and end token as JSON text; None: not known."""
    rules: int | None = None
    """``RULES`` of ``kdkernels.data.tokenization`` that made rows into tokens; None: not known."""

    def hash(self) -> str:
        """The salt of row keys. Fields that version 1 lacks count where they are known, so that a cache of version 1 keeps its keys."""
        fields = dataclasses.asdict(self)
        return digest({name: value for name, value in fields.items() if name not in ADDED or value is not None})


@dataclass(frozen=True)
class Shard:
    file: str
    rows: int
    tokens: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int, tokens: int) -> Shard:
        return cls(path.name, rows, tokens, digest_file(path))


@dataclass(frozen=True)
class Head:
    """The head of a ``hidden`` cache: a safetensors file with ``weight`` and perhaps ``bias``, and what follows it."""

    sha256: str
    scale: float
    softcap: float | None
    file: str = HEAD

    @classmethod
    def of(cls, path: Path, scale: float, softcap: float | None) -> Head:
        return cls(digest_file(path), scale, softcap, path.name)


@dataclass(frozen=True)
class Manifest:
    identity: Identity
    rows: int
    """Examples, each counted once."""
    tokens: int
    examples: str
    """sha256 over the keys of all examples, in order."""
    shard_bytes: int
    batch_size: int
    shards: tuple[Shard, ...] = ()
    head: Head | None = None
    complete: bool = False
    date: str | None = None
    """The date that the chat template wrote into every prompt, such as 2026-11-28; None for a template without a date."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of ``load_examples``, such as ``max_length``, if the writer received them."""
    version: int = VERSION

    def write(self, folder: Path) -> None:
        value = {"format": FORMAT, **dataclasses.asdict(self)}
        if self.version == 1:
            value["identity"] = {name: part for name, part in value["identity"].items() if name not in ADDED}
            del value["date"], value["options"]
        value["checksum"] = digest(value)
        text = json.dumps(value, indent=1) + "\n"
        write_whole(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path, **expected: Any) -> Manifest:
        """The manifest of a folder, once all of it is known to be what was written, and what is ``expected``.

        Args:
            expected: values of fields, of the manifest or its identity; None is not compared.

        Raises:
            CacheError: no manifest; another format, version or position convention; a field that differs, with both values; or a
                manifest that was changed since it was written.
        """
        value = _json(folder)
        checksum = value.pop("checksum", None)
        sound = checksum == digest(value)
        form, version = value.pop("format", None), value.get("version")
        if form != FORMAT or version not in READABLE:
            raise CacheError(
                f"{MANIFEST}: format {form!r} and version {version!r} are not {FORMAT!r} and {' or '.join(map(str, READABLE))}, which this "
                "release reads. Make the cache again with `kdkernels cache`, in a new folder"
            )
        try:
            head = value.pop("head")
            manifest = cls(
                identity=Identity(**value.pop("identity")),
                shards=tuple(Shard(**shard) for shard in value.pop("shards")),
                head=None if head is None else Head(**head),
                **value,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{MANIFEST} is damaged: {error}. Make the cache again") from None
        files = [shard.file for shard in manifest.shards] + ([] if manifest.head is None else [manifest.head.file])
        if any(Path(file).name != file for file in files):
            raise CacheError(f"{MANIFEST} names files outside its folder: it is damaged. Make the cache again")
        manifest._compare({"position": POSITION, **expected})
        if not sound:
            raise CacheError(f"{MANIFEST} does not match its own checksum: it was changed or damaged. Make the cache again")
        return manifest

    def _compare(self, expected: dict[str, Any]) -> None:
        if expected.get("revision") and expected["revision"] == self.identity.revision:
            expected.pop("teacher", None)  # the same weights, in a folder of another name
        differing = []
        for name, now in expected.items():
            kept = getattr(self if hasattr(self, name) else self.identity, name)
            if now is not None and kept != now and not (kept is None and name in ADDED):
                short = 12 if name in HASHES else None
                differing.append(f"{NAMES.get(name, name)} ({name}: {str(kept)[:short]} in the cache, {str(now)[:short]} now)")
        if differing:
            raise CacheError(
                f"the cache was made from something else; different is {', '.join(differing)}. Give what it was made with, or make another "
                "with `kdkernels cache`, in a new folder"
            )

    @staticmethod
    def verify(folder: Path, shard: Shard | Head) -> None:
        """
        Raises:
            CacheError: a file that is missing, or whose bytes are not those written.
        """
        path = folder / shard.file
        if not path.is_file():
            raise CacheError(f"{shard.file} is missing from {folder}. Run the `kdkernels cache` command that made the cache again")
        if digest_file(path) != shard.sha256:
            raise CacheError(
                f"{shard.file} is damaged: its sha256 is not that of the manifest. Run the `kdkernels cache` command that made the cache "
                "again; it makes this file anew"
            )


def _json(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no {MANIFEST}: it is not a cache, or its writing has just begun") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CacheError(f"{MANIFEST} is not a JSON object: it is damaged. Make the cache again")
    return value


def kept_date(folder: Path) -> str | None:
    """The date that the chat template wrote into the prompts of the cache in ``folder``; None where there is no cache, or no date."""
    return Manifest.read(folder).date if (folder / MANIFEST).is_file() else None


def kept_learn(folder: Path) -> str | None:
    """The turns of a conversation that the rows of the cache in ``folder`` learn, see ``learnt``; None where there is no cache."""
    return learnt(Manifest.read(folder)) if (folder / MANIFEST).is_file() else None


def learnt(manifest: Manifest) -> str | None:
    """The ``learn`` that ``load_examples`` was given for a cache; the last turn for a manifest of before that was noted."""
    turns: str | None = manifest.options.get("learn", "last")
    return turns


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that decides the ids a tokenizer gives: of a fast one its whole definition, but for the padding and truncation of the
    last call; of a slow one its vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([sorted(tokenizer.get_vocab().items()), {name: str(t) for name, t in tokenizer.special_tokens_map.items()}])
    definition = json.loads(backend.to_str())
    return digest({name: part for name, part in definition.items() if name not in ("padding", "truncation")})


def identity_of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The fields of an ``Identity`` that decide the tokens of a row."""
    special = {name: getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos")}
    return {
        "tokenizer": tokenizer_hash(tokenizer), "chat_template": template_hash(tokenizer), "special_tokens": json.dumps(special),
        "rules": RULES,
    }  # fmt: skip


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template, or of there being none."""
    return digest(getattr(tokenizer, "chat_template", None))


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what a model computes: its config and weights."""
    configs, weights = ("config.json", "adapter_config.json"), (".safetensors", ".bin", ".gguf")
    return sorted(f for f in folder.iterdir() if f.name in configs or f.suffix in weights)


def identity_of_model(path: str, commit: str | None) -> tuple[str, str]:
    """Name and revision of a model: of a folder its name and a sha256 over its config and weights, of a hub id itself and the commit.

    The revision of an adapter covers its base model.

    Raises:
        CacheError: a hub model whose commit is not known.
    """
    folder = Path(path)
    adapter = find_adapter("teacher", path)
    if adapter is not None and adapter.commit is not None:
        return path, digest([adapter.commit, identity_of_model(adapter.base, commit)[1]])
    if not folder.is_dir():
        if commit is None:
            raise CacheError(f"the revision of {path!r} is not known: give --revision")
        return path, commit
    found = hashlib.sha256()
    for file in model_files(folder):
        found.update(f"{file.name}\0{digest_file(file)}\0".encode())
    if adapter is not None:
        found.update(identity_of_model(adapter.base, commit)[1].encode())
    return folder.resolve().name, found.hexdigest()
