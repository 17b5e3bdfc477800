"""Multimodal speculation: image models decode as in transformers; the drafter sees no image."""

import math
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import transformers as tf

from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.multimodal_speculation import (
    MultimodalSpeculation,
    Settings,
    Unigram,
    memory_bound_speedup,
    position_map,
    without_images,
)
from isthmus.testing import check_drafter
from isthmus.workbench import scene_models, scenes

IMAGE = 5
"""Placeholder; an image of 8 by 8 pixels has four features."""

CHAIN = Shape(3, 3, 1)


@cache
def llava() -> Any:
    """A random LLaVA in float64."""
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**tiny._GROUPED),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = tf.LlavaForConditionalGeneration(config)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)
    return model.eval().double()


@cache
def model() -> Model:
    return Model(llava(), draft_model=tiny.network("Llama", noise=0.1))


def prompts() -> list[torch.Tensor]:
    """Ragged prompts with one image each."""
    return [torch.cat([p[:2], torch.full((4,), IMAGE), p[2:]]) for p in words()]


def words() -> list[torch.Tensor]:
    return [torch.where(p == IMAGE, 6, p) for p in tiny.prompts()]


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def plain(ids: torch.Tensor, images: torch.Tensor, new: int = 10) -> list[int]:
    out = llava().generate(
        input_ids=ids[None],
        pixel_values=images,
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0].tolist()[-new:]


def answer(drafter: Any, seed: int = 0, **options: Any) -> list[list[int]]:
    policy = Fixed() if drafter is None else Fixed(drafter, CHAIN)
    options = {"max_new_tokens": 10, "ignore_end": True, "seed": 0, **options}
    results = model().generate(
        prompts(), drafter=policy, inputs={"pixel_values": pixels(seed=seed)}, **options
    )
    return [r.tokens for r in results]


def context(ids: list[torch.Tensor], **more: Any) -> Context:
    lengths = [len(r) for r in ids]
    table = torch.stack([torch.nn.functional.pad(r, (0, 30 - len(r))) for r in ids])
    generator = torch.Generator().manual_seed(0)
    return Context(table, lengths, lengths, Law(), generator, list(range(len(ids))), **more)


def test_positions_with_no_one_and_two_images() -> None:
    image = torch.full((4,), IMAGE)
    text = torch.tensor([7, 8, 9])
    rows = [text, torch.cat([text[:1], image, text[1:]]), torch.cat([image, text[:2], image, text])]
    given = context(rows, noise=lambda request, place, size: torch.tensor([request, place, size]))
    seen = without_images(given, IMAGE)
    assert seen.lengths == [3, 3, 5] and seen.prompt_lengths == [3, 3, 5]
    assert [seen.row(b).tolist() for b in range(3)] == [[7, 8, 9], [7, 8, 9], [7, 8, 7, 8, 9]]
    places = position_map(given.ids, IMAGE)
    assert [places[b, :n].tolist() for b, n in enumerate(seen.lengths)] == [
        [0, 1, 2],
        [0, 5, 6],
        [4, 5, 10, 11, 12],
    ]
    assert torch.equal(seen.roots(), given.roots())
    # noise is that of the target's position
    assert seen.noise is not None
    assert [seen.noise(r, 5, 9).tolist() for r in range(3)] == [[0, 5, 9], [1, 9, 9], [2, 13, 9]]
    assert given.lengths == [3, 7, 13], "the target's context stays as it is"


def test_a_tree_after_an_image_is_scored_like_the_whole_prompt() -> None:
    target, ids, images = model().target, prompts(), pixels()
    assert isinstance(target, HubTarget) and target.takes_images and target.reach == "tree"
    session = target.session(3, pixel_values=images)
    session.prefill([r[:-1] for r in ids])
    nodes = torch.tensor([[int(r[-1]), 9, 11, 12, 13] for r in ids])
    topology = Topology.of([-1, 0, 0, 1, 2])
    got = session.score(TokenTree(nodes, topology)).logits
    for b, row in enumerate(ids):
        for path in ([0, 1, 3], [0, 2, 4]):
            whole = torch.cat([row[:-1], nodes[b, path]])[None]
            with torch.no_grad():
                want = llava()(input_ids=whole, pixel_values=images[b : b + 1]).logits[0, -3:]
            assert float((got[b, path] - want).abs().max()) < 1e-9


