"""Row kernels: the interface of a backend. ``selection`` finds the backends, describes devices, and chooses a backend for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as Dtype

    from ..fused.call import Call
    from .rows import HeadBatch, RowBatch, Stage


class Backend(Protocol):
    """Row kernels, as a module or an object. Other packages add a backend with an entry point in the group ``kdkernels.backends``.

    ``head_rows`` (the quantities of one side) and the two softmax functions are optional. Without them, ``backend="auto"`` runs these calls
    with another backend, and this backend's name raises ``BackendUnavailable``.
    """

    @property
    def DEVICE_TYPES(self) -> Sequence[str]:
        """Device types for which ``backend="auto"`` uses this backend, such as ``("xpu",)``."""

    def unavailable(self, device: Device, dtypes: tuple[Dtype, ...]) -> str | None:
        """Return the reason why the backend cannot run on this device with logits of these dtypes, or None."""

    def state_scales(self, call: Call) -> tuple[float, float]:
        """Return the factors that convert logits stored in a state to logits, for the student and the teacher."""

    def rows(self, call: Call, batch: RowBatch, stages: Stage) -> None:
        """Run the given stages on each row. The results of stages that are not given are read from the state."""

    def head_rows(self, call: Call, batch: HeadBatch, stages: Stage) -> None:
        """Run the given stages on each row of one side.

        NORMALISERS: log-sum-exp. SUMS: entropy, log-probabilities, top-k and draws, each if the batch has a tensor for it. GRADIENT: dz.
        """

    def softmax_rows(self, x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
        """Write ``softmax(x / T)`` or its logarithm to ``out``. Both are ``[C, V]`` with unit stride along V; ``out`` may be x."""

    def softmax_gradient_rows(self, y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
        """Write the gradient by x to ``out``, from the softmax's result y and its gradient dy. ``out`` may be y or dy."""


Product: TypeAlias = "Callable[[Tensor, Tensor, Tensor], None]"
"""``(hidden, weight, out)``: write ``hidden @ weight.T`` into ``out``."""


ProductOf: TypeAlias = "Callable[[Tensor, Dtype, Dtype], Product | None]"
"""``product_of(weight, dtype, result)`` of a backend, optional: return the product for a head with operands in ``dtype`` and ``out`` in
``result``, or None. For cases in which torch would have to widen the operands."""
