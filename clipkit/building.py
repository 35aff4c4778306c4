"""From YAML to a module, a data module and a trainer: the Lightning CLI behind every command."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning import LightningDataModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

# Short names in YAML resolve for classes that are imported, hence these.
from clipkit import checkpoint as checkpoints
from clipkit import recipes, safe_yaml
from clipkit.callbacks.console import Bar, Console
from clipkit.callbacks.interruption import Interruption, Stopped
from clipkit.callbacks.monitors import CheckMonitors
from clipkit.callbacks.quarantine import Quarantine
from clipkit.callbacks.source_counts import SourceCounts
from clipkit.callbacks.watching_ranks import WatchingRanks
from clipkit.data import PairDataModule
from clipkit.errors import UserError, did_you_mean, of_memory
from clipkit.module import CLIPModule
from clipkit.own_code import look_in_current_folder
from clipkit.parser_errors import explain, one_line
from clipkit.saving import WholeFiles
from clipkit.tracking import Journal, RunFolder, callbacks_of
from clipkit.tracking.resumable import last_of, run_of

log = logging.getLogger(__name__)

VERBS = ("fit", "validate", "test")
EXAMPLES = {
    "fit": "clipkit fit -c base -c pairs --data.dataset ~/my_pictures",
    "validate": "clipkit validate --ckpt_path runs/pairs/my_pictures/checkpoints/last.ckpt",
    "test": "clipkit test --ckpt_path runs/pairs/my_pictures/checkpoints/last.ckpt",
}
LIBRARY_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",  # torch's deprecation of what Lightning 2.6 calls
    r".*is smaller than the logging interval.*",  # short epochs are fine: steps count across them
    r".*does not have many workers.*",
    r".*module\(s\) in eval mode at the start of training.*",  # locked towers
    r".*It is recommended to use `self\.log.*sync_dist=True.*",  # gathered before they are logged
    r".*The dirpath has changed from.*",  # a resumed run may have a folder of its own
    r".*Checkpoint directory .* exists and is not empty.*",  # or not
    r".*your dataloader is not resumable.*",  # PairDataModule knows the position, not its loader
    r".*Grad strides do not match bucket view strides.*",  # of 1 x 1 convolutions; costs nothing
    r".*The ``noload`` loader strategy is deprecated.*",  # what MLflow asks of SQLAlchemy
)
CONFIG_OPTIONS = ("-c", "--config")
LAST = "last"
LONGEST_NAME = 80


class ClipkitCLI(LightningCLI):
    """Lightning's command line with recipes by name, checkpoints that suffice, and run folders."""

    exit_code = 0

    def __init__(
        self, words: Sequence[str], *, trust: Sequence[str] = (), run: bool = True
    ) -> None:
        self.trust = trust
        self.restored: checkpoints.Restored | None = None
        self.continued: Path | None = None
        # A shortened option would be taken for another one once a longer name is added.
        strict = {"exit_on_error": False, "allow_abbrev": False}
        verbs = {
            verb: {
                **strict,
                "description": f"example: {example}   (what the data takes: "
                f"clipkit {verb} --data.help HuggingFacePairs)",
            }
            for verb, example in EXAMPLES.items()
        }
        super().__init__(
            CLIPModule,
            PairDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            # The module's arguments live in its own record, not in hyper_parameters.
            load_from_checkpoint_support=False,
            parser_kwargs={**strict, "prog": "clipkit", **verbs},
            args=list(words),
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {verb: commands[verb] for verb in VERBS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Start a new run from a checkpoint's weights.",
        )
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="Name of the experiment. Left out: the recipe's.",
        )
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the run. Left out: what differs.",
        )
        parser.add_argument(
            "--group",
            type=str | None,
            default=None,
            help="Tag that runs of one sweep share.",
        )

    def before_fit(self) -> None:
        """Keep gradients where they are reduced, not in a second copy of the model's size."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)

    def before_validate(self) -> None:
        """Nothing is trained: what only chooses checkpoints is not missed."""
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")

    def before_test(self) -> None:
        self.before_validate()

    # --- Words to configuration --------------------------------------------------------------

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        verb, words = ([args[0]], list(args[1:])) if args and args[0] in VERBS else ([], list(args))
        words = [*_with_recipes(words)]
        _refuse_late_base(words)
        experiment, run_name = names_of_run(words)
        with tempfile.TemporaryDirectory(prefix="clipkit-") as folder:
            ckpt_path = _value(words, "--ckpt_path")
            loaded: dict[str, Any] | None = None
            if ckpt_path == LAST:
                _refuse_last_alone(words)
            elif verb and ckpt_path and not any(_is_config(word) for word in words):
                words = [*self._from_checkpoint(verb[0], ckpt_path, Path(folder)), *words]
            elif verb and ckpt_path:
                loaded = checkpoints.read(ckpt_path)
            with _one_line_errors(self._options(verb), hint=_hint_of_base(verb, words)):
                self.config = parser.parse_args([*verb, *words])
        section = self.config[verb[0]] if verb else self.config
        section["experiment"] = section.get("experiment") or experiment
        section["run_name"] = section.get("run_name") or run_name
        if ckpt_path:
            section["ckpt_path"] = self._go_on_from(ckpt_path, verb, section)
        if verb and verb != ["fit"] and not _typed(words, "--trainer.logger"):
            # Evaluating a checkpoint prints; it starts no run of its own.
            section["trainer"]["logger"] = False
        if section["trainer"].get("precision") is None:
            section["trainer"]["precision"] = default_precision()
        data = section.get("data")
        if "shrink_batch" in (data or {}).get("init_args", {}) and _typed(
            words, "--data.batch_size", "--data.init_args.batch_size"
        ):
            data["init_args"]["shrink_batch"] = False
        # The record is what was asked for; what a checkpoint carries comes after it.
        self._dump_config()
        if self.restored is not None:
            _take_carried(section, self.restored)
        if ckpt_path and verb == ["fit"] and self.continued is None:
            if self.restored is not None:
                epochs, steps = self.restored.epochs, self.restored.steps
            else:
                epochs, steps = checkpoints.trained(
                    loaded or checkpoints.read(section["ckpt_path"])
                )
            _refuse_finished(section["trainer"], epochs, steps)

    def _go_on_from(self, ckpt_path: str, verb: Sequence[str], section: Namespace) -> str:
        """Return the checkpoint that is meant, and note the run that is continued with it."""
        if ckpt_path == LAST:
            found = last_of(section["experiment"], section["run_name"])
            for damaged in found.damaged:
                log.warning("warning: %s", damaged)
            ckpt_path = str(found.checkpoint)
        if list(verb) == ["fit"]:
            self.continued = run_of(Path(ckpt_path))
        return ckpt_path

    def _options(self, verb: Sequence[str]) -> list[str]:
        parser = self._parser(verb[0] if verb else None)
        return [option for action in parser._actions for option in action.option_strings]

    def _from_checkpoint(self, verb: str, ckpt_path: str, folder: Path) -> list[str]:
        """Write the checkpoint's configuration to files and return the options that read them."""
        self.restored = checkpoints.restore(ckpt_path, trust=self.trust)
        configuration = {**self.restored.configuration}
        trainer = {**configuration.pop("trainer")}
        # Appended, since `base` brings the checkpoint callback when a fit is resumed.
        trainer["callbacks+"] = trainer.pop("callbacks")
        file = folder / "checkpoint.yaml"
        file.write_text(yaml.safe_dump({**configuration, "trainer": trainer}), encoding="utf-8")
        base = ["--config", str(recipes.find(recipes.BASE))] if verb == "fit" else []
        return [*base, "--config", str(file)]

    def _parse_ckpt_path(self) -> None:
        """Nothing: what a checkpoint's configuration may say is decided above."""

    # --- Configuration to objects ------------------------------------------------------------

    def instantiate_classes(self) -> None:
        with _one_line_errors(), self._memory_of_the_checkpoint():
            super().instantiate_classes()
        section = self._section()
        self.model.configuration = self._record()
        weights = section.get("weights")
        if weights:
            loaded = checkpoints.read(weights)
            checkpoints.check_vocabulary(loaded.get(checkpoints.KEY, {}), self.model.tokenizer)
            checkpoints.load_weights(self.model, loaded["state_dict"], weights)

    def _memory_of_the_checkpoint(self) -> AbstractContextManager[object]:
        """What a checkpoint's configuration may take, where that is what is built."""
        if self.restored is None:
            return nullcontext()
        path = str(self._section()["ckpt_path"])
        return checkpoints.rebuilding(self.restored, path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        section = self._section()
        configuration = self._record()
        interactive = sys.stdout.isatty()
        config = self._get(self.config_init, "trainer", default={})
        if config.get("enable_progress_bar") is None:
            kwargs["enable_progress_bar"] = interactive
            if interactive:
                kwargs["callbacks"] = [*(config.get("callbacks") or []), Bar()]
        # Its table says less than the lines that clipkit prints.
        if config.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False
        _check_strategy(config.get("strategy"))
        trainer = super().instantiate_trainer(**kwargs)
        _check_nodes(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        added = [
            CheckMonitors(),
            RunFolder(
                experiment=section["experiment"],
                run_name=section["run_name"],
                group=section.get("group"),
                configuration=configuration,
                config_yaml=yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True),
                continued=self.continued,
            ),
            Quarantine(),
            SourceCounts(),
            WatchingRanks(trainer.strategy),
        ]
        # After the evaluations, which refuse what they cannot measure before a folder is made;
        # before the checkpoint callbacks, which Lightning keeps last; the table after everything.
        callbacks = callbacks_of(trainer)
        at = len(callbacks) - len(trainer.checkpoint_callbacks)
        callbacks[at:at] = added
        # Before the evaluations ahead of the first step, which a signal may cut short.
        callbacks.insert(0, Interruption())
        callbacks.append(Console(plain=not interactive))
        trainer.loggers = [*trainer.loggers, Journal()]
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in arguments:
            arguments["verbose"] = False  # clipkit prints its own table, with all digits
        return arguments

    def _section(self) -> Namespace:
        section: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        return section

    def _record(self) -> dict[str, Any]:
        """Return the configuration as plain values, without what is not part of an experiment."""
        keys = ("seed_everything", "experiment", "run_name", "model", "data", "trainer", "weights")
        record = {key: self.config_dump[key] for key in keys if key in self.config_dump}
        # Drawn by Lightning where none was given.
        record["seed_everything"] = self._section()["seed_everything"]
        whole: dict[str, Any] = _with_whole_paths(record)
        return whole


def run(
    words: Sequence[str], *, trust: Sequence[str] = (), command: type[ClipkitCLI] = ClipkitCLI
) -> int:
    """Run one of Lightning's verbs from command-line words."""
    _check_importable(trust)
    _quieten_libraries()
    try:
        with _naming_causes(words):
            return command(words, trust=trust).exit_code
    except Stopped as stopped:
        # Lightning takes another rank that ends with an error for a failure, and kills the first.
        return int(stopped.code or 0) if rank_zero_only.rank == 0 else 0  # type: ignore[attr-defined]
    except SystemExit as stop:
        # Lightning ends an interrupted fit with exit(1).
        if isinstance(stop, SIGTERMException):  # where nothing is trained
            return 128 + signal.SIGTERM
        return 130 if stop.code == 1 else int(stop.code or 0)
    except MisconfigurationException as error:
        raise UserError(one_line(str(error))) from error


@contextmanager
def _naming_causes(words: Sequence[str]) -> Iterator[None]:
    """Say in a sentence what libraries trip over: too little memory, states of training."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        memory = of_memory(error)
        if memory is not None:
            raise memory from error
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if not {"restore_training_state", "restore_callbacks", "restore_datamodule"} & {*frames}:
            raise
        raise UserError(
            f"--ckpt_path {_value(words, '--ckpt_path')}: its state of training cannot be restored "
            f"({type(error).__name__}: {one_line(str(error))}); --weights takes its weights alone"
        ) from error


def _check_strategy(strategy: Any) -> None:
    known = StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and strategy not in ("auto", *known):
        hint = did_you_mean(strategy, known)
        raise UserError(
            f"trainer.strategy: {strategy} is no strategy of Lightning's; {hint}"
            "auto and ddp are the usual ones"
        )


def _check_nodes(trainer: Trainer) -> None:
    """Refuse processes that would wait for others, or that others were not told of."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None:
        return
    try:
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise UserError(f"trainer.devices, trainer.num_nodes: {one_line(str(error))}") from error
    told = {"NODE_RANK", "GROUP_RANK"} & os.environ.keys()
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and not told:
        raise UserError(
            f"trainer.num_nodes: {trainer.num_nodes} nodes have to be started by torchrun or SLURM "
            "(docs/many_gpus.md), or with MASTER_ADDR, MASTER_PORT and NODE_RANK in each one's "
            "environment; this process was told of no other node, and would wait for ever"
        )


def _quieten_libraries() -> None:
    # Lightning's own news (devices it did not find, products it recommends) is not the user's.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 calls what jsonargparse 5 will remove; the bound in pyproject.toml says 4.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for noise in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", message=noise)
    warnings.formatwarning = _one_line_warning


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {one_line(str(message))}\n"


def configuration_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the record that `clipkit fit` would keep for these words; nothing is built."""

    class ParsedError(Exception):
        pass

    class OnlyParse(ClipkitCLI):
        def before_instantiate_classes(self) -> None:
            raise ParsedError(self._record())

    _quieten_libraries()
    try:
        OnlyParse(["fit", *words])
    except ParsedError as parsed:
        record: dict[str, Any] = parsed.args[0]
        return record
    raise UserError("--print_config and --help belong to clipkit fit")


def build_run(
    configs: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[CLIPModule, LightningDataModule, Trainer]:
    """Build what ``fit`` would run; see :func:`clipkit.build`."""
    words = [word for config in configs for word in ("--config", str(config))]
    cli = ClipkitCLI([*words, *(f"--{override}" for override in overrides)], run=False)
    return cli.model, cli.datamodule, cli.trainer


def load_model(path: str, *, trust: Sequence[str] = ()) -> CLIPModule:
    """Rebuild a model from its checkpoint alone; see :func:`clipkit.load`."""
    look_in_current_folder()
    trust = [trust] if isinstance(trust, str) else trust
    _check_importable(trust)
    restored = checkpoints.restore(os.path.expanduser(path), trust=trust)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CLIPModule, "model", sub_configs=True)
    with _one_line_errors():
        config = parser.parse_object({"model": restored.configuration["model"]})
        _take_carried(config, restored)
        with checkpoints.rebuilding(restored, path):
            module: CLIPModule = parser.instantiate_classes(config).model
    module.configuration = restored.configuration
    checkpoints.load_weights(module, restored.state_dict, path)
    # For use, not for training: what it gives can be turned into numpy as it is.
    return module.eval().requires_grad_(False)


def default_precision() -> str:
    """Return bf16-mixed where a GPU computes in it, float32 elsewhere."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    return "32-true"


def names_of_run(words: Sequence[str]) -> tuple[str, str]:
    """Return the experiment and the run that a command names by what it says.

    The experiment is the recipe; the run is named after what the command adds to it: overlays by
    their file, the data set by its folder, other options by their last key and value.
    """
    configs = [Path(value).with_suffix("") for value in _values(words, *CONFIG_OPTIONS)]
    named = [config for config in configs if config.name != recipes.BASE]
    experiment = named[0].name if named else "clipkit"
    parts = [config.name for config in named[1:]]
    for key, value in _options(words):
        if key.startswith("data.") and key.endswith(".dataset"):
            parts.append(Path(value).name)
        elif key.startswith(("model.", "data.", "trainer.max", "seed")):
            named_class = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value)
            short = value.rpartition(".")[2] if named_class else value
            parts.append(f"{key.rpartition('.')[2]}={short}")
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", "-".join(parts)).strip("-_.")
    if len(name) > LONGEST_NAME:
        # What is cut off may be all that differs.
        name = f"{name[: LONGEST_NAME - 9]}-{blake2b(name.encode(), digest_size=4).hexdigest()}"
    return experiment, name or experiment


