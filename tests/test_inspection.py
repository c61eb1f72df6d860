"""The quick look before a step: it takes what is as in the last step, and nothing else."""

import pytest
import torch
from conftest import require

from ctld_cuda.backends import extension
from ctld_cuda.inspection import UsualOneByOne


@pytest.fixture(params=["extension", "one by one"])
def usual_of(request):
    if request.param == "one by one":
        return UsualOneByOne
    require("cpu")
    return lambda parameters: extension._C.Usual(parameters, torch.Tensor)


def make(count=300, dtype=torch.float32):
    """More than one block of parameters with gradients, of several layouts."""
    makers = [
        lambda: torch.zeros(4, 3),
        lambda: torch.zeros(5, 1),
        lambda: torch.zeros(()),
        lambda: torch.zeros(2, 3, 4).permute(2, 0, 1),
    ]
    parameters = [torch.nn.Parameter(makers[i % len(makers)]().to(dtype)) for i in range(count)]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_as_usual_is_taken(usual_of, dtype):
    parameters = make(dtype=dtype)
    usual = usual_of(parameters)
    for step in range(3):
        if step == 1:
            for p in parameters:
                p.grad = torch.ones_like(p)
        gradients, addresses = usual.gradients()
        assert all(g is p.grad for g, p in zip(gradients, parameters, strict=True))
        assert addresses == [p.grad.data_ptr() for p in parameters]


def moved(p):
    p.data = p.data.clone()


def shortened(p):
    """At the same address; the gradient stays as long as it was."""
    p.data = p.data[:2]


def both_shortened(p):
    g = p.grad.data[:2]
    p.grad = None
    p.data = p.data[:2]
    p.grad = g


def frozen(p):
    p.requires_grad_(False)


def without_gradient(p):
    p.grad = None


def gradient_of_another_type(p):
    p.grad.data = p.grad.data.double()


def gradient_of_other_strides(p):
    p.grad = torch.zeros(3, 4).t()


def gradient_shortened(p):
    p.grad.data = p.grad.data[:2]


def gradient_viewed_as_another_type_of_the_same_size(p):
    p.grad.data = p.grad.data.view(torch.int32)


def sparse_gradient(p):
    p.grad = torch.zeros(4, 3).to_sparse()


CHANGES = [
    *(moved, shortened, both_shortened, frozen, without_gradient, gradient_of_another_type),
    *(gradient_of_other_strides, gradient_shortened, gradient_viewed_as_another_type_of_the_same_size),
    sparse_gradient,
]


@pytest.mark.parametrize("which", [0, 200])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_everything_else_is_left_to_a_closer_look(usual_of, change, which):
    parameters = make()
    usual = usual_of(parameters)
    assert usual.gradients() is not None
    change(parameters[which])
    assert usual.gradients() is None


def test_the_extension_leaves_other_types_of_gradients_alone():
    require("cpu")
    parameters = make()
    usual = extension._C.Usual(parameters, torch.Tensor)
    parameters[7].grad = torch.nn.Parameter(torch.zeros_like(parameters[7]))
    assert usual.gradients() is None


def test_strides_of_single_rows_do_not_matter(usual_of):
    p = torch.nn.Parameter(torch.zeros(1, 5))
    p.grad = torch.zeros(1, 5)
    usual = usual_of([p])
    p.grad = torch.zeros(5).as_strided((1, 5), (1, 1))
    gradients, addresses = usual.gradients()
    assert gradients[0] is p.grad and addresses == [p.grad.data_ptr()]


def test_without_the_exchange_interface_python_looks(monkeypatch):
    monkeypatch.setattr(extension, "_C", None)
    assert isinstance(extension.usual_of(make(4)), UsualOneByOne)


def test_gradients_are_not_kept_alive(usual_of):
    import weakref

    parameters = make(4)
    usual = usual_of(parameters)
    usual.gradients()
    gradient = weakref.ref(parameters[0].grad)
    parameters[0].grad = None
    assert gradient() is None
