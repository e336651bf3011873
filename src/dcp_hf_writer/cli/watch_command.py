"""`watch`: saves in flight, with phase, bytes, rate, time left and late ranks, until they end."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.plain_text import age, count, duration, printable, rate, size
from dcp_hf_writer.cli.run_command import line, print_json_line, row, screen, table
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.saves_in_flight import saves_in_flight
from dcp_hf_writer.manager.watch_saves import SaveWatch
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.save.progress_heartbeat import STORE_PACE
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url
from dcp_hf_writer.storage.wrong_paths import is_checkpoint

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from typing_extensions import Self

    from dcp_hf_writer.manager.watch_saves import EndedSave, Look, WatchedRank, WatchedSave

_SHOWN = 16
"""Ranks of one save that a terminal shows, the late ones first; `--json` has all."""

Update = dict[str, Any]


def watch(path: str, *, is_following: bool, every_s: float, late_s: float, as_json: bool) -> int:
    """Print updates until no save is in flight; return the exit code.

    Args:
        path: Directory or URL of a run, or the path of one checkpoint that is being made.
        is_following: Go on when no save is in flight.
        every_s: Seconds between two updates; at least five for a URL.
        late_s: Seconds without news or progress after which a rank is late.
        as_json: Print each update as one line of JSON.

    Raises:
        ConfigError: If there is no such directory.
        ReadError: If the directory cannot be listed.
    """
    root, target = _place_of(path)
    if is_url(root):
        # Ranks tell no more often there, and each look is several requests.
        every_s, late_s = max(every_s, STORE_PACE.every_s), late_s + STORE_PACE.every_s
    saves = SaveWatch(root, target=target, late_s=late_s)
    is_ok, has_seen = True, False
    with _view(as_json=as_json) as view:
        while True:
            look = saves.look()
            view.show(_update(root, look))
            is_ok = is_ok and all(one.outcome == "published" for one in look.ended)
            has_seen = has_seen or bool(look.saves or look.ended)
            if not look.saves and not is_following:
                break
            time.sleep(every_s)
        if not has_seen:
            view.say(f"no save is in flight in {target or root}; --follow waits for one")
    return exit_codes.OK if is_ok else exit_codes.PROBLEM


def _place_of(path: str) -> tuple[str, str | None]:
    """Return the directory to look into, and the checkpoint if `path` names one."""
    if is_url(plain_path(path)):
        return path.rstrip("/"), None
    local = check_options.local_path(path)
    root = os.path.dirname(local)
    if os.path.isdir(root) and (
        is_checkpoint(local) or any(save.target == local for save in saves_in_flight(root))
    ):
        return root, local
    if os.path.isdir(local):
        return local, None
    raise ConfigError(
        "there is no directory of a run here, and no save to this path is in flight",
        path=local,
        expected="a directory that holds checkpoints, or the path of a checkpoint being made",
        found="a file" if os.path.exists(local) else "nothing",
    )


def _update(root: str, look: Look) -> Update:
    return {
        "command": "watch",
        "version": 1,
        "root": root,
        "time": round(time.time(), 3),
        "saves": [_save(one) for one in look.saves],
        "ended": [_ended(one) for one in look.ended],
    }


def _save(one: WatchedSave) -> dict[str, Any]:
    return {
        "save_id": one.save.save_id,
        "path": one.save.target,
        "state": one.save.state,
        "phase": one.phase,
        "done_nbytes": one.done_nbytes,
        "planned_nbytes": one.planned_nbytes,
        "nbytes_per_s": _rounded(one.nbytes_per_s),
        "left_s": _rounded(one.left_s),
        "seconds": _rounded(one.seconds),
        "world_size": one.world_size,
        "ranks": [_rank(rank) for rank in one.ranks],
        "missing": list(one.missing),
    }


def _rank(one: WatchedRank) -> dict[str, Any]:
    told = asdict(one.heartbeat)
    names = ("rank", "host", "pid", "phase", "done_nbytes", "planned_nbytes")
    times = {"silent_s": _rounded(one.silent_s), "idle_s": _rounded(one.idle_s)}
    return {**{name: told[name] for name in names}, **times, "late": one.late}


def _ended(one: EndedSave) -> dict[str, Any]:
    published, owner = one.published, one.save.owner
    return {
        "save_id": one.save.save_id,
        "path": one.save.target,
        "outcome": one.outcome,
        "nbytes": None if published is None else published.nbytes,
        "seconds": None if published is None else _rounded(published.seconds),
        "has_export": published is not None and published.has_export,
        "host": None if owner is None else owner.host,
        "pid": None if owner is None else owner.pid,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _view(*, as_json: bool) -> _Json | _Lines | _Screen:
    if as_json:
        return _Json()
    console = screen()
    return _Screen(console) if console.is_terminal else _Lines(console)


class _Json:
    """Prints each update as one line of JSON."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def show(self, update: Update) -> None:
        print_json_line(update)

    def say(self, _: str) -> None:
        """An update without saves has said it."""


