"""``python -m ptx``, from the tests folder: runs cases through the executor and prints a line of JSON for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are decorated


def main() -> int:
    import torch
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every case and barrier, not a sample")
    parser.add_argument("--mutate", action="store_true", help="remove barriers instead, one at a time")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case from the i-th")
    parser.add_argument("--filter", default="", help="only cases whose text contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for line in (_mutated if arguments.mutate else _executed)(arguments):
        failed |= "failed" in line
        print(json.dumps({"triton": triton.__version__, "arch": arguments.arch, **line}), flush=True)
    return int(failed)


def _chosen(cases: list[Any], arguments: argparse.Namespace) -> list[Any]:
    shard, shards = map(int, arguments.shard.split("/"))
    return [case for case in cases if arguments.filter in repr(case)][shard::shards]


def _executed(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from .cases import everything, sample
    from .driver import executing

    with executing(arguments.arch):
        for case in _chosen(list(everything() if arguments.all else sample()), arguments):
            line: dict[str, Any] = {"case": repr(case)}
            start = time.perf_counter()
            try:
                line["errors"] = {name: round(share, 3) for name, share in case.run().items()}
            except Exception as error:  # one line for each case, whatever ails it
                line |= {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
            yield line | {"seconds": round(time.perf_counter() - start, 2)}


def _mutated(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Remove each barrier of the sources in turn. At least one case must fail without it; others may not need it."""
    from .mutation import CASES, mutants

    noticed: dict[tuple[str, str], bool] = {}
    for case, kernels in _chosen(list(CASES), arguments):
        for barrier in mutants(case, kernels, arguments.arch, arguments.all):
            if barrier.written:
                key = barrier.kernel, barrier.source
                noticed[key] = noticed.get(key, False) or bool(barrier.noticed)
            yield {"case": repr(case), **asdict(barrier), "written": barrier.written}
    for (kernel, source), was_noticed in noticed.items():
        if not was_noticed:
            line = {"case": "every case", "kernel": kernel, "source": source, "written": True, "noticed": ""}
            yield line | {"failed": "nothing notices the absence of this barrier"}


if __name__ == "__main__":
    sys.exit(main())
