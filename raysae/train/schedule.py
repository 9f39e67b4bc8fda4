"""What happens when in a run: pure functions of the step. So a schedule needs no state but the step number.

Steps count from 0, and a run has `steps` of them. Each takes a full batch, so a run reads `steps * batch` rows. That is
up to one batch more than the tokens asked for.
"""

from __future__ import annotations

from raysae.config import TrainConfig

DEAD_TOKENS = 10_000_000
DEAD_SHARE = 0.1


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the peak learning rate.

    It rises linearly over the first `warmup * steps` steps. Then it is 1. Over the last `decay * steps` it falls
    linearly.

    The rise starts and the fall ends at one step's worth. A step of rate 0 would train nothing. Where the two
    overlap, the smaller holds.
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rise, fall)


def sparsity_factor(step: int, steps: int, warmup: float) -> float:
    """Factor on a penalty's coefficient: 0 at step 0. It rises linearly to 1 over the first `warmup * steps` steps."""
    return min(1.0, step / (warmup * steps)) if warmup > 0 else 1.0


def dead_after(tokens: int) -> int:
    """Tokens without firing after which a latent counts as dead in a run of `tokens` tokens.

    It is 10 million, or a tenth of a short run.
    """
    return max(1, min(DEAD_TOKENS, int(DEAD_SHARE * tokens)))


def report_steps(train: TrainConfig) -> list[int]:
    """Numbers of finished steps after which a run is evaluated, ascending and each once.

    There are `train.reports` of them, evenly spaced. The last is the end of the run, where the evaluation takes all
    held-out rows. A run with fewer steps than reports is evaluated after every step.
    """
    return sorted({-(-train.steps * i // train.reports) for i in range(1, train.reports + 1)})
