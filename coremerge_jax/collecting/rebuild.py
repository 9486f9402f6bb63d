"""Programs rebuilt so that they also sum up what they multiply with weights."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from coremerge_jax.collecting.follow import Track, moved, unstacked

# Weights' sums by number of the weight. What they are is up to the caller: here they only pass
# through loops and branches.
State = Mapping[int, Any]

Tracks = Sequence[Track | None]

# Adds the inputs of a product, given the track of its weight, the other operand, the pairs of
# their axes, and the number of those that are not summed over.
AddProduct = Callable[[State, Track, jax.Array, Sequence[tuple[int, int]], int], State]

# Adds the inputs of a product by groups of rows, given the track of its weight (its groups come
# first), the rows, the axis of the weight's inputs, and the size of each group.
AddRagged = Callable[[State, Track, jax.Array, int, jax.Array], State]

# Raises an error for a weight that an operation of this name does not only move.
Refuse = Callable[[Track, str], None]

# Operations that call a program with their own operands, by name of the primitive.
_CALLS = (
    "call",
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
)

_Result = tuple[list[Any], list[Track | None], State]


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """Runs a program, and sums up the inputs of its products with weights that are followed."""

    add_product: AddProduct
    add_ragged: AddRagged
    refuse: Refuse

    def run(
        self, program: ClosedJaxpr | Jaxpr, values: Sequence[Any], tracks: Tracks, state: State
    ) -> _Result:
        """Runs a program.

        Args:
            program: what to run.
            values: its arguments.
            tracks: of the arguments; None for those that are no weights.
            state: the sums so far.

        Returns:
            The results, their tracks, and the new sums.
        """
        jaxpr, consts = _opened(program)
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        followed = {var: track for var, track in zip(jaxpr.invars, tracks, strict=True) if track}

        def read(atoms: Sequence[Any]) -> tuple[list[Any], list[Track | None]]:
            literal = [isinstance(atom, Literal) for atom in atoms]
            pairs = list(zip(atoms, literal, strict=True))
            return (
                [atom.val if fixed else known[atom] for atom, fixed in pairs],
                [None if fixed else followed.get(atom) for atom, fixed in pairs],
            )

        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:
                results, found, state = self._step(eqn, *read(eqn.invars), state)
            known.update(zip(eqn.outvars, results, strict=True))
            followed.update((v, t) for v, t in zip(eqn.outvars, found, strict=True) if t)
        return *read(jaxpr.outvars), state

    def _step(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> _Result:
        name = eqn.primitive.name
        if any(tracks):
            if name == "scan":
                return self._scan(eqn, values, tracks, state)
            if name == "while":
                return self._while(eqn, values, tracks, state)
            if name == "cond":
                return self._cond(eqn, values, tracks, state)
            if name in _CALLS:
                return self.run(_called(eqn), values, tracks, state)
        found: list[Track | None] | None = [None] * len(eqn.outvars)
        if any(tracks) and name == "dot_general":
            state = self._product(eqn, values, tracks, state)
        elif any(tracks) and name == "ragged_dot_general":
            state = self._ragged(eqn, values, tracks, state)
        elif any(tracks):
            found = moved(name, eqn.params, values, tracks)
            if found is None:
                self.refuse(_first(tracks), name)
        return _bind(eqn, values), found or [], state

    def _product(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> State:
        side = 1 if tracks[0] is None else 0
        track, x = tracks[side], values[1 - side]
        if track is None or tracks[1 - side] is not None:
            self.refuse(_first(tracks), "a product with another of the weights")
            return state
        summed, batch = eqn.params["dimension_numbers"]
        pairs = [
            pair
            for both in (batch, summed)
            for pair in zip(both[side], both[1 - side], strict=True)
        ]
        return self.add_product(state, track, jnp.asarray(x), pairs, len(batch[0]))

    def _ragged(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> State:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        ((x_axis, *_), (axis, *_)), _ = numbers.dot_dimension_numbers
        usual = ((((x_axis,), (axis,)), ((), ())), (0,), (0,))
        found = (
            numbers.dot_dimension_numbers,
            numbers.lhs_ragged_dimensions,
            numbers.rhs_group_dimensions,
        )
        track = tracks[1]
        if track is None or tracks[0] is not None or x_axis != 1 or _plain(found) != usual:
            self.refuse(_first(tracks), eqn.primitive.name)
            return state
        return self.add_ragged(state, track, values[0], axis, values[2])

    def _scan(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> _Result:
        body, _ = _opened(eqn.params["jaxpr"])
        # Names of parameters have changed, but only what is scanned has one more axis.
        scanned = [
            _ndim(outer) > _ndim(inner)
            for outer, inner in zip(eqn.invars, body.invars, strict=True)
        ]
        carried = sum(
            _ndim(outer) == _ndim(inner)
            for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
        )
        first = len(values) - sum(scanned)
        fixed = first - carried
        inside = _in_loop(tracks[:first])
        parts = [None if track is None else unstacked(track) for track in tracks[first:]]
        tables = [part and part[0] for part in parts]
        names, sums = _mine(tracks, state)
        found: list[Track | None] = []
        taken: list[Track | None] = []

        def step(carry: Any, xs: Any) -> Any:
            sums, now = carry
            given, numbers = xs
            taken[:] = [part and part[1](table) for part, table in zip(parts, numbers, strict=True)]
            results, tracked, after = self.run(
                eqn.params["jaxpr"],
                [*values[:fixed], *now, *given],
                [*inside, *taken],
                dict(zip(names, sums, strict=True)),
            )
            found[:] = tracked
            self._check_carry(inside[fixed:], tracked[:carried])
            sums = [after[name] for name in names]
            return (sums, _typed(results[:carried], body.outvars)), results[carried:]

        carry = sums, _typed(values[fixed:first], eqn.invars[fixed:first])
        (sums, now), stacked = jax.lax.scan(
            step,
            carry,
            (values[first:], tables),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        back = {id(part): track for part, track in zip(taken, tracks[first:], strict=True) if part}
        ends = [track and back.get(id(track), track.lost) for track in found[carried:]]
        state = {**state, **dict(zip(names, sums, strict=True))}
        return [*now, *stacked], [*tracks[fixed:first], *ends], state

    def _while(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> _Result:
        first = eqn.params["cond_nconsts"]
        start = first + eqn.params["body_nconsts"]
        names, sums = _mine(tracks, state)
        inside = _in_loop(tracks[first:])

        def holds(carry: Any) -> Any:
            given = [*values[:first], *carry[1]]
            same = [*tracks[:first], *tracks[start:]]
            (result,), _, _ = self.run(eqn.params["cond_jaxpr"], given, same, {})
            return result

        def step(carry: Any) -> Any:
            results, found, after = self.run(
                eqn.params["body_jaxpr"],
                [*values[first:start], *carry[1]],
                inside,
                dict(zip(names, carry[0], strict=True)),
            )
            self._check_carry(inside[start - first :], found)
            return [after[name] for name in names], _typed(results, eqn.outvars)

        carry = sums, _typed(values[start:], eqn.invars[start:])
        sums, results = jax.lax.while_loop(holds, step, carry)
        state = {**state, **dict(zip(names, sums, strict=True))}
        return list(results), list(tracks[start:]), state

    def _cond(self, eqn: JaxprEqn, values: list[Any], tracks: Tracks, state: State) -> _Result:
        names, sums = _mine(tracks, state)
        found: list[list[Track | None]] = []

        def branch(program: ClosedJaxpr, sums: Any, *given: Any) -> Any:
            before = dict(zip(names, sums, strict=True))
            results, tracked, after = self.run(program, given, tracks[1:], before)
            found.append(tracked)
            return [after[name] for name in names], _typed(results, eqn.outvars)

        branches = [
            lambda *given, program=program: branch(program, *given)
            for program in eqn.params["branches"]
        ]
        sums, results = jax.lax.switch(values[0], branches, sums, *values[1:])
        ends = [
            track and track.lost
            for track in (next(filter(None, same), None) for same in zip(*found, strict=True))
        ]
        return list(results), ends, {**state, **dict(zip(names, sums, strict=True))}

    def _check_carry(self, before: Tracks, after: Tracks) -> None:
        """Refuses loops that change the weights which they carry."""
        for one, other in zip(before, after, strict=True):
            if one is not other:
                self.refuse(_first([one, other]), "a loop that changes it")


def _opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a program and its constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def _plain(x: Any) -> Any:
    """Returns nested sequences as tuples."""
    return tuple(map(_plain, x)) if isinstance(x, tuple | list) else x


def _ndim(variable: Any) -> int:
    return len(variable.aval.shape)


def _called(eqn: JaxprEqn) -> Any:
    return next(x for x in eqn.params.values() if isinstance(x, ClosedJaxpr | Jaxpr))


def _bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _mine(tracks: Tracks, state: State) -> tuple[list[int], list[Any]]:
    """Returns the numbers of the weights that a loop uses, and their sums."""
    names = sorted({track.weight for track in tracks if track})
    return names, [state[name] for name in names]


def _in_loop(tracks: Tracks) -> list[Track | None]:
    """Returns the tracks of weights that all steps of a loop use."""
    return [track and track.in_loop for track in tracks]


def _first(tracks: Tracks) -> Track:
    return next(track for track in tracks if track)


def _typed(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Gives literals the dtype that they have in the program."""
    return [
        x if isinstance(x, jax.Array) else jnp.asarray(x, variable.aval.dtype)
        for x, variable in zip(values, variables, strict=False)
    ]
