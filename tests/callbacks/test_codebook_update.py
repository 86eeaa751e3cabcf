"""The V step against exhaustive search, and that it moves the loss where the gradient says."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from casp_pl.callbacks.codebook_update import CodebookUpdate, update_codes
from casp_pl.layers import AdditiveLinear


def _layer(seed: int = 0) -> AdditiveLinear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (7, 3, 2), generator=generator)
    codebooks = torch.randn(2, 16, 4, generator=generator)
    scales = torch.rand(7, 1, generator=generator) + 0.5
    return AdditiveLinear.from_codes(codes, codebooks, scales, in_features=10)  # the last group is padded


def _collected(gradient: Tensor) -> Tensor:
    """As a layer collects it, with squares that are all alike."""
    return torch.stack([gradient, torch.ones_like(gradient)])


def test_only_the_strongest_groups_change() -> None:
    layer = _layer()
    before = layer.codes_unpacked()
    gradient = torch.zeros(7, 10)
    gradient[3, 4:8] = torch.tensor([5.0, -3.0, 2.0, 1.0])
    assert update_codes(layer, _collected(gradient), fraction=1 / 21, step=3.0) > 0
    changed = (layer.codes_unpacked() != before).any(-1)
    assert changed.nonzero().tolist() == [[3, 1]]


def test_step_against_the_gradient_lowers_a_linear_loss() -> None:
    layer = _layer(1)
    gradient = torch.randn(7, 10, generator=torch.Generator().manual_seed(2))
    before = float((layer.dequantize() * gradient).sum().detach())
    update_codes(layer, _collected(gradient), fraction=0.3, step=3.0)
    assert (layer.dequantize() * gradient).sum() < before


def test_new_codes_are_the_nearest_pair_for_one_codebook() -> None:
    generator = torch.Generator().manual_seed(3)
    codebooks = torch.randn(1, 16, 4, generator=generator)
    codes = torch.randint(0, 16, (2, 2, 1), generator=generator)
    layer = AdditiveLinear.from_codes(codes, codebooks, torch.ones(2, 1), in_features=8)
    gradient = torch.randn(2, 8, generator=generator)
    values = layer.dequantize().detach().view(4, 4)
    reach = torch.cdist(codebooks[0], codebooks[0]).fill_diagonal_(torch.inf).amin(1)[codes.flatten()]
    pull = -gradient.view(4, 4)
    targets = values + pull / pull.norm(dim=1, keepdim=True) * 2.0 * reach[:, None]
    best = torch.tensor([min(range(16), key=lambda c: float((codebooks[0, c] - target).norm())) for target in targets])
    strongest = pull.view(2, 2, 4).norm(dim=2).argmax(dim=1)
    expected = codes.clone().view(2, 2)
    for row, group in enumerate(strongest.tolist()):
        expected[row, group] = best.view(2, 2)[row, group]
    update_codes(layer, _collected(gradient), fraction=1.0, step=2.0)
    assert torch.equal(layer.codes_unpacked().view(2, 2).long(), expected), "one group of a row, and the nearest entry"


class Regression(nn.Module):
    """One additive layer that should give what a dense weight gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = _layer()

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("helps", [True, False])
def test_an_update_stays_only_if_the_loss_falls(helps: bool) -> None:
    module, generator = Regression(), torch.Generator().manual_seed(6)
    x, target = torch.randn(50, 10, generator=generator), torch.randn(50, 7, generator=generator)
    module.layer.collect_weight_gradient = True
    for _ in range(3):
        module.batch_loss((x, target)).backward()
    assert module.layer.weight_gradient is not None
    if not helps:  # the opposite of the gradient
        module.layer.weight_gradient[0] *= -1
    before, codes = float(module.batch_loss((x, target)).detach()), module.layer.codes_unpacked()
    changed = CodebookUpdate(fraction=0.2)._try_update(module, [module.layer], (x, target))
    after = float(module.batch_loss((x, target)).detach())
    assert changed == int((module.layer.codes_unpacked() != codes).sum())
    assert (after < before and changed > 0) if helps else (after == before and changed == 0)


def test_two_codebooks_come_close_to_the_best_pair() -> None:
    layer = _layer(4)
    gradient = torch.randn(7, 10, generator=torch.Generator().manual_seed(5))
    gradient[1:] = 0
    gradient[0, 4:] = 0
    before = (layer.dequantize()[0, :4] / layer.scales[0]).detach()
    last = int(layer.codes_unpacked()[0, 0, 1])
    books = layer.codebooks.detach()
    reach = (books[1] - books[1, last]).norm(dim=1)
    reach[last] = torch.inf
    pull = -gradient[0, :4]
    target = (before + pull / pull.norm() * 3.0 * reach.min()).detach()
    update_codes(layer, _collected(gradient), fraction=1 / 21, step=3.0)
    distance = (layer.dequantize()[0, :4] / layer.scales[0] - target).detach().norm()
    best = min(float((books[0, a] + books[1, b] - target).norm()) for a, b in itertools.product(range(16), range(16)))
    start = float((before - target).norm())
    assert best - 1e-4 <= distance <= best + 0.5 * (start - best)
