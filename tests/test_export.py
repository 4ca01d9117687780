from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from tolerances import MC

import ltm_pyro as ltm
from ltm_pyro import compat_arviz
from ltm_pyro.config import Fast, ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.errors import InputError
from ltm_pyro.export import load_datatree, save_datatree, to_datatree, write_datatree
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian

B, T, K, D, STEPS = 3, 24, 4, 3, 5


@pytest.fixture(scope="module")
def model() -> LatentThoughtModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=16, seq_len=T, n_layers=2, width=16, n_heads=2, mlp_hidden=32, window=4,
        thoughts_per_layer=2, thought_dim=D,
    )  # fmt: skip
    model = LatentThoughtModel(config)
    for layer in model.decoder.layers:  # fresh, no text depends on its thoughts
        torch.nn.init.normal_(layer.cross_attention.out.weight, std=0.15)
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 20:] = False
    tokens = torch.randint(16, (B, T), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, mask, torch.tensor([70, 5, 12]))


def svi_for(model: LatentThoughtModel, family: str = "mean_field") -> DualRateSVI:
    return DualRateSVI(model, build_guide(family, model), fast=Fast(steps=STEPS))


@pytest.fixture(scope="module")
def post(model: LatentThoughtModel, batch: Batch) -> Posterior:
    return svi_for(model).infer(batch)


@pytest.fixture(scope="module")
def scores(model: LatentThoughtModel, post: Posterior, batch: Batch) -> xr.Dataset:
    return evaluate(model, post, batch, draws=32)


@pytest.fixture(scope="module")
def tree(
    model: LatentThoughtModel, post: Posterior, batch: Batch, scores: xr.Dataset
) -> xr.DataTree:
    rows = [{"step": 1.0, "elbo": -80.0, "kl": 2.0}, {"step": 2.0, "elbo": -70.0, "kl": 3.0}]
    return to_datatree(
        post, batch, scores, draws=50, model=model, fit_trace=rows, predictive_draws=2, seed=3
    )


def test_groups_and_dimensions(tree: xr.DataTree) -> None:
    sizes = {
        "posterior": {"chain": 1, "draw": 50, "sequence": B, "thought": K, "dim": D},
        "prior": {"chain": 1, "draw": 50, "thought": K, "dim": D},
        "posterior_predictive": {"chain": 1, "draw": 2, "sequence": B, "position": T},
        "prior_predictive": {"chain": 1, "draw": 2, "sequence": B, "position": T},
        "log_likelihood": {"chain": 1, "draw": 50, "sequence": B, "position": T},
        "observed_data": {"sequence": B, "position": T},
        "constant_data": {"sequence": B, "position": T},
        "sample_stats": {"chain": 1, "draw": 50, "sequence": B},
        "variational_params": {"chain": 1, "sequence": B, "thought": K, "dim": D},
        "fit_trace": {"slow_step": 2, "chain": 1, "fast_step": STEPS, "sequence": B},
        "scores": {"sequence": B},
    }
    assert {name: dict(child.sizes) for name, child in tree.children.items()} == sizes
    assert tree["posterior/z"].dims == ("chain", "draw", "sequence", "thought", "dim")
    assert tree["log_likelihood/x"].dims == ("chain", "draw", "sequence")
    assert tree["sample_stats/khat"].dims == ("sequence",)
    assert tree["posterior_predictive/tokens"].dims == ("chain", "draw", "sequence", "position")


def test_coordinates_name_sequences_and_thoughts(tree: xr.DataTree, batch: Batch) -> None:
    for group in ("posterior", "observed_data", "variational_params", "log_likelihood"):
        np.testing.assert_array_equal(tree[group]["sequence"], batch.ids)
    assert tree["posterior"]["thought"].values.tolist() == [
        "layer 0 thought 0", "layer 0 thought 1", "layer 1 thought 0", "layer 1 thought 1",
    ]  # fmt: skip
    assert "restart" in tree["posterior"]["chain"].attrs["meaning"]
    assert tree["fit_trace"]["slow_step"].values.tolist() == [1, 2]


