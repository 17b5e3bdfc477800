"""
Why baseline and method take turns
==================================

A machine changes its speed while one measures: it warms up, other programs come and go. Timing the
baseline first and the method afterwards puts that change into the result. The ruler of isthmus lets
them take turns and compares pair by pair.

The clock below belongs to an imaginary machine that slows down by one per cent for every second
that has passed. Two pieces of work take turns on it whose true ratio is exactly 2.
"""

import statistics

import matplotlib.pyplot as plt

from isthmus.claims import Ruler, Timing, ratio


class TiringMachine:
    """A machine whose work takes longer the longer it has been running."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds * (1 + 0.01 * self.now_s)


# %%
# One after the other: all runs of the baseline, then all runs of the method.

REPEATS = 12


def one_after_the_other() -> dict[str, Timing]:
    machine = TiringMachine()
    ruler = Ruler(clock=machine.clock)
    timings = {}
    for name, seconds in (("baseline", 2.0), ("ours", 1.0)):
        timings |= ruler.compare(
            {name: lambda seconds=seconds: machine.work(seconds)}, repeats=REPEATS, warmup=0
        )
    return timings


# %%
# Taking turns: both in each repeat, the order rotating.


def taking_turns() -> dict[str, Timing]:
    machine = TiringMachine()
    return Ruler(clock=machine.clock).compare(
        {"baseline": lambda: machine.work(2.0), "ours": lambda: machine.work(1.0)},
        repeats=REPEATS,
        warmup=0,
    )


# %%
# The true speed-up is 2. The first way reports much less, because the method had to run on the
# tired machine; the second is right to within a few per cent in every pair.

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for ax, (title, timings) in zip(
    axes,
    {"one after the other": one_after_the_other(), "taking turns": taking_turns()}.items(),
    strict=True,
):
    pairs = zip(timings["baseline"].samples_s, timings["ours"].samples_s, strict=True)
    ratios = [baseline / ours for baseline, ours in pairs]
    ax.axhline(2.0, color="0.7", label="true ratio")
    ax.plot(range(1, REPEATS + 1), ratios, "o", label="each pair")
    ax.axhline(statistics.median(ratios), linestyle="--", label="median")
    ax.set(title=f"{title}: {ratio(timings['baseline'], timings['ours'])}", xlabel="repeat")
axes[0].set(ylabel="baseline / ours", ylim=(0.0, 2.5))
axes[0].legend(loc="lower right")
plt.show()
