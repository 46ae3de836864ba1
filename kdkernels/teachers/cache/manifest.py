"""The manifest of a cache: teacher, tokenizer, kind of targets, and the shards. It is checked as a whole before anything in it is used.

Version 2 added ``special_tokens`` and ``rules`` to the identity, which also determine a row's tokens, and ``date`` and ``options`` to the
manifest. A manifest of version 1 is read with None for these fields, and its keys are salted without them.
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
    "CacheError", "Head", "Identity", "Kind", "Manifest", "Shard", "identity_of_model", "identity_of_tokenizer", "cached_date",
    "cached_learn", "learnt", "model_files", "template_hash", "tokenizer_hash",
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
"""Names of fields in messages, if the field's own name is not clear."""
HASHES = ("revision", "tokenizer", "chat_template")
ADDED = ("special_tokens", "rules")
"""Fields of the identity that version 1 lacks."""


class CacheError(UserError):
    """The cache is damaged, unfinished, in use, or made from other inputs. The message gives the difference and the remedy."""


@dataclass(frozen=True)
class Identity:
    """All properties that determine a cache's content: caches with equal identities store the same values for an example."""

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
    """Real size of the vocabulary, which is that of the targets."""
    padded_vocab_size: int
    """Rows of the teacher's head."""
    kind: Kind
    k: int | None = None
    """Entries per token of ``topk``, draws per token of ``sampled``."""
    temperature: float | None = None
    """Temperature of the log-probabilities or draws; None if the kind is exact at any temperature."""
    dtype: str | None = None
    """Dtype of the stored log-probabilities or hidden states."""
    seed: int | None = None
    """Seed of draws and sampled text."""
    max_new_tokens: int | None = None
    """Maximum number of tokens of a text."""
    position: str = POSITION
    special_tokens: str | None = None
    """The tokenizer's begin and end token as JSON text; None if unknown."""
    rules: int | None = None
    """Version of the tokenisation rules, ``RULES`` of ``kdkernels.data.tokenization``; None if unknown."""

    def hash(self) -> str:
        """Return the salt of row keys. Fields that version 1 lacks are only included if they are known, so its caches keep their keys."""
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
    """The head of a ``hidden`` cache: a safetensors file with ``weight`` and optionally ``bias``, and the head's scale and softcap."""

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
    """Number of distinct examples."""
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
        """Return the manifest of a folder after checking its checksum and the ``expected`` fields.

        Args:
            expected: values of fields of the manifest or its identity; None is not compared.

        Raises:
            CacheError: the manifest is missing or was changed since it was written; it has another format, version or position convention;
                or a field differs (the message gives both values).
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
            cached = getattr(self if hasattr(self, name) else self.identity, name)
            if now is not None and cached != now and not (cached is None and name in ADDED):
                short = 12 if name in HASHES else None
                differing.append(f"{NAMES.get(name, name)} ({name}: {str(cached)[:short]} in the cache, {str(now)[:short]} now)")
        if differing:
            raise CacheError(
                f"the cache was made from something else; different is {', '.join(differing)}. Use what it was made from, or make another "
                "cache with `kdkernels cache`, in a new folder"
            )

    @staticmethod
    def verify(folder: Path, shard: Shard | Head) -> None:
        """Check the sha256 of a file.

        Raises:
            CacheError: the file is missing, or its content has changed.
        """
        path = folder / shard.file
        if not path.is_file():
            raise CacheError(f"{shard.file} is missing from {folder}. Run the `kdkernels cache` command that made the cache again")
        if digest_file(path) != shard.sha256:
            raise CacheError(
                f"{shard.file} is damaged: its sha256 differs from the manifest's. Run the `kdkernels cache` command that made the cache "
                "again; it writes this file anew"
            )


def _json(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no {MANIFEST}: it is not a cache, or a cache that has just been begun") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CacheError(f"{MANIFEST} is not a JSON object: it is damaged. Make the cache again")
    return value


def cached_date(folder: Path) -> str | None:
    """Return the date that the chat template wrote into the prompts of the cache in ``folder``; None without a cache or a date."""
    return Manifest.read(folder).date if (folder / MANIFEST).is_file() else None


def cached_learn(folder: Path) -> str | None:
    """Return the turns of a conversation that the rows of the cache in ``folder`` learn (see ``learnt``); None without a cache."""
    return learnt(Manifest.read(folder)) if (folder / MANIFEST).is_file() else None


def learnt(manifest: Manifest) -> str | None:
    """Return the option ``learn`` of ``load_examples`` for a cache. Manifests of versions without the option mean the last turn."""
    turns: str | None = manifest.options.get("learn", "last")
    return turns


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a sha256 of all properties that determine a tokenizer's ids.

    For a fast tokenizer, these are its whole definition except padding and truncation, which belong to the last call. For a slow one, its
    vocabulary and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([sorted(tokenizer.get_vocab().items()), {name: str(t) for name, t in tokenizer.special_tokens_map.items()}])
    definition = json.loads(backend.to_str())
    return digest({name: part for name, part in definition.items() if name not in ("padding", "truncation")})


def identity_of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return the fields of an ``Identity`` that determine the tokens of a row."""
    special = {name: getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos")}
    return {
        "tokenizer": tokenizer_hash(tokenizer), "chat_template": template_hash(tokenizer), "special_tokens": json.dumps(special),
        "rules": RULES,
    }  # fmt: skip


def template_hash(tokenizer: Any) -> str:
    """Return the sha256 of the chat template; a fixed value without one."""
    return digest(getattr(tokenizer, "chat_template", None))


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that determine a model's outputs: config and weights."""
    configs, weights = ("config.json", "adapter_config.json"), (".safetensors", ".bin", ".gguf")
    return sorted(f for f in folder.iterdir() if f.name in configs or f.suffix in weights)


def identity_of_model(path: str, commit: str | None) -> tuple[str, str]:
    """Return name and revision of a model: the folder's name and a sha256 of config and weights, or the hub id and its commit.

    The revision of an adapter covers its base model.

    Raises:
        CacheError: the commit of a hub model is unknown.
    """
    folder = Path(path)
    adapter = find_adapter("teacher", path)
    if adapter is not None and adapter.commit is not None:
        return path, digest([adapter.commit, identity_of_model(adapter.base, commit)[1]])
    if not folder.is_dir():
        if commit is None:
            raise CacheError(f"the revision of {path!r} is not known: give --revision")
        return path, commit
    content = hashlib.sha256()
    for file in model_files(folder):
        content.update(f"{file.name}\0{digest_file(file)}\0".encode())
    if adapter is not None:
        content.update(identity_of_model(adapter.base, commit)[1].encode())
    return folder.resolve().name, content.hexdigest()