def test_values_belong_to_their_draws(
    tree: xr.DataTree, model: LatentThoughtModel, post: Posterior, batch: Batch
) -> None:
    z = torch.as_tensor(tree["posterior/z"].values[0])
    with torch.no_grad():
        likelihood = model.log_likelihood(z, batch)
        log_p = likelihood + model.prior().log_prob(z)
        log_q = post.log_prob(z)
    np.testing.assert_allclose(tree["log_likelihood/x"][0], likelihood, rtol=1e-5)
    np.testing.assert_allclose(tree["sample_stats/log_p"][0], log_p, rtol=1e-5)
    np.testing.assert_allclose(tree["sample_stats/log_q"][0], log_q, rtol=1e-5)
    np.testing.assert_array_equal(tree["variational_params/loc"][0], post.parameters["loc"])
    assert post.trace is not None
    np.testing.assert_array_equal(tree["fit_trace/fast_elbo"][0], post.trace.elbo)
    np.testing.assert_array_equal(tree["constant_data/mask"], batch.mask)
    np.testing.assert_array_equal(tree["constant_data/n_tokens"], [24, 20, 24])
    predicted = tree["posterior_predictive/tokens"].values
    assert predicted.min() >= 0
    assert predicted.max() < 16
    assert len(np.unique(predicted.reshape(-1, T), axis=0)) == 2 * B


def test_tokens_add_up_to_their_sequence(tree: xr.DataTree, batch: Batch) -> None:
    by_token = tree["log_likelihood/x_token"]
    assert by_token.dims == ("chain", "draw", "sequence", "position")
    np.testing.assert_allclose(by_token.sum("position"), tree["log_likelihood/x"], rtol=1e-5)
    assert (by_token.values[..., ~batch.mask.numpy()] == 0).all()
    assert (by_token.values[..., batch.mask.numpy()] < 0).all()


def test_the_text_and_what_is_known_of_it_go_along() -> None:
    texts = [f"{name} went to sea and came back again." for name in ("Anna", "Ben", "Cleo")]
    records = [{"text": t, "author": t[:2]} for t in texts * 4]
    corpus = ltm.load_corpus(records, seq_len=8, name="three")
    batch = corpus.train.batch(range(4))
    model = LatentThoughtModel.from_preset("mixture", vocab_size=corpus.vocab_size, seq_len=8)
    tree = to_datatree(svi_for(model).infer(batch, 0), batch, draws=2)
    assert tree["constant_data/text"].values.tolist() == batch.texts()
    assert {"mask", "n_tokens", "text"} == set(tree["constant_data"].data_vars)
    assert "mask" not in tree["observed_data"]
    assert tree["constant_data"]["author"].values.tolist() == batch.metadata["author"].tolist()


def test_draws_have_the_posteriors_moments(post: Posterior) -> None:
    z = to_datatree(post, draws=4_000)["posterior/z"]
    error = z.std(("chain", "draw")) / np.sqrt(4_000)
    MC.assert_close(z.mean(("chain", "draw")), error, post.mean.numpy(), draws=4_000)


def test_attributes_say_where_it_comes_from(tree: xr.DataTree) -> None:
    for attrs in (tree.attrs, tree["posterior"].attrs):
        assert attrs["inference_library"] == "pyro"
        assert attrs["guide"] == "mean_field"
        assert attrs["kl_estimator"] == "analytic"
        assert attrs["seed"] == 3
        assert {"torch_version", "inference_library_version", "creation_library_version"} <= set(
            attrs
        )
    assert tree["scores"].attrs["mode"] == "oracle"
    assert "PSIS-LOO" in tree["log_likelihood/x"].attrs["note"]


