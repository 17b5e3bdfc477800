"""The training loop of the small reference models.

One loop, plain next-token loss, float32 on CPUs and bfloat16 autocast on CUDA. The order of the
data is a function of the seed and the step alone, so a checkpoint needs no random state:
parameters, optimiser moments and the step resume to the very same numbers.

The hidden matrices are trained by Muon (Keller Jordan et al., "Muon: an optimizer for hidden
layers in neural networks", 2024): the momentum of each matrix is replaced by an orthogonal matrix
close to it. The embedding and the norms are trained by AdamW.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError

IGNORED = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of a reference model, given the corpus.

    Attributes:
        name: Name of the model.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of decoder blocks.
        num_attention_heads: Number of heads; each has ``head_dim`` channels.
        head_dim: Channels per head.
        intermediate_size: Width inside the gated feed-forward layer.
        steps: Optimiser steps.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        vocab_size: Number of tokens.
        max_position_embeddings: Longest context.
        rope_theta: Base of the rotary position embedding.
        muon_lr: Learning rate of the hidden matrices.
        adam_lr: Learning rate of the embedding and the norms.
        momentum: Momentum of Muon.
        warmup_steps: Steps of linear rise.
        decay_share: Share of the steps, at the end, over which the rate falls linearly to zero.
        library_repeats: How often each module that is no test appears in an epoch.
        seed: Seed of the initial weights and of the order of the data.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    steps: int
    batch_size: int = 4
    sequence_length: int = 1024
    head_dim: int = 64
    vocab_size: int = 4096
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    momentum: float = 0.95
    warmup_steps: int = 40
    decay_share: float = 0.3
    library_repeats: int = 2
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @property
    def decay_start(self) -> int:
        """First step of the final fall of the learning rate."""
        return self.steps - round(self.decay_share * self.steps)

    def rate(self, step: int) -> float:
        """Factor of both learning rates at a step: rise, plateau, fall.

        Args:
            step: Number of steps already taken.

        Returns:
            A factor in (0, 1].
        """
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.steps - step) / max(1, self.steps - self.decay_start)
        return min(1.0, rise, fall)


@dataclass(frozen=True)
class Progress:
    """What a training run reports after each step.

    Attributes:
        step: Steps taken so far.
        steps: Steps in all.
        loss: Loss of the last batch in nats per token.
        seconds: Time spent in training steps, earlier sessions included.
    """

    step: int
    steps: int
    loss: float
    seconds: float


def loss_curve(losses: Sequence[float]) -> list[float]:
    """Means of ten equal parts of a run, for its record.

    Example:
        >>> loss_curve([4.0, 2.0])
        [4.0, 2.0]
    """
    block = max(1, len(losses) // 10)
    parts = [losses[i : i + block] for i in range(0, len(losses), block)]
    return [round(sum(part) / len(part), 4) for part in parts]


def build(recipe: Recipe, *, token_id: int = 0) -> LlamaForCausalLM:
    """Make a model with freshly drawn float32 weights.

    Args:
        recipe: Shape and seed.
        token_id: The special token that begins, ends and pads.

    Returns:
        A Llama of transformers with tied embeddings.
    """
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_attention_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=token_id,
        eos_token_id=token_id,
        pad_token_id=token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                # Each block starts as the identity.
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Move all singular values towards 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: Float32, [N, R, C].
        iterations: Five bring them to about 0.7 to 1.2, which is enough for an optimiser.

    Returns:
        Tensor of the same shape.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = 3.4445 * x + torch.bmm(torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x)
    return cast(Tensor, x.mT) if tall else x


class Muon:
    """Momentum with orthogonalised updates, matrices of one shape in one batch.

    torch.optim.Muon casts to bfloat16 inside the iteration, which is some sixty times slower than
    float32 on CPUs without bfloat16 units.

    Args:
        matrices: Named two-dimensional parameters.
        momentum: Decay of the running mean of gradients.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], momentum: float) -> None:
        self.matrices = matrices
        self.momentum = momentum
        self.state = {name: torch.zeros_like(weight) for name, weight in matrices.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step.

        Args:
            lr: Learning rate; every update has singular values near ``lr``.
        """
        by_shape: dict[torch.Size, list[str]] = {}
        for name, weight in self.matrices.items():
            by_shape.setdefault(weight.shape, []).append(name)
        for (rows, columns), names in by_shape.items():
            updates = []
            for name in names:
                gradient = cast(Tensor, self.matrices[name].grad)
                mean = self.state[name].lerp_(gradient, 1 - self.momentum)
                updates.append(gradient.lerp(mean, self.momentum))
            scale = math.sqrt(max(1.0, rows / columns))
            for name, update in zip(names, orthogonalize(torch.stack(updates)), strict=True):
                self.matrices[name].sub_(update, alpha=lr * scale)


def pack(documents: Sequence[NDArray[np.int32]], end: int) -> NDArray[np.int32]:
    """Join token ids of documents, each after an end-of-text token.

    Args:
        documents: Token ids, one array per document.
        end: Id of the end-of-text token.

    Returns:
        One array of ids.
    """
    mark = np.array([end], dtype=np.int32)
    return np.concatenate([part for ids in documents for part in (mark, ids)] + [mark])


def batches(
    documents: Sequence[NDArray[np.int32]], recipe: Recipe, end: int, start: int
) -> Iterator[Tensor]:
    """Packed sequences, epoch after epoch, shuffled by seed and epoch.

    Args:
        documents: Token ids, one array per document.
        recipe: Batch size, sequence length, seed.
        end: Id of the end-of-text token.
        start: Step to begin with; skipping costs nothing.

    Yields:
        Token ids [B, T + 1]; the last column is only predicted.

    Raises:
        InvalidInputError: The documents do not fill one sequence.
    """
    length = recipe.sequence_length
    windows = (sum(len(ids) + 1 for ids in documents)) // length
    if windows < 1:
        raise InvalidInputError(f"the documents hold fewer than {length} tokens; give more text")
    current = -1
    stream: NDArray[np.int32] = np.empty(0, dtype=np.int32)
    order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    position = start * recipe.batch_size
    while True:
        rows = []
        for index in range(position, position + recipe.batch_size):
            epoch, slot = divmod(index, windows)
            if epoch != current:
                rng = np.random.default_rng([recipe.seed, epoch])
                stream = pack([documents[i] for i in rng.permutation(len(documents))], end)
                order = rng.permutation(windows)
                current = epoch
            first = int(order[slot]) * length
            rows.append(stream[first : first + length + 1])
        position += recipe.batch_size
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of next-token prediction.

    Args:
        model: A causal language model of transformers.
        ids: Token ids [B, T + 1].

    Returns:
        Scalar in nats per token.
    """
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module, stream: NDArray[np.int32], length: int, windows: int | None
) -> float:
    """Mean held-out loss over consecutive windows.

    Args:
        model: A causal language model of transformers.
        stream: Packed token ids.
        length: Tokens per window; no context crosses a window.
        windows: Number of windows, spread evenly; None takes all.

    Returns:
        Nats per token.
    """
    device = next(model.parameters()).device
    starts = np.arange(0, len(stream) - 1, length)
    if windows is not None and windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 2, windows).round().astype(int)]
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in starts:
        window = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
        count = len(window) - 1
        total += float(nats(model, window[None].to(device))) * count
        tokens += count
    model.train(was_training)
    return total / tokens


