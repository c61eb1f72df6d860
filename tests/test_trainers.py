"""note_loss, and the trainers of docs/trainers.md against a plain loop, bit for bit; runs the page's code."""

import contextlib
import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from common import differing, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from ctld_cuda import CTLD
from ctld_cuda.trainers import note_loss, unwrap

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
mse = torch.nn.functional.mse_loss
EXAMPLES, BATCH = 24, 4


def snippets(title, **names):
    """Runs the code of a section of the page; returns what it defines."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S).group(1)
    names["torch"] = torch
    for code in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(code, f"{PAGE.name}, {title}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def quiet():
    """The trainers warn about missing accelerators, few workers and each other's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLES, 3, generator=generator), torch.randn(EXAMPLES, 1, generator=generator)


@pytest.fixture
def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def loader_of(examples):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples), BATCH)


def sampler_of(network, **options):
    return CTLD(network.parameters(), **({"lr": 0.01, "num_data": EXAMPLES} | options))


def chunks(batches, size):
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def by_hand(optimizer, loss_of, steps, *, share=None, scaler=None, clip=0.0, clipped=()):
    """What a trainer should do, with losses given to step; returns them.

    ``steps`` is a list of lists of micro-batches, ``share`` the divisor of their losses (None: their number),
    ``clipped`` the parameters whose gradients are clipped, in the order in which their norms are added up.
    """
    used = []
    for micro_batches in steps:
        optimizer.zero_grad()
        losses = []
        for batch in micro_batches:
            loss = loss_of(batch)
            scaled = loss / (share or len(micro_batches))
            (scaler.scale(scaled) if scaler else scaled).backward()
            losses.append(loss.detach().double())
        used.append(sum(losses) / len(losses))
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(clipped, clip)
        if scaler:
            scaler.step(optimizer, loss=used[-1])
            scaler.update()
        else:
            optimizer.step(loss=used[-1])
    return used


def mean_energy(optimizer):
    """Mean of all the energies that alpha has felt, in nats."""
    state = optimizer._sampler
    assert int(state.samples) <= 50  # a plain mean up to there
    return float((state.energy_mean * state.visits).sum() / state.visits.sum())


def assert_same_run(optimizer, expected, losses):
    assert differing(snapshot(optimizer), snapshot(expected)) == []
    assert int(optimizer.tempering_state()["visits"].sum()) == len(losses)
    assert mean_energy(optimizer) == pytest.approx(EXAMPLES * float(sum(losses)) / len(losses), rel=1e-5)
    assert float(optimizer.tempering_state()["alpha"]) != 0.0


# ------------------------------------------------------------------------------------------ note_loss


