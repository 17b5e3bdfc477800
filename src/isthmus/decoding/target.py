"""Targets: any generating model of transformers behind one small interface.

A target opens sessions. A session holds the committed tokens of B rows in a cache; ``score`` runs
a token tree on top of them and ``keep`` commits one path of it. Models are used through their
public interface only: a 4-D additive mask, position ids, a cache object, forward hooks. What that
route assumes is verified when the target is made (:func:`verified_reach`): trees where trees are
exact, chains where only chains are, one-token steps otherwise.

How positions reach a model:

* rotary and learned positions of decoder-only models: ``position_ids``;
* BART, Marian, Whisper: a forward hook on the decoder's position table;
* T5: relative biases come from slot numbers, so the difference to the biases of the true
  positions is added to the mask;
* ALiBi models (BLOOM) derive distances from a 2-D mask: chains only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from isthmus.decoding.cache import LayerShape, SlotCache
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.models.hub import cache_argument
from isthmus.nn.masks import tree_mask
from isthmus.roles import Features, Reach, Scores, Session, Taps

MAX_NODES = 1024
"""Draft nodes in one forward at most; bounds the [N, S + N] mask."""

PREFILL_CHUNK = 1024
"""Prompt tokens a forward; bounds the [chunk, S] mask."""


def layer_kinds(model: Any) -> tuple[str, ...]:
    """Kind of every decoder layer: ``"full"``, ``"sliding"`` or ``"recurrent"``.

    Raises:
        UnsupportedModelError: A layer keeps its past in a way that the engine does not know.
    """
    kinds = []
    for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers:
        name = type(layer).__name__
        if hasattr(layer, "conv_states"):
            kinds.append("recurrent")
        elif getattr(layer, "is_sliding", False):
            kinds.append("sliding")
        elif name == "DynamicLayer":
            kinds.append("full")
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a layer's past as {name}, which isthmus cannot "
                "roll back; use a model with attention or linear-attention layers"
            )
    return tuple(kinds) or ("full",)


class HubTarget:
    """A causal or encoder-decoder model of transformers 5 as a target.

    Args:
        model: The model, in eval mode. Its parameters, attention kernel and config stay as they
            are.
        reach: What one forward scores exactly; measured by :func:`verified_reach` when None.

    Attributes:
        vocab_size: Width V of the logits.
        reach: ``"tree"``, ``"chain"`` or ``"step"``.
        max_length: Context limit in tokens (prompt and output), or None.
        max_batch: 1 for models with recurrent state, else None.
        max_nodes: Draft nodes that one forward may hold.
        encoder_decoder: Whether sessions take encoder inputs.
        takes_images: Whether sessions take images: decoder-only models whose prompt holds image
            placeholders (LLaVA and its kind).
        dtype: Of the weights.
        state_dtype: Of cached keys, tapped states and what ``embed`` and ``head`` return.
        why_general: Why a model that was offered to :func:`isthmus.decoding.fast.best_target` is
            run module by module; empty where nobody asked.

    Raises:
        UnsupportedModelError: The model cannot be decoded with an unchanged output.
    """

    why_general = ""

    def __init__(self, model: Any, *, reach: Reach | None = None) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.kinds = layer_kinds(model)
        self.recurrent = "recurrent" in self.kinds
        self.max_batch = 1 if self.recurrent else None
        self.max_nodes = MAX_NODES
        self.window = getattr(self.config, "sliding_window", None)
        self.mixed = "full" in self.kinds and "sliding" in self.kinds
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.state_dtype: torch.dtype = self.dtype
        if "flash" in str(self.config._attn_implementation):
            raise UnsupportedModelError(
                "flash attention takes no tree mask; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        names = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in names
        # with positions in three rows (Qwen2-VL) the text after an image does not count on by one
        self.takes_images = (
            not self.encoder_decoder
            and not self.recurrent
            and "pixel_values" in names
            and not hasattr(model.base_model, "get_rope_index")
        )
        self._inputs = frozenset(names) - {"input_ids", "attention_mask", "position_ids"}
        self._cache_name = cache_argument(model)
        self._takes_logits_to_keep = "logits_to_keep" in names
        self._position_table = self._find_position_table()
        self._relative_bias = self._find_relative_bias()
        limit = None if self._relative_bias is not None else _context_limit(self.config)
        self.max_length: int | None = None if self.recurrent else limit
        self.start_token = getattr(model.generation_config, "decoder_start_token_id", None)
        self.layout, self.vocab_size = self._probe()
        self._prepare()
        self.reach: Reach = reach or verified_reach(self)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text, as the model's generation config has them now."""
        ends = self.model.generation_config.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def description(self) -> str:
        """What its speed depends on, besides the machine."""
        said: str = self.model.config.to_json_string(use_diff=False)
        return said

    def _prepare(self) -> None:
        """Make ready what sessions need, before the first one is opened."""

    def session(self, batch: int, **inputs: Any) -> Session:
        """Open a session for ``batch`` rows.

        Args:
            batch: Rows B.
            inputs: Encoder inputs for encoder-decoder models: ``input_ids`` [B, T] or
                ``input_features`` [B, M, T], and ``attention_mask`` [B, T]; or ``encoder_outputs``.
                For models with ``takes_images``, what their image processor makes:
                ``pixel_values`` and so on, for the placeholders of all rows in order.

        Raises:
            InvalidInputError: Encoder inputs are missing or not wanted.
            UnsupportedModelError: More rows than ``max_batch``.
        """
        self.check_inputs(inputs)
        if self.max_batch is not None and batch > self.max_batch:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} keeps a recurrent state; decode one row at a time"
            )
        if self.recurrent:
            return RecurrentSession(self)
        return SlotSession(self, batch, self.encode(**inputs) if inputs else {})

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse encoder inputs where there is no encoder, and none where there is one.

        Raises:
            InvalidInputError: They are missing or not wanted.
        """
        if self.encoder_decoder != bool(inputs) and not self.takes_images:
            raise InvalidInputError(
                f"{type(self.model).__name__} needs encoder inputs"
                if self.encoder_decoder
                else f"{type(self.model).__name__} takes no encoder inputs and no images"
            )

    @torch.no_grad()
    def encode(self, **inputs: Any) -> dict[str, Any]:
        """Run the encoder once; returns what every decoder call needs.

        Images are only made ready: a model with ``takes_images`` reads them in its first call.

        Raises:
            InvalidInputError: An input is missing or unknown.
        """
        if not self.encoder_decoder:
            unknown = sorted(inputs.keys() - self._inputs)
            if unknown or "pixel_values" not in inputs:
                raise InvalidInputError(
                    f"{type(self.model).__name__} reads images from pixel_values, and "
                    f"{', '.join(unknown) or 'none'} is no input of its image processor"
                )
            return {
                name: x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)
                for name, x in inputs.items()
            }
        mask = inputs.get("attention_mask")
        extra = {} if mask is None else {"attention_mask": mask}
        if "encoder_outputs" in inputs:
            return {"encoder_outputs": inputs["encoder_outputs"], **extra}
        name = self.model.main_input_name
        if name not in inputs:
            raise InvalidInputError(
                f"{type(self.model).__name__} needs {name!r} as its encoder input"
            )
        encoded = self.model.get_encoder()(inputs[name], **extra)
        return {"encoder_outputs": encoded, **extra}

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: Any = None,
        cache: Any = None,
        encoded: dict[str, Any] | None = None,
        taps: Taps | None = None,
        last_only: bool = False,
    ) -> Scores:
        """One call of the model; every shape decision is made by the caller.

        Args:
            tokens: int64 [B, N].
            positions: Position of each token [B, N]; the model's own counting when None.
            mask: Additive [B, 1 or H, N, S + N], a dict of such masks by layer kind, 2-D
                [B, S + N], or None where the model's own causal mask is right.
            cache: A cache of transformers.
            encoded: Result of :meth:`encode`.
            taps: Inner states to return too.
            last_only: Compute the logits of the last token only.

        Raises:
            UnsupportedModelError: Attention weights are asked for, and this model gives none.
        """
        kwargs: dict[str, Any] = {self._cache_name: cache, "use_cache": cache is not None}
        if taps:
            kwargs["output_hidden_states"] = True
        if taps and taps.cross_attention:
            kwargs["output_attentions"] = self._check_attention()
        if last_only and self._takes_logits_to_keep:
            kwargs["logits_to_keep"] = 1
        if self.encoder_decoder:
            kwargs |= encoded or {}
            kwargs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        else:
            kwargs |= {**(encoded or {}), "input_ids": tokens, "attention_mask": mask}
            if positions is not None and self._takes_positions:
                kwargs["position_ids"] = positions
        last: list[torch.Tensor] = []
        with self._placed(positions), self._leaving_last_layer(taps, last):
            out = self.model(**kwargs)
        if not taps:
            return Scores(out.logits)
        states = out.decoder_hidden_states if self.encoder_decoder else out.hidden_states
        depth = len(states) - 1  # the last one is after the final norm
        layers = {i: last[0] if i == depth else states[i] for i in taps.layers}
        across = None
        if taps.cross_attention:  # L of [B, H, N, S]
            across = torch.stack(out.cross_attentions, 1).permute(0, 3, 1, 2, 4)
        return Scores(out.logits, Features(states[-1] if taps.final else None, layers, across))

    def _check_attention(self) -> bool:
        """Whether the model gives its cross-attention weights, which fused kernels do not have.

        Raises:
            UnsupportedModelError: It does not.
        """
        if not self.encoder_decoder or self.config._attn_implementation != "eager":
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives no attention weights over a source; use an "
                "encoder-decoder model with model.set_attn_implementation('eager')"
            )
        return True

    @contextmanager
    def _leaving_last_layer(self, taps: Taps | None, out: list[torch.Tensor]) -> Iterator[None]:
        """Catch what leaves the last decoder layer: transformers reports it after the norm only."""
        if not taps or self.num_layers not in taps.layers:
            yield
            return

        def catch(module: Any, args: Any, output: Any) -> None:
            out.append(output if torch.is_tensor(output) else output[0])

        handle = self.layers[-1].register_forward_hook(catch)
        try:
            yield
        finally:
            handle.remove()

    def empty_cache(self) -> Any:
        """A cache of transformers to run one text into, outside any session."""
        inner = DynamicCache(config=self.config) if self.recurrent else DynamicCache()
        return EncoderDecoderCache(inner, DynamicCache()) if self.encoder_decoder else inner

    @property
    def num_layers(self) -> int:
        """Decoder layers L."""
        return len(self.kinds)

    @property
    def layers(self) -> Any:
        """The decoder's layers, in order.

        Raises:
            UnsupportedModelError: They are not where transformers usually puts them.
        """
        decoder = self.model.get_decoder()
        for module in decoder.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise UnsupportedModelError(
            f"the decoder layers of {type(self.model).__name__} were not found; use a drafter that "
            "reads the last hidden state only"
        )

    @property
    def hidden_size(self) -> int:
        """Width D of the decoder's hidden states."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., D] of tokens [...], without positions."""
        return F.embedding(tokens, self.model.get_input_embeddings().weight)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        out: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return out

    @property
    def final_norm(self) -> Any:
        """The decoder's norm between its last layer and the head, or None where there is none."""
        decoder = self.model.get_decoder()
        names = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
        return next(
            (n for n in (getattr(decoder, name, None) for name in names) if n is not None), None
        )

    @contextmanager
    def _placed(self, positions: torch.Tensor | None) -> Iterator[None]:
        """Give a decoder with a position table the true positions for one call."""
        table = self._position_table
        if table is None or positions is None:
            yield
            return

        def calm(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            # the model counts slots, which may run past the end of its table
            own = kwargs.get("position_ids")
            return args, kwargs | ({} if own is None else {"position_ids": torch.zeros_like(own)})

        def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return F.embedding(positions + getattr(module, "offset", 0), module.weight)

        handles = (
            table.register_forward_pre_hook(calm, with_kwargs=True),
            table.register_forward_hook(replace),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _find_position_table(self) -> Any:
        if not self.encoder_decoder:
            return None
        table = getattr(self.model.get_decoder(), "embed_positions", None)
        return table if isinstance(table, torch.nn.Embedding) else None

    def _find_relative_bias(self) -> Any:
        if not self.encoder_decoder:
            return None
        found = [
            m
            for m in self.model.get_decoder().modules()
            if getattr(m, "has_relative_attention_bias", False) and hasattr(m, "compute_bias")
        ]
        return found[0] if len(found) == 1 else None

    def bias_shift(self, positions: torch.Tensor, slots: torch.Tensor, start: int) -> torch.Tensor:
        """Relative bias of the true positions minus the one the model takes from slot numbers.

        Args:
            positions: Position of each node [B, N].
            slots: Position of each slot, the nodes' own included, [B, S + N].
            start: Slot of the first node.

        Returns:
            [B, H, N, S + N], to be added to the mask.
        """
        n, total = positions.shape[1], slots.shape[1]
        reach = max(total, int(positions.max()) + 1)
        # [H, reach]: bias by distance, nearest first
        table = self._relative_bias.compute_bias(1, reach, past_seen_tokens=reach - 1)[0, :, 0]
        table = table.flip(-1)
        true = (positions[:, :, None] - slots[:, None, :]).clamp(min=0)
        arange = torch.arange(total, device=slots.device)
        by_slot = (arange[start : start + n, None] - arange).clamp(min=0)
        shift: torch.Tensor = table[:, true] - table[:, by_slot][:, None]
        return shift.transpose(0, 1)

    def probe_inputs(self) -> dict[str, Any]:
        """Small random encoder inputs for the checks at load; empty for decoder-only models."""
        if not self.encoder_decoder:
            return {}
        generator = torch.Generator().manual_seed(0)
        config = self.model.config
        if self.model.main_input_name == "input_features":
            shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
            features = torch.randn(shape, generator=generator, dtype=torch.float32)
            return {"input_features": features.to(self.device, self.dtype)}
        if self.model.main_input_name == "input_ids":
            ids = torch.randint(3, config.vocab_size, (1, 5), generator=generator)
            return {"input_ids": ids.to(self.device)}
        raise UnsupportedModelError(
            f"{type(self.model).__name__} reads {self.model.main_input_name!r}; isthmus decodes "
            "from input_ids and input_features"
        )

    def _probe(self) -> tuple[list[LayerShape | None], int]:
        """Layer shapes of the cache and the width of the logits, read off one small forward."""
        tokens = torch.tensor([[0, 1]], device=self.device)
        inner = DynamicCache(config=self.config) if self.recurrent else DynamicCache()
        cache = EncoderDecoderCache(inner, DynamicCache()) if self.encoder_decoder else inner
        inputs = self.probe_inputs()
        encoded = self.encode(**inputs) if inputs else None
        scores = self.forward(tokens, cache=cache, encoded=encoded)
        layout: list[LayerShape | None] = []
        for layer in inner.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.ndim != 4:
                layout.append(None)
            else:
                layout.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3]))
        if not self.recurrent and not any(layout):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} leaves nothing in a key/value cache, so isthmus "
                "cannot continue from it"
            )
        return layout, int(scores.logits.shape[-1])


