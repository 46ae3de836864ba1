"""Instruction counts from machine code, and the performance model computed from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import model, sass

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "instructions.json"

LISTING = """
    Function : rows
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x0 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;            /* 0x0 */
        /*0020*/                   LDG.E.128 R8, [R2.64+0x10] ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/                   MUFU.TANH R5, R5 ;
        /*0050*/                   FMUL R5, R5, R5 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/               @P1 BRA 0xb0 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R6, R5, R5 ;
        /*0090*/                   STG.E.128 [R2.64], R4 ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   STG.E.U16 [R2.64], R4 ;
        /*00c0*/                   ISETP.GE.AND P2, PT, R0, R7, PT ;
        /*00d0*/              @!P2 BRA 0x10 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
    Function : other
        /*0000*/                   EXIT ;
"""


def rows() -> list[sass.Instruction]:
    return sass.parse(LISTING)["rows"]


def test_listing_is_parsed_by_function() -> None:
    functions = sass.parse(LISTING)
    assert {name: len(code) for name, code in functions.items()} == {"rows": 16, "other": 1}
    branch = functions["rows"][3]
    assert (branch.name, branch.predicate, branch.target, branch.conditional) == ("BRA", "!P0", 0x60, True)
    assert not functions["rows"][10].conditional


@pytest.mark.parametrize(
    ("opcode", "size"), [("LDG.E.128", 16), ("LDS.64", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("LDC.64", 0), ("STG.E.128", 0)]
)
def test_loaded_bytes_are_read_from_the_opcode(opcode: str, size: int) -> None:
    assert sass.Instruction(0, opcode, "R0, [R2]", None).loaded_bytes == size


def test_innermost_loops_are_found() -> None:
    (sweep, idle) = sass.loops(rows())
    assert (sweep[0].address, sweep[-1].address) == (0x10, 0xD0)
    assert [i.opcode for i in idle] == ["BRA"]


def test_outer_loops_are_not_counted() -> None:
    nested = LISTING.replace("EXIT ;\n        /*00f0*/                   BRA 0xf0;", "BRA 0x0 ;")
    assert [loop[0].address for loop in sass.loops(sass.parse(nested)["rows"])] == [0x10]


def test_shortest_path_skips_optional_branches() -> None:
    sweep = sass.loops(rows())[0]
    path = sass.shortest(sweep, sass.Turn("LDG", 32))
    assert path is not None
    assert [i.address for i in path] == [0x10, 0x20, 0x30, 0x60, 0x70, 0xB0, 0xC0, 0xD0]


def test_shortest_path_includes_required_stores_and_functions() -> None:
    sweep = sass.loops(rows())[0]
    stored = sass.shortest(sweep, sass.Turn("LDG", 32, stores=True))
    assert stored is not None
    assert [i.address for i in stored][5:] == [0x80, 0x90, 0xA0, 0xC0, 0xD0]
    assert sass.pipes(stored) == {"LSU": 3, "control": 4, "XU": 1, "ALU": 2}
    computed = sass.shortest(sweep, sass.Turn("LDG", 32, transcendental=2))
    assert computed is not None
    assert 0x40 in [i.address for i in computed]


@pytest.mark.parametrize("turn", [sass.Turn("LDG", 48), sass.Turn("LDS", 32), sass.Turn("LDG", 32, transcendental=3)])
def test_smaller_loops_are_not_sweeps(turn: sass.Turn) -> None:
    assert sass.shortest(sass.loops(rows())[0], turn) is None


# ---- the model


def test_floor_is_the_time_of_the_matrix_products() -> None:
    shape = model.SHAPES[0]
    flop = 2 * shape.tokens * shape.vocab * (3 * shape.student + shape.teacher)
    assert model.floor_ms(shape) == pytest.approx(flop / model.MATRIX_RATE * 1e3)


def test_chunks_fit_the_budget_in_multiples_of_128() -> None:
    for shape in model.SHAPES:
        for size in (2, 4):
            rows = model.chunk_rows(shape, size)
            assert rows % 128 == 0
            assert rows * 2 * shape.vocab * size <= model.BUDGET


@pytest.mark.parametrize(("kernel", "sweeps", "expected"), [("triton", 2, 18), ("triton", 3, 26), ("cuda one_read", 3, 10)])
def test_bytes_of_a_column_pair_depend_on_kernel_and_sweeps(kernel: str, sweeps: int, expected: int) -> None:
    assert model.pair_bytes(kernel, "float32", sweeps) == expected


def test_row_kernel_is_limited_by_memory_or_by_issue() -> None:
    shape = model.SHAPES[0]
    free, bound, double = (model.loss_ms(shape, "triton", "float32", n, 2)[0] for n in (0, 400, 800))
    assert model.loss_ms(shape, "triton", "float32", 40, 2)[0] == free
    assert double - bound == pytest.approx(400 * shape.tokens * shape.vocab / (model.LANES * model.ISSUE_SHARE) * 1e3)
    low, high = model.loss_ms(shape, "triton", "float32", 40, 2)
    assert model.floor_ms(shape) < low < high


def test_committed_kernels_neither_spill_nor_use_local_memory() -> None:
    counts = json.loads(RESULTS.read_text())
    assert len(counts) > 100
    assert all(c["spilled_bytes"] == c["local_bytes"] == 0 for c in counts)


@pytest.mark.parametrize(("divergence", "limit"), [("forward_kl", 42), ("reverse_kl", 56), ("jsd", 80)])
def test_triton_issues_no_more_than_its_target(divergence: str, limit: float) -> None:
    counts = [c for c in json.loads(RESULTS.read_text()) if c["kernel"].startswith("triton") and c["divergence"] == divergence]
    totals = {(c["kernel"], c["dtype"], c["vocab"]): sum(c["sweeps"]) for c in counts}
    assert len(totals) == 8, "two versions, two dtypes, two vocabularies"
    for (kernel, dtype, vocab), total in totals.items():
        aligned = totals[kernel, dtype, 128256]
        assert aligned <= limit
        assert total <= 1.15 * aligned, f"{kernel}, {dtype}: rows of {vocab} columns cost more"


@pytest.mark.parametrize(
    ("kernel", "divergence", "limit"),
    [
        ("one_read", "forward_kl", 35), ("one_read", "reverse_kl", 50), ("one_read", "jsd", 61),
        ("two_read", "forward_kl", 44), ("two_read", "reverse_kl", 70), ("two_read", "jsd", 72),
    ],
)  # fmt: skip
def test_cuda_issues_no_more_than_its_target(kernel: str, divergence: str, limit: float) -> None:
    counts = [c for c in json.loads(RESULTS.read_text()) if (c["kernel"], c["divergence"]) == (f"cuda {kernel}", divergence)]
    assert {c["dtype"] for c in counts} == {"float32", "bfloat16"}
    assert max(sum(c["sweeps"]) for c in counts) <= limit


@pytest.mark.parametrize(
    ("dtype", "divergence", "limit"),
    [("float32", "forward_kl", 1.12), ("float32", "jsd", 1.15), ("bfloat16", "forward_kl", 1.07), ("bfloat16", "jsd", 1.12)],
)
def test_cuda_is_modelled_close_to_the_floor(dtype: str, divergence: str, limit: float) -> None:
    key = ("cuda one_read", dtype, divergence)
    (counts,) = (c for c in json.loads(RESULTS.read_text()) if (c["kernel"], c["dtype"], c["divergence"]) == key)
    for shape in model.SHAPES:
        low, high = model.loss_ms(shape, "cuda one_read", dtype, sum(counts["sweeps"]), len(counts["sweeps"]))
        assert round((low + high) / 2 / model.floor_ms(shape), 2) <= limit


def test_kernels_leave_room_for_two_ctas() -> None:
    counts = json.loads(RESULTS.read_text())
    assert max(c["registers"] for c in counts) <= 128


def test_recorded_counts_equal_those_of_the_code() -> None:
    """Recount in another process, since nothing is compiled under TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.instructions", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[2])
    remedy = "Run `python -m benchmarks.instructions 3.6.0` and `python -m benchmarks.report`, and commit both."
    assert run.returncode == 0, f"{run.stdout}{run.stderr[-2000:]}\n{remedy}"
