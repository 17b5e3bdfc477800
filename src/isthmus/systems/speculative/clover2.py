"""Clover-2: a recurrent head behind a once-a-round transformer that already knows the root.

Paper: Xiao, Zhang, Chen, Xu, Zhou, Wang. Clover-2: Accurate Inference for Regressive Lightweight
    Speculative Decoding. 2024. arXiv:2408.00264
Idea: Attention runs once a round over the verified tokens; each draft step afterwards is a cosine
    gate that mixes the drafted token into the state, a third of the work of a decoder layer.
Differs: Weights of the losses are EAGLE's, the paper's are not published. All tokens of a text
    count in training, not only those among the target's likeliest. The tree is the best-first one.
    Layers start as the target's last one where it has our layout, else at random. Token vectors
    are normed and what the gate adds is measured in units of the state, since the states of a
    small target are hundreds of times longer than the rows of its LM head.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.heads import FeatureHeads
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh
from isthmus.nn.decoder import DecoderLayer
from isthmus.objectives.distillation import feature_noise, shifted, smooth_l1, soft_cross_entropy
from isthmus.roles import Features, Shape, Taps
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Clover-2.

    Attributes:
        heads: Draft steps that are trained.
        layers: Decoder layers of the once-a-round block.
        use_tokens: Take in each drafted token (the idea); off, all steps see the root at best.
        decay: Step k weighs ``decay^(k-1)`` in the loss.
        feature_weight: Weight of the feature loss.
        token_weight: Weight of the loss on the drafted distribution.
        noise: Uniform noise on the training features.
        top_k: Children of a node and nodes expanded on a level.
        nodes: Draft nodes a round.
    """

    heads: int = 5
    layers: int = 2
    use_tokens: bool = True
    decay: float = 0.8
    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.2
    top_k: int = 10
    nodes: int = 60


