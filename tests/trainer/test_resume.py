"""A resumed run equals the uninterrupted one, or raises: other settings, models, data, checkpoints and lengths."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
import runs
from runs import killed_at, log, run_in, summary, weights
from training import make_model, make_rows, make_tokenizer

from kdkernels.cli.train.record import Record, _sha256
from kdkernels.cli.train.settings import TrainError
from kdkernels.trainer.checkpoints import FREE, MANIFEST, flaw


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_home(tmp_path_factory.mktemp("home"))


ONCE: Any = {
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),
}  # runs are too slow to shrink
LENGTHS = st.sampled_from([{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1}, {"max_steps": -1, "num_train_epochs": 1.4}])
EVALUATIONS = st.sampled_from([
    {}, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "epoch"},
    {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "top1_agreement"},
    {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "cross_entropy"},
    {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patience": 0}'},
])  # fmt: skip
LOSSES = st.sampled_from([
    {}, {"divergence": "jsd(beta=0.3)", "temperature": 2.0, "ce_weight": 0.5}, {"ce_weight": 1.0, "ce_weight_last": 0.1},
    {"on_policy_fraction": 0.5, "max_new_tokens": 3, "divergence": "reverse_kl"}, {"feature_weight": 0.1}, {"kd_on_prompt": True},
])  # fmt: skip
OTHERS = st.fixed_dictionaries({}, optional={
    "packing": st.just(True), "max_length": st.just(32), "neftune_noise_alpha": st.just(5.0), "gradient_accumulation_steps": st.just(2),
    "dataloader_drop_last": st.just(True), "train_sampling_strategy": st.just("sequential"), "logging_steps": st.sampled_from([1, 3, 0.5]),
    "optim": st.sampled_from(["sgd", "adafactor", "adamw_torch"]), "max_grad_norm": st.just(0.0), "warmup_steps": st.just(0.4),
    "save_total_limit": st.sampled_from([1, 2]), "seed": st.just(7), "bf16": st.just(True), "eval_on_start": st.just(True),
})  # fmt: skip


def check_killed_run(home: Path, options: dict[str, Any], step: int) -> None:
    if "eval_strategy" in options:
        options["eval_data"] = [str(home / "held-out.jsonl")]
    else:
        options.pop("eval_on_start", None)
    if "packing" in options:
        options["max_length"] = 32
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        run_in(home, whole, **{**options, "save_total_limit": None})
        steps = sorted(int(path.name.rpartition("-")[2]) for path in whole.glob("checkpoint-*"))
        resumed = killed_at(steps[step % len(steps)], whole, Path(name, "resumed"))
        run_in(home, resumed, **options)
        assert weights(resumed) == weights(whole)
        assert summary(resumed)["after"] == summary(whole)["after"]
        assert summary(resumed)["log"] == summary(whole)["log"]
        if "eval_on_start" not in options:  # it logs one more evaluation at every start
            assert log(resumed) == log(whole)


@settings(max_examples=4, **ONCE)
@given(LENGTHS, EVALUATIONS, LOSSES, OTHERS, st.integers(0, 9))
def test_resumed_run_equals_the_uninterrupted_one(
    home: Path, length: dict[str, Any], evaluation: dict[str, Any], loss: dict[str, Any], others: dict[str, Any], step: int
) -> None:
    check_killed_run(home, {**length, **others, **loss, **evaluation}, step)


@pytest.mark.sweep
@settings(max_examples=150, **ONCE)
@given(LENGTHS, EVALUATIONS, LOSSES, OTHERS, st.integers(0, 9))
def test_resumed_runs_equal_the_uninterrupted_ones(
    home: Path, length: dict[str, Any], evaluation: dict[str, Any], loss: dict[str, Any], others: dict[str, Any], step: int
) -> None:
    check_killed_run(home, {**length, **others, **loss, **evaluation}, step)


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps with held-out data."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_in(home, out, max_steps=3, eval_data=[str(home / "held-out.jsonl")], lr_scheduler_type="constant")
    return out


def resume(home: Path, out: Path, **options: Any) -> str:
    return run_in(home, out, **{"max_steps": 4, "eval_data": [str(home / "held-out.jsonl")], "lr_scheduler_type": "constant", **options})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_sampling_strategy", "sequential"), ("neftune_noise_alpha", 50.0), ("dataloader_drop_last", True), ("adam_beta2", 0.9),
        ("max_grad_norm", 0.5), ("average_tokens_across_devices", False), ("student_dtype", "bfloat16"), ("data_seed", 1),
    ],
)  # fmt: skip
def test_resume_refuses_another_setting(home: Path, finished: Path, name: str, value: Any) -> None:
    with pytest.raises(TrainError, match=f"holds a run with another --{name.replace('_', '-')} "):
        resume(home, finished, **{name: value})


def test_every_argument_is_compared_or_free_to_change(finished: Path) -> None:
    from kdkernels.trainer import DistillationArguments

    compared = set(Record.read(finished).settings)  # type: ignore[union-attr]
    assert set(DistillationArguments(output_dir="x", use_cpu=True).to_dict()) <= compared | FREE


def changed_home(home: Path, folder: Path, changed: str) -> Path:
    """Copy the models and data with other content in one of them."""
    copy = shutil.copytree(home, folder)
    if changed in ("teacher", "student"):
        make_model(12 if changed == "teacher" else 8, 1, seed=9).save_pretrained(copy / changed)
    elif changed == "tokenizer":
        make_tokenizer(words=["green", "red"]).save_pretrained(copy / "student")
        make_tokenizer(words=["green", "red"]).save_pretrained(copy / "teacher")
    elif changed != "nothing":
        runs.write_rows(copy / f"{changed}.jsonl", make_rows(7, seed=5))
    return copy


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("teacher", "the --teacher's weights"), ("student", "the --student's weights"), ("tokenizer", "the tokenizer"),
        ("train", "--data"), ("held-out", "--eval-data"),
    ],
)  # fmt: skip
def test_resume_refuses_other_models_and_data(home: Path, finished: Path, tmp_path: Path, changed: str, message: str) -> None:
    with pytest.raises(TrainError, match=f"with another {message}"):
        resume(changed_home(home, tmp_path / "home", changed), finished)


def test_resume_accepts_the_same_files_in_another_folder(home: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "moved")
    printed = resume(changed_home(home, tmp_path / "home", "nothing"), out, save_steps=2, logging_steps=1, memory_budget=1 << 20)
    assert "Resuming at checkpoint-3" in printed
    assert "Note: another memory budget (None then, 1048576 now)" in printed
    assert summary(out)["steps"] == 4


def test_damaged_checkpoints_are_found_by_their_manifest(home: Path, finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoint-3"
    assert flaw(checkpoint) is None
    names = [path.name for path in checkpoint.iterdir()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", MANIFEST} <= set(names)
    for number, name in enumerate(names):
        for damage in ("missing", "shorter", "changed"):
            copy = shutil.copytree(checkpoint, tmp_path / f"{number}-{damage}")
            content = bytearray((copy / name).read_bytes())
            (copy / name).unlink()
            if damage != "missing":
                content[len(content) // 2] ^= 255
                (copy / name).write_bytes(content[:-1] if damage == "shorter" else content)
            if name != MANIFEST or damage == "missing":
                assert flaw(copy) is not None, (name, damage)


def test_resume_uses_an_earlier_checkpoint_or_raises(home: Path, finished: Path, tmp_path: Path) -> None:
    out = killed_at(3, finished, tmp_path / "out")
    (out / "checkpoint-3" / "optimizer.pt").unlink()
    assert "Resuming at checkpoint-2" in resume(home, out, max_steps=3)
    assert weights(out) == weights(finished)
    out = killed_at(1, finished, tmp_path / "none")
    (out / "checkpoint-1" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(TrainError, match=r"no checkpoint is whole\. checkpoint-1: scheduler\.pt is not as it was written"):
        resume(home, out)


def test_resume_uses_the_requested_checkpoint_or_raises(home: Path, finished: Path, tmp_path: Path) -> None:
    for checkpoint, message in (
        (tmp_path / "nowhere", "no such folder"),
        (home / "student", "no checkpoint.json"),
        ("true", "holds no whole"),
    ):
        with pytest.raises(TrainError, match=message):
            resume(home, tmp_path / "fresh", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(TrainError, match="choose another --output-dir to begin anew"):
        resume(home, finished, resume_from_checkpoint="false")
    printed = resume(home, tmp_path / "copy", max_steps=3, resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert "Resuming at checkpoint-1" in printed
    assert weights(tmp_path / "copy") == weights(finished)
    with pytest.raises(TrainError, match="with another --temperature"):
        resume(home, tmp_path / "other", temperature=3.0, resume_from_checkpoint=str(finished / "checkpoint-1"))


def test_longer_run_trains_only_the_missing_steps(home: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    resume(home, out, max_steps=-1, num_train_epochs=1)  # 6 steps
    assert summary(out)["steps"] == 6
    resume(home, tmp_path / "whole", max_steps=6)
    assert weights(out) == weights(tmp_path / "whole")
    assert "This run is finished" in resume(home, out, max_steps=6)
    with pytest.raises(TrainError, match="a run of 6 steps already, and 4 are asked for"):
        resume(home, out, max_steps=4)


def test_step_after_a_decayed_schedule_changes_the_weights(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_in(home, out, max_steps=2, lr_scheduler_type="linear")
    before = weights(out)
    run_in(home, out, max_steps=3, lr_scheduler_type="linear", save_steps=1)
    assert weights(out) != before
    assert log(out)[-1]["step"] == 3


def test_resume_refuses_the_record_of_another_version(home: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "run.json").write_text(json.dumps({"settings": {"student": "x", "teacher": [], "ranks": 1}, "before": None}))
    with pytest.raises(TrainError, match=r"run\.json was written by another version of kdkernels"):
        resume(home, out)


def test_file_is_hashed_again_only_if_its_status_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    fresh = _sha256(path, None)
    assert not fresh[-1], "a file written less than a second ago is not trusted"
    trusted = [*fresh[:-1], True]
    assert _sha256(path, trusted) is trusted
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time
    assert _sha256(path, trusted)[0] != trusted[0]
