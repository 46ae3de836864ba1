"""``--push-to-hub``: push the finished model to the hub, with a model card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from rich.console import Console

from ... import __version__
from ...data.hub import is_hub_name
from ...support.files import Output
from .output import CARD, FIGURE, MERGED, MODEL_FILES
from .settings import Settings, TrainError
from .summary import SHOWN, name_of_loss

__all__ = ["Publication", "card"]

PUSHED = (*(name for name in MODEL_FILES if name != "training_args.bin"), CARD, FIGURE, f"{MERGED}/*")
"""Patterns of the pushed files. Logs, records and checkpoints are excluded, because they contain local paths."""
PARTIAL = ("checkpoint", "all_checkpoints")


@dataclass(frozen=True)
class Publication:
    """The push of one run: once, by the first process, of the finished model.

    Attributes:
        repo: id of the model on the hub.
    """

    settings: Settings
    repo: str
    api: HfApi

    @classmethod
    def of(cls, settings: Settings) -> Publication | None:
        """Create the repository on the hub and return the push; None without ``--push-to-hub``.

        Pushing is disabled in transformers, which would push during the training, and every file of the folder.

        Raises:
            TrainError: the hub refuses the repository or cannot be reached, or ``--hub-strategy`` would push checkpoints.
        """
        args = settings.args
        if not args.push_to_hub:
            return None
        strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
        if strategy in PARTIAL:
            raise TrainError(f"--hub-strategy {strategy}: checkpoints are not pushed, the finished model is; leave the option out")
        args.push_to_hub = False
        api = HfApi(token=args.hub_token)
        repo = args.hub_model_id or Path(args.output_dir).absolute().name
        if args.process_index == 0:
            try:
                repo = str(api.create_repo(repo, private=args.hub_private_repo, exist_ok=True).repo_id)
            except Exception as error:  # any error of the hub or the network
                reason = " ".join(str(error).split())[:300]
                raise TrainError(f"--push-to-hub: {repo} can't be made on the hub: {reason}. Run `hf auth login`") from None
        return cls(settings, repo, api)

    def push(self, output: Output | None, summary: dict[str, Any], console: Console) -> None:
        """Write the card and push the model. A README.md written by the user is pushed instead of the card."""
        if output is None:
            return
        text = str(card(self.settings, self.repo, summary))
        if CARD in output or not os.path.lexists(output.folder / CARD):
            output.write(CARD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        done = self.api.upload_folder(
            repo_id=self.repo, folder_path=output.folder, allow_patterns=list(PUSHED), revision=self.settings.args.hub_revision,
            commit_message=f"Model of {summary['steps']} steps",
        )  # fmt: skip
        console.print(f"pushed: {done.commit_url}", soft_wrap=True)


def card(settings: Settings, repo: str, summary: dict[str, Any]) -> ModelCard:
    """Return the card of a finished run: teacher, student, data, loss, metrics before and after, and the figure.

    Local folders are shown by their last component.
    """
    args, adapter = settings.args, settings.adapter
    teacher = [f"cache {_named(settings.cache)}"] if settings.cache else [_named(path) for path in settings.teacher]
    sources = [_named(source) for source in settings.sources]
    if settings.shares is not None:
        sources = [f"{source} (share {share:g})" for source, share in zip(sources, settings.shares, strict=True)]
    fraction = settings.rows.eval_fraction
    rows = {
        "student": _named(settings.student), "teacher": ", ".join(teacher) or "none", "data": ", ".join(sources),
        "held-out data": ", ".join(map(_named, settings.eval_data)) or (f"{fraction:g} of the data" if fraction else "none"),
        "loss": name_of_loss(args), "steps": f"{summary['steps']:,}",
        "batch": f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size} examples a step",
        "learning rate": f"{args.learning_rate:g}", "adapter": f"LoRA, r = {adapter.lora_r}" if adapter.lora_r else "none",
    }  # fmt: skip
    parts = [
        f"# {repo.rpartition('/')[2]}",
        f"Distilled by kdkernels {__version__}.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
    ]
    before, after = summary["before"], summary["after"]
    if before is not None and after is not None:
        names = [name for name in SHOWN if name in before and name in after]
        lines = [f"| {SHOWN[name]} | {before[name]:.4f} | {after[name]:.4f} |" for name in names]
        head = ["## Held-out data", "", "| | before | after |", "| --- | ---: | ---: |"]
        parts.append("\n".join([*head, *lines, "", f"Means over {after['eval_tokens']:,.0f} tokens, in nats."]))
    if summary["figure"]:
        parts.append(f"![losses over steps]({FIGURE})")
    data = ModelCardData(
        base_model=settings.student if not Path(settings.student).exists() else None,
        library_name="peft" if (Path(args.output_dir) / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        datasets=[name.partition(":")[0] for name in settings.sources if is_hub_name(name)] or None,
        tags=["kdkernels", "knowledge-distillation"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _named(path: str | None) -> str:
    return Path(path).absolute().name if path is not None and Path(path).exists() else str(path)