def prepared(backend, **options):
    """An optimizer with gradients."""
    torch.manual_seed(1)
    shape = (options["chains"], 5) if "chains" in options else (5,)
    p = torch.nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return CTLD([p], **({"num_data": 10, "backend": backend} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mean_of_the_noted_losses_is_used(backend, dtype):
    noting, given = prepared(backend), prepared(backend)
    for losses in ([0.3], [0.1, 0.7], [2.0, 1.0, 0.25]):
        losses = [torch.tensor(x, dtype=dtype) for x in losses]
        for loss in losses:
            noting.note_loss(loss)
        mean = sum(x.double() for x in losses) / len(losses)
        assert noting.step() == mean
        given.step(loss=mean)
        assert differing(snapshot(noting), snapshot(given)) == []


def test_noted_losses_replace_what_a_closure_returns(backend):
    noting, given = prepared(backend), prepared(backend)

    def closure():
        noting.note_loss(0.5)
        return 0.25

    noting.step(closure)
    given.step(loss=0.5)
    assert differing(snapshot(noting), snapshot(given)) == []
    noting.step(lambda: 0.25)
    given.step(loss=0.25)
    assert differing(snapshot(noting), snapshot(given)) == []


def test_a_closure_that_returns_nothing_leaves_the_loss(backend):
    one, other = prepared(backend), prepared(backend)
    one.step(lambda: None, loss=0.5)
    other.step(loss=0.5)
    assert differing(snapshot(one), snapshot(other)) == []


def test_chains_note_a_loss_each(backend):
    noting, given = prepared(backend, chains=3), prepared(backend, chains=3)
    noting.note_loss(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="shape"):
        noting.note_loss(torch.tensor(1.0))
    noting.note_loss(torch.tensor([3.0, 2.0, 1.0]))
    noting.step()
    given.step(loss=torch.full((3,), 2.0))
    assert differing(snapshot(noting), snapshot(given)) == []


def test_noted_losses_are_used_once(backend):
    optimizer = prepared(backend)
    optimizer.note_loss(1.0)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="note_loss"):
        optimizer.step()
    assert differing(before, snapshot(optimizer)) == []


def test_a_step_that_fails_keeps_them(backend):
    optimizer, expected = prepared(backend), prepared(backend)
    optimizer.note_loss(2.0)
    with pytest.raises(ValueError, match="note_loss"):
        optimizer.step(loss=1.0)
    optimizer.param_groups[0]["momentum"] = 2.0
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    expected.step(loss=2.0)
    assert differing(snapshot(expected), snapshot(optimizer)) == []


def test_a_skipped_step_forgets_them(backend):
    optimizer = prepared(backend)
    optimizer.step(loss=1.0)
    before = snapshot(optimizer)
    optimizer.note_loss(2.0)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    assert differing(before, snapshot(optimizer)) == []
    with pytest.raises(ValueError, match="note_loss"):
        optimizer.step()


def test_neither_copies_nor_loaded_states_have_them(backend):
    optimizer = prepared(backend)
    optimizer.step(loss=1.0)
    optimizer.note_loss(1.0)
    copied = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (copied, optimizer):
        with pytest.raises(ValueError, match="note_loss"):
            each.step()


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_noting_does_not_wait_and_keeps_no_graph(backend):
    optimizer = prepared(backend)
    weight = torch.ones((), requires_grad=True)
    with Waits() as waits:
        for x in (1.0, 2.0):
            loss = weight * torch.tensor(x, dtype=torch.float64)
            optimizer.note_loss(loss)
            with torch.no_grad():
                loss.div_(7.0)  # a trainer may scale what it was given
    assert waits.count == 0
    used = optimizer.step()
    assert used.item() == 1.5 and not used.requires_grad


def test_parameters_replaced_before_the_first_step(backend):
    """As accelerator.prepare does with FSDP2: a load_state_dict, then other parameters in the groups."""
    replaced, expected = prepared(backend), prepared(backend)
    replaced.load_state_dict(replaced.state_dict())
    (old,) = replaced.param_groups[0]["params"]
    new = torch.nn.Parameter(old.detach().clone())
    new.grad = old.grad.clone()
    replaced.param_groups[0]["params"] = [new]
    for optimizer in (replaced, expected):
        optimizer.step(loss=1.0)
    assert differing(snapshot(replaced), snapshot(expected)) == []
    assert list(replaced.state) == [new] and list(replaced.state_dict()["state"]) == [0]


def test_only_ctld_can_be_unwrapped(backend):
    optimizer = prepared(backend)
    assert unwrap(optimizer) is optimizer
    with pytest.raises(TypeError, match=r"SGD"):
        note_loss(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 1.0)


# ------------------------------------------------------------------------------------------ Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", reason="lightning: pip install ctld_cuda[trainers]")


def fit(lightning, module, examples, *, epochs=2, ckpt_path=None, callbacks=(), **options):
    options = {"logger": False, "enable_checkpointing": bool(callbacks)} | options
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    resumed = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
    trainer.fit(module, loader_of(examples), **resumed)
    return module.optimizers(use_pl_optimizer=False)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_automatic(lightning, network, examples, accumulate, precision):
    plain = copy.deepcopy(network)
    module = snippets("Lightning")["Sampled"](network, EXAMPLES)
    optimizer = fit(
        lightning, module, examples, accumulate_grad_batches=accumulate, precision=precision
    )  # four and two micro-batches in each epoch
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true", cache_enabled=False)

    def loss_of(batch):
        with autocast:
            return mse(plain(batch[0]), batch[1])

    expected = sampler_of(plain)
    steps = chunks(list(loader_of(examples)), accumulate) * 2
    losses = by_hand(expected, loss_of, steps, share=accumulate)
    assert_same_run(optimizer, expected, losses)


def test_lightning_closure(lightning, network, examples):
    """One batch per step: what the closure returns is the loss."""
    plain = copy.deepcopy(network)

    class Module(snippets("Lightning")["Sampled"]):
        def training_step(self, batch, batch_idx):
            return mse(self.network(batch[0]), batch[1])

    optimizer = fit(lightning, Module(network, EXAMPLES), examples)
    expected = sampler_of(plain)
    losses = by_hand(
        expected, lambda batch: mse(plain(batch[0]), batch[1]), chunks(list(loader_of(examples)), 1) * 2
    )
    assert_same_run(optimizer, expected, losses)


@pytest.mark.parametrize("name", ["Sampled", "Clipped"])
def test_lightning_with_a_scaler(lightning, network, examples, name):
    from lightning.pytorch.plugins import MixedPrecision

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**24)

    plain = copy.deepcopy(network)
    module = snippets("Lightning")[name](network, EXAMPLES)
    optimizer = fit(
        lightning, module, examples, plugins=MixedPrecision("16-mixed", "cpu", scaler()), epochs=3
    )

    def loss_of(batch):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            return mse(plain(batch[0]), batch[1])

    expected = sampler_of(plain)
    steps = chunks(list(loader_of(examples)), 1) * 3
    clip = 1.0 if name == "Clipped" else 0.0
    by_hand(expected, loss_of, steps, scaler=scaler(), clip=clip, clipped=list(plain.parameters()))
    assert differing(snapshot(optimizer), snapshot(expected)) == []
    assert 0 < int(optimizer._sampler.step) < len(steps)  # the first gradients overflowed


