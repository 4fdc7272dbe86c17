"""Carrying out a plan, and the proof that the result is right.

Nothing is written to a live model before everything was checked; where a probe then shows that the model computes something
else, what it held before is put back.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyckpt import continuation, formulas, parity, plans
from polyckpt.adapter import Adapter, ModelCapture, Restore, Schedule, StoredModel
from polyckpt.checkpoint import Checkpoint, StoredTensor, check_all
from polyckpt.continuation import Continued, GroupReport, Wishes
from polyckpt.converted import Converted, Held
from polyckpt.dtypes import widens
from polyckpt.errors import AmbiguityError, MismatchError, ParityError, PlanError, Problem, UnsupportedError
from polyckpt.matching import AGREED, PROOFS, compatible
from polyckpt.moves import FOLDED_BIAS, Loss
from polyckpt.optimizers import HYPERPARAMETERS
from polyckpt.parity import Comparison, Probe, Recording
from polyckpt.plans import Plan, Row
from polyckpt.sides import Flatten, Side
from polyckpt.units import BARE, Unit

_MAX_RUNS = 200


@dataclass(frozen=True)
class Report:
    """What a conversion did: its rows, what differs between the models, how their outputs compare (None: not seen), what
    became of each group of the optimizer, and what of the checkpoint only the framework that wrote it can use.
    """

    summary: str
    rows: Sequence[Row]
    notes: Sequence[str]
    parity: Comparison | None
    optimizer: Sequence[GroupReport] = ()
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        lines = plans.table([(row.target, row.source, row.how, str(row.exactness)) for row in self.rows])
        proof = f"parity: {self.parity or 'not compared, the checkpoint holds no probe that could be run'}"
        notes = [f"differs: {note}" for note in self.notes]
        left = [f"left out: {each}" for each in self.left_out]
        return "\n".join([self.summary, *lines, *notes, proof, *map(str, self.optimizer), *left])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller of `load` or `plan` said about a conversion; as there."""

    rules: Mapping[str, str] | None = None
    pairs: Sequence[tuple[str, str, Flatten | None]] = ()
    strict: bool = True
    verify: bool = True
    cast: bool = False
    probe_axes: str | Sequence[str | None] | None = None
    tolerance: float | None = None
    accept: Collection[str] = ()
    apply: Callable[..., Any] | None = None
    continuation: str = continuation.STOCK
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Raises PlanError for what nobody can accept, a misspelt name above all."""
        if self.continuation not in (continuation.STOCK, continuation.EXACT):
            raise PlanError(f"continuation={self.continuation!r}: pass {continuation.STOCK!r} or {continuation.EXACT!r}")
        weights, optimizers = ({AGREED, FOLDED_BIAS}, {*HYPERPARAMETERS, *continuation.ASPECTS})
        if isinstance(self.accept, str) or not set(self.accept) <= weights | optimizers:
            listed = [", ".join(map(repr, sorted(names))) for names in (weights, optimizers)]
            raise PlanError(
                f"accept={self.accept!r}: pass a set of names out of {listed[0]}, and for an optimizer out of {listed[1]}"
            )


@dataclass(frozen=True)
class _Trial:
    """A plan that was tried: the model it made, what came of it, and the layers in the order in which they ran."""

    model: Any
    comparison: Comparison
    ran: tuple[str, ...]

    @property
    def agrees_up_to(self) -> float:
        """How many calls of layers there were before the first divergence."""
        return math.inf if self.comparison.first is None else self.ran.index(self.comparison.first[0])


@dataclass
class Conversion:
    """A checkpoint and a live model of another framework, or of other names, with the plan between them."""

    checkpoint: Checkpoint
    adapter: Adapter
    model: Any
    options: Options
    captured: ModelCapture
    aliases: Mapping[str, str]
    probe: Probe | None
    arguments: tuple[Any, ...]
    plan: Plan
    optimizer: Any = None

    def run(self) -> tuple[Any, Any, Report, tuple[Problem, ...]]:
        """The restored model and optimizer, the report, and what was left alone.

        Raises MismatchError and its kinds; then nothing changed.
        """
        continued = self._continued()
        problems = (*self._problems(), *continued.problems)
        if problems and self.options.strict:
            raise MismatchError(
                f"{self.checkpoint.path} does not fit the model ({len(problems)} entries; nothing was loaded). Pass rules= "
                "where names mislead, or strict=False to load what fits:",
                problems,
            )
        if self.plan.problems() and self.probe is None:
            raise AmbiguityError(
                f"{self.checkpoint.path} -> {self.plan.target.label}: which tensor is which cannot be told, and is not guessed "
                f"(nothing was loaded):\n  " + "\n  ".join(self.plan.problems()) + f"\n{_HOW_TO_SETTLE}"
            )
        if self.probe is None and (folded := self.plan.folded()):
            # An activation in between, or a second reader, and the outputs would be others.
            raise AmbiguityError(
                f"{self.checkpoint.path} -> {self.plan.target.label}: whether nothing but a norm reads what a bias is added to "
                "cannot be told, and is not guessed (nothing was loaded): save the checkpoint with probe=<a small batch>:"
                f"\n  {', '.join(bias.tensor for bias in folded.values())}"
            )
        with self._unchanged_if_it_fails():
            model, comparison = (self._applied(self.plan), None) if self.probe is None else self._proven()
            if self.probe is not None:  # which may have found another plan
                continued = self._continued()
            if continued.problems and self.options.strict:
                raise MismatchError(
                    f"{self.checkpoint.path} does not fit the optimizer (nothing was loaded):", continued.problems
                )
            check_all(continued.restore.tensors, verify=self.options.verify)
            optimizer = _applied_or_undone(continued.restore)
        return model, optimizer, self._report(comparison, continued), problems

    def _continued(self) -> Continued:
        """The continuation of the optimizer by the plan as it is."""
        if self.optimizer is None:
            return Continued(Restore(apply=lambda: None), (), ())
        wishes = Wishes(
            frozenset(self.options.accept),
            self.options.tolerance,
            exact=self.options.continuation == continuation.EXACT,
            cast=self.options.cast,
            schedule=self.options.schedule,
        )
        return continuation.prepare(self.checkpoint, self.plan, self.adapter, self.optimizer, self.model, self.captured, wishes)

    @contextlib.contextmanager
    def _unchanged_if_it_fails(self) -> Iterator[None]:
        """What the model holds is put back where what is done in this block fails."""
        if self.probe is None and self.optimizer is None:
            yield
            return
        before = self._as_stored({name: Held(name, leaf) for name, leaf in self.captured.weights.items()})
        try:
            yield
        except BaseException:
            self.adapter.prepare_model(self.model, before, rng=False).apply()
            raise

    def _problems(self) -> tuple[Problem, ...]:
        """What has no counterpart, would be lost, or would be rounded."""
        target, stored = self.plan.target, self.checkpoint.weights.stored
        found = [
            Problem("missing", "weights", piece.tensor, live=_shown(target, piece.tensor))
            for unit in self.plan.missing
            for piece in unit.pieces.values()
        ]
        found += [
            Problem("unexpected", "weights", piece.tensor, stored=str(stored[piece.tensor]))
            for unit in self.plan.dropped
            for piece in unit.pieces.values()
            if not (unit.kind == BARE and stored[piece.tensor].dtype.startswith(("int", "uint", "bool")))
        ]
        # A norm that has no statistics yet computes something else; ones and zeros in their place would hide it.
        found += [
            Problem("missing", "weights", pair.target.pieces[role].tensor, live=_shown(target, pair.target.pieces[role].tensor))
            for pair in self.plan.pairs
            for role in ("mean", "variance")
            if role in pair.target.pieces
            and role not in pair.source.pieces
            and not formulas.making(pair.source, pair.target, role)
        ]
        made, losses = self.plan.moves()
        found += [self._lost(loss) for loss in losses if not self._is_void(loss)]
        for name, moves in made.items():
            for source in {piece.tensor for move in moves for piece in move.rounded}:
                if not self.options.cast and not widens(stored[source].dtype, target.tensors[name][1]):
                    found.append(
                        Problem(
                            "dtype",
                            "weights",
                            name,
                            stored=str(stored[source]),
                            live=f"{_shown(target, name)}; pass cast=True to round",
                        )
                    )
        return tuple(dict.fromkeys(found))

    def _is_void(self, loss: Loss) -> bool:
        value = loss.piece.view(self.checkpoint.weights.stored[loss.piece.tensor].numpy())
        return loss.value is not None and bool(np.all(np.asarray(value, np.float64) == loss.value))

    def _lost(self, loss: Loss) -> Problem:
        stored = self.checkpoint.weights.stored[loss.piece.tensor]
        hint = f"; where a batch norm follows, pass accept={{{FOLDED_BIAS!r}}}" if loss.foldable else ""
        live = f"no place for it{hint}"
        return Problem("value", "weights", loss.piece.tensor, stored=f"{stored} not all {loss.value:g}", live=live)

    def _stored_model(self, plan: Plan) -> StoredModel:
        """The checkpoint's model as if it had been saved from the live one."""
        stored = self.checkpoint.weights.stored
        made, _ = plan.moves()
        weights: dict[str, StoredTensor] = {}
        for name, moves in made.items():
            shape, dtype = plan.target.tensors[name]
            weights[name] = Converted(name, dtype, shape, moves, stored)
        for alias, name in self.aliases.items():
            if alias not in weights and name in weights:
                weights[alias] = weights[name]
            elif name not in weights and alias in weights:
                weights[name] = weights[alias]
        return self._as_stored(weights)

    def _as_stored(self, weights: Mapping[str, StoredTensor]) -> StoredModel:
        return StoredModel(
            type=self.captured.type, weights=weights, aliases=self.aliases, native=self.captured.native, rng=None
        )

    def _prepared(self, plan: Plan) -> Restore:
        prepared = self.adapter.prepare_model(self.model, self._stored_model(plan), rng=False)
        if prepared.problems and self.options.strict:
            raise MismatchError(f"{self.checkpoint.path} does not fit the model (nothing was loaded):", prepared.problems)
        return prepared

    def _applied(self, plan: Plan) -> Any:
        prepared = self._prepared(plan)
        check_all(prepared.tensors, verify=self.options.verify)
        return prepared.apply()

    def _proven(self) -> tuple[Any, Comparison]:
        """Load, run the probe and compare; where evidence did not settle the plan, what agrees does."""
        plan, trial = self._searched()
        exchanged = self._check_seen(plan, trial)
        model = self._applied(plan) if exchanged else trial.model
        self.plan = plans.proven(plan, "parity")
        return model, trial.comparison

    def _searched(self) -> tuple[Plan, _Trial]:
        """A plan whose outputs agree: at each step the first change that moves the first divergence further back."""
        plan, trial, runs = self.plan, self._tried(self.plan), 1
        while not trial.comparison.agrees:
            for candidate in itertools.islice(_alternatives(plan, trial.comparison), _MAX_RUNS - runs):
                runs += 1
                tried = self._tried(candidate)
                if tried.comparison.agrees or tried.agrees_up_to > trial.agrees_up_to:
                    plan, trial = candidate, tried
                    break
            else:
                raise ParityError(self._diverged(plan, trial.comparison, runs))
        return plan, trial

    def _check_seen(self, plan: Plan, trial: _Trial) -> bool:
        """Refuse what the probe does not decide: layers that did not run and whose exchange changes nothing.

        Returns whether any were exchanged, so that another plan is loaded now.
        """
        open_targets = {unit.path for each in plan.unsettled for unit in each.targets}
        unseen = [pair for pair in plan.pairs if pair.target.path in open_targets and pair.target.layer not in trial.ran]
        tried = False
        for pair, other in itertools.combinations(unseen, 2):
            if compatible(pair.source, other.target) and compatible(other.source, pair.target):
                exchanged = plans.repaired(plan, [(other.source, pair.target), (pair.source, other.target)], "")
                tried = True
                if self._tried(exchanged).comparison.agrees:
                    raise AmbiguityError(
                        f"{self.checkpoint.path} -> {plan.target.label}: the outputs agree, but {pair.target.path} and "
                        f"{other.target.path} have no part in them, so which of {pair.source.path} and {other.source.path} is "
                        f"which cannot be told (nothing was loaded).\n{_HOW_TO_SETTLE}"
                    )
        return tried

    def _tried(self, plan: Plan) -> _Trial:
        assert self.probe is not None
        model = self._applied(plan)
        found = parity.record(self.adapter, model, self.arguments, self.options.apply)
        comparison = parity.compare_recordings(
            self.probe.recording, found, tolerance=self.options.tolerance, partners=_partners(plan)
        )
        return _Trial(model, comparison, tuple(ran.path for ran in found.layers))

    def _report(self, comparison: Comparison | None, continued: Continued) -> Report:
        rows = self.plan.rows()
        return Report(self.plan.summary(rows), rows, self.plan.notes, comparison, continued.reports)

    def _diverged(self, plan: Plan, comparison: Comparison, runs: int) -> str:
        lines = [
            f"{self.checkpoint.path}: the converted model does not compute what the one that was saved did: {comparison}. "
            "The live model is as it was."
        ]
        if comparison.first is not None:
            partner = _partners(plan).get(comparison.first[0], "")
            lines.append(f"{comparison.first[0]} took the weights of {partner}; all compared layers that ran before it agree")
        lines += [f"differs: {note}" for note in plan.notes]
        lines += [f"not settled: {problem}" for problem in plan.problems()]
        if hint := _axes_hint(plan.source, plan.target, self.arguments, self.options):
            lines.append(hint)
        if runs > 1:
            lines.append(f"{runs} ways to pair what is alike were tried, and none agrees")
        lines.append(
            "Weights that are right beside a model that computes otherwise (another epsilon, activation, padding) are loaded "
            "with tolerance=; a pairing that is wrong is put right with rules= or plan="
        )
        return "\n  ".join(lines)


