"""A pickle interpreter that runs no foreign code: it builds plain values and admitted objects.

Pure. Python's own unpickler calls whatever function a stream names. It reserves memory for whatever
length a stream claims, and when it hashes nested tuples, it recurses in C to any depth. This
interpreter supports only the opcodes that occur in DCP's metadata and in what `torch.save` writes,
and refuses all others. It imports nothing: it looks up each name of the stream in a table that the
caller passes.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.strict_json import shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that a stream may refer to by name."""

    value: object


@dataclass(frozen=True, slots=True)
class Function:
    """A function of this package that a stream may call, with any arguments."""

    call: Callable[..., Any]
    """Raises `TypeError` or `ValueError` to refuse its arguments."""
    returns: Class | None = None
    """The class of its results, if the stream may set the state of a result."""


@dataclass(frozen=True, slots=True)
class Class:
    """A class that a stream may create objects of."""

    kind: type
    """The class to create; its constructor is not called."""
    build: Callable[[Any, Any], object]
    """Sets the state of an object, once; raises `TypeError` or `ValueError` to refuse it.

    Returns the values of fields that it does not know, or `None` if it knows all of them.
    """
    is_key: bool = False
    """Whether objects may be dict keys; if so, they must hash fast, whatever their state."""
    has_state: bool = True
    """Whether the stream must set a state on every object."""


Admitted = Constant | Function | Class


class _RefusedError(Exception):
    """The stream is refused; the text says what is wrong with it."""


def unpickle(
    data: bytes,
    admitted: Mapping[tuple[str, str], Admitted],
    *,
    path: str,
    persistent: Callable[[Any], Any] | None = None,
    unknown: list[Any] | None = None,
    keys: frozenset[type] = frozenset({str, int}),
) -> Any:
    """Build the value that a pickle describes, without running foreign code.

    Args:
        data: The stream. Its length bounds memory and time.
        admitted: The globals that the stream may use, by module and name.
        path: The file, for error messages.
        persistent: Resolves persistent ids; `None` refuses them.
        unknown: Receives what the `build` functions return, except `None`.
        keys: Types of dict keys to allow, besides the admitted classes that may be keys. Objects of
            these types must hash fast.

    Returns:
        The value: `None`, bool, int, float, str, bytes, list, tuple, dict, an object of an admitted
        class, or the result of an admitted function. Check the whole value, and do not walk it by
        recursion: a list or dict in an object's state may have changed after `build` saw it, and
        values may be nested as deeply as the stream is long.

    Raises:
        CorruptCheckpointError: If the stream is truncated, or contains anything that is not
            admitted; the error names it.
    """
    try:
        machine = _Machine(data, admitted, persistent, keys)
        found = machine.run()
    except _RefusedError as error:
        problem: object = error
    except (LookupError, struct.error, UnicodeDecodeError):
        problem = "a truncated stream, or data that is not a pickle"
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"values that do not fit: {str(error)[:200]}"
    else:
        if unknown is not None:
            unknown.extend(machine.unknown)
        return found
    raise CorruptCheckpointError(
        "a pickle contains something that is not allowed",
        phase="read",
        path=path,
        found=problem,
        hint="nothing in it was run; load it by other means only if you trust who wrote it",
    )


_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_MEMOIZE, _LONG_BINGET, _BINGET = (_CODES[n] for n in ("MEMOIZE", "LONG_BINGET", "BINGET"))
_BININT1, _MARK, _STOP = (_CODES[n] for n in ("BININT1", "MARK", "STOP"))
_EMPTY_TUPLE, _EMPTY_DICT = (_CODES[n] for n in ("EMPTY_TUPLE", "EMPTY_DICT"))
_TUPLE1, _TUPLE2 = (_CODES[n] for n in ("TUPLE1", "TUPLE2"))
_NEWOBJ, _BUILD, _REDUCE = (_CODES[n] for n in ("NEWOBJ", "BUILD", "REDUCE"))
_SETITEMS, _BININT2 = (_CODES[n] for n in ("SETITEMS", "BININT2"))

