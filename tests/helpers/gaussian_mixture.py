"""A mixture of Gaussians, whose noise, classes and ODE are known in closed form."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Mixture:
    """Mixture of Gaussians with the same variance, independent at each pixel. Its classes are its components."""

    weights: tuple[float, ...] = (0.6, 0.4)
    means: tuple[float, ...] = (-0.5, 0.4)
    spread: float = 0.15

    def components(self, x_t: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """log p(x_t, component), `(components, *x_t.shape)`, up to a constant."""
        variance = alpha_bar * self.spread**2 + 1 - alpha_bar
        return torch.stack(
            [
                math.log(weight) - (x_t - alpha_bar**0.5 * mean).square() / (2 * variance)
                for weight, mean in zip(self.weights, self.means)
            ]
        )

    def epsilon(self, x_t: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """The exact noise."""
        variance = alpha_bar * self.spread**2 + 1 - alpha_bar
        share = self.components(x_t, alpha_bar).softmax(dim=0)
        shape = (-1, *[1] * x_t.ndim)
        score = (share * (alpha_bar**0.5 * torch.tensor(self.means, dtype=x_t.dtype).view(shape) - x_t)).sum(
            0
        ) / variance
        return -((1 - alpha_bar) ** 0.5) * score

    def log_posterior(self, x_t: torch.Tensor, alpha_bar: float, component: int) -> torch.Tensor:
        """log p(component | x_t), summed over the pixels of each image, `(batch,)`."""
        return self.components(x_t, alpha_bar).log_softmax(dim=0)[component].sum(dim=(1, 2, 3))

    def conditional_end(self, x: torch.Tensor, start: float, end: float, component: int) -> torch.Tensor:
        """Returns the exact solution of the ODE of one component between two values of alpha_bar."""
        mean = self.means[component]
        (first, last) = ((a * self.spread**2 + 1 - a) ** 0.5 for a in (start, end))
        return end**0.5 * mean + (x - start**0.5 * mean) * last / first

    def fine_end(self, x: torch.Tensor, start: float, end: float, steps: int = 400) -> torch.Tensor:
        """Solves the ODE by the classical Runge-Kutta method in float64, for x / sqrt(alpha_bar) over log(sigma)."""
        log_sigmas = torch.linspace(
            *(0.5 * math.log((1 - a) / a) for a in (start, end)), steps + 1, dtype=torch.float64
        )
        state = x.double() / start**0.5

        def slope(log_sigma: float, state: torch.Tensor) -> torch.Tensor:
            sigma = math.exp(log_sigma)
            alpha_bar = 1 / (1 + sigma**2)
            return sigma * self.epsilon(state * alpha_bar**0.5, alpha_bar)

        for now, then in zip(log_sigmas.tolist(), log_sigmas[1:].tolist()):
            h = then - now
            k_1 = slope(now, state)
            k_2 = slope(now + h / 2, state + h / 2 * k_1)
            k_3 = slope(now + h / 2, state + h / 2 * k_2)
            k_4 = slope(then, state + h * k_3)
            state = state + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return state * end**0.5


MIXTURE = Mixture()


def start(images: int = 1, size: int = 8) -> torch.Tensor:
    """Noise x_T of one channel."""
    return torch.randn(images, 1, size, size, generator=torch.Generator().manual_seed(0))


def fitted_order(steps: list[int], errors: list[float]) -> float:
    """Minus the slope of log(error) over log(steps)."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    x = x - x.mean()
    return -((x * (y - y.mean())).sum() / x.square().sum()).item()
