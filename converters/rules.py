"""Converts checkpoints by tables of rules, strictly in both directions, and back by the same tables read backwards.

A table is a list of `Rule(source, target, transform)`. Every source key must be named by exactly one rule (or be
ignored for a stated reason) and every parameter must be filled exactly once with the right shape; one
`ConversionError` lists everything that is not so. Tensors are converted one at a time, when they are asked for: with
memory-mapped weights the memory needed is that of the largest tensor.

Convention: a rule's `source` is a regular expression made of literals and capture groups, matched in full against the
source key; `target` is a dotted path in our parameters in which \\1 refers to the first group. Three forms of target:

    Rule(r"time_embed\\.0\\.weight", r"time_embedding.linear_1.kernel", linear)
    Rule(r"(.*)\\.in_proj_weight", (r"\\1.query.kernel", r"\\1.key.kernel", r"\\1.value.kernel"), linear)
    Rule(r"resblocks\\.(\\d+)\\.ln_1\\.weight", r"blocks[\\1].norm1.scale")

A tuple of targets shares the source's first axis in equal parts, in order. A target with [\\1] is row \\1 of a
parameter whose first axis stacks repeated blocks (for `lax.scan`); the path without the brackets is the parameter's
name, here "blocks.norm1.scale".
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ConversionError(ValueError):
    """A checkpoint, a table and a network that do not fit together; `problems` has one line per thing that is wrong."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(f"{len(self.problems)} problem(s) in the conversion:\n  " + "\n  ".join(self.problems))


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one source tensor becomes one of ours, and back: `inverse(forward(x))` is bit-equal to `x`.

    Both directions return views where they can. A ValueError says that the tensor's shape does not suit.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def permute(name: str, *axes: int) -> Transform:
    """The transform that reorders axes as `numpy.transpose(x, axes)`."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(name, lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


keep = Transform("keep", lambda x: x, lambda x: x)
linear = permute("(out, in) -> (in, out)", 1, 0)
conv2d = permute("OIHW -> HWIO", 2, 3, 1, 0)
conv3d = permute("OITHW -> THWIO", 2, 3, 4, 1, 0)
conv1x1_as_linear = Transform(
    "(out, in, 1, 1) -> (in, out)", lambda x: np.squeeze(x, (2, 3)).T, lambda x: np.expand_dims(x.T, (2, 3))
)


class Rule(NamedTuple):
    """One line of a table; see the module's text for the forms of `target`."""

    source: str
    target: str | tuple[str, ...]
    transform: Transform = keep

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion: `specs` gives every tensor's shape and dtype, `arrays()` makes them one at a time."""

    specs: Mapping[str, jax.ShapeDtypeStruct]
    make: Callable[[str], np.ndarray]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array) in the order of `specs`; a `ConversionError` at the end names what is not finite."""
        not_finite = []
        for name, spec in self.specs.items():
            array = self.make(name)
            if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
                not_finite.append(f"{name}: holds NaN or infinite values as {spec.dtype}")
            yield name, array
        if not_finite:
            raise ConversionError(not_finite)


def plan(
    weights: Mapping[str, Any],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[Rule],
    ignore: Sequence[tuple[str, str]] = (),
    dtype: Any = None,
) -> Plan:
    """Checks names, shapes and dtypes without reading a value, and returns the conversion to be run.

    `expected` has the shape of each of our parameters, and whether it is floating-point. `ignore` pairs a regular
    expression (matched in full) with the reason why such keys are not ours. `dtype` is what floating-point parameters
    become; None keeps each source tensor's own. Raises one `ConversionError` with all problems.
    """
    pieces, problems = _assign(weights, expected, rules, ignore)
    specs = {}
    for path, struct in expected.items():
        found = _check(path, struct, pieces[path], weights)
        problems += found
        if not found:
            own = weights[pieces[path][0].source].dtype
            floating = jnp.issubdtype(own, jnp.inexact)
            specs[path] = jax.ShapeDtypeStruct(struct.shape, own if dtype is None or not floating else dtype)
    if problems:
        raise ConversionError(problems)

    def make(path: str) -> np.ndarray:
        out = np.empty(specs[path].shape, specs[path].dtype)
        # A value too large for a narrower dtype becomes infinite here, and `Plan.arrays` reports it.
        with np.errstate(over="ignore"):
            for piece in pieces[path]:
                out[... if piece.row is None else piece.row] = piece.take(weights[piece.source])
        return out

    return Plan(specs, make)


def convert(
    weights: Mapping[str, Any],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[Rule],
    ignore: Sequence[tuple[str, str]] = (),
    dtype: Any = None,
) -> dict[str, np.ndarray]:
    """All our parameters at once; arguments and errors are those of `plan`."""
    return dict(plan(weights, expected, rules, ignore, dtype).arrays())


class _Piece(NamedTuple):
    """What fills one parameter, or one row of it: part `part` of `parts` of a source tensor, transformed."""

    source: str
    transform: Transform
    part: int
    parts: int
    row: int | None

    def take(self, tensor: np.ndarray) -> np.ndarray:
        if self.parts == 1:
            return self.transform.forward(tensor)
        if tensor.ndim == 0 or len(tensor) % self.parts:
            raise ValueError(f"its first axis cannot be split in {self.parts} equal parts")
        size = len(tensor) // self.parts
        return self.transform.forward(tensor[self.part * size : (self.part + 1) * size])


_ROW = re.compile(r"\[(\\?\d+)\]")


def _split_row(target: str) -> tuple[str, str | None]:
    """A target's path without its [row], and the row's text ("\\1" or a number)."""
    rows = _ROW.findall(target)
    path = _ROW.sub("", target)
    if len(rows) > 1 or "[" in path:
        raise ValueError(f"target {target!r}: at most one [row], a number or a group, is understood")
    return path, rows[0] if rows else None


def _assign(weights, expected, rules, ignore) -> tuple[dict[str, list[_Piece]], list[str]]:
    """Which pieces fill each parameter, by the names alone, and what is wrong with the names."""
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    problems = []
    compiled = [(re.compile(rule.source), rule, [_split_row(target) for target in rule.targets]) for rule in rules]
    ignored = [re.compile(pattern) for pattern, _ in ignore]
    for key in weights:
        matches = [(match, rule, targets) for regex, rule, targets in compiled if (match := regex.fullmatch(key))]
        names = " and ".join(repr(rule.source) for _, rule, _ in matches)
        if any(pattern.fullmatch(key) for pattern in ignored):
            problems += [f"{key}: both ignored and named by rule {names}"] if matches else []
        elif len(matches) != 1:
            problems.append(f"{key}: {f'{len(matches)} rules name it, {names}' if matches else 'no rule names it'}")
        else:
            match, rule, targets = matches[0]
            for part, (target, row) in enumerate(targets):
                path = match.expand(target)
                row = None if row is None else int(match.expand(row))
                if path in expected:
                    pieces[path].append(_Piece(key, rule.transform, part, len(targets), row))
                else:
                    problems.append(f"{key}: its target {path} is not a parameter of this network")
    return pieces, problems


def _check(path: str, struct: jax.ShapeDtypeStruct, pieces: list[_Piece], weights) -> list[str]:
    """What is wrong with the pieces of one parameter: rows, shapes and dtypes."""
    if not pieces:
        return [f"{path}: never filled; no source key gives it (its shape is {struct.shape})"]
    problems = []
    stacked = pieces[0].row is not None
    wanted = list(range(struct.shape[0])) if stacked and struct.shape else [None]
    sources = defaultdict(list)
    for piece in pieces:
        sources[piece.row].append(piece.source)
    for row in {*wanted, *sources}:
        name = path if row is None else f"{path}[{row}]"
        if row not in wanted:
            problems.append(f"{name}: no such row, wanted by {sources[row][0]}; the parameter is {struct.shape}")
        elif len(sources[row]) != 1:
            by = f"filled {len(sources[row])} times, by {', '.join(sources[row])}" if sources[row] else "never filled"
            problems.append(f"{name}: {by}")
    dtypes = sorted({str(weights[piece.source].dtype) for piece in pieces})
    if len(dtypes) > 1:
        problems.append(f"{path}: its source keys mix the dtypes {', '.join(dtypes)}")
    for piece in pieces:
        tensor = weights[piece.source]
        if jnp.issubdtype(tensor.dtype, jnp.inexact) != jnp.issubdtype(struct.dtype, jnp.inexact):
            problems.append(f"{piece.source}: its dtype {tensor.dtype} does not suit {path}, which is {struct.dtype}")
        problems += _check_shape(path, struct.shape if piece.row is None else struct.shape[1:], piece, tensor)
    return problems


def _dummy(tensor) -> np.ndarray:
    """An array with the tensor's shape and dtype that holds one zero and no memory."""
    return np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)


