"""Triton's kernels against float64, and whole training steps on a GPU.

Without a GPU the kernels run in Triton's interpreter, and tests of whole training steps are skipped.
"""

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytest.importorskip("triton")

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig  # noqa: E402
from raysae.determinism import be_deterministic  # noqa: E402
from raysae.kernels import cuda, elements, products, rows, screening  # noqa: E402
from raysae.kernels.buffers import Workspace  # noqa: E402
from raysae.kernels.codes import Nonzeros, starts_of  # noqa: E402
from raysae.kernels.rows import unit_rows  # noqa: E402
from raysae.sae.base import StepInfo  # noqa: E402
from raysae.train.bank import Bank  # noqa: E402
from tests.sae import naive  # noqa: E402
from tests.sae.conftest import make, with_k  # noqa: E402

on_a_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU here")


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """‖found − right‖ / ‖right‖."""
    return ((found.cpu().double() - right.cpu().double()).norm() / right.cpu().double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (64, 9), (300, 5), (1000, 32), (4097, 1), (5000, 700)])
def test_top_k(n, k, dtype):
    scores, bias = torch.randn(11, n, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE)
    values, indices = cuda.top_k(scores, bias, k)
    full = scores.float() + bias
    assert torch.equal(values.sort(1).values, full.topk(k).values.sort(1).values)
    assert torch.equal(full.gather(1, indices), values)
    assert (indices.diff(dim=1) > 0).all()


def test_top_k_of_equal_and_infinite_elements():
    scores, bias = torch.randn(4, 300, device=DEVICE), torch.zeros(300, device=DEVICE)
    scores[0], scores[1] = 1, -torch.inf
    scores[2, 7], scores[3] = torch.nan, -scores[3].abs()
    values, indices = cuda.top_k(scores, bias, 5)
    assert indices[:2].tolist() == [list(range(5))] * 2
    assert values[1].tolist() == [-torch.inf] * 5
    assert values[2][indices[2] == 7].item() == torch.inf
    assert torch.equal(values[3].sort().values, scores[3].topk(5).values.sort().values)


def test_top_pre_activations_in_chunks_of_rows(monkeypatch):
    monkeypatch.setattr(cuda, "MOST_ROWS", 4)
    x, weight, bias = (
        torch.randn(10, 12, device=DEVICE),
        torch.randn(90, 12, device=DEVICE),
        torch.randn(90, device=DEVICE),
    )
    values, indices = cuda.top_pre_activations(x, weight, bias, 6, Workspace(), None)
    right = x.double() @ weight.double().T + bias.double()
    assert distance(values.sort(1).values, right.topk(6).values.sort(1).values) < 1e-6
    assert distance(values, right.gather(1, indices)) < 1e-6


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("d", [9, 300])
@pytest.mark.parametrize("part", [False, True])  # Whether the codes use only some latents of a larger dictionary
@pytest.mark.parametrize("own", [True, False])  # Whether the gradient is the residual found last
def test_products_with_codes(precision, tolerance, d, part, own):
    """Products with codes equal dense products in float64.

    Rows and features have no nonzero, one, or more than a Triton program takes at a time.
    """
    b, n = 37, 40
    matrix = torch.randn(b, n) * (torch.rand(b, n) < torch.linspace(0, 0.9, b).unsqueeze(1))
    matrix[1], matrix[:, 3], matrix[:, 4] = 0, 1.5, 0
    rows, features = matrix.nonzero(as_tuple=True)
    codes = Nonzeros(features, matrix[rows, features], rows, starts_of(rows, b))
    codes = Nonzeros(*(tensor.to(DEVICE) for tensor in codes))
    latents = torch.randperm(n + 10)[:n] if part else torch.arange(n)
    weight, target, x = torch.randn(n + 10 if part else n, d), torch.randn(b, d), torch.randn(b, d)
    fused = cuda.FusedCodes(codes, n, latents.to(DEVICE) if part else None, precision)
    residual = fused.residual(target.to(DEVICE), weight.to(DEVICE))
    right = target.double() - matrix.double() @ weight[latents].double()
    assert distance(residual, right) < tolerance
    grads = [
        torch.full(shape, 1.0 if part else torch.nan, device=DEVICE)
        for shape in (weight.shape, weight.shape[:1], weight.shape)
    ]
    if not own:
        right = torch.randn(b, d).double()
        residual = right.float().to(DEVICE)
    fused.backward(-0.3, residual, x.to(DEVICE), *grads)
    grad_codes = -0.3 * (right @ weight[latents].double().T) * (matrix > 0)
    expected = grad_codes.T @ x.double(), grad_codes.sum(0), -0.3 * matrix.double().T @ right
    for found, e in zip(grads, expected, strict=True):
        assert distance(found[latents.to(DEVICE)] - int(part), e) < 2 * tolerance
        rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, latents, False)
        assert (found.cpu()[rest] == 1).all()


