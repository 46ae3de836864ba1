"""Caches of teachers return exactly the teacher's outputs, also after interruptions of the writer and damage to files."""

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
    by_kind: dict[str, dict[str, Any]] = {
        "topk": {"k": 8, "temperature": 2.0, "dtype": "float16"},
        "sampled": {"k": 16, "temperature": 1.0, "seed": 0},
        "hidden": {"dtype": "float32"},
    }
    common = {
        "teacher": "tiny", "revision": "1", "teacher_dtype": "float32", "tokenizer": tokenizer_hash(text),
        "chat_template": template_hash(text), "vocab_size": len(text), "padded_vocab_size": len(text), "kind": kind,
    }  # fmt: skip
    return Identity(**{**common, **by_kind[kind], **changed})


def write(folder: Path, live: Any, examples: Sequence[Example], identity: Identity, **options: Any) -> Path:
    write_cache(live, examples, folder, identity, **{"hidden_size": 32, "shard_bytes": SHARD, "batch_size": 4, **options})
    return folder


# Contents


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_topk_equals_the_live_teachers(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, dtype: str) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "topk", dtype=dtype)), text)
    assert len(cache.manifest.shards) > 2
    for start in range(0, len(examples), 4):  # the writer's batches: the same matrix product, so the same rounding
        batch = examples[start : start + 4]
        targets, truth = cache.targets(view(batch, cache.salt)), kd.topk_logprobs(live.targets(view(batch)), 8, 2.0)
        assert isinstance(targets, TopK)
        assert (targets.temperature, targets.tail) == (2.0, "bucket")
        assert torch.equal(targets.ids, truth.ids)
        if dtype == "float32":
            assert torch.equal(targets.logprobs, truth.logprobs)
            continue
        # Two roundings to float16 (11 bits), half an ulp each: the value, and the shift that restores the mass.
        assert ((targets.logprobs - truth.logprobs).abs() <= 2 * 2**-11 * truth.logprobs.abs() + 1e-6).all()
        mass, true_mass = targets.logprobs.double().exp().sum(-1), truth.logprobs.double().exp().sum(-1)
        assert ((mass - true_mass).abs() <= 2**-21).all(), "the mass has the precision of float32"


def test_samples_follow_the_teachers_distribution(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    three, k = examples[:3], 4000
    cache = open_cache(write(tmp_path / "c", live, three, identity_of(text, "sampled", k=k, temperature=1.5)), text)
    targets = cache.targets(view(three, cache.salt))
    assert isinstance(targets, Sampled)
    assert (targets.counts.sum(-1) == k).all()
    assert ((targets.ids >= 0) == (targets.counts > 0)).all()
    shares = torch.zeros(len(targets.ids), len(text) + 1, dtype=torch.float64)
    shares.scatter_add_(1, torch.where(targets.ids < 0, len(text), targets.ids).long(), targets.counts.double() / k)
    side = live.targets(view(three))
    p = (side.hidden @ side.weight.T / 1.5).double().softmax(-1)
    # Six standard deviations: 10^-9 for one of 10^4 entries.
    assert ((shares[:, :-1] - p).abs() <= 6 * (p * (1 - p) / k).sqrt() + 2 / k).all()
    assert not torch.equal(targets.ids[0], targets.ids[1])


def test_draws_depend_on_the_example_and_not_on_its_position(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    identity = identity_of(text, "sampled")
    in_order = open_cache(write(tmp_path / "a", live, examples[:12], identity))
    reversed_order = open_cache(write(tmp_path / "b", live, examples[11:3:-1], identity, batch_size=1, shard_bytes=1 << 20))
    for example in examples[4:12]:
        a, b = (cache.targets(view([example], cache.salt)) for cache in (in_order, reversed_order))
        assert torch.equal(a.ids, b.ids)
    reseeded = open_cache(write(tmp_path / "c", live, examples[:12], dataclasses.replace(identity, seed=1)))
    assert not torch.equal(
        in_order.targets(view(examples[:12], in_order.salt)).ids, reseeded.targets(view(examples[:12], reseeded.salt)).ids
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_trains_to_the_same_loss_bit_for_bit(tmp_path: Path, examples: list[Example], text: Any, dtype: torch.dtype) -> None:
    live = LiveTeacher(tiny.model(len(text)).to(dtype))
    name = str(dtype).removeprefix("torch.")
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "hidden", dtype=name, teacher_dtype=name)), text)

    def losses(source: Any, salt: str | None) -> list[torch.Tensor]:
        student = tiny.model(len(text), seed=1, hidden=16).to(dtype)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        values, order, start = [], random.Random(0), 0
        shuffled = order.sample(examples, len(examples))
        while start < len(shuffled):  # batches of other sizes than the writer's
            size = order.randint(1, 8)
            batch = view(shuffled[start : start + size], salt)
            start += size
            hidden = student.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.flatten(0, 1)[batch.scored]
            loss = kd.distillation_loss(LMHead(hidden, student.lm_head.weight), source.targets(batch), divergence="jsd", temperature=2.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.detach())
        return values

    expected, actual = losses(live, None), losses(cache, cache.salt)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert expected[0] != expected[-1]


