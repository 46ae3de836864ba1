"""The options of ``kdkernels train``, from a config file and the command line, which overrides it."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ...data.selection import read_shares
from ...data.values import object_of, read_json
from .options import GROUPS, AdapterOptions, MemoryOptions, ReportOptions, RowOptions

__all__ = ["BLOCK", "RESOLVED", "Settings", "TrainError", "read_config", "read_settings"]

MINE = ("teacher", "student", "data", "eval_data", "cache", "student_dtype", "teacher_dtype")
SEVERAL = ("teacher", "data", "eval_data")
"""Options that can be repeated."""
RESOLVED, BLOCK = "resolved.yaml", "record"
"""File with all options of a run, in its output folder, and its block with versions and content."""
STRUCTURED = ("divergence", "feature_layers", "columns")
"""Text options that a config file may give as a mapping or a list, which DistillationArguments can read."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


class TrainError(ValueError):
    """Invalid options, models or data. The message says which, and what to do."""


@dataclass
class Settings:
    """Paths and models of a run; ``args``: its DistillationArguments; the fields of ``GROUPS``: its other options."""

    student: str
    data: list[str]
    teacher: list[str] = field(default_factory=list)
    eval_data: list[str] = field(default_factory=list)
    cache: str | None = None
    student_dtype: str = "auto"
    teacher_dtype: str = "auto"
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reports: ReportOptions = field(default_factory=ReportOptions)
    rows: RowOptions = field(default_factory=RowOptions)
    args: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    """All options by name, with defaults."""
    expected: Mapping[str, Any] | None = None
    """The block ``record`` of the config: versions and content that the run must match."""

    @property
    def sources(self) -> list[str]:
        """Files, folders and data sets of ``data``, without their shares."""
        return read_shares(self.data)[0]

    @property
    def shares(self) -> list[float] | None:
        """Share of the draws from each source; None without shares."""
        return read_shares(self.data)[1]

    @property
    def models(self) -> list[tuple[str, str, str]]:
        """Role, path and dtype of the student, then of each teacher."""
        # Not the saved dtype: in bfloat16, most updates would round to nothing.
        student = "student", self.student, "float32" if self.student_dtype == "auto" else self.student_dtype
        return [student, *(("teacher", path, self.teacher_dtype) for path in self.teacher)]


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML or JSON file, with dashes as underscores.

    Raises:
        TrainError: the file does not exist, has an unknown format, or does not contain a mapping.
    """
    if not path.is_file():
        raise TrainError(f"--config {path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            value = read_json(text)
        elif path.suffix in (".yaml", ".yml"):
            value = _of_yaml(text)
        else:
            raise TrainError(f"--config {path}: unknown file extension; expected .yaml or .json")
    except TrainError:
        raise
    except Exception as error:  # of either parser
        raise TrainError(f"--config {path}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, Mapping):
        raise TrainError(
            f"--config {path}: a mapping of options is needed, such as {{student: ..., data: ...}}, not {type(value).__name__}"
        )
    try:
        return object_of([(str(name).replace("-", "_"), part) for name, part in value.items()])
    except ValueError as error:
        raise TrainError(f"--config {path}: {error} (dashes and underscores are the same)") from None


def _of_yaml(text: str) -> Any:
    """Parse YAML text, and raise for repeated names, of which PyYAML would use the last."""
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        object_of([(name.value, part) for name, part in node.value if isinstance(name, yaml.ScalarNode)])
    return yaml.safe_load(text)


def read_settings(config: Mapping[str, Any], given: Mapping[str, Any], rest: Sequence[str]) -> Settings:
    """Return the settings of a run.

    Args:
        config: options of a config file.
        given: options that the command declares, which override the file's; None if not given.
        rest: ``--field value`` for fields of DistillationArguments and ``GROUPS``, as text.

    Raises:
        TrainError: an unknown name (with the nearest valid one), an invalid value, or a missing option.
    """
    declared: dict[str, Any] = {name: given[name] if given.get(name) else config.get(name) for name in MINE}
    if not config and not rest:  # report missing options at once, without importing transformers
        _check_not_missing(declared)
    from ...trainer.arguments import DistillationArguments

    typed = {name: value for name, value in given.items() if name not in MINE and value is not None}
    expected = config.get(BLOCK)
    if expected is not None and not (isinstance(expected, Mapping) and all(isinstance(part, Mapping) for part in expected.values())):
        raise TrainError(f"{BLOCK} in the config: it is the block of a {RESOLVED}, with content and machine; leave it out for another run")
    fields = _fields([DistillationArguments, *GROUPS.values()], {**config, **typed}, rest)
    for name in SEVERAL:
        value = declared[name] or []
        declared[name] = value if isinstance(value, list) else [value]
    for name, value in declared.items():
        if not all(isinstance(part, str) for part in (value if name in SEVERAL else [value or ""])):
            shown = value[0] if name in SEVERAL and len(value) == 1 else value
            raise TrainError(f"--{name.replace('_', '-')} {shown!r}: a path or name is needed, as text")
    _check_not_missing(declared)
    for name in ("student_dtype", "teacher_dtype"):
        declared[name] = declared[name] or "auto"
        if declared[name] not in DTYPES:
            raise TrainError(f"--{name.replace('_', '-')} {declared[name]!r}: choose one of {', '.join(DTYPES)}")
    if not fields["output_dir"]:
        raise TrainError("--output-dir is missing: the folder of checkpoints and of the trained model")
    options = {**declared, **{name: getattr(value, "value", value) for name, value in fields.items() if not name.endswith("_token")}}
    try:
        groups = {name: group(**{f.name: fields.pop(f.name) for f in dataclasses.fields(group)}) for name, group in GROUPS.items()}
        settings = Settings(**declared, **groups, args=DistillationArguments(**fields), options=options, expected=expected)
    except (ValueError, TypeError, ImportError) as error:
        raise TrainError(" ".join(str(error).split())) from error
    try:
        read_shares(settings.data)
    except ValueError as error:
        raise TrainError(str(error)) from None
    args = settings.args
    if settings.rows.streaming:
        _check_streaming(settings)
    if settings.rows.eval_fraction is not None and settings.eval_data:
        raise TrainError("--eval-fraction and --eval-data: held-out rows are those of one of them; leave the other out")
    for role, path, _ in settings.models:
        if Path(path).exists() and Path(path).resolve() == Path(args.output_dir).resolve():
            raise TrainError(f"--output-dir {args.output_dir} is the --{role}, which would be overwritten: choose another folder")
    if settings.cache and settings.teacher:
        raise TrainError("--cache and --teacher: the cache is the teacher; give one of them")
    if not settings.cache and not settings.teacher and (args.kd_weight > 0 or args.feature_weight > 0):
        raise TrainError("--teacher is missing (a model's folder or name; several times for several), or --cache")
    return settings


def _check_streaming(settings: Settings) -> None:
    """
    Raises:
        TrainError: options that need all rows before the training.
    """
    args = settings.args
    if args.max_steps < 1:
        raise TrainError("--streaming needs --max-steps: how many rows there are is not known before they are read")
    if settings.cache:
        raise TrainError("--cache with --streaming: a training checks first that its cache holds every row. Leave --streaming out")
    if args.dataloader_num_workers:
        raise TrainError(
            f"--dataloader-num-workers {args.dataloader_num_workers} with --streaming: the rows are read in the training's own process. "
            "Leave it 0"
        )
    if args.auto_find_batch_size:
        raise TrainError("--auto-find-batch-size with --streaming: the data can't be rewound. Give --per-device-train-batch-size")
    for kind in ("eval", "save", "logging"):
        if getattr(args, f"{kind}_strategy") == "epoch":
            raise TrainError(f"--{kind}-strategy epoch with --streaming: no epoch is known. Choose steps, and --{kind}-steps")
    if settings.reports.sample_every is not None and not settings.eval_data and settings.rows.eval_fraction is None:
        raise TrainError("--sample-every with --streaming takes its prompts from held-out rows: give --eval-data or --eval-fraction")


def _check_not_missing(declared: Mapping[str, Any]) -> None:
    for name in ("student", "data"):
        if not declared[name]:
            raise TrainError(f"--{name} is missing")


def _fields(groups: Sequence[type], config: Mapping[str, Any], rest: Sequence[str]) -> dict[str, Any]:
    """Return the fields of all dataclasses ``groups``, from ``rest``, else from ``config``, else the defaults."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise TrainError(message.replace("argument ", "", 1))

    parser = Parser(groups, allow_abbrev=False)
    fields = [f.name for group in groups for f in dataclasses.fields(group) if f.init]
    options = [option for action in parser._actions for option in action.option_strings]
    for name in config:
        if name not in MINE and name not in fields and name != BLOCK:
            raise TrainError(f"unknown option {name!r} in the config{_nearest(name, [*MINE, *fields])}")
    for word in rest:
        option = word.partition("=")[0]
        if word.startswith("--") and option not in options:
            names = [*(f"--{name.replace('_', '-')}" for name in MINE), *(o for o in options if "_" not in o)]
            raise TrainError(f"unknown option {option}{_nearest(option, names)}")
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    read = {action.dest: action.type for action in parser._actions}
    values = {
        name: _as_typed(name, value, read[name], hints[name]) for name, value in config.items() if name in fields and value is not None
    }
    parser.set_defaults(**{"disable_tqdm": True, **values})
    namespace, strays = parser.parse_known_args(list(rest))
    if strays:
        raise TrainError(f"{strays[0]!r} belongs to no option; write --option value")
    return dict(vars(namespace))


