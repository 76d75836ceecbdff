"""Reads pickles as data: an interpreter of the opcodes that can build containers, and nothing else.

Python's pickle is a program that may call anything. Here a global never becomes an object: it is looked up by name in
the caller's table of constructors (functions of ours that check their arguments), and a name that is not there is
refused, by name, before anything happens. `pickletools` decodes the opcodes; the standard unpickler is not used.

What a hostile file could cost is bounded: bytes, opcodes, the size of integers, and the kinds of dictionary keys (so
that neither a tuple nested through the memo nor colliding integers can stall a dictionary).
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

MAX_BYTES = 256 << 20
MAX_OPCODES = 4_000_000
MAX_INTEGER_BITS = 512
# Larger integers can be chosen to have equal hashes (Python's hash of an integer is its remainder by 2**61 - 1).
_MAX_KEY = 2**61 - 2
_SIZED = str | bytes | bytearray | list | tuple


class RefusedPickle(ValueError):
    """A pickle that is damaged, too large, or that asks for more than containers and the allowed constructors."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name of an allowed global and the function of ours that stands for it."""

    name: str
    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Inert:
    """What is left of an object of a type that the user asked to skip: its type's name."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Blank:
    """A class whose objects are only their attributes."""

    name: str


class Attributes(dict):
    """An object of such a class: its attributes by name."""

    def set_state(self, state: Any) -> None:
        if type(state) is not dict:
            raise RefusedPickle(f"it sets attributes of an object to a {type(state).__name__}")
        self.update(state)


class _Mark:
    """Where an opcode's items start on the stack."""


def read_pickle(
    stream: BinaryIO,
    constructors: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
    inert: Collection[str] = (),
    blank: str | None = None,
) -> Any:
    """The object of the pickle at the stream's position, which is left behind the pickle's end.

    `constructors` maps "module.name" to what builds its objects; an object with a method `set_state` may be given a
    state. `persistent` turns a persistent id into an object. Globals named in `inert` become `Inert` placeholders:
    neither their code nor their data is looked at. Globals whose names begin with `blank` are classes of which only the
    objects' attributes are read. Raises `RefusedPickle`.
    """
    machine = _Machine(constructors, persistent, inert, blank)
    bounded = _Bounded(stream)
    try:
        for _ in range(MAX_OPCODES):
            name = machine.step(bounded)
            if name == "STOP":
                return machine.result()
    except RefusedPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise RefusedPickle(f"it is damaged or truncated ({type(error).__name__}: {error})") from error
    raise RefusedPickle(f"it has more than {MAX_OPCODES} opcodes")


