"""``kdkernels recipe``: one command and one file per recipe. Their implementations are imported when they run."""

import typer

from . import chain_of_thought, disco, in_context, lion, scott, sequence, socratic

__all__ = ["app"]

app = typer.Typer(
    name="recipe",
    help="Write training rows from a teacher's text: sequence-level distillation, in-context learning, chain of thought, and more.",
    epilog="Then `kdkernels train --data OUT/rows.jsonl ...`. Papers, formulas and runnable examples: docs/recipes.md and docs/methods.md.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)
for recipe in (sequence, in_context, chain_of_thought, scott, socratic, disco, lion):
    recipe.register(app)
