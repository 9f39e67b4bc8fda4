"""The elements of a chunk of pre-activations that a dense architecture's loss depends on: all, or a list of few.

An architecture with a threshold may begin with any number of active latents. It ends with a few in a hundred. Dense
products are faster for many elements, and a list is faster for few. `All` and `Few` have the same methods. So an
architecture's formulas are written once. `tests/sae/naive.py` has them in plain dense form.

A *quantity* is a number per element: (n, r) with `All`, (N,) with `Few`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.kernels.buffers import Workspace
from raysae.kernels.codes import order_of, outer_blocks
from raysae.kernels.products import product

LISTED = 1 / 7  # Share of a chunk's elements above which a list costs more than all of them
LONGEST = 1 << 18  # Most elements of a list. Each takes some 200 bytes.


def elements_of(where: Tensor, workspace: Workspace, precision: torch.dtype | None = None) -> All | Few:
    """The elements at which `where` (n, r) is true, as a list if that is faster.

    Their number decides alone, so that the same chunk takes the same form every time. On a GPU it is always `All`:
    dense products are cheap there, and the host would have to wait for a list's length.
    """
    few = not where.is_cuda and int(where.sum()) <= min(LONGEST, LISTED * where.numel())
    return Few(where) if few else All(workspace, precision)


class All:
    """Every element of an (n, r) chunk."""

    def __init__(self, workspace: Workspace, precision: torch.dtype | None = None):
        self._workspace, self._precision = workspace, precision

    def of(self, matrix: Tensor) -> Tensor:
        """The quantity that has the values of `matrix` (n, r)."""
        return matrix

    def spread(self, latents: Tensor) -> Tensor:
        """The quantity that has each latent's value of `latents` (n,), or a tensor that broadcasts to it."""
        return latents.unsqueeze(1)

    def sum(self, quantity: Tensor) -> Tensor:
        """The sum of a quantity for each latent, (n,)."""
        return quantity.sum(1)

    def any(self, quantity: Tensor) -> Tensor:
        """Whether a bool quantity is true at any element of a latent, (n,)."""
        return quantity.any(1)

    def decode(self, codes: Tensor, weight: Tensor) -> Tensor:
        """The quantity `codes` times the latents' rows of `weight` (n, d): (r, d)."""
        return product(codes.T, weight, self._precision)

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the codes last given to `decode`, a quantity.

        Args:
            grad: The gradient of what `decode` returned, (r, d).
            weight: (n, d), as given to `decode`.
        """
        shape = len(weight), len(grad)
        return product(weight, grad.T, self._precision, out=self._workspace.take("grad_codes", shape, grad))

    def add_outer_(self, out: Tensor, quantity: Tensor, source: Tensor) -> None:
        """Adds Σ quantity · source[row] over a latent's elements to its row of `out` (n, d), for `source` (r, d)."""
        if self._precision is None:
            out.addmm_(quantity, source)
        else:
            out.add_(product(quantity, source, self._precision))


class Few:
    """A list of N elements, sorted by latent. The methods are those of `All`."""

    def __init__(self, where: Tensor):
        self._n, r = where.shape
        self._places = where.view(-1).nonzero().squeeze(1)
        self._latents = self._places.div(r, rounding_mode="floor")
        # At great widths few latents have an element in a chunk.
        self._present, counts = self._latents.unique_consecutive(return_counts=True)
        self._starts = counts.cumsum(0) - counts
        self._rows = torch.sub(self._places, self._latents, alpha=r)
        self._order, self._row_starts = order_of(self._rows, r)

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.view(-1)[self._places]

    def spread(self, latents: Tensor) -> Tensor:
        return latents[self._latents]

    def sum(self, quantity: Tensor) -> Tensor:
        return quantity.new_zeros(self._n).index_add_(0, self._latents, quantity)

    def any(self, quantity: Tensor) -> Tensor:
        found = quantity.new_zeros(self._n)
        found[self._latents[quantity]] = True
        return found

    def decode(self, codes: Tensor, weight: Tensor) -> Tensor:
        self._leaf = codes[self._order].detach().requires_grad_()
        with torch.enable_grad():
            latents = self._latents[self._order]
            self._product = embedding_bag(
                latents, weight.detach(), self._row_starts, mode="sum", per_sample_weights=self._leaf
            )
        return self._product.detach()

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        (by_row,) = torch.autograd.grad(self._product, self._leaf, grad)
        return torch.empty_like(by_row).index_copy_(0, self._order, by_row)

    def add_outer_(self, out: Tensor, quantity: Tensor, source: Tensor) -> None:
        for part, sums in outer_blocks(self._rows, quantity, self._starts, source):
            out.index_add_(0, self._present[part], sums)
