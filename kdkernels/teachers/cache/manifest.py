"""The manifest of a cache: what was asked of which teacher, and which shards hold the answers. All of it is checked before any is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...files import digest, digest_file, write_whole

__all__ = ["CacheError", "Head", "Identity", "Kind", "Manifest", "Shard", "identity_of_model", "template_hash", "tokenizer_hash"]

FORMAT, VERSION = "kdkernels-cache", 1
MANIFEST = "manifest.json"
POSITION = "row t scores token t+1"
Kind = Literal["topk", "sampled", "hidden", "text"]
FLOATS = ("float16", "float32", "bfloat16", "float64")


NAMES = {
    "teacher_dtype": "the teacher's dtype", "revision": "the teacher's revision", "tokenizer": "the tokenizer",
    "chat_template": "the chat template", "vocab_size": "the vocabulary", "padded_vocab_size": "the padded vocabulary",
    "position": "the position convention", "examples": "the data",
}  # fmt: skip
"""Of fields, where their own does not say it."""
HASHES = ("revision", "tokenizer", "chat_template", "examples")


class CacheError(UserError):
    """A cache that is damaged, unfinished, in use, or made from something else; the message names what differs and the way out."""


@dataclass(frozen=True)
class Identity:
    """What decides the content of a cache. Two caches with one identity hold the same for the same example."""

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
    """Of the log-probabilities or draws; None where the kind holds for any."""
    dtype: str | None = None
    """In which log-probabilities or hidden states are kept."""
    seed: int | None = None
    """Of draws and sampled text."""
    max_new_tokens: int | None = None
    """Of text."""
    position: str = POSITION

    def hash(self) -> str:
        """The salt of row keys."""
        return digest(dataclasses.asdict(self))


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
    file: str = "head.safetensors"

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

    def write(self, folder: Path) -> None:
        value = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
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
        found = value.pop("format", None), value.pop("version", None)
        if found != (FORMAT, VERSION):
            raise CacheError(f"{MANIFEST}: format and version are {found}, this release reads {(FORMAT, VERSION)}. Make the cache again")
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
        differing = []
        for name, now in expected.items():
            found = getattr(self if hasattr(self, name) else self.identity, name)
            if now is not None and found != now:
                short = 12 if name in HASHES else None
                differing.append(f"{NAMES.get(name, name)} ({name}: {str(found)[:short]} in the cache, {str(now)[:short]} now)")
        if differing:
            raise CacheError(f"the cache was made from something else; different is {', '.join(differing)}. Make it again in a new folder")

    @staticmethod
    def verify(folder: Path, shard: Shard | Head) -> None:
        """
        Raises:
            CacheError: a file that is missing, or whose bytes are not those written.
        """
        path = folder / shard.file
        if not path.is_file():
            raise CacheError(f"{shard.file} is missing from {folder}")
        if digest_file(path) != shard.sha256:
            raise CacheError(
                f"{shard.file} is damaged: its sha256 is not that of the manifest. Run the same `kdkernels cache` command again, which "
                "makes this one anew"
            )


def _json(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no {MANIFEST}: it is no cache, or its writing has just begun") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CacheError(f"{MANIFEST} is no JSON object: it is damaged. Make the cache again")
    return value


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that decides the ids a tokenizer gives: of a fast one its whole definition, but for the padding and truncation of the
    last call; of a slow one its vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([sorted(tokenizer.get_vocab().items()), {name: str(t) for name, t in tokenizer.special_tokens_map.items()}])
    definition = json.loads(backend.to_str())
    return digest({name: part for name, part in definition.items() if name not in ("padding", "truncation")})


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template, or of there being none."""
    return digest(getattr(tokenizer, "chat_template", None))


def identity_of_model(path: str, commit: str | None) -> tuple[str, str]:
    """Name and revision of a model: of a folder its name and a sha256 over its config and weights, of a hub id itself and the commit.

    Raises:
        CacheError: a hub model whose commit is not known.
    """
    folder = Path(path)
    if not folder.is_dir():
        if commit is None:
            raise CacheError(f"the revision of {path!r} is not known: give --revision")
        return path, commit
    found = hashlib.sha256()
    configs, weights = ("config.json", "adapter_config.json"), (".safetensors", ".bin", ".gguf")
    for file in sorted(f for f in folder.iterdir() if f.name in configs or f.suffix in weights):
        found.update(f"{file.name}\0{digest_file(file)}\0".encode())
    return folder.resolve().name, found.hexdigest()
