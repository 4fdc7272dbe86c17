"""A Keras optimizer that goes on by the formulas of another framework."""

from __future__ import annotations

from dataclasses import replace
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

    learning_rate: a float or a schedule, 0.001 by default. family, conventions, hyperparameters: as in polyckpt.optimizers; the
    weight decay among them takes the place of Keras's own. decays: that of each variable that it is built for, in their order,
    where they differ. settings: those of every Keras optimizer. It is saved, loaded and
    compiled like any other.

    >>> Continued(0.1, "sgd", {"momentum": "unscaled"}, {"momentum": 0.9}).get_config()["family"]
    'sgd'
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        family: str = "sgd",
        conventions: dict[str, str] | None = None,
        hyperparameters: dict[str, Any] | None = None,
        decays: list[float] | None = None,
        name: str = "continued",
        **settings: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **settings)
        self.form = Form(family, dict(conventions or {}), dict(hyperparameters or {}))
        self.decays = None if decays is None else [float(decay) for decay in decays]

    def form_of(self, index: int) -> Form:
        """What is computed for the variable with this index."""
        if self.decays is None:
            return self.form
        return replace(self.form, hyperparameters={**self.form.hyperparameters, "weight_decay": self.decays[index]})

    @classmethod
    def instead_of(cls, optimizer: Any, form: Form, decays: list[float] | None = None) -> Continued:
        """One of this form with the learning rate and the settings of `optimizer`."""
        settings = {name: getattr(optimizer, name) for name in _SETTINGS}
        values = {name: value for name, value in form.hyperparameters.items() if name != "learning_rate"}
        rate = optimizer._learning_rate
        rate = rate if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else float(ops.convert_to_numpy(rate))
        return cls(rate, form.family, dict(form.conventions), values, decays, **settings)

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        slots: dict[str, list[Any]] = {}
        for variable in variables:
            for meaning, (shape, first) in updates.slots_of(self.form, tuple(variable.shape)).items():
                made = self.add_variable(
                    shape=shape, initializer=keras.initializers.Constant(first), dtype=variable.dtype, name=meaning
                )
                slots.setdefault(meaning, [None] * len(variables))[self._get_variable_index(variable)] = made
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
            ops.cast(learning_rate, dtype),
        )
        for meaning, value in new.items():
            self.assign(held[meaning], value)
        self.assign(variable, weight)

    def described(self) -> dict[str, Any]:
        """Family, conventions and hyperparameters, as the constructor takes them."""
        form = self.form
        return {
            "family": form.family,
            "conventions": dict(form.conventions),
            "hyperparameters": dict(form.hyperparameters),
            "decays": None if self.decays is None else list(self.decays),
        }

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.described()}