def _applied_or_undone(restore: Restore) -> Any:
    try:
        return restore.apply()
    except BaseException:
        if restore.undo:
            with contextlib.suppress(Exception):
                restore.undo()
        raise


_HOW_TO_SETTLE = (
    "Any of these settles it: save the checkpoint with probe=<a small batch>, and the outputs of both models decide (a linen "
    "or Haiku tree needs apply= too); pass rules={'path in the checkpoint': 'path in the model'}, where {name} stands for any "
    "part of a path; polyckpt.plan(...).save('plan.json'), edit that file, and pass plan='plan.json'; or, where names and "
    "order agree and that is enough for you, pass accept={'names and order'}"
)


def side_of(checkpoint: Checkpoint) -> Side:
    """The model of a checkpoint as a plan sees it."""
    model = checkpoint.manifest.model
    tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.weights.stored.items()}
    return Side.of(f"{checkpoint.manifest.producer.adapter} {model.type}", model.layers, model.order, tensors, model.aliases)


def prepare(
    checkpoint: Checkpoint, probe: Probe | None, adapter: Adapter, model: Any, options: Options, optimizer: Any = None
) -> Conversion:
    """Look at both sides and make the plan. The probe is left out where the model cannot be run.

    optimizer: the live one that is to go on, None to leave it out.

    Raises PlanError, UnsupportedError.
    """
    expected = probe.recording if probe else Recording()
    source = _seen(side_of(checkpoint), expected)
    captured = _captured(adapter, model, probe, options)
    aliases = _aliases(captured)
    tensors = {name: (leaf.shape, leaf.dtype) for name, leaf in captured.weights.items()}
    target = Side.of(f"{adapter.name} {captured.type}", captured.layers, captured.order, tensors, aliases)
    arguments: tuple[Any, ...] = ()
    if options.apply is None and not callable(model):
        probe = None  # a tree of parameters: what they compute is known to `apply` alone
    if probe is not None:
        arguments = _turned(probe.arguments, source, target, options.probe_axes)
        try:
            target = _seen(target, parity.record(adapter, model, arguments, options.apply))
        except UnsupportedError as error:
            hint = _axes_hint(source, target, arguments, options)
            raise UnsupportedError(f"{error}. {hint}" if hint else str(error)) from error
    plan = plans.make(source, target, rules=options.rules, pairs=options.pairs, accept=options.accept)
    return Conversion(checkpoint, adapter, model, options, captured, aliases, probe, arguments, plan, optimizer)


