"""Host memory that calls reuse: scratch buffers and recycled gradients."""

from __future__ import annotations

import sys
import threading
from collections import deque

import pytest
import torch
from oracle import make_side

import kdkernels as kd
from kdkernels.fused import pages

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is reused only on Linux")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> deque[object]:
    """Return the list of recycled memory, emptied."""
    monkeypatch.setattr(pages, "_free", deque())
    return pages._free


def test_scratch_is_reused_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SCRATCH", pages._Scratch())
    monkeypatch.setattr(pages, "KEPT_BYTES", 1000)
    with torch.inference_mode():
        first = pages.scratch("a", 600)
    assert not first.is_inference(), "a training step must be able to write to it"
    assert pages.scratch("a", 500).data_ptr() == first.data_ptr()
    assert pages.scratch("b", 500).data_ptr() != first.data_ptr()
    large = pages.scratch("a", 2000)
    assert large.numel() == 2000
    assert pages.scratch("a", 600).data_ptr() == first.data_ptr(), "a buffer above the limit does not replace the kept one"
    addresses = []
    thread = threading.Thread(target=lambda: addresses.append(pages.scratch("a", 600).data_ptr()))
    thread.start()
    thread.join()
    assert addresses != [first.data_ptr()], "each thread has its own buffer"


def floats(mib: int) -> torch.Tensor:
    return pages.recycled(torch.empty(mib * MIB // 4))


@linux
def test_memory_is_reused_when_no_tensor_refers_to_it(free: deque[object]) -> None:
    first = pages.recycled(torch.empty(2000, 2000, dtype=torch.bfloat16))
    assert first.shape == (2000, 2000)
    assert first.dtype == torch.bfloat16
    address, part = first.data_ptr(), first.fill_(3)[5:7, ::2]
    del first
    second = pages.recycled(torch.empty(2000, 1000))
    assert second.data_ptr() != address, "a view still uses the memory"
    assert (part == 3).all()
    del part
    recycled = pages.recycled(torch.empty(2000, 1000))
    assert recycled.data_ptr() == address, "an equal number of bytes, of another dtype"
    assert not free


@linux
def test_kept_memory_has_a_limit(free: deque[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "KEPT_BYTES", 20 * MIB)
    tensors = [floats(mib) for mib in (6, 8, 10, 24)]
    while tensors:
        tensors.pop(0)
    assert [len(memory) // MIB for memory in free] == [8, 10], "the oldest is freed, and memory above the limit is not kept"


@linux
def test_memory_can_be_freed_on_any_thread(free: deque[object]) -> None:
    def allocate() -> None:
        for _ in range(200):
            floats(4)[0] = 1

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(free) <= 4


@pytest.mark.parametrize("tensor", [torch.empty(1000), torch.empty(1 << 23, device="meta")], ids=["small", "device"])
def test_small_and_device_tensors_are_not_recycled(tensor: torch.Tensor) -> None:
    assert pages.recycled(tensor) is tensor


@linux
def test_step_reuses_the_memory_of_the_last_gradient(free: deque[object]) -> None:
    student, teacher = (make_side((8,), 40_000, 64, seed=seed) for seed in (1, 2))
    student.weight.requires_grad_()
    options = {"backend": "torch"}
    gradients, addresses = [], []
    for _ in range(3):
        student.weight.grad = None
        kd.distillation_loss(student, teacher, **options).backward()
        gradients.append(student.weight.grad.clone())
        addresses.append(student.weight.grad.data_ptr())
    assert len(set(addresses)) < 3
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    live_gradient, student.weight.grad = student.weight.grad, None
    kd.distillation_loss(student, teacher, temperature=3.0, **options).backward()
    assert torch.equal(live_gradient, gradients[0]), "memory of a live gradient is not reused"