class CosineGate(nn.Module):
    """``h + s [cos(a_1, b_1) c_1; ...; cos(a_n, b_n) c_n]`` over n groups of channels (sec. 3.2).

    a is read from the state, b and c from the token, and s is the root mean square of the state:
    a token changes the state by at most s c.

    Args:
        width: Width D.
        groups: Groups n.
        eps: Of the norm of the state.
    """

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.norm = nn.RMSNorm(width, eps)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, state: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Mix token vectors into states, both [..., D]."""
        a, b, c = (
            x.unflatten(-1, (self.groups, -1))
            for x in (self.query(self.norm(state)), self.key(token), self.value(token))
        )
        cosine = F.cosine_similarity(a, b, dim=-1)[..., None]  # [..., n, 1]
        size = state.pow(2).mean(-1, keepdim=True).sqrt()
        mixed: torch.Tensor = state + size * (cosine * c).flatten(-2)
        return mixed


def near_identity(width: int, wide: int) -> nn.Linear:
    """A map of [..., wide*D] that starts as its first D channels, up to 0.01."""
    layer = nn.Linear(wide * width, width, bias=False)
    nn.init.uniform_(layer.weight, -0.01, 0.01)
    layer.weight.data[:, :width] += torch.eye(width)
    return layer


class Clover2(FeatureHeads):
    """Gate, decoder layers over the verified tokens, then one gate and one map a draft step."""

    name = "clover2"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        sizes, width, eps = self.sizes, self.sizes.hidden_size, self.sizes.rms_norm_eps
        self.taps = Taps(final=True, layers=(target.num_layers,))
        self.first_gate = CosineGate(width, sizes.num_attention_heads, eps)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(self.settings.layers))
        self.norm, self.out_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.step_gate = CosineGate(width, sizes.num_attention_heads, eps)
        self.first_map, self.step_map = near_identity(width, 1), near_identity(width, 2)
        self._start_as_target()
        self._cache: DraftCache | None = None
        self._h = torch.empty(0)  # state of each node of the level [B, F, D]

    def _start_as_target(self) -> None:
        """Copy the target's last layer and final norm where they have our layout."""
        last = self.target.layers[-1].state_dict()
        for layer in self.layers:
            own = layer.state_dict()
            if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in last.items()}:
                layer.load_state_dict(last)
        final = getattr(self.target.model.get_decoder(), "norm", None)
        if final is not None and list(final.state_dict()) == ["weight"]:
            self.norm.load_state_dict(final.state_dict())
            self.out_norm.load_state_dict(final.state_dict())

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.heads, self.settings.top_k)

    def branch(self) -> tuple[int, int]:
        """The ``top_k`` best nodes of a level get ``top_k`` children each."""
        return self.settings.top_k, self.settings.top_k

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's LM head rows of tokens, normed [..., D]: where a state has to point."""
        rows = F.embedding(tokens, self.target.model.get_output_embeddings().weight).detach()
        return F.rms_norm(rows, rows.shape[-1:])

    def before_norm(self, features: Features) -> torch.Tensor:
        """``u_i``, what leaves the target's last layer before its norm [B, N, D]."""
        return features.layers[self.target.num_layers]

    def step(self, state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in drafted tokens.

        Args:
            state: h [..., D].
            tokens: int64 [...].

        Returns:
            The next h, and o, which imitates the target's last hidden state; both [..., D].
        """
        token = self.vectors(tokens)
        if self.settings.use_tokens:
            state = self.step_gate(state, token)
        else:
            token = torch.zeros_like(token)
        return state, self.out_norm(self.step_map(torch.cat([state, token], -1)))

    def loss(self, batch: Batch) -> torch.Tensor:
        """All draft steps from every place of the text at once."""
        u = feature_noise(self.before_norm(batch.features), batch.generator, self.settings.noise)
        positions = torch.arange(u.shape[1], device=u.device)[None]
        h = self.first_gate(u, self.vectors(shifted(batch.ids, 1)))
        for layer in self.layers:
            h = layer(h, positions)
        h = self.norm(h)
        out, total = self.out_norm(self.first_map(h)), u.new_zeros(())
        for k in range(1, self.settings.heads + 1):
            if k > 1:
                h, out = self.step(h, shifted(batch.ids, k))
            mask = batch.before(k)
            feature = smooth_l1(shifted(batch.final, k), out, mask)
            token = soft_cross_entropy(shifted(batch.target_logits, k), self.head(out), mask)
            weight = self.settings.decay ** (k - 1)
            loss = self.settings.feature_weight * feature + self.settings.token_weight * token
            total = total + weight * loss
        return total

    def reset(self, batch: int) -> None:
        """No state, an empty cache."""
        super().reset(batch)
        target = self.target
        self._cache = DraftCache(
            self.sizes, self.settings.layers, batch, target.state_dtype, target.device
        )

    def absorb(self, fresh: Fresh) -> None:
        """Run the once-a-round block over the verified tokens; the root is in it."""
        assert self._cache is not None
        positions, mask = self._cache.append(fresh.valid)
        h = self.first_gate(self.before_norm(fresh.features), self.vectors(fresh.following))
        for i, layer in enumerate(self.layers):
            h = layer(h, positions, mask, self._cache.store(i))
        self._cache.commit(fresh.valid)
        self.remember(fresh, self.norm(h))

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        super().select_state(rows)
        self._cache.select(rows.tolist())

    def expand(self, level: Level) -> torch.Tensor:
        """One gate and one map for the whole level."""
        if level.depth == 0:
            self._h = self.feature[:, None]
            return self.head(self.out_norm(self.first_map(self._h)))
        above = level.parent[..., None].expand(-1, -1, self._h.shape[-1])
        self._h, out = self.step(self._h.gather(1, above), level.tokens)
        return self.head(out)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure Clover-2 beside ReDrafter and EAGLE on ``pycode-m``, all trained on the same texts.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 16) if full else (8, 2)
    recipe = None if full else Recipe(steps=8)
    arms = {
        "clover2": reference_drafter("clover2", recipe=recipe),
        "off": reference_drafter("clover2", Settings(use_tokens=False), recipe=recipe),
        "redrafter": reference_drafter("redrafter", recipe=recipe),
        "eagle": reference_drafter("eagle", recipe=recipe),
    }
    held_out = texts(split="held-out")
    shapes = {"chain of 4": Shape(4, 4, 1), "tree of 30": Shape(30, 4, 10)}
    tau = {
        (arm, kind): acceptance_length(drafter, held_out, shape=shape, rows=rows)
        for arm, drafter in arms.items()
        for kind, shape in shapes.items()
    }
    drafter, eagle = arms["clover2"], arms["eagle"]
    assert isinstance(drafter, Clover2)

    def weights(*parts: nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1)

    work = weights(drafter.step_gate, drafter.step_map) / weights(eagle)
    head = drafter.target.vocab_size * drafter.sizes.hidden_size
    with_head = (weights(drafter.step_gate, drafter.step_map) + head) / (weights(eagle) + head)

    same = same_answers(drafter, shapes["tree of 30"], count)
    chain = {arm: tau[arm, "chain of 4"] for arm in arms}
    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("minus ReDrafter, chain", chain["clover2"] - chain["redrafter"], ">=", 0.05),
        Gate("minus EAGLE, chain", chain["clover2"] - chain["eagle"], ">=", -0.3),
        Gate("minus the same without drafted tokens", chain["clover2"] - chain["off"], ">=", 0.1),
        Gate("weights of a draft step over EAGLE's", work, "<=", 0.5),
    )
    unit = "tokens/forward"
    return Claim(
        slug="clover2",
        statement="A cosine gate a step behind a transformer that runs once a round is accepted "
        "further than a plain recurrent head and nearly as far as EAGLE, at half of EAGLE's work a "
        "step or less.",
        paper_figure="3.00x and 7.7% more tokens a step than EAGLE (abstract)",
        rows=(
            *(
                Row(
                    f"acceptance length, greedy, {kind}",
                    unit,
                    tau["redrafter", kind],
                    tau["clover2", kind],
                    tau["off", kind],
                    control=tau["eagle", kind],
                    note="baseline: ReDrafter; control: EAGLE; off: drafted tokens not read",
                )
                for kind in shapes
            ),
            Row(
                "weights of a draft step over EAGLE's",
                "",
                1.0,
                work,
                None,
                note=f"without the shared LM head; with it {with_head:.2f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[1], gates[4])),
        notes=(curve_note(*arms.values()),),
        gates=gates,
        seeds=(0,),
    )
