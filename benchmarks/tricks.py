"""What each trick of `ltm_pyro/engine/kernels` buys alone, of a whole step or of a written token.

    python benchmarks/tricks.py                      # nano, mixture and tiny: minutes
    python benchmarks/tricks.py --presets nano

Ratios of times without the trick over times with it, medians over turns in one process; all on the
same weights and tokens, in CPU time of one thread, uncompiled. Tables of it: `engine/README.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.config import preset
from ltm_pyro.engine.kernels import likelihood
from ltm_pyro.models import decoder as decoder_module
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.sampling import write_tokens

BATCH = 8
WRITTEN = 64


def all_at_once(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`token_log_prob` by all logits."""
    return -F.cross_entropy((h @ weight.T).float(), targets, reduction="none")


def plain_start(decoder: Decoder, z: Tensor) -> dict[str, Any]:
    """A plain KV cache: keys and values (B, heads, W, head_dim) of each layer."""
    config = decoder.config
    shape = (len(z), config.n_heads, min(config.window, config.seq_len), -1)
    zeros = z.new_zeros((len(z), config.n_heads, shape[2], config.width // config.n_heads))
    rings = [(zeros.clone(), zeros.clone()) for _ in decoder.layers]
    return {"thoughts": decoder.thought_keys(z), "rings": rings, "t": 0}


def plain_step(decoder: Decoder, previous: Tensor | None, state: dict[str, Any]) -> Tensor:
    """`Decoder.step` by the layers' own modules."""
    t, thoughts = state["t"], state["thoughts"]
    rows = thoughts[0].shape[1]
    read = decoder.bos.expand(rows, -1) if previous is None else decoder.embedding(previous)
    h, angles = read[:, None], (decoder.cosines[t : t + 1], decoder.sines[t : t + 1])
    for layer, (keys, values), own in zip(decoder.layers, state["rings"], thoughts, strict=True):
        attention: Any = layer.self_attention
        q, k, v = attention.heads(layer.norm_self(h), angles)  # type: ignore[operator]
        slot, filled = t % keys.shape[2], min(t + 1, keys.shape[2])
        keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled])
        h = layer.think(h + attention.out(mixed.transpose(1, 2).flatten(2)), own)  # type: ignore[operator]
    state["t"] = t + 1
    logits: Tensor = (decoder.norm(h) @ decoder.embedding.weight.T)[:, 0]
    return logits


def never(weight: Tensor) -> bool:
    """No matrix is prepacked."""
    return False


TRICKS: Mapping[str, tuple[tuple[Any, str, Any], ...]] = {
    "all": (),
    "prepack": ((likelihood, "can_prepack", never), (decoder_module, "can_prepack", never)),
    "trunk": ((ltm.LatentThoughtModel, "prepare", lambda model, batch: batch),),
    "cross_entropy": ((decoder_module, "token_log_prob", all_at_once),),
    "kv_cache": ((Decoder, "start", plain_start), (Decoder, "step", plain_step)),
}
"""What stands in for each trick."""


@contextmanager
def without(trick: str) -> Iterator[None]:
    """Inside the block this trick alone is not used."""
    with ExitStack() as stack:
        for owner, name, instead in TRICKS[trick]:
            stack.enter_context(patch.object(owner, name, instead))
        yield


def measure(name: str, rounds: int, steps: int | None = None) -> dict[str, dict[str, float]]:
    """By trick and by work (`infer`, `step`, `token`), the median ratio without over with it."""
    torch.manual_seed(0)
    settings = preset(name)
    model = ltm.LatentThoughtModel.from_preset(name)
    for weight, p in model.named_parameters():
        if weight.endswith(
            "cross_attention.out.weight"
        ):  # starts at zero: thoughts would not count
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    config = model.config
    batch = ltm.Batch(torch.randint(config.vocab_size, (BATCH, min(config.seq_len, 256))))
    fast = ltm.Fast(steps=steps or min(settings.fast.steps, 8), lr=settings.fast.lr)
    svi = ltm.DualRateSVI(model, "mean_field", fast=fast, slow=ltm.Slow(lr=1e-6))
    z = model.prior().expand(torch.Size([1])).sample()
    work: dict[str, Callable[[], object]] = {
        "infer": lambda: svi.infer(batch, progress=False),
        "step": lambda: svi.step(batch),
        "token": lambda: write_tokens(model.decoder, z, min(config.seq_len, WRITTEN)),
    }
    of_token = {"all", "kv_cache"}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):
        for trick in TRICKS:
            for what, run in work.items():
                if trick == "all" or (what == "token") == (trick in of_token):
                    with without(trick):
                        began = time.process_time()
                        run()
                        took = time.process_time() - began
                    times.setdefault((trick, what), []).append(took)
    return {
        trick: {
            what: median(
                a / b for a, b in zip(some[1:], times["all", what][1:], strict=True)
            )
            for (other, what), some in times.items()
            if other == trick
        }
        for trick in TRICKS
        if trick != "all"
    }  # fmt: skip


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["nano", "mixture", "tiny"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast-steps", type=int, help="by default the preset's, at most 8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| without | {' | '.join(args.presets)} |\n|---|{'---|' * len(args.presets)}")
    found = {name: measure(name, args.rounds, args.fast_steps) for name in args.presets}
    for trick in list(TRICKS)[1:]:
        cells = [
            ", ".join(f"{what} {ratio:.2f}" for what, ratio in found[name][trick].items())
            for name in args.presets
        ]
        print(f"| {trick} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