def test_lightning_with_a_scaler_needs_a_noted_loss(lightning, network, examples):
    from lightning.pytorch.plugins import MixedPrecision

    class Module(snippets("Lightning")["Sampled"]):
        def training_step(self, batch, batch_idx):
            return mse(self.network(batch[0]), batch[1])

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="note_loss"):
        fit(lightning, Module(network, EXAMPLES), examples, plugins=plugin)


@pytest.mark.parametrize("noting", [False, True])
def test_lightning_manual(lightning, network, examples, noting):
    plain = copy.deepcopy(network)

    class Noting(snippets("Lightning")["Manual"]):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = mse(self.network(batch[0]), batch[1])
            optimizer.note_loss(loss)
            self.manual_backward(loss)
            optimizer.step()

    module = (Noting if noting else snippets("Lightning")["Manual"])(network, EXAMPLES)
    optimizer = fit(lightning, module, examples)
    expected = sampler_of(plain)
    losses = by_hand(
        expected, lambda batch: mse(plain(batch[0]), batch[1]), chunks(list(loader_of(examples)), 1) * 2
    )
    assert_same_run(optimizer, expected, losses)


def test_lightning_calls_through_the_wrapper(lightning, network, examples):
    plain = copy.deepcopy(network)

    class Module(snippets("Lightning")["Sampled"]):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().finetune()

    optimizer = fit(lightning, Module(network, EXAMPLES), examples)
    expected = sampler_of(plain)
    epoch = chunks(list(loader_of(examples)), 1)
    by_hand(expected, lambda batch: mse(plain(batch[0]), batch[1]), epoch)
    expected.finetune()
    by_hand(expected, lambda batch: mse(plain(batch[0]), batch[1]), epoch)
    assert optimizer.phase == "finetune"
    assert differing(snapshot(optimizer), snapshot(expected)) == []


def test_lightning_logs_now_and_then(lightning, network, examples):
    from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

    class Kept(Logger):
        name = version = "kept"
        experiment = property(rank_zero_experiment(lambda self: None))

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    plain, logger = copy.deepcopy(network), Kept()
    module = snippets("Lightning")["Sampled"](network, EXAMPLES)
    fit(lightning, module, examples, logger=logger, log_every_n_steps=5)
    expected = sampler_of(plain)
    rows, steps = [], chunks(list(loader_of(examples)), 1) * 2
    for i, step in enumerate(steps):
        if i % 5 == 4:
            rows.append((i, {k: float(v) for k, v in expected.tempering_state().items() if v.dim() == 0}))
        by_hand(expected, lambda batch: mse(plain(batch[0]), batch[1]), [step])
    assert [row[0] for row in logger.rows] == [row[0] for row in rows]
    for (_, found), (_, wanted) in zip(logger.rows, rows, strict=True):
        for name in ("alpha", "temperature", "kinetic_temperature"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5)


