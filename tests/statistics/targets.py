"""Targets with barriers and known functionals.

A target has energies and gradients in closed form, vectorised over chains; a start in its worst place; and
observables whose expectations follow from closed forms or from one- and two-dimensional quadrature.
"""

import math

import torch
from laws import BOUND, score, tail, worst

Tensor = torch.Tensor


def midpoints(low: float, high: float, cells: int) -> Tensor:
    """Nodes of the midpoint rule, float64 (cells,)."""
    return low + (torch.arange(cells, dtype=torch.float64) + 0.5) * ((high - low) / cells)


class Target:
    """A density exp(-U), and how to sample it.

    Attributes:
        dimension: parameters per chain.
        lr: learning rate; the bias of the step is then below the errors of the tests.
    """

    dimension: int
    lr: float

    def energy(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """U and its gradient at theta, float64: (C, d) gives (C,) and (C, d)."""
        raise NotImplementedError

    def start(self, chains: int, generator: torch.Generator) -> Tensor:
        """All chains where it is hardest to leave or has the least weight, float32 (chains, d)."""
        raise NotImplementedError

    def observe(self, theta: Tensor) -> dict[str, Tensor]:
        """Observables of float64 theta (C, d) by name, float64 (C, k)."""
        raise NotImplementedError

    def exact(self) -> dict[str, Tensor]:
        """Their expectations under exp(-U), float64 (k,)."""
        raise NotImplementedError

    def __call__(self, parameters: list[Tensor]) -> Tensor:
        """Sets the gradient of the only parameter and returns the losses (C,), for num_data = 1."""
        (theta,) = parameters
        energy, gradient = self.energy(theta.detach().double())
        theta.grad = gradient.float()
        return energy

    def quadrature(self, points: Tensor, volume: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Expectations of all observables by summing over points (n, d) with the given volumes (n,)."""
        energy, _ = self.energy(points)
        weight = torch.exp(energy.min() - energy) * volume
        weight /= weight.sum()
        return {name: weight @ values for name, values in self.observe(points).items()}


def columns(**observed: Tensor) -> dict[str, Tensor]:
    """Scalar observables (C,) as (C, 1)."""
    return {name: values.double()[:, None] for name, values in observed.items()}


class Mixture(Target):
    """0.3 N(-4 e_0, 1) + 0.7 N(4 e_0, 1): two modes 8 standard deviations apart."""

    lr = 0.05
    separation, weight = 8.0, 0.3

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def energy(self, theta):
        x, half = theta[:, 0], 0.5 * self.separation
        log_ratio = self.separation * x + math.log(1 / self.weight - 1)  # of right to left
        gradient = theta.clone()
        gradient[:, 0] += half - self.separation * torch.sigmoid(log_ratio)
        return 0.5 * theta.square().sum(1) + half * x - torch.nn.functional.softplus(log_ratio), gradient

    def start(self, chains, generator):
        theta = torch.randn(chains, self.dimension, generator=generator)
        theta[:, 0] += 0.5 * self.separation
        return theta

    def observe(self, theta):
        x = theta[:, 0]
        return columns(left=x < 0, spread=(x.abs() - 0.5 * self.separation).square())

    def exact(self):
        points = torch.zeros(20_000, self.dimension, dtype=torch.float64)
        points[:, 0] = midpoints(-14.0, 14.0, 20_000)
        return self.quadrature(points)


class Grid(Target):
    """5 x 5 Gaussians of unit width, 8 apart, with weights from 1 to 25; all start in the corner of weight 1.

    Single modes are visited too rarely for their shares to be nearly Gaussian. The observed "lines" are the
    shares of the 30 lines of five modes that a 5 x 5 grid with periodic edges has: 5 parallel ones in each of
    6 directions. Two modes lie on exactly one common line, so the lines determine the modes.
    """

    dimension, lr = 2, 0.05
    side, spacing = 5, 8.0

    def __init__(self) -> None:
        n = self.side**2
        at = (torch.arange(self.side, dtype=torch.float64) - 0.5 * (self.side - 1)) * self.spacing
        self.centers = torch.cartesian_prod(at, at)
        weights = 1.0 + torch.arange(n, dtype=torch.float64) * 7 % n
        self.weights = weights / weights.sum()
        self.offsets = self.weights.log() - 0.5 * self.centers.square().sum(1)
        row, column = torch.arange(n) // self.side, torch.arange(n) % self.side
        labels = [column, *((row + slope * column) % self.side for slope in range(self.side))]
        self.lines = torch.cat([torch.nn.functional.one_hot(label) for label in labels], 1).double()

    def modes(self, lines: Tensor) -> Tensor:
        """Shares of the 25 modes from those of the 30 lines: 6 lines through a mode count it 6 times."""
        return (self.lines @ lines - 1.0) / self.side

    def energy(self, theta):
        logits = torch.addmm(self.offsets, theta, self.centers.T)
        top = logits.amax(1, keepdim=True)
        parts = (logits - top).exp_()
        total = parts.sum(1, keepdim=True)
        energy = 0.5 * theta.square().sum(1) - (total.log() + top)[:, 0]
        return energy, theta - parts @ self.centers / total

    def start(self, chains, generator):
        return torch.randn(chains, 2, generator=generator) + self.centers[self.weights.argmin()].float()

    def observe(self, theta):
        cell = (theta / self.spacing + 0.5 * self.side).floor().clamp(0, self.side - 1)
        nearest = (cell - 0.5 * (self.side - 1)) * self.spacing
        lines = self.lines[(cell[:, 0] * self.side + cell[:, 1]).long()]
        return {"lines": lines} | columns(spread=0.5 * (theta - nearest).square().sum(1))

    def exact(self):
        axis = midpoints(-25.0, 25.0, 500)
        return self.quadrature(torch.cartesian_prod(axis, axis))


class Ring(Target):
    """A thin ring with three modes of weights about 0.55, 0.33 and 0.12; all start in the last.

    U = 40 (r^2 - 1)^2 - 7 r^3 cos 3 phi - 0.8 r cos(phi - 40 degrees): a polynomial in x and y, so smooth at
    the centre, which is a barrier of 40 nats; the barriers along the ring are twice 7.
    """

    dimension, lr = 2, 0.001
    stiffness, modulation, tilt = 40.0, 7.0, 0.8
    direction = math.radians(40.0)

    def energy(self, theta):
        x, y = theta.unbind(1)
        excess = x * x + y * y - 1.0
        a, tx, ty = (
            self.modulation,
            self.tilt * math.cos(self.direction),
            self.tilt * math.sin(self.direction),
        )
        energy = self.stiffness * excess * excess - a * x * (x * x - 3.0 * y * y) - tx * x - ty * y
        radial = 4.0 * self.stiffness * excess
        along_x = radial * x - 3.0 * a * (x * x - y * y) - tx
        along_y = radial * y + 6.0 * a * x * y - ty
        return energy, torch.stack((along_x, along_y), 1)

    def start(self, chains, generator):
        third = torch.tensor([math.cos(math.radians(240.0)), math.sin(math.radians(240.0))])
        return third + 0.05 * torch.randn(chains, 2, generator=generator)

    def observe(self, theta):
        x, y = theta.unbind(1)
        radius = (x * x + y * y).sqrt()
        angle = torch.atan2(y, x)
        mode = torch.round(angle * (1.5 / math.pi)) % 3
        return {"modes": (mode[:, None] == torch.arange(3)).double()} | columns(
            radius=radius, radial_spread=(radius - 1.0).square(), angular_spread=1.0 - torch.cos(3.0 * angle)
        )

    def exact(self):
        radius, angle = midpoints(0.0, 2.0, 800), midpoints(-math.pi, math.pi, 1_200)
        polar = torch.cartesian_prod(radius, angle)
        points = polar[:, :1] * torch.stack((polar[:, 1].cos(), polar[:, 1].sin()), 1)
        return self.quadrature(points, polar[:, 0])


class DoubleWell(Target):
    """A quartic double well in x whose other coordinates, 19 by default, are Gaussian given x.

    U = 14 ((x/3)^2 - 1)^2 - 1.25 x/3 + sum of k_i(x)/2 (y_i - c_i x)^2, k_i(x) = k_i (1 + 0.08 tanh x).

    The wells differ in energy and in width: at temperature 1 the right one, lower by 2.5 nats, has most of
    the weight, at temperature 10 the left one, wider by a factor (1.08/0.92)^(19/2) in volume. So weights
    cannot come out right by accident, from hot states say. All start on the left.
    """

    lr = 0.03
    height, half_width, tilt, squeeze = 14.0, 3.0, 1.25, 0.08

    def __init__(self, dimension: int = 20) -> None:
        self.dimension = dimension
        i = torch.arange(dimension - 1, dtype=torch.float64)
        self.stiffness = torch.linspace(0.5, 2.0, dimension - 1, dtype=torch.float64)
        self.shear = 0.3 * (1.0 - 2.0 * (i % 2))

    def energy(self, theta):
        x, u = theta[:, 0], theta[:, 0] / self.half_width
        deviation = theta[:, 1:] - self.shear * x[:, None]
        weighted = self.stiffness * deviation
        squares = 0.5 * (weighted * deviation).sum(1)
        tanh = torch.tanh(x)
        k = 1.0 + self.squeeze * tanh
        excess = u * u - 1.0
        energy = self.height * excess * excess - self.tilt * u + k * squares
        along_y = weighted * k[:, None]
        along_x = (
            (4.0 * self.height * excess * u - self.tilt) / self.half_width
            + self.squeeze * (1.0 - tanh * tanh) * squares
            - along_y @ self.shear
        )
        return energy, torch.cat((along_x[:, None], along_y), 1)

    def start(self, chains, generator):
        theta = torch.randn(chains, self.dimension, generator=generator)
        theta[:, 0] = 0.3 * theta[:, 0] - self.half_width
        theta[:, 1:] += self.shear.float() * theta[:, :1]
        return theta

    def observe(self, theta):
        x = theta[:, 0]
        k = self.stiffness * (1.0 + self.squeeze * torch.tanh(x))[:, None]
        y_square = (k * (theta[:, 1:] - self.shear * x[:, None]).square()).mean(1)
        return columns(left=x < 0, x_square=x * x, y_square=y_square, x_y=theta[:, 1:] @ self.shear * x)

    def exact(self):
        return self.at(1.0)

    def at(self, temperature: float) -> dict[str, Tensor]:
        """Expectations at any temperature: y is integrated in closed form, x by quadrature."""
        x = midpoints(-9.0, 9.0, 40_000)
        u = x / self.half_width
        well = self.height * (u * u - 1.0).square() - self.tilt * u
        log_weight = -well / temperature - 0.5 * (self.dimension - 1) * (1.0 + self.squeeze * x.tanh()).log()
        weight = torch.softmax(log_weight, 0)
        x_square = weight @ x.square()
        return {
            "left": weight[x < 0].sum(),
            "x_square": x_square,
            "y_square": torch.tensor(temperature, dtype=torch.float64),
            "x_y": self.shear.square().sum() * x_square,
        }


class Funnel(Target):
    """Neal's funnel: v ~ N(0, s^2), and given v, n coordinates ~ N(0, exp(v)).

    At inverse temperature beta, v ~ N(s^2 n (1 - beta)/(2 beta), s^2/beta): heat moves v into the mouth,
    because volume grows with it, and only mildly widens it.
    """

    lr = 0.02

    def __init__(self, width: float = 1.0, others: int = 3, start: float = -3.0) -> None:
        self.width, self.others, self.dimension = width, others, others + 1
        self.first_v = start * width  # -3: in the neck

    def energy(self, theta):
        v, x = theta[:, 0], theta[:, 1:]
        precision = torch.exp(-v)
        squares = 0.5 * precision * x.square().sum(1)
        energy = 0.5 * (v / self.width).square() + 0.5 * self.others * v + squares
        along_v = v / self.width**2 + 0.5 * self.others - squares
        return energy, torch.cat((along_v[:, None], x * precision[:, None]), 1)

    def start(self, chains, generator):
        theta = torch.randn(chains, self.dimension, generator=generator)
        theta[:, 0] = self.first_v
        theta[:, 1:] *= math.exp(0.5 * self.first_v)
        return theta

    def observe(self, theta):
        v, x = theta[:, 0], theta[:, 1:]
        neck = v < -self.width
        return columns(v=v, v_square=v * v, neck=neck, x_square=torch.exp(-v) * x.square().mean(1))

    def exact(self):
        neck = 0.5 * math.erfc(1.0 / math.sqrt(2.0))
        values = {"v": 0.0, "v_square": self.width**2, "neck": neck, "x_square": 1.0}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def mean_v(self, beta: Tensor) -> Tensor:
        """Mean of v at inverse temperature beta."""
        return self.width**2 * self.others * (1.0 - beta) / (2.0 * beta)

    def free_energy(self, beta: Tensor) -> Tensor:
        """ln Z(beta)/Z(1)."""
        slope = self.width * self.others * (1.0 - beta)
        return slope.square() / (8.0 * beta) - 0.5 * self.dimension * beta.log()


# ------------------------------------------------------------------------------------- comparisons


def ratio(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Ratios of sums over chains (dim 0), and their standard errors from the spread over chains.

    Chains may share a bias but no noise, so that their averages over time are as good as independent,
    however slowly each of them moves.
    """
    value = numerator.sum(0) / denominator.sum(0)
    chains = numerator.shape[0]
    residual = numerator - value * denominator
    return value, (residual.square().sum(0) * chains / (chains - 1)).sqrt() / denominator.sum(0)


def among(t: Tensor, samples: int) -> float:
    """The largest of k deviations as one: beyond BOUND by chance as rarely as a single Gaussian number.

    ``samples``: the errors were estimated from so many numbers; t is brought to the tails of a Gaussian by
    Wallace's approximation.
    """
    freedom, k = samples - 1, t.numel()
    scale = (8 * freedom + 1) / (8 * freedom + 3)
    z = (freedom * torch.log1p(t.double().square() / freedom)).sqrt() * scale
    return worst(z) * BOUND / score(tail(BOUND) / k)