class _Lines:
    """Prints a line for each save that has news, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._latest: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def show(self, update: Update) -> None:
        for one in update["saves"]:
            texts = [_summary(one), *_late_texts(one)]
            text = "\n".join(texts)
            if text != self._latest.get(one["save_id"]):
                self._latest[one["save_id"]] = text
                line(self._console, text)
        for one in update["ended"]:
            self.say(_end_text(one))
        self._console.file.flush()

    def say(self, text: str) -> None:
        line(self._console, text)
        self._console.file.flush()


class _Screen:
    """Shows a table that changes in place, and a line that stays for each save that ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, update: Update) -> None:
        for one in update["ended"]:
            line(self._console, _end_text(one), _STYLES[one["outcome"]])
        parts: list[RenderableType] = []
        for one in update["saves"]:
            parts += [Text(printable(_summary(one)), style="bold"), _table_of(one)]
            hidden = len(one["ranks"]) - _SHOWN
            if hidden > 0:
                parts.append(Text(f"... and {count(hidden, 'more rank')}; --json has all"))
            if one["missing"]:
                parts.append(Text(_missing_text(one), style="yellow"))
        if not parts:
            parts.append(Text("no save is in flight", style="dim"))
        self._live.update(Group(*parts), refresh=True)

    def say(self, text: str) -> None:
        line(self._console, text)


_STYLES = {"published": "green", "failed": "red", "dead": "red"}


def _summary(one: dict[str, Any]) -> str:
    done, planned = one["done_nbytes"], one["planned_nbytes"]
    parts = [os.path.basename(one["path"]), one["phase"]]
    if planned:
        parts.append(f"{size(done)} of {size(planned)} ({_percent(one)})")
    if one["nbytes_per_s"]:
        parts.append(rate(one["nbytes_per_s"], 1.0))
    if one["left_s"] is not None and one["phase"].startswith(("write", "slot")):
        parts.append(f"{age(one['left_s'])} left")
    if one["world_size"] is not None:
        parts.append(count(one["world_size"], "rank"))
    return "  ".join(parts)


def _percent(one: dict[str, Any]) -> str:
    done, planned = one["done_nbytes"], one["planned_nbytes"]
    return f"{100 * done / planned:.0f} %" if planned else "-"


def _late_texts(one: dict[str, Any]) -> list[str]:
    late = [rank for rank in one["ranks"] if rank["late"] is not None]
    texts = [f"  rank {rank['rank']} on {rank['host']}: {rank['late']}" for rank in late[:_SHOWN]]
    if len(late) > _SHOWN:
        texts.append(f"  ... and {count(len(late) - _SHOWN, 'more late rank')}; --json has all")
    return [*texts, *([f"  {_missing_text(one)}"] if one["missing"] else [])]


def _missing_text(one: dict[str, Any]) -> str:
    names = ", ".join(map(str, one["missing"][:_SHOWN]))
    more = "" if len(one["missing"]) <= _SHOWN else ", ..."
    return f"{count(len(one['missing']), 'rank')} without news yet: {names}{more}"


def _table_of(one: dict[str, Any]) -> RenderableType:
    made = table(*_COLUMNS, numbers=("rank", "done", "of", "%"))
    ordered = sorted(one["ranks"], key=lambda rank: (rank["late"] is None, rank["rank"]))
    for rank in ordered[:_SHOWN]:
        row(
            made,
            rank["rank"],
            rank["host"],
            rank["phase"],
            size(rank["done_nbytes"]),
            size(rank["planned_nbytes"]),
            _percent(rank),
            rank["late"] or "",
            style="" if rank["late"] is None else "red",
        )
    return made


_COLUMNS = ("rank", "host", "phase", "done", "of", "%", "late")


def _end_text(one: dict[str, Any]) -> str:
    name = os.path.basename(one["path"])
    if one["outcome"] == "dead":
        where = "" if one["pid"] is None else f" (process {one['pid']} on {one['host']})"
        return f"dead {name}: nobody works on it any more{where}; the next save removes it"
    if one["outcome"] == "failed":
        return f"failed {name}: the save ended without a checkpoint"
    halves = "" if one["has_export"] else ", without a HuggingFace half"
    if one["seconds"] is None:
        return f"published {one['path']}: {size(one['nbytes'])}{halves}"
    speed = rate(one["nbytes"], one["seconds"])
    took = duration(one["seconds"])
    return f"published {one['path']}: {size(one['nbytes'])} in {took} ({speed}){halves}"
