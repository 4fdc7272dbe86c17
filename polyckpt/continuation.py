"""Going on with the optimizer of another framework: its slots through the plan of the weights, its step, its hyperparameters.

Nothing is written here: what comes out is prepared by the adapter of the live optimizer, and reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from polyckpt import schema, updates
from polyckpt.adapter import Adapter, Continuation, ContinuedGroup, ModelCapture, OptimizerCapture, Restore, Schedule
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.converted import Converted, Made
from polyckpt.dtypes import lookup, widens
from polyckpt.errors import Problem
from polyckpt.layouts import Piece
from polyckpt.moves import Exactness, Move
from polyckpt.optimizers import AVERAGED, CLIPS, CUSTOM, LINEAR, STRUCTURAL, UNUSED, WHOLE, akin, factored
from polyckpt.plans import Plan
from polyckpt.translation import Affine, Item, Live, Sample, Translated, shown, translate
from polyckpt.updates import Form

STOCK, EXACT = "stock", "exact"
"""What to pass as `continuation`: the optimizer follows its own formula, or that of the one in the checkpoint."""

ASPECTS = frozenset({"family", "scale", "precision", "rate", "schedule", "max_second_moment", "folded", "factored", "slots"})
"""What else than a hyperparameter can be accepted by name."""

_SECTION = "optimizer"
_TOLERANCE = 1e-5
"""Of what may differ without a word: about what float32 rounds in a few updates."""


@dataclass(frozen=True)
class GroupReport:
    """What became of one group of the live optimizer."""

    label: str
    items: tuple[Item, ...]

    def __str__(self) -> str:
        return "\n  ".join([f"{self.label}: {'exact' if not self.items else ''}".rstrip(), *map(str, self.items)])


@dataclass(frozen=True)
class Continued:
    """A prepared continuation; `problems` are what strict loads refuse."""

    restore: Restore
    reports: tuple[GroupReport, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Wishes:
    """What the caller said about it: accepted by name, tolerated size, whether exact, whether slots may be rounded, and the
    schedule that stands beside the live optimizer.
    """

    accept: frozenset[str] = frozenset()
    tolerance: float | None = None
    exact: bool = False
    cast: bool = False
    schedule: Schedule | None = None


def prepare(
    checkpoint: Checkpoint, plan: Plan, adapter: Adapter, optimizer: Any, model: Any, captured: ModelCapture, wishes: Wishes
) -> Continued:
    """Everything that a live optimizer needs to go on, compared with what it is."""
    live = adapter.capture_optimizer(optimizer, captured)
    source = checkpoint.manifest.optimizer
    calls = 0
    if wishes.schedule is not None and source is not None:
        if (width := len(next(iter(wishes.schedule.rates())))) != len(live.groups):
            told = f"{width}, of {len(live.groups)} groups: leave it out, and call the schedulers to where the run is"
            problem = Problem("value", "scheduler", "groups", stored="all", live=told)
            return Continued(Restore(apply=lambda: optimizer), (), (problem,))
        if wishes.schedule.calls:
            told = f"called {wishes.schedule.calls} times already: pass a new one"
            problem = Problem("value", "scheduler", "calls", stored="none", live=told)
            return Continued(Restore(apply=lambda: optimizer), (), (problem,))
        live, calls = _followed(live, wishes.schedule, checkpoint.manifest, source)
    problems = list(_strangers(source, live))
    if problems or source is None:
        return Continued(Restore(apply=lambda: optimizer), (), tuple(problems))
    continued = _Work(checkpoint, source, plan, adapter, optimizer, model, captured, live, wishes).prepared()
    return (
        continued
        if wishes.schedule is None
        else replace(continued, restore=_advanced(continued.restore, wishes.schedule, calls))
    )


def _followed(
    live: OptimizerCapture, schedule: Schedule, manifest: schema.Manifest, source: schema.Optimizer
) -> tuple[OptimizerCapture, int]:
    """A live optimizer with the rates of a scheduler beside it, and how often that must be called to be where the run is.

    A scheduler is called at each update or at each epoch; the rate of the checkpoint tells which.
    """
    step = source.step if source.step is not None else manifest.progress.step or 0
    epoch, rate = manifest.progress.epoch, manifest.learning_rate
    stored = rate[0] if isinstance(rate, tuple) else rate
    per_call = [1]
    if epoch and step % epoch == 0 and step != epoch:
        per_call.append(step // epoch)
    ahead = step + (source.rates.updates[-1] if source.rates else 0)
    values = np.array(list(itertools.islice(schedule.rates(), ahead + 1)))
    chosen = next(
        (
            each
            for each in per_call
            if stored is not None
            and step // each < len(values)
            and math.isclose(values[step // each][0], schema.from_number(stored), rel_tol=1e-5)
        ),
        1,
    )

    def rates(steps: np.ndarray) -> np.ndarray:
        return np.asarray(values[np.minimum(steps // chosen, len(values) - 1)])

    settable = [each - {"learning_rate"} for each in live.settable]
    return replace(live, rates=rates, settable=settable), step // chosen


def _advanced(restore: Restore, schedule: Schedule, calls: int) -> Restore:
    def apply() -> Any:
        optimizer = restore.apply()
        schedule.advance(calls)
        return optimizer

    return replace(restore, apply=apply)


def _strangers(source: schema.Optimizer | None, live: OptimizerCapture) -> Iterator[Problem]:
    """Why the two have nothing to do with each other."""
    if source is None:
        yield Problem("missing", _SECTION, "(all of it; pass optimizer=False to load weights only)", live=live.type)
    elif CUSTOM in (there := _families(source)) | (here := _families(live)) or not source.groups or not live.groups:
        told = [f"{side.type} ({side.family})" for side in (source, live)]
        hint = "; pass tx= to save() and load() for a bare state of optax, which does not say what it is of"
        yield Problem("value", _SECTION, "family", stored=told[0], live=f"{told[1]}{hint}")
    elif not any(akin(one, other) for one in there for other in here):
        yield Problem("value", _SECTION, "family", stored=" and ".join(sorted(there)), live=" and ".join(sorted(here)))
    elif unknown := sorted((there | here) - updates.KNOWN):
        yield Problem("value", _SECTION, "family", stored=" and ".join(unknown), live="no formulas for it in this library")


def _families(described: schema.Optimizer | OptimizerCapture) -> set[str]:
    return {group.family or described.family for group in described.groups} or {described.family}


def _form(described: schema.Optimizer | OptimizerCapture, group: schema.ParameterGroup) -> Form:
    conventions = {**described.conventions, **group.conventions}
    return Form(group.family or described.family, conventions, _numbers(group.hyperparameters))


class _Work:
    """One continuation under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: schema.Optimizer,
        plan: Plan,
        adapter: Adapter,
        optimizer: Any,
        model: Any,
        captured: ModelCapture,
        live: OptimizerCapture,
        wishes: Wishes,
    ) -> None:
        self.checkpoint, self.source, self.plan = checkpoint, source, plan
        self.adapter, self.optimizer, self.live, self.wishes = adapter, optimizer, live, wishes
        self.live_model, self.model = model, captured
        self.made, _ = plan.moves()
        step = source.step if source.step is not None else checkpoint.manifest.progress.step
        self.step = step or 0
        self.stored = _by_meaning(checkpoint, source)
        self.group_of = {name: index for index, group in enumerate(source.groups) for name in group.parameters}
        self.problems: list[Problem] = []

    def prepared(self) -> Continued:
        groups, reports = [], []
        slots: dict[str, dict[str, StoredTensor]] = {}
        needs_step = any(slot.meaning == "step" for slot in self.source.slots.values())
        if needs_step and self.source.step is None:
            live = "one count for all: load what differs apart"
            self.problems.append(Problem("value", _SECTION, "step", stored="parameters of several steps", live=live))
        live_groups = list(self._live_groups())
        corrected = any(_form(self.live, group).choice("momentum") == "corrected_average" for group in live_groups)
        if corrected and self.source.step is None and self.checkpoint.manifest.progress.step is None:
            live = "corrected by it: pass step= to save()"
            self.problems.append(Problem("value", _SECTION, "step", stored="none", live=live))
        translated = [self._translated(index, group) for index, group in enumerate(live_groups)]
        # A formula of another framework is one for all groups.
        exact = self.wishes.exact and any(_falls_short(each) for several in translated for each in several.values())
        for index, group in enumerate(live_groups):
            continued, items = self._group(index, group, translated[index], exact, slots)
            groups.append(continued)
            label = f"group {index} of {len(self.live.groups)}" if len(self.live.groups) > 1 else "optimizer"
            parameters = f"{len(group.parameters)} parameter{'s' * (len(group.parameters) != 1)}"
            told = f"{label}: {self.source.type} -> {self.live.type}, step {self.step}, {parameters}"
            reports.append(GroupReport(told, tuple(items)))
        if beside := self._beside(slots):
            reports.append(GroupReport("beside the slots", tuple(beside)))
        continuation = Continuation(step=self.step, groups=groups, slots=slots)
        restore = self.adapter.continue_optimizer(self.optimizer, continuation, self.model, self.live_model)
        tensors = [tensor for each in slots.values() for tensor in each.values()]
        restore = replace(restore, tensors=[*restore.tensors, *tensors])
        return Continued(restore, tuple(reports), tuple(dict.fromkeys([*self.problems, *restore.problems])))

    def _scheduled(self, index: int, source: int) -> list[Item]:
        """What becomes of the schedule of the learning rate: its further values are compared one by one."""
        there, here = self.source.rates, self.live.rates
        values = [schema.from_number(each[source]) for each in there.values] if there else []
        varies = any(value != values[0] for value in values)
        if there is not None and here is not None:
            largest = max(map(abs, values))
            found = here(np.array(there.updates) + self.step)[:, index]
            for ahead, stored, live in zip(there.updates, values, found, strict=True):
                if not math.isclose(stored, live, rel_tol=1e-5, abs_tol=1e-6 * largest):
                    if "schedule" not in self.wishes.accept:
                        told = f"{live:g}: pass accept={{'schedule'}} to follow this one from here on"
                        problem = Problem(
                            "value",
                            _SECTION,
                            f"schedule of group {index} at step {self.step + ahead}",
                            stored=f"{stored:g}",
                            live=told,
                        )
                        self.problems.append(problem)
                    stored_text, live_text = (f"{rate:g} at step {self.step + ahead}" for rate in (stored, live))
                    return [Item("schedule", Exactness.APPROXIMATE, stored_text, live_text)]
            return [
                Item("schedule", Exactness.EXACT, f"{len(values)} rates up to step {self.step + there.updates[-1]}", "the same")
            ]
        if varies and there is not None:
            told = f"from {values[0]:g} to {values[-1]:g} in {there.updates[-1]} updates"
            return [Item("schedule", Exactness.DROPPED, told, "a rate that stays")]
        return [Item("schedule", Exactness.DEFAULT, "not told", "its own")] if here is not None and there is None else []

    def _beside(self, slots: dict[str, dict[str, StoredTensor]]) -> list[Item]:
        """Averages of the weights and gradients under way: what becomes of them; the averages are put into `slots`."""
        items = []
        averaged = [name for slot, entries in self.live.slots.items() for name in entries if self._is_average(slot)]
        if averaged or _AVERAGE in self.live.wrappers:
            names = averaged or [name for group in self.live.groups for name in group.parameters]
            for name in names:
                shape, dtype = self.plan.target.tensors[name]
                weight = Converted(name, dtype, shape, self.made[name], self.checkpoint.weights.stored)
                slots.setdefault(_AVERAGE, {})[name] = self._converted(_AVERAGE, name, shape, dtype) or weight
            if _AVERAGE not in self.stored:
                items.append(Item(_AVERAGE, Exactness.DEFAULT, "none", "the weights, from which it goes on"))
        elif _AVERAGE in self.stored:
            items.append(Item(_AVERAGE, Exactness.DROPPED, "one of each weight", "none"))
        under_way = self.stored.get("gradient_accumulator", {})
        if any(bool(tensor.numpy().any()) for tensor in under_way.values()):
            items.append(Item("gradient_accumulator", Exactness.DROPPED, "gradients of a window under way", "a window begins"))
        return items

    def _is_average(self, slot: str) -> bool:
        return self.live.meanings.get(slot) == _AVERAGE

    def _live_groups(self) -> Iterator[schema.ParameterGroup]:
        """The groups of the live optimizer with the learning rate that a schedule gives them at the step to come."""
        rates = self.live.rates(np.array([self.step]))[0] if self.live.rates else None
        for index, group in enumerate(self.live.groups):
            scheduled = {"learning_rate": float(rates[index])} if rates is not None else {}
            yield msgspec.structs.replace(group, hyperparameters={**group.hyperparameters, **scheduled})

    def _group(
        self,
        index: int,
        group: schema.ParameterGroup,
        translated: dict[int, Translated],
        exact: bool,
        slots: dict[str, dict[str, StoredTensor]],
    ) -> tuple[ContinuedGroup, list[Item]]:
        """How one live group goes on; its slots are put into `slots`. translated: by the group of the checkpoint."""
        if not translated:
            return ContinuedGroup(parameters=group.parameters, hyperparameters={}, conventions={}), []
        if exact:
            here = _form(self.live, group)
            translated = {each: self._untouched(each, here, found) for each, found in translated.items()}
        (source, first), *others = translated.items()
        for _, other in others:
            self._agree(index, first, other)
        items = self._scheduled(index, source)
        form = first.form if exact else None
        if form is not None:
            told = "as in the checkpoint, set up on request"
            stored = f"{form.family}, {_shown(form.hyperparameters)}"
            items.append(Item("continuation", Exactness.EXACT, stored, told))
        merged = replace(first, items=_worst([item for each in translated.values() for item in each.items]))
        self._judge(index, merged)
        items += merged.items
        missing = []
        for name in group.parameters:
            owner = self._owner(name)
            own = translated.get(self.group_of.get(owner or "", source))
            if not self._slots_of(name, owner if own else None, (own or first).form, own.slots if own else {}, slots):
                missing.append(name)
        if missing:
            self._incomplete(missing, items)
        held, choices = group.hyperparameters, self.live.choices[index]
        values = {
            name: value
            for name in sorted(self.live.settable[index] - STRUCTURAL)
            if (value := first.form.value(name)) is not None and value != held.get(name, UNUSED.get(name))
        }
        conventions = {
            name: choice
            for name, choice in first.form.conventions.items()
            if choice in choices.get(name, ()) and choice != _form(self.live, group).choice(name)
        }
        return ContinuedGroup(parameters=group.parameters, hyperparameters=values, conventions=conventions, form=form), items

    def _translated(self, index: int, group: schema.ParameterGroup) -> dict[int, Translated]:
        """What the groups of the checkpoint that a live one takes its parameters from become in it."""
        live = Live(_form(self.live, group), self.live.settable[index], self.live.choices[index], self.live.rates is not None)
        owners = [self._owner(name) for name in group.parameters]
        found = {}
        for each in sorted({self.group_of[owner] for owner in owners if owner in self.group_of}):
            source = self._source_form(each, live.form)
            if akin(source.family, live.form.family):
                translated = translate(source, live, self.step, self._samples(self.source.groups[each], live.form))
                if source.choice("scale") == "width" and (wrong := list(self._astray(group, each, live.form))):
                    here = "outputs by inputs, which are the other way round here"
                    item = Item("scale", Exactness.APPROXIMATE, ", ".join(wrong), here, math.inf)
                    translated = replace(translated, items=[*translated.items, item])
                found[each] = translated
            else:
                names = [
                    name for name, owner in zip(group.parameters, owners, strict=True) if self.group_of.get(owner or "") == each
                ]
                told = f"{live.form.family} for {', '.join(names)}"
                problem = Problem("value", _SECTION, f"family of group {index}", stored=source.family, live=told)
                self.problems.append(problem)
        return found

    def _astray(self, group: schema.ParameterGroup, source: int, live: Form) -> Iterator[str]:
        """Matrices that do not lie as other matrices of the two frameworks do to each other, as tables of embeddings do not."""
        turned = _form(self.source, self.source.groups[source]).choice("outputs") != live.choice("outputs")
        for name in group.parameters:
            shape, moves = self.plan.target.tensors[name][0], self.made.get(name, ())
            owner = self._owner(name)
            if len(shape) != 2 or shape[0] == shape[1] or len(moves) != 1 or self.group_of.get(owner or "") != source:
                continue
            if (_lies_in(moves[0].target, moves[0].sources[0], 0) == 1) != turned:
                yield name

    def _untouched(self, index: int, live: Form, translated: Translated) -> Translated:
        """A group that goes on by the formula of the checkpoint: what is left are what no formula of ours gives (the precision
        of another library), the learning rate and the clipping.
        """
        rate = [each for each in translated.differences if each.name == "learning_rate"]
        left = [item for item in translated.items if item.name in CLIPS or (item.name == "precision" and not item.remedy)]
        form = self._source_form(index, live)
        ours = {name: choice for name, choice in form.conventions.items() if name != "precision"}
        return Translated(replace(form, conventions=ours), {}, left, rate)

    def _source_form(self, index: int, live: Form) -> Form:
        """The form of a group of the checkpoint, over matrices that lie as they do here."""
        form = _form(self.source, self.source.groups[index])
        if not form.choice("outputs") or not live.choice("outputs"):
            return form
        return replace(form, conventions={**form.conventions, "outputs": live.choice("outputs")})

    def _agree(self, index: int, first: Translated, other: Translated) -> None:
        """One live group for several of the checkpoint: what they are set to must be the same."""
        for name in first.form.hyperparameters.keys() | other.form.hyperparameters.keys():
            one, two = first.form.value(name), other.form.value(name)
            if one != two and name not in self.wishes.accept:
                live = f"one group for all: make a group for each, or pass accept={{{name!r}}} to go on with {one}"
                problem = Problem("value", _SECTION, f"{name} of group {index}", stored=f"{one} and {two}", live=live)
                self.problems.append(problem)

    def _judge(self, index: int, translated: Translated) -> None:
        """What a strict load refuses of it."""
        tolerance = _TOLERANCE if self.wishes.tolerance is None else self.wishes.tolerance
        for item in translated.items:
            if item.size is not None and item.size > tolerance and item.name not in self.wishes.accept:
                way = f"{item.live}, which differs ({shown(item.size)}): "
                way += f"{item.remedy}, or " if item.remedy else ""
                live = f"{way}pass accept={{{item.name!r}}}"
                self.problems.append(Problem("value", _SECTION, f"{item.name} of group {index}", stored=item.stored, live=live))
        for each in translated.differences:
            if each.name not in self.wishes.accept:
                live = f"{each.live}, and it cannot be set: make the optimizer anew with it, or pass accept={{{each.name!r}}}"
                problem = Problem("value", _SECTION, f"{each.name} of group {index}", stored=str(each.stored), live=live)
                self.problems.append(problem)

    def _incomplete(self, missing: Sequence[str], items: list[Item]) -> None:
        """Parameters whose slots do not all come one by one from the checkpoint."""
        folded = [name for name in missing if name in self.made and self._is_folded(name, self._owner(name))]
        others = [name for name in missing if name not in folded]
        if folded:
            here = "another number of parameters for the same, which move at another pace"
            item = Item("folded", Exactness.APPROXIMATE, ", ".join(folded), here, math.inf)
            items.append(item)
            if "folded" not in self.wishes.accept:
                live = f"{here}: pass accept={{'folded'}}"
                self.problems.append(Problem("value", _SECTION, "folded", stored=item.stored, live=live))
        partial = [name for name in others if any(self._owner(name) in entries for entries in self.stored.values())]
        if partial and "slots" not in self.wishes.accept:
            live = "slots over other axes, or of another kind: pass accept={'slots'} to begin them anew"
            self.problems.append(Problem("value", _SECTION, "slots", stored=f"those of {', '.join(partial)}", live=live))
        if others:
            items.append(Item("slots", Exactness.DEFAULT, f"none of {', '.join(others)}", "as before the first update"))

    # Slots.

    def _owner(self, name: str) -> str | None:
        """The weight of the checkpoint that the slots of a live parameter come from."""
        sources = [piece.tensor for move in self.made.get(name, ()) for piece in move.sources[:1]]
        return self._stored_as(sources[0]) if sources else None

    def _stored_as(self, tensor: str) -> str:
        aliases = self.checkpoint.manifest.model.aliases
        if tensor in self.group_of:
            return tensor
        return next((other for other in _tied(aliases, tensor) if other in self.group_of), tensor)

    def _is_folded(self, name: str, owner: str | None) -> bool:
        """Whether a parameter does not go on as the one of the checkpoint alone does."""
        moves = self.made[name]
        if any(len(move.sources) != 1 or move.formula for move in moves):
            return True
        source = self.source.groups[self.group_of[owner]] if owner in self.group_of else None
        if source is None or (source.family or self.source.family) not in WHOLE:
            return False
        return len(moves) != 1 or bool(moves[0].target.pick or moves[0].sources[0].pick)

    def _slots_of(
        self,
        name: str,
        owner: str | None,
        form: Form,
        changes: Mapping[str, tuple[Affine, ...]],
        slots: dict[str, dict[str, StoredTensor]],
    ) -> bool:
        """Put the slots of a parameter into `slots`; whether all of them came one by one from the checkpoint."""
        shape, dtype = self.plan.target.tensors[name]
        whole = owner is not None and not self._is_folded(name, owner)
        for meaning, (size, first) in updates.slots_of(form, shape).items():
            tensor = None
            if meaning == "momentum_product":
                tensor = self._product(form, owner, dtype)
            elif owner is not None:
                tensor = self._converted(meaning, name, size, dtype) or self._derived(meaning, name, size, dtype)
            if tensor is None:
                whole = False
                value = first
                tensor = Made(name, dtype, size, lambda value=value: np.asarray(value))  # type: ignore[misc]
            for affine in changes.get(meaning, ()):
                before = tensor
                tensor = Made(name, dtype, size, lambda a=affine, b=before: a(b.numpy()), before)  # type: ignore[misc]
            slots.setdefault(meaning, {})[name] = tensor
        return whole

    def _product(self, form: Form, owner: str | None, dtype: str) -> StoredTensor:
        """NAdam's product: the checkpoint's, where the schedule is the same."""
        held = self.stored.get("momentum_product", {}).get(owner or "")
        source = self._source_form(self.group_of.get(owner or "", 0), form)
        if held is not None and updates.momentum_of(source, 1) == updates.momentum_of(form, 1):
            return held
        return Made("momentum_product", dtype, (), lambda: np.asarray(updates.momentum_product(form, self.step)))

    def _converted(self, meaning: str, name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor | None:
        """A slot by the moves of its parameter; None where the checkpoint has none."""
        moves = self.made[name]
        if meaning in AVERAGED:
            return self._averaged(meaning, name, moves, shape, dtype)
        entries = self.stored.get(meaning, {})
        linear = meaning in LINEAR
        taken: list[Move] = []
        found: dict[str, StoredTensor] = {}
        for move in moves:
            pieces = move.sources[:1]
            for piece in pieces:
                slot = entries.get(self._stored_as(piece.tensor))
                if slot is None:
                    return None
                found[piece.tensor] = slot
            taken.append(Move(_signed(move.target, linear), tuple(_signed(piece, linear) for piece in pieces)))
        self._check_type(meaning, name, found.values(), dtype)
        return Converted(name, dtype, shape, taken, found)

    def _derived(self, meaning: str, name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor | None:
        """A slot that the checkpoint has factored otherwise."""
        whole = self.plan.target.tensors[name][0]
        shapes = {"second_moment": whole, "row_second_moment": whole[:-1], "column_second_moment": (*whole[:-2], *whole[-1:])}
        sources = {each: self._converted(each, name, shapes[each], dtype) for each in updates.DERIVED.get(meaning, ())}
        if not sources or not len(whole) > 1 or None in sources.values():
            return None
        held = {each: tensor for each, tensor in sources.items() if tensor is not None}

        def compute() -> np.ndarray:
            wide = {each: tensor.numpy().astype(np.float64) for each, tensor in held.items()}
            return np.asarray(updates.slot_from(meaning, wide, np), lookup(dtype, name).numpy)

        return Made(name, dtype, shape, compute, *held.values())

    def _averaged(
        self, meaning: str, name: str, moves: Sequence[Move], shape: tuple[int, ...], dtype: str
    ) -> StoredTensor | None:
        """A slot that lacks an axis of its parameter: the one of the checkpoint that lacks the same."""
        if len(moves) != 1 or len(moves[0].sources) != 1 or len(shape) + 1 != len(self.plan.target.tensors[name][0]):
            return None
        target, source = moves[0].target, moves[0].sources[0]
        group = target.axes[AVERAGED[meaning]]
        place = next((index for index, each in enumerate(target.order) if each == group), None)
        if place is None or target.pick or source.pick:
            return None
        axis = next((index for index, each in enumerate(source.axes) if each == source.order[place]), None)
        if axis is None:
            return None
        there = next((each for each, at in AVERAGED.items() if at % len(source.axes) == axis), None)
        slot = self.stored.get(there or "", {}).get(self._stored_as(source.tensor))
        if slot is None:
            return None
        self._check_type(meaning, name, [slot], dtype)
        pair = _without(target, group), (_without(source, source.order[place]),)
        return Converted(name, dtype, shape, [Move(*pair)], {source.tensor: slot})

    def _check_type(self, meaning: str, name: str, sources: Any, dtype: str) -> None:
        for tensor in sources:
            if not self.wishes.cast and not widens(tensor.dtype, dtype):
                live = f"{dtype}; pass cast=True to round"
                self.problems.append(Problem("dtype", _SECTION, f"{meaning} of {name}", stored=str(tensor), live=live))

    # What tells how exact it is.

    def _samples(self, group: schema.ParameterGroup, live: Form) -> list[Sample]:
        """Parts of a few parameters of a group of the checkpoint with their slots, with matrices as they lie here."""
        turned = _form(self.source, group).choice("outputs") != live.choice("outputs")
        found: list[Sample] = []
        left = _SAMPLED
        for name in group.parameters:
            if name not in self.checkpoint.weights.stored or left <= 0:
                continue
            weight = self.checkpoint.weights.stored[name]
            box = _box(weight.shape, left)
            sample = {"w": weight.numpy()[box]}
            for meaning, entries in self.stored.items():
                if name in entries:
                    sample[meaning] = _part(meaning, entries[name].numpy(), weight.shape, box)
            left -= sample["w"].size
            found.append({meaning: part.T if turned else part for meaning, part in sample.items()})
        return found


def _falls_short(translated: Translated) -> bool:
    """Whether what a group goes on with is not exact, or only while its rate stays."""
    return any(item.size is not None or item.exactness == Exactness.CONSTANT_RATE for item in translated.items)


def _worst(items: Sequence[Item]) -> list[Item]:
    """One item of each name, of the largest size."""
    found: dict[str, Item] = {}
    for item in sorted(items, key=lambda item: item.size or 0.0):
        found[item.name] = item
    return list(found.values())


_SAMPLED = 1 << 16
_AVERAGE = "parameter_average"


def _by_meaning(checkpoint: Checkpoint, optimizer: schema.Optimizer) -> dict[str, dict[str, StoredTensor]]:
    """The slots of a checkpoint as meaning -> parameter -> tensor."""
    found: dict[str, dict[str, StoredTensor]] = {}
    weights, tensors = checkpoint.weights.stored, checkpoint.optimizer.stored
    for slot in optimizer.slots.values():
        for name, key in slot.tensors.items():
            if name in weights and slot.meaning not in (CUSTOM, "step"):
                shape = weights[name].shape
                meaning = factored(slot.meaning, shape)
                size, stored = math.prod(tensors[key].shape), tensors[key]
                # What is not used of a factored state is of another size.
                if meaning not in AVERAGED and size != math.prod(shape) and meaning != "momentum_product":
                    continue
                if meaning in AVERAGED and (len(shape) < 2 or size * shape[AVERAGED[meaning]] != math.prod(shape)):
                    continue
                found.setdefault(meaning, {})[name] = stored
    return found


def _tied(aliases: Mapping[str, str], tensor: str) -> Iterator[str]:
    owner = aliases.get(tensor, tensor)
    yield owner
    yield from (alias for alias, other in aliases.items() if other == owner)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: schema.from_number(value) if isinstance(value, schema.NonFinite) else value for name, value in values.items()}


def _signed(piece: Piece, linear: bool) -> Piece:
    return piece if linear or piece.sign > 0 else replace(piece, sign=1)


def _lies_in(target: Piece, source: Piece, axis: int) -> int | None:
    """The axis of `source` that `axis` of `target` begins in."""
    places = {name: place for place, group in enumerate(target.order) for name in group}
    place = next((places[name] for name in target.axes[axis] if name in places), None)
    there = source.order[place] if place is not None else ()
    return next((index for index, group in enumerate(source.axes) if set(group) & set(there)), None)


def _without(piece: Piece, group: tuple[str, ...]) -> Piece:
    """The piece of a tensor that lacks the axis `group`."""
    axes = tuple(each for each in piece.axes if each != group)
    order = tuple(each for each in piece.order if each != group)
    return replace(piece, axes=axes, order=order, sign=1)


def _box(shape: tuple[int, ...], elements: int) -> tuple[slice, ...]:
    """The first part of a tensor, of about so many elements."""
    largest = max(1, round(elements ** (1 / max(len(shape), 1))))
    return tuple(slice(0, max(largest, 1)) for _ in shape)


def _part(meaning: str, slot: np.ndarray, shape: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
    if meaning == "momentum_product":
        return slot
    if meaning in AVERAGED:
        axis = AVERAGED[meaning] % len(shape)
        left = [index for index in range(len(shape)) if index != axis]
        return slot.reshape([shape[index] for index in left])[tuple(box[index] for index in left)]
    return slot.reshape(shape)[box]


def _shown(values: Mapping[str, Any]) -> str:
    numbers = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in sorted(numbers.items()))
