"""Adam, bit for bit as `torch.optim.Adam(fused=True)` computes it.

It calls the same fused operation. torch's own class imports the torch compiler at its first use. That would cost every
trainer two seconds of start-up and 70 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

EPSILON = 1e-8


class Adam:
    """Adam over some parameters, all on one device.

    `state` holds `step`, `exp_avg` and `exp_avg_sq` of each parameter once a step was taken.
    """

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
        averages, squares, steps = (
            [self.state[p][key] for p in self.parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            self.parameters, [p.grad for p in self.parameters], averages, squares, [], steps,
            lr=learning_rate, beta1=self.beta1, beta2=self.beta2, weight_decay=0.0, eps=EPSILON,
            amsgrad=False, maximize=False,
        )  # fmt: skip
