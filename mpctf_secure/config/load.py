"""Reading YAML: every mistake becomes one line that names file, line and field."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError

from mpctf_secure.errors import UsageError

M = TypeVar("M", bound=BaseModel)
Location = tuple[str, ...]
MAX_BYTES = 1 << 20


def load(path: Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """The model that a YAML file describes, with `field.name=value` overrides put over it."""
    content, lines = _read(path)
    for override in overrides:
        _override(content, override)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _usage_error(path, lines, model, error) from error


def dump(model: BaseModel) -> str:
    """The model as YAML, every field written out."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES} bytes", hint="is this really a config file?")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        lines = dict(_lines(node, ()))
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="check the path of the config file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8", hint="save the file as UTF-8") from error
    except ValueError as error:
        raise UsageError(f"{path}, {error}", hint="keep one of the two") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UsageError(f"{path}{where}: not YAML: {problem}", hint="check indentation and quotes") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a mapping of fields", hint="see configs/ for examples")
    return content, lines


def _lines(node: yaml.Node | None, at: Location) -> Iterator[tuple[Location, int]]:
    """(field, line) of every key; ValueError for a key that is there twice, which YAML itself lets pass."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        where = (*at, str(key.value))
        if where in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: {'.'.join(where)} is there twice")
        seen.add(where)
        yield where, key.start_mark.line + 1
        yield from _lines(value, where)


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {override}: not field=value", hint="for example --set rounds=2")
    *path, last = name.split(".")
    here = content
    for part in path:
        inner = here.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override}: {part} has no fields", hint="name a field of the run file")
        here = inner
    try:
        here[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not YAML", hint="quote it") from error


def _usage_error(path: Path, lines: Mapping[Location, int], model: type[M], error: ValidationError) -> UsageError:
    # A misspelt key is missing under its right name too: what is written there says more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    field, holder = _resolve(model, tuple(str(part) for part in first["loc"]))
    known = max((field[:n] for n in range(len(field) + 1) if field[:n] in lines), key=len, default=())
    where = f"{path}, line {lines[known]}" if known else str(path)
    name = ".".join(field) or "the file"
    if first["type"] == "extra_forbidden":
        return UsageError(f"{where}: {name} is not a known field", hint=_nearest(holder, field[-1]))
    if first["type"] == "missing":
        return UsageError(f"{where}: {name} is missing", hint="see configs/ for examples")
    message = first["msg"].removeprefix("Value error, ")
    return UsageError(f"{where}: {name}: {message[0].lower()}{message[1:]}", hint=f"got {_short(first['input'])}")


def _short(value: object, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _resolve(model: type[BaseModel], path: Location) -> tuple[Location, type[BaseModel]]:
    """The field as it is written, without the tags that pydantic puts behind unions, and the model that holds it."""
    field, holder, inside = [], model, {"": model}
    for part in path:
        if part in inside:  # a tag
            holder, inside = inside[part], {}
            continue
        holder = inside.get("", holder)
        field.append(part)
        found = holder.model_fields.get(part)
        inside = _models_in(found.annotation) if found else {}
    return tuple(field), holder


def _models_in(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models that a field may hold, by their tags; one without a tag is ""."""
    models = {}
    for candidate in (annotation, *get_args(annotation)):
        bare, *extras = get_args(candidate) if hasattr(candidate, "__metadata__") else (candidate,)
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            models[next((extra.tag for extra in extras if isinstance(extra, Tag)), "")] = bare
    return models


def _nearest(model: type[BaseModel], name: str) -> str:
    names = list(model.model_fields)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known fields: {', '.join(names)}"
