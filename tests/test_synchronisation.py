"""The host waits for the device at logging steps and nowhere else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipkit

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), int(), bool()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in WAITS
        return function(*arguments, **(keywords or {}))


def waits(steps, every, *words):
    module, data, trainer = clipkit.build(
        "base", "tiny.yaml",
        overrides=[
            # Drawn pictures: an epoch of them is longer than the run, so that none ends within.
            "data=ShapesPairs", f"trainer.max_steps={steps}", "trainer.max_epochs=-1",
            "data.batch_size=4",
            f"trainer.log_every_n_steps={every}", "trainer.limit_val_batches=0",
            "trainer.callbacks=[]", "trainer.logger=false", *words,
        ],
    )  # fmt: skip
    with Waits() as counted:
        trainer.fit(module, data)
    assert trainer.global_step == steps
    return counted.count


DROPPING = (
    "model.image_encoder=TimmImageEncoder", "model.image_encoder.name=test_vit",
    "model.image_encoder.image_size=32", "model.image_encoder.patch_drop_ratio=0.5",
)  # fmt: skip


@pytest.mark.parametrize(("steps", "words"), [
    (100, ()), (20, ("model.micro_batch=2",)), (20, ("model.loss=SigLIPLoss",)), (20, DROPPING),
])  # fmt: skip
@pytest.mark.usefixtures("workdir")
def test_steps_wait_no_more_often_than_they_log(steps, words):
    few = waits(steps // 2, steps // 2, *words)
    # Twice the steps and as many of them logged: what is left is start and end (a collection of
    # garbage in between may count a few).
    assert abs(waits(steps, steps, *words) - few) <= 4
    assert 0 < waits(steps, steps // 2, *words) - few <= 25