def _as_typed(name: str, value: Any, read: Any, hint: Any) -> Any:
    """Convert a value from a config file for the command line's parser: numbers and switches become text, lists stay lists.

    Raises:
        TrainError: the value has a wrong type for the option.
    """
    if value is False and name.endswith("_strategy"):  # YAML reads a plain no as false
        return "no"
    kinds = {get_origin(part) or part for part in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])}
    if isinstance(value, datetime.date) and str in kinds:  # YAML reads a plain 2026-11-28 as a date
        return value.isoformat()
    if isinstance(value, (list, Mapping)):
        if name in STRUCTURED:
            return value
        if not kinds & {list, dict} or (isinstance(value, Mapping) and dict not in kinds):
            what = "a list" if isinstance(value, list) else "a mapping"
            raise TrainError(f"{name.replace('_', '-')} in the config: one value is needed, not {what} ({_short(value)})")
        return value
    if kinds == {list} or kinds == {list, NoneType}:
        if not isinstance(value, str):
            raise TrainError(f"{name.replace('_', '-')} in the config: text or a list of texts is needed, not {_short(value)}")
        return [value]
    if read in (int, float) or getattr(read, "__name__", "") == "string_to_bool":
        return str(value)
    if not isinstance(value, str) and not kinds & {bool, int, float}:
        raise TrainError(f'{name.replace("_", "-")} in the config: text is needed, not {_short(value)}; write it in quotes: "{value}"')
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else "; see `kdkernels train --help`"
