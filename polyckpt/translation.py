"""From the conventions of one optimizer to those of another: what becomes of hyperparameters and slots, and how exactly.

Two optimizers of one family compute the same but for conventions (`polyckpt.optimizers.CONVENTIONS`). Each aspect in which they
differ is one function here: from the form so far to the next, in which this aspect is the target's. How exact that is, is not
asserted but measured: both forms go on from the slots themselves (`deviation`), and what they compute is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyckpt import updates
from polyckpt.moves import Exactness
from polyckpt.optimizers import CLIPS, STRUCTURAL
from polyckpt.updates import MOMENTA, Form

Sample = Mapping[str, np.ndarray]
"""A part of one parameter: `w`, and its slots by meaning, as the checkpoint has them."""


@dataclass(frozen=True)
class Affine:
    """A slot of one convention from that of another: scale * slot + shift, but not less than `least`."""

    scale: float = 1.0
    shift: float = 0.0
    least: float = -math.inf

    def __call__(self, slot: np.ndarray) -> np.ndarray:
        """Exact where nothing but the sign changes, else in float64 inside."""
        if self in (Affine(), Affine(-1.0)):
            return slot if self.scale > 0 else -slot
        return np.maximum(slot.astype(np.float64) * self.scale + self.shift, self.least).astype(slot.dtype)


@dataclass(frozen=True)
class Item:
    """What becomes of one aspect of an optimizer.

    name: what `accept=` calls it. stored, live: the aspect in the checkpoint, and here. size: by how much what is computed
    differs, relative to the way that the weights go; None where nothing does, infinite where nobody can tell. remedy: what
    would make it exact.
    """

    name: str
    exactness: Exactness
    stored: str
    live: str
    size: float | None = None
    remedy: str = ""

    def __str__(self) -> str:
        size = "" if self.size is None else f", {shown(self.size)}"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.name}: {self.exactness}{size}: {self.stored} in the checkpoint, {self.live} here{remedy}"


def shown(size: float) -> str:
    """A size for people."""
    return f"{size:.1e} of the way that the weights go" if math.isfinite(size) else "by how much cannot be told"


@dataclass(frozen=True)
class Difference:
    """A hyperparameter that the live optimizer has otherwise and cannot be given."""

    name: str
    stored: Any
    live: Any


@dataclass(frozen=True)
class Live:
    """The form of a live optimizer, and what of it can be set.

    settable: hyperparameters. choices: conventions with what they can be set to. varies: whether its learning rate follows a
    schedule.
    """

    form: Form
    settable: frozenset[str] = frozenset()
    choices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    varies: bool = False


@dataclass(frozen=True)
class Change:
    """One aspect made the target's: the form after it, and what becomes of slots.

    stored, live, remedy: as in Item. rate: whether it takes a constant learning rate. quiet: whether it is worth no word where
    nothing differs. size: by how much it differs, where that cannot be measured on a part of a parameter.
    """

    name: str
    form: Form
    stored: str
    live: str
    slots: Mapping[str, Affine] = field(default_factory=dict)
    remedy: str = ""
    rate: bool = False
    quiet: bool = False
    size: float | None = None


@dataclass(frozen=True)
class Translated:
    """How a group goes on: the form that the live optimizer is to have, and what becomes of the slots of the checkpoint."""

    form: Form
    slots: Mapping[str, tuple[Affine, ...]]
    items: Sequence[Item]
    differences: Sequence[Difference]


def translate(source: Form, live: Live, step: int, samples: Sequence[Sample]) -> Translated:
    """What a group of the checkpoint becomes in a live optimizer of the same family after `step` updates."""
    form, items, differences = source, [], []
    slots: dict[str, tuple[Affine, ...]] = {}
    for aspect in _ASPECTS:
        change = aspect(form, live, step)
        if change is None:
            continue
        size = deviation(form, change.form, change.slots, step, samples) if change.size is None else change.size
        if size > _EXACT or not change.quiet:
            items.append(_item(change, size, live))
        samples = [_changed(sample, change, step) for sample in samples]
        for meaning, affine in change.slots.items():
            slots[meaning] = (*slots.get(meaning, ()), affine)
        form = change.form
    values = dict(form.hyperparameters)
    for name in sorted((values.keys() | live.form.hyperparameters.keys()) - _PAST):
        value, held = form.value(name), live.form.value(name)
        if (
            value is None
            or value == held
            or _same(value, held, _PRECISION.get(name, 1e-6))
            or (name in live.settable and name not in STRUCTURAL)
        ):
            continue
        differences.append(Difference(name, value, "none" if held is None else held))
    for name in sorted(CLIPS):
        value, held = source.value(name), live.form.value(name)
        if value != held and not (value and held and _same(value, held, 1e-6)):
            stored, here = (_UP_TO_THE_LOOP if each is None else f"{each:g}" for each in (value, held))
            items.append(Item(name, Exactness.DEFAULT, stored, here))
    return Translated(form, slots, items, differences)


_UP_TO_THE_LOOP = "none, unless the training loop does it,"

_PAST = {"initial_accumulator", *CLIPS}
"""What no longer matters once there are slots, or is told apart."""

_EXACT = 1e-12


def _item(change: Change, size: float, live: Live) -> Item:
    told = change.name, change.stored, change.live
    if size > _EXACT:
        return _told(told, Exactness.APPROXIMATE, size, change.remedy)
    if not change.rate:
        return _told(told, Exactness.HYPERPARAMETER)
    if live.varies:  # where it falls to nothing, all that the momentum still does is another
        return _told((told[0], told[1], f"{told[2]}, which follows a schedule"), Exactness.APPROXIMATE, 1.0, change.remedy)
    return _told(told, Exactness.CONSTANT_RATE, remedy=change.remedy)


def _told(told: tuple[str, str, str], exactness: Exactness, size: float | None = None, remedy: str = "") -> Item:
    name, stored, here = told
    return Item(name, exactness, stored, here, size, remedy)


_PRECISION = {"learning_rate": 1e-5}
"""How close a hyperparameter must be, relatively: libraries hold them in float32, and compute schedules in it."""


def _same(one: Any, other: Any, precision: float) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return bool(one == other)
    return math.isclose(one, other, rel_tol=precision, abs_tol=0.0)


def _with(form: Form, conventions: Mapping[str, str] | None = None, **values: Any) -> Form:
    return replace(
        form,
        conventions={**form.conventions, **(conventions or {})},
        hyperparameters={**form.hyperparameters, **values},
    )


# The aspects.


def _family(form: Form, live: Live, step: int) -> Change | None:
    if form.family == live.form.family:
        return None
    names = "momentum_schedule", "momentum_decay"
    conventions = {name: choice for name, choice in form.conventions.items() if name not in names}
    values = {name: value for name, value in form.hyperparameters.items() if name not in names}
    # What the formula of the live one has beside.
    conventions |= {name: choice for name, choice in live.form.conventions.items() if name in names}
    values |= {name: value for name, value in live.form.hyperparameters.items() if name in names}
    return Change("family", Form(live.form.family, conventions, values), form.family, live.form.family, remedy=_ON_REQUEST)


def _scale(form: Form, live: Live, step: int) -> Change | None:
    here, there = form.choice("scale"), live.form.choice("scale")
    if here != there and here not in live.choices.get("scale", ()):
        told = (_SCALES[here], _SCALES[there])
        after = _with(form, {"scale": there}, rms_rate=live.form.value("rms_rate"))
        return Change("scale", after, *told, remedy=_ON_REQUEST, size=math.inf)
    if here != "longer_axis":  # then the factor of it means nothing
        return Change("scale", _with(form, rms_rate=None), "", "", quiet=True) if form.value("rms_rate") else None
    stored, held = form.value("rms_rate"), live.form.value("rms_rate")
    if stored == held or "rms_rate" in live.settable:
        return None
    rate, decay = form.value("learning_rate") * stored / held, form.value("weight_decay") * held / stored
    after = _with(form, rms_rate=held, learning_rate=rate, weight_decay=decay)
    return Change("scale", after, f"{stored:g} * sqrt(longer axis)", f"{held:g} of it, with the learning rate {rate:g}")


_SCALES = {"width": "sqrt(outputs / inputs)", "longer_axis": "sqrt(longer axis)", "none": "none"}


def _precision(form: Form, live: Live, step: int) -> Change | None:
    here, there = form.choice("precision", "of_weights"), live.form.choice("precision", "of_weights")
    if here == there:
        return None
    remedy = _ON_REQUEST if here == "of_weights" else ""
    return Change("precision", _with(form, {"precision": there}), _PRECISIONS[here], _PRECISIONS[there], remedy=remedy)


_PRECISIONS = {"of_weights": "products of matrices in the type of the weights", "bfloat16": "in bfloat16"}


def _dampening(form: Form, live: Live, step: int) -> Change | None:
    share = form.value("dampening")
    if not share or "dampening" in live.form.hyperparameters:
        return None
    rate = form.value("learning_rate") * (1 - share)
    after, here = _with(form, learning_rate=rate, dampening=0.0), f"in the learning rate, which is {rate:g}"
    return Change("dampening", after, f"{share:g}", here, {"momentum": Affine(1 / (1 - share))})


def _rate_decay(form: Form, live: Live, step: int) -> Change | None:
    decay = form.value("learning_rate_decay")
    if not decay or "learning_rate_decay" in live.form.hyperparameters:
        return None
    whole = form.value("learning_rate")
    falls = f"{whole:g} / (1 + {decay:g} * step)"
    remedy = f"give it the schedule {falls}"
    after = _with(form, learning_rate=whole / (1 + step * decay), learning_rate_decay=0.0)
    return Change("learning_rate_decay", after, falls, "constant", remedy=remedy)


def _rate(form: Form, live: Live, step: int) -> Change | None:
    here, there = form.choice("rate", "as_given"), live.form.choice("rate", "as_given")
    if here == there:
        return None
    told = {"as_given": "as given", "bounded": "at most 1 / sqrt(step)"}
    remedy = "give it the schedule min(learning rate, 1 / sqrt(step + 1))" if there == "as_given" else ""
    return Change("rate", _with(form, {"rate": there}), told[here], told[there], remedy=remedy)


@dataclass(frozen=True)
class _Epsilon:
    """What stands in for an epsilon of another place: its value, and a slot that takes it up."""

    value: Callable[[float], float] = lambda epsilon: epsilon
    meaning: str = ""
    shift: Callable[[float], float] = lambda epsilon: 0.0


_EPSILONS: dict[tuple[str, str, str], _Epsilon] = {
    ("adagrad", "inside_sqrt", "outside_sqrt"): _Epsilon(lambda epsilon: 0.0, "squared_sum", lambda epsilon: epsilon),
    ("adagrad", "outside_sqrt", "inside_sqrt"): _Epsilon(lambda epsilon: epsilon**2),
    ("rmsprop", "outside_sqrt", "inside_sqrt"): _Epsilon(lambda epsilon: epsilon**2),
    ("adamax", "in_norm", "outside_sqrt"): _Epsilon(meaning="infinity_norm", shift=lambda epsilon: -epsilon),
    ("adamax", "outside_sqrt", "in_norm"): _Epsilon(meaning="infinity_norm", shift=lambda epsilon: epsilon),
    # Both only keep the estimate from zero, as long as gradients are larger than that.
    ("adafactor", "in_square", "as_bound"): _Epsilon(lambda epsilon: 1e-15),
    ("adafactor", "as_bound", "in_square"): _Epsilon(lambda epsilon: 1e-30),
}
"""(family, place in the checkpoint, place here) -> what stands in; elsewhere the same value does."""

_PLACES = {
    "outside_sqrt": "beside the root",
    "before_bias_correction": "beside the uncorrected root",
    "inside_sqrt": "under the root",
    "in_norm": "in the norm",
    "in_square": "in the square",
    "as_bound": "as a lower bound",
    "beside_norm": "beside the norm",
    "bound_of_norm": "as a lower bound of the norm",
}


def _epsilon(form: Form, live: Live, step: int) -> Change | None:
    here, there, stored = form.choice("epsilon"), live.form.choice("epsilon"), form.value("epsilon")
    if not here or not there or here == there or stored is None:
        return None
    stand_in = _EPSILONS.get((form.family, here, there), _Epsilon())
    slots = {stand_in.meaning: Affine(1.0, stand_in.shift(stored), 0.0)} if stand_in.meaning else {}
    held = live.form.value("epsilon")
    # What cannot be set stays as it is, and what that amounts to is measured.
    value = stand_in.value(stored) if "epsilon" in live.settable or held is None else held
    told = f"{stored:g} {_PLACES[here]}", f"{value:g} {_PLACES[there]}"
    return Change("epsilon", _with(form, {"epsilon": there}, epsilon=value), *told, slots, _ON_REQUEST)


_ON_REQUEST = 'exact with continuation="exact"'


def _weight_decay(form: Form, live: Live, step: int) -> Change | None:
    decay, here = form.value("weight_decay"), form.choice("weight_decay")
    there = live.form.choice("weight_decay")
    if not decay or here == there or here in live.choices.get("weight_decay", ()):
        return None
    if not there:
        there = next(iter(live.choices.get("weight_decay", ())), here)
    if there == here:
        return None  # a difference of values, if there is one
    after = _with(form, {"weight_decay": there})
    return Change("weight_decay", after, f"{decay:g} {_DECAYS[here]}", _DECAYS[there], remedy=_ON_REQUEST)


_DECAYS = {"coupled": "added to the gradient", "decoupled": "apart from it", "in_trust_ratio": "within the trust ratio"}


def _momentum(form: Form, live: Live, step: int) -> Change | None:
    choice = live.form.choice("momentum", "unscaled")
    if not form.value("momentum") or form.choice("momentum", "unscaled") == choice:
        return None
    here, there = MOMENTA[form.choice("momentum", "unscaled")], MOMENTA[choice]
    rate, power = form.value("learning_rate"), there[1] - here[1]
    scale = float(here[0] * there[0]) * (1 - form.value("momentum")) ** (there[2] - here[2])
    stored, holds = (_HOLDS[bool(side[1])] for side in (here, there))
    after = _with(form, {"momentum": choice})
    if not power:
        told = stored, f"{holds}, scaled by {scale:g}"
        return Change("momentum", after, *told, {"momentum": Affine(scale)}, _ON_REQUEST)
    if not rate:
        holds = f"{holds}, which a learning rate of zero does not tell: it starts anew"
        return Change("momentum", after, stored, holds, {"momentum": Affine(0.0)}, _ON_REQUEST, rate=True)
    slots = {"momentum": Affine(scale * rate**power)}
    remedy = f"where the rate changes later, {_ON_REQUEST}"
    return Change("momentum", after, stored, f"{holds}, scaled by the learning rate {rate:g}", slots, remedy, rate=True)


_HOLDS = {False: "a sum of gradients", True: "a sum of updates"}


def _maximum(form: Form, live: Live, step: int) -> Change | None:
    here, there = form.choice("max_second_moment", "raw"), live.form.choice("max_second_moment", "raw")
    if not form.value("amsgrad") or here == there:
        return None
    correction = 1 - form.value("beta2") ** max(step, 1)
    told = {"raw": "of the second moment", "bias_corrected": "of the bias-corrected second moment"}
    scale = correction if here == "bias_corrected" else 1 / correction
    after = _with(form, {"max_second_moment": there})
    return Change("max_second_moment", after, told[here], told[there], {"max_second_moment": Affine(scale)}, _ON_REQUEST)


def _schedule(form: Form, live: Live, step: int) -> Change | None:
    if form.family != "nadam":
        return None
    here, there = (_decay_of(each) for each in (form, live.form))
    choice = live.form.choice("momentum_schedule")
    if here == there:
        return None
    if "momentum_decay" in live.settable and choice == "decaying":
        there = min(here, _CONSTANT)
    stored, held = ("none" if each >= _CONSTANT else f"{each:g}" for each in (here, there))
    after = _with(form, {"momentum_schedule": choice}, momentum_decay=there if choice == "decaying" else None)
    return Change("momentum_decay", after, stored, held, {}, _ON_REQUEST)


_CONSTANT = 1e6
"""0.96 to this power is zero."""


def _decay_of(form: Form) -> float:
    return _CONSTANT if form.choice("momentum_schedule") == "constant" else float(form.value("momentum_decay"))


def _factored(form: Form, live: Live, step: int) -> Change | None:
    here, there = (each.value("factored_from") for each in (form, live.form))
    if form.family != "adafactor" or here == there:
        return None
    stored, held = (f"from axes of {each:g} on" for each in (here, there))
    return Change("factored", _with(form, factored_from=there), stored, held, remedy=_ON_REQUEST, quiet=True)


_ASPECTS = (
    _family,
    _scale,
    _precision,
    _factored,
    _dampening,
    _rate_decay,
    _rate,
    _schedule,
    _epsilon,
    _weight_decay,
    _momentum,
    _maximum,
)


# By how much two forms differ.

_STEPS = 10
_MARGIN = 3.0


def deviation(one: Form, other: Form, slots: Mapping[str, Affine], step: int, samples: Sequence[Sample]) -> float:
    """By how much the ways of a parameter differ under two forms that go on from the same slots, relative to its way.

    Followed over a few updates with random gradients of the size that the slots tell, times a margin, since the true ones are
    others. Zero without samples.
    """
    if one.family != "muon":
        return _followed(one, other, slots, step, samples, of_momentum=False)
    # What has few directions, as gradients late in training do, is where the rest of the directions are rounding alone.
    return max(_followed(one, other, slots, step, samples, of_momentum=each) for each in (False, True))


def _followed(
    one: Form, other: Form, slots: Mapping[str, Affine], step: int, samples: Sequence[Sample], *, of_momentum: bool
) -> float:
    """of_momentum: whether gradients have the directions of the momentum, and only their length and sign are random."""
    random = np.random.default_rng(0)
    states = []
    for sample in samples:
        wide = {name: array.astype(np.float64) for name, array in sample.items()}
        changed = {name: slots[name](wide[name]) if name in slots else wide[name] for name in wide}
        states.append((_size(one, wide, step), wide["w"], _begun(one, wide, step), changed["w"], _begun(other, changed, step)))
    worst = 0.0
    with np.errstate(all="ignore"):
        for t in range(step + 1, step + 1 + _STEPS):
            apart = way = 0.0
            for index, (size, w, held, v, kept) in enumerate(states):
                g = size * random.standard_normal(w.shape)
                if of_momentum:
                    g = samples[index]["momentum"] * random.standard_normal()
                w, held = updates.update(one, np, g, w, held, t, one.value("learning_rate"))
                v, kept = updates.update(other, np, g, v, kept, t, other.value("learning_rate"))
                states[index] = (size, w, held, v, kept)
                start = samples[index]["w"].astype(np.float64)
                apart = max(apart, _largest(w - v))
                way = max(way, _largest(w - start))
            worst = max(worst, apart / way if way else 0.0)
    # What differs by rounding alone adds up by chance.
    chance = 2.0 if one.choice("precision") != other.choice("precision") else 1.0
    return worst if worst <= _EXACT else _MARGIN * chance * worst


def _largest(array: np.ndarray) -> float:
    if not array.size:
        return 0.0
    largest = float(np.abs(array).max())
    return largest if math.isfinite(largest) else math.inf


def _begun(form: Form, sample: Sample, step: int) -> dict[str, np.ndarray]:
    """The slots of a sample that `form` has, with what a formula gives."""
    begun = {}
    for meaning, (shape, first) in updates.slots_of(form, sample["w"].shape).items():
        if meaning not in sample and meaning in updates.DERIVED and updates.DERIVED[meaning] <= sample.keys():
            begun[meaning] = updates.slot_from(meaning, sample, np)
        else:
            begun[meaning] = sample.get(meaning, np.full(shape, first))
    if "momentum_product" in begun:
        begun["momentum_product"] = np.asarray(updates.momentum_product(form, step))
    return begun


def _changed(sample: Sample, change: Change, step: int) -> Sample:
    return {name: change.slots[name](array) if name in change.slots else array for name, array in sample.items()}


def _size(form: Form, sample: Sample, step: int) -> np.ndarray:
    """How large the gradients of each element are, as far as slots tell."""
    count = max(step, 1)
    if "second_moment" in sample:
        decay = form.value("beta2") or form.value("rho") or 0.0
        correction = 1 - decay**count if form.value("beta2") else 1.0
        size = np.sqrt(np.maximum(sample["second_moment"], 0) / correction)
    elif "row_second_moment" in sample:
        rows, columns = sample["row_second_moment"], sample["column_second_moment"]
        size = np.sqrt(rows[..., None] * columns[..., None, :] / np.maximum(rows.mean(-1)[..., None, None], 1e-300))
    elif "infinity_norm" in sample:
        size = np.abs(sample["infinity_norm"])
    elif "squared_sum" in sample:
        size = np.sqrt(np.maximum(sample["squared_sum"], 0) / count)
    elif "first_moment" in sample:
        size = np.abs(sample["first_moment"])
    elif "momentum" in sample:
        _, power, averaged = MOMENTA[form.choice("momentum", "unscaled")]
        size = np.abs(sample["momentum"]) / ((form.value("learning_rate") or 1.0) if power else 1.0)
        size = size if averaged else size * (1 - form.value("momentum"))  # what a constant gradient adds up to
    else:
        return np.ones(sample["w"].shape)
    return np.broadcast_to(size, sample["w"].shape) if size.any() else np.full(sample["w"].shape, 1e-2)