def test_decoder_rows():
    gradient, unit = torch.randn(7, 300, device=DEVICE), unit_rows(torch.randn(7, 300, device=DEVICE))
    right = gradient.double() - (gradient.double() * unit.double()).sum(1, keepdim=True) * unit.double()
    cuda.remove_parallel_(gradient, unit)
    assert distance(gradient, right) < 1e-6
    matrix = torch.randn(7, 300, device=DEVICE)
    matrix[2] = 0
    right = torch.nn.functional.normalize(matrix.double(), dim=1)
    cuda.normalise_rows_(matrix)
    assert distance(matrix, right) < 1e-6
    assert not matrix[2].any()


def test_putting_numbers():
    m = 3 * cuda.TILE // 2
    numbers, places, values = (
        torch.zeros(2 * m, device=DEVICE),
        torch.randperm(2 * m, device=DEVICE)[:m],
        torch.randn(m, device=DEVICE),
    )
    cuda.put_(numbers, places, values)
    assert torch.equal(numbers[places], values)
    assert numbers.count_nonzero() == values.count_nonzero()


def test_adding_rows():
    matrix, places, rows = (
        torch.randn(9, 300, device=DEVICE),
        torch.tensor([8, 0, 3], device=DEVICE),
        torch.randn(3, 300, device=DEVICE),
    )
    right = matrix.double().index_add(0, places, rows.double())
    cuda.add_rows_(matrix, places, rows)
    assert distance(matrix, right) < 1e-6


def moved(sae):
    """Moves `sae` off its symmetric start. Decoder rows keep norm 1."""
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sae.after_step()
    return sae