def test_lightning_resumes(lightning, network, examples, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    untouched = copy.deepcopy(network)
    other_start = copy.deepcopy(network)
    torch.nn.init.zeros_(other_start[0].weight)
    sampled = snippets("Lightning")["Sampled"]
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(lightning, sampled(network, EXAMPLES), examples, epochs=2, callbacks=[saving])
    resumed = fit(
        lightning,
        sampled(other_start, EXAMPLES),
        examples,
        epochs=4,
        ckpt_path=str(tmp_path / "epoch=1.ckpt"),
    )
    whole = fit(lightning, sampled(untouched, EXAMPLES), examples, epochs=4)
    assert int(whole._sampler.step) == 24
    assert differing(snapshot(resumed), snapshot(whole)) == []


def test_fabric(lightning, network, examples):
    plain = copy.deepcopy(network)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(network, sampler_of(network))
    loader = fabric.setup_dataloaders(loader_of(examples))
    snippets("Fabric", fabric=fabric, model=model, optimizer=optimizer, loader=loader)
    expected = sampler_of(plain)
    losses = by_hand(
        expected, lambda batch: mse(plain(batch[0]), batch[1]), chunks(list(loader_of(examples)), 1)
    )
    assert_same_run(unwrap(optimizer), expected, losses)
    optimizer.finetune()
    assert unwrap(optimizer).phase == "finetune"


# ------------------------------------------------------------------------ Hugging Face and Accelerate


@pytest.fixture
def accelerate():
    package = pytest.importorskip("accelerate", reason="accelerate: pip install ctld_cuda[trainers]")
    with fresh_state(package):
        yield package


@pytest.fixture
def transformers(accelerate):
    return pytest.importorskip("transformers", reason="transformers: pip install ctld_cuda[trainers]")


@contextlib.contextmanager
def fresh_state(accelerate):
    """Accelerate keeps its settings in global variables."""
    for _ in range(2):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        if _ == 0:
            yield


class Regression(torch.nn.Module):
    """As transformers' models; remembers the batches of training."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.seen = []

    def forward(self, inputs, labels):
        if self.training:
            self.seen.append((inputs.clone(), labels.clone()))
        prediction = self.network(inputs)
        return {"loss": mse(prediction, labels), "prediction": prediction}


def arguments_of(transformers, path, **options):
    defaults = {
        "output_dir": str(path),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
    }
    return transformers.TrainingArguments(**(defaults | options))


def rows_of(examples):
    return [{"inputs": x, "labels": y} for x, y in zip(*examples, strict=True)]


def replay(model, seen, arguments, make, accumulate=1, epochs=2):
    """The trainer's batches in a plain loop; returns the optimizer and the losses."""
    optimizer = make(model)
    per_epoch = len(seen) // epochs
    steps = [s for epoch in chunks(seen, per_epoch) for s in chunks(epoch, accumulate)]
    losses = by_hand(
        optimizer,
        lambda batch: mse(model.network(batch[0]), batch[1]),
        steps,
        clip=arguments.max_grad_norm,
        clipped=list(model.parameters()),
    )
    return optimizer, losses


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (4, 0.1)])
def test_trainer(transformers, network, examples, tmp_path, accumulate, clip):
    arguments = arguments_of(
        transformers, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip
    )
    make = snippets("Hugging Face Trainer")["sampling_trainer"]
    model, plain = Regression(network), Regression(copy.deepcopy(network))
    trainer = make(model, rows_of(examples), arguments)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    expected = make(plain, rows_of(examples), arguments).optimizer
    assert [group["weight_decay"] for group in expected.param_groups] == [1e-4, 0.0]
    _, losses = replay(plain, model.seen, arguments, lambda _: expected, accumulate)
    assert len(losses) == (12 if accumulate == 1 else 4)
    assert differing(snapshot(optimizer), snapshot(expected)) == []
    prior = mean_energy(optimizer) - EXAMPLES * float(sum(losses)) / len(losses)
    assert 0.0 < prior < 0.01  # 24 / 2 * 1e-4 * |theta|^2
    logged = [row for row in trainer.state.log_history if "alpha" in row]
    assert logged and logged[-1]["alpha"] == float(optimizer.tempering_state()["alpha"])


