"""Caches of teachers: they return the teacher's outputs and nothing else, after any interruption of the writer."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from caches import bytes_of, view

import kdkernels as kd
from kdkernels.data.collator import View, pack
from kdkernels.data.example import Example
from kdkernels.data.tokenization import load_examples
from kdkernels.sides import LMHead, Sampled, TopK
from kdkernels.support import files
from kdkernels.teachers.cache import CacheError, Identity, Manifest, open_cache, write_cache
from kdkernels.teachers.cache.manifest import template_hash, tokenizer_hash
from kdkernels.teachers.live import LiveTeacher
from kdkernels.trainer import DistillationArguments
from kdkernels.trainer.setup import teacher_source

SHARD = 4096  # bytes: several shards of several examples


@pytest.fixture(scope="module")
def text() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def examples(text: Any) -> list[Example]:
    return load_examples(tiny.rows(40), text)


@pytest.fixture(scope="module")
def live(text: Any) -> LiveTeacher:
    return LiveTeacher(tiny.model(len(text)))


def identity_of(text: Any, kind: str, **changed: Any) -> Identity:
    of_kind: dict[str, dict[str, Any]] = {
        "topk": {"k": 8, "temperature": 2.0, "dtype": "float16"},
        "sampled": {"k": 16, "temperature": 1.0, "seed": 0},
        "hidden": {"dtype": "float32"},
    }
    given = {
        "teacher": "tiny", "revision": "1", "teacher_dtype": "float32", "tokenizer": tokenizer_hash(text),
        "chat_template": template_hash(text), "vocab_size": len(text), "padded_vocab_size": len(text), "kind": kind,
    }  # fmt: skip
    return Identity(**{**given, **of_kind[kind], **changed})


def write(folder: Path, live: Any, examples: Sequence[Example], identity: Identity, **options: Any) -> Path:
    write_cache(live, examples, folder, identity, **{"hidden_size": 32, "shard_bytes": SHARD, "batch_size": 4, **options})
    return folder


# What comes out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_topk_is_the_teachers(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, dtype: str) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "topk", dtype=dtype)), text)
    assert len(cache.manifest.shards) > 2
    for start in range(0, len(examples), 4):  # the batches of the writer: the same product with the head, the same rounding
        batch = examples[start : start + 4]
        found, truth = cache.targets(view(batch, cache.salt)), kd.topk_logprobs(live.targets(view(batch)), 8, 2.0)
        assert isinstance(found, TopK)
        assert (found.temperature, found.tail) == (2.0, "bucket")
        assert torch.equal(found.ids, truth.ids)
        if dtype == "float32":
            assert torch.equal(found.logprobs, truth.logprobs)
            continue
        # Half a step of float16 (11 bits), twice: once for the value itself, once for the shift that restores the mass.
        assert ((found.logprobs - truth.logprobs).abs() <= 2 * 2**-11 * truth.logprobs.abs() + 1e-6).all()
        mass, true_mass = found.logprobs.double().exp().sum(-1), truth.logprobs.double().exp().sum(-1)
        assert ((mass - true_mass).abs() <= 2**-21).all(), "the tail is as float32 has it, not as float16"


def test_sampled_are_draws_of_the_teacher(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    few, k = examples[:3], 4000
    cache = open_cache(write(tmp_path / "c", live, few, identity_of(text, "sampled", k=k, temperature=1.5)), text)
    found = cache.targets(view(few, cache.salt))
    assert isinstance(found, Sampled)
    assert (found.counts.sum(-1) == k).all()
    assert ((found.ids >= 0) == (found.counts > 0)).all()
    share = torch.zeros(len(found.ids), len(text) + 1, dtype=torch.float64)
    share.scatter_add_(1, torch.where(found.ids < 0, len(text), found.ids).long(), found.counts.double() / k)
    side = live.targets(view(few))
    p = (side.hidden @ side.weight.T / 1.5).double().softmax(-1)
    # Six standard deviations: once in 10^9 for one entry, and there are 10^4.
    assert ((share[:, :-1] - p).abs() <= 6 * (p * (1 - p) / k).sqrt() + 2 / k).all()
    assert not torch.equal(found.ids[0], found.ids[1])


def test_draws_depend_on_the_example_not_on_its_place(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    identity = identity_of(text, "sampled")
    one = open_cache(write(tmp_path / "a", live, examples[:12], identity))
    other = open_cache(write(tmp_path / "b", live, examples[11:3:-1], identity, batch_size=1, shard_bytes=1 << 20))
    for example in examples[4:12]:
        a, b = (cache.targets(view([example], cache.salt)) for cache in (one, other))
        assert torch.equal(a.ids, b.ids)
    reseeded = open_cache(write(tmp_path / "c", live, examples[:12], dataclasses.replace(identity, seed=1)))
    assert not torch.equal(one.targets(view(examples[:12], one.salt)).ids, reseeded.targets(view(examples[:12], reseeded.salt)).ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_trains_to_the_same_loss_bit_for_bit(tmp_path: Path, examples: list[Example], text: Any, dtype: torch.dtype) -> None:
    live = LiveTeacher(tiny.model(len(text)).to(dtype))
    name = str(dtype).removeprefix("torch.")
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "hidden", dtype=name, teacher_dtype=name)), text)

    def losses(source: Any, salt: str | None) -> list[torch.Tensor]:
        student = tiny.model(len(text), seed=1, hidden=16).to(dtype)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        found, order, start = [], random.Random(0), 0
        shuffled = order.sample(examples, len(examples))
        while start < len(shuffled):  # other batches than the writer's, of every size
            size = order.randint(1, 8)
            seen = view(shuffled[start : start + size], salt)
            start += size
            hidden = student.model(seen.input_ids, attention_mask=seen.attention_mask).last_hidden_state.flatten(0, 1)[seen.scored]
            loss = kd.distillation_loss(LMHead(hidden, student.lm_head.weight), source.targets(seen), divergence="jsd", temperature=2.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return found

    expected, got = losses(live, None), losses(cache, cache.salt)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert expected[0] != expected[-1]


def test_draws_are_of_one_temperature(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:4], identity_of(text, "sampled", temperature=1.5)), text)
    arguments = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    assert teacher_source(live.models[0], cache, DistillationArguments(temperature=1.5, **arguments), text)[0] is cache
    with pytest.raises(
        ValueError, match=r"temperature=2.0, but the cache was drawn at 1.5 .* --temperature 1.5, or .*cache --temperature 2"
    ):
        teacher_source(live.models[0], cache, DistillationArguments(temperature=2.0, **arguments), text)


@pytest.mark.parametrize(("kind", "divergence"), [("topk", "jsd"), ("sampled", "forward_kl")])
def test_sparse_targets_give_the_loss_of_the_same_targets_live(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str, divergence: str
) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:8], identity_of(text, kind, temperature=2.0)))
    seen = view(examples[:8], cache.salt)
    found = cache.targets(seen)
    student = torch.randn(len(seen.scored), len(text), generator=torch.Generator().manual_seed(0))
    if isinstance(found, TopK):
        truth = kd.topk_logprobs(live.targets(seen), 8, 2.0)
        exact = kd.distillation_loss(student, truth, divergence=divergence, temperature=2.0)
        # Float16 moves each log-probability by 2^-10 of itself at most (see above), and the loss by no more than the mean of that, each
        # weighted with its probability; 10 nats is more than any of these log-probabilities that has weight.
        assert abs(kd.distillation_loss(student, found, divergence=divergence, temperature=2.0) - exact) <= 4 * 10 * 2**-10
        nothing = TopK(torch.full_like(found.ids, -1), torch.zeros_like(found.logprobs), temperature=2.0)
        assert kd.distillation_loss(student, nothing, divergence=divergence, temperature=2.0) == 0, "a row without ids teaches nothing"
    else:
        p = torch.zeros(student.shape).scatter_add_(1, found.ids.clamp(min=0).long(), found.counts / 16)
        dense = -(p * torch.log_softmax(student / 2, -1)).sum(-1).mean() * 4
        torch.testing.assert_close(kd.distillation_loss(student, found, divergence=divergence, temperature=2.0), dense)


def test_lookup_survives_shuffling_packing_and_micro_batches(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "topk")))
    kept = {example.key(): cache.targets(view([example], cache.salt)) for example in examples}
    order = random.Random(1).sample(examples, len(examples))
    for packed in (None, 64):
        for size in (1, 3, 40):
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                found = cache.targets(view(batch, cache.salt, packed))
                items = batch if packed is None else [example for item in pack(batch, packed) for example in item]
                assert torch.equal(found.ids, torch.cat([kept[e.key()].ids for e in items]))
                assert torch.equal(found.logprobs, torch.cat([kept[e.key()].logprobs for e in items]))


def test_equal_examples_are_kept_once(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, [*examples[:3], examples[1]], identity_of(text, "topk")))
    assert len(cache) == 3
    assert examples[1].key(cache.salt) in cache


def test_what_is_not_in_the_cache_is_an_error(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:3], identity_of(text, "topk")))
    assert examples[3].key(cache.salt) not in cache
    with pytest.raises(KeyError, match="is not in the cache c, which holds 3"):
        cache.targets(view(examples[2:4], cache.salt))
    with pytest.raises(KeyError):  # keys that are salted with nothing, or for another cache
        cache.targets(view(examples[:2], ""))
    with pytest.raises(CacheError, match="needs the key and the token count"):
        cache.targets(view(examples[:2]))
    shorter = dataclasses.replace(view(examples[:1], cache.salt), counts=(1,), scored=torch.tensor([0]))
    with pytest.raises(CacheError, match="has 1 scored tokens"):
        cache.targets(shorter)


# Whatever happens to the writer


class Killed(BaseException):
    """Stands for a kill: nothing that handles errors may catch it."""


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_cut_at_every_step_the_same_bytes(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call that changes a file's name or makes it last, in turn."""
    few = examples[:10]
    size = {"topk": 700, "hidden": 2048}[kind]
    whole = bytes_of(write(tmp_path / "whole", live, few, identity_of(text, kind), shard_bytes=size))
    assert len(whole) >= 4, "shards and a manifest"
    calls = 0

    def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return function(*args)

        return call

    for at in range(1, 1000):
        calls, out = 0, tmp_path / f"cut{at}"
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", dying(os.replace, at))
            patch.setattr(files.os, "fsync", dying(os.fsync, at))
            try:
                write(out, live, few, identity_of(text, kind), shard_bytes=size)
            except Killed:
                if bytes_of(out) != whole:  # the last step only makes it last
                    with pytest.raises(CacheError, match=r"unfinished|no manifest"):
                        open_cache(out)
            else:
                break
        assert bytes_of(write(out, live, few, identity_of(text, kind), shard_bytes=size)) == whole
    assert at > 15, "there were steps to cut at"