class _Bounded:
    """The part of a file's interface that decoding needs, with an end to how much is read."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._left = stream, MAX_BYTES

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise RefusedPickle(f"it is longer than {MAX_BYTES >> 20} MiB")
        self._left -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(min(self._left, 1000))
        if not line.endswith(b"\n"):
            raise RefusedPickle("a name in it is too long or cut off")
        self._left -= len(line)
        return line


def _two_lines(stream: _Bounded) -> tuple[str, str]:
    """A module and a name in it, as GLOBAL and INST write them."""
    return stream.readline()[:-1].decode(), stream.readline()[:-1].decode()


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, constructors, persistent, inert, blank):
        self._constructors, self._persistent, self._inert, self._blank = constructors, persistent, inert, blank
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def step(self, stream: _Bounded) -> str:
        """Runs the next opcode and returns its name; the argument of an opcode that is not allowed is not decoded."""
        opcode = pickletools.code2op.get(stream.read(1).decode("latin1"))
        name = opcode.name if opcode else "that does not exist, or its end,"
        if name not in _ALLOWED:
            what = f" of {'.'.join(_two_lines(stream))}" if name == "INST" else ""
            raise RefusedPickle(f"it uses the opcode {name}{what}, which no plain checkpoint needs")
        if name == "GLOBAL":
            # The reader of pickletools takes backslashes in names for escapes, which the unpickler does not.
            self._allow(*_two_lines(stream))
            return name
        argument = opcode.arg.reader(stream) if opcode.arg else None
        if name in _LITERALS:
            self._push_literal(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        else:
            _HANDLERS[name](self, argument)
        return name

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise RefusedPickle(f"it is damaged: it ends with {len(self._stack)} objects on its stack")
        return self._stack[0]

    def _push_literal(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise RefusedPickle(f"it holds an integer of {value.bit_length()} bits")
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _Mark:
            raise RefusedPickle("it is damaged: it takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_to_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _Mark:
                items = self._stack[position + 1 :]
                del self._stack[position:]
                return items
        raise RefusedPickle("it is damaged: it asks for a mark that was never set")

    def _allow(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedPickle("it names a global by something that is not text")
        full = f"{module}.{name}"
        if full in self._constructors:
            self._stack.append(Global(full, self._constructors[full]))
        elif full in self._inert:
            self._stack.append(Inert(full))
        elif self._blank is not None and full.startswith(self._blank):
            self._stack.append(_Blank(full))
        else:
            raise RefusedPickle(f"it asks for {full}, which is not on the list of harmless names")

    # Handlers of opcodes: each takes the opcode's argument.

    def stack_global(self, _) -> None:
        name, module = self._pop(), self._pop()
        self._allow(module, name)

    def reduce(self, _) -> None:
        arguments, function = self._pop(), self._pop()
        if isinstance(function, Inert):
            self._stack.append(function)
        elif isinstance(function, Global) and isinstance(arguments, tuple):
            # What a constructor copies may be recalled from the memo again and again.
            self._copied += sum(
                len(value) for value in arguments if isinstance(value, str | bytes | bytearray | list | tuple)
            )
            if self._copied > MAX_BYTES:
                raise RefusedPickle(f"what it builds is larger than {MAX_BYTES >> 20} MiB")
            self._stack.append(function.function(*arguments))
        else:
            raise RefusedPickle(f"it calls a {type(function).__name__}, which is not a function")

    def new_object(self, _) -> None:
        self._pop()
        made = self._pop()
        if isinstance(made, _Blank):
            made = Attributes()
        elif not isinstance(made, Inert):
            raise RefusedPickle(
                f"it makes an object of {getattr(made, 'name', type(made).__name__)} without its constructor"
            )
        self._stack.append(made)

    def build(self, _) -> None:
        state, target = self._pop(), self._top()
        if hasattr(target, "set_state"):
            target.set_state(state)
        # The state of an OrderedDict is torch's _metadata (versions of modules), which no tensor depends on.
        elif not isinstance(target, dict | Inert):
            raise RefusedPickle(f"it sets the state of a {type(target).__name__}")

    def persistent_id(self, _) -> None:
        if self._persistent is None:
            raise RefusedPickle("it refers to data outside itself")
        self._stack.append(self._persistent(self._pop()))

    def put(self, argument: int) -> None:
        self._memo[argument] = self._top()

    def memoize(self, _) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, argument: int) -> None:
        if argument not in self._memo:
            raise RefusedPickle(f"it is damaged: it recalls object {argument}, which was never stored")
        self._stack.append(self._memo[argument])

    def tuple_of(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise RefusedPickle(f"it appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            return
        if type(target) is not dict or len(items) % 2:
            raise RefusedPickle(f"it sets {len(items)} keys and values of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (isinstance(key, str | Inert) or (isinstance(key, int) and abs(key) <= _MAX_KEY)):
                raise RefusedPickle(f"it has a dictionary key of type {type(key).__name__}; text and numbers are read")
            target[key] = value

    def dict_of(self, items: list[Any]) -> None:
        self._stack.append({})
        self.set_items(items)

    def set_item(self, _) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _Mark,
}
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    "POP": lambda machine, _: machine._stack.pop(),
    "POP_MARK": lambda machine, _: machine._pop_to_mark(),
    "DUP": lambda machine, _: machine._stack.append(machine._top()),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine._stack.append(machine._pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine._pop()]),
    "APPENDS": lambda machine, _: machine.append(machine._pop_to_mark()),
    "DICT": lambda machine, _: machine.dict_of(machine._pop_to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine._pop_to_mark()),
}
_ALLOWED = {"GLOBAL", *_LITERALS, *_CONSTANTS, *_HANDLERS}
