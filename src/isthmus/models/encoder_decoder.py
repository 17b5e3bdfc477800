"""One transformer encoder-decoder for many papers: a configuration says which.

::

    source ─embed─▶ [self-attention, feed-forward] x E ─▶ memory [B, S, D]
                                                             │ cross
    target ─embed─▶ [self-attention, cross-attention, feed-forward] x D ─▶ logits [B, T, V]

Every sublayer is ``x + f(norm(x))`` (pre) or ``norm(x + f(x))`` (post). :meth:`Config.t5` and
:meth:`Config.marian` are the rows whose weights transformers can hold: :meth:`EncoderDecoder.to_hf`
makes that twin, which then decodes through the engine, and ``from_hf`` reads one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.nn.attention import Kept, MultiHeadAttention
from isthmus.nn.feed_forward import FeedForward
from isthmus.nn.position import RelativeBias, sinusoidal


@dataclass(frozen=True)
class Config:
    """What an encoder-decoder is.

    Attributes:
        vocab_size: Tokens V, of both sides.
        hidden_size: Width D.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        num_attention_heads: Heads of every attention.
        head_dim: Channels of a head.
        intermediate_size: Width inside the feed-forwards.
        position: ``sinusoidal``, added to embeddings, or ``t5``, a bias of self-attention.
        norm: ``layer`` or ``rms``.
        norm_place: ``pre`` or ``post``.
        feed_forward: A kind of :class:`~isthmus.nn.feed_forward.FeedForward`.
        bias: Whether linear maps have biases.
        attention_scaled: Whether scores are divided by the root of ``head_dim``.
        embedding_scaled: Whether embeddings are multiplied by the root of D.
        tied: Whether the output matrix is the embedding.
        dropout: Of sublayers' outputs and embeddings.
        max_length: Longest source or target, where positions are added.
        pad_id: Padding, which also begins the decoder's text.
        end_id: End of a source and of a target.
    """

    vocab_size: int
    hidden_size: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 2048
    position: Literal["sinusoidal", "t5"] = "sinusoidal"
    norm: Literal["layer", "rms"] = "layer"
    norm_place: Literal["pre", "post"] = "post"
    feed_forward: str = "relu"
    bias: bool = True
    attention_scaled: bool = True
    embedding_scaled: bool = True
    tied: bool = True
    dropout: float = 0.0
    max_length: int = 512
    pad_id: int = 0
    end_id: int = 1

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "decoder_layers")
        for name in sizes:
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % 2:
            raise InvalidInputError(f"hidden_size must be even, got {self.hidden_size}")

    @classmethod
    def t5(cls, vocab_size: int, **sizes: Any) -> Config:
        """The row of T5 1.1 (arXiv 1910.10683 and its later checkpoints)."""
        return cls(
            vocab_size,
            position="t5",
            norm="rms",
            norm_place="pre",
            feed_forward="gated-gelu",
            bias=False,
            attention_scaled=False,
            embedding_scaled=False,
            tied=False,
            **sizes,
        )

    @classmethod
    def marian(cls, vocab_size: int, **sizes: Any) -> Config:
        """The row of Marian's transformer: post-norm, waves, one matrix for all embeddings."""
        return cls(vocab_size, **sizes)


@dataclass(frozen=True)
class Memory:
    """An encoded source.

    Attributes:
        states: [B, S, D].
        mask: True where there is a token, bool [B, S].
    """

    states: torch.Tensor
    mask: torch.Tensor


