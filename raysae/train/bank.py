"""Several SAEs trained on one copy of each batch, each as if it were alone.

A member owns everything its training depends on: SAE, Adam, schedule and counters. It reads the shared batch and never
writes to it. So it comes out bit for bit the same in any company.

Its own seed fixes its initial weights. No random numbers are drawn afterwards, so its state holds no generator.

`next_row` is the row of the stream where a member's next batch begins. It is a whole number of batches.
"""

from __future__ import annotations

import math
import time
from collections import deque

import torch

from raysae.config import ARCHITECTURES, OUTLIER_NORM, SAEConfig, TrainConfig
from raysae.determinism import precision_of_training
from raysae.kernels.rows import sum_of_rows, without_outliers
from raysae.sae.architectures import build
from raysae.sae.base import StepInfo, centre_of, share_buffers
from raysae.train.adam import Adam
from raysae.train.schedule import dead_after, learning_rate_factor, sparsity_factor

# Rows of the stream from one that `Member.calibrate` takes to the next. Contexts of several shards then take part, and
# not just the rows that the weights have learned last.
EVERY = 16

State = tuple[dict[str, torch.Tensor], dict]  # Tensors and JSON scalars
ROUNDING = 1e-10  # Rows whose variance is below this share of their mean square differ by rounding alone


