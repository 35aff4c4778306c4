"""A tracking server that is killed: training ends well, and MLflow has every point once."""

import pytest

from tests.tracking.harness import (
    Server,
    Trainer,
    free_port,
    points_of,
    rows_of_metrics,
    runs_of,
    sync,
    wait_until,
)


@pytest.fixture
def server(tmp_path_factory, mlflow_template):
    import shutil

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    one = Server(folder, free_port())
    yield one
    one.kill()


@pytest.fixture
def trainer(workdir):
    started = []

    def start(uri, *words):
        started.append(Trainer(workdir, uri, *words))
        return started[-1]

    yield start
    for one in started:
        one.close()


def all_there(server, trainer, status="FINISHED"):
    """Every point of the journal is in the table of metrics, none twice."""
    assert rows_of_metrics(server.database) == points_of(trainer.journal)
    assert runs_of(server.database) == [("run", status)]


def synced(workdir, trainer):
    """Sync twice: the first sends what is left, the second finds nothing to send."""
    run = str(trainer.run.relative_to(workdir))
    code, said = sync(workdir, run, "--tracking_uri", trainer.uri)
    assert code == 0, said
    again, nothing = sync(workdir, run, "--tracking_uri", trainer.uri)
    assert again == 0
    assert "nothing was left" in nothing
    return said


def test_a_server_that_dies_in_the_middle(server, trainer, workdir):
    server.start()
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=1")
    fit.send()
    server.kill()
    fit.reach(len(fit.lines()) + 100)
    code, said = fit.end()
    assert code == 0, said
    assert "training goes on" in said
    assert "MLflow is imported: False" in said  # by the process that trains
    command = f"runs/harness/run --tracking_uri {server.uri}"
    assert f"they are sent by: clipkit sync {command}" in said
    code, refused = sync(workdir, *command.split())
    assert (code, "cannot be reached" in refused) == (2, True)
    server.start()
    assert "points sent" in synced(workdir, fit)
    all_there(server, fit)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_is_not_there_at_the_start(server, trainer, workdir, workers):
    """It comes while training goes on: nothing is left to do by hand."""
    fit = trainer(server.uri, f"--data.num_workers={workers}")
    wait_until(lambda: "warning: MLflow at" in fit.said(), "the warning")
    server.start()
    fit.send()
    code, said = fit.end()
    assert code == 0, said
    assert said.count("warning: MLflow at") == 1
    assert "has all of it again" in said
    all_there(server, fit)
    assert "nothing was left" in synced(workdir, fit)


@pytest.mark.slow
def test_a_server_that_is_there_neither_at_the_start_nor_at_the_end(server, trainer, workdir):
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=2")
    fit.reach(100)
    code, said = fit.end()
    assert code == 0, said
    server.start()
    synced(workdir, fit)
    all_there(server, fit)


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_again_and_again(server, trainer, workdir):
    server.start()
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=60")
    for _ in range(3):
        before = fit.sent()
        fit.send(before + 1)
        server.kill()
        fit.reach(len(fit.lines()) + 200)
        server.start()
    code, said = fit.end()
    assert code == 0, said
    assert said.count("warning: MLflow at") >= 1
    synced(workdir, fit)
    all_there(server, fit)


@pytest.mark.slow
def test_a_server_that_dies_as_training_ends(server, trainer, workdir):
    server.start()
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=2")
    fit.send()
    fit.stop()
    server.kill()
    code, said = fit.end()
    assert code == 0, said
    server.start()
    synced(workdir, fit)
    all_there(server, fit)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 40, 150, 400])
def test_a_trainer_that_is_killed(server, trainer, workdir, lines):
    server.start()
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=1")
    fit.reach(lines)
    fit.kill()
    synced(workdir, fit)
    all_there(server, fit, "KILLED")


@pytest.mark.slow
def test_a_server_with_another_database(server, trainer, workdir, mlflow_template):
    """What was sent is gone with the old one; all of it is sent again."""
    import shutil

    server.start()
    fit = trainer(server.uri, "--trainer.logger.wait_at_end=1")
    fit.send()
    server.kill()
    assert fit.end()[0] == 0
    shutil.copy(mlflow_template, server.database)
    server.start()
    synced(workdir, fit)
    all_there(server, fit)