def test_trainer_with_a_loss_function_and_a_schedule(transformers, network, examples, tmp_path):
    """A compute_loss_func divides by the items of all micro-batches; the schedule starts at a rate of 0."""
    arguments = arguments_of(
        transformers,
        tmp_path,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )

    def loss_function(outputs, labels, num_items_in_batch=None):
        return mse(outputs["prediction"], labels, reduction="sum") / num_items_in_batch

    class Predicting(Regression):
        def forward(self, inputs, labels=None):
            self.seen.append(inputs.clone())
            return {"prediction": self.network(inputs)}

    model, plain = Predicting(network), copy.deepcopy(network)
    make = snippets("Hugging Face Trainer")["sampling_trainer"]
    trainer = make(model, rows_of(examples), arguments, compute_loss_func=loss_function)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert int(optimizer._sampler.step) == 5  # of 6, because the first has a rate of 0
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.005, 0.0075, 0.0025])

    # the batches in this order, in a plain loop with the same rates
    target_of = {tuple(x.tolist()): y for x, y in zip(*examples, strict=True)}
    expected = make(Regression(plain), rows_of(examples), arguments).optimizer
    for i, micro_batches in enumerate(chunks(model.seen, 2)):
        for group in expected.param_groups:
            group["lr"] = 0.01 * min(i / 2, (6 - i) / 4)
        expected.zero_grad()
        total = 0.0
        for x in micro_batches:
            y = torch.stack([target_of[tuple(row.tolist())] for row in x])
            loss = mse(plain(x), y, reduction="sum") / (2 * BATCH)
            loss.backward()
            total = total + loss.detach().double()
        expected.step(loss=total)
    assert differing(snapshot(optimizer), snapshot(expected)) == []


