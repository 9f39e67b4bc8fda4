"""Adam as `torch.optim.Adam(fused=True)` computes it, bit for bit, by the same operation. torch's own class imports its compiler at its first use:
two seconds of start-up and 70 MiB in every trainer, for nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch

EPSILON = 1e-8


class Adam:
    """Of some parameters, all on one device. `state` holds their `step`, `exp_avg` and `exp_avg_sq` once a step was taken."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], beta1: float, beta2: float):
        self.parameters = list(parameters)
        self.beta1, self.beta2 = beta1, beta2
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {parameter: {} for parameter in self.parameters}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter by its gradient."""
        for parameter in self.parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        averages, squares, steps = ([self.state[p][key] for p in self.parameters] for key in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            self.parameters, [p.grad for p in self.parameters], averages, squares, [], steps,
            lr=learning_rate, beta1=self.beta1, beta2=self.beta2, weight_decay=0.0, eps=EPSILON, amsgrad=False, maximize=False,
        )  # fmt: skip
