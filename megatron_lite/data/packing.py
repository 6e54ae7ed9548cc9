"""Sequence packing: which whole conversations share a window, computed from their lengths alone.

Best-fit decreasing (Johnson 1974): the longest first, each into the fullest window that still has room. Conversations
of equal length are placed together (as in Krell et al. 2021), so that the cost grows with the window length and not
with the number of conversations. Equal lengths always give the same windows; epochs shuffle whole windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

CONVERSATIONS = "conversations"  # what the card of a dataset of them calls its content


def pack(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items of int64 ``sizes`` [n], each from 1 to ``capacity``, into windows of ``capacity``.

    Returns the items in window order, int64 [n], and the start of each window in that order, int64 [windows + 1].
    """
    by_size = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    window_of = np.empty(len(sizes), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # free space: windows with that much, as ranges of window numbers
    rooms: list[int] = []  # the keys of `room`, sorted
    num_windows = placed = 0

    def put_back(windows: np.ndarray, left: int) -> None:
        if left and len(windows):
            if left not in room:
                room[left] = []
                insort(rooms, left)
            room[left].append(windows)

    for size in np.flatnonzero(counts)[::-1].tolist():
        waiting = by_size[placed : placed + counts[size]]
        placed += len(waiting)
        while len(waiting) and (at := bisect_left(rooms, size)) < len(rooms):
            left = rooms[at]
            windows = room[left].pop()
            if not room[left]:
                del room[left], rooms[at]
            used = windows[: len(waiting)]
            window_of[waiting[: len(used)]] = used
            waiting = waiting[len(used) :]
            put_back(used, left - size)
            put_back(windows[len(used) :], left)
        if len(waiting):  # no window has room: open new ones, filled one after another
            each = capacity // size
            last = num_windows + (len(waiting) - 1) // each
            window_of[waiting] = num_windows + np.arange(len(waiting)) // each
            put_back(np.arange(num_windows, last), capacity - each * size)
            put_back(np.array([last]), capacity - (len(waiting) - (last - num_windows) * each) * size)
            num_windows = last + 1
    order = np.argsort(window_of, kind="stable")
    return order, np.concatenate(([0], np.cumsum(np.bincount(window_of, minlength=num_windows)))).astype(np.int64)
