"""Base of the codecs whose entropy model is a hyperprior, frozen into whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.codecs.base import TrainedCodec
from isthmus.codecs.entropy import HyperCoder
from isthmus.models.transform_codec import TransformCodec
from isthmus.training.system import WEIGHTS

_TABLES = "tables."


class HyperpriorCodec(TrainedCodec):
    """A codec around a :class:`~isthmus.models.transform_codec.TransformCodec`.

    Its file holds the weights, and the integers that were frozen from them: every machine decodes
    by these. Settings have ``width``, ``latents`` and ``stages``.
    """

    module: TransformCodec
    _coder: HyperCoder | None = None

    @property
    def coder(self) -> HyperCoder:
        """The entropy model in integers, frozen when it is first needed."""
        if self._coder is None:
            self._coder = HyperCoder.freeze(self.module.law)
        return self._coder

    def write_files(self, folder: Path) -> None:
        """Weights, and the integers that were frozen from them."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}
        weights |= {_TABLES + k: v.contiguous() for k, v in self.coder.tensors().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def read_files(cls, settings: Any, folder: Path) -> Self:
        """A codec with the weights and integers of a folder."""
        made, stored = cls(settings), load_file(folder / WEIGHTS)
        tables = {k: stored.pop(k) for k in list(stored) if k.startswith(_TABLES)}
        made.module.load_state_dict(stored)
        made.module.eval()
        made._coder = HyperCoder.of({k.removeprefix(_TABLES): v for k, v in tables.items()})
        return made

    def decode_config(self) -> dict[str, Any]:
        """What a decoder is built from."""
        told = asdict(self.settings)
        return {name: told[name] for name in ("width", "latents", "stages")}

    def decode_tensors(self) -> Mapping[str, Tensor]:
        """g_s, and the integers of the entropy model: g_a and h_a may learn anew."""
        kept = {k: v for k, v in self.module.state_dict().items() if k.startswith("g_s.")}
        return kept | self.coder.tensors()
