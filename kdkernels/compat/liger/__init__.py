"""Liger-Kernel's losses with the same names, arguments and averages, on every device that kdkernels supports.

Replace ``from liger_kernel.transformers import LigerFusedLinearJSD`` by ``from kdkernels.compat.liger import LigerFusedLinearJSD``. The
classes of ``liger_kernel.chunked_loss`` are in :mod:`kdkernels.compat.liger.chunked_loss` too. A second backward pass through a retained
graph gives the same gradients again, and ignored tokens cost no matrix product.
"""

from .chunked_loss import LigerFusedLinearJSDLoss
from .cross_entropy import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)
from .jsd import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDFunction,
    LigerJSD,
    LigerJSDFunction,
    LigerKLDIVLoss,
    liger_fused_linear_jsd,
    liger_jsd,
    liger_kl_div,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerJSD",
    "LigerJSDFunction",
    "LigerKLDIVLoss",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_jsd",
    "liger_jsd",
    "liger_kl_div",
]