def test_samples_are_used_only_at_their_temperature(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:4], identity_of(text, "sampled", temperature=1.5)), text)
    arguments = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    assert teacher_source(live.models[0], cache, DistillationArguments(temperature=1.5, **arguments), text)[0] is cache
    with pytest.raises(
        ValueError, match=r"temperature=2.0, but the cache was drawn at 1.5 .* --temperature 1.5, or .*cache --temperature 2"
    ):
        teacher_source(live.models[0], cache, DistillationArguments(temperature=2.0, **arguments), text)


@pytest.mark.parametrize(("kind", "divergence"), [("topk", "jsd"), ("sampled", "forward_kl")])
def test_cached_sparse_targets_give_the_loss_of_the_live_ones(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str, divergence: str
) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:8], identity_of(text, kind, temperature=2.0)))
    batch = view(examples[:8], cache.salt)
    targets = cache.targets(batch)
    student = torch.randn(len(batch.scored), len(text), generator=torch.Generator().manual_seed(0))
    if isinstance(targets, TopK):
        truth = kd.topk_logprobs(live.targets(batch), 8, 2.0)
        exact = kd.distillation_loss(student, truth, divergence=divergence, temperature=2.0)
        # float16 changes each log-probability by at most 2^-10 of itself (see above), and the loss by at most their mean weighted by
        # probability. No log-probability with noticeable weight exceeds 10 nats. T^2 = 4.
        assert abs(kd.distillation_loss(student, targets, divergence=divergence, temperature=2.0) - exact) <= 4 * 10 * 2**-10
        empty = TopK(torch.full_like(targets.ids, -1), torch.zeros_like(targets.logprobs), temperature=2.0)
        assert kd.distillation_loss(student, empty, divergence=divergence, temperature=2.0) == 0, "a row without ids teaches nothing"
    else:
        p = torch.zeros(student.shape).scatter_add_(1, targets.ids.clamp(min=0).long(), targets.counts / 16)
        dense = -(p * torch.log_softmax(student / 2, -1)).sum(-1).mean() * 4
        torch.testing.assert_close(kd.distillation_loss(student, targets, divergence=divergence, temperature=2.0), dense)


def test_lookup_works_for_shuffled_packed_and_small_batches(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples, identity_of(text, "topk")))
    by_key = {example.key(): cache.targets(view([example], cache.salt)) for example in examples}
    order = random.Random(1).sample(examples, len(examples))
    for packed in (None, 64):
        for size in (1, 3, 40):
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                targets = cache.targets(view(batch, cache.salt, packed))
                items = batch if packed is None else [example for item in pack(batch, packed) for example in item]
                assert torch.equal(targets.ids, torch.cat([by_key[e.key()].ids for e in items]))
                assert torch.equal(targets.logprobs, torch.cat([by_key[e.key()].logprobs for e in items]))


def test_equal_examples_are_stored_once(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, [*examples[:3], examples[1]], identity_of(text, "topk")))
    assert len(cache) == 3
    assert examples[1].key(cache.salt) in cache


