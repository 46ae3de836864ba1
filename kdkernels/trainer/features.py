"""Feature distillation: a loss between hidden states of mapped decoder layers of student and teacher.

If the widths differ, a learned linear projector maps the student's features to the teacher's width (Romero et al. 2015, FitNets; Jiao et
al. 2020, TinyBERT). The projector is not saved with the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..losses import check_num_items, mean_denominator
from ..support.files import write_whole
from ..tap.layers import LayerRecorder, decoder_layers
from ..tap.patching import text_config, unwrap
from ..tap.weights import gathered, sharded_like, whole
from .hooks import ignore_when_saving

__all__ = ["FeatureLoss", "FeatureTap", "LayerPair", "parse_layers"]

FeatureLoss = Literal["mse", "cosine", "normalized_mse"]
LayerPair = tuple[int, int]
PROJECTORS = "kd_projectors"
FILE = "projector.safetensors"


def parse_layers(layers: str | Sequence[LayerPair], student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Return pairs of layer indices, counted from 0.

    Args:
        layers: pairs ``(student, teacher)``, the same as text (``"2:4,5:11"``), ``"last"``, or ``"all"``: every student layer with the
            teacher layer at the same relative depth. Negative indices count from the end.
        student_layers, teacher_layers: numbers of layers.

    Raises:
        ValueError: invalid text, an empty list, or an index out of range.
    """
    if isinstance(layers, str):
        text = layers.strip()
        if text == "all":
            layers = [(i, -(-(i + 1) * teacher_layers // student_layers) - 1) for i in range(student_layers)]
        elif text == "last":
            layers = [(-1, -1)]
        else:
            try:
                layers = [(int(s), int(t)) for s, t in (pair.split(":") for pair in text.split(","))]
            except ValueError:
                raise ValueError(f'feature_layers={text!r}: write "student:teacher" pairs ("2:4,5:11"), "all" or "last"') from None
    if not layers:
        raise ValueError('feature_layers is empty: give pairs such as "2:4,5:11", "all" or "last"')
    return [(_index(student, student_layers, "student"), _index(teacher, teacher_layers, "teacher")) for student, teacher in layers]


def _index(index: int, count: int, whose: str) -> int:
    if not -count <= index < count:
        raise ValueError(f"feature_layers names layer {index} of the {whose}, which has {count}: use {-count}..{count - 1}")
    return index % count


class FeatureTap:
    """Distance between the features of mapped layers over the scored tokens.

    Build it before ``Trainer.__init__``: if widths differ, projectors are added to the student (``kd_projectors``), so that optimiser and
    wrappers see them. ``save_pretrained`` omits them; :meth:`save` writes them.

    Args:
        student, teacher: transformers models, or PEFT models or wrappers around them.
        layers: see :func:`parse_layers`.
        kind: distance per token and pair, over the teacher's width: ``"mse"``: mean of squared differences; ``"cosine"``: 1 - cosine
            similarity; ``"normalized_mse"``: mse after layer normalisation of both, without scale and shift.

    Raises:
        ValueError: an unknown ``kind``, or a layer that does not exist.

    Example::

        tap = FeatureTap(student, teacher, "all")
        with tap.student.recording(student_ids) as of_student, tap.teacher.recording(teacher_ids) as of_teacher:
            ...  # the forward passes of both
        loss = tap.loss(of_student, of_teacher, student_rows, teacher_rows, num_items=num_items)
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: str | Sequence[LayerPair], kind: FeatureLoss = "mse") -> None:
        if kind not in get_args(FeatureLoss):
            raise ValueError(f"feature loss {kind!r}: choose one of {', '.join(map(repr, get_args(FeatureLoss)))}")
        self.kind = kind
        self.pairs = parse_layers(layers, len(decoder_layers(student)), len(decoder_layers(teacher)))
        self.student = LayerRecorder(student, [s for s, _ in self.pairs])
        self.teacher = LayerRecorder(teacher, [t for _, t in self.pairs])
        self._base: Any = unwrap(student)
        self._attach(_width(self._base), _width(unwrap(teacher)))

    @property
    def projectors(self) -> nn.ModuleDict | None:
        """Linear layers ``[Dt, Ds]`` by ``"student_teacher"``, registered in the student; None if all widths are equal."""
        return getattr(self._base, PROJECTORS, None)

    def _attach(self, student_width: int, teacher_width: int) -> None:
        self.detach()
        if student_width == teacher_width:
            return
        like = next((p for p in self.student.layers[self.pairs[0][0]].parameters() if p.is_floating_point()), torch.empty(0))
        projectors = nn.ModuleDict()
        for pair in self.pairs:
            projectors[_name(pair)] = nn.Linear(student_width, teacher_width, bias=False, dtype=like.dtype, device=like.device)
        setattr(self._base, PROJECTORS, projectors)
        ignore_when_saving(self._base, self._keys(projectors), True)

    def detach(self) -> None:
        """Remove the projectors from the student."""
        projectors = self.projectors
        if projectors is not None:
            ignore_when_saving(self._base, self._keys(projectors), False)
            delattr(self._base, PROJECTORS)

    @staticmethod
    def _keys(projectors: nn.ModuleDict) -> set[str]:
        return {f"{PROJECTORS}.{key}" for key in projectors.state_dict()}

    def loss(
        self,
        student: dict[int, Tensor],
        teacher: dict[int, Tensor],
        student_rows: Tensor,
        teacher_rows: Tensor,
        num_items: int | Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over layer pairs of (sum over tokens / ``num_items``): 0-dim float32 (float64 for float64 features).

        Args:
            student, teacher: recorded features by layer, ``[B, L, D]``, with the batch and length of each model's view.
            student_rows, teacher_rows: ``[n]`` int64, positions of the same n tokens in the flattened ``[B * L]`` of each view.
            num_items: the denominator, see :func:`~kdkernels.distillation_loss`; default: n.
            token_weights: ``[n]``, multiplies each token's distance.

        Raises:
            ValueError: different numbers of rows, a layer that was not recorded, features of different widths; ``num_items`` < 0, or 0
                although there are tokens.
        """
        if student_rows.shape != teacher_rows.shape:
            raise ValueError(
                f"student_rows has shape {list(student_rows.shape)}, teacher_rows {list(teacher_rows.shape)}: both name the same tokens"
            )
        check_num_items(num_items)
        total: Tensor | None = None
        for pair in self.pairs:
            s = _rows(student, pair[0], student_rows, "student")
            t = _rows(teacher, pair[1], teacher_rows, "teacher").detach().to(s.device)
            if self.projectors is not None:
                projector: Any = self.projectors[_name(pair)]
                s = projector(s.to(projector.weight.dtype))
            if s.shape != t.shape:
                raise ValueError(f"layers {pair[0]}:{pair[1]}: the student's features are {s.shape[-1]} wide, the teacher's {t.shape[-1]}")
            each = _distance(self.kind, s, t)
            if token_weights is not None:
                each = each * token_weights.to(each.dtype)
            total = each.sum() if total is None else total + each.sum()
        assert total is not None
        count = torch.tensor(student_rows.numel(), device=total.device)
        return total / len(self.pairs) / mean_denominator(num_items, count, total.dtype)

    def save(self, directory: str | Path, write: bool = True) -> None:
        """Write ``projector.safetensors`` atomically. If the student is sharded, every rank must call it, one of them with ``write``."""
        from safetensors.torch import save_file

        if self.projectors is None:
            return
        with gathered(list(self.projectors.parameters())):
            state = {name: whole(value.detach()).cpu().clone() for name, value in self.projectors.named_parameters()}
        if write:
            path = Path(directory) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: save_file(state, temporary, metadata={"kind": self.kind}))

    def load(self, directory: str | Path) -> None:
        """Read the projectors that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file has other layers or widths.
        """
        from safetensors.torch import load_file

        if self.projectors is None:
            return
        path = Path(directory) / FILE
        state = load_file(path)
        with gathered(list(self.projectors.parameters()), modified=True), torch.no_grad():
            parameters = dict(self.projectors.named_parameters())
            expected, actual = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (parameters, state))
            if expected != actual:
                raise ValueError(f"{path} has {actual}, but feature_layers and the models' widths need {expected}")
            for name, parameter in parameters.items():
                parameter.copy_(sharded_like(parameter, state[name]))


def _name(pair: LayerPair) -> str:
    return f"{pair[0]}_{pair[1]}"


def _width(base: nn.Module) -> int:
    width = getattr(text_config(base), "hidden_size", None)
    if width is None:
        raise ValueError(f"{type(base).__name__} has no config.hidden_size, so features cannot be recorded: set feature_weight=0")
    return int(width)


def _rows(features: dict[int, Tensor], layer: int, rows: Tensor, whose: str) -> Tensor:
    """``[n, D]``"""
    feature = features.get(layer)
    if feature is None:
        raise ValueError(f"layer {layer} of the {whose} was not recorded: run its forward pass inside recording()")
    return feature.flatten(0, 1).index_select(0, rows.to(feature.device))


def _distance(kind: FeatureLoss, s: Tensor, t: Tensor) -> Tensor:
    """Return the distance ``[n]`` between features ``[n, D]``."""
    dtype = torch.float64 if torch.float64 in (s.dtype, t.dtype) else torch.float32
    s, t = s.to(dtype), t.to(dtype)
    if kind == "cosine":
        return 1 - nn.functional.cosine_similarity(s, t, dim=-1)
    if kind == "normalized_mse":
        s, t = (nn.functional.layer_norm(x, x.shape[-1:]) for x in (s, t))
    return (s - t).square().mean(-1)