class Written:
    """What a decoder keeps of the text that it has written: the keys and values of every layer.

    Args:
        layers: Of the decoder.

    Attributes:
        length: Tokens so far.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.own = [Kept() for _ in range(layers)]
        self.across = [Kept() for _ in range(layers)]


class _Sublayer(nn.Module):
    """``x + f(norm(x))`` or ``norm(x + f(x))``."""

    def __init__(self, config: Config, inner: nn.Module) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.norm = _norm(config)
        self.inner = inner
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if self.pre:
            out: torch.Tensor = x + self.dropout(self.inner(self.norm(x), *args, **options))
        else:
            out = self.norm(x + self.dropout(self.inner(x, *args, **options)))
        return out


class _Layer(nn.Module):
    def __init__(self, config: Config, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = _Sublayer(config, _attention(config))
        self.cross_attention = _Sublayer(config, _attention(config)) if cross else None
        self.feed_forward = _Sublayer(
            config,
            FeedForward(
                config.hidden_size,
                config.intermediate_size,
                config.feed_forward,
                bias=config.bias,
                dropout=config.dropout,
            ),
        )

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        own: Kept | None = None,
        across: Kept | None = None,
    ) -> torch.Tensor:
        x = self.self_attention(x, mask=mask, causal=causal, kept=own)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory, mask=memory_mask, kept=across)
        out: torch.Tensor = self.feed_forward(x)
        return out


class _Stack(nn.Module):
    """The layers of one side, with what only whole sides have: a bias and a last norm."""

    def __init__(self, config: Config, layers: int, *, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.layers = nn.ModuleList(_Layer(config, cross=decoder) for _ in range(layers))
        self.bias = (
            RelativeBias(config.num_attention_heads, bidirectional=not decoder)
            if config.position == "t5"
            else None
        )
        self.norm = _norm(config) if config.norm_place == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        memory: Memory | None = None,
        written: Written | None = None,
    ) -> torch.Tensor:
        """Map x [B, T, D] to [B, T, D]; mask is bool [B, T], True where there is a token."""
        new, length = x.shape[1], x.shape[1] + (written.length if written else 0)
        keys = None if mask is None else mask[:, None, None, :]
        causal = self.decoder and new > 1  # a single new place sees all that is written
        if causal and (self.bias is not None or new < length):
            seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[-new:]
            keys, causal = seen if keys is None else keys & seen, False
        if self.bias is not None:
            bias = self.bias(length, length)[..., -new:, :]
            keys = (bias if keys is None else bias.masked_fill(~keys, -math.inf)).to(x.dtype)
        cross = None if memory is None else memory.mask[:, None, None, :]
        x = self.dropout(x)
        states = None if memory is None else memory.states
        for number, layer in enumerate(self.layers):
            kept = (written.own[number], written.across[number]) if written else ()
            x = layer(x, keys, causal, states, cross, *kept)
        out: torch.Tensor = self.dropout(self.norm(x))
        return out


class EncoderDecoder(nn.Module):
    """A transformer encoder-decoder.

    Args:
        config: What it is. Initial weights come from torch's generator: T5's own for ``t5``
            positions, else Glorot's, with embeddings of deviation ``D ** -0.5``.
    """

    waves: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_id)
        self.encoder = _Stack(config, config.encoder_layers, decoder=False)
        self.decoder = _Stack(config, config.decoder_layers, decoder=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.position == "sinusoidal":
            waves = sinusoidal(config.max_length, config.hidden_size).to(torch.get_default_dtype())
            self.register_buffer("waves", waves, persistent=False)
        self._initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    def encode(self, source: torch.Tensor, mask: torch.Tensor | None = None) -> Memory:
        """Encode sources int64 [B, S]; mask is True where there is a token, from ids when None."""
        mask = source != self.config.pad_id if mask is None else mask
        return Memory(self.encoder(self.embed(source), mask), mask)

    def decode(
        self,
        target: torch.Tensor,
        memory: Memory,
        where: torch.Tensor | None = None,
        written: Written | None = None,
    ) -> torch.Tensor:
        """Logits of the token after each one.

        Args:
            target: Decoder inputs, int64 [B, T]: padding first, then the text shifted right.
                Padding behind a text needs no mask, for nothing before it sees it.
            memory: The encoded source.
            where: Places whose logits are wanted, bool [B, T]; all when None.
            written: From :meth:`begin`: the target goes on behind what was given before, and is
                added to it.

        Returns:
            [B, T, V], or [N, V] of the N chosen places in order.
        """
        x = self.embed(target, written.length if written else 0)
        states = self.decoder(x, None, memory, written)
        if written:
            written.length += target.shape[1]
        logits: torch.Tensor = self.head(states if where is None else states[where])
        return logits

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of a target given its source; arguments as for ``encode`` and ``decode``."""
        return self.decode(target, self.encode(source), where)

    def begin(self) -> Written:
        """Nothing written yet; for :meth:`decode`."""
        return Written(len(self.decoder.layers))

    def embed(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Embeddings [B, T, D] of ids, with positions from ``start`` on where these are added.

        Raises:
            InvalidInputError: Longer than ``max_length``, where positions are added.
        """
        x: torch.Tensor = self.embedding(ids)
        if self.config.embedding_scaled:
            x = x * math.sqrt(self.config.hidden_size)
        if self.config.position == "sinusoidal":
            length = start + ids.shape[1]
            if length > self.config.max_length:
                raise InvalidInputError(
                    f"a text of {length} tokens is longer than max_length={self.config.max_length}"
                )
            x = x + self.waves[start:length]
        return x

    def _initialise(self) -> None:
        c = self.config
        if c.position != "t5":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            nn.init.normal_(self.embedding.weight, std=c.hidden_size**-0.5)
            return
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=1.0)
        inner = c.num_attention_heads * c.head_dim
        for module in self.modules():
            if isinstance(module, MultiHeadAttention):
                nn.init.normal_(module.q_proj.weight, std=(c.hidden_size * c.head_dim) ** -0.5)
                nn.init.normal_(module.k_proj.weight, std=c.hidden_size**-0.5)
                nn.init.normal_(module.v_proj.weight, std=c.hidden_size**-0.5)
                nn.init.normal_(module.out_proj.weight, std=inner**-0.5)
            elif isinstance(module, FeedForward):
                for name, weight in module.named_parameters():
                    width = c.intermediate_size if "out" in name else c.hidden_size
                    nn.init.normal_(weight, std=width**-0.5)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, std=c.hidden_size**-0.5)

    # the twin in transformers ------------------------------------------------------------------

    def to_hf(self) -> Any:
        """The same model as a class of transformers, holding the very same parameters.

        Raises:
            UnsupportedModelError: transformers has no such model.
        """
        import transformers

        row = _row(self.config)
        kind, config = (getattr(transformers, name) for name in row.classes)
        with torch.device("meta"):
            twin = kind(config(**row.config(self.config)))
        mine = {row.theirs(name): value for name, value in self.state_dict(keep_vars=True).items()}
        for name, module in twin.named_modules():
            for table in (module._parameters, module._buffers):
                for key, value in table.items():
                    if value is None or not value.is_meta:
                        continue
                    full = f"{name}.{key}".lstrip(".")
                    found = mine.get(row.alias(full))
                    if found is None:  # positions and a bias of the logits, which stay 0
                        found = row.fixed(full, self, value.shape)
                        if key in module._parameters:
                            found = nn.Parameter(found, requires_grad=False)
                    table[key] = found
        # transformers ties T5's output matrix where the file does not say otherwise
        twin.config.tie_word_embeddings = self.config.tied
        end, pad = self.config.end_id, self.config.pad_id
        twin.generation_config.update(
            eos_token_id=end, pad_token_id=pad, decoder_start_token_id=pad, bad_words_ids=None
        )
        return twin.eval()

    @classmethod
    def from_hf(cls, model: Any) -> Self:
        """Read the weights of a T5 1.1 or Marian model of transformers.

        Raises:
            UnsupportedModelError: It is no such model.
        """
        config = _config_from(model.config)
        row = _row(config)
        made = cls(config)
        theirs = model.state_dict()
        state = {name: theirs[row.theirs(name)] for name in made.state_dict()}
        made.load_state_dict(state)
        return made.to(next(model.parameters()).dtype).eval()


def _norm(config: Config) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, 1e-6)
    return nn.LayerNorm(config.hidden_size, 1e-5)


def _attention(config: Config) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        bias=config.bias,
        scaled=config.attention_scaled,
        dropout=config.dropout,
    )


class _Row:
    """How transformers names the parts of one kind of model."""

    classes: tuple[str, str]
    names: tuple[tuple[str, str], ...]

    def theirs(self, name: str) -> str:
        """Their name of one of our parameters."""
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name

    def alias(self, name: str) -> str:
        """The first name of a parameter of theirs that has several."""
        raise NotImplementedError

    def config(self, c: Config) -> dict[str, Any]:
        raise NotImplementedError

    def fixed(self, name: str, model: EncoderDecoder, shape: torch.Size) -> torch.Tensor:
        """What is no parameter of ours."""
        raise NotImplementedError


class _T5(_Row):
    classes = ("T5ForConditionalGeneration", "T5Config")
    names = (
        (r"^embedding\.", "shared."),
        (r"^head\.", "lm_head."),
        (r"^(\w+)\.bias\.table", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias"),
        (r"^(\w+)\.norm", r"\1.final_layer_norm"),
        (r"\.layers\.(\d+)\.", r".block.\1."),
        (r"\.self_attention\.inner", ".layer.0.SelfAttention"),
        (r"\.cross_attention\.inner", ".layer.1.EncDecAttention"),
        (r"^encoder(.*)\.feed_forward\.inner", r"encoder\1.layer.1.DenseReluDense"),
        (r"^decoder(.*)\.feed_forward\.inner", r"decoder\1.layer.2.DenseReluDense"),
        (r"\.self_attention\.norm", ".layer.0.layer_norm"),
        (r"\.cross_attention\.norm", ".layer.1.layer_norm"),
        (r"^encoder(.*)\.feed_forward\.norm", r"encoder\1.layer.1.layer_norm"),
        (r"^decoder(.*)\.feed_forward\.norm", r"decoder\1.layer.2.layer_norm"),
        (r"Attention\.(q|k|v)_proj", r"Attention.\1"),
        (r"Attention\.out_proj", "Attention.o"),
        (r"DenseReluDense\.gate_proj", "DenseReluDense.wi_0"),
        (r"DenseReluDense\.in_proj", "DenseReluDense.wi_1"),
        (r"DenseReluDense\.out_proj", "DenseReluDense.wo"),
    )

    def alias(self, name: str) -> str:
        return re.sub(r"^(encoder|decoder)\.embed_tokens", "shared", name)

    def config(self, c: Config) -> dict[str, Any]:
        return {
            "vocab_size": c.vocab_size,
            "d_model": c.hidden_size,
            "d_kv": c.head_dim,
            "d_ff": c.intermediate_size,
            "num_layers": c.encoder_layers,
            "num_decoder_layers": c.decoder_layers,
            "num_heads": c.num_attention_heads,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "dropout_rate": c.dropout,
            "pad_token_id": c.pad_id,
            "eos_token_id": c.end_id,
            "decoder_start_token_id": c.pad_id,
        }


class _Marian(_Row):
    classes = ("MarianMTModel", "MarianConfig")
    names = (
        (r"^embedding\.", "model.shared."),
        (r"^head\.", "lm_head."),
        (r"^(encoder|decoder)\.", r"model.\1."),
        (r"\.self_attention\.inner", ".self_attn"),
        (r"\.cross_attention\.inner", ".encoder_attn"),
        (r"\.feed_forward\.inner\.in_proj", ".fc1"),
        (r"\.feed_forward\.inner\.out_proj", ".fc2"),
        (r"\.self_attention\.norm", ".self_attn_layer_norm"),
        (r"\.cross_attention\.norm", ".encoder_attn_layer_norm"),
        (r"\.feed_forward\.norm", ".final_layer_norm"),
    )

    def alias(self, name: str) -> str:
        return re.sub(r"^model\.(encoder|decoder)\.embed_tokens", "model.shared", name)

    def config(self, c: Config) -> dict[str, Any]:
        return {
            "vocab_size": c.vocab_size,
            "d_model": c.hidden_size,
            "encoder_layers": c.encoder_layers,
            "decoder_layers": c.decoder_layers,
            "encoder_attention_heads": c.num_attention_heads,
            "decoder_attention_heads": c.num_attention_heads,
            "encoder_ffn_dim": c.intermediate_size,
            "decoder_ffn_dim": c.intermediate_size,
            "activation_function": c.feed_forward,
            "dropout": c.dropout,
            "max_position_embeddings": c.max_length,
            "scale_embedding": c.embedding_scaled,
            "tie_word_embeddings": c.tied,
            "pad_token_id": c.pad_id,
            "eos_token_id": c.end_id,
            "forced_eos_token_id": None,
            "decoder_start_token_id": c.pad_id,
        }

    def fixed(self, name: str, model: EncoderDecoder, shape: torch.Size) -> torch.Tensor:
        weight = model.embedding.weight
        if name.endswith("embed_positions.weight"):
            return model.waves.to(weight)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def _row(config: Config) -> _Row:
    sizes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.type in ("int", "float") and field.name != "vocab_size"
    }
    if config == Config.t5(config.vocab_size, **sizes):
        return _T5()
    marian = Config.marian(config.vocab_size, **sizes)
    if dataclasses.replace(config, feed_forward="relu") == marian and (
        config.head_dim * config.num_attention_heads == config.hidden_size
    ):
        return _Marian()
    raise UnsupportedModelError(
        "transformers has no model of this configuration; Config.t5 and Config.marian have one"
    )


def _config_from(theirs: Any) -> Config:
    if theirs.model_type == "t5" and theirs.feed_forward_proj == "gated-gelu":
        return Config.t5(
            theirs.vocab_size,
            hidden_size=theirs.d_model,
            encoder_layers=theirs.num_layers,
            decoder_layers=theirs.num_decoder_layers,
            num_attention_heads=theirs.num_heads,
            head_dim=theirs.d_kv,
            intermediate_size=theirs.d_ff,
            dropout=theirs.dropout_rate,
            pad_id=theirs.pad_token_id,
            end_id=theirs.eos_token_id,
        )
    if theirs.model_type == "marian":
        return Config.marian(
            theirs.vocab_size,
            hidden_size=theirs.d_model,
            encoder_layers=theirs.encoder_layers,
            decoder_layers=theirs.decoder_layers,
            num_attention_heads=theirs.encoder_attention_heads,
            head_dim=theirs.d_model // theirs.encoder_attention_heads,
            intermediate_size=theirs.encoder_ffn_dim,
            feed_forward=theirs.activation_function,
            embedding_scaled=theirs.scale_embedding,
            dropout=theirs.dropout,
            max_length=theirs.max_position_embeddings,
            pad_id=theirs.pad_token_id,
            end_id=theirs.eos_token_id,
        )
    raise UnsupportedModelError(
        f"a {theirs.model_type} model is not read here; T5 1.1 (gated-gelu) and Marian models are"
    )


def shifted(target: torch.Tensor, start: int) -> torch.Tensor:
    """Decoder inputs of targets [B, T]: the start, then all but the last token.

    Example:
        >>> shifted(torch.tensor([[5, 6, 1]]), 0).tolist()
        [[0, 5, 6]]
    """
    return F.pad(target[:, :-1], (1, 0), value=start)