def test_missing_example_is_an_error(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    cache = open_cache(write(tmp_path / "c", live, examples[:3], identity_of(text, "topk")))
    assert examples[3].key(cache.salt) not in cache
    with pytest.raises(KeyError, match="is not in the cache c, which holds 3"):
        cache.targets(view(examples[2:4], cache.salt))
    with pytest.raises(KeyError):  # keys with another salt
        cache.targets(view(examples[:2], ""))
    with pytest.raises(CacheError, match="needs the key and the token count"):
        cache.targets(view(examples[:2]))
    shorter = dataclasses.replace(view(examples[:1], cache.salt), counts=(1,), scored=torch.tensor([0]))
    with pytest.raises(CacheError, match="has 1 scored tokens"):
        cache.targets(shorter)


# Interruptions


class Killed(BaseException):
    """Stand for SIGKILL. Error handling must not catch it, so it is not an ``Exception``."""


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_writer_killed_at_every_step_ends_with_the_same_bytes(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the writer before its first, second, ... call of ``os.replace`` or ``os.fsync``, and write again."""
    ten = examples[:10]
    size = {"topk": 700, "hidden": 2048}[kind]
    whole = bytes_of(write(tmp_path / "whole", live, ten, identity_of(text, kind), shard_bytes=size))
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
                write(out, live, ten, identity_of(text, kind), shard_bytes=size)
            except Killed:
                if bytes_of(out) != whole:  # the last step only calls fsync
                    with pytest.raises(CacheError, match=r"unfinished|no manifest"):
                        open_cache(out)
            else:
                break
        assert bytes_of(write(out, live, ten, identity_of(text, kind), shard_bytes=size)) == whole
    assert at > 15, "the writer took several steps"


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


def test_writer_after_sigkill_ends_with_the_same_bytes_and_locks_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "writer.py"
    script.write_text(SLOW_WRITER)

    def start(out: Path, pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(out), str(pause)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def write_in_process(out: Path) -> None:
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
                write_in_process(out)
        time.sleep(moment.uniform(0, 0.1))
        assert running.poll() is None
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        assert not json.loads((out / "manifest.json").read_text())["complete"]
    write_in_process(out)
    write_in_process(tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert len(open_cache(out)) == 100, "20 of the 120 examples are repeated"


def test_damaged_shard_is_written_again(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any) -> None:
    for kind, damaged in (("topk", "000001.parquet"), ("hidden", "head.safetensors")):
        out = write(tmp_path / kind, live, examples, identity_of(text, kind))
        whole = bytes_of(out)
        (out / damaged).write_bytes(whole[damaged][:-7])
        assert bytes_of(write(out, live, examples, identity_of(text, kind))) == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 4}, "k: 8 in the cache, 4 now"),
        ({"temperature": 1.0}, "temperature: 2.0 in the cache, 1.0 now"),
        ({"revision": "2"}, "the teacher's revision"),
        ({"teacher_dtype": "bfloat16"}, "the teacher's dtype"),
    ],
)
def test_cache_of_another_command_is_not_continued(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, changed: dict[str, Any], message: str
) -> None:
    out = write(tmp_path / "c", live, examples[:4], identity_of(text, "topk"))
    before = bytes_of(out)
    with pytest.raises(CacheError, match="made from something else") as error:
        write(out, live, examples[:4], identity_of(text, "topk", **changed))
    assert message in str(error.value)
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
def test_nan_from_the_teacher_is_refused(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, kind: str) -> None:
    class Broken:
        vocab_size = len(text)

        def targets(self, view: View) -> Any:
            side = live.targets(view)
            return dataclasses.replace(side, hidden=side.hidden * torch.nan)

    with pytest.raises(CacheError, match="not finite"):
        write(tmp_path / "c", Broken(), examples[:2], identity_of(text, kind))


# Damage and other teachers


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


@pytest.mark.parametrize("damage_name", DAMAGE)
def test_damage_raises_with_the_file_and_the_reason(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, damage_name: str
) -> None:
    out = write(tmp_path / "c", live, examples[:12], identity_of(text, "topk"), shard_bytes=1024)
    open_cache(out, text)
    damage, message = DAMAGE[damage_name]
    damage(out)
    with pytest.raises(CacheError, match=message):
        open_cache(out, text)


@pytest.mark.parametrize("name", ["000000.safetensors", "head.safetensors"])
def test_damaged_hidden_states_are_refused(tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any, name: str) -> None:
    out = write(tmp_path / "c", live, examples, identity_of(text, "hidden"))
    flip(out / name, 0.9)
    with pytest.raises(CacheError, match=rf"{name} is damaged"):
        open_cache(out)


def test_another_tokenizer_template_or_teacher_raises_with_its_name(
    tmp_path: Path, live: LiveTeacher, examples: list[Example], text: Any
) -> None:
    out = write(tmp_path / "c", live, examples[:3], identity_of(text, "topk"))
    text(["one", "two words"], padding=True)  # a call leaves state in the tokenizer, which must not matter
    open_cache(out, text, teacher="tiny", revision="1")
    changed = tiny.tokenizer()
    changed.add_tokens(["new"])
    with pytest.raises(CacheError, match="the tokenizer"):
        open_cache(out, changed)
    changed = tiny.tokenizer()
    changed.chat_template = tiny.TEMPLATE.replace(": ", ":")
    with pytest.raises(CacheError, match="the chat template"):
        open_cache(out, changed)
    with pytest.raises(CacheError, match=r"revision \(revision: 1 in the cache, 2 now\)"):
        open_cache(out, text, revision="2")
    with pytest.raises(CacheError, match=r"teacher \(teacher: tiny in the cache, large now\)"):
        open_cache(out, text, teacher="large")
