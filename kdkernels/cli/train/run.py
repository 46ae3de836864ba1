"""``kdkernels train``, step by step: models and data, a plan, the training (begun or resumed), and a summary."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from ...data.tokenization import length_limit
from ...support.files import Output
from ...tap.patching import text_config
from ...tap.weights import embedding_rows
from ...teachers.adapters import CONFIG
from ...teachers.loading import skeleton_of
from ...trainer.arguments import METRICS, metric_name
from ...trainer.checkpoints import best_of, checkpoints, flaw, read_manifest
from ...trainer.finite import NotFiniteError, check_numbers
from ...trainer.hooks import use_one_gpu
from ...trainer.trainer import DistillationTrainer
from .callbacks import Bar, Interrupt, LogFile, Samples, reporting_under
from .data import RunData, read_data
from .loading import cache_of, check_data, student_of, student_skeleton, teachers_of, tokenizer_of
from .merged import write_merged
from .output import LOG, MERGED, RECORD, SUMMARY, OwnedTrainer, begun_checkpoints, check_output, open_output, save_model
from .publish import Publication
from .record import Record, check_expected, resolved
from .resume import choose_learn, finished_summary, is_last, known_record, model_folder, starting_point
from .settings import RESOLVED, Settings, TrainError
from .steps import steps_per_epoch, total_steps
from .summary import figure_of, finite, name_of_loss, show, training_log

__all__ = ["run"]

UNFINISHED = ".checkpoint.unfinished"


def run(settings: Settings, console: Console) -> int:
    """Train, or continue an interrupted run with the same settings. Return the exit status: 0, or 130 if interrupted.

    Raises:
        TrainError: invalid settings, models or data, before anything is written.
        FileError: another process trains into the folder.
        NotFiniteError: the training reached NaN or infinity; summary and figure show the step.
    """
    with open_output(settings) if settings.args.process_index == 0 else nullcontext() as output:
        if output is not None:
            check_output(output, settings)
        return _run(settings, console, output)


def _run(settings: Settings, console: Console, output: Output | None) -> int:
    """Train into ``output``, which the first process has locked; None in the other processes."""
    args = settings.args
    use_one_gpu(args)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    console = console if args.process_index == 0 else Console(quiet=True)
    transformers.logging.set_verbosity(transformers.logging.ERROR if args.log_level == "passive" else args.get_process_log_level())
    transformers.logging.disable_progress_bar()
    out = Path(args.output_dir)
    check_data(settings)
    tokenizer = tokenizer_of(settings)
    skeletons = [student_skeleton(settings), *(skeleton_of("teacher", path) for path in settings.teacher)]
    cache = cache_of(settings, tokenizer) if settings.cache else None
    choose_learn(args, cache)
    record, old = known_record(settings, tokenizer)
    check_expected(settings, record, console)
    publication = Publication.of(settings)
    if output is not None:
        for name in begun_checkpoints(output):
            output.remove(name)
    checkpoint = None
    if old is not None:
        total = total_steps(args, old.an_epoch)
        summary = finished_summary(args, total)
        if summary is not None:
            console.print("This run is finished; its summary again. Give a larger --max-steps to train on, or another --output-dir.")
            show(summary, console)
            if settings.adapter.merge and not (out / MERGED).exists():
                write_merged(settings, output, console)
            if publication is not None:
                publication.push(output, summary, console)
            return 0
        for note in old.notes(record):
            console.print(f"Note: another {note}: the last bits of the result may be others", markup=False)
        checkpoint = starting_point(args, total)
    limit = length_limit(args.max_length, map(text_config, skeletons), args.packing)
    with shown_warnings(console):  # read the data before any weights, so that its errors come early
        data = read_data(settings, tokenizer, cache, limit, embedding_rows(*skeletons), content=record.content["data"])
    with reporting_under(out):
        return Training(settings, output, tokenizer, cache, console, record, old, checkpoint, data).run(publication)


class Training:
    """A run from its models to its summary.

    Args:
        output: the output folder in the first process; None in the others.
        record: record of the requested run; old: record of the run that it continues, or None.
        checkpoint: the checkpoint to continue from, or None.
    """

    def __init__(
        self,
        settings: Settings,
        output: Output | None,
        tokenizer: Any,
        cache: Any,
        console: Console,
        record: Record,
        old: Record | None,
        checkpoint: Path | None,
        data: RunData,
    ) -> None:
        self.settings, self.args, self.console, self.record, self.old = settings, settings.args, console, record, old
        self.output, self.out = output, Path(settings.args.output_dir)
        self.bar, self.interrupt, self.log = Bar(console), Interrupt(), LogFile(output, LOG)
        self.trained = old is not None and is_last(checkpoint, total_steps(self.args, old.an_epoch))
        self.model = model_folder(checkpoint, self.args) if self.trained and checkpoint is not None else None
        student = student_of(settings, self.model)
        teachers = teachers_of(settings)
        with shown_warnings(console):
            self.trainer = OwnedTrainer(
                model=student, teacher=teachers or None if cache is None else cache, args=self.args, train_dataset=data.train,
                eval_dataset=data.held_out, processing_class=tokenizer,
                callbacks=[self.bar, self.interrupt, self.log],
            )  # fmt: skip
        self.trainer.output = output
        reports = settings.reports
        if reports.sample_every is not None:
            prompts = prompts_of(self.trainer, reports.sample_prompts)
            self.trainer.add_callback(Samples(reports.sample_every, prompts, tokenizer, self.args.max_new_tokens, self.log, console))
        for callback in (transformers.PrinterCallback, *([transformers.ProgressCallback] if self.args.disable_tqdm else [])):
            self.trainer.remove_callback(callback)
        check_metric(self.trainer)
        self.checkpoint = self._own(checkpoint)

    def _own(self, checkpoint: Path | None) -> Path | None:
        """Return the checkpoint in the output folder. A checkpoint of another run, and its best one, are copied there."""
        if checkpoint is None or checkpoint.parent.resolve() == self.out.resolve():
            return checkpoint
        best = best_of(checkpoint, read_manifest(checkpoint))
        if self.output is not None:
            for folder in {checkpoint, best or checkpoint}:
                unfinished, place = self.output.claim(UNFINISHED), self.output.claim(folder.name)
                self.output.remove(UNFINISHED)
                self.output.remove(folder.name)
                shutil.copytree(folder, unfinished)
                os.replace(unfinished, place)
        self.trainer.accelerator.wait_for_everyone()
        return self.out / checkpoint.name

    def run(self, publication: Publication | None = None) -> int:
        """Train, write the summary, push the model if requested, and return the exit status."""
        trainer = self.trainer
        self._begin()
        transformers.set_seed(self.args.seed)
        try:
            self._train()
            if self.interrupt.stopped:
                return self._interrupted()
            after = trainer.evaluate() if trainer.eval_dataset is not None else None
            check_numbers(trainer.state.global_step, shown_metrics(after))
        except NotFiniteError as error:
            self._summarise(None, not_finite={name: str(value) for name, value in error.values.items()}, steps=error.step)
            raise
        save_model(trainer, self.output, self.out)
        summary = self._summarise(after)
        show(summary, self.console)
        if self.settings.adapter.merge:
            write_merged(self.settings, self.output, self.console)
        if publication is not None:
            publication.push(self.output, summary, self.console)
        return 0

    def _begin(self) -> None:
        """Evaluate the initial student and write the record, or print where the run continues."""
        record, args = self.record, self.args
        if self.old is not None:
            record.an_epoch, record.before = self.old.an_epoch, self.old.before
            if self.checkpoint is not None:
                self.console.print(f"Resuming at {self.checkpoint.name} of {self.out}")
        else:
            self.log.clear()
            record.an_epoch = steps_per_epoch(len(self.trainer.train_dataset), args)
            before = self.trainer.evaluate() if self.trainer.eval_dataset is not None else None
            check_numbers(0, shown_metrics(before))
            record.before = before and finite(before)
        record.settings["template_date"] = args.template_date
        self._write(RECORD, record.to_json())
        if self.output is not None:
            text = resolved(self.settings, record)
            self.output.write(RESOLVED, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _train(self) -> None:
        trainer, checkpoint = self.trainer, self.checkpoint
        if self.trained:
            if trainer.objective.features is not None:
                trainer.objective.features.load(str(self.model))
            trainer.state = transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            trainer.state.best_model_checkpoint = str(self.model) if self.args.load_best_model_at_end else None
            self.log.drop_final_evaluation(trainer.state)
            return
        with self.interrupt, self.bar:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _interrupted(self) -> int:
        step = self.trainer.state.global_step
        reason = flaw(self.out / f"checkpoint-{step}")
        if reason is None:
            self.console.print(f"Interrupted at step {step}; {self.out}/checkpoint-{step} is whole. The same command goes on from there.")
        else:
            self.console.print(f"Interrupted at step {step}. Its checkpoint can't be resumed from: {reason}.")
        return 130

    def _summarise(self, after: dict[str, float] | None, not_finite: dict[str, str] | None = None, steps: int | None = None) -> Any:
        """Write ``summary.json`` and the figure, and return the summary."""
        state, args = self.trainer.state, self.args
        steps = state.global_step if steps is None else steps
        best = state.best_model_checkpoint if args.load_best_model_at_end and not_finite is None else None
        last = next((str(path) for path in checkpoints(self.out) if flaw(path) is None), None)
        files = {path.name: path.stat().st_size for pattern in ("*.safetensors", "config.json", CONFIG) for path in self.out.glob(pattern)}
        summary = {
            "asked": total_steps(args, self.record.an_epoch), "steps": steps, "not_finite": not_finite,
            "before": self.record.before, "after": after and finite(after),
            "model": None if not_finite else str(self.out), "files": {} if not_finite else files,
            "checkpoint": best or last,
            "best": None if best is None else {"metric": args.metric_for_best_model, "value": state.best_metric, "checkpoint": best},
            "figure": None, "log": training_log(state.log_history),
        }  # fmt: skip
        if self.output is not None:
            loss = name_of_loss(args)
            summary["figure"] = figure_of(self.output, state.log_history, self.record.before, after, steps if not_finite else None, loss)
        self._write(SUMMARY, summary)
        return summary

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write a file atomically, only in the first process."""
        if self.output is not None:
            text = json.dumps(value, indent=1) + "\n"
            self.output.write(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def prompts_of(trainer: DistillationTrainer, count: int) -> list[Sequence[int]]:
    """Return the prompts of the first held-out rows or, without any, of the first training rows."""
    held_out = trainer.eval_dataset
    items = trainer.train_dataset if held_out is None else next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
    examples = islice((example for item in items for example in item), count)
    return [example.student_ids[: example.prompts()[0]] for example in examples]


def shown_metrics(metrics: dict[str, float] | None) -> dict[str, float]:
    """Return the metrics of an evaluation that a summary shows. They must be finite."""
    return {name: value for name, value in (metrics or {}).items() if metric_name(name) and isinstance(value, float)}


def check_metric(trainer: DistillationTrainer) -> None:
    """Check the metric for the best model.

    Raises:
        TrainError: ``--metric-for-best-model`` is not a metric of this run's evaluations.
    """
    metric = trainer.args.metric_for_best_model
    if metric is None or trainer.eval_dataset is None:
        return
    name = metric.removeprefix("eval_")
    if name not in METRICS or name not in trainer.eval_metrics():
        raise TrainError(
            f"--metric-for-best-model {metric}: an evaluation of this run has {', '.join(trainer.eval_metrics())}; choose one of them"
        )


@contextmanager
def shown_warnings(console: Console) -> Iterator[None]:
    """Print each warning of this package in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if warning.category is UserWarning:
            console.print(f"Warning: {warning.message}", markup=False)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
