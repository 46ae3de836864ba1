"""Hinton, Vinyals and Dean's experiment (2015, section 3) in small: on the 1,797 digits of 8 x 8 pixels that come with scikit-learn.

A teacher with dropout learns from 1,000 images, jittered by up to a pixel. Students without either see 300 of them as they are: with their
labels, with the teacher's soft targets at several temperatures, with both, or with the teacher's logits to match (Ba and Caruana 2014).
And once more without a single 3 among the 300: whatever a student then knows of threes, it has from the teacher's soft targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import kdkernels as kd

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
HIDDEN = {"teacher": (512, 512), "student": (64,)}
STEPS, BATCH = 1500, 128
HARD_WEIGHT = 0.1
"""Weight of the cross-entropy beside soft targets: Hinton et al. found a considerably lower weight best."""

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits ``[B, 10]`` and the images' numbers ``[B]``."""


@dataclass(frozen=True)
class Split:
    train: Tensor  # [1000, 64] pixels in [0, 1]
    train_labels: Tensor  # [1000]
    test: Tensor  # [797, 64]
    test_labels: Tensor  # [797]


def split(seed: int) -> Split:
    pixels, labels = load_digits(return_X_y=True)
    train, test, of_train, of_test = train_test_split(pixels, labels, train_size=1000, stratify=labels, random_state=seed)
    images = [torch.tensor(x, dtype=torch.float32) / 16 for x in (train, test)]
    return Split(images[0], torch.tensor(of_train), images[1], torch.tensor(of_test))


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """``[B, 64]``, each moved by -1, 0 or 1 pixels along both axes."""
    padded = F.pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    rows, columns = (torch.randint(3, (len(images), 1), generator=generator) + torch.arange(8) for _ in range(2))
    each = torch.arange(len(images))[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].reshape(-1, 64)


def network(hidden: tuple[int, ...], dropout: float, seed: int) -> nn.Sequential:
    sizes = (64, *hidden, 10)
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for narrow, wide in pairwise(sizes):
            layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(narrow, wide)]
    return nn.Sequential(*layers[2:])  # the pixels are given as they are


def fit(model: nn.Sequential, images: Tensor, loss_of: BatchLoss, lr: float, seed: int, jittered: bool = False) -> nn.Sequential:
    """Adam, cosine schedule; the same batches for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the dropout
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            batch = jitter(images[chosen], generator) if jittered else images[chosen]
            loss = loss_of(model(batch), chosen)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def losses(labels: Tensor, teacher: Tensor) -> Iterator[tuple[str, BatchLoss]]:
    """Name and loss of every student. ``labels`` ``[n]`` and the teacher's logits ``[n, 10]`` of what they are shown."""
    yield "labels alone", lambda z, i: F.cross_entropy(z, labels[i])
    for t in TEMPERATURES:
        yield f"soft targets, T = {t:g}", lambda z, i, t=t: kd.distillation_loss(z, teacher[i], temperature=t)
    for t in TEMPERATURES:
        yield (
            f"soft targets and labels, T = {t:g}",
            lambda z, i, t=t: kd.distillation_loss(
                z, teacher[i], temperature=t, labels=labels[i], kd_weight=1 - HARD_WEIGHT, ce_weight=HARD_WEIGHT
            ),
        )
    yield "logits matched", lambda z, i: kd.distillation_loss(z, teacher[i], divergence="logit_mse", temperature=1.0)


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    """Per network the percentage of test images that it gets wrong; and of the threes among them, by students that saw none."""
    data = split(seed)

    def wrong(model: nn.Sequential, of: Tensor) -> float:
        with torch.no_grad():
            missed = model(data.test[of]).argmax(-1) != data.test_labels[of]
        return round(100 * float(missed.double().mean()), 3)

    everything = torch.ones_like(data.test_labels, dtype=torch.bool)
    teacher = fit(
        network(HIDDEN["teacher"], 0.5, seed), data.train, lambda z, i: F.cross_entropy(z, data.train_labels[i]), 1e-3, seed, jittered=True
    )
    found = {"teacher": {"errors, %": wrong(teacher, everything)}}
    shown, labels = data.train[:300], data.train_labels[:300]
    known = labels != 3
    for column, chosen, tested in (
        ("errors, %", torch.ones_like(known), everything),
        ("errors on threes, none seen, %", known, data.test_labels == 3),
    ):
        with torch.no_grad():
            targets = teacher(shown[chosen])
        for name, loss_of in losses(labels[chosen], targets):
            student = fit(network(HIDDEN["student"], 0.0, 100 + seed), shown[chosen], loss_of, 3e-3, seed)
            found.setdefault(name, {})[column] = wrong(student, tested)
    return found
