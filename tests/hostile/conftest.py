"""A whole checkpoint, for hostile ones to be made of."""

import pytest

from tests.conftest import TINY


@pytest.fixture(scope="session")
def whole_checkpoint(tmp_path_factory, pictures):
    """What one epoch on the small data set leaves behind, without a tracking server."""
    from clipkit.cli import main

    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", str(pictures)]
        assert main([*words, "--run_name=run", "--trainer.logger=false"]) == 0
    return folder / "runs" / "tiny" / "run" / "checkpoints" / "last.ckpt"
