"""Losses of sound: the balancer on known gradients, discriminators, spectra at many scales."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models.audio_disc import (
    PeriodDiscriminator,
    ScaleDiscriminator,
    STFTDiscriminator,
)
from isthmus.objectives.audio import (
    LossBalancer,
    feature_matching,
    hinge_discriminator,
    hinge_generator,
    least_squares_discriminator,
    least_squares_generator,
    multiscale_mel,
)

DISCRIMINATORS = {
    "stft": lambda: STFTDiscriminator((256, 128), 3),
    "period": lambda: PeriodDiscriminator((2, 3), (4, 8)),
    "scale": lambda: ScaleDiscriminator(2, (4, 8)),
}


def test_the_balancer_on_two_quadratics() -> None:
    """Gradients 2 a (x - p) of very different sizes; shares are the weights, whatever a is."""
    target = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for scale in (1e-3, 1.0, 1e4):
        balancer = LossBalancer({"one": 1.0, "two": 4.0}, decay=0.9)
        for _ in range(50):
            x = torch.zeros(1, 2, requires_grad=True)
            losses = {
                "one": scale * (x - target[0]).square().sum(),
                "two": (x - target[1]).square().sum(),
            }
            found, norms = balancer.gradient(losses, x)
        # unit vectors -e1 and -e2, times 1/5 and 4/5
        assert torch.allclose(found, torch.tensor([[-0.2, -0.8]]), atol=1e-5)
        assert float(norms["two"]) == pytest.approx(0.8, abs=1e-5)


def test_norms_are_those_of_a_sound_however_many_there_are() -> None:
    for count in (1, 9):
        x = torch.zeros(count, 4, requires_grad=True)
        found, _ = LossBalancer({"one": 1.0}).gradient({"one": (x - 1).square().mean()}, x)
        assert torch.allclose(found.norm(dim=1), torch.ones(count))


def test_fixed_weights_follow_the_losses_scale() -> None:
    fixed = LossBalancer({"one": 1.0, "two": 4.0}, balance=False)
    x = torch.zeros(2, requires_grad=True)
    losses = {"one": 1e4 * (x - 1).square().sum(), "two": (x - 1).square().sum()}
    _, norms = fixed.gradient(losses, x)
    assert float(norms["two"]) < 0.001 * float(norms["one"])


def test_averages_go_into_files_and_losses_may_be_missing() -> None:
    balancer = LossBalancer({"one": 1.0, "two": 1.0}, decay=0.5)
    x = torch.ones(1, requires_grad=True)
    balancer.gradient({"one": 2 * x.sum()}, x)
    assert balancer.state_dict()["average"].tolist() == [1.0, 0.0]
    found, _ = balancer.gradient({"one": 2 * x.sum(), "two": -8 * x.sum()}, x)
    assert found.tolist() == [0.0]  # 1/2 - 1/2
    before = balancer.average.clone()
    balancer.eval().gradient({"one": 7 * x.sum()}, x)
    assert torch.equal(before, balancer.average)
    with pytest.raises(InvalidInputError, match="positive"):
        LossBalancer({"one": 0.0})


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_learn_to_tell(name: str) -> None:
    torch.manual_seed(0)
    net = DISCRIMINATORS[name]()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    t = torch.arange(1024) / 16000
    for _ in range(80):
        phase = torch.rand(4, 1) * 6.28
        real = torch.sin(2 * torch.pi * 700 * t + phase)
        fake = torch.randn(4, 1024)
        judged = net(real), net(fake)
        loss = hinge_discriminator(*judged)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0, "2 is where it begins"
    with torch.no_grad():
        found, other = net(real), net(fake)
        assert float(hinge_generator(found)) < float(hinge_generator(other))
        assert float(feature_matching(found, found)) == 0.0
        assert float(feature_matching(found, other)) > 0.1
        ls = least_squares_generator(found), least_squares_generator(other)
        assert float(ls[0]) < float(ls[1])


def test_least_squares_by_hand() -> None:
    real, fake = [(torch.tensor([0.5]), [])], [(torch.tensor([-2.0]), [])]
    assert float(least_squares_discriminator(real, fake)) == 0.25 + 4.0
    assert float(least_squares_generator(fake)) == 9.0
    assert float(hinge_discriminator(real, fake)) == 0.5
    assert float(hinge_generator(fake)) == 3.0


def test_the_mel_distance_and_its_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4096)
    assert float(multiscale_mel(x, x, 16000)) < 1e-5
    y = (0.5 * x).requires_grad_()
    loss = multiscale_mel(y, x, 16000, sizes=(512, 2048))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * 0.6931, rel=1e-2)
    assert y.grad is not None and torch.isfinite(y.grad).all()
    silence = torch.zeros(1, 4096, requires_grad=True)
    multiscale_mel(silence, torch.zeros(1, 4096), 16000).backward()
    assert silence.grad is not None and torch.isfinite(silence.grad).all()
    with pytest.raises(InvalidInputError, match="samples"):
        multiscale_mel(x[:, :100], x[:, :100], 16000)
