"""Row kernels: what a backend must have. ``selection`` finds the backends, describes the devices, and chooses a backend for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as Dtype

    from ..fused.call import Call
    from .rows import HeadBatch, RowBatch, Stage


class Backend(Protocol):
    """Row kernels, as a module or an object. Another package adds its own by an entry point in the group ``kdkernels.backends``.

    ``head_rows`` (with the primitives of one side) and the two functions of softmax may be missing: these calls then go to another backend.
    """

    @property
    def DEVICE_TYPES(self) -> Sequence[str]:
        """Types of the devices that ``backend="auto"`` uses it for, such as ``("xpu",)``."""

    def unavailable(self, device: Device, dtypes: tuple[Dtype, ...]) -> str | None:
        """Return why it cannot run on logits of these dtypes there, or None."""

    def state_scales(self, call: Call) -> tuple[float, float]:
        """Return what the logits in its states are multiplied by to be logits, for the student and the teacher."""

    def rows(self, call: Call, batch: RowBatch, stages: Stage) -> None:
        """Run the named stages of each row. What an earlier stage writes to the state is read from there if the stage is not named."""

    def head_rows(self, call: Call, batch: HeadBatch, stages: Stage) -> None:
        """Run the named stages of each row of one side.

        NORMALISERS: log-sum-exp. SUMS: entropy, log-probabilities, the largest, draws, whichever the batch has room for. GRADIENT: dz.
        """

    def softmax_rows(self, x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
        """Write ``softmax(x / T)``, or its logarithm, of ``[C, V]`` with unit stride along V; ``out`` may be x."""

    def softmax_gradient_rows(self, y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
        """Write the gradient by x from that result and the gradient by it; ``out`` may be either."""


Product: TypeAlias = "Callable[[Tensor, Tensor, Tensor], None]"
"""``(hidden, weight, out)``: write ``hidden @ weight.T`` into ``out``."""


@runtime_checkable
class OwnProduct(Protocol):
    """A backend that can also multiply hidden states and a head, where torch would widen the operands."""

    def product_of(self, weight: Tensor, dtype: Dtype, result: Dtype) -> Product | None:
        """Return its product for such a head, operands in ``dtype`` and ``out`` in ``result``; or None."""
