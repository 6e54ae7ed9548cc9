"""The ``peft`` section: the fields of the method that ``peft.method`` names."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_lite.peft import METHODS
from megatron_lite.peft.method import PeftMethod

if TYPE_CHECKING:
    PeftConfig = PeftMethod
else:
    PeftConfig = Annotated[reduce(or_, METHODS.values()), Field(discriminator="method")]
