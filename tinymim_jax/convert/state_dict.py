"""Finds the state dict of a model in what a training program has saved.

Weights lie under keys such as 'model' or 'teacher', beside a moving average or a second network, and wrappers put
prefixes such as 'module.' or 'backbone.' before their names.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.readers.pickle_values import Opaque

_MAX_NESTING = 4
_MAX_LISTED = 8
_MAX_NETWORKS = 64

# Roles that a network has by a word in its key or prefix. Without --use the first of these in the file is taken: a
# network without a role, then the others in this order. (DINO publishes its teacher.)
_ROLES = {
    "teacher": {"teacher"},
    "student": {"student"},
    "ema": {"ema", "swa", "averaged", "average", "shadow"},
    "momentum": {"momentum", "target"},
}

# Heads of transformers' classifiers and of DINOv2's hub, beside an encoder that has a prefix.
_HEADS_BESIDE = ("classifier", "linear_head")

_CHUNKED = re.compile(r"^blocks\.(?P<chunk>\d+)\.(?P<block>\d+)\.")

# Without a model to be found, these are taken off so that the names in the error are as short as they can be.
_NESTS = ("model", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")


@dataclasses.dataclass(frozen=True)
class Found:
    """A state dict and where it was.

    state: values by name, without the prefix.
    place: where it was in the file, such as "'teacher', names without 'backbone.'"; '' for the usual places.
    left_out: one phrase for each thing in the file that was not taken.
    beside: tensors of a classifier's head that lie outside the prefix, as in files of transformers; they are not in
      `state`, nor in `left_out`.
    """

    state: dict[str, Any]
    place: str
    left_out: list[str]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


def find_state_dict(data: Any, anchor: str, *, use: str | None = None, prefix: str | None = None) -> Found:
    """The state dict in `data` that holds a tensor of the name `anchor`, behind any prefix.

    Args:
      data: what a file holds: arrays by name, or nested dicts with that somewhere in them.
      anchor: a name that every model of the family has once.
      use: which of several networks to take: 'ema', 'teacher', 'student', 'momentum', or a key or part of the prefix.
      prefix: take the names that begin with this, and no others.

    Raises:
      ConvertError: the file holds no state dict; several networks, none of which is the obvious one; or not what
        `use` and `prefix` ask for. The choices are listed.
    """
    networks = [
        _Network(keys, state, name.removesuffix(anchor))
        for keys, state in _dicts(data)
        for name in state
        if isinstance(name, str) and (name == anchor or name.endswith(f".{anchor}"))
    ]
    if networks:
        taken = _choose(networks, use, prefix)
        return _found(taken, [network for network in networks if network is not taken], data)
    if use or prefix:
        raise ConvertError(
            f"no network with a tensor {anchor!r} was found in it, so --use and --prefix have nothing to choose from"
        )
    return Found(_outermost(data), "", [])


@dataclasses.dataclass(frozen=True, eq=False)
class _Network:
    """A prefix in a dict of tensors that lies under these keys of the file."""

    keys: tuple[str, ...]
    tensors: Mapping[Any, Any]
    prefix: str

    @property
    def role(self) -> str:
        words = set(re.split(r"[^a-z]+", ".".join((*self.keys, self.prefix)).lower()))
        return next((role for role, signs in _ROLES.items() if words & signs), "")

    def answers_to(self, use: str) -> bool:
        return use in (self.role, *self.keys, *self.prefix.split("."))

    def names(self) -> list[str]:
        return [name for name in self.tensors if isinstance(name, str) and name.startswith(self.prefix)]

    def described(self) -> str:
        place = ", ".join(
            [f"'{printable('/'.join(self.keys))}'"] * bool(self.keys)
            + [f"names without '{printable(self.prefix)}'"] * bool(self.prefix)
        )
        return place or "the names as they are"

    def option(self) -> str:
        """The command-line option that takes this network."""
        if self.role:
            return f"--use {self.role}"
        if self.prefix or not self.keys:
            return f"--prefix {printable(self.prefix) or repr('')}"
        return f"--use {printable(self.keys[-1])}"


def _dicts(data: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dicts in `data` with the keys that lead to them, outermost first; each once."""
    level: list[tuple[tuple[str, ...], Any]] = [((), data)]
    seen: set[int] = set()
    for _ in range(_MAX_NESTING):
        inner = []
        for keys, value in level:
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                yield keys, value
                inner += [((*keys, key), child) for key, child in value.items() if isinstance(key, str)]
        level = inner


def _choose(networks: list[_Network], use: str | None, prefix: str | None) -> _Network:
    choices = [network for network in networks if use is None or network.answers_to(use)]
    if prefix is not None:
        choices = [network for network in choices if network.prefix.rstrip(".") == prefix.rstrip(".")]
    order = ["", *_ROLES]
    choices.sort(key=lambda network: order.index(network.role))
    if choices and (len(choices) == 1 or choices[0].role != choices[1].role):
        return choices[0]
    asked = " ".join([f"--use {use}"] * (use is not None) + [f"--prefix {prefix}"] * (prefix is not None))
    problem = "several networks in it fit" if choices else "no network in it fits"
    listed = "".join(f"\n  {network.described()}: {network.option()}" for network in networks[:_MAX_LISTED])
    listed += f"\n  ... and {len(networks) - _MAX_LISTED} more" * (len(networks) > _MAX_LISTED)
    raise ConvertError(f"{problem}{f' {asked}' * bool(asked)}; choose by --use and --prefix among:{listed}")