SLOW_WRITER = """
import sys, time
from pathlib import Path
import torch
import kdkernels as kd
from kdkernels.teachers.cache import Identity, write_cache
from kdkernels.data.example import Example

class Slow:
    vocab_size = 100
    def targets(self, view):
        time.sleep(float(sys.argv[2]))
        generator = torch.Generator().manual_seed(0)
        table, head = torch.randn(100, 8, generator=generator), torch.randn(100, 8, generator=generator)
        return kd.LMHead(table[view.input_ids.flatten()[view.scored]], head)

def examples():
    return [Example(ids, range(9), ids, range(9)) for ids in ([(7 * i + 3 * j) % 100 for j in range(10)] for i in range(120))]

identity = Identity("slow", "1", "float32", "t", "c", 100, 100, "sampled", 8, 1.0, None, 0)
write_cache(Slow(), examples(), Path(sys.argv[1]), identity, batch_size=2, shard_bytes=3000)
"""


def test_kill_9_at_random_moments_and_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "writer.py"
    script.write_text(SLOW_WRITER)

    def start(out: Path, pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(out), str(pause)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def here(out: Path) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), str(out), "0"])
        runpy.run_path(str(script))

    def shards() -> int:
        return len(list(out.glob("*.parquet")))

    out, moment = tmp_path / "cut", random.Random(0)
    for kills in range(2):
        before = shards()
        running = start(out, 0.02 if kills else 0.3)
        while shards() < before + (3 if kills else 1):
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.002)
        if not kills:
            with pytest.raises(CacheError, match="is in use by another process"):
                here(out)
        time.sleep(moment.uniform(0, 0.1))
        assert running.poll() is None
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        assert not json.loads((out / "manifest.json").read_text())["complete"]
    here(out)
    here(tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert len(open_cache(out)) == 100, "of 120 examples, 20 come twice"


def test_a_damaged_shard_is_made_anew(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    for kind, damaged in (("topk", "000001.parquet"), ("hidden", "head.safetensors")):
        out = write(tmp_path / kind, live, examples, identity_of(text, kind))
        whole = bytes_of(out)
        (out / damaged).write_bytes(whole[damaged][:-7])
        assert bytes_of(write(out, live, examples, identity_of(text, kind))) == whole


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"k": 4}, "k: 8 in the cache, 4 now"),
        ({"temperature": 1.0}, "temperature: 2.0 in the cache, 1.0 now"),
        ({"revision": "2"}, "the teacher's revision"),
        ({"teacher_dtype": "bfloat16"}, "the teacher's dtype"),
    ],
)
def test_cache_is_not_continued_by_another_command(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, changed: dict[str, Any], named: str
) -> None:
    out = write(tmp_path / "c", live, examples[:4], identity_of(text, "topk"))
    before = bytes_of(out)
    with pytest.raises(CacheError, match="made from something else") as error:
        write(out, live, examples[:4], identity_of(text, "topk", **changed))
    assert named in str(error.value)
    with pytest.raises(CacheError, match="a cache of other data"):
        write(out, live, examples[:5], identity_of(text, "topk"))
    assert bytes_of(out) == before


