"""Config dataclasses as JSON and back, strictly: a field that is unknown, missing or of another type is an error."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal

from hi3d_jax.pretrained.safetensors_files import PretrainedError


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(cls: type, fields: Any, where: str = "config") -> Any:
    """The config that `config_to_dict` wrote. Raises `PretrainedError` for unknown, missing or mistyped fields."""
    if not isinstance(fields, dict):
        raise PretrainedError(f"{where} must be an object with the fields of {cls.__name__}, not {fields!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - set(known)):
        raise PretrainedError(
            f"{where} has the unknown field {', '.join(unknown)}; {cls.__name__} has {', '.join(known)}"
        )
    required = {name for name, field in known.items() if _has_no_default(field)}
    if missing := sorted(required - set(fields)):
        raise PretrainedError(f"{where} lacks the field {', '.join(missing)} of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in fields.items()}
    try:
        return cls(**values)
    except PretrainedError:
        raise
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the type `hint`, or an error that says where it does not suit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _value(option, value, where)
            except PretrainedError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin is tuple and isinstance(value, list):
        hints = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if len(hints) == len(value):
            return tuple(_value(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    elif hint is float and type(value) is int:
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise PretrainedError(f"{where} is {value!r}, which is no {getattr(hint, '__name__', hint)}")