def _found(taken: _Network, others: list[_Network], data: Any) -> Found:
    if len(others) >= _MAX_NETWORKS:
        raise ConvertError(f"it holds {len(others) + 1} networks, which no checkpoint needs")
    same_dict = [other for other in others if other.tensors is taken.tensors]
    of_others = {name for other in same_dict if other.prefix.startswith(taken.prefix) for name in other.names()}
    names = [name for name in taken.names() if name not in of_others]
    state = {name.removeprefix(taken.prefix): taken.tensors[name] for name in names}
    if not taken.prefix:
        unnamed = [name for name in taken.tensors if not isinstance(name, str)]
        state |= {f"{printable(name)} (not a text)": taken.tensors[name] for name in unnamed}
    chunked, state = state, _without_chunks(state)
    projection = set(_projection_head(state))

    beside: dict[str, Any] = {}
    left_out = [f"{other.described()} ({len(other.names())} tensors; {other.option()})" for other in others]
    if taken.prefix:
        known = {name for network in (taken, *same_dict) for name in network.names()}
        beside = _heads_beside(taken)
        heads = {f"{_outside(taken)}{name}" for name in beside}
        left_out += _grouped([name for name in taken.tensors if name not in known | heads])
    if projection:
        left_out.append(f"the projection head of self-supervised training at head. ({len(projection)} tensors)")
    if rest := _other_entries(taken, others, data):
        left_out.append(f"entries that are no weights of a model: {', '.join(rest)}")
    usual = not taken.prefix and not others and set(taken.keys) <= set(_NESTS)
    place = "" if usual else taken.described()
    if state is not chunked:
        place = ", ".join([place] * bool(place) + ["blocks by their numbers, without those of chunks"])
    state = {name: value for name, value in state.items() if name not in projection}
    return Found(state, place, left_out, beside)


def _without_chunks(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with blocks.CHUNK.BLOCK. as blocks.BLOCK.; `state` itself if its blocks are not in chunks.

    DINOv2 trains in chunks, whose blocks keep their numbers in the whole network. Other numbers are left as they are.
    """
    parts = {name: _CHUNKED.match(name) for name in state if name.startswith("blocks.")}
    found = [match for match in parts.values() if match]
    chunk_of = {int(match["block"]): match["chunk"] for match in found}
    pairs = {(match["chunk"], match["block"]) for match in found}
    if (
        not parts
        or len(found) < len(parts)
        or len(pairs) > len(chunk_of)
        or sorted(chunk_of) != [*range(len(chunk_of))]
    ):
        return state
    return {_CHUNKED.sub(r"blocks.\g<block>.", name): value for name, value in state.items()}


def _outside(taken: _Network) -> str:
    """What stands before the last part of the network's prefix: '' for 'vit.'."""
    head, dot, _ = taken.prefix.removesuffix(".").rpartition(".")
    return head + dot


def _heads_beside(taken: _Network) -> dict[str, Any]:
    names = [f"{head}.{leaf}" for head in _HEADS_BESIDE for leaf in ("weight", "bias")]
    return {name: taken.tensors[_outside(taken) + name] for name in names if _outside(taken) + name in taken.tensors}


def _grouped(names: list[Any]) -> list[str]:
    """Names outside the prefix by their first part, as phrases."""
    firsts = collections.Counter(re.sub(r"^((module|_orig_mod)\.)*", "", str(name)).partition(".")[0] for name in names)
    shown = [f"{printable(first)} ({count} tensors)" for first, count in firsts.most_common(_MAX_LISTED)]
    return shown + ([f"{len(firsts) - _MAX_LISTED} more groups of names"] if len(firsts) > _MAX_LISTED else [])


def _projection_head(state: Mapping[str, Any]) -> list[str]:
    """Names of an MLP at the place of a classifier's head (MoCo v3's head.0, head.1, ...; DINO's head.mlp)."""
    names = [name for name in state if re.match(r"head\.(\d+|mlp\.\d+|last_layer)\.", name)]
    matrices = [name for name in names if getattr(state[name], "ndim", 0) == 2]
    # A linear probe's head has one matrix too, behind a batch norm.
    return names if len(matrices) > 1 or "head.0.weight" in matrices else []


def _other_entries(taken: _Network, others: list[_Network], data: Any) -> list[str]:
    """Keys on the way to the taken network that lead neither to it nor to another one."""
    used = {network.keys[: i + 1] for network in (taken, *others) for i in range(len(network.keys))}
    rest, level = [], data
    for i, key in enumerate(taken.keys):
        rest += [printable(name, 40) for name in level if (*taken.keys[:i], name) not in used]
        level = level[key]
    return rest if len(rest) <= _MAX_LISTED else [*rest[:_MAX_LISTED], f"{len(rest) - _MAX_LISTED} more"]


def _outermost(data: Any) -> dict[str, Any]:
    """The names and values in `data` where no network was found: the usual nests and prefixes are taken off."""
    seen: set[int] = set()
    while isinstance(data, dict) and id(data) not in seen:
        seen.add(id(data))
        data = next((data[key] for key in _NESTS if isinstance(data.get(key), dict | Opaque)), data)
    if isinstance(data, Opaque):
        raise ConvertError(
            f"the file holds a whole model object ({printable(data.name)}), not its state dict: load it where its "
            "class is defined and save torch.save({'model': model.state_dict()}, 'NEW')"
        )
    if not isinstance(data, dict) or not data:
        found = "nothing" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ConvertError(f"the file holds no state dict but {found}")
    while wrapper := next((w for w in _WRAPPERS if all(isinstance(n, str) and n.startswith(w) for n in data)), None):
        data = {name.removeprefix(wrapper): value for name, value in data.items()}
    return {name if isinstance(name, str) else f"{name!r} (not a text)": value for name, value in data.items()}
