import pytest

from casp_pl.allocation import block_influence_scores, explicit_scores, first_last_scores, proxy_loss_scores
from casp_pl.errors import ConfigError, NumericsError


def test_first_last_takes_the_ends_first():
    scores = first_last_scores(32)
    by_score = sorted(range(32), key=lambda block: -scores[block])
    assert set(by_score[:8]) == {0, 1, 2, 3, 4, 5, 6, 31}
    assert first_last_scores(1) == [1.0]


@pytest.mark.parametrize("function", [block_influence_scores, proxy_loss_scores])
def test_measured_scores_stay_positive(function):
    assert function([0.5, 0.0, 2.0])[::2] == [0.5, 2.0]
    assert 0 < function([0.5, 0.0])[1] < 1e-6
    with pytest.raises(NumericsError, match="entry 1"):
        function([0.5, float("nan")])


def test_explicit_scores_are_checked():
    assert explicit_scores([1, 2], 2) == [1.0, 2.0]
    with pytest.raises(ConfigError, match="got 2 values for 3"):
        explicit_scores([1, 2], 3)
    with pytest.raises(ConfigError, match="not a positive"):
        explicit_scores([1, 0], 2)
