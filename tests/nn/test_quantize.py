"""Quantizers: exact codes, the two known faults of published code, an independent package."""

import os
import socket
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.nn.quantize import FSQ, RVQ, VQ, GroupedRVQ, LatentQuantize, MaskedChannelRVQ

LEVELS = ([8, 5, 5, 5], [8, 6, 5], [7, 5, 5, 5, 5])


def sound(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled(quantizer: Any, z: torch.Tensor, steps: int = 4) -> Any:
    quantizer.train()
    for _ in range(steps):
        quantizer(z)
    return quantizer.eval()


QUANTIZERS: dict[str, Any] = {
    "vq": lambda: VQ(12, 16),
    "vq of narrow codes": lambda: VQ(12, 16, 4),
    "vq by angle": lambda: VQ(12, 16, metric="cos"),
    "vq by gradient": lambda: VQ(12, 16, learn="grad"),
    "rvq": lambda: RVQ(12, 16, 4),
    "grouped": lambda: GroupedRVQ(12, 16, 2, 2),
    "masked": lambda: MaskedChannelRVQ(12, 16, 5),
    "fsq": lambda: FSQ([3, 4] * 6),
    "latent": lambda: LatentQuantize([3, 4] * 6),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(2, 12, 9), (2, 12, 3, 5)])
def test_decode_of_encode_is_what_comes_out(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z = sound(*shape)
    quantizer = settled(QUANTIZERS[name](), z)
    found = quantizer(z)
    codes = quantizer.encode(z)
    assert torch.equal(codes, found.codes)
    assert torch.equal(quantizer.decode(codes), found.z_q)
    assert found.z_q.shape == z.shape and float(found.commit_loss) == 0
    for value in found.stats.values():
        assert value.shape == (len(codes) if codes.ndim == z.ndim else 1,)


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n not in ("vq of narrow codes", "fsq")])
def test_gradients_pass_straight_through(name: str) -> None:
    torch.manual_seed(0)
    z = sound(2, 12, 9).requires_grad_()
    quantizer = QUANTIZERS[name]().train()
    if name == "vq by angle":
        z = F.normalize(z.detach(), dim=1).requires_grad_()
    wanted = sound(2, 12, 9, seed=1)
    (quantizer(z).z_q * wanted).sum().backward()
    assert z.grad is not None
    if name != "vq by angle":
        assert torch.allclose(z.grad, wanted)
    assert float(z.grad.abs().sum()) > 0


def test_a_dead_code_is_started_anew_in_vector_sum_and_count() -> None:
    """The next step must not put the old vector back."""
    torch.manual_seed(0)
    vq = VQ(4, 3, kmeans_init=False, dead_below=2.0).train()
    vq.embed.copy_(torch.tensor([[0.0] * 4, [1.0] * 4, [500.0] * 4]))
    vq.count.fill_(10.0)
    vq.count[2] = 2.001  # one more step without use, and it is dead
    vq.total.copy_(vq.embed * vq.count[:, None])
    z = sound(1, 4, 64)
    vq(z)
    fresh = vq.embed[2].clone()
    assert float(fresh.abs().max()) < 10, "the dead code stays where it was"
    assert float(vq.count[2]) == 2.0
    assert torch.equal(vq.total[2], fresh * 2.0)
    vq(z)
    assert float(vq.embed[2].abs().max()) < 10, "the moving average has put the old code back"


def test_commitment_of_later_stages_has_a_gradient() -> None:
    torch.manual_seed(0)
    rvq = RVQ(6, 8, 3).train()
    z = sound(2, 6, 40).requires_grad_()
    rvq(z)
    left, wanted = z.detach(), torch.zeros_like(z)
    # by hand: the gradient of sum_l mean (r_l-1 - q_l)^2, every q_l a constant
    for stage in range(3):
        q = rvq.layers[stage].decode(rvq.layers[stage].encode(left))
        wanted += 2 * (left - q) / z.numel()
        left = left - q
    (grad,) = torch.autograd.grad(rvq(z).commit_loss, z)
    assert torch.allclose(grad, wanted, atol=1e-7)


def test_projections_of_a_residual_quantizer_learn() -> None:
    torch.manual_seed(0)
    rvq = RVQ(6, 8, 2, code_dim=3).train()
    z = sound(2, 6, 40).requires_grad_()
    (rvq(z).z_q * sound(2, 6, 40, seed=1)).sum().backward()
    for layer in rvq.layers:
        assert float(layer.up.weight.grad.abs().sum()) > 0


def test_residual_energy_falls_with_every_codebook() -> None:
    torch.manual_seed(0)
    z = sound(4, 8, 200)
    rvq = settled(RVQ(8, 32, 4), z, 20)
    errors = [float((rvq.decode(rvq.encode(z, n)) - z).square().mean()) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]
    explained = rvq(z).stats["explained"]
    assert abs(float(explained.sum()) - (1 - errors[-1] / float(z.var()))) < 0.02


def test_the_moving_average_by_hand() -> None:
    vq = VQ(1, 2, kmeans_init=False, decay=0.5, eps=0.0, dead_below=0).train()
    vq.embed.copy_(torch.tensor([[0.0], [10.0]]))
    vq.total.copy_(vq.embed)
    vq(torch.tensor([[[1.0, 2.0, 9.0]]]))
    assert vq.count.tolist() == [1.5, 1.0]  # (1 + 2) / 2, (1 + 1) / 2
    assert vq.total.tolist() == [[1.5], [9.5]]  # (0 + 3) / 2, (10 + 9) / 2
    assert vq.embed.tolist() == [[1.0], [9.5]]