def product(a, b, precision, out=None):
    """Stands in for `products.product` on a CPU. There torch cannot multiply bfloat16 into float32."""
    found = a @ b if precision is None else a.to(precision).float() @ b.to(precision).float()
    return found if out is None else out.copy_(found)


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("form", ["fused", "sparse", "dense"])
@pytest.mark.parametrize("dead_latents", [0, 20, 70])  # None, fewer and more than k_aux = 32
def test_gradients_for_the_latents_chosen(architecture, precision, tolerance, form, dead_latents, monkeypatch):
    """A step equals autograd in float64 on the latents that the step chose.

    In bfloat16 a step chooses some other latents than in float64.
    """
    for module in (products, rows, screening):
        monkeypatch.setattr(module, "for_triton", lambda like: cuda if form == "fused" else None)
    monkeypatch.setattr(products, "DENSE_PER_NONZERO", {DEVICE: 1000 * (form == "dense")})
    if not GPU:
        monkeypatch.setattr(products, "product", product)
    d, n, b = 48, 100, 20
    sae = moved(make(architecture, d, n, k=8)).to(DEVICE)
    sae.precision = precision
    x = torch.randn(b, d, device=DEVICE)
    dead = torch.randperm(n, device=DEVICE)[:dead_latents].sort().values
    step = StepInfo(dead=torch.zeros(n, dtype=torch.bool, device=DEVICE).index_fill(0, dead, True))
    terms = sae.loss_and_grads(x, x, step)

    with torch.no_grad():
        chosen, dead_chosen = sae._select((x - sae.b_dec).to(precision or x.dtype), dead if dead_latents else None)
    parameters = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    centred = x.double() - parameters["b_dec"]
    pre = (centred @ parameters["W_enc"].T + parameters["b_enc"]).relu()
    error = (
        centred
        - (
            pre
            * torch.zeros(b, n, device=DEVICE).index_put((chosen.rows, chosen.features), torch.ones((), device=DEVICE))
        )
        @ parameters["W_dec"]
    )
    loss = error.square().sum(1).mean()
    if dead_latents:
        assert dead_chosen.places.shape[1] == min(dead_latents, sae.k_aux)
        mask = torch.zeros(b, n, device=DEVICE).scatter(1, dead[dead_chosen.places], 1)
        e = error.detach()
        loss = (
            loss
            + sae.train_config.aux_coefficient
            * d
            * (e - pre * mask @ parameters["W_dec"]).square().sum()
            / (e - e.mean(0)).square().sum()
        )
    loss.backward()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=tolerance / 5)
    for name, parameter in sae.named_parameters():
        assert distance(parameter.grad, parameters[name].grad) < tolerance, name
    assert torch.equal(
        sae.fired(),
        torch.zeros(n, dtype=torch.bool, device=DEVICE).index_fill(0, chosen.features[chosen.values > 0], True),
    )


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {*with_k()}))
def test_gradients_of_dense_kinds(architecture, precision, tolerance, monkeypatch):
    if not GPU:
        monkeypatch.setattr(products, "product", product)
        monkeypatch.setattr(elements, "product", product)
        monkeypatch.setattr(elements, "LISTED", 0)
    sae = moved(make(architecture, 48, 300, bandwidth=0.8))
    x = torch.randn(64, 48)
    parameters = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    right = naive.loss(sae, parameters, x.double(), 0.7, None)
    right.backward()
    sae.to(DEVICE).precision = precision
    terms = sae.loss_and_grads(moved_x := x.to(DEVICE), moved_x, StepInfo(sparsity_factor=0.7))
    assert terms["loss"].item() == pytest.approx(right.item(), rel=tolerance / 5)
    for name, parameter in sae.named_parameters():
        assert distance(parameter.grad, parameters[name].grad) < tolerance, name


@on_a_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_twice_gives_the_same_bits(architecture):
    be_deterministic()
    level = ARCHITECTURES[architecture].pick(k=16, sparsity=0.01)
    config = SAEConfig(architecture=architecture, hook_point="resid_post.2", width=8192, learning_rate=1e-3, **level)
    batches = [torch.randn(1024, 128, device=DEVICE) * torch.linspace(0, 3, 128, device=DEVICE) for _ in range(12)]

    def trained() -> dict[str, torch.Tensor]:
        bank = Bank(128, TrainConfig(batch=1024, tokens=12 * 1024), DEVICE)
        member = bank.add("a", config)
        member.initialise(batches[0])
        member.dead_after = 4096  # Four batches, so AuxK works from the fifth step on
        for number, x in enumerate(batches):
            bank.step(x, number * 1024)
        assert not member.failed
        return {name: tensor.clone() for name, tensor in member.state()[0].items()}

    first, second = trained(), trained()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@on_a_gpu
def test_training_in_bfloat16_reaches_what_float32_does():
    """Both precisions on the GPU and float32 on the CPU learn sparse sums of planted directions equally well."""
    directions = unit_rows(torch.randn(256, 64))
    errors = {}
    for device, precision in (("cpu", "float32"), (DEVICE, "float32"), (DEVICE, "bfloat16")):
        generator = torch.Generator().manual_seed(0)
        train = TrainConfig(batch=1024, tokens=400 * 1024, precision=precision)
        bank = Bank(64, train, device)
        config = SAEConfig(architecture="topk", hook_point="resid_post.2", width=1024, k=8, learning_rate=2e-3)
        member = bank.add("a", config)
        for number in range(400):
            codes = torch.rand(1024, 256, generator=generator) * (torch.rand(1024, 256, generator=generator) < 1 / 64)
            x = (codes @ directions).to(device)
            if number == 0:
                member.initialise(x)
            bank.step(x, number * 1024)
            if number == 300:
                member.take_means()
        errors[device, precision] = member.take_means()["squared_error"]
    right = errors["cpu", "float32"]
    assert right < 0.25 * 64  # The variance is 64
    for way, error in errors.items():
        assert error == pytest.approx(right, rel=0.1), way
