"""Decay groups, rates per tower, and schedules step by step."""

import math

import pytest
import torch
from torch import nn

from clipkit.errors import UserError
from clipkit.optim import (
    WarmupConstant,
    WarmupConstantCooldown,
    WarmupCosine,
    parameter_groups,
)
from clipkit.temperature import Temperature


def rates(schedule_class, total=20, lr=1.0, **arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = schedule_class(optimizer, total, **arguments)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_is_open_clips_formula():
    found = rates(WarmupCosine, warmup_steps=5)
    expected = [(step + 1) / 5 for step in range(5)]
    expected += [(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert found == pytest.approx(expected)


def test_warmup_as_a_share_of_the_run():
    assert rates(WarmupCosine, warmup_ratio=0.25) == rates(WarmupCosine, warmup_steps=5)


def test_floor():
    assert min(rates(WarmupCosine, total=200, floor_ratio=0.1)) == pytest.approx(0.1, abs=1e-3)


def test_constant():
    assert rates(WarmupConstant, warmup_steps=2) == [0.5] + [1.0] * 19


def test_cooldown_is_a_straight_line_to_zero():
    found = rates(WarmupConstantCooldown, cooldown_ratio=0.25)
    assert found == pytest.approx([1.0] * 15 + [1.0, 0.8, 0.6, 0.4, 0.2])


def test_steps_win_over_the_ratio_of_a_recipe():
    both = rates(WarmupCosine, warmup_steps=5, warmup_ratio=0.5)
    assert both == rates(WarmupCosine, warmup_steps=5)


@pytest.mark.parametrize("arguments", [{"warmup_ratio": 7.0}, {"warmup_steps": -1}])
def test_impossible_warmups_are_refused(arguments):
    with pytest.raises(UserError, match=r"model\.schedule\.warmup"):
        rates(WarmupCosine, **arguments)


def test_a_schedule_goes_on_where_it_stopped():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = WarmupCosine(optimizer, 20, warmup_steps=5)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    other_optimizer = torch.optim.SGD([parameter], lr=1.0)
    other = WarmupCosine(other_optimizer, 20, warmup_steps=5)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    optimizer.step(), schedule.step(), other_optimizer.step(), other.step()
    assert other.get_last_lr() == schedule.get_last_lr()


def test_groups_by_tower_and_decay():
    tower = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    positions = nn.Parameter(torch.zeros(4, 3))
    tower.register_parameter("positions", positions)
    temperature = Temperature()
    groups = parameter_groups(
        {"image": tower, "temperature": temperature},
        learning_rates={"image": 0.5, "text": None},
        no_weight_decay={positions},
    )
    by_name = {group["name"]: group for group in groups}
    assert set(by_name) == {"image/decay", "image/no_decay", "temperature/no_decay"}
    assert by_name["image/decay"]["params"] == [tower[0].weight]
    assert len(by_name["image/no_decay"]["params"]) == 4
    assert by_name["image/no_decay"]["weight_decay"] == 0.0
    assert by_name["image/decay"]["lr"] == 0.5
    assert "lr" not in by_name["temperature/no_decay"]


def test_frozen_parameters_are_in_no_group():
    tower = nn.Linear(3, 3).requires_grad_(False)
    assert parameter_groups({"image": tower}, learning_rates={}, no_weight_decay=set()) == []
