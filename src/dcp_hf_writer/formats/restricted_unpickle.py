"""A pickle interpreter that runs nothing: it builds plain values, and what the caller admits.

Pure. Python's own unpickler calls whatever a stream names, reserves memory for whatever length a
stream claims, and follows tuples of any depth in C when it hashes them. This one knows the opcodes
that DCP's metadata and `torch.save` of a tensor consist of; everything else is refused. Nothing is
imported: a name in the stream is looked up in a table.
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
    """A value that a stream may name."""

    value: object


@dataclass(frozen=True, slots=True)
class Function:
    """A function of ours that a stream may call, with whatever arguments it likes."""

    call: Callable[..., Any]
    """Refuses arguments by `TypeError` or `ValueError`."""


@dataclass(frozen=True, slots=True)
class Class:
    """A class whose objects a stream may make."""

    kind: type
    """The class of what is made; its constructor is not called."""
    build: Callable[[Any, Any], object]
    """Gives an object its state, once; refuses a state by `TypeError` or `ValueError`.

    Returns the values of fields that it does not know, or `None` if it knows all of them.
    """
    is_key: bool = False
    """Whether it may be a key of a dict; it must hash fast then, whatever its state."""
    has_state: bool = True
    """Whether every object must be given a state."""


Admitted = Constant | Function | Class


class _RefusedError(Exception):
    """What is wrong with a stream."""


def unpickle(
    data: bytes,
    admitted: Mapping[tuple[str, str], Admitted],
    *,
    path: str,
    persistent: Callable[[Any], Any] | None = None,
    unknown: list[Any] | None = None,
) -> Any:
    """Interpret a pickle.

    Args:
        data: The stream; memory and time are bounded by its length.
        admitted: What it may name, by module and name.
        path: Where it comes from, for errors.
        persistent: Resolves persistent ids; `None` refuses them.
        unknown: Receives what the `build` functions return, except `None`.

    Returns:
        What the stream describes: `None`, bool, int, float, str, bytes, list, tuple, dict, objects
        of admitted classes, and what admitted functions return. A list or dict in an object's state
        may have changed after `build` saw it, and values may be nested as deep as the stream is
        long: so look at all of it, and do not walk it by recursion.

    Raises:
        CorruptCheckpointError: If it does not end, or says anything that is not admitted; the
            error names what.
    """
    try:
        machine = _Machine(data, admitted, persistent)
        found = machine.run()
    except _RefusedError as error:
        problem: object = error
    except (LookupError, struct.error, UnicodeDecodeError):
        problem = "a stream that is cut off, or none"
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"values that do not fit: {str(error)[:200]}"
    else:
        if unknown is not None:
            unknown.extend(machine.unknown)
        return found
    raise CorruptCheckpointError(
        "a pickle says what it may not say",
        phase="read",
        path=path,
        found=problem,
        hint="nothing of it was run; only who trusts its writer should load it by other means",
    )


_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_MEMOIZE, _LONG_BINGET, _BINGET = (_CODES[n] for n in ("MEMOIZE", "LONG_BINGET", "BINGET"))
_BININT1, _MARK, _STOP = (_CODES[n] for n in ("BININT1", "MARK", "STOP"))
_EMPTY_TUPLE, _EMPTY_DICT = (_CODES[n] for n in ("EMPTY_TUPLE", "EMPTY_DICT"))
_TUPLE1, _TUPLE2 = (_CODES[n] for n in ("TUPLE1", "TUPLE2"))
_NEWOBJ, _BUILD, _REDUCE = (_CODES[n] for n in ("NEWOBJ", "BUILD", "REDUCE"))
_SETITEMS, _BININT2 = (_CODES[n] for n in ("SETITEMS", "BININT2"))

# No size or offset of a checkpoint needs more.
_MAX_INT_NBYTES = 16


class _Machine:
    """A stack, the stacks below open marks, and a memo, as pickle has them; one a stream."""

    def __init__(
        self,
        data: bytes,
        admitted: Mapping[tuple[str, str], Admitted],
        persistent: Callable[[Any], Any] | None,
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
        kinds = (one for one in admitted.values() if isinstance(one, Class))
        self._class_of = {one.kind: one for one in kinds}
        self._key_kinds = {str, int} | {k for k, one in self._class_of.items() if one.is_key}

    def run(self) -> Any:  # noqa: C901, PLR0912, PLR0915 - see below
        """Interpret up to the end of the stream."""
        data, memo, stack, at = self.data, self.memo, self.stack, 0
        # A call per opcode would double the time, and the metadata of a large job has 10^8 of them:
        # the frequent ones stand here, in order of how often they come.
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
            raise _RefusedError("a stream that ends in the middle")
        if self.unbuilt:
            kind = type(next(iter(self.unbuilt.values())))
            raise _RefusedError(f"a {kind.__name__} without a state")
        return stack[0]

    def take(self, count: int) -> bytes:
        """Return the next bytes of the stream."""
        stop = self.at + count
        if stop > len(self.data):
            raise _RefusedError("a length beyond the end of the stream")
        found = self.data[self.at : stop]
        self.at = stop
        return found

    def skip(self, count: int) -> None:
        """Pass over bytes that say nothing: protocol and framing."""
        self.at += count

    def number(self, nbytes: int) -> int:
        """Return the next bytes as an unsigned integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> str:
        """Return the next line of text."""
        stop = self.data.index(b"\n", self.at)
        text = self.data[self.at : stop].decode()
        self.at = stop + 1
        return text

    def since_mark(self) -> list[Any]:
        """Take what stands above the last mark, and the mark."""
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def top(self, kind: type) -> Any:
        """Return what stands on top, which must be of a kind."""
        found = self.stack[-1]
        if type(found) is not kind:
            raise _RefusedError(f"a {type(found).__name__} where a {kind.__name__} belongs")
        return found

    def look_up(self, module: object, name: object) -> Any:
        """Return what a stream names."""
        if type(module) is not str or type(name) is not str:
            raise _RefusedError("a global whose name is no text")
        found = self._admitted.get((module, name))
        if found is None:
            raise _RefusedError(f"the global {shortened(f'{module}.{name}')}")
        return found.value if isinstance(found, Constant) else found

    def build(self, target: Any, state: Any) -> None:
        """Give an object its state."""
        made = self._class_of.get(type(target))
        if made is None:
            raise _RefusedError(f"a state for a {type(target).__name__}")
        unknown = made.build(target, state)
        if unknown is not None:
            self.unknown.append(unknown)
        self.unbuilt.pop(id(target), None)

    def set_items(self, values: list[Any]) -> None:
        """Set entries of the dict on top; `values` are keys and values in turn."""
        target, keys = self.top(dict), values[::2]
        # A tuple of tuples could take for ever to hash, or overflow C's stack.
        if not self._key_kinds.issuperset(map(type, keys)) or len(values) % 2:
            raise _RefusedError("a key that is none")
        target.update(zip(keys, values[1::2], strict=True))

    def resolve(self, value: object) -> Any:
        """Return what a persistent id stands for."""
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
        raise _RefusedError(f"an object of a {type(made).__name__}")
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