def _context_limit(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def join_features(parts: Sequence[Features]) -> Features:
    """Features of consecutive tokens as one, joined along N."""
    if len(parts) == 1:
        return parts[0]
    finals = [p.final for p in parts if p.final is not None]
    layers = {i: torch.cat([p.layers[i] for p in parts], 1) for i in parts[0].layers}
    across = [p.cross_attention for p in parts if p.cross_attention is not None]
    return Features(
        torch.cat(finals, 1) if finals else None, layers, torch.cat(across, 1) if across else None
    )


def cut_features(features: Features | None, nodes: slice) -> Features | None:
    """Features of some of the N tokens."""
    return None if features is None else features.map(lambda x: x[:, nodes])


def join_encoded(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Encoder outputs of the rows of both, the shorter sources padded at the end and masked."""
    if not first:
        return {}
    states = [e["encoder_outputs"][0] for e in (first, second)]
    masks = [e.get("attention_mask") for e in (first, second)]
    width = max(s.shape[1] for s in states)
    padded = [F.pad(s, (0, 0, 0, width - s.shape[1])) for s in states]
    joined: dict[str, Any] = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=torch.cat(padded))
    }
    if states[0].shape[1] != states[1].shape[1] or any(m is not None for m in masks):
        whole = [
            s.new_ones(s.shape[:2], dtype=torch.int64) if m is None else m
            for s, m in zip(states, masks, strict=True)
        ]
        joined["attention_mask"] = torch.cat([F.pad(m, (0, width - m.shape[1])) for m in whole])
    return joined


def followed(session: Session, rows: Sequence[int]) -> Session:
    """The session with row b as a copy of ``rows[b]``: itself where it can, else a fork."""
    rows = list(rows)
    if isinstance(session, SlotSession) and len(rows) == len(session.lengths):
        session.reorder(rows)
        return session
    return session if rows == list(range(len(session.lengths))) else session.fork(rows)


class SlotSession:
    """A session of an attention model on a :class:`~isthmus.decoding.cache.SlotCache`.

    Args:
        target: The model.
        batch: Rows B.
        encoded: Result of :meth:`HubTarget.encode`, empty for decoder-only models; images until
            they have been read.

    Attributes:
        ahead: How the next tree is scored instead, for drafters that share the target's forward;
            see :class:`isthmus.decoding.layers.Ahead`. It holds for one round.
    """

    ahead: Any = None

    def __init__(self, target: HubTarget, batch: int, encoded: dict[str, Any]) -> None:
        self.target = target
        self.encoded = encoded
        self.cache = SlotCache(target.layout, batch, target.state_dtype, target.device)
        self._bind()

    def _bind(self) -> None:
        hub: Cache | EncoderDecoderCache = self.cache.hub
        if self.target.encoder_decoder:
            hub = EncoderDecoderCache(self.cache.hub, DynamicCache())
        self._hub = hub

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        return self.cache.lengths

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Cache the tokens of each row, one int64 [T_b] tensor a row.

        Raises:
            InvalidInputError: The images do not fit the placeholders of the rows.
        """
        longest = max(len(r) for r in rows)
        images = bool(self.encoded) and not self.target.encoder_decoder
        size = longest if images else PREFILL_CHUNK  # all placeholders have to be in one call
        chunks = []
        for start in range(0, longest, size):
            parts = [r[start : start + size] for r in rows]
            width = max(len(p) for p in parts)
            tokens = torch.stack([F.pad(p, (0, width - len(p))) for p in parts])
            steps = torch.arange(width)
            path = torch.stack([torch.where(steps < len(p), steps, -1) for p in parts])
            valid = None if bool((path >= 0).all()) else (path >= 0).to(self.target.device)
            tree = TokenTree(tokens.to(self.target.device), chain_topology(width), valid)
            try:
                chunks.append(self._run(tree, taps=taps, last_only=True).features)
            except ValueError as error:
                if not images:
                    raise
                raise InvalidInputError(
                    f"the images cannot be read ({str(error).strip().splitlines()[0]}); a prompt "
                    "holds one placeholder for each feature of its images, and text after them"
                ) from error
            self.keep(path.to(self.target.device))
        if images:
            self.encoded = {}  # from here on they are keys and values
        return join_features([c for c in chunks if c is not None]) if taps else None

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run the model on a tree; see :class:`isthmus.roles.Session`.

        Raises:
            InvalidInputError: The tree is wider than the target's reach.
        """
        if self.target.reach == "chain" and not tree.is_chain:
            raise InvalidInputError(
                f"{type(self.target.model).__name__} scores chains only; use tree.first_chain()"
            )
        ahead, self.ahead = self.ahead, None
        scores: Scores | None = None if ahead is None else ahead.finish(tree, taps)
        return self._run(tree, taps=taps) if scores is None else scores

    def _run(self, tree: TokenTree, *, taps: Taps | None = None, last_only: bool = False) -> Scores:
        cache, target = self.cache, self.target
        cache.reserve(tree.nodes)
        mask: Any = None
        positions: torch.Tensor | None = None
        plain = cache.dense and tree.is_chain and tree.valid is None
        if not plain or target._takes_positions:
            positions = self._positions(tree)
        if not plain:
            assert positions is not None
            chain = target.reach == "chain"
            mask = self._chain_mask(tree) if chain else self._tree_mask(tree, positions)
        return target.forward(
            tree.tokens,
            positions=positions,
            mask=mask,
            cache=self._hub,
            encoded=self.encoded,
            taps=taps,
            last_only=last_only,
        )

    def _positions(self, tree: TokenTree) -> torch.Tensor:
        lengths = self.cache.lengths
        if self.cache.dense:
            positions = tree.topology.depth + lengths[0]
        else:
            start = torch.tensor(lengths, device=self.target.device)
            positions = start[:, None] + tree.topology.depth
        limit = self.target.max_length
        if limit is not None and max(lengths) + tree.topology.max_depth >= limit:
            # only padding nodes and finished rows reach past the end of a position table
            positions = positions.clamp(max=limit - 1)
        return positions.expand(self.cache.batch, -1)

    def _chain_mask(self, tree: TokenTree) -> torch.Tensor:
        """2-D mask [B, S + N] of live slots and valid nodes."""
        _, live = self.cache.slots()
        if live is None:
            live = tree.alive.new_ones(tree.batch, self.cache.used)
        return torch.cat([live, tree.alive], 1).long()

    def _tree_mask(self, tree: TokenTree, positions: torch.Tensor) -> Any:
        cache, target = self.cache, self.target
        slot_pos, slot_live = cache.slots()

        def build(window: int | None) -> torch.Tensor:
            return tree_mask(
                tree.topology.ancestors,
                positions,
                slot_pos=slot_pos,
                slot_live=slot_live,
                past=cache.used,
                window=window,
                dtype=target.dtype,
            )

        if target.mixed:
            return {"full_attention": build(None), "sliding_attention": build(target.window)}
        mask = build(target.window if "sliding" in target.kinds else None)
        if target._relative_bias is not None:
            past = slot_pos.expand(cache.batch, -1)
            shift = target.bias_shift(positions, torch.cat([past, positions], 1), cache.used)
            mask = torch.where(mask == 0, shift, torch.finfo(mask.dtype).min)
        return mask

    def keep(self, path: torch.Tensor) -> None:
        """Commit one path of the last scored tree, int64 [B, M] padded with -1."""
        self.cache.keep(path)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond the given lengths."""
        self.cache.truncate(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row b go on as a copy of ``rows[b]``, in place; as many rows as there are."""
        self.cache.reorder(rows)
        if self.encoded:
            index = torch.tensor(list(rows), device=self.target.device)
            self.encoded = self._encoded(index)
            if isinstance(self._hub, EncoderDecoderCache):
                cross: Any = self._hub.cross_attention_cache
                cross.reorder_cache(index)

    def _encoded(self, index: torch.Tensor) -> dict[str, Any]:
        """Encoder outputs of the given rows [R]."""
        encoded = dict(self.encoded)
        states = self.encoded["encoder_outputs"][0].index_select(0, index)
        encoded["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        if "attention_mask" in self.encoded:
            encoded["attention_mask"] = self.encoded["attention_mask"][index]
        return encoded

    def fork(self, rows: Sequence[int]) -> SlotSession:
        """Copies of the given rows."""
        index = torch.tensor(list(rows), device=self.target.device)
        encoded = self._encoded(index) if self.encoded else {}
        return self._twin(self.cache.select(rows), encoded)

    def join(self, other: Session) -> SlotSession:
        """Copies of the rows of both sessions, this one's first.

        Raises:
            MismatchError: The other session is that of another target.
        """
        if not isinstance(other, SlotSession) or other.target is not self.target:
            raise MismatchError("only sessions of one target can be joined")
        return self._twin(self.cache.join(other.cache), join_encoded(self.encoded, other.encoded))

    def _twin(self, cache: SlotCache, encoded: dict[str, Any]) -> SlotSession:
        twin = object.__new__(type(self))
        twin.target, twin.cache, twin.encoded = self.target, cache, encoded
        twin._bind()
        return twin


class RecurrentSession:
    """One row of a model with recurrent state: chains by snapshot, or one-token steps.

    ``base`` is the state after the committed tokens except ``pending`` ones, which are fed again
    at the head of the next block: cheaper than a replay after every round.
    """

    max_pending = 16

    def __init__(self, target: HubTarget) -> None:
        self.target = target
        self.base = DynamicCache(config=target.config)
        self.pending: list[int] = []
        self.length = 0
        self._ahead: DynamicCache | None = None
        self._block: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of the row, pending ones included."""
        return [self.length]

    def _feed(self, cache: DynamicCache, tokens: list[int], taps: Taps | None = None) -> Scores:
        block = torch.tensor([tokens], device=self.target.device)
        return self.target.forward(block, cache=cache, taps=taps)

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Run the tokens into the state: one forward from an empty state, else as reach allows."""
        tokens = rows[0].tolist()
        if not tokens:
            return None
        if self.length == 0 or self.target.reach != "step":
            features = [self._feed(self.base, self.pending + tokens, taps).features]
            self.pending = []
        else:
            features = [self._feed(self.base, [token], taps).features for token in tokens]
        self.length += len(tokens)
        return join_features([f for f in features if f is not None]) if taps else None

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run a chain (or a bare root, where reach is ``"step"``).

        Raises:
            InvalidInputError: A tree that is not a chain, or a chain where only steps are exact.
        """
        if not tree.is_chain or (self.target.reach == "step" and tree.nodes > 1):
            kind = "one token" if self.target.reach == "step" else "chains"
            raise InvalidInputError(f"{type(self.target.model).__name__} scores {kind} only")
        self._block = tree.tokens[0].tolist()
        # a bare root is always kept, so the state may advance in place
        alone = tree.nodes == 1 and not self.pending
        self._ahead = self.base if alone else copy.deepcopy(self.base)
        scores = self._feed(self._ahead, self.pending + self._block, taps)
        n = tree.nodes
        return Scores(scores.logits[:, -n:], cut_features(scores.features, slice(-n, None)))

    def keep(self, path: torch.Tensor) -> None:
        """Commit the first M tokens of the last chain."""
        count = int((path[0] >= 0).sum())
        self.length += count
        if count == len(self._block) and self._ahead is not None:
            self.base, self.pending = self._ahead, []
        else:
            self.pending = self.pending + self._block[:count]
            if len(self.pending) > self.max_pending:
                self._feed(self.base, self.pending)
                self.pending = []
        self._ahead = None

    def truncate(self, lengths: Sequence[int]) -> None:
        """Recurrent state cannot be rolled back.

        Raises:
            UnsupportedModelError: Unless nothing has to be forgotten.
        """
        if lengths[0] < self.length:
            raise UnsupportedModelError(
                f"{type(self.target.model).__name__} keeps a recurrent state and cannot forget "
                "tokens; use a draft model with attention layers only"
            )

    def fork(self, rows: Sequence[int]) -> RecurrentSession:
        """A copy of the row.

        Raises:
            UnsupportedModelError: More than one row is asked for.
        """
        if list(rows) != [0]:
            raise UnsupportedModelError("a recurrent session holds one row")
        return copy.deepcopy(self, {id(self.target): self.target})

    def join(self, other: Session) -> RecurrentSession:
        """Recurrent states are decoded one row at a time.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"{type(self.target.model).__name__} keeps a recurrent state; its session holds one row"
        )


PROBE_PARENTS = (-1, 0, 0, 1, 1, 3)


@torch.no_grad()
def verified_reach(target: HubTarget) -> Reach:
    """Find what one forward of a model scores exactly, by trying it.

    A 7-token prefix, then a 6-node tree (else a chain, else one token) in one call against each
    path recomputed without a cache, then one path kept and one more token fed.

    Returns:
        ``"tree"``, ``"chain"`` or ``"step"``.

    Raises:
        UnsupportedModelError: Not even one-token steps agree with the model without its cache.
    """
    options: list[tuple[Reach, tuple[int, ...]]] = [("chain", (-1, 0, 1, 2)), ("step", (-1,))]
    if not target.recurrent:
        options.insert(0, ("tree", PROBE_PARENTS))
    worst = float("nan")
    for reach, parents in options:
        target.reach = reach
        try:
            worst = probe_error(target, parents)
        except (RuntimeError, ValueError, IndexError):
            continue  # the model refuses this route; the next one asks less of it
        if worst <= tolerance(target.dtype):
            return reach
    raise UnsupportedModelError(
        f"{type(target.model).__name__} with its cache differs from itself without one by "
        f"{worst:.1e} of the logit spread, so its output cannot be kept unchanged"
    )


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits, as a share of their spread, that rounding explains."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 4e-2


def probe_error(target: HubTarget, parents: Sequence[int]) -> float:
    """Worst difference between a tree scored at once and its paths recomputed without a cache.

    Returns:
        Largest absolute difference of logits over the spread (max - min) of the reference.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = target.probe_inputs()
    encoded = target.encode(**inputs) if inputs else None
    draw = torch.randint(0, target.vocab_size, (8 + len(parents),), generator=generator)
    draw = draw.to(target.device)
    prefix, nodes, last = draw[:7], draw[7:-1], draw[-1:]
    topology = Topology.of(parents)
    topology = chain_topology(len(parents)) if topology.is_chain else topology
    session = target.session(1, **inputs)
    session.prefill([prefix])
    got = session.score(TokenTree(nodes[None], topology)).logits[0]
    worst = 0.0
    path = topology.paths()[-1]
    for leaf in topology.paths():
        full = torch.cat([prefix, nodes[leaf]])
        want = target.forward(full[None], encoded=encoded).logits[0, len(prefix) :]
        spread = float(want.max() - want.min()) or 1.0
        worst = max(worst, float((got[leaf] - want).abs().max()) / spread)
    session.keep(torch.tensor([path], device=target.device))
    again = session.score(TokenTree(last[None], chain_topology(1))).logits[0, -1]
    full = torch.cat([prefix, nodes[path], last])
    want = target.forward(full[None], encoded=encoded).logits[0, -1]
    spread = float(want.max() - want.min()) or 1.0
    return max(worst, float((again - want).abs().max()) / spread)