def test_the_text_is_the_plain_one() -> None:
    """Rows of unlike lengths, with their own images, against transformers one by one."""
    want = [plain(ids, pixels()[b : b + 1]) for b, ids in enumerate(prompts())]
    other = [plain(ids, pixels(seed=1)[b : b + 1]) for b, ids in enumerate(prompts())]
    assert want != other, "the images matter"
    draft = model().draft_model
    for drafter in (None, MultimodalSpeculation(draft), Unigram(torch.ones(tiny.V))):
        assert answer(drafter) == want
    assert answer(MultimodalSpeculation(draft), seed=1) == other


def test_two_images_in_one_prompt() -> None:
    ids = torch.cat([prompts()[0], prompts()[1]])
    images = pixels(2)
    result = model().generate(
        ids,
        drafter=Fixed(MultimodalSpeculation(model().draft_model), CHAIN),
        inputs={"pixel_values": images},
        max_new_tokens=10,
        ignore_end=True,
    )
    assert result.tokens == plain(ids, images)


def test_what_is_drafted_does_not_depend_on_pixels() -> None:
    """Nor does the draft model ever see a placeholder: it drafts as for the words alone."""
    drafted = []
    for given, images in ((prompts(), 0), (prompts(), 1), (words(), None)):
        drafter = MultimodalSpeculation(model().draft_model)
        where = context(given)
        inputs = {} if images is None else {"pixel_values": pixels(seed=images)}
        drafter.begin(where, model().target, **inputs)
        drafted.append(drafter.propose(where, CHAIN).tokens.tolist())
        assert drafter._session.lengths == [n + 2 for n in map(len, words())]
    assert drafted[0] == drafted[1] == drafted[2]


def test_the_switch_feeds_the_prompt_as_it_is() -> None:
    off = MultimodalSpeculation(model().draft_model, Settings(text_only=False))
    where = context(prompts())
    off.begin(where, model().target, pixel_values=pixels())
    assert off._session.lengths == [len(p) - 1 for p in prompts()]
    want = answer(None)
    assert answer(off) == want
    # a draft model that reads images gets them, and then it agrees with itself
    seeing = MultimodalSpeculation(model().target, Settings(text_only=False))
    blind = MultimodalSpeculation(model().target)
    found = {}
    for name, drafter in (("seeing", seeing), ("blind", blind)):
        results = model().generate(
            prompts(),
            drafter=Fixed(drafter, CHAIN),
            inputs={"pixel_values": pixels()},
            max_new_tokens=9,
            ignore_end=True,
        )
        assert [r.tokens for r in results] == [t[:9] for t in want]
        found[name] = sum(r.stats.target_forwards for r in results)
    assert found["seeing"] == 9 < found["blind"]


def test_coupled_sampling_is_the_plain_one() -> None:
    """Shared noise is counted in the target's positions, so the draft model guesses some right."""
    options: dict[str, Any] = {"temperature": 1.0, "acceptance": Coupled(3)}
    plain_text = answer(None, **options)
    drafter = MultimodalSpeculation(model().target)
    assert answer(drafter, **options) == plain_text
    policy = Fixed(drafter, CHAIN)
    inputs = {"pixel_values": pixels()}
    results = model().generate(
        prompts(), drafter=policy, inputs=inputs, max_new_tokens=10, ignore_end=True, **options
    )
    accepted = sum(r.stats.accepted for r in results)
    assert accepted / sum(r.stats.drafted for r in results) > 0.3


def test_contract() -> None:
    given = [p.tolist() for p in prompts()]
    check_drafter(
        lambda: MultimodalSpeculation(model().draft_model),
        target=model().target,
        shapes=(CHAIN,),
        prompts=given,
        inputs={"pixel_values": pixels()},
    )