def _with_recipes(words: Sequence[str]) -> Iterator[str]:
    """Yield the words with every ``-c NAME`` turned into the file it means."""
    expected = False
    for word in words:
        option, separator, value = word.partition("=")
        if expected:
            yield _readable(recipes.find(word))
        elif separator and option in CONFIG_OPTIONS:
            yield f"--config={_readable(recipes.find(value))}"
        else:
            yield word
        expected = word in CONFIG_OPTIONS


def _readable(file: Path) -> str:
    """Return the file's path if it holds settings, in YAML."""
    try:
        settings = safe_yaml.load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"-c {file}{line}: no valid YAML ({error.problem})") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"-c {file}: cannot be read ({one_line(str(error))})") from error
    if not isinstance(settings, dict):
        raise UserError(f"-c {file}: holds no settings")
    return str(file)


def _is_config(word: str) -> bool:
    return word.partition("=")[0] in CONFIG_OPTIONS


def _typed(words: Sequence[str], *keys: str) -> bool:
    return any(
        word == key or word.startswith((f"{key}=", f"{key}.")) for word in words for key in keys
    )


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every ``--key value`` and ``--key=value``."""
    for place, word in enumerate(words):
        if not word.startswith("--"):
            continue
        key, separator, value = word[2:].partition("=")
        following = words[place + 1] if place + 1 < len(words) else ""
        yield key, value if separator else following


def _values(words: Sequence[str], *options: str) -> list[str]:
    found = []
    for place, word in enumerate(words):
        option, separator, value = word.partition("=")
        if option in options:
            found.append(value if separator else "".join(words[place + 1 : place + 2]))
    return found


def _value(words: Sequence[str], option: str) -> str | None:
    found = _values(words, option)
    return found[-1] if found else None


def _take_carried(section: Namespace, restored: checkpoints.Restored) -> None:
    """Put what the checkpoint carries in the place of what constructors would read from outside.

    Only where the part is still the checkpoint's own: a part that the command line changed reads
    its files as usual.
    """
    for part, arguments in restored.carried.items():
        value = section["model"].get(part)
        then = restored.configuration["model"].get(part)
        if not isinstance(value, Namespace) or _plain(value) != _plain(then):
            continue
        target = value.get("init_args", value)
        for name, argument in arguments.items():
            target[name] = argument


def _refuse_finished(trainer: Namespace, epochs: int, steps: int) -> None:
    """Refuse to go on where nothing is left to train, before a run is made of it."""
    for option, done, limit in (
        ("max_epochs", epochs, trainer["max_epochs"]),
        ("max_steps", steps, trainer["max_steps"]),
    ):
        if limit is not None and 0 < limit <= done:
            raise UserError(
                f"--ckpt_path: trained to its end, trainer.{option} is {limit} and {done} are "
                f"done; add --trainer.{option} {done + 10} or another number above {done}"
            )


def _check_importable(trust: Sequence[str]) -> None:
    for module in trust:
        top = module.partition(".")[0]
        if not top.isidentifier() or find_spec(top) is None:
            raise UserError(
                f"--trust {module}: there is no such module here; go to the folder that holds "
                f"{top}.py, or add that folder to PYTHONPATH"
            )


def _plain(value: Any) -> Any:
    """Return a part's configuration with what says nothing left out, for comparison."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None and v != {}}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _with_whole_paths(value: Any) -> Any:
    """Return the record with the paths of data sets made absolute: it is read from elsewhere."""
    if isinstance(value, dict):
        whole = {key: _with_whole_paths(inner) for key, inner in value.items()}
        for key in ("dataset", "path", "image_folder"):
            path = whole.get(key)
            if isinstance(path, str) and os.path.exists(os.path.expanduser(path)):
                whole[key] = os.path.abspath(os.path.expanduser(path))
        return whole
    return [_with_whole_paths(item) for item in value] if isinstance(value, list) else value