def _check_shape(path: str, wanted: tuple[int, ...], piece: _Piece, tensor) -> list[str]:
    source = f"{piece.source}: its shape {tuple(tensor.shape)}"
    try:
        shape = piece.take(_dummy(tensor)).shape
    except ValueError as error:
        return [f"{source} does not suit the transform {piece.transform.name} of {path} ({error})"]
    if shape == tuple(wanted):
        return []
    part = f", part {piece.part + 1} of {piece.parts}," if piece.parts > 1 else ""
    return [f"{source}{part} becomes {shape}, but {path} needs {tuple(wanted)}"]


def plan_export(params: Mapping[str, Any], rules: Sequence[Rule]) -> Plan:
    """The conversion back: our parameters under their source names and layouts, bit-equal where no dtype was changed.

    Source keys that `plan` ignored do not come back. Raises one `ConversionError` with all problems.
    """
    parts, problems = _assign_back(params, rules)
    specs = {}
    for key, (rule, found) in parts.items():
        missing = [rule.targets[part] for part in range(len(rule.targets)) if part not in found]
        if missing:
            problems.append(f"{key}: needs {', '.join(missing)}, which the network does not have")
            continue
        shapes = [rule.transform.inverse(_dummy(_row(params, *found[part]))).shape for part in sorted(found)]
        shape = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        specs[key] = jax.ShapeDtypeStruct(shape, params[found[0][0]].dtype)
    if problems:
        raise ConversionError(problems)

    def make(key: str) -> np.ndarray:
        rule, found = parts[key]
        pieces = [rule.transform.inverse(_row(params, *found[part])) for part in sorted(found)]
        # In C order whatever the order of the pieces: safetensors writes the bytes as they lie in memory.
        return np.array(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), order="C")

    return Plan(specs, make)


