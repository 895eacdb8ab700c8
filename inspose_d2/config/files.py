"""Config files and command-line changes into a config, with errors that say where and what.

In place of Detectron2's ``merge_from_file``, which runs Python tags of the YAML and raises bare
``AssertionError`` and ``KeyError``.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "model_zoo" / "configs"
# An installed package has them inside, a checkout beside it.
CONFIGS = next((x for x in (_INSTALLED, _PACKAGE.parent / "configs") if x.is_dir()), _INSTALLED)


# Keys whose ~ is the home folder; those of DATASETS.REGISTER are read elsewhere.
PATHS = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS")


class ConfigError(ValueError):
    """A config that cannot be used; the message is for whoever wrote it."""


def list_configs() -> list[str]:
    """Names of the configs that come with the package, for :func:`inspose_d2.get_cfg`."""
    paths = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if not path.name.startswith("Base"))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Suggest what was probably meant.

    Args:
        word: that is none of the words.
        words: the valid ones; with the same last part (after "." or "/") they come first.

    Returns:
        `` Did you mean 'X'?``, or nothing where none comes near.
    """

    def last_part(x: str) -> str:
        return x.replace("/", ".").rpartition(".")[2].lower()

    words = list(words)
    same = [x for x in words if last_part(x) == last_part(word)]
    lowered = {x.lower(): x for x in same or words}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.0 if same else 0.6)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def find_config(name_or_file: str | os.PathLike[str]) -> Path:
    """Find a config file by its path, or by its name in :func:`list_configs`.

    Args:
        name_or_file: a file that exists is taken before a name.

    Returns:
        Path of a file that exists.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return path
    name = path.as_posix()
    if name in list_configs():
        return CONFIGS / f"{name}.yaml"
    what = "is a folder" if path.is_dir() else "is no file"
    hint = did_you_mean(name.removesuffix(".yaml").removeprefix("configs/"), list_configs())
    raise ConfigError(
        f"{str(name_or_file)!r} {what} and no name of a config of the package.{hint} "
        "inspose_d2.list_configs() lists the names"
    )


def merge_file(cfg: CfgNode, path: Path, chain: Sequence[Path] = ()) -> None:
    """Set the keys of a YAML file, after those of its ``_BASE_``: a file, or a name, or several.

    Args:
        cfg: changed in place.
        path: of the file.
        chain: files that have this one as their ``_BASE_``, outermost first.

    Raises:
        ConfigError: names the file, and what is wrong where in it.
    """
    path = path.resolve()
    if path in chain:
        cycle = " -> ".join(str(x) for x in (*chain[chain.index(path) :], path))
        raise ConfigError(f"_BASE_ goes round in a circle: {cycle}")
    values = _read(path)
    base = values.pop("_BASE_", [])
    for name in base if isinstance(base, list) else [base]:
        base_path = path.parent / Path(str(name)).expanduser()
        if not base_path.is_file() and name in list_configs():
            base_path = CONFIGS / f"{name}.yaml"
        if not base_path.is_file():
            raise ConfigError(
                f"{path}: _BASE_ {name!r} is no file, {base_path.resolve()}, and no name of a "
                f"config of the package.{did_you_mean(str(name), list_configs())}"
            )
        merge_file(cfg, base_path, (*chain, path))
    merge_values(cfg, leaves(values), str(path))


def merge_options(cfg: CfgNode, opts: Sequence[Any]) -> None:
    """Set keys from a flat list, as it stands at the end of a command line.

    Args:
        cfg: changed in place.
        opts: KEY, VALUE, KEY, VALUE, ...; values may be strings as in YAML.

    Raises:
        ConfigError: names the key.
    """
    if len(opts) % 2:
        raise ConfigError(
            f"Config changes are pairs KEY VALUE, separated by a space; these {len(opts)} words "
            f"are no pairs: {' '.join(map(str, opts))}"
        )
    merge_values(cfg, zip(map(str, opts[::2]), opts[1::2], strict=True), "config changes")


def merge_values(cfg: CfgNode, values: Iterable[tuple[str, Any]], source: str) -> None:
    """Set declared keys to values of the type that they have.

    Args:
        cfg: changed in place.
        values: full keys, such as ``SOLVER.BASE_LR``, and their values.
        source: of the values, for errors.

    Raises:
        ConfigError: names the source, the key, and the nearest valid key or the expected type.
    """
    declared = dict(leaves(cfg))
    for key, given in values:
        if key not in declared:
            group = [x for x in declared if x.startswith(f"{key}.")]
            if group and given is None:  # a heading with nothing below
                continue
            problem = (
                f"{key} is a group of keys such as {group[0]}; got {given!r}"
                if group
                else f"there is no key {key}.{did_you_mean(key, declared)}"
            )
            raise ConfigError(f"{source}: {problem}")
        default = declared[key]
        value = _decode(given, default)
        if key in PATHS and isinstance(value, str):
            value = os.path.expanduser(value)
        try:
            if value is None and default is not None:  # yacs lets it pass
                raise ValueError
            cfg.merge_from_list([key, repr(value) if isinstance(value, str) else value])
        except ValueError as error:
            raise ConfigError(
                f"{source}: {key} is {given!r}; expected {_expected(default, value)}"
            ) from error


def _read(path: Path) -> dict[str, Any]:
    """Parse a YAML file; tags that would run Python are errors."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{where}: this is not plain YAML: {problem}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected lines KEY: VALUE, such as MODEL: or _BASE_: Base-InsPose.yaml; "
            f"got {'nothing' if values is None else repr(values)[:80]}"
        )
    return values


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full keys and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _decode(given: Any, default: Any) -> Any:
    """Read a string as a literal as yacs does; here a number may be text, an integer a float."""
    value = CfgNode._decode_cfg_value(given)
    if isinstance(given, str) and isinstance(default, str) and not isinstance(value, str):
        return given  # such as OUTPUT_DIR 2024
    return float(value) if isinstance(default, float) and type(value) is int else value


def _expected(default: Any, value: Any) -> str:
    """Say what a value should have been like."""
    if not isinstance(default, tuple | list):
        return f"a value of type {type(default).__name__}, such as {default!r}"
    fits = not default or type(value) is type(default[0])  # only the brackets are missing
    return f"a {type(default).__name__}, such as {type(default)([value]) if fits else default}"
