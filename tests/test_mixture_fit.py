"""The whole machine on text whose exact likelihood is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.config import preset


@pytest.mark.slow
def test_thoughts_close_the_gap_to_the_exact_likelihood() -> None:
    """Only the class tells a sequence from another, and only thoughts can carry it.

    A decoder that sees one token can at best reach the window-1 optimum; the rest of the way to
    the exact log-likelihood, about 43 nats per sequence, is z's. 90 % of it is asked of the ELBO,
    KL charged; 95 % was measured (importance weights: 97 %), with a paired error of 0.3.
    """
    config = preset("mixture")
    corpus = ltm.load_corpus("mixture", seq_len=64)
    torch.manual_seed(0)
    model = ltm.LatentThoughtModel(replace(config.model, vocab_size=corpus.vocab_size))
    guide = ltm.build_guide("mean_field", model)
    svi = ltm.DualRateSVI(model, guide, fast=config.fast, slow=config.slow)
    svi.fit(corpus.train, config.steps, config.batch_size, progress=False)
    batch = corpus.test.batch(range(256))
    scores = ltm.evaluate(model, svi.infer(batch, config.eval_fast_steps), batch, draws=64)
    exact = corpus.log_likelihood(batch).numpy()
    window = corpus.window_log_likelihood(batch, window=1).numpy()
    elbo, iw = (
        float((scores[name].values - window).mean() / (exact - window).mean())
        for name in ("elbo", "iw_bound")
    )
    # Below 1 in the mean alone: a model may find a single sequence likelier than the truth does.
    assert 0.9 <= elbo <= iw < 1.0
