"""Llama-type decoders whose feed-forward layers have elastic widths, and the models cut from them.

::

    one checkpoint ──at(widths)──> prefixes work ──cut(widths)──> a smaller Llama, bit for bit
                                                └─export────────> its folder, for transformers
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from isthmus.errors import UnsupportedModelError
from isthmus.models.hub import no_progress_bars
from isthmus.nn.elastic import Axis, elastic, extract, make_elastic


class ElasticDecoder:
    """Widths of the feed-forward layers of a decoder.

    Args:
        module: A Llama-type model of transformers; its feed-forwards become elastic in place,
            names and numbers stay.

    Attributes:
        module: The model.
        axes: One axis a layer: gate and up write it, down reads it.

    Raises:
        UnsupportedModelError: Its layers have no ``mlp.{gate,up,down}_proj``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        try:
            size, count = module.config.intermediate_size, module.config.num_hidden_layers
            mlps = [f"{module.base_model_prefix}.layers.{i}.mlp" for i in range(count)]
            self.axes = tuple(
                Axis(size, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (f"{mlp}.down_proj",))
                for mlp in mlps
            )
            make_elastic(module, self.axes)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no feed-forward of the Llama kind ({error})"
            ) from error

    def each(self, widths: int | Sequence[int]) -> tuple[int, ...]:
        """One width for each layer, from one for all or from one for each."""
        return (widths,) * len(self.axes) if isinstance(widths, int) else tuple(widths)

    def at(self, widths: int | Sequence[int]) -> AbstractContextManager[None]:
        """Let prefixes work as long as the context lasts.

        Raises:
            InvalidInputError: A width is out of range, or there is not one for each layer.
        """
        return elastic(self.module, self.axes, self.each(widths))

    def cut(self, widths: int | Sequence[int]) -> Any:
        """A smaller model with weights of its own, bit for bit what the prefixes compute.

        Args:
            widths: Of all layers, or of each. Layers of one width are an ordinary Llama in every
                respect; those of several widths decode here, but no config tells of them.

        Raises:
            InvalidInputError: As for :meth:`at`.

        Returns:
            The model, in eval mode.
        """
        each = self.each(widths)
        model: Any = extract(self.module, self.axes, each)
        model.config.intermediate_size = max(each)
        return model.eval()

    def export(self, widths: int | Sequence[int], folder: str | Path) -> None:
        """Write a smaller model as a checkpoint that transformers loads.

        Layers narrower than the widest are filled up with units of weight zero, which change
        nothing but gain nothing either: the widest layer decides the size of such a file.

        Raises:
            InvalidInputError: As for :meth:`at`.
        """
        each = self.each(widths)
        with self.at(each):  # refuses what cannot be cut
            model = self.cut(max(each))
        for axis, width in zip(self.axes, each, strict=True):
            for path in axis.writers:
                model.get_submodule(path).weight.data[width:] = 0
            for path in axis.readers:
                model.get_submodule(path).weight.data[:, width:] = 0
        with no_progress_bars():
            model.save_pretrained(folder)
