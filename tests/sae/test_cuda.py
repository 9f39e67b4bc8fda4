"""What a GPU does: Triton's kernels against float64 (where there is no GPU, in Triton's interpreter), and whole training steps where there is one."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

from raysae.config import SAEConfig, TrainConfig  # noqa: E402
from raysae.numerics import be_deterministic  # noqa: E402
from raysae.sae import cuda, kernels  # noqa: E402
from raysae.sae.base import StepInfo  # noqa: E402
from raysae.sae.kernels import Nonzeros  # noqa: E402
from raysae.train.bank import Bank  # noqa: E402
from tests.sae import naive  # noqa: E402
from tests.sae.conftest import ARCHITECTURES, make  # noqa: E402

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
    monkeypatch.setattr(cuda, "chunk_rows", lambda n, element_size, device="cpu": 4)
    x, weight, bias = torch.randn(10, 12, device=DEVICE), torch.randn(90, 12, device=DEVICE), torch.randn(90, device=DEVICE)
    values, indices = cuda.top_pre_activations(x, weight, bias, 6, kernels.Workspace(), None)
    right = x.double() @ weight.double().T + bias.double()
    assert distance(values.sort(1).values, right.topk(6).values.sort(1).values) < 1e-6
    assert distance(values, right.gather(1, indices)) < 1e-6


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("d", [9, 300])
@pytest.mark.parametrize("part", [False, True])  # of a larger dictionary
def test_products_with_codes(precision, tolerance, d, part):
    """Rows and features with no nonzero, with one and with more than a program takes at a time, against dense products in float64."""
    b, n = 37, 40
    matrix = torch.randn(b, n) * (torch.rand(b, n) < torch.linspace(0, 0.9, b).unsqueeze(1))
    matrix[1], matrix[:, 3], matrix[:, 4] = 0, 1.5, 0
    rows, features = matrix.nonzero(as_tuple=True)
    codes = Nonzeros(features, matrix[rows, features], rows, kernels.starts_of(rows, b))
    codes = Nonzeros(*(tensor.to(DEVICE) for tensor in codes))
    latents = torch.randperm(n + 10)[:n] if part else torch.arange(n)
    weight, target, x = torch.randn(n + 10 if part else n, d), torch.randn(b, d), torch.randn(b, d)
    fused = cuda.FusedCodes(codes, n, latents.to(DEVICE) if part else None, precision)
    residual = fused.residual(target.to(DEVICE), weight.to(DEVICE))
    right = target.double() - matrix.double() @ weight[latents].double()
    assert distance(residual, right) < tolerance
    grads = [torch.full(shape, 1.0 if part else torch.nan, device=DEVICE) for shape in (weight.shape, weight.shape[:1], weight.shape)]
    fused.backward(-0.3, residual, x.to(DEVICE), *grads)
    grad_codes = -0.3 * (right @ weight[latents].double().T) * (matrix > 0)
    expected = grad_codes.T @ x.double(), grad_codes.sum(0), -0.3 * matrix.double().T @ right
    for found, e in zip(grads, expected, strict=True):
        assert distance(found[latents.to(DEVICE)] - int(part), e) < 2 * tolerance
        rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, latents, False)
        assert (found.cpu()[rest] == 1).all()


def test_decoder_rows():
    gradient, unit = torch.randn(7, 300, device=DEVICE), kernels.unit_rows(torch.randn(7, 300, device=DEVICE))
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
    numbers, places, values = torch.zeros(2 * m, device=DEVICE), torch.randperm(2 * m, device=DEVICE)[:m], torch.randn(m, device=DEVICE)
    cuda.put_(numbers, places, values)
    assert torch.equal(numbers[places], values)
    assert numbers.count_nonzero() == values.count_nonzero()


def test_adding_rows():
    matrix, places, rows = torch.randn(9, 300, device=DEVICE), torch.tensor([8, 0, 3], device=DEVICE), torch.randn(3, 300, device=DEVICE)
    right = matrix.double().index_add(0, places, rows.double())
    cuda.add_rows_(matrix, places, rows)
    assert distance(matrix, right) < 1e-6


@on_a_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [512, 8192])  # codes as a dense matrix and as a sparse one
@pytest.mark.parametrize("dead_latents", [0, 40])
def test_gradients_equal_autograd(architecture, precision, width, dead_latents):
    """In bfloat16 a few rows have another latent among their largest than in float64: theirs are other gradients (products are tested above)."""
    tolerance = 1e-4 if precision is None else 0.2 if architecture in ("topk", "batchtopk") else 0.05
    sae = make(architecture, 96, width, k=8, bandwidth=0.8)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sae.after_step()
    x = torch.randn(256, 96)
    dead = None
    if dead_latents and architecture in ("topk", "batchtopk"):
        dead = torch.zeros(width, dtype=torch.bool)
        dead[torch.randperm(width)[:dead_latents]] = True
    parameters = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    right = naive.loss(sae, parameters, x.double(), 0.7, dead)
    right.backward()
    sae.to(DEVICE).precision = precision
    terms = sae.loss_and_grads(x.to(DEVICE), StepInfo(sparsity_factor=0.7, dead=None if dead is None else dead.to(DEVICE)))
    assert terms["loss"].item() == pytest.approx(right.item(), rel=1e-5 if precision is None else 0.01)
    for name, parameter in sae.named_parameters():
        assert distance(parameter.grad, parameters[name].grad) < tolerance, name


@on_a_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_twice_gives_the_same_bits(architecture):
    be_deterministic()
    level = {"k": 16} if architecture in ("topk", "batchtopk") else {"sparsity": 0.01}
    config = SAEConfig(architecture=architecture, hook_point="resid_post.2", width=8192, learning_rate=1e-3, **level)
    batches = [torch.randn(1024, 128, device=DEVICE) * torch.linspace(0, 3, 128, device=DEVICE) for _ in range(12)]

    def trained() -> dict[str, torch.Tensor]:
        bank = Bank(128, TrainConfig(batch=1024, tokens=12 * 1024), DEVICE)
        member = bank.add("a", config)
        member.initialise(batches[0])
        member.dead_after = 4096  # AuxK works from the fifth step on
        for number, x in enumerate(batches):
            bank.step(x, number * 1024)
        assert not member.failed
        return {name: tensor.clone() for name, tensor in member.state()[0].items()}

    first, second = trained(), trained()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@on_a_gpu
def test_training_in_bfloat16_reaches_what_float32_does():
    """Sparse combinations of planted directions, learned on the GPU in both ways and on the CPU."""
    directions = kernels.unit_rows(torch.randn(256, 64))
    errors = {}
    for device, precision in (("cpu", "float32"), (DEVICE, "float32"), (DEVICE, "bfloat16")):
        generator = torch.Generator().manual_seed(0)
        train = TrainConfig(batch=1024, tokens=400 * 1024, precision=precision)
        bank = Bank(64, train, device)
        config = SAEConfig(architecture="topk", hook_point="resid_post.2", width=512, k=8, learning_rate=2e-3)
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
    assert right < 0.25 * 64  # of a variance of 64
    for way, error in errors.items():
        assert error == pytest.approx(right, rel=0.1), way