def test_trainer_with_token_losses(transformers, seed, tmp_path):
    """A language model divides its micro-batch's sum by the tokens of all micro-batches."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    plain = copy.deepcopy(model)
    tokens = torch.randint(0, 11, (EXAMPLES, 8))
    rows = []
    for i, row in enumerate(tokens):
        labels = row.clone()
        labels[: 1 + i % 6] = -100  # so that micro-batches have different numbers of tokens
        rows.append({"input_ids": row, "labels": labels})
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arguments = arguments_of(transformers, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
    sampler = CTLD(model.parameters(), lr=0.01, num_data=EXAMPLES)
    trainer = snippets("Hugging Face Trainer")["SamplingTrainer"](
        model, arguments, train_dataset=rows, optimizers=(sampler, None)
    )
    trainer.train()
    expected = CTLD(plain.parameters(), lr=0.01, num_data=EXAMPLES)
    per_token = []
    for micro_batches in chunks(seen, 2):
        expected.zero_grad()
        noted, total, count = 0.0, 0.0, 0
        for batch in micro_batches:
            loss = plain(**batch).loss
            loss.backward()
            noted = noted + loss.detach().double()
            with torch.no_grad():
                logits = plain(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, 11)
            labels = batch["labels"][:, 1:].reshape(-1)
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
        per_token.append(total / count)
        expected.step(loss=noted)
    assert len(per_token) == 3
    assert differing(snapshot(sampler), snapshot(expected)) == []
    assert mean_energy(sampler) == pytest.approx(EXAMPLES * sum(per_token) / 3, rel=1e-5)


def test_trainer_makes_the_groups(transformers, network, examples, tmp_path):
    arguments = arguments_of(transformers, tmp_path, weight_decay=0.01)
    model, plain = Regression(network), Regression(copy.deepcopy(network))

    def trainer_of(model):
        return snippets("Hugging Face Trainer")["SamplingTrainer"](
            model,
            arguments,
            train_dataset=rows_of(examples),
            optimizer_cls_and_kwargs=(CTLD, {"lr": 0.02, "num_data": EXAMPLES}),
        )

    trainer = trainer_of(model)
    trainer.train()
    expected = trainer_of(plain).create_optimizer()
    assert [(g["lr"], g["weight_decay"]) for g in expected.param_groups] == [(0.02, 0.01), (0.02, 0.0)]
    replay(plain, model.seen, arguments, lambda _: expected)
    assert differing(snapshot(unwrap(trainer.optimizer)), snapshot(expected)) == []


def test_trainer_resumes(transformers, network, examples, tmp_path):
    make = snippets("Hugging Face Trainer")["sampling_trainer"]
    arguments = arguments_of(
        transformers,
        tmp_path,
        save_strategy="steps",
        save_steps=5,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
    )
    resumed_network = copy.deepcopy(network)
    whole = make(Regression(network), rows_of(examples), arguments)
    whole.train()
    assert int(unwrap(whole.optimizer)._sampler.step) == 9
    torch.nn.init.zeros_(resumed_network[0].weight)
    resumed = make(Regression(resumed_network), rows_of(examples), arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(resumed.model.seen) == 8
    assert differing(snapshot(unwrap(resumed.optimizer)), snapshot(unwrap(whole.optimizer))) == []


def test_trainer_without_the_hook_is_refused(transformers, network, examples, tmp_path):
    model = Regression(network)
    trainer = transformers.Trainer(
        model,
        arguments_of(transformers, tmp_path),
        train_dataset=rows_of(examples),
        optimizers=(sampler_of(network), None),
    )
    with pytest.raises(ValueError, match="note_loss"):
        trainer.train()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_accelerate(accelerate, network, examples, precision, accumulate):
    plain = copy.deepcopy(network)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    train = snippets("Accelerate")["train"]
    optimizer = unwrap(train(accelerator, network, sampler_of(network), loader_of(examples), epochs=2))

    def loss_of(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = plain(batch[0])
        return mse(prediction.float(), batch[1])

    expected = sampler_of(plain)
    steps = chunks(list(loader_of(examples)), accumulate) * 2
    assert_same_run(optimizer, expected, by_hand(expected, loss_of, steps, share=accumulate))


def test_accelerate_with_a_scaler(accelerate, network, examples):
    """Accelerate makes a GradScaler on GPUs only, so this test hands it to the wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    plain = copy.deepcopy(network)
    accelerate.Accelerator(cpu=True)
    scaler, other_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**24) for _ in range(2))
    optimizer = AcceleratedOptimizer(sampler_of(network), scaler=scaler)
    for inputs, targets in list(loader_of(examples)) * 3:
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = mse(network(inputs), targets)
        note_loss(optimizer, loss)
        scaler.scale(loss).backward()
        optimizer.step()
        assert not optimizer.step_was_skipped
        optimizer.zero_grad()

    def loss_of(batch):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            return mse(plain(batch[0]), batch[1])

    expected = sampler_of(plain)
    by_hand(expected, loss_of, chunks(list(loader_of(examples)), 1) * 3, scaler=other_scaler)
    assert 0 < int(unwrap(optimizer)._sampler.step) < 18
    assert differing(snapshot(unwrap(optimizer)), snapshot(expected)) == []


def test_accelerate_resumes(accelerate, network, examples, tmp_path):
    train = snippets("Accelerate")["train"]
    other_start = copy.deepcopy(network)
    torch.nn.init.zeros_(other_start[0].weight)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = train(accelerator, network, sampler_of(network), loader_of(examples))
    accelerator.save_state(str(tmp_path))
    train(accelerator, network, optimizer, loader_of(examples))
    with fresh_state(accelerate):
        accelerator = accelerate.Accelerator(cpu=True)
        other_start, resumed = accelerator.prepare(other_start, sampler_of(other_start))
        accelerator.load_state(str(tmp_path))
        train(accelerator, other_start, resumed, loader_of(examples))
    assert int(unwrap(resumed)._sampler.step) == 12
    assert differing(snapshot(unwrap(resumed)), snapshot(unwrap(optimizer))) == []