def test_one_group_is_a_plain_residual_quantizer() -> None:
    torch.manual_seed(0)
    grouped = GroupedRVQ(8, 16, 1, 3)
    torch.manual_seed(0)
    plain = RVQ(8, 16, 3)
    plain.load_state_dict({k.removeprefix("layers.0."): v for k, v in grouped.state_dict().items()})
    z = sound(2, 8, 30)
    for _ in range(3):
        torch.manual_seed(1)
        a = grouped.train()(z)
        torch.manual_seed(1)
        b = plain.train()(z)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q)


def test_a_masked_stage_reads_its_third_only() -> None:
    torch.manual_seed(0)
    z = sound(2, 10, 50)  # thirds of 3, 3 and 4
    quantizer = settled(MaskedChannelRVQ(10, 16, 4), z, 8)
    codes = quantizer.encode(z)
    for stage, (low, high) in enumerate([(0, 3), (3, 6), (6, 10)]):
        other = sound(2, 10, 50, seed=9)
        other[:, low:high] = z[:, low:high]
        assert torch.equal(quantizer.encode(other)[stage], codes[stage])
        outside = [c for c in range(10) if not low <= c < high]
        assert not quantizer.layers[stage].embed[:, outside].any()
    with pytest.raises(InvalidInputError, match="3 to 4"):
        quantizer.encode(z, 2)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_its_formula(levels: list[int]) -> None:
    z = 3 * sound(2, len(levels), 50)
    found = FSQ(levels).eval()(z)
    for b in range(2):
        for t in range(50):
            index, base = 0, 1
            for d, count in enumerate(levels):
                half = (count - 1) * 1.001 / 2
                offset = 0.5 if count % 2 == 0 else 0.0
                shift = torch.atanh(torch.tensor(offset / half))
                bound = torch.tanh(z[b, d, t] + shift) * half - offset
                whole = round(float(bound))
                assert float(found.z_q[b, d, t]) == pytest.approx(whole / (count // 2))
                index += (whole + count // 2) * base
                base *= count
            assert int(found.codes[b, t]) == index


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_beside_the_package(levels: list[int]) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    z = 3 * sound(2, len(levels), 50)
    ours = FSQ(levels).eval()(z)
    theirs = package.FSQ(levels)
    values, codes = theirs(z.transpose(1, 2))
    assert torch.equal(ours.codes, codes.long())
    assert torch.allclose(ours.z_q, values.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_of_fsq_comes_back(levels: list[int]) -> None:
    fsq = FSQ(levels).eval()
    codes = torch.arange(fsq.size)[None]
    q = fsq.decode(codes)
    half = torch.tensor(levels) // 2
    b = (q[0] * half[:, None]).T.long()
    assert torch.equal(fsq._index(b)[None], codes)


def _rank(rank: int, port: int, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vq = VQ(4, 8, kmeans_init=False, dead_below=0.0).train()
    z = sound(2, 4, 30)
    for _ in range(3):
        vq(z[rank : rank + 1])
    out[rank] = vq.embed.clone()
    # and with codes that start anew, all ranks have the same
    torch.manual_seed(rank)
    again = VQ(4, 8, dead_below=3.0).train()
    for _ in range(3):
        again(z[rank : rank + 1])
    out[rank + 2] = again.embed.clone()
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        out = manager.dict()
        multiprocessing.spawn(_rank, (port, out), 2)
        found = {k: v.clone() for k, v in out.items()}
    torch.manual_seed(0)
    vq = VQ(4, 8, kmeans_init=False, dead_below=0.0).train()
    for _ in range(3):
        vq(sound(2, 4, 30))
    assert torch.allclose(found[0], vq.embed, atol=1e-6)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="equal groups"):
        GroupedRVQ(10, 16, 3, 2)
    with pytest.raises(InvalidInputError, match="2 or more"):
        FSQ([8, 1])
    with pytest.raises(InvalidInputError, match="outside"):
        VQ(4, 8).decode(torch.tensor([[8]]))
    with pytest.raises(InvalidInputError, match="1 to 3"):
        RVQ(4, 8, 3).encode(sound(1, 4, 2), 4)
    with pytest.raises(InvalidInputError, match="channels"):
        LatentQuantize([3, 3])(sound(1, 3, 2))
    with pytest.raises(InvalidInputError, match="codes"):
        VQ(4, 1)


def test_codes_learnt_by_gradient_may_begin_as_k_means() -> None:
    """Two far heaps of vectors: their means, from the first batch on."""
    torch.manual_seed(0)
    z = torch.tensor([[[5.0, 5.2, -3.0, -3.4]]])
    vq = VQ(1, 2, learn="grad", kmeans_init=True).train()
    assert not vq.ready
    vq(z)
    assert vq.ready and sorted(vq.embed.flatten().tolist()) == pytest.approx([-3.2, 5.1])
    assert vq.embed.requires_grad
    assert bool(VQ(1, 2, learn="grad").ready) and not bool(VQ(1, 2).ready)