# Limit of one integer, in bytes; no size, offset or state of a random generator needs more.
_MAX_INT_NBYTES = 32


class _Machine:
    """The machine of one stream: a stack, the stacks below open marks, and a memo, as in pickle."""

    def __init__(
        self,
        data: bytes,
        admitted: Mapping[tuple[str, str], Admitted],
        persistent: Callable[[Any], Any] | None,
        keys: frozenset[type],
    ) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.unbuilt: dict[int, Any] = {}
        self.unknown: list[Any] = []
        self._admitted = admitted
        self._persistent = persistent
        results = (one.returns for one in admitted.values() if isinstance(one, Function))
        kinds = (one for one in (*admitted.values(), *results) if isinstance(one, Class))
        self._class_of = {one.kind: one for one in kinds}
        self._key_kinds = keys | {k for k, one in self._class_of.items() if one.is_key}

    def run(self) -> Any:  # noqa: C901, PLR0912, PLR0915 - see below
        """Interpret the stream up to its end."""
        data, memo, stack, at = self.data, self.memo, self.stack, 0
        # A call per opcode would double the time, and the metadata of a large job has 10^8 opcodes.
        # So the frequent opcodes are inlined here, the most frequent first.
        while True:
            code = data[at]
            at += 1
            if code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            elif code == _MARK:
                self.marks.append(stack)
                self.stack = stack = []
            elif code == _EMPTY_TUPLE:
                stack.append(())
            elif code == _NEWOBJ:
                _make(self)
            elif code == _BUILD:
                state = stack.pop()
                self.build(stack[-1], state)
            elif code == _SETITEMS:
                values = stack
                self.stack = stack = self.marks.pop()
                self.set_items(values)
            elif code == _EMPTY_DICT:
                stack.append({})
            elif code == _TUPLE2:
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif code == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif code == _REDUCE:
                _call(self)
            elif code == _BININT2:
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
            elif code == _STOP:
                break
            else:
                handler = _HANDLERS.get(code)
                if handler is None:
                    raise _RefusedError(f"opcode {code:#04x} at byte {at - 1}")
                self.at = at
                handler(self)
                stack, at = self.stack, self.at
        if len(stack) != 1 or self.marks:
            raise _RefusedError("a stream that ends too early")
        if self.unbuilt:
            kind = type(next(iter(self.unbuilt.values())))
            raise _RefusedError(f"a {kind.__name__} without a state")
        return stack[0]

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes of the stream."""
        stop = self.at + count
        if stop > len(self.data):
            raise _RefusedError("a length beyond the end of the stream")
        found = self.data[self.at : stop]
        self.at = stop
        return found

    def skip(self, count: int) -> None:
        """Skip bytes without meaning here: protocol and framing."""
        self.at += count

    def number(self, nbytes: int) -> int:
        """Return the next `nbytes` bytes as an unsigned integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> str:
        """Return the next line of text."""
        stop = self.data.index(b"\n", self.at)
        text = self.data[self.at : stop].decode()
        self.at = stop + 1
        return text

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack, and the mark itself."""
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def top(self, kind: type) -> Any:
        """Return the top of the stack, which must be of type `kind`."""
        found = self.stack[-1]
        if type(found) is not kind:
            raise _RefusedError(f"a {type(found).__name__} where a {kind.__name__} belongs")
        return found

    def look_up(self, module: object, name: object) -> Any:
        """Return the admitted entry for a global that the stream names."""
        if type(module) is not str or type(name) is not str:
            raise _RefusedError("a global whose name is not text")
        found = self._admitted.get((module, name))
        if found is None:
            raise _RefusedError(f"the global {shortened(f'{module}.{name}')}")
        return found.value if isinstance(found, Constant) else found

    def build(self, target: Any, state: Any) -> None:
        """Set the state of an object."""
        made = self._class_of.get(type(target))
        if made is None:
            raise _RefusedError(f"a state for a {type(target).__name__}")
        unknown = made.build(target, state)
        if unknown is not None:
            self.unknown.append(unknown)
        self.unbuilt.pop(id(target), None)

    def set_items(self, values: list[Any]) -> None:
        """Set entries of the dict on top of the stack; `values` alternates keys and values."""
        target, keys = self.top(dict), values[::2]
        # Hashing nested tuples could take forever, or overflow the C stack.
        if not self._key_kinds.issuperset(map(type, keys)) or len(values) % 2:
            raise _RefusedError("a dict key that is not allowed, or one without a value")
        target.update(zip(keys, values[1::2], strict=True))

    def resolve(self, value: object) -> Any:
        """Return the value that a persistent id stands for."""
        if self._persistent is None:
            raise _RefusedError("a persistent id")
        return self._persistent(value)


def _call(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Function) or type(arguments) is not tuple:
        raise _RefusedError(f"a call of a {type(function).__name__}")
    machine.stack.append(function.call(*arguments))


def _make(machine: _Machine) -> None:
    arguments, made = machine.stack.pop(), machine.stack.pop()
    if not isinstance(made, Class) or type(arguments) is not tuple or arguments:
        raise _RefusedError(f"an object made from a {type(made).__name__}")
    found: Any = object.__new__(made.kind)
    if made.has_state:
        machine.unbuilt[id(found)] = found
    machine.stack.append(found)


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.top(list).append(value)


def _extend(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.top(list).extend(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _tuple3(machine: _Machine) -> None:
    third, second, first = (machine.stack.pop() for _ in range(3))
    machine.stack.append((first, second, third))


def _long(machine: _Machine) -> int:
    nbytes = machine.number(1)
    if nbytes > _MAX_INT_NBYTES:
        raise _RefusedError(f"an integer of {nbytes} bytes")
    return int.from_bytes(machine.take(nbytes), "little", signed=True)


def _global(machine: _Machine) -> Any:
    module = machine.line()
    return machine.look_up(module, machine.line())


def _stack_global(machine: _Machine) -> Any:
    name, module = machine.stack.pop(), machine.stack.pop()
    return machine.look_up(module, name)


def _put(machine: _Machine, nbytes: int) -> None:
    machine.memo[machine.number(nbytes)] = machine.stack[-1]


def _pushing(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        found = value(machine)
        machine.stack.append(found)

    return push


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    _CODES["PROTO"]: lambda m: m.skip(1),
    _CODES["FRAME"]: lambda m: m.skip(8),
    _CODES["NONE"]: _pushing(lambda _: None),
    _CODES["NEWTRUE"]: _pushing(lambda _: True),
    _CODES["NEWFALSE"]: _pushing(lambda _: False),
    _CODES["BININT"]: _pushing(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    _CODES["LONG1"]: _pushing(_long),
    _CODES["BINFLOAT"]: _pushing(lambda m: struct.unpack(">d", m.take(8))[0]),
    _CODES["SHORT_BINUNICODE"]: _pushing(lambda m: m.take(m.number(1)).decode()),
    _CODES["BINUNICODE"]: _pushing(lambda m: m.take(m.number(4)).decode()),
    _CODES["SHORT_BINBYTES"]: _pushing(lambda m: m.take(m.number(1))),
    _CODES["BINBYTES"]: _pushing(lambda m: m.take(m.number(4))),
    _CODES["EMPTY_LIST"]: _pushing(lambda _: []),
    _CODES["TUPLE"]: _pushing(lambda m: tuple(m.since_mark())),
    _CODES["TUPLE3"]: _tuple3,
    _CODES["APPEND"]: _append,
    _CODES["APPENDS"]: _extend,
    _CODES["SETITEM"]: _set_item,
    _CODES["GLOBAL"]: _pushing(_global),
    _CODES["STACK_GLOBAL"]: _pushing(_stack_global),
    _CODES["BINPERSID"]: _pushing(lambda m: m.resolve(m.stack.pop())),
    _CODES["BINPUT"]: lambda m: _put(m, 1),
    _CODES["LONG_BINPUT"]: lambda m: _put(m, 4),
}
