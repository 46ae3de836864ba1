"""A resumed run is the uninterrupted one, or it is refused: settings, models, data, checkpoints, lengths."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
import runs
from runs import killed_at, log, run_in, summary, weights


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


def check_that_a_killed_run_ends_the_same(home: Path, options: dict[str, Any], step: int) -> None:
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
        if "eval_on_start" not in options:  # which evaluates at every start
            assert log(resumed) == log(whole)


@settings(max_examples=4, **ONCE)
@given(LENGTHS, EVALUATIONS, LOSSES, OTHERS, st.integers(0, 9))
def test_a_killed_run_ends_as_the_uninterrupted_one(
    home: Path, length: dict[str, Any], evaluation: dict[str, Any], loss: dict[str, Any], others: dict[str, Any], step: int
) -> None:
    check_that_a_killed_run_ends_the_same(home, {**length, **others, **loss, **evaluation}, step)


@pytest.mark.sweep
@settings(max_examples=150, **ONCE)
@given(LENGTHS, EVALUATIONS, LOSSES, OTHERS, st.integers(0, 9))
def test_many_killed_runs_end_as_the_uninterrupted_ones(
    home: Path, length: dict[str, Any], evaluation: dict[str, Any], loss: dict[str, Any], others: dict[str, Any], step: int
) -> None:
    check_that_a_killed_run_ends_the_same(home, {**length, **others, **loss, **evaluation}, step)
