"""Configurations from files: a run's own `config.json`, or options written by hand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from mixmask._checks import check_choice, one_line
from mixmask.runs.folder import CONFIG, read_config, read_options
from mixmask.runs.images import check_code
from mixmask.runs.options import FACTS, Options, flag, restore_config
from mixmask.trainers.config import RunConfig
from mixmask.trainers.methods import METHODS, option_defaults

# Options of the command that are no part of a configuration: they say where a run is, not what.
_COMMAND = ("config", "out", "resume", "device", "threads")


def read_run(folder: Path) -> tuple[RunConfig, Options]:
    """Read the configuration of a run folder.

    Returns:
        The configuration, and all that `config.json` says: these options, and facts beside them.

    Raises:
        ValueError: If it is not a folder of a pretraining run, or not all options are there and
            within their limits.
    """
    try:
        content = read_config(folder)
        check_choice("--method", content.get("method"), tuple(METHODS))
        return restore_config(METHODS[content["method"]].config, content), content
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a run that can be resumed: its {CONFIG} cannot be used ({error}); "
            "pass a folder that --out named"
        ) from error


def load_config(folder: Path) -> RunConfig:
    """Read the configuration of a run folder; see `read_run`."""
    return read_run(folder)[0]


def read_options_file(path: Path, given: Options | None = None) -> Options:
    """Read options from a hand-written file, or from a run's `config.json`.

    Of a run's, what its images decided is left out, its recipe too where the data are others, and
    what the new run's method does not have.

    Args:
        path: JSON, or YAML by its suffix `.yaml` or `.yml`, which needs pyyaml. Names may be
            written with hyphens.
        given: Options that take precedence over those of the file.

    Raises:
        ValueError: If the file is missing, holds no options or unknown ones, or is a run's whose
            data come from code that the user has not named.
    """
    try:
        if path.exists() and not path.is_file():  # A pipe would be waited for.
            raise ValueError("it is not a file")  # noqa: TRY301
        content = _read_yaml(path) if path.suffix in (".yaml", ".yml") else read_options(path)
        options = _check_names(content)
        if "format" in content and "data" not in (given or {}):
            check_code(str(content.get("data")), path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be used ({one_line(error)})") from None
    return _leave_out(options, given or {}) if "format" in content else options


def _read_yaml(path: Path) -> Options:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ValueError("YAML needs pyyaml: pip install pyyaml, or write JSON") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error) or "it is nested too deeply") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"expected names and values, got {type(content).__name__}")  # noqa: TRY004
    return dict(content)


def _check_names(content: Options) -> Options:
    """Return a file's options by their names, and refuse whatever is none."""
    known = {name: value for method in METHODS for name, value in option_defaults(method).items()}
    options: Options = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"it holds {key!r}, which names no option")  # noqa: TRY004
        name = key.replace("-", "_")
        if name in FACTS:
            continue
        if name in _COMMAND:
            raise ValueError(
                f"{key!r} is not part of a configuration; leave it out, and pass {flag(name)} to "
                "the command"
            )
        if name not in known:
            near = get_close_matches(name, known, 1, cutoff=0.7)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ValueError(f"{key!r} is not an option; {hint}")
        if isinstance(value, Mapping):
            raise ValueError(  # noqa: TRY004
                f"{key!r} must have one value, got {dict(value)}; write all options side by side"
            )
        options[name] = _read_number(value) if isinstance(known[name], float) else value
    return options


def _read_number(value: object) -> object:
    """Return 1e-3 as a number: YAML 1.1 reads it as text, because it has no point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _leave_out(options: Options, given: Options) -> Options:
    """Leave out what a run's images decided, and what the method of the new one does not have."""
    method = {**options, **given}.get("method", RunConfig.method)
    check_choice("--method", method, tuple(METHODS))
    own = option_defaults(method)
    left = {"stream", "channels", *(["recipe"] if "data" in given else [])}
    return {name: value for name, value in options.items() if name in own and name not in left}
