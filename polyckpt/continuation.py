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
from polyckpt.converted import Converted
from polyckpt.errors import Problem
from polyckpt.moves import Exactness
from polyckpt.optimizers import CLIPS, CUSTOM, STRUCTURAL, UNUSED, akin
from polyckpt.plans import Plan
from polyckpt.slots import SECTION, Slots, form_of
from polyckpt.translation import Item, Live, Translated, shown, translate
from polyckpt.updates import Form

STOCK, EXACT = "stock", "exact"
"""What to pass as `continuation`: the optimizer follows its own formula, or that of the one in the checkpoint."""

ASPECTS = frozenset({"family", "scale", "precision", "rate", "schedule", "max_second_moment", "folded", "factored", "slots"})
"""What else than a hyperparameter can be accepted by name."""

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
        yield Problem("missing", SECTION, "(all of it; pass optimizer=False to load weights only)", live=live.type)
    elif CUSTOM in (there := _families(source)) | (here := _families(live)) or not source.groups or not live.groups:
        told = [f"{side.type} ({side.family})" for side in (source, live)]
        hint = "; pass tx= to save() and load() for a bare state of optax, which does not say what it is of"
        yield Problem("value", SECTION, "family", stored=told[0], live=f"{told[1]}{hint}")
    elif not any(akin(one, other) for one in there for other in here):
        yield Problem("value", SECTION, "family", stored=" and ".join(sorted(there)), live=" and ".join(sorted(here)))
    elif unknown := sorted((there | here) - updates.KNOWN):
        yield Problem("value", SECTION, "family", stored=" and ".join(unknown), live="no formulas for it in this library")