def _seen(side: Side, recording: Recording) -> Side:
    return side.seen([ran.path for ran in recording.layers], recording.flattened_into)


def _captured(adapter: Adapter, model: Any, probe: Probe | None, options: Options) -> ModelCapture:
    try:
        return adapter.capture_model(model)
    except UnsupportedError:
        if probe is None or (options.probe_axes is None and any(_is_image(each) for each in probe.arguments)):
            raise
        # A model that is not built yet is built by what it is called with.
        parity.record(adapter, model, _turned(probe.arguments, None, None, options.probe_axes), options.apply)
        return adapter.capture_model(model)


def _aliases(captured: ModelCapture) -> dict[str, str]:
    """Tied names of a live model -> the first name of the same tensor."""
    first: dict[Any, str] = {}
    found = {}
    for name, leaf in captured.weights.items():
        if leaf.identity is None:
            continue
        owner = first.setdefault((leaf.dtype, leaf.identity), name)
        if owner != name:
            found[name] = owner
    return found


def _is_image(argument: Any) -> bool:
    return isinstance(argument, np.ndarray) and argument.ndim > 2 and argument.dtype.kind not in "iub"


def _turned(
    arguments: tuple[Any, ...], source: Side | None, target: Side | None, axes: str | Sequence[str | None] | None
) -> tuple[Any, ...]:
    """The probe's batch with its axes as the target has them."""
    if axes is not None:
        patterns = [axes] if isinstance(axes, str) else list(axes)
        if len(patterns) > len(arguments):
            raise PlanError(f"probe_axes: {len(patterns)} patterns for {len(arguments)} arguments")
        patterns += [None] * (len(arguments) - len(patterns))
        pairs = zip(arguments, patterns, strict=True)
        return tuple(each if pattern is None else _rearranged(each, pattern) for each, pattern in pairs)
    if source is None or target is None or None in (source.channels, target.channels) or source.channels == target.channels:
        return arguments
    kernels = [unit.kernel for unit in source.units if unit.kind in ("conv", "conv_transpose")]
    spatial = {len(kernel.shape) - 2 for kernel in kernels if kernel is not None}
    ends = (1, -1) if target.channels == "last" else (-1, 1)
    return tuple(np.moveaxis(each, *ends) if _is_image(each) and each.ndim - 2 in spatial else each for each in arguments)


