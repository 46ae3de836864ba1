"""``DistillationTrainer``: ``transformers.Trainer`` with the loss of this package."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..data.agreement import check_ids
from ..data.collator import Collator, pack, pad_id
from ..data.example import Example
from ..data.templates import date_of
from ..data.tokenization import length_limit, load_examples
from ..divergences import parse
from ..memory import peak_bytes
from ..tap.head import HeadTap
from ..tap.packing import check_packing
from ..tap.patching import text_config, unwrap
from ..tap.weights import embedding_rows
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .arguments import DistillationArguments
from .features import PROJECTORS, FeatureTap
from .objective import TERMS, Objective
from .rollouts import chosen, rollouts
from .setup import check_kept, teacher_source

__all__ = ["DistillationTrainer"]


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Distils ``teacher`` into ``model``.

    The loss of a step is a sum over its scored tokens divided by their number in the whole step, all micro-batches and ranks together, so
    it does not depend on how the step is split. A mixture-of-experts student's own auxiliary loss is added, averaged over the same tokens.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        teacher: a model, several (``args.ensemble_mode``), or a teacher source such as a cache; None with ``kd_weight=0``.
        args: DistillationArguments.
        train_dataset, eval_dataset: rows, a ``datasets.Dataset``, a file (see ``load_examples``), or ``Example`` objects; for evaluation
            also a dictionary of several.
        processing_class: the tokenizer of both models.

    Raises:
        TypeError, ValueError: arguments, models or data that do not fit together; the message names what, and the way out.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any
    deepspeed: Any

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | TeacherSource | None = None,
        args: DistillationArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args must be DistillationArguments, got {type(args).__name__}")
        if processing_class is None:
            raise TypeError("processing_class is missing: give the tokenizer of student and teacher")
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise TypeError(f"{name} would never be called: no logits are kept, and the loss is that of the arguments")
        if isinstance(train_dataset, Mapping):
            raise TypeError(f"train_dataset is a mapping ({', '.join(map(str, train_dataset))}): give one of its data sets")
        self.teacher, self.vocab_size = teacher_source(model, teacher, args, processing_class)
        live = self.teacher.models if isinstance(self.teacher, LiveTeacher) else []
        self.max_length = length_limit(args.max_length, map(text_config, [model, *live]), args.packing)
        self._embeddings = embedding_rows(model, *live)
        features = FeatureTap(model, live[0], args.feature_layers, args.feature_loss) if args.feature_weight > 0 else None
        self.objective = Objective(
            HeadTap(model, self.vocab_size), self.teacher, features, args.feature_weight, parse(args.divergence),
            args.temperature, args.t_squared, args.kd_weight, args.ce_weight, args.memory_budget,
        )  # fmt: skip
        attention = str(getattr(unwrap(model).config, "_attn_implementation", ""))
        collator = Collator(
            pad_id=pad_id(processing_class, self._embeddings),
            packed=args.packing,
            flat=args.packing and "flash" in attention,
            kd_on_prompt=args.kd_on_prompt,
            salt=None if live or self.teacher is None else getattr(self.teacher, "salt", ""),
            keep=args.on_policy_fraction > 0,
            multiple=16,
            limit=self.max_length,
        )
        self.tokenizer, self._overlong, self._packing = processing_class, args.overlong, args.packing
        self._reasoning = args.reasoning
        day = date_of(processing_class, args.template_date or getattr(self.teacher, "date", None))
        self._date = args.template_date = (
            None if day is None else day.isoformat()
        )  # in the saved arguments: a resumed run writes the same prompts
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=self.items(train_dataset),
            eval_dataset=self.items(eval_dataset), processing_class=processing_class, **kwargs,
        )  # fmt: skip
        # compute_loss divides a sum by the number of items of the whole step.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._sums, self._eval_sums = (torch.zeros(len(TERMS), dtype=torch.float64, device=args.device) for _ in range(2))
        self._logged_at: float | None = None
        self._checked = not args.packing
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.place(args.device)

    def items(self, source: Any) -> Any:
        """What a batch is made of, from anything that holds rows."""
        if source is None or (isinstance(source, list) and source and isinstance(source[0], tuple)):
            return source
        if isinstance(source, Mapping):
            return {name: self.items(part) for name, part in source.items()}
        if isinstance(source, list) and source and isinstance(source[0], Example):
            examples = source
            if self.max_length is not None and (most := max(map(len, examples))) > self.max_length:
                raise ValueError(f"an example has {most} tokens, more than max_length={self.max_length}: leave it out or shorten it")
        else:
            examples = load_examples(
                source, self.tokenizer, max_length=self.max_length, overlong=self._overlong, date=self._date, reasoning=self._reasoning
            )
        check_ids(examples, self.tokenizer, self._embeddings)
        check_kept(self.teacher, examples, max_length=self.max_length, reasoning=self._reasoning)
        if self._packing:
            assert self.max_length is not None
            return pack(examples, self.max_length)
        return [(example,) for example in examples]

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class.

        Raises:
            ValueError: a student of which nothing is trained.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("every parameter of the student is frozen: unfreeze some, or load its adapter with is_trainable=True")
        self._forget_evaluation()
        return super().train(*args, **kwargs)

    def _forget_evaluation(self) -> None:
        """Undoes what an evaluation before the training leaves behind, which would keep it from being wrapped for one."""
        if self.is_deepspeed_enabled and self.deepspeed is not None and self.optimizer is None:  # an engine for inference
            self.deepspeed.destroy()
            self.accelerator._models.remove(self.deepspeed)
            self.accelerator.deepspeed_engine_wrapped = self.deepspeed = None
            self.model_wrapped = self.model
        elif self.model_wrapped is self.model and not self.is_fsdp_enabled:  # marked as prepared: DDP would not be put around it
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step; those that the student writes itself are written here, before tokens are counted."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args, wrote = self.args, False
        for micro, batch in enumerate(batches):
            place = args.seed, self.state.global_step, micro
            if args.on_policy_fraction > 0 and chosen(args.on_policy_fraction, *place):
                written = rollouts(
                    self.model, batch["items"], self.tokenizer, temperature=args.sample_temperature, max_new_tokens=args.max_new_tokens,
                    max_length=self.max_length, vocab_size=self.vocab_size, place=(*place, args.process_index),
                )  # fmt: skip
                if self._packing and self.max_length:  # what is written is not as long as what was there
                    written = pack([example for item in written for example in item], self.max_length)
                batches[micro] = {**self._prepare_inputs(self.data_collator(written)), "on_policy": True}
                wrote = True
        return batches, self._get_num_items_in_batch(batches, device) if wrote else num_items

    def _prepare_input(self, data: Any) -> Any:
        """On this device, but in its own dtype under DeepSpeed too: the only floats are weights of tokens."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Sum over the batch's scored tokens divided by ``num_items_in_batch``, those of the whole step."""
        self._check_packing(model)
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        items = num_items_in_batch if num_items_in_batch is not None else inputs["scored"].numel()
        of_all = self.args.average_tokens_across_devices and num_items_in_batch is not None
        loss, sums = self.objective_now()(
            model, inputs, num_items=torch.as_tensor(items, device=inputs["scored"].device).clamp(min=1),
            ranks=self.accelerator.num_processes // self.get_tp_size() if of_all else 1,
        )  # fmt: skip
        self._sums += sums
        return (loss, {"loss": loss}) if return_outputs else loss

    def objective_now(self) -> Objective:
        """The objective of this step: with the ``ce_weight`` that the line to ``ce_weight_last`` has here. Evaluations take the first, so
        that they can be compared."""
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
        """Adds the terms of the loss, averaged over the scored tokens of all ranks since the last log, and speed and memory."""
        if "loss" in logs and self._logged_at is not None:
            now = time.perf_counter()
            sums = self.accelerator.reduce(self._sums, "sum")
            logs.update(self._means(sums))
            logs.pop("objective")  # the loss of the base class says it, averaged over steps
            logs["valid_tokens"] = tokens = logs.pop("tokens")
            logs["tokens_per_second"] = tokens / max(now - self._logged_at, 1e-9)
            if (peak := peak_bytes(self.args.device)) is not None:
                logs["peak_memory_mib"] = peak / 2**20
            self._sums.zero_()
            self._logged_at = now
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._logged_at is not None:  # evaluations and checkpoints are no training time
            self._logged_at += time.perf_counter() - max(start, self._logged_at)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Of each term that there is, by its name; and the tokens."""
        values = dict(zip(TERMS, sums.tolist(), strict=True))
        tokens = values.pop("tokens")
        if self.args.kd_weight == 0:
            values = {name: values[name] for name in ("cross_entropy", "feature_loss", "aux_loss", "objective")}
        if self.objective.features is None:
            del values["feature_loss"]
        if self.objective.tap.aux_coefficient is None:
            del values["aux_loss"]
        return {**{name: value / max(tokens, 1) for name, value in values.items()}, "tokens": tokens}

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in the base class, for rows as well; every metric is a mean over all scored tokens."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        metrics: dict[str, float] = super().evaluate(eval_dataset if named else self.items(eval_dataset), ignore_keys, metric_key_prefix)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """The metrics of ``evaluate``, for rows as well. Its predictions are None: no logits are made."""
        return super().predict(self.items(test_dataset), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_sums.zero_()
        if self.accelerator.is_fsdp2 and not self.accelerator._models:  # before the training: accelerate shards a model with its optimizer
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config if self.is_deepspeed_enabled else {}
        kept = {name: part for name, part in config.items() if name == "optimizer"}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        config.update(kept)  # transformers drops it for an engine that only evaluates
        means = self._means(self._eval_sums)
        means.pop("aux_loss", None)  # it is a mean over a batch, not over tokens
        means["loss"] = means.pop("objective")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """``(loss, None, None)``: the mean over this batch. What counts are the sums by item, without the copies that even out ranks."""
        self._check_packing(model)
        with torch.no_grad():
            _, sums = self.objective(model, self._prepare_inputs(inputs), each=True)
        own = sums.sum(0)
        self._eval_sums += self.accelerator.gather_for_metrics(sums).sum(0)
        return (own[TERMS.index("objective")] / own[TERMS.index("tokens")].clamp(min=1)).float(), None, None

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student as ``from_pretrained`` reads it, and beside it ``projector.safetensors`` where features were distilled."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and not _internal_call and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))  # the base class leaves it at shards
        if self.objective.features is not None:
            self.objective.features.save(output_dir or self.args.output_dir, write=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if f"{PROJECTORS}." not in name}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objective.features is not None:
            self.objective.features.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.objective.features is not None:
            self.objective.features.load(self.state.best_model_checkpoint)