class Course(Protocol):
    """What a trainer trains: a network, what it reads at each step, and its loss."""

    def build(self) -> Any:
        """The network with freshly drawn float32 weights."""
        ...

    def batches(self, start: int) -> Iterator[Any]:
        """Tensors, or tuples of tensors, from step ``start`` on."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar in nats per token."""
        ...


class TextCourse:
    """Packed documents and a plain next-token loss.

    Args:
        recipe: What to train.
        documents: Token ids, one array per document.
        end: Id of the end-of-text token.
    """

    def __init__(self, recipe: Recipe, documents: Sequence[NDArray[np.int32]], end: int) -> None:
        self.recipe, self.documents, self.end = recipe, documents, end

    def build(self) -> LlamaForCausalLM:
        """A Llama with fresh weights."""
        return build(self.recipe, token_id=self.end)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids [B, T + 1]."""
        return batches(self.documents, self.recipe, self.end, start)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of next-token prediction."""
        return nats(model, batch)


class Trainer:
    """A resumable training run.

    Args:
        recipe: What to train.
        documents: Token ids, one array per document; not read where a course is given.
        end: Id of the end-of-text token.
        corpus: Digest of the corpus; a checkpoint of another corpus is refused.
        directory: Folder of the checkpoint ``state.safetensors``.
        device: Where to train.
        course: What to train instead of a language model on the documents.

    Raises:
        BrokenFileError: The checkpoint is truncated or altered, or the folder cannot be written.
        MismatchError: The checkpoint belongs to another recipe or corpus.
    """

    def __init__(
        self,
        recipe: Recipe,
        documents: Sequence[NDArray[np.int32]],
        *,
        end: int,
        corpus: str,
        directory: Path,
        device: str = "cpu",
        course: Course | None = None,
    ) -> None:
        self.recipe = recipe
        self.end = end
        self.corpus = corpus
        self.path = directory / "state.safetensors"
        self.device = torch.device(device)
        self.step = 0
        self.seconds = 0.0
        self.course = course or TextCourse(recipe, documents, end)
        self.model = self.course.build()
        cast(nn.Module, self.model).to(self.device)
        hidden: dict[str, nn.Parameter] = {}
        others: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            is_hidden = parameter.dim() == 2 and ".layers." in name
            (hidden if is_hidden else others)[name] = parameter
        self._muon = Muon(hidden, recipe.momentum)
        self._others = others
        self._adam = torch.optim.AdamW(
            list(others.values()), lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BrokenFileError(
                f"cannot write to {str(directory)!r} ({error.strerror}); "
                "set ISTHMUS_CACHE to a folder that can be written"
            ) from error
        if self.path.exists():
            self._load()

    def run(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        *,
        stop_at: int | None = None,
        save_every_s: float = 60.0,
    ) -> None:
        """Train to the end of the recipe, saving now and then.

        Ctrl-C and SIGTERM finish the step, save, and then raise KeyboardInterrupt.

        Args:
            report: Called after each step.
            stop_at: Save and return after this step instead.
            save_every_s: Seconds between checkpoints.

        Raises:
            KeyboardInterrupt: The run was interrupted; its state is saved.
            BrokenFileError: The checkpoint cannot be written.
        """
        recipe = self.recipe
        last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
        self.model.train()
        saved = time.monotonic()
        source = self.course.batches(self.step)
        with _deferred_interrupt() as interrupted:
            while self.step < last:
                began = time.monotonic()
                loss = self._train_step(_moved(next(source), self.device))
                self.step += 1
                self.seconds += time.monotonic() - began
                report(Progress(self.step, recipe.steps, loss, self.seconds))
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt
                if time.monotonic() - saved > save_every_s:
                    self.save()
                    saved = time.monotonic()
            self.save()

    def _train_step(self, batch: Any) -> float:
        rate = self.recipe.rate(self.step)
        device = self.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = self.course.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(self._others.values()), 1.0)
        self._muon.step(self.recipe.muon_lr * rate)
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.adam_lr * rate
        self._adam.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        found |= {f"muon.{name}": mean for name, mean in self._muon.state.items()}
        for name, parameter in self._others.items():
            for key, value in self._adam.state[parameter].items():
                found[f"adam.{key}.{name}"] = value
        return found

    def save(self) -> None:
        """Write the checkpoint; the previous one stays whole until the new one is complete.

        Raises:
            BrokenFileError: The folder cannot be written.
        """
        header = {
            "recipe": self.recipe.as_dict(),
            "corpus": self.corpus,
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        try:
            save_file(
                {name: t.cpu().contiguous() for name, t in self._tensors().items()},
                temporary,
                metadata={"isthmus": json.dumps(header)},
            )
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise BrokenFileError(f"cannot write {str(self.path)!r}: {error}") from error

    def _load(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads(file.metadata()["isthmus"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, seconds = int(header["step"]), float(header["seconds"])
            saved = type(self.recipe)(**header["recipe"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BrokenFileError(
                f"the checkpoint {str(self.path)!r} is truncated or altered ({error}); "
                "delete it to train from the start"
            ) from error
        if header["corpus"] != self.corpus or not _continues(saved, self.recipe, step):
            raise MismatchError(
                f"the checkpoint {str(self.path)!r} belongs to another recipe or corpus; "
                "delete it to train from the start"
            )
        if step:
            for parameter in self._others.values():
                self._adam.state[parameter] = {
                    key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")
                } | {"step": torch.zeros(())}
        expected = self._tensors()
        if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in tensors.items()}:
            raise BrokenFileError(
                f"the checkpoint {str(self.path)!r} does not hold the tensors of its recipe; "
                "delete it to train from the start"
            )
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(tensors[name])
        self.step, self.seconds = step, seconds


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return tuple(tensor.to(device) for tensor in batch)


def _continues(saved: Recipe, wanted: Recipe, step: int) -> bool:
    """Whether both recipes give the same weights up to a step."""
    if replace(saved, steps=wanted.steps, decay_share=wanted.decay_share) != wanted:
        return False
    return saved == wanted or step <= min(saved.decay_start, wanted.decay_start)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of stopping inside an optimiser step."""
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: seen
        return
    previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