def test_other_folders_and_empty_data_are_refused(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"not empty and holds no cache, but notes\.txt"):
        write(tmp_path, live, examples, identity_of(text, "topk"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CacheError, match="nothing to keep"):
        write(tmp_path / "c", live, [], identity_of(text, "topk"))


@pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
def test_a_teacher_that_gives_nan_is_refused(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str) -> None:
    class Broken:
        vocab_size = len(text)

        def targets(self, view: View) -> Any:
            side = live.targets(view)
            return dataclasses.replace(side, hidden=side.hidden * torch.nan)

    with pytest.raises(CacheError, match="not finite"):
        write(tmp_path / "c", Broken(), examples[:2], identity_of(text, kind))


# Nothing else is ever given


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (lambda c: flip(c / "000001.parquet"), r"000001\.parquet is damaged"),
    "a flipped first byte": (lambda c: flip(c / "000000.parquet", 0), r"000000\.parquet is damaged"),
    "a truncated shard": (lambda c: os.truncate(c / "000001.parquet", 200), r"000001\.parquet is damaged"),
    "a missing shard": (lambda c: (c / "000001.parquet").unlink(), r"000001\.parquet is missing"),
    "swapped shards": (lambda c: os.replace(c / "000000.parquet", c / "000001.parquet"), r"000000\.parquet is missing|damaged"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"holds no manifest\.json"),
    "a torn manifest": (lambda c: os.truncate(c / "manifest.json", 100), "not a JSON object"),
    "another format version": (lambda c: edit(c / "manifest.json", lambda m: m.update(version=3)), "version 3 are not .* and 1 or 2"),
    "another position convention": (
        lambda c: edit(c / "manifest.json", lambda m: m["identity"].update(position="row t scores token t")),
        "the position convention .position: row t scores token t in the cache, row t scores token t.1 now",
    ),
    "an edited temperature": (lambda c: edit(c / "manifest.json", lambda m: m["identity"].update(temperature=1.0)), "its own checksum"),
    "an unknown field": (lambda c: edit(c / "manifest.json", lambda m: m.update(more=1)), "damaged.*more"),
    "a file elsewhere": (lambda c: edit(c / "manifest.json", lambda m: m["shards"][0].update(file="../x")), "outside its folder"),
    "unfinished": (
        lambda c: dataclasses.replace(Manifest.read(c), complete=False, shards=Manifest.read(c).shards[:1]).write(c),
        "unfinished: .* of 12 examples",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_named(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, what: str) -> None:
    out = write(tmp_path / "c", live, examples[:12], identity_of(text, "topk"), shard_bytes=1024)
    open_cache(out, text)
    damage, message = DAMAGE[what]
    damage(out)
    with pytest.raises(CacheError, match=message):
        open_cache(out, text)


@pytest.mark.parametrize("name", ["000000.safetensors", "head.safetensors"])
def test_damaged_hidden_states_are_refused(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, name: str) -> None:
    out = write(tmp_path / "c", live, examples, identity_of(text, "hidden"))
    flip(out / name, 0.9)
    with pytest.raises(CacheError, match=rf"{name} is damaged"):
        open_cache(out)


def test_another_tokenizer_template_or_teacher_is_refused_and_named(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any
) -> None:
    out = write(tmp_path / "c", live, examples[:3], identity_of(text, "topk"))
    text(["one", "two words"], padding=True)  # what a call leaves in a tokenizer changes nothing
    open_cache(out, text, teacher="tiny", revision="1")
    other = tiny.tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(CacheError, match="the tokenizer"):
        open_cache(out, other)
    other = tiny.tokenizer()
    other.chat_template = tiny.TEMPLATE.replace(": ", ":")
    with pytest.raises(CacheError, match="the chat template"):
        open_cache(out, other)
    with pytest.raises(CacheError, match=r"revision \(revision: 1 in the cache, 2 now\)"):
        open_cache(out, text, revision="2")
    with pytest.raises(CacheError, match=r"teacher \(teacher: tiny in the cache, large now\)"):
        open_cache(out, text, teacher="large")
