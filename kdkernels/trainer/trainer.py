"""``DistillationTrainer``: ``transformers.Trainer`` with the loss of this package."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import TensorBoardCallback

from ..data.agreement import check_ids
from ..data.collator import Collator, pack, pad_id
from ..data.example import Example
from ..data.streaming import ExampleStream
from ..data.templates import date_of
from ..data.tokenization import length_limit, load_examples
from ..divergences import parse
from ..support.memory import peak_bytes
from ..tap.head import HeadTap
from ..tap.packing import check_packing
from ..tap.patching import text_config, unwrap
from ..tap.weights import embedding_rows
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .arguments import METRICS, DistillationArguments
from .checkpoints import (
    CheckpointError,
    begin,
    best_of,
    check_same,
    data_digest,
    finish,
    last_whole,
    read_manifest,
    settings_of,
    surplus,
    teacher_digest,
)
from .features import PROJECTORS, FeatureTap
from .finite import check_numbers, not_finite
from .hooks import HookedTrainer, uses_flash_attention
from .objective import TERMS, Objective
from .rollouts import chosen, rollouts
from .setup import SavedConfig, Untaught, check_kept, check_teacher_tokenizers, seeded, teacher_source, warn_of_missing, warn_of_student
from .windows import EpochEnd, LogWindow

__all__ = ["DistillationTrainer"]

STREAM = "stream.json"
"""The file of a checkpoint that holds the position in streamed data."""


class DistillationTrainer(HookedTrainer):
    """Distil ``teacher`` into ``model``.

    The loss of a step is the sum over its scored tokens divided by their number in the whole step, over all micro-batches and ranks, so
    it does not depend on how the step is split. For a mixture-of-experts student, its auxiliary loss is added, averaged over these tokens.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        teacher: a model, several (``args.ensemble_mode``), or a teacher source such as a cache; None with ``kd_weight=0``.
        args: DistillationArguments.
        train_dataset, eval_dataset: rows, a ``datasets.Dataset``, a file (see ``load_examples``), or ``Example`` objects; for evaluation
            also a dictionary of several.
        processing_class: the tokenizer of both models.
        teacher_processing_class: the teacher's tokenizer, or a list for several teachers, to be compared with ``processing_class``.

    Raises:
        TypeError, ValueError: arguments, models or data do not match; the message says which, and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | TeacherSource | None = None,
        args: DistillationArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args must be DistillationArguments, got {type(args).__name__}")
        if processing_class is None:
            raise TypeError("processing_class is missing: pass the tokenizer of student and teacher")
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise TypeError(f"{name} would never be called: logits are not stored, and the arguments define the loss. Omit it")
        if isinstance(train_dataset, Mapping):
            raise TypeError(f"train_dataset is a mapping ({', '.join(map(str, train_dataset))}): pass one of its data sets")
        if isinstance(train_dataset, ExampleStream):
            args.train_sampling_strategy = "sequential"  # it is shuffled already
        check_teacher_tokenizers(processing_class, teacher_processing_class)
        self.teacher, self.vocab_size = teacher_source(model, teacher, args, processing_class)
        warn_of_student(model, processing_class, sharded=args.deepspeed_plugin is not None)
        live = self.teacher.models if isinstance(self.teacher, LiveTeacher) else []
        self.max_length = length_limit(args.max_length, map(text_config, [model, *live]), args.packing)
        self._embeddings = embedding_rows(model, *live)
        features = None
        if args.feature_weight > 0:
            with seeded(args.seed):  # for the initial weights of the projectors
                features = FeatureTap(model, live[0], args.feature_layers, args.feature_loss)
        self.objective = Objective(
            HeadTap(model, self.vocab_size), self.teacher, features, args.feature_weight, parse(args.divergence),
            args.temperature, args.t_squared, args.kd_weight, args.ce_weight, args.memory_budget,
        )  # fmt: skip
        collator = Collator(
            pad_id=pad_id(processing_class, self._embeddings),
            packed=args.packing,
            flat=args.packing and uses_flash_attention(unwrap(model)),
            kd_on_prompt=args.kd_on_prompt,
            salt=None if live or self.teacher is None else getattr(self.teacher, "salt", ""),
            keep=args.on_policy_fraction > 0,
            multiple=16,
            limit=self.max_length,
        )
        self.tokenizer, self._overlong, self._packing = processing_class, args.overlong, args.packing
        self._reasoning, self._columns = args.reasoning, args.columns
        day = date_of(processing_class, args.template_date or getattr(self.teacher, "date", None))
        # Saved in the arguments, so that a resumed run uses the same date in its prompts.
        self._date = args.template_date = None if day is None else day.isoformat()
        self._learn = args.learn = args.learn or getattr(self.teacher, "learn", None)
        self._as_given, self._prompts_suffice = SavedConfig(model), args.on_policy_fraction == 1
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=self.items(train_dataset),
            eval_dataset=self.items(eval_dataset, held_out=True), processing_class=processing_class,
            callbacks=[EpochEnd(), *(kwargs.pop("callbacks", None) or [])], **kwargs,
        )  # fmt: skip
        # compute_loss divides a sum by the number of items of the whole step.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._sums, self._eval_sums = (torch.zeros(len(TERMS), dtype=torch.float64, device=args.device) for _ in range(2))
        self._logged = LogWindow(args.device)
        self._evaluated = self.objective
        self._checked = not args.packing
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # otherwise an evaluation creates ./runs
                callback.logging_dir = str(Path(args.output_dir, "runs"))
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.place(args.device)

    def items(self, source: Any, held_out: bool = False) -> Any:
        """Return the items of batches for any source of rows.

        Args:
            held_out: rows for an evaluation. They need a response even if the student writes all its training responses. If some are
                missing in a cache, the evaluation is without a teacher.
        """
        if source is None or isinstance(source, ExampleStream) or (isinstance(source, list) and source and isinstance(source[0], tuple)):
            return source
        if isinstance(source, Mapping):
            return {name: self.items(part, held_out) for name, part in source.items()}
        if isinstance(source, list) and source and isinstance(source[0], Example):
            examples = source
            if self.max_length is not None and (most := max(map(len, examples))) > self.max_length:
                raise ValueError(f"an example has {most} tokens, more than max_length={self.max_length}: leave it out or shorten it")
        else:
            examples = load_examples(
                source,
                self.tokenizer,
                max_length=self.max_length,
                overlong=self._overlong,
                date=self._date,
                reasoning=self._reasoning,
                columns=self._columns,
                learn=self._learn,
                prompts=self._prompts_suffice and not held_out,
            )
        check_ids(examples, self.tokenizer, self._embeddings)
        taught = not held_out or warn_of_missing(self.teacher, examples)
        if not held_out:
            check_kept(self.teacher, examples, max_length=self.max_length, reasoning=self._reasoning, learn=self._learn)
        if self._packing:
            assert self.max_length is not None
            items = pack(examples, self.max_length)
        else:
            items = [(example,) for example in examples]
        return items if taught else Untaught(items)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, like the base class.

        Args:
            resume_from_checkpoint: a checkpoint of the same training, or True for the newest complete one in the output folder.

        Raises:
            ValueError: no parameter of the student is trainable, or (``CheckpointError``) the checkpoint is incomplete or has other
                settings, data or teacher.
            NotFiniteError: loss, gradient norm or weights reached NaN or infinity. Earlier checkpoints remain.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("every parameter of the student is frozen: unfreeze some, or load its adapter with is_trainable=True")
        folder: Path | None = None
        if resume_from_checkpoint is True:
            folder = last_whole(Path(self.args.output_dir))
            if folder is None:
                raise CheckpointError(f"resume_from_checkpoint=True, but {self.args.output_dir} holds no whole checkpoint")
        elif resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
        if folder is not None:
            check_same(folder, self._identity())
        self.forget_evaluation()
        self._limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            None,
        )  # transformers counts every checkpoint-* folder
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self.args.save_total_limit = self._limit

    def _identity(self) -> dict[str, Any]:
        """Return settings, data and teacher of this training, as saved in checkpoints."""
        return {"settings": settings_of(self.args), **self._content}

    @functools.cached_property
    def _content(self) -> dict[str, str]:
        data = self.train_dataset
        return {
            "data": data.identity if isinstance(data, ExampleStream) else data_digest(data), "teacher": teacher_digest(self.teacher),
        }  # fmt: skip

    def training_initialised(self, checkpoint: Path | None, max_steps: int) -> None:
        if isinstance(self.train_dataset, ExampleStream):
            if checkpoint is None:
                self.train_dataset.begin()
            else:
                self.train_dataset.restore(json.loads((checkpoint / STREAM).read_bytes()))
        self._sums.zero_()
        self._logged = LogWindow(self.args.device, self.state.global_step)
        if checkpoint is not None:
            manifest = read_manifest(checkpoint)
            self.state.compute_steps(self.args, max_steps)  # otherwise the checkpoint's values would be used
            best = best_of(checkpoint, manifest)
            self.state.best_model_checkpoint = None if best is None else str(best)
            self._logged = LogWindow.restored(manifest["log"], self.args.device)
            if self.args.process_index == 0:  # sums of all ranks
                self._sums += torch.tensor(manifest["log"]["sums"], dtype=torch.float64, device=self.args.device)

    def training_ended(self) -> None:
        self._check_finite()

    def _check_finite(self) -> None:
        """Check the losses since the last log and the trained weights.

        Raises:
            NotFiniteError: on every rank, if one of them is not finite.
        """
        loss = self.accelerator.reduce(self._logged.loss, "mean").item()
        bad = int(self.accelerator.reduce(not_finite(self.model).to(self.args.device), "sum"))
        values = {"loss": loss, "weights": math.nan if bad else 0.0}
        check_numbers(self.state.global_step, values)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step. On-policy responses are sampled here, before tokens are counted."""
        if isinstance(self.train_dataset, ExampleStream):
            self.train_dataset.forget(self.state.global_step)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args, wrote = self.args, False
        for micro, batch in enumerate(batches):
            place = args.seed, self.state.global_step, micro
            if args.on_policy_fraction > 0 and chosen(args.on_policy_fraction, *place):
                written = rollouts(
                    self.model, batch["items"], self.tokenizer, temperature=args.sample_temperature, max_new_tokens=args.max_new_tokens,
                    max_length=self.max_length, vocab_size=self.vocab_size, place=(*place, args.process_index),
                )  # fmt: skip
                if self._packing and self.max_length:  # the sampled responses have other lengths
                    written = pack([example for item in written for example in item], self.max_length)
                batches[micro] = {**self.on_device(self.data_collator(written)), "on_policy": True}
                wrote = True
        return batches, self.count_items(batches, device) if wrote else num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return the sum over the batch's scored tokens divided by ``num_items_in_batch``, their number in the whole step."""
        self._check_packing(model)
        self._logged.begin()
        items = num_items_in_batch if num_items_in_batch is not None else inputs["scored"].numel()
        of_all = self.args.average_tokens_across_devices and num_items_in_batch is not None
        loss, sums = self.objective_now()(
            model, inputs, num_items=torch.as_tensor(items, device=inputs["scored"].device).clamp(min=1),
            ranks=self.accelerator.num_processes // self.get_tp_size() if of_all else 1,
        )  # fmt: skip
        self._sums += sums
        self._logged.loss += loss.detach()
        return (loss, {"loss": loss}) if return_outputs else loss

    def objective_now(self) -> Objective:
        """Return the objective of this step, with ``ce_weight`` on the line to ``ce_weight_last``.

        Evaluations use the initial ``ce_weight``, so that they can be compared.
        """
        first, last = self.args.ce_weight, self.args.ce_weight_last
        if last is None:
            return self.objective
        done = min(self.state.global_step / max(1, self.state.max_steps - 1), 1.0)
        return dataclasses.replace(self.objective, ce_weight=first + (last - first) * done)

    def _check_packing(self, model: nn.Module) -> None:
        if self._checked:
            return
        check_packing(self.objective.tap, model, self.args.device)
        if isinstance(self.teacher, LiveTeacher):
            for tap, teacher in zip(self.teacher.taps, self.teacher.models, strict=True):
                check_packing(tap, teacher, next(teacher.parameters()).device)
        self._checked = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the log: the terms of the loss, averaged over the scored tokens of all ranks since the last log; speed; memory.

        Raises:
            NotFiniteError: after logging, if the loss or the gradient norm is NaN or infinite.
        """
        steps = self.state.global_step - self._logged.step
        if "loss" in logs and steps > 0:
            logs["loss"] = self.accelerator.reduce(self._logged.loss, "mean").item() / steps
            logs.update(self._means(self.accelerator.reduce(self._sums, "sum"), self.objective))
            logs.pop("objective")  # equals the loss, but averaged over tokens instead of steps
            logs["valid_tokens"] = tokens = logs.pop("tokens")
            logs["tokens_per_second"] = tokens / max(self._logged.seconds(), 1e-9)
            if (peak := peak_bytes(self.args.device)) is not None:
                logs["peak_memory_mib"] = peak / 2**20
            self._sums.zero_()
            self._logged = LogWindow(self.args.device, self.state.global_step)
            self._logged.begin()
        super().log(logs, start_time)
        scaled = self.accelerator.scaler is not None  # fp16 skips steps whose gradient overflows
        check_numbers(self.state.global_step, {n: logs[n] for n in ("loss", *(() if scaled else ("grad_norm",))) if n in logs})

    @contextmanager
    def outside_steps(self) -> Iterator[None]:
        self._logged.pause()  # evaluations and checkpoints do not count as training time
        yield
        self._logged.resume()

    def best_found(self) -> None:
        """Save the best model if it is loaded at the end, even between two checkpoints."""
        if self.args.load_best_model_at_end:
            self.control.should_save = True

    @staticmethod
    def _means(sums: Tensor, objective: Objective) -> dict[str, float]:
        """Return the mean of each term of the objective by name, and the number of tokens."""
        values = dict(zip(TERMS, sums.tolist(), strict=True))
        tokens = values.pop("tokens")
        if objective.kd_weight == 0:
            values = {name: values[name] for name in ("cross_entropy", "feature_loss", "aux_loss", "objective")}
        if objective.features is None:
            del values["feature_loss"]
        if objective.tap.aux_coefficient is None:
            del values["aux_loss"]
        return {**{name: value / max(tokens, 1) for name, value in values.items()}, "tokens": tokens}

    # Evaluation

    def eval_metrics(self) -> list[str]:
        """Return the names of the metrics that evaluations report, without ``eval_``."""
        if isinstance(self.eval_dataset, Untaught):
            return ["cross_entropy"]
        means = self._means(torch.zeros(len(TERMS)), self.objective)
        return ["loss", *(name for name in means if name in METRICS)]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate, like the base class, also on rows. Every metric is a mean over all scored tokens."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        metrics: dict[str, float] = super().evaluate(
            eval_dataset if named else self.items(eval_dataset, held_out=True), ignore_keys, metric_key_prefix
        )
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Return the metrics of ``evaluate``, also for rows. The predictions are None because logits are not stored."""
        return super().predict(self.items(test_dataset, held_out=True), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_sums.zero_()
        taught = not isinstance(dataloader.dataset, Untaught)
        self._evaluated = self.objective if taught else self.objective.without_teacher()
        self.shard_for_evaluation()
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config if self.is_deepspeed_enabled else {}
        optimizer = {name: part for name, part in config.items() if name == "optimizer"}
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # evaluations must not affect the training
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        config.update(optimizer)  # transformers removes it for an evaluation-only engine
        means = self._means(self._eval_sums, self._evaluated)
        means.pop("aux_loss", None)  # a mean over batches, not over tokens
        means["loss"] = means.pop("objective")
        if not taught:  # not the training loss
            del means["loss"], output.metrics[f"{metric_key_prefix}_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return ``(loss, None, None)``, the mean over this batch.

        The metrics use the sums per item instead, without the copies that pad the last batch across ranks.
        """
        self._check_packing(model)
        with torch.no_grad():
            _, sums = self._evaluated(model, self.on_device(inputs), each=True)
        own = sums.sum(0)
        self._eval_sums += self.accelerator.gather_for_metrics(sums).sum(0)
        return (own[TERMS.index("objective")] / own[TERMS.index("tokens")].clamp(min=1)).float(), None, None

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student for ``from_pretrained``, and ``projector.safetensors`` if features were distilled."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and not _internal_call and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self.save_gathered(output_dir)
        if self.objective.features is not None:
            self.objective.features.save(output_dir or self.args.output_dir, write=self.args.should_save)

    def saving_weights(self) -> AbstractContextManager[None]:
        return self._as_given

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in state_dict.items() if f"{PROJECTORS}." not in name}

    @contextmanager
    def saving_checkpoint(self, folder: Path) -> Iterator[None]:
        """Write a checkpoint if the training is finite, mark it as complete, then remove older ones.

        Raises:
            NotFiniteError: before anything is written.
        """
        self._check_finite()
        first = self.args.process_index == 0
        if first:
            self.claim_checkpoint(folder)
            begin(folder)
        self.accelerator.wait_for_everyone()
        yield
        log = {**self._logged.state(self.accelerator), "sums": self.accelerator.reduce(self._sums, "sum").tolist()}
        self.accelerator.wait_for_everyone()  # each rank writes some files
        if first:
            if isinstance(self.train_dataset, ExampleStream):
                (folder / STREAM).write_text(json.dumps(self.train_dataset.state(self.state.global_step)), encoding="utf-8")
            best = self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint).name
            finish(folder, step=self.state.global_step, resumable=not self.args.save_only_model, best=best, log=log, **self._identity())
            for old in surplus(folder.parent, self._limit, {folder.name} | ({best} if best else set())):
                self.remove_checkpoint(old)
        self.accelerator.wait_for_everyone()

    def claim_checkpoint(self, folder: Path) -> None:
        """Prepare the folder of a new checkpoint. Called in the first process."""

    def remove_checkpoint(self, folder: Path) -> None:
        """Delete a checkpoint beyond ``save_total_limit``. Called in the first process."""
        shutil.rmtree(folder)

    def weights_loaded(self, folder: Path) -> None:
        if self.objective.features is not None:
            self.objective.features.load(folder)
