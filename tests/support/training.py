"""Tiny models, a tokenizer, rows and trainers for the trainer's tests, and the dense loss to compare with."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdkernels.trainer import DistillationTrainer

Make = Callable[..., "DistillationTrainer"]

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red", "green", "blue", "one", "two", "three", "four", "five", "six", "plus", "minus", "times", "is", "not", "the", "a", "cat", "dog",
    "bird", "fish", "runs", "sleeps", "eats", "sees",
]  # fmt: skip
SPECIAL = ["<|end|>", "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>"]


def make_tokenizer(words: list[str] = WORDS, template: str | None = TEMPLATE) -> Any:
    """Return a word-level tokenizer that splits at spaces and punctuation. Single letters and signs are words too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i
        for i, token in enumerate(
            [
                *SPECIAL,
                "<|unk|>",
                *(f"Ġ{w}" for w in words),
                *words,
                *(chr(c) for c in range(33, 127)),
                *(f"Ġ{chr(c)}" for c in range(97, 123)),
                "Ċ",
                "ĊĊ",
                "Ġ",
            ]
        )
    }
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, "<|unk|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>")
    fast.chat_template = template
    return fast


def make_model(
    hidden: int = 16,
    layers: int = 2,
    vocab_size: int = 192,
    seed: int = 0,
    family: str = "Llama",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    import transformers

    torch.manual_seed(seed)
    cls = getattr(transformers, f"{family}Config")
    sizes = {
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(cls(**{**sizes, **config})).to(dtype)


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [{"prompt": words(2, 6) + " ", "response": words(1, 9)} for _ in range(count)]


def trainers(folder: Path, tokenizer: Any) -> Make:
    """Return a function that makes trainers: a small float64 student, 12 rows, one SGD step on 8 of them, output in ``folder``."""
    from kdkernels.trainer import DistillationArguments, DistillationTrainer

    numbers = itertools.count()

    def build(
        student: Any = None,
        teacher: Any = "live",
        rows: Any = None,
        eval_rows: Any = None,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> DistillationTrainer:
        defaults = {
            "output_dir": str(folder / str(next(numbers))), "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1.0,
            "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        student = make_model(16, seed=1, dtype=dtype) if student is None else student
        teacher = make_model(24, seed=2, dtype=dtype, initializer_range=0.3) if isinstance(teacher, str) else teacher
        rows = make_rows(12) if rows is None else rows
        args = DistillationArguments(**{**defaults, **options})
        return DistillationTrainer(student, teacher, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return build


def gradients(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """Return the gradients of the first step, as the optimizer receives them."""
    from transformers import TrainerCallback

    grads: dict[str, Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            grads.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    return grads


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    assert max(g.abs().max() for g in actual.values()) > 1e-4
    for name in actual:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=rtol * scale + 1e-15, msg=lambda text, n=name: f"{n}: {text}")


def dense(trainer: DistillationTrainer, batch: dict[str, Any]) -> Tensor:
    """Return the loss summed over tokens, computed from dense logits by the formula of the papers."""
    from kdkernels.divergences import parse

    args, student = trainer.args, trainer.model
    z = [
        model(input_ids=batch[f"{p}input_ids"], attention_mask=batch[f"{p}attention_mask"]).logits.flatten(0, 1)[
            batch[f"{p}scored"], : trainer.vocab_size
        ]
        for model, p in ((student, ""), (trainer.teacher.models[0], "teacher_"))
    ]
    log_q, log_p = (torch.log_softmax(x / args.temperature, -1) for x in z)
    divergence = parse(args.divergence).reference(log_q, log_p.detach()).sum(-1)
    labels = batch["input_ids"].flatten()[batch["scored"] + 1]
    ce = torch.nn.functional.cross_entropy(z[0], labels, reduction="none")
    if "response" in batch:
        ce = ce * batch["response"]
    total = args.kd_weight * args.temperature**2 * divergence + args.ce_weight * ce
    return (total * batch["token_weights"]).sum()