def _axes_hint(source: Side, target: Side, arguments: tuple[Any, ...], options: Options) -> str:
    """What may be amiss where a batch of images was handed on as it was."""
    unknown = options.probe_axes is None and None in (source.channels, target.channels)
    if not unknown or not any(_is_image(each) for each in arguments):
        return ""
    return (
        "The probe's axes were left as they are, since no convolution tells where the channels lie on both sides: if the "
        'model wants them elsewhere, pass probe_axes="b c h w -> b h w c"'
    )


def _rearranged(argument: Any, pattern: str) -> np.ndarray:
    left, arrow, right = pattern.partition("->")
    before, after = left.split(), right.split()
    if not arrow or sorted(before) != sorted(after) or len(set(before)) != len(before) or np.ndim(argument) != len(before):
        raise PlanError(
            f"probe_axes={pattern!r}: write the axes of the checkpoint's batch and of the model's: 'b c h w -> b h w c'"
        )
    return np.transpose(argument, [before.index(axis) for axis in after])


def _shown(side: Side, name: str) -> str:
    shape, dtype = side.tensors[name]
    return f"{dtype}{list(shape)}"


def _partners(plan: Plan) -> dict[str, str]:
    """Layers of the target whose outputs can be compared -> those of the source."""
    found: dict[str, set[str]] = {}
    for pair in plan.pairs:
        whole = bool(pair.source.part) == bool(pair.target.part) and pair.source.kind != BARE
        plain = _activation(pair.source) == _activation(pair.target)
        found.setdefault(pair.target.layer, set()).add(pair.source.layer if whole and plain else "")
    return {layer: others.pop() for layer, others in found.items() if len(others) == 1 and others != {""}}


