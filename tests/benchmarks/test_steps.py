"""Every contender of the training benchmarks takes steps, and those train what they say."""

import pytest

from benchmarks import block_step, training_step


@pytest.mark.parametrize("name", block_step.LAYERS)
def test_a_step_of_a_block_trains_what_its_contender_is_named_for(name):
    block = block_step.make_block(name, block_step.config_of(block_step.TINY))
    step = block_step.step_of(name, block, block_step.TINY)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    step()
    step()
    changed = {key for key, value in block.state_dict().items() if not value.equal(before[key])}
    norms = {key for key in before if "norm" in key}
    tables = {key for key, value in before.items() if value.is_floating_point()}
    assert changed == (norms if name == block_step.NORMS else tables)


@pytest.mark.slow
@pytest.mark.demo
def test_steps_of_a_model_lower_its_loss():
    step = training_step.contender(training_step.CASP, samples=4)  # one batch
    before, after = step(), step()
    assert after < before
