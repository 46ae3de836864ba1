"""Kill a command at random moments and repeat it until one run ends by itself: ``python killed.py SEED SECONDS COMMAND``.

Each run is a fork of this process, which has already imported everything, so that a kill interrupts work and not imports. Prints the
number of kills and the exit status of the last run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import httpx2  # noqa: F401
import rapidfuzz  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

from kdkernels.cli import root as cli
from kdkernels.recipes import lion  # noqa: F401
from kdkernels.teachers import jobs, local  # noqa: F401


def main(seed: str, seconds: float, command: list[str]) -> None:
    draw, kills = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            sys.argv = ["kdkernels", *command]
            try:
                cli.main()
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(int(end.code or 0))
        # Wait longer after each kill, or a command that is always killed before it makes progress would never end.
        end = time.monotonic() + draw.uniform(0, seconds) * (1 + kills / 8)
        while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # an ended child stays a zombie until waitpid
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(kills, os.WEXITSTATUS(status))
            return
        kills += 1


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
