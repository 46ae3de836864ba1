"""CUDA kernels without a GPU: launch parameters, compiler output, and the kernel sources run on CPU fibers. test_loss.py and its
neighbours check their results on a GPU, like those of every backend.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fibers
import pytest
import torch

from kdkernels.backends import _extension
from kdkernels.backends.cuda import covers
from kdkernels.backends.rows import FORWARD, HeadBatch
from kdkernels.divergences import ForwardKL
from kdkernels.fused.call import Call

_C = pytest.importorskip("kdkernels._C")

ROOT = Path(__file__).parents[2]
H100 = {"major": 9, "multiprocessors": 132, "shared_per_block": 232448, "shared_per_multiprocessor": 233472}
A100 = {"major": 8, "multiprocessors": 108, "shared_per_block": 166912, "shared_per_multiprocessor": 167936}
RTX_5090 = {"major": 12, "multiprocessors": 170, "shared_per_block": 101376, "shared_per_multiprocessor": 102400}


def launch(gpu: dict[str, int], rows: int, vocab: int, itemsize: int, possible: bool = True) -> dict[str, Any]:
    return _C.cuda_launch(**gpu, rows=rows, vocab=vocab, itemsize=itemsize, one_read_possible=possible)


# ---- launch choice


@pytest.mark.parametrize(
    ("vocab", "itemsize", "cluster"),
    [(32000, 2, 2), (128256, 2, 8), (151936, 2, 8), (256000, 2, 16), (32000, 4, 4), (128256, 4, 16), (1000, 2, 1)],
)
def test_cluster_holds_a_row_twice_per_multiprocessor(vocab: int, itemsize: int, cluster: int) -> None:
    """The smallest that lets two CTAs live on a multiprocessor, so that one computes while the other waits."""
    chosen = launch(H100, 8192, vocab, itemsize)
    assert chosen["one_read"]
    assert chosen["cluster"] == cluster
    assert 2 * (chosen["shared_bytes"] + 1024) <= H100["shared_per_multiprocessor"]


@pytest.mark.parametrize("gpu", [H100, RTX_5090])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 7, 132, 8192])
@pytest.mark.parametrize("vocab", [1, 127, 32000, 50257, 151936, 262144, 500_000, 2_000_000])
def test_a_launch_is_within_the_limits(gpu: dict[str, int], itemsize: int, rows: int, vocab: int) -> None:
    chosen = launch(gpu, rows, vocab, itemsize)
    assert chosen["shared_bytes"] <= gpu["shared_per_block"]
    if not chosen["one_read"]:
        assert vocab * itemsize * 2 > gpu["shared_per_block"], "only rows that are too long"
        assert chosen["blocks"] == rows
        return
    warps = chosen["threads"] // 32
    owners = chosen["cluster"] * warps
    columns = chosen["slots"] * (1024 // itemsize) * owners
    assert columns > vocab, "a ring holds a row and part of the next"
    assert chosen["blocks"] % chosen["cluster"] == 0
    assert chosen["cluster"] <= chosen["blocks"] <= rows * chosen["cluster"]


def test_few_rows_get_larger_clusters() -> None:
    many, few, one = (launch(H100, rows, 128256, 2) for rows in (8192, 8, 1))
    assert many["cluster"] == 8
    assert few["cluster"] == one["cluster"] == 16
    assert launch(H100, 1, 1000, 2)["cluster"] == 1, "a warp wants a whole chunk"


def test_two_reads_where_one_is_not_possible() -> None:
    assert not launch(A100, 8192, 32000, 2)["one_read"], "no clusters"
    assert not launch(H100, 8192, 32000, 2, possible=False)["one_read"]
    assert not launch(H100, 8192, 2_000_000, 2)["one_read"], "no cluster is large enough"


def team(gpu: dict[str, int], rows: int, vocab: int, itemsize: int, sweeps: int, **more: Any) -> dict[str, Any]:
    return _C.cuda_team(**gpu, rows=rows, vocab=vocab, itemsize=itemsize, sweeps=sweeps, **more)


@pytest.mark.parametrize(
    ("vocab", "itemsize", "inputs", "cluster"),
    [
        (32000, 2, 1, 1), (128256, 2, 1, 4), (151936, 2, 1, 4), (256000, 2, 1, 8), (32000, 4, 1, 2), (128256, 4, 1, 8),
        (32000, 2, 2, 2), (128256, 2, 2, 8), (50257, 4, 2, 8),
    ],
)  # fmt: skip
def test_a_team_keeps_a_row_twice_per_multiprocessor(vocab: int, itemsize: int, inputs: int, cluster: int) -> None:
    """The fewest CTAs that hold a row, for a second sweep, and leave room for as much again."""
    chosen = team(H100, 8192, vocab, itemsize, 2, inputs=inputs)
    assert chosen["kept"]
    assert chosen["cluster"] == cluster
    assert 2 * (chosen["shared_bytes"] + 1024) <= H100["shared_per_multiprocessor"]


@pytest.mark.parametrize("gpu", [H100, A100, RTX_5090])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 132, 8192])
@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("vocab", [1, 127, 32000, 50257, 151936, 262144, 2_000_000])
def test_a_team_is_within_the_limits(gpu: dict[str, int], itemsize: int, rows: int, sweeps: int, vocab: int) -> None:
    for inputs, more_shared, clusters in ((1, 0, True), (2, 0, True), (1, 17_008, False)):
        chosen = team(gpu, rows, vocab, itemsize, sweeps, inputs=inputs, more_shared=more_shared, clusters=clusters)
        cluster = chosen["cluster"]
        assert chosen["shared_bytes"] <= gpu["shared_per_block"]
        assert chosen["blocks"] == rows * cluster
        assert cluster <= (1 if not clusters or gpu is A100 else 8 if gpu is RTX_5090 else 16)
        assert chosen["threads"] in (64, 128, 256, 512)
        assert chosen["kept"] == (chosen["kept_at"] > 0)
        if chosen["kept"]:
            assert sweeps == 2
            assert chosen["kept_at"] % 16 == 0
            assert chosen["kept_at"] >= more_shared
            assert chosen["kept_at"] + inputs * chosen["kept_bytes"] == chosen["shared_bytes"]
            assert chosen["kept_bytes"] * cluster >= vocab * itemsize
            assert chosen["kept_bytes"] % (2 * 16 * chosen["threads"]) == 0, "whole steps"
        elif sweeps == 2:
            assert cluster == 1, "who reads a row again may be overtaken by other CTAs' gradients"
            step = 2 * 16 * chosen["threads"]
            assert inputs * (vocab * itemsize + step) + chosen["shared_bytes"] > gpu["shared_per_block"], "only rows that are too long"


def test_few_rows_are_shared_among_more_ctas() -> None:
    many, few = (team(H100, rows, 128256, 4, 2) for rows in (8192, 4))
    assert (many["cluster"], few["cluster"]) == (8, 16)
    assert [team(H100, rows, 128256, 4, 1)["cluster"] for rows in (8192, 60, 8, 1)] == [1, 2, 16, 16]
    assert team(H100, 1, 1000, 2, 2)["cluster"] == 1, "a thread wants a whole step"
    assert [team(H100, rows, 600, 4, 1, draws=1000)["draw_parts"] for rows in (8192, 100, 1)] == [1, 2, 264], "and many draws of few rows"
    assert team(H100, 1, 600, 4, 1, draws=3)["blocks"] == 3
    assert team(H100, 8192, 1000, 2, 2)["threads"] == 64


@pytest.mark.skipif(not _C.cuda_targets(), reason="this build has no CUDA kernels")
def test_unsupported_arguments_raise() -> None:
    """They raise before any launch."""
    head = _C.HeadArguments()
    head.rows, head.vocab, head.num_top = 1, 5000, _C.cuda_most_top + 1
    with pytest.raises(ValueError, match="the number of the largest must be between 0 and the vocabulary, and 4096 at most"):
        _C.cuda_head_rows(head, 0)
    head.num_top, head.double_precision = 0, True
    with pytest.raises(ValueError, match="compute in float32"):
        _C.cuda_head_rows(head, 0)
    softmax = _C.SoftmaxArguments()
    softmax.rows, softmax.vocab, softmax.out_dtype = 1, 5, 2
    with pytest.raises(ValueError, match="must have one dtype"):
        _C.cuda_softmax_rows(softmax, 0)
    rows = _C.RowArguments()
    rows.rows, rows.vocab = 2**31, 5
    with pytest.raises(ValueError, match=r"2\^31 rows or more"):
        _C.cuda_rows(rows, 0)


def test_a_seed_is_read_on_its_device() -> None:
    """Nothing waits for it: a tensor without memory gives its address, and would not give its value."""
    logits, state = torch.empty(3, 7, device="meta"), torch.empty(2, 3, device="meta")
    draws, seed = torch.empty(3, 2, dtype=torch.int32, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    batch = HeadBatch(logits, None, state[0], state[1], draws=draws, seed=seed, first_row=5)
    arguments = _extension.head_arguments(Call(ForwardKL(), vocab=7, quantity="logsumexp"), batch, FORWARD, "meta")
    assert (arguments.num_draws, arguments.first_row) == (2, 5)


@pytest.mark.parametrize(
    ("targets", "capability", "runs"),
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (8, 9), True),  # machine code of an older minor version
        (["86"], (8, 0), False),
        (["80", "90a"], (9, 0), True),
        (["90a"], (10, 0), True),  # the newest's PTX
        (["80", "90a", "100"], (12, 0), True),
        (["100"], (9, 0), False),
        (["80", "120"], (10, 3), False),
    ],
)
def test_which_gpus_a_build_runs_on(targets: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert covers(targets, capability) == runs


# ---- what the compiler made of them

LOGS = sorted(ROOT.glob("build/ninja-*/cuda_*_*.o.log"))
compiled = pytest.mark.skipif(not _C.cuda_targets() or not LOGS, reason="this build has no CUDA kernels")
KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@compiled
def test_no_kernel_spills() -> None:
    kernels = [match for log in LOGS for match in KERNEL.findall(log.read_text())]
    targets = {target for _, target, *_ in kernels}
    assert targets == set(_C.cuda_targets())
    for target in targets:  # of two sides ten divergences with two reads, nine with one in two forms; of one side five; three dtypes
        assert len([k for k in kernels if k[1] == target]) == 3 * (10 + 2 * 9 + 5)
    # 128 registers leave room for two CTAs of 256 threads, 64 for two of 512.
    wrong = [k for k in kernels if any(int(x) for x in k[2:5]) or int(k[5]) > 128]
    assert not wrong


@compiled
@pytest.mark.skipif("90a" not in _C.cuda_targets(), reason="not built for sm_90a")
def test_hopper_code_has_clusters_and_bulk_copies() -> None:
    """UBLKCP: bulk copy; UCGABAR: cluster barrier; SYNCS: mbarrier; MAPA or a shared-cluster store: distributed shared memory."""
    triton = pytest.importorskip("triton")
    tool = shutil.which("cuobjdump") or str(next(Path(triton.__file__).parent.rglob("cuobjdump")))
    dump = subprocess.run([tool, "-sass", "-arch", "sm_90a", _C.__file__], capture_output=True, text=True, check=True).stdout
    one_read = dump[dump.index("one_read_rows") :]
    for instruction in ("UBLKCP", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "MUFU.EX2"):
        assert instruction in one_read, instruction


# ---- their source on CPU fibers


@pytest.mark.slow
def test_kernels_on_fibers() -> None:
    """Compare with float64 under a hostile scheduler. Then remove each synchronisation call in turn: a run must notice."""
    fibers.run("test")
    mutations = fibers.run("mutate")
    for calls in (17, 50):  # of the kernels of two sides, and of one side
        assert f"{calls} synchronisation calls, 0 removed without notice" in mutations


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["tsan", "asan"])
def test_kernels_on_fibers_under(sanitizer: str) -> None:
    output = fibers.run(sanitizer, sanitizer)
    assert len(re.findall(r"^[1-9]\d* runs, 0 failed$", output, re.MULTILINE)) == 3
