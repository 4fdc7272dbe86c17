"""A Keras optimizer that goes on by the formulas of another framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from polyckpt import updates
from polyckpt.updates import Form

_SETTINGS = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable("polyckpt")
class Continued(keras.optimizers.Optimizer):  # type: ignore[misc]
    """An optimizer of any family and convention of polyckpt.optimizers, as a continuation from another framework needs it.

    learning_rate: a float or a schedule, 0.001 by default. forms: what it computes, each as family, conventions and
    hyperparameters of polyckpt.optimizers (the weight decay among them takes the place of Keras's own) and a `rate_factor`, by
    which the learning rate is multiplied. of: which of the forms is that of each variable that it is built for, in their order;
    None where there is one for all. settings: those of every Keras optimizer. It is saved, loaded and compiled like any other.

    >>> momentum = {"family": "sgd", "conventions": {"momentum": "unscaled"}, "hyperparameters": {"momentum": 0.9}}
    >>> Continued(0.1, [{**momentum, "rate_factor": 1.0}]).get_config()["forms"][0]["family"]
    'sgd'
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        forms: Sequence[Mapping[str, Any]] = (),
        of: Sequence[int] | None = None,
        name: str = "continued",
        **settings: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **settings)
        self.forms = [dict(form) for form in forms]
        self.of = None if of is None else [int(index) for index in of]

    def index_of(self, index: int) -> int:
        """Which form is that of the variable with this index."""
        return 0 if self.of is None else self.of[index]

    def form_of(self, index: int) -> Form:
        """What is computed for the variable with this index."""
        told = self.forms[self.index_of(index)]
        return Form(told["family"], told["conventions"], told["hyperparameters"])

    @classmethod
    def instead_of(cls, optimizer: Any, forms: Sequence[Mapping[str, Any]], of: Sequence[int] | None) -> Continued:
        """One of these forms with the learning rate and the settings of `optimizer`."""
        settings = {name: getattr(optimizer, name) for name in _SETTINGS}
        rate = optimizer._learning_rate
        rate = rate if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else float(ops.convert_to_numpy(rate))
        return cls(rate, forms, of, **settings)

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        slots: dict[str, list[Any]] = {}
        for index, variable in enumerate(variables):
            for meaning, (shape, first) in updates.slots_of(self.form_of(index), tuple(variable.shape)).items():
                made = self.add_variable(
                    shape=shape, initializer=keras.initializers.Constant(first), dtype=variable.dtype, name=meaning
                )
                slots.setdefault(meaning, [None] * len(variables))[index] = made
        for meaning, each in slots.items():
            setattr(self, f"_{meaning}", each)
        self._meanings = list(slots)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        held = {meaning: getattr(self, f"_{meaning}")[index] for meaning in self._meanings}
        dtype = variable.dtype
        slots = {meaning: ops.convert_to_tensor(slot) for meaning, slot in held.items() if slot is not None}
        weight, new = updates.update(
            self.form_of(index),
            ops,
            ops.cast(gradient, dtype),
            ops.convert_to_tensor(variable),
            slots,
            ops.cast(self.iterations + 1, dtype),
            ops.cast(learning_rate, dtype) * self.forms[self.index_of(index)]["rate_factor"],
        )
        for meaning, value in new.items():
            self.assign(held[meaning], value)
        self.assign(variable, weight)

    def described(self) -> dict[str, Any]:
        """What the constructor takes beside settings."""
        # Keras puts containers of its own in the place of what is assigned.
        forms = [
            {**form, "conventions": dict(form["conventions"]), "hyperparameters": dict(form["hyperparameters"])}
            for form in self.forms
        ]
        return {"forms": forms, "of": None if self.of is None else list(self.of)}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.described()}