def _refuse_last_alone(words: Sequence[str]) -> None:
    if not any(_is_config(word) for word in words):
        raise UserError(
            f"--ckpt_path {LAST}: of which run? It takes the words that the run was started with, "
            f"as in clipkit fit -c base -c emoji --data.dataset DIR --ckpt_path {LAST}; a path "
            "stands alone: --ckpt_path runs/EXPERIMENT/RUN/checkpoints/last.ckpt"
        )


def _refuse_late_base(words: Sequence[str]) -> None:
    configs = _values(words, *CONFIG_OPTIONS)
    base = str(recipes.find(recipes.BASE))
    if base in configs[1:]:
        raise UserError("-c base comes first: it holds what the files after it change")


def _hint_of_base(verb: Sequence[str], words: Sequence[str]) -> str:
    configs = [Path(value) for value in _values(words, *CONFIG_OPTIONS)]
    recipe = any(recipes.folder() in path.parents for path in configs)
    with_base = any(path.stem == recipes.BASE for path in configs)
    return " (recipes are overlays of base: begin with -c base)" if recipe and not with_base else ""


@contextmanager
def _one_line_errors(options: Iterable[str] = (), hint: str = "") -> Iterator[None]:
    """Turn what the parser raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        # A constructor's own ValueError is a fault of the code, not of the user.
        if isinstance(error, ArgumentError) or "Does not validate against" in str(error):
            raise UserError(explain(str(error), options) + hint) from error
        raise
