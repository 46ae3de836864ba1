"""``kdkernels train``. Its implementation is imported when it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ...support.terminal import console, fail

__all__ = ["EPILOG", "train"]

EPILOG = """
Every field of DistillationArguments and of transformers' TrainingArguments is an option too, such as `--learning-rate 1e-4` or `--packing`:

- the loss: `--divergence` (a name, or `"jsd(beta=0.3)"`), `--temperature`, `--t-squared`, `--kd-weight`, `--ce-weight`, `--ce-weight-last`,
  `--feature-weight`, `--feature-layers`, `--feature-loss`, `--ensemble-mode`, `--kd-on-prompt`, `--vocab-size`, `--memory-budget`

- the data: `--max-length`, `--overlong`, `--packing`, `--template-date`, `--reasoning`, `--columns`, `--learn`, `--eval-fraction`;
  `--streaming` (with `--max-steps`) reads `--data` as it is needed, shuffled in a `--shuffle-buffer` of 10,000 examples

- a LoRA instead of all weights: `--lora-r 16`, `--lora-alpha`, `--lora-dropout`, `--lora-target-modules`, `--use-rslora`, `--use-dora`;
  `--merge` also writes the merged model

- memory: `--student-quantization` (with a LoRA) and `--teacher-quantization`: bnb-4bit, bnb-8bit, int8 or int4; `--teacher-device`,
  `--teacher-device-map`

- samples while it runs: `--sample-every 100`, `--sample-prompts`

- the student's own responses: `--on-policy-fraction`, `--sample-temperature`, `--max-new-tokens`

Examples:

- `kdkernels train --teacher big/ --student small/ --data rows.jsonl --eval-data held-out.jsonl --output-dir out --max-steps 1000`

- `kdkernels train --config run.yaml --learning-rate 1e-4` - options override the file's

- `kdkernels train --config run.yaml --streaming --max-steps 100000` - data that does not fit in memory

- `kdkernels train --config run.yaml --lora-r 16 --merge` - an adapter, and the merged model

- `kdkernels train --config run.yaml --plan` - models, tokens, steps and memory, without training

- `torchrun --nproc-per-node 8 -m kdkernels.cli train --config run.yaml` - one process per GPU
"""


def train(
    context: typer.Context,
    teacher: Annotated[list[str] | None, typer.Option(help="Folder or hub name of a causal language model. Several: an ensemble.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or hub name of the model to train, or of an adapter to continue; its tokenizer is used.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL, JSON, CSV, Parquet or text file, a folder of them, or a data set of the hub, as org/name:SPLIT:CONFIG. Several: "
            "all of their rows, one after another; or with shares of the draws, as a.jsonl=0.7."
        ),
    ] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="Held-out rows, evaluated before and after. Several: all.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of `kdkernels cache`, used instead of a teacher.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder for checkpoints, the trained model and the summary.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: from --num-train-epochs.")] = None,
    save_steps: Annotated[float | None, typer.Option(help="Steps between checkpoints.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of options. Options on the command line override it.")] = None,
    student_dtype: Annotated[str | None, typer.Option(help="Student weights: auto (float32), float32, bfloat16 or float16.")] = None,
    teacher_dtype: Annotated[str | None, typer.Option(help="Teacher weights: auto (as saved), float32, bfloat16 or float16.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show models, tokens, steps and memory without training.")] = False,
) -> None:
    """Distil a teacher (or several, or a cache of one) into a student, two causal language models with one tokenizer.

    Run the same command again to continue an interrupted run. Ctrl-C saves a checkpoint first.
    """
    missing = [name for name in ("transformers", "accelerate", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed: pip install 'kdkernels[train]'")
    from .settings import read_config, read_settings

    given = {
        "teacher": teacher,
        "student": student,
        "data": data,
        "eval_data": eval_data,
        "cache": cache,
        "student_dtype": student_dtype,
        "teacher_dtype": teacher_dtype,
        "output_dir": output_dir,
        "max_steps": max_steps,
        "save_steps": save_steps,
    }
    settings = read_settings({} if config is None else read_config(config), given, context.args)
    if plan:
        from .plan import plan as show

        show(settings, console(soft_wrap=True))
        return
    from accelerate import PartialState

    from .run import run

    status = run(settings, console(soft_wrap=True))
    PartialState().destroy_process_group()  # otherwise torch warns at the interpreter's exit
    if status:
        raise typer.Exit(status)
