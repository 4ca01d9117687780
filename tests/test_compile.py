"""Compiling the fast loop changes its speed only, and is never required."""

from __future__ import annotations

import importlib
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from tolerances import EXACT
from torch.distributions import Distribution

import ltm_pyro as ltm
from ltm_pyro.engine.kernels.compiled import cache_of_compiled_code, remove_torn


def small_model() -> ltm.LatentThoughtModel:
    """Thoughts matter from the start."""
    model = ltm.LatentThoughtModel.from_preset(
        "nano", seq_len=16, width=16, n_heads=2, mlp_hidden=24, n_layers=2, thought_dim=4
    )
    for name, p in model.named_parameters():
        if name.endswith("cross_attention.out.weight"):
            torch.nn.init.normal_(p, std=0.3)
    return model


def infer(model: ltm.LatentThoughtModel, batch: ltm.Batch) -> ltm.Posterior:
    return ltm.DualRateSVI(model, ltm.build_guide("mean_field", model)).infer(batch)


def test_without_a_compiler_the_loop_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(), ltm.Batch(torch.randint(0, 256, (3, 16)))
    expected = infer(model, batch)

    def broken(function: object, **options: object) -> object:
        def call(*args: object, **shared: object) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model.compile_fast_loop()
    with pytest.warns(UserWarning, match="uncompiled") as seen:
        assert torch.equal(infer(model, batch).mean, expected.mean)
    assert len(seen) == 1  # told once, not at every step


def test_what_a_killed_compiler_left_is_removed(tmp_path: Path) -> None:
    # An ELF file of a header, 36 bytes of code, and a table of two sections of 64 bytes.
    head = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 100)
    library = head.ljust(58, b"\0") + struct.pack("<HHH", 64, 2, 1) + bytes(36 + 128)
    assert len(library) == 100 + 128
    (tmp_path / "ab").mkdir()
    for name, content, age in (
        ("whole", library, 60),
        ("empty", b"", 60),
        ("cut", library[:-1], 60),
        ("header", library[:40], 60),
        ("being written", b"", 0),
    ):
        file = tmp_path / "ab" / f"{name}.so"
        file.write_bytes(content)
        os.utime(file, (time.time() - age,) * 2)
    remove_torn(tmp_path)
    assert {f.stem for f in tmp_path.glob("*/*")} == {"whole", "being written"}


def test_only_the_clocks_call_the_compiled_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(), ltm.Batch(torch.randint(0, 256, (3, 16)))
    calls: list[int] = []

    def counting(function, **options):
        def call(*args, **shared):
            calls.append(1)
            return function(*args, **shared)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    model.compile_fast_loop()
    svi = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model), fast=ltm.Fast(steps=5))
    svi.step(batch)
    assert len(calls) == 5 + 1  # fast steps and the slow one
    ltm.evaluate(model, svi.infer(batch), batch, draws=2)
    assert len(calls) == 6 + 5


def test_wrapping_leaves_validation_as_it_was() -> None:
    before = Distribution._validate_args
    small_model().compile_fast_loop()
    assert Distribution._validate_args is before


@pytest.mark.slow
# torch's tracer warns and hides its own warnings, which as errors would end the compilation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_compiled_and_eager_loops_agree() -> None:
    """Compilation takes from ten seconds to a minute."""
    model, batch = small_model(), ltm.Batch(torch.randint(0, 256, (3, 16)))
    expected = infer(model, batch)
    model.compile_fast_loop()
    EXACT.assert_close(infer(model, batch).mean, expected.mean)
    draws = ltm.sample_posterior(model, batch, start=infer(model, batch), warmup=50, draws=20)
    eager = model.log_likelihood(draws.z[0, 0], batch) + model.prior().log_prob(draws.z[0, 0])
    EXACT.assert_close(draws.log_joint[0, 0].float(), eager.detach())


def test_compiled_code_goes_to_the_cache_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing torch's compiler sets the variable too."""
    torch_s_own = importlib.import_module(
        "torch._inductor.runtime.cache_dir_utils"
    ).default_cache_dir()
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", torch_s_own)
    assert cache_of_compiled_code() == tmp_path / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_of_compiled_code() == tmp_path / "mine"
