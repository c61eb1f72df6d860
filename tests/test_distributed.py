"""Many processes step the same parameters: bit for bit as one would, and an error where they disagree."""

import copy
import pickle

import distributed_jobs as jobs
import pytest
import torch
from common import make_parameters
from ranks import Ranks, different, needs_gloo

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering, distributed, layout
from ctld_cuda.distributed import disagreement, mean_of_rows

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.close()


@pytest.fixture(params=["two", "four"])
def ranks(request):
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("kind", ["shards", "hybrid", "shards of shards"])
def test_the_rows_of_a_shard_are_those_that_torch_gives_it(four, kind):
    for ours, torchs in four.run(jobs.part_of_rows, kind):
        assert ours == torchs


SETTINGS = {
    "default": {},
    "fine-tuning": {"steps": 12, "history": 30},
    "constant temperature": {"tempering": None},
    "euler": {"integrator": "euler", "tempering": Tempering(coupling="exact")},
    "hills": {"tempering": Tempering(bias=Metadynamics(), coupling="exact", bins=20)},
    "force": {"tempering": Tempering(bias=AdaptiveForce(residual=None), coupling="exact", bins=20)},
    "thermostat": {"thermostat": True, "history": 7},
    "thermostat, euler": {"thermostat": True, "integrator": "euler", "tempering": None},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_shards_move_bit_for_bit_as_the_whole(ranks, backend, settings):
    options = SETTINGS[settings] | {"backend": backend}
    assert different(jobs.alone(20, options), ranks.run(jobs.together, 20, options)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shards_of_any_dtype(ranks, backend, dtype):
    options = {"backend": backend}
    found = ranks.run(jobs.together, 12, options, "shards", dtype)
    assert different(jobs.alone(12, options, dtype), found) == []


@pytest.mark.parametrize("thermostat", [False, True])
@pytest.mark.parametrize("kind", ["replicas", "hybrid", "shards of shards"])
def test_placements_on_meshes(four, kind, thermostat):
    options = {"thermostat": thermostat}
    assert different(jobs.alone(15, options), four.run(jobs.together, 15, options, kind)) == []


@pytest.mark.parametrize("kind", ["shards", "hybrid"])
def test_plain_tensors_beside_shards_are_replicas(four, kind):
    found = four.run(jobs.together, 15, {}, kind, torch.float32, (1, 3))
    assert different(jobs.alone(15, {}), found) == []


@pytest.mark.parametrize("options", [{}, {"thermostat": True}, {"explore_steps": 5}])
def test_fsdp(ranks, options):
    assert different(jobs.plain_training(10, **options), run_with(ranks, jobs.fsdp, 10, options)) == []


def run_with(ranks, function, steps, options):
    return ranks.run(jobs.with_options, function.__name__, steps, options)


# -------------------------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("options", [{}, {"tempering": None}, {"explore_steps": 5}])
def test_ddp_moves_with_the_mean_loss_and_gradient(ranks, options):
    found = ranks.run(jobs.ddp, 10, options)
    if ranks.size == 2:  # the order in which more gradients are added is the collective's own affair
        assert different(jobs.mean_of_ranks(10, 2, options), found) == []
    assert different(found[0], found) == []
    apart = ranks.run(jobs.ddp, 10, options | {"process_group": None})
    assert (options.get("tempering", 0) is None) == (different(apart[0], apart) == [])


def test_ranks_on_their_own(two):
    found = two.run(jobs.independent, each=[(1,), (2,)])
    for seed, outcome in zip((1, 2), found, strict=True):
        assert different(jobs.alone(5, {"seed": seed}), [outcome]) == []


def test_an_infinity_on_one_rank_stops_all(two):
    found = two.run(jobs.infinite_on_one_rank, 5)
    assert different(found[0][0], [found[1][0]]) == []
    assert [scale for _, scale in found] == [2.0, 2.0]
    assert int(found[0][0]["step"]) == 4


def test_the_mean_of_equal_losses_is_that_loss():
    for x in (torch.rand(100, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)):
        for ranks in (1, 2, 4, 8, 64):
            assert torch.equal(mean_of_rows(x.expand(ranks, -1).contiguous()), x)
    x = torch.rand(7, 5, dtype=torch.float64)
    torch.testing.assert_close(mean_of_rows(x), x.mean(0))


# ---------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("what", "values", "message"),
    [
        ("seed", [0, 1], "seed is 0 on rank 0, 1 on rank 1"),
        ("num_data", [100, 200], "num_data is 100.0 on rank 0, 200.0 on rank 1"),
        ("integrator", ["baoab", "euler"], "integrator"),
        ("momentum", [0.9, 0.8], "lr, momentum, weight_decay"),
        ("explore_steps", [0, 5], "phase is 'finetune' on rank 0, 'explore' on rank 1"),
        ("finetune", [2, 3], "phase is 'finetune' on rank 0, 'explore' on rank 1"),
        ("lr", [[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]], "lr, momentum, weight_decay"),
    ],
)
def test_ranks_that_disagree(two, what, values, message):
    for error in two.run(jobs.disagreeing, what, each=[(v,) for v in values]):
        assert error is not None and error[0] == "RuntimeError" and message in error[1], error


def test_ranks_with_other_parameters(two):
    for error in two.run(jobs.other_network, each=[(0,), (1,)]):
        assert error is not None and "values of the parameters" in error[1], error


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("columns", "replicated or sharded on dimension 0"),
        ("chains", "chains cannot be combined"),
        ("smaller group", "on a mesh of 2 ranks"),
        ("preconditioner", "cannot step sharded parameters"),
    ],
)
def test_what_cannot_be_stepped_is_refused(two, what, message):
    error = two.run(jobs.failing_construction, what)[0]
    assert error is not None and error[0] == "ValueError" and message in error[1], error


def test_a_group_of_others_is_refused(two):
    mine, foreign = two.run(jobs.failing_construction, "foreign group")
    assert mine is None
    assert foreign == ("ValueError", "this process is not a member of process_group")


@pytest.mark.parametrize("group", ["world", 3, object()])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match="process_group must be"):
        CTLD(make_parameters([(3,)]), num_data=10, process_group=group)


def test_the_digest_of_parameters_sees_every_byte(monkeypatch):
    """In blocks, so that large models need no more memory, and for parameters without dimensions."""
    parameters = [torch.randn(()), torch.randn(7, 3), torch.randn(11).to(torch.bfloat16)]
    slots = [layout.Slot(p, None, i, 0, 1) for i, p in enumerate(parameters)]
    whole = distributed.parameters_digest(slots)
    monkeypatch.setattr(distributed, "DIGEST_BLOCK", 8)
    assert distributed.parameters_digest(slots) == whole
    for p in parameters:
        for i in range(p.numel()):
            kept = p.view(-1)[i].clone()
            p.view(-1)[i] += 1
            assert distributed.parameters_digest(slots) != whole
            p.view(-1)[i] = kept
    parameters[1].copy_(parameters[1].flip(0))
    assert distributed.parameters_digest(slots) != whole


def test_a_disagreement_names_what_differs():
    text = disagreement([{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}])
    assert "b is 2 on rank 0, 3 on rank 2" in text and "a is" not in text and "process_group=None" in text


def test_copies_keep_the_choice_of_processes():
    alone = CTLD(make_parameters([(3,)]), num_data=10, process_group=None)
    assert copy.deepcopy(alone).process_group is None
    assert pickle.loads(pickle.dumps(CTLD(make_parameters([(3,)]), num_data=10))).process_group == "auto"
