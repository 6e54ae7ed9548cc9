"""What is to be predicted from what, in one stretch of text."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron_lite.data.batch import IGNORED


class Objective(Protocol):
    """Turns tokens into inputs and targets.

    ``extra``: how many tokens more than places a stretch needs; with one, targets lie a token ahead.
    """

    extra: int

    def __call__(self, tokens: np.ndarray, trained: np.ndarray | None, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, [places] each, of tokens [places + extra]; a target of ``IGNORED`` where there is none.

        ``trained``: bool, the tokens that are trained on; None: all. ``position``: of the sample in the run, the only
        thing beside the tokens that random choices may depend on.
        """
        ...


class NextToken:
    """Causal language modelling: the target of a place is the token after it, where that is trained on."""

    extra = 1

    def __call__(self, tokens: np.ndarray, trained: np.ndarray | None, position: int) -> tuple[np.ndarray, np.ndarray]:
        targets = tokens[1:]
        if trained is not None:
            targets = np.where(trained[1:], targets.astype(np.int64), IGNORED)
        return tokens[:-1], targets


NEXT_TOKEN = NextToken()