def test_bad_input() -> None:
    drafter = Fixed(MultimodalSpeculation(model().draft_model), CHAIN)
    with pytest.raises(InvalidInputError, match="num_draft_tokens"):
        MultimodalSpeculation(model().draft_model, Settings(num_draft_tokens=-1))
    with pytest.raises(InvalidInputError, match="ends in an image"):
        model().generate(prompts()[0][:6], drafter=drafter, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="images cannot be read"):
        model().generate(prompts()[0], inputs={"pixel_values": pixels(2)}, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="depth is no input"):
        model().generate(
            prompts()[0], inputs={"pixel_values": pixels(1), "depth": pixels(1)}, max_new_tokens=4
        )
    with pytest.raises(InvalidInputError, match="encoder inputs"):
        tiny.facade("Llama").generate(words()[0], inputs={"pixel_values": pixels(1)})


def test_a_llava_loads_by_name(tmp_path: Any) -> None:
    from isthmus.models.hub import load_checkpoint

    llava().save_pretrained(tmp_path / "llava")
    loaded = load_checkpoint(str(tmp_path / "llava"), dtype="float64", device="cpu").model
    assert type(loaded) is tf.LlavaForConditionalGeneration
    with pytest.raises(UnsupportedModelError, match="image-to-text"):
        tf.CLIPVisionConfig().save_pretrained(tmp_path / "clip")
        load_checkpoint(str(tmp_path / "clip"))


def test_scenes() -> None:
    red = scenes.Thing("circle", "red", "small", 0)
    blue = scenes.Thing("square", "blue", "large", 3)
    picture = scenes.render((red, blue))
    top, bottom = picture[:, 8, 8], picture[:, 24, 24]
    assert top[0] > -1 > top[2] and bottom[2] > -1 > bottom[0]
    assert (picture[:, :16, 16:] == 0).all(), "nothing else is drawn"
    seen = {(scenes.render((scenes.Thing(s, "red", "large", 0),)) < 0).sum() for s in scenes.SHAPES}
    assert len(seen) == len(scenes.SHAPES), "no two shapes look alike"
    texts = {scenes.caption((red, blue), w) for w in range(scenes.CAPTIONS)}
    assert len(texts) == scenes.CAPTIONS >= 6
    known = set(scenes.words())
    train, held = scenes.examples(400, "train"), scenes.examples(100)
    assert all(set(f"{e.prompt} {e.answer}".split()) <= known for e in train + held)

    def key(scene: scenes.Scene) -> frozenset[scenes.Thing]:
        return frozenset(scene)

    assert not {key(e.scene) for e in train} & {key(e.scene) for e in held}
    assert scenes.examples(3) == held[:3]
    with pytest.raises(InvalidInputError, match="split"):
        scenes.examples(0)


def test_the_loss_is_taken_on_answers_only() -> None:
    recipe = scene_models.NETWORKS["scenes-adapter"]
    course = scene_models.SceneCourse(recipe)
    drawn = scenes.examples(2, "train")
    ids, labels, images, names = course.collate(drawn)
    for row, example in enumerate(drawn):
        kept = labels[row] >= 0
        assert labels[row][kept].tolist() == [*course.encode(example.answer), 0]
        assert ids[row].tolist().count(1) == scenes.FEATURES
    net = course.build()
    assert images.shape == (2, 3, 32, 32) and net.config.image_token_id == 1
    loss = course.loss(net, (ids, labels, images, names))
    loss.backward()
    assert float(net.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum()) > 0
    # an untrained network knows neither the words of the answer nor those of the image
    assert float(loss.detach()) == pytest.approx(2 * math.log(len(scenes.words())), rel=0.1)
    first = drawn[0].scene[0]
    shown = course.tokenizer.decode(names[0, first.place].tolist())
    assert shown == f"{first.full} {first.where}" and names.shape == (2, 4, 5)


def test_memory_bound_speedup_by_hand() -> None:
    assert memory_bound_speedup(3.0, 3, 0.0) == 3.0
    assert memory_bound_speedup(3.0, 5, 0.1) == pytest.approx(2.0)
