"""torch.distributed.checkpoint: saved by some ranks, resumed by others, bit for bit."""

import distributed_jobs as jobs
import pytest
from ranks import Ranks, different, needs_gloo

pytestmark = needs_gloo

SAVED, MORE = 6, 5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Started groups of processes by their size."""
    started = {size: Ranks(size, tmp_path_factory.mktemp(f"of{size}")) for size in (1, 2, 4)}
    yield started
    for group in started.values():
        group.close()


@pytest.mark.parametrize("resuming", [1, 2, 4])
@pytest.mark.parametrize(
    ("flat", "asynchronous", "options"),
    [
        (False, False, {}),
        (True, False, {"thermostat": True}),
        (False, True, {"explore_steps": 4}),
        (False, True, {"tempering": None}),
    ],
)
def test_any_number_of_ranks_resumes(ranks, tmp_path, resuming, flat, asynchronous, options):
    path = str(tmp_path / "checkpoint")
    ranks[2].run(jobs.save, path, SAVED, flat, asynchronous, options)
    expected = jobs.plain_training(SAVED + MORE, **options)
    found = ranks[resuming].run(jobs.resume, path, SAVED, MORE, flat, options)
    assert different(expected, found) == []


def test_an_unsharded_model_resumes(ranks, tmp_path):
    path = str(tmp_path / "checkpoint")
    ranks[4].run(jobs.save, path, SAVED, False, False, {})
    found = ranks[1].run(jobs.resume, path, SAVED, MORE, False, {}, False)
    assert different(jobs.plain_training(SAVED + MORE), found) == []


def test_a_process_that_dies_while_it_saves_leaves_the_last_checkpoint(ranks, tmp_path):
    path, later = str(tmp_path / "first"), tmp_path / "second"
    ranks[2].run(jobs.save, path, SAVED, False, False, {})
    dying = Ranks(2, tmp_path)
    dying.leave(jobs.die_while_saving, str(later), SAVED + 2, {})
    dying.close()
    # what tells a complete checkpoint from one that is not
    assert later.exists() and not (later / ".metadata").exists()
    found = ranks[2].run(jobs.resume, path, SAVED, MORE, False, {})
    assert different(jobs.plain_training(SAVED + MORE), found) == []


def test_a_checkpoint_of_another_model_is_refused(ranks, tmp_path):
    path = str(tmp_path / "checkpoint")
    ranks[2].run(jobs.save, path, SAVED, False, False, {})
    for error in ranks[2].run(jobs.resume_another_model, path):
        assert error is not None and "size" in error[1].lower(), error
    for error in ranks[2].run(jobs.resume_with_other_settings, path):
        assert error is not None and error[0] == "ValueError" and "temperature was 1.0, is 2.0" in error[1], (
            error
        )