def test_same_arguments_give_the_same_tree_and_leave_the_generator_alone(
    post: Posterior, model: LatentThoughtModel, batch: Batch
) -> None:
    state = torch.get_rng_state()
    trees = [
        to_datatree(post, batch, draws=4, model=model, predictive_draws=1, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    xr.testing.assert_identical(trees[0], trees[1])
    assert not trees[0]["posterior/z"].equals(trees[2]["posterior/z"])


def test_only_what_was_given_is_there(post: Posterior) -> None:
    groups = set(to_datatree(post, draws=2).children)
    assert groups == {"posterior", "prior", "variational_params", "fit_trace"}
    bare = set(to_datatree(replace(post, trace=None), draws=2).children)
    assert bare == {"posterior", "prior", "variational_params"}
    names = to_datatree(post, draws=2)["posterior"]["thought"].values
    assert names.tolist() == ["thought 0", "thought 1", "thought 2", "thought 3"]


def test_restarts_become_chains(model: LatentThoughtModel, batch: Batch) -> None:
    svi = svi_for(model)
    restarts = [svi.infer(batch, seed=seed) for seed in (0, 1)]
    tree = to_datatree(restarts, batch, draws=4, model=model, predictive_draws=1)
    assert tree["posterior"].sizes["chain"] == 2
    assert tree["posterior_predictive"].sizes["chain"] == 2
    assert tree["fit_trace"].sizes["chain"] == 2
    np.testing.assert_array_equal(tree["variational_params/loc"][1], restarts[1].parameters["loc"])
    z = tree["posterior/z"]
    assert not np.array_equal(z[0], z[1])
    # Restarts whose fast loops differ in length have no course in common.
    shorter = svi.infer(batch, steps=2)
    assert "fit_trace" not in to_datatree([restarts[0], shorter], draws=2).children


def test_the_oracle_is_exported_too() -> None:
    oracle = LinearGaussian(torch.eye(3, 4), noise_scale=0.5, shape=(2, 2))
    batch = oracle.simulate(5)
    post = DualRateSVI(oracle, build_guide("mean_field", oracle)).infer(batch, steps=2)  # type: ignore[arg-type]
    tree = to_datatree(post, batch, draws=6, model=oracle, predictive_draws=3)
    assert tree["posterior_predictive/x"].shape == (1, 3, 5, 3)
    np.testing.assert_array_equal(tree["observed_data/x"], batch.observed)


def test_a_point_mass_has_no_log_q(model: LatentThoughtModel, batch: Batch) -> None:
    post = svi_for(model, "delta").infer(batch)
    tree = to_datatree(post, batch, draws=2, model=model, predictive_draws=0)
    assert "log_q" not in tree["sample_stats"]
    assert "posterior_predictive" not in tree.children
    np.testing.assert_array_equal(tree["posterior/z"][0, 1], post.mean)


def test_what_does_not_belong_together_is_refused(
    model: LatentThoughtModel, post: Posterior, batch: Batch, scores: xr.Dataset
) -> None:
    other = batch.select(torch.tensor([1, 0, 2]))
    with pytest.raises(InputError, match="the batch"):
        to_datatree(post, other)
    with pytest.raises(InputError, match="scores"):
        to_datatree(post, batch, scores.isel(sequence=[0]))
    with pytest.raises(InputError, match="a restart"):
        to_datatree([post, svi_for(model).infer(other)])
    with pytest.raises(InputError, match="export each alone"):
        to_datatree([post, svi_for(model, "delta").infer(batch)])
    with pytest.raises(InputError, match="at least one"):
        to_datatree([])
    with pytest.raises(InputError, match="draws is 0"):
        to_datatree(post, draws=0)


def test_file_round_trip(tree: xr.DataTree, tmp_path: Path) -> None:
    path = save_datatree(tree, tmp_path / "posterior.nc")
    assert os.listdir(tmp_path) == ["posterior.nc"]
    loaded = load_datatree(path)
    xr.testing.assert_equal(loaded, tree)
    assert loaded["posterior"].attrs == tree["posterior"].attrs
    with xr.open_datatree(path) as opened:
        xr.testing.assert_equal(opened.load(), tree)
    save_datatree(loaded, path)  # over itself
    again = tmp_path / "again.nc"
    save_datatree(tree, again)
    save_datatree(tree, path)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["all.nc", "all.zarr"])
def test_blocks_are_written_as_one_tree(
    model: LatentThoughtModel, batch: Batch, post: Posterior, tmp_path: Path, name: str
) -> None:
    """Draws belong to sequences, so blocks hold what one tree of all holds."""
    rows = [{"step": 1.0, "elbo": -80.0}]
    svi = svi_for(model)
    options = {"draws": 4, "model": model, "fit_trace": rows}
    blocks = [batch.select(slice(0, 2)), batch.select(slice(2, 3))]
    trees = (to_datatree(svi.infer(block), block, **options) for block in blocks)
    path = write_datatree(trees, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    loaded, whole = load_datatree(path), to_datatree(post, batch, **options)
    assert set(loaded.children) == set(whole.children)
    drawn = {"posterior_predictive", "prior_predictive"}  # by each block's own noise
    for group in set(whole.children) - drawn:
        # Sums over blocks of another size round otherwise, five Adam steps long.
        one, other = loaded[group].to_dataset(), whole[group].to_dataset()
        xr.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for group in drawn:
        assert loaded[group].sizes == whole[group].sizes
    xr.testing.assert_equal(load_datatree(save_datatree(whole, path)), whole)  # over the old one


def test_blocks_that_cannot_be_written_are_named(tree: xr.DataTree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tree"):
        write_datatree([], tmp_path / "none.nc")
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(InputError, match="choose another name"):
        save_datatree(tree, tmp_path / "mine.zarr")
    with pytest.raises(InputError, match="cannot be read as zarr"):
        load_datatree(tmp_path / "mine.zarr")


def test_a_write_that_fails_leaves_the_old_file(tree: xr.DataTree, tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    path.write_text("the old file")
    broken = tree.copy()
    broken["posterior"].attrs["cannot be written"] = object()
    with pytest.raises(TypeError):
        save_datatree(broken, path)
    assert path.read_text() == "the old file"
    assert os.listdir(tmp_path) == ["posterior.nc"]
    with pytest.raises(InputError, match="cannot write"):
        save_datatree(tree, tmp_path / "absent" / "posterior.nc")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_datatree(tmp_path / "absent.nc")
    damaged = tmp_path / "damaged.nc"
    damaged.write_bytes(b"no netcdf")
    with pytest.raises(InputError, match="cannot be read"):
        load_datatree(damaged)


def test_arviz_reads_the_tree_and_the_file(tree: xr.DataTree, tmp_path: Path) -> None:
    path = save_datatree(tree, tmp_path / "posterior.nc")
    az = compat_arviz._import("arviz")
    summary = az.summary(tree, var_names=["z"])
    assert len(summary) == B * K * D
    assert "z[70, layer 1 thought 0, 2]" in summary.index
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*InferenceData scheme", category=UserWarning)
        loaded = az.from_netcdf(path)
    np.testing.assert_array_equal(loaded.posterior["z"], tree["posterior/z"])
    np.testing.assert_array_equal(loaded.sample_stats["log_q"], tree["sample_stats/log_q"])


def test_arviz_functions_take_the_tree_as_it_is(tree: xr.DataTree) -> None:
    """The numbers are those of the `posterior` group alone, which 0.23 takes without help."""
    az = compat_arviz._import("arviz")
    alone = tree["posterior"].to_dataset()
    for name in ("rhat", "ess", "mcse"):
        function = getattr(az, name)
        xr.testing.assert_allclose(_dataset(function(tree)), _dataset(function(alone)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter", category=UserWarning)
        assert az.loo(tree, var_name="x").n_data_points == B


def test_what_arviz_says_of_independent_draws(post: Posterior, batch: Batch) -> None:
    """The module says: "NaN for an r-hat of one chain", "a noisy number" for the effective size."""
    az = compat_arviz._import("arviz")
    tree = to_datatree(post, batch, draws=32)
    assert bool(np.isnan(_dataset(az.rhat(tree))["z"]).all())
    # 32 independent draws each: the truth is 32 in every one of the dimensions.
    size = _dataset(az.ess(tree))["z"]
    assert float(size.min()) < 22 < 32 < float(size.max())


# ArviZ 0.23 calls Matplotlib 3.11 in a way that will go in 3.13.
old_call = pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")


@old_call
@pytest.mark.parametrize(
    ("old", "new"),
    [("plot_forest", "plot_forest"), ("plot_pair", "plot_pair"), ("plot_posterior", "plot_dist")],
)
def test_arviz_draws_the_tree_as_it_is(tree: xr.DataTree, old: str, new: str) -> None:
    az = compat_arviz._import("arviz")
    draw = getattr(az, new if compat_arviz.is_modern() else old)
    some = {"sequence": 70, "thought": "layer 0 thought 0"}
    assert draw(tree, var_names=["z"], coords=some) is not None


@old_call
def test_arviz_draws_the_predictive_check(tree: xr.DataTree) -> None:
    az = compat_arviz._import("arviz")
    if compat_arviz.is_modern():
        assert az.plot_ppc_dist(tree, kind="ecdf", num_samples=2) is not None
    else:
        assert az.plot_ppc(tree) is not None


def test_a_second_lesson_changes_nothing(tree: xr.DataTree) -> None:
    az = compat_arviz._import("arviz")
    before = az.summary
    compat_arviz.teach_trees()
    assert az.summary is before
    assert az.ess(np.zeros((2, 50))) == pytest.approx(100, rel=1)  # other arguments pass through


TEN_THOUSAND = """
import resource, sys, torch
import ltm_pyro as ltm
from ltm_pyro.export import write_datatree

model = ltm.LatentThoughtModel.from_preset(
    "mixture", seq_len=256, n_layers=1, width=16, n_heads=2, mlp_hidden=16
)
svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=0))
tokens = torch.randint(16, (10_000, 256))
whole = ltm.Batch(tokens)
blocks = (whole.select(slice(i, i + 250)) for i in range(0, 10_000, 250))
trees = (
    ltm.to_datatree(svi.infer(b), b, draws=32, model=model, predictive_draws=1) for b in blocks
)
write_datatree(trees, sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_ten_thousand_sequences_stay_under_2_gib(tmp_path: Path) -> None:
    """Tokens' log-likelihoods alone are 330 MB of draws, and are never held whole."""
    path = tmp_path / "all.nc"
    done = subprocess.run(
        [sys.executable, "-c", TEN_THOUSAND, str(path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 2  # GiB at most
    with xr.open_datatree(path) as tree:
        assert tree["log_likelihood/x_token"].shape == (1, 32, 10_000, 256)


def _dataset(found: object) -> xr.Dataset:
    """1.x answers a tree for a tree."""
    return found.to_dataset() if isinstance(found, xr.DataTree) else found  # type: ignore[return-value]
