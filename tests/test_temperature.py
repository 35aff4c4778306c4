"""Scale, bias and their limits."""

import math

import pytest
import torch

from clipkit.errors import UserError
from clipkit.temperature import Temperature


def test_scale_is_the_inverse_of_the_initial_temperature():
    assert Temperature(0.07).scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)])
def test_clamp_holds_the_scale_between_one_and_its_maximum(start, end):
    temperature = Temperature()
    temperature.log_scale.data.fill_(start)
    temperature.clamp_()
    assert temperature.log_scale.item() == pytest.approx(end)


def test_a_saturated_scale_comes_back():
    temperature = Temperature()
    temperature.log_scale.data.fill_(math.log(100))
    temperature.scale.backward()
    assert temperature.log_scale.grad > 0


def test_prior_bias_is_the_logit_of_one_in_a_batch():
    temperature = Temperature(bias="prior")
    temperature.fill_prior_(64)
    assert torch.sigmoid(temperature.bias).item() == pytest.approx(1 / 64)
    temperature.fill_prior_(1000)  # a resumed run keeps what it has
    assert temperature.bias.item() == pytest.approx(-math.log(63))


def test_fixed_temperature_has_nothing_to_train():
    temperature = Temperature(bias=-10.0, learnable=False)
    assert not any(p.requires_grad for p in temperature.parameters())
    assert temperature.bias.item() == -10


@pytest.mark.parametrize("init", [0.0, -1.0, 2.0, 0.001])
def test_impossible_temperatures_are_refused(init):
    with pytest.raises(UserError, match=r"model\.temperature\.init"):
        Temperature(init)