def _activation(unit: Unit) -> Any:
    return None if (name := unit.config.get("activation")) == "linear" or unit.kind == "rnn" else name


def _alternatives(plan: Plan, comparison: Comparison) -> Iterator[Plan]:
    """Other plans that the evidence leaves open, those first that change the layer where outputs diverge."""
    where = comparison.first[0] if comparison.first else None
    places = {pair.target.layer: pair.target.place for pair in plan.pairs}
    limit = places.get(where, math.inf) if where is not None else math.inf
    flattens = sorted(plan.flatten.items(), key=lambda item: item[0] != where)
    for path, options in flattens:
        now = next(pair.flatten for pair in plan.pairs if pair.target.path == path)
        yield from (plans.flattened(plan, path, each) for each in options if each != now)
    for each in plan.unsettled:
        yield from (plans.repaired(plan, proposal, "") for proposal in each.proposals[1:] if proposal)
    # Exchange one unit with each of its kind: what diverges first, then what ran before it, nearest first.
    pairs = [pair for pair in plan.pairs if pair.evidence not in PROOFS]
    near = [pair for pair in pairs if pair.target.place <= limit]
    for pair in sorted(near, key=lambda pair: (pair.target.layer != where, -pair.target.place)):
        for other in pairs:
            if other is not pair and compatible(other.source, pair.target) and compatible(pair.source, other.target):
                yield plans.repaired(plan, [(other.source, pair.target), (pair.source, other.target)], "")
