"""Work that is spread over the machines of a Ray cluster, with Ray Data.

Items and results travel as JSON, so they are plain data; what does the work is made once in each
worker.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from isthmus.errors import require

Work = Callable[[list[Any]], Iterable[Any]]
"""Gives results, in any number and order, for some items."""


class _Worker:
    """A process of the cluster."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.work = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Work on one block."""
        found = self.work([json.loads(item) for item in batch["item"]])
        return {"found": [json.dumps(result) for result in found]}


def spread(
    make: Callable[[], Work],
    items: Sequence[Any],
    *,
    block: int,
    workers: int = 0,
    each: str = "machine",
) -> Iterator[Any]:
    """Work on items in the cluster at ``RAY_ADDRESS``, or in one on this machine.

    Args:
        make: Makes what does the work, in a worker.
        items: Plain data, at least one.
        block: Items that a worker gets at once, at most.
        workers: Workers; by default one for each GPU, or else one for ``each``.
        each: ``"machine"`` for work that uses all cores, ``"core"`` for work that uses one and no
            GPU.

    Yields:
        Results, in blocks as workers finish them.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    ray = require("ray", "scale")
    data = require("ray.data", "scale")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    resources = ray.cluster_resources()
    cores = max(1, int(resources.get("CPU", 1)))
    gpus = int(resources.get("GPU", 0)) if each == "machine" else 0
    places = gpus or (cores if each == "core" else sum(node["Alive"] for node in ray.nodes()))
    workers = min(workers or places, len(items))
    block = min(block, math.ceil(len(items) / workers))
    data.DataContext.get_current().enable_progress_bars = False
    blocks = data.from_items(
        [{"item": json.dumps(item)} for item in items],
        override_num_blocks=math.ceil(len(items) / block),
    )
    done = blocks.map_batches(
        _Worker,
        fn_constructor_args=(make,),
        batch_size=None,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=max(1, cores // workers),
        num_gpus=min(1.0, gpus / workers) if gpus else 0,
    )
    for row in done.iter_rows():
        yield json.loads(row["found"])
