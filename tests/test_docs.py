"""The documentation: its Python code runs, and every public name says what it takes."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

import ctld_cuda

ROOT = Path(__file__).resolve().parents[1]
# trainers.md needs optional packages: test_trainers.py runs it
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem != "trainers")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONGEST_LOOP = 60

# what is documented in docs/api.md besides ctld_cuda itself
PUBLIC_MODULES = ["diagnostics", "energy", "posterior", "reference", "report", "tempering", "trainers"]


# ------------------------------------------------------------------------------------- code on the pages


def blocks(page):
    return [match[1] for match in BLOCK.finditer(page.read_text())]


class Hurry(ast.NodeTransformer):
    """Loops end early, and draws are taken from the start."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "range":
            node.args[-1] = ast.parse(f"min({LONGEST_LOOP}, {ast.unparse(node.args[-1])})", mode="eval").body
        if isinstance(node.func, ast.Name) and node.func.id == "Tempering":
            node.keywords.append(ast.keyword("settle", ast.Constant(0)))
        return node

    def visit_keyword(self, node):
        self.generic_visit(node)
        if node.arg in ("burn_in", "thin"):
            node.value = ast.Constant({"burn_in": 0, "thin": 1}[node.arg])
        return node


def what_pages_assume():
    """The model, data and loss that the pages leave to the reader, small."""
    inputs, targets = torch.randn(40, 3), torch.randint(0, 2, (40,))
    train_set = torch.utils.data.TensorDataset(inputs, targets)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    cross_entropy = torch.nn.functional.cross_entropy
    return {
        "torch": torch,
        "model": model,
        "train_set": train_set,
        "loader": torch.utils.data.DataLoader(train_set, batch_size=4),
        "epochs": 6,
        "criterion": cross_entropy,
        "cross_entropy": cross_entropy,
        "inputs": inputs,
        "targets": targets,
        "test_inputs": torch.randn(5, 3),
        "optimizer": ctld_cuda.CTLD(
            model.parameters(), num_data=len(train_set), lr=0.001, tempering=ctld_cuda.Tempering(settle=0)
        ),
        # the mixture of README.md, as energies of chains
        "potential": lambda theta: 0.5 * theta.square().sum(1),
    }


def losses_of_single_examples(names):
    """What the page on noisy energies assumes: losses that are not averaged, and an exact coupling."""
    model, data = names["model"], names["inputs"]
    per_example = torch.nn.CrossEntropyLoss(reduction="none")
    return {
        "criterion": per_example,
        "all_losses_at_an_optimum": per_example(model(data), names["targets"]).detach(),
        "batches": torch.randperm(len(data)).view(4, 10),
        "optimizer": ctld_cuda.CTLD(
            model.parameters(),
            num_data=len(data),
            lr=0.001,
            tempering=ctld_cuda.Tempering(coupling="exact"),
        ),
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_code_on_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = what_pages_assume()
    for number, block in enumerate(blocks(page), 1):
        own = losses_of_single_examples(names) if "EnergyGate" in block else {}
        code = compile(
            ast.fix_missing_locations(Hurry().visit(ast.parse(block))), f"{page.name}, block {number}", "exec"
        )
        scope = names | own
        exec(code, scope)
        names |= {name: value for name, value in scope.items() if name not in own}


def test_the_pages_have_code():
    assert sum(len(blocks(page)) for page in PAGES) >= 10


# ------------------------------------------------------------------------------------------- docstrings


def public_objects():
    """(name, object) of what users import, with the public methods of classes."""
    found = {f"ctld_cuda.{name}": getattr(ctld_cuda, name) for name in ctld_cuda.__all__}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(f"ctld_cuda.{module_name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith(module.__name__)
            if own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{module.__name__}.{name}"] = value
    for name, value in list(found.items()):
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if not attribute.startswith("_") and inspect.isfunction(member):
                    found[f"{name}.{attribute}"] = member
    return found


def test_every_public_name_has_a_docstring():
    assert [name for name, value in public_objects().items() if not inspect.getdoc(value)] == []


def arguments_section(value):
    """Names that the Args section has an entry for, or None without the section."""
    match = re.search(r"^Args:\n((?:[ ]{4,}.*\n?|\n)+)", inspect.getdoc(value) or "", re.MULTILINE)
    if match is None:
        return None
    entries = re.findall(r"^([\w*][\w, *]*):", textwrap.dedent(match[1]), re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def takes(value):
    parameters = inspect.signature(value).parameters
    return {name for name in parameters if name not in ("self", "cls") and not name.startswith("_")}


def test_an_args_section_names_exactly_the_arguments():
    wrong = {}
    for name, value in public_objects().items():
        described = arguments_section(value)
        if described is not None and described != takes(value):
            wrong[name] = described ^ takes(value)
    assert wrong == {}


@pytest.mark.parametrize("name", sorted(ctld_cuda.__all__))
def test_what_the_package_exports_describes_its_arguments(name):
    value = getattr(ctld_cuda, name)
    if takes(value):
        assert arguments_section(value) == takes(value)
