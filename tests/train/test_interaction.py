"""What a fusion is for: the mouth of the built-in set is a product of speech and speaker.

A linear map behind each form, fitted by gradient descent, predicts the mouth of speakers it has not
seen from their true articulation and the true gestures of their speech. Concatenation cannot.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyfusion import nn
from train.data.synthetic import articulate, speaker_identity
from train.data.synthetic.speech import speak

FITTED, UNSEEN, FPS = 48, 16, 25
TIMES = (np.arange(FPS) + 0.5) / FPS


def draw(speaker: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A second of speech: gestures (T, 2), articulation (8,), mouth height and width (T, 2)."""
    who = speaker_identity(speaker)
    rng = np.random.default_rng(speaker)
    said = speak(rng, who.voice, seconds=1.0, sample_rate=8000, times=TIMES)
    mouth = articulate(who, said)
    gestures = np.stack([said.jaw, said.spread], 1)
    return gestures, who.articulation, np.stack([mouth.openness, mouth.width], 1)


@pytest.fixture(scope="module")
def utterances() -> list[torch.Tensor]:
    """Standardised gestures (B, T, 2), articulation (B, 8) and mouth (B, T, 2) of all speakers."""
    made = zip(*(draw(speaker) for speaker in range(FITTED + UNSEEN)), strict=True)
    values = [torch.tensor(np.stack(part), dtype=torch.float32) for part in made]
    return [(x - x.flatten(0, -2).mean(0)) / x.flatten(0, -2).std(0) for x in values]


def explained(form: str, utterances: list[torch.Tensor], steps: int = 500) -> torch.Tensor:
    """Share of the variance of unseen speakers' mouths that a fitted model explains, (2,)."""
    torch.manual_seed(0)
    speech, who, mouth = utterances
    fusion = nn.make_fusion(form, (2, 8), 12, rank=12, ranks=(12, 3, 9))
    read = torch.nn.Linear(fusion.out_features, 2)
    optimizer = torch.optim.Adam([*fusion.parameters(), *read.parameters()], 1e-2)
    for _ in range(steps):
        loss = F.mse_loss(read(fusion(speech[:FITTED], who[:FITTED])), mouth[:FITTED])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = read(fusion(speech[FITTED:], who[FITTED:])) - mouth[FITTED:]
    return 1 - error.square().mean((0, 1)) / mouth[FITTED:].flatten(0, 1).var(0)


@pytest.fixture(scope="module")
def linear(utterances) -> torch.Tensor:
    """What concatenation explains."""
    return explained("concat", utterances)


@pytest.mark.parametrize("form", ["cp", "tucker", "cmf", "cmf-sr"])
def test_a_polynomial_predicts_the_mouths_of_unseen_speakers(form, utterances, linear):
    left, left_by_concat = 1 - explained(form, utterances), 1 - linear
    assert (left_by_concat > 0.03).all()
    assert (left < 0.1 * left_by_concat).all()
