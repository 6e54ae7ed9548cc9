"""What sections of the config are made of: numbers as they are typed, and no key that is not known."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def number(value: Any) -> Any:
    """A number as typed: ``1e3`` may stand for a whole one, and ``true`` for none."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def one_of(known: Collection[str]) -> AfterValidator:
    """Refuses other words, as a ``Literal`` of the known ones would, which may grow."""

    def check(word: str) -> str:
        if word not in known:
            raise PydanticCustomError("literal_error", "", {"expected": ", ".join(map(repr, known))})
        return word

    return AfterValidator(check)


Integer = Annotated[int, BeforeValidator(number)]
Number = Annotated[float, BeforeValidator(number)]
Positive = Annotated[Integer, Field(gt=0, lt=2**48)]
Count = Annotated[Integer, Field(ge=0, lt=2**48)]
Width = Annotated[Integer, Field(gt=0, le=2**16)]  # of what peft adds: a stranger's file cannot ask for any amount
Probability = Annotated[Number, Field(ge=0, lt=1)]
PositiveFloat = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, serialize_by_alias=True)
