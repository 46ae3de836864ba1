"""In-context learning distillation with its schedule: soft labels throughout, hard labels that fade, and a language-modelling term.

python docs/examples/make_tiny.py tiny
kdkernels recipe in-context --data tiny/styles.jsonl --out icl-tune -k 3 --student-view with --lm-weight 0.3
python docs/examples/in_context_tuning.py tiny icl-tune/rows.jsonl icl-tuned
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkernels.recipes.schedule import HardWeight
from kdkernels.trainer import DistillationArguments, DistillationTrainer

models, rows, out = sys.argv[1:4]
teacher, student = (AutoModelForCausalLM.from_pretrained(f"{models}/{name}") for name in ("teacher", "student"))
arguments = DistillationArguments(output_dir=out, max_steps=40, learning_rate=3e-3, kd_weight=1.0, ce_weight=1.0, report_to="none")
trainer = DistillationTrainer(
    model=student,
    teacher=teacher,
    args=arguments,
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(f"{models}/student"),
)
trainer.add_callback(HardWeight(trainer, first=1.0, last=0.0))
before = trainer.evaluate()["eval_divergence"]
trainer.train()
after = trainer.evaluate()["eval_divergence"]
print(f"divergence from the teacher: {before:.3f} before, {after:.3f} after; the last ce_weight was {trainer.objective.ce_weight:g}")
trainer.save_model(out)