def _families(described: schema.Optimizer | OptimizerCapture) -> set[str]:
    return {group.family or described.family for group in described.groups} or {described.family}


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
        step = source.step if source.step is not None else checkpoint.manifest.progress.step
        self.step = step or 0
        self.problems: list[Problem] = []
        self.slots = Slots(checkpoint, source, plan, self.step, self.problems, cast=wishes.cast)

    def prepared(self) -> Continued:
        groups, reports = [], []
        slots: dict[str, dict[str, StoredTensor]] = {}
        needs_step = any(slot.meaning == "step" for slot in self.source.slots.values())
        if needs_step and self.source.step is None:
            live = "one count for all: load what differs apart"
            self.problems.append(Problem("value", SECTION, "step", stored="parameters of several steps", live=live))
        live_groups = list(self._live_groups())
        corrected = any(form_of(self.live, group).choice("momentum") == "corrected_average" for group in live_groups)
        if corrected and self.source.step is None and self.checkpoint.manifest.progress.step is None:
            live = "corrected by it: pass step= to save()"
            self.problems.append(Problem("value", SECTION, "step", stored="none", live=live))
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
                            SECTION,
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
                weight = Converted(name, dtype, shape, self.slots.made[name], self.checkpoint.weights.stored)
                slots.setdefault(_AVERAGE, {})[name] = self.slots.converted(_AVERAGE, name, shape, dtype) or weight
            if _AVERAGE not in self.slots.stored:
                items.append(Item(_AVERAGE, Exactness.DEFAULT, "none", "the weights, from which it goes on"))
        elif _AVERAGE in self.slots.stored:
            items.append(Item(_AVERAGE, Exactness.DROPPED, "one of each weight", "none"))
        under_way = self.slots.stored.get("gradient_accumulator", {})
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
            here = form_of(self.live, group)
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
            owner = self.slots.owner(name)
            own = translated.get(self.slots.group_of.get(owner or "", source))
            if not self.slots.fill(name, owner if own else None, (own or first).form, own.slots if own else {}, slots):
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
            if choice in choices.get(name, ()) and choice != form_of(self.live, group).choice(name)
        }
        return ContinuedGroup(parameters=group.parameters, hyperparameters=values, conventions=conventions, form=form), items

    def _translated(self, index: int, group: schema.ParameterGroup) -> dict[int, Translated]:
        """What the groups of the checkpoint that a live one takes its parameters from become in it."""
        live = Live(form_of(self.live, group), self.live.settable[index], self.live.choices[index], self.live.rates is not None)
        owners = [self.slots.owner(name) for name in group.parameters]
        found = {}
        for each in sorted({self.slots.group_of[owner] for owner in owners if owner in self.slots.group_of}):
            source = self.slots.source_form(each, live.form)
            if akin(source.family, live.form.family):
                translated = translate(source, live, self.step, self.slots.samples(self.source.groups[each], live.form))
                if source.choice("scale") == "width" and (wrong := list(self.slots.astray(group, each, live.form))):
                    here = "outputs by inputs, which are the other way round here"
                    item = Item("scale", Exactness.APPROXIMATE, ", ".join(wrong), here, math.inf)
                    translated = replace(translated, items=[*translated.items, item])
                found[each] = translated
            else:
                names = [
                    name
                    for name, owner in zip(group.parameters, owners, strict=True)
                    if self.slots.group_of.get(owner or "") == each
                ]
                told = f"{live.form.family} for {', '.join(names)}"
                problem = Problem("value", SECTION, f"family of group {index}", stored=source.family, live=told)
                self.problems.append(problem)
        return found

    def _untouched(self, index: int, live: Form, translated: Translated) -> Translated:
        """A group that goes on by the formula of the checkpoint: what is left are the learning rate, the clipping, and what no
        formula of ours gives (the precision of another library, matrices that lie otherwise).
        """
        rate = [each for each in translated.differences if each.name == "learning_rate"]
        hopeless = [item for item in translated.items if item.name in ("precision", "scale") and item.size and not item.remedy]
        left = [*hopeless, *(item for item in translated.items if item.name in CLIPS)]
        form = self.slots.source_form(index, live)
        ours = {name: choice for name, choice in form.conventions.items() if name != "precision"}
        return Translated(replace(form, conventions=ours), {}, left, rate)

    def _agree(self, index: int, first: Translated, other: Translated) -> None:
        """One live group for several of the checkpoint: what they are set to must be the same."""
        for name in first.form.hyperparameters.keys() | other.form.hyperparameters.keys():
            one, two = first.form.value(name), other.form.value(name)
            if one != two and name not in self.wishes.accept:
                live = f"one group for all: make a group for each, or pass accept={{{name!r}}} to go on with {one}"
                problem = Problem("value", SECTION, f"{name} of group {index}", stored=f"{one} and {two}", live=live)
                self.problems.append(problem)

    def _judge(self, index: int, translated: Translated) -> None:
        """What a strict load refuses of it."""
        tolerance = _TOLERANCE if self.wishes.tolerance is None else self.wishes.tolerance
        for item in translated.items:
            if item.size is not None and item.size > tolerance and item.name not in self.wishes.accept:
                way = f"{item.live}, which differs ({shown(item.size)}): "
                way += f"{item.remedy}, or " if item.remedy else ""
                live = f"{way}pass accept={{{item.name!r}}}"
                self.problems.append(Problem("value", SECTION, f"{item.name} of group {index}", stored=item.stored, live=live))
        for each in translated.differences:
            if each.name not in self.wishes.accept:
                live = f"{each.live}, and it cannot be set: make the optimizer anew with it, or pass accept={{{each.name!r}}}"
                problem = Problem("value", SECTION, f"{each.name} of group {index}", stored=str(each.stored), live=live)
                self.problems.append(problem)

    def _incomplete(self, missing: Sequence[str], items: list[Item]) -> None:
        """Parameters whose slots do not all come one by one from the checkpoint."""
        folded = [name for name in missing if name in self.slots.made and self.slots.is_folded(name, self.slots.owner(name))]
        others = [name for name in missing if name not in folded]
        if folded:
            here = "another number of parameters for the same, which move at another pace"
            item = Item("folded", Exactness.APPROXIMATE, ", ".join(folded), here, math.inf)
            items.append(item)
            if "folded" not in self.wishes.accept:
                live = f"{here}: pass accept={{'folded'}}"
                self.problems.append(Problem("value", SECTION, "folded", stored=item.stored, live=live))
        partial = [name for name in others if any(self.slots.owner(name) in entries for entries in self.slots.stored.values())]
        if partial and "slots" not in self.wishes.accept:
            live = "slots over other axes, or of another kind: pass accept={'slots'} to begin them anew"
            self.problems.append(Problem("value", SECTION, "slots", stored=f"those of {', '.join(partial)}", live=live))
        if others:
            items.append(Item("slots", Exactness.DEFAULT, f"none of {', '.join(others)}", "as before the first update"))


def _falls_short(translated: Translated) -> bool:
    """Whether what a group goes on with is not exact, or only while its rate stays."""
    return any(item.size is not None or item.exactness == Exactness.CONSTANT_RATE for item in translated.items)


def _worst(items: Sequence[Item]) -> list[Item]:
    """One item of each name, of the largest size."""
    found: dict[str, Item] = {}
    for item in sorted(items, key=lambda item: item.size or 0.0):
        found[item.name] = item
    return list(found.values())


_AVERAGE = "parameter_average"


def _shown(values: Mapping[str, Any]) -> str:
    numbers = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in sorted(numbers.items()))