class Member:
    """One SAE in training.

    `sae` works on normalised activations x / scale. `failed` is a sentence that says why the SAE stopped, or None while
    it is sound.
    """

    def __init__(
        self, name: str, config: SAEConfig, d: int, train: TrainConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.name = name
        self.config = config
        self.train = train
        self.sae = build(config, d, train).to(device)
        self.sae.precision = precision_of_training(train, device)
        self.parameters = dict(self.sae.named_parameters())
        self.clipped = {name: p for name, p in self.parameters.items() if name not in self.sae.UNCLIPPED}
        beta1 = ARCHITECTURES[config.architecture].beta1 if train.beta1 is None else train.beta1
        self.adam = Adam(self.parameters.values(), beta1, train.beta2)
        self.quiet = torch.zeros(config.width, dtype=torch.int64, device=device)  # (n,) tokens since each latent fired
        self.dead_after = dead_after(train.tokens)
        self.row_sum = torch.zeros(d, dtype=torch.float64, device=device)  # (d,) sum of the raw rows trained on
        # Raw rows for `calibrate`, oldest first: every EVERY-th row, and CALIBRATION_ROWS of these
        self.recent: deque[torch.Tensor] = deque()
        self.steps_done = 0
        self.steps_skipped = 0  # Steps among `steps_done` whose batch was skipped
        self.initialised = False
        self.scale = 1.0  # Host copy of `sae.scale`. Reading a GPU's at every step would wait for the device.
        self.failed: str | None = None
        self.sums: dict[str, float] = {}  # Loss terms and gradient norm, summed over the steps since the last report
        self.summed = 0
        # Seconds this process spent in steps, and the number of those steps. A measurement, not part of the state.
        self.seconds, self.timed = 0.0, 0

    @property
    def next_row(self) -> int:
        return self.steps_done * self.train.batch

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.train.steps

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the raw rows trained on, `(d,)` float64 on the CPU. It is zero before the first step."""
        return (self.row_sum / max(1, (self.steps_done - self.steps_skipped) * self.train.batch)).cpu()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.learning_rate * learning_rate_factor(
            self.steps_done, self.train.steps, self.train.warmup, self.train.decay
        )

    def initialise(self, rows: torch.Tensor, centre: torch.Tensor | None = None) -> None:
        """Set scale, decoder bias and weights from the first raw rows of the stream, `(r, d)`.

        `centre` is the centre of these rows, where it is known.
        """
        self.sae.initialise(rows.to(self.quiet.device), centre)
        self.scale = float(self.sae.scale)
        self.keep(rows[-self.sae.CALIBRATION_ROWS :].to(self.quiet.device))
        self.initialised = True

    def step(self, x: torch.Tensor, row_sum: torch.Tensor) -> None:
        """Take one update on normalised rows `(b, d)`. `row_sum` `(d,)` is the sum of the raw rows.

        If loss or gradient norm is not finite, nothing changes and `failed` is set.
        """
        began = time.perf_counter()
        info = StepInfo(
            sparsity_factor=sparsity_factor(self.steps_done, self.train.steps, self.train.sparsity_warmup),
            dead=self.quiet >= self.dead_after,
            progress=self.steps_done / self.train.steps,
        )
        terms = self.sae.loss_and_grads(x, x, info)
        self.sae.after_grads()
        names = [*terms, "gradient_norm", "clipped_norm"]
        # One transfer brings all numbers of a step. Separate ones would each wait for the GPU.
        numbers = [value.detach().double() for value in (*terms.values(), *self._gradient_norms())]
        values = dict(zip(names, torch.stack(numbers).tolist(), strict=True))
        clipped_norm = values.pop("clipped_norm")
        if bad := [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]:
            self.fail(bad[0].replace("_", " "), values[bad[0]])
            return
        self._clip(clipped_norm)
        self.adam.step(self.learning_rate)
        self.sae.after_step()
        self.row_sum += row_sum
        self.quiet += len(x)
        self.quiet[self.sae.fired()] = 0
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.summed += 1
        self.steps_done += 1
        self.seconds += time.perf_counter() - began
        self.timed += 1

    def keep(self, x: torch.Tensor) -> None:
        """Remember the raw rows `x` (r, d) for `calibrate`. Drop those that later ones replace."""
        if wanted := self.sae.CALIBRATION_ROWS:
            self.recent.append(x)
            while sum(map(len, self.recent)) - len(self.recent[0]) >= wanted:
                self.recent.popleft()

    def calibrate(self) -> None:
        """Set what inference takes from data, from every EVERY-th of the last rows. See `SAE.calibrate`.

        A run that has seen too few rows also takes those it was initialised from. The result depends on weights and
        rows alone. So it does not matter how often a run is evaluated.
        """
        if self.recent:
            self.sae.calibrate(self._last_rows() / self.sae.scale)

    def _last_rows(self) -> torch.Tensor:
        return torch.cat(list(self.recent))[-self.sae.CALIBRATION_ROWS :]

    def skip(self) -> None:
        """Let a step pass whose batch has skipped rows. The step counts, and nothing else changes."""
        self.steps_done += 1
        self.steps_skipped += 1

    def fail(self, what: str, value: float, row: int | None = None) -> None:
        """Stop for good because `what` is `value`, which is nan or infinite.

        It happened in the batch of the next step, at `row` where that is known.
        """
        where = f"row {row}" if row is not None else f"rows {self.next_row} to {self.next_row + self.train.batch - 1}"
        self.failed = f"{self.name}: {what} is {value} at step {self.steps_done} ({where})"

    def take_means(self) -> dict[str, float]:
        """Means of the loss terms and the gradient norm since the last call. The next means start anew."""
        means = {name: value / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    def _gradient_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Global norms of this SAE's gradients: of all, and of those that are clipped."""
        norms = {name: torch.linalg.vector_norm(p.grad) for name, p in self.parameters.items()}
        whole, clipped = (
            torch.linalg.vector_norm(torch.stack([norms[name] for name in names]))
            for names in (self.parameters, self.clipped)
        )
        return whole, clipped

    def _clip(self, norm: float) -> None:
        """Scale this SAE's gradients down to the global norm clip_norm · √d. `norm` is what it is before.

        Most steps are below it and need no pass over the gradients.
        """
        limit = self.train.clip_norm * math.sqrt(self.sae.d_in)
        if norm > limit:
            torch._foreach_mul_([p.grad for p in self.clipped.values()], limit / norm)

    def state(self) -> State:
        """Everything the rest of the training depends on.

        The tensors are live, not copies, except the last rows. JSON keeps the scalars exactly.
        """
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.adam.state[parameter].items()}
        tensors |= {"quiet": self.quiet, "row_sum": self.row_sum}
        if self.recent:
            tensors["recent"] = self._last_rows()
        keys = ("steps_done", "steps_skipped", "initialised", "failed", "sums", "summed")
        return tensors, {key: getattr(self, key) for key in keys}

    def load(self, state: State) -> None:
        """Go back to a `state`, bit for bit.

        Raises:
            KeyError, RuntimeError: the state is another SAE's.
        """
        tensors, scalars = state
        self.sae.load_state_dict(
            {name.removeprefix("sae."): tensor for name, tensor in tensors.items() if name.startswith("sae.")}
        )
        for name, parameter in self.parameters.items():
            kept = {
                key: tensors[f"adam.{key}.{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{key}.{name}" in tensors
            }
            self.adam.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
        self.quiet.copy_(tensors["quiet"])
        self.scale = float(self.sae.scale)
        self.row_sum.copy_(tensors["row_sum"])
        self.recent = deque([tensors["recent"].to(self.row_sum.device)] if "recent" in tensors else [])
        for key, value in scalars.items():
            setattr(self, key, value)


class Bank:
    """Members by name, which take their steps on one batch copy.

    `d` is the width of the activations. All members are on one device.
    """

    def __init__(self, d: int, train: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.d = d
        self.train = train
        self.device = torch.device(device)
        self.members: dict[str, Member] = {}
        self._normalised: dict[float, torch.Tensor] = {}  # Scale → (b, d), reused by every batch

    def add(self, name: str, config: SAEConfig, state: State | None = None) -> Member:
        """Add a member. It continues from `state`, or stands at row 0 and awaits `initialise`."""
        member = Member(name, config, self.d, self.train, self.device)
        if state is not None:
            member.load(state)
        self.members[name] = member
        share_buffers(member.sae for member in self.members.values())
        return member

    def initialise(self, members: list[Member], rows: torch.Tensor) -> None:
        """Initialise these members from the first raw rows of the stream, `(r, d)`.

        Outliers among the rows do not count: a few rows of a hundred times the median norm would set the scale alone.
        The centre of the rows is computed once for all members. Where the rows are all alike, every member fails.
        """
        rows = rows.to(self.device, torch.float32)
        if alike := _alike(rows):
            for member in members:
                member.failed = (
                    f"{member.name}: the first {len(rows):,} activations at {member.config.hook_point} are {alike}, so "
                    "there is nothing to learn. Check the hook point, model.modules and the model's weights"
                )
            return
        rows = without_outliers(rows, OUTLIER_NORM)
        centre = centre_of(rows, self.train)
        for member in members:
            member.initialise(rows, centre)

    def at(self, row: int) -> list[Member]:
        """Members whose next batch begins at `row`, without the failed and finished ones."""
        return [
            member
            for member in self.members.values()
            if member.next_row == row and not member.failed and not member.finished
        ]

    def step(self, x: torch.Tensor, row: int) -> list[Member]:
        """Take one step of every member that stands at `row`, on raw rows `(b, d)`.

        Returns these members, each of them trained or failed.
        """
        members = self.at(row)
        x = x.to(self.device, non_blocking=True)
        row_sum = sum_of_rows(x)
        scales = {member.name: member.scale for member in members}
        shared = {scale: self._divided(x, scale) for scale in scales.values()}
        kept = x[-row % EVERY :: EVERY].clone()  # Readers overwrite `x`
        for member in members:
            member.step(shared[scales[member.name]], row_sum)
            member.keep(kept)
        if any(member.failed for member in members):
            # A row that is not finite makes every loss so. Look for it only now, because a check waits for the GPU.
            finite = torch.isfinite(x)
            if not bool(finite.all()):
                bad = int((~finite).nonzero()[0, 0])
                value = x[bad][~finite[bad]][0].item()
                for member in members:
                    member.fail("activation", value, row + bad)
        return members

    def skip(self, row: int) -> None:
        """Let the step of every member at `row` pass without its batch."""
        for member in self.at(row):
            member.skip()

    def _divided(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if scale == 1.0:
            return x
        if scale not in self._normalised:
            self._normalised[scale] = torch.empty_like(x)
        return torch.div(x, scale, out=self._normalised[scale])


def _alike(rows: torch.Tensor) -> str | None:
    """How rows (r, d) are alike, "all zero" or "all the same", or None where they differ by more than rounding."""
    if not bool(rows.any()):
        return "all zero"
    spread = (rows - rows.mean(0)).square().mean()
    return "all the same" if bool(spread <= ROUNDING * rows.square().mean()) else None