def export(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """All source tensors at once; arguments and errors are those of `plan_export`."""
    return dict(plan_export(params, rules).arrays())


def _row(params: Mapping[str, Any], path: str, row: int | None) -> np.ndarray:
    return params[path] if row is None else params[path][row]


class _Reader(NamedTuple):
    """A rule read backwards for one of its targets: parameter paths that match `path` give the key `template`."""

    rule: Rule
    part: int
    path: re.Pattern
    row: str | None
    template: str

    def keys(self, path: str, num_rows: int) -> Iterator[tuple[int | None, str]]:
        """The source key of a parameter, or of each of its rows."""
        if not (match := self.path.fullmatch(path)):
            return
        groups = match.groupdict()
        if self.row is None:
            choices = [(None, groups)]
        elif self.row.startswith("\\"):
            choices = [(row, groups | {f"g{self.row[1:]}": str(row)}) for row in range(num_rows)]
        else:
            choices = [(int(self.row), groups)]
        for row, values in choices:
            key = self.template.format(**values)
            if re.fullmatch(self.rule.source, key):
                yield row, key


def _assign_back(params, rules) -> tuple[dict[str, tuple[Rule, dict[int, tuple[str, int | None]]]], list[str]]:
    """For each source key: its rule, and which (path, row) is each of its parts; and what is wrong with the names."""
    parts: dict[str, tuple[Rule, dict[int, tuple[str, int | None]]]] = {}
    problems = []
    readers = [_read_backwards(rule, part) for rule in rules for part in range(len(rule.targets))]
    for path, param in params.items():
        num_rows = param.shape[0] if param.shape else 0
        found = defaultdict(list)
        for reader in readers:
            for row, key in reader.keys(path, num_rows):
                found[row].append(key)
                parts.setdefault(key, (reader.rule, {}))[1][reader.part] = (path, row)
        for row in range(num_rows) if found and None not in found else [None]:
            if len(found[row]) != 1:
                name = path if row is None else f"{path}[{row}]"
                problems.append(f"{name}: {len(found[row])} rules give it a source key {found[row] or ''}".rstrip())
    return parts, problems


# A literal (escaped or a plain character), a capture group without groups inside, or something not understood.
_TOKEN = re.compile(r"\\([^\w\s])|([\w-])|\(((?!\?)(?:[^()\\]|\\.|\(\?:[^()]*\))*)\)|(.)")


def _read_backwards(rule: Rule, part: int) -> _Reader:
    """Turns a rule around. Raises `ValueError` for a rule that loses information."""
    template, groups = "", {}
    for escaped, plain, group, unknown in _TOKEN.findall(rule.source):
        if group:
            groups[str(len(groups) + 1)] = group
            template += f"{{g{len(groups)}}}"
        elif unknown:
            raise ValueError(f"rule {rule.source!r} cannot be read backwards: {unknown!r} is no literal and no group")
        else:
            template += escaped or plain
    path, row = _split_row(rule.targets[part])
    pattern, seen = "", {row[1:]} if row and row.startswith("\\") else set()
    for position, text in enumerate(re.split(r"\\(\d+)", path)):
        if position % 2 == 0:
            pattern += re.escape(text)
        else:
            pattern += f"(?P=g{text})" if f"(?P<g{text}>" in pattern else f"(?P<g{text}>{groups[text]})"
            seen.add(text)
    if lost := set(groups) - seen:
        raise ValueError(f"rule {rule.source!r} cannot be read backwards: its target lacks the groups {sorted(lost)}")
    return _Reader(rule, part, re.compile(pattern), row, template)
