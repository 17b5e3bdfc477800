"""Networks that are trained on rendered scenes: a target that looks, drafters that mostly do not.

The target is a LLaVA of transformers with a small vision transformer; one drafter reads only the
text, the other is a smaller LLaVA with next to no vision: an image adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from isthmus.decoding.target import HubTarget
from isthmus.workbench import scenes
from isthmus.workbench._training import IGNORED, Recipe, build
from isthmus.workbench.courses import made


@dataclass(frozen=True)
class SceneRecipe(Recipe):
    """A network that is trained on scenes.

    Attributes:
        vision_size: Width of the vision transformer; 0 makes a model that reads text only.
        vision_layers: Its layers.
        naming: Weight of the loss on what image features name.
    """

    vision_size: int = 0
    vision_layers: int = 1
    naming: float = 1.0


class SceneCourse:
    """Prompts with or without images, and a loss on the answers.

    Image features also learn to name what their quarter shows, through the embeddings of the
    words. That stands in for the pre-training that the image encoders of large models come with.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: SceneRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = scenes.tokenizer()
        self.end, self.image = 0, 1

    def build(self) -> Any:
        """A Llama, or a LLaVA around one, with fresh weights."""
        recipe = self.recipe
        text = build(recipe, token_id=self.end)
        if not recipe.vision_size:
            return text
        vision = CLIPVisionConfig(
            hidden_size=recipe.vision_size,
            intermediate_size=2 * recipe.vision_size,
            num_hidden_layers=recipe.vision_layers,
            num_attention_heads=recipe.vision_size // 32,
            image_size=scenes.SIDE,
            patch_size=scenes.PATCH,
            projection_dim=recipe.vision_size,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text.config,
            image_token_index=self.image,
            image_seq_length=scenes.FEATURES,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # transformers draws its weights from here
            model = LlavaForConditionalGeneration(config)
        model.model.language_model.load_state_dict(text.model.state_dict())
        model.tie_weights()
        model.generation_config.eos_token_id = self.end
        model.generation_config.pad_token_id = self.end
        return model

    def batches(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Tokens, labels [B, T], images [B, 3, 32, 32] and names [B, 4, 5] of each step."""
        for step in itertools.count(start):
            seed = f"{self.recipe.seed}/{step}"
            yield self.collate(scenes.examples(self.recipe.batch_size, "train", seed))

    def collate(self, drawn: Sequence[scenes.Example]) -> tuple[Tensor, ...]:
        """The tensors of some examples; see :meth:`batches`."""
        ids, labels = [], []
        for each in drawn:
            before = self.prompt(each)
            after = [*self.encode(each.answer), self.end]
            ids.append(torch.tensor([*before, *after[:-1]]))
            labels.append(torch.tensor([IGNORED] * (len(before) - 1) + after))
        return (
            pad_sequence(ids, batch_first=True, padding_value=self.end),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            scenes.pictures(drawn),
            torch.tensor([self.names(each) for each in drawn]),
        )

    def names(self, example: scenes.Example) -> list[list[int]]:
        """Size, colour and shape that each quarter shows, and where it is, as token ids."""
        shown = ["empty empty empty"] * scenes.FEATURES
        for thing in example.scene:
            shown[thing.place] = thing.full
        return [
            self.encode(f"{text} {' '.join(place)}")
            for text, place in zip(shown, scenes.PLACES, strict=True)
        ]

    def prompt(self, example: scenes.Example) -> list[int]:
        """Token ids of a prompt; placeholders come first where the network reads images."""
        seen = [self.image] * scenes.FEATURES if self.recipe.vision_size else []
        return [*seen, *self.encode(example.prompt)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Mean nats per word of the answers, and of the names where there are image features."""
        ids, labels, images, names = batch
        given = {"pixel_values": images} if self.recipe.vision_size else {}
        out = model(input_ids=ids, use_cache=False, **given)
        told = F.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten())
        if not given:
            return told
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        seen = getattr(out, "image_outputs", None)  # since transformers 5.24
        images = out.image_hidden_states if seen is None else torch.cat(list(seen.pooler_output))
        named = torch.log_softmax(head(images).float(), -1)  # [B 4, V]
        return told - self.recipe.naming * named.gather(1, names.flatten(0, 1)).mean()


_SIZES = {"head_dim": 32, "vocab_size": len(scenes.words()), "max_position_embeddings": 160}
_DRAFT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 176,
    "batch_size": 32,
    "steps": 600,
    "decay_share": 0.5,
    **_SIZES,
}
NETWORKS = {
    recipe.name: recipe
    for recipe in (
        SceneRecipe(
            name="scenes-target",
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=256,
            vision_size=64,
            vision_layers=2,
            batch_size=32,
            steps=600,
            decay_share=0.5,
            **_SIZES,
        ),
        SceneRecipe(name="scenes-text", **_DRAFT),
        SceneRecipe(name="scenes-adapter", vision_size=32, **_DRAFT),
    )
}
"""The networks by name: the target, the drafter of text, and the one with an image adapter."""


def network(recipe: SceneRecipe) -> Path:
    """Folder of a network, trained on first use."""
    course = SceneCourse(recipe)
    return made(
        recipe, course, course.tokenizer, corpus=f"{scenes.digest()}/places", end=course.end
    )


@torch.no_grad()
def word_hits(
    network: HubTarget,
    course: SceneCourse,
    asked: Sequence[scenes.Example],
    answers: Sequence[Sequence[int]],
) -> dict[str, float]:
    """How often a network's likeliest word is the one that stands there, by class of the word.

    On the target's own greedy answers that is the acceptance rate of each place, given that the
    drafts before it stood.

    Args:
        network: One of :data:`NETWORKS`.
        course: What it reads.
        asked: The examples.
        answers: Token ids of an answer to each.

    Returns:
        A share for each class, for ``"grammar"``, and for ``"all"``.
    """
    names = [*scenes.CLASSES, "grammar"]
    kinds = torch.tensor([names.index(scenes.word_class(w)) for w in scenes.words()])
    right, total = torch.zeros(len(names)), torch.zeros(len(names))
    given = course.recipe.vision_size > 0
    for example, answer in zip(asked, answers, strict=True):
        prompt = course.prompt(example)
        ids = torch.tensor([[*prompt, *answer]])
        images = {"pixel_values": scenes.pictures([example])} if given else {}
        logits = network.model(input_ids=ids, use_cache=False, **images).logits
        said, wanted = logits[0, len(prompt) - 1 : -1].argmax(-1), ids[0, len(prompt) :]
        right.index_add_(0, kinds[wanted], (said == wanted).float())
        total.index_add_(0, kinds[wanted], torch.ones(len(wanted)))
    found = dict(zip(names, (right / total.clamp(min=1)).tolist(), strict=True))
    return found | {"all": float(right.sum() / total.sum().clamp(min=1))}
