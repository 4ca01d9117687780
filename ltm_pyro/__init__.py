"""Latent-thought language models as Pyro programs, fitted by dual-rate variational Bayes.

The generative story is in `ltm_pyro.models`, the posterior in `ltm_pyro.inference.guides`. The
names below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "data.batches": "Batch",
    "data.corpus": "load_corpus",
    "data.tokenizer": "register_tokenizer",
    "config": "ModelConfig FitConfig Fast Slow",
    "engine.execution": "Execution",
    "errors": "InputError NonFiniteError",
    "doors": "exclusively",
    "models.latent_thought": "LatentThoughtModel",
    "models.base": "LatentModel",
    "models.segmented": "SegmentedThoughtModel SessionThoughtModel",
    "models.contract": "check_model",
    "models.linear_gaussian": "LinearGaussian",
    "inference.guides": "LocalGuide build_guide register_guide guide_families",
    "inference.guides.contract": "check_guide",
    "tasks.filtering": "filter_thoughts",
    "inference.clocks.svi": "DualRateSVI",
    "callbacks": "Callback",
    "diagnostics.held_out": "HeldOutBound EarlyStopping",
    "inference.posterior": "Posterior",
    "tasks.generation": "generate",
    "tasks.embedding": "embed interpolate",
    "diagnostics.bounds": "evaluate",
    "diagnostics.published": "score_on_own_draws as_published",
    "diagnostics.units": "score_table loss_by_position",
    "diagnostics.compare": "compare Comparison",
    "inference.objectives": "build_objective register_objective",
    "models.priors": "build_prior register_prior",
    "models.simulation": "simulate",
    "inference.mcmc": "sample_posterior",
    "diagnostics.evidence": "importance_bound annealed_bound evidence_bracket",
    "diagnostics.trust": "diagnose",
    "diagnostics.calibration": "sbc vsbc",
    "diagnostics.gaps": "gap_decomposition",
    "diagnostics.convergence": "fast_convergence",
    "diagnostics.gradients": "gradient_noise",
    "diagnostics.information": "information_by_block",
    "run": "load_run compare_runs RunComparison sweep save_run Run",
    "run.tensorboard": "TensorBoard",
    "run.watching": "watch",
    "report.model_card": "model_card",
    "run.hub": "push_to_hub from_pretrained",
    "export": "to_datatree",
}
"""Public names by the module that each is from."""
_HOME = {name: f"ltm_pyro.{home}" for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ltm_pyro.callbacks import Callback as Callback
    from ltm_pyro.config import Fast as Fast
    from ltm_pyro.config import FitConfig as FitConfig
    from ltm_pyro.config import ModelConfig as ModelConfig
    from ltm_pyro.config import Slow as Slow
    from ltm_pyro.data.batches import Batch as Batch
    from ltm_pyro.data.corpus import load_corpus as load_corpus
    from ltm_pyro.data.tokenizer import register_tokenizer as register_tokenizer
    from ltm_pyro.diagnostics.bounds import evaluate as evaluate
    from ltm_pyro.diagnostics.calibration import sbc as sbc
    from ltm_pyro.diagnostics.calibration import vsbc as vsbc
    from ltm_pyro.diagnostics.compare import Comparison as Comparison
    from ltm_pyro.diagnostics.compare import compare as compare
    from ltm_pyro.diagnostics.convergence import fast_convergence as fast_convergence
    from ltm_pyro.diagnostics.evidence import annealed_bound as annealed_bound
    from ltm_pyro.diagnostics.evidence import evidence_bracket as evidence_bracket
    from ltm_pyro.diagnostics.evidence import importance_bound as importance_bound
    from ltm_pyro.diagnostics.gaps import gap_decomposition as gap_decomposition
    from ltm_pyro.diagnostics.gradients import gradient_noise as gradient_noise
    from ltm_pyro.diagnostics.held_out import EarlyStopping as EarlyStopping
    from ltm_pyro.diagnostics.held_out import HeldOutBound as HeldOutBound
    from ltm_pyro.diagnostics.information import information_by_block as information_by_block
    from ltm_pyro.diagnostics.published import as_published as as_published
    from ltm_pyro.diagnostics.published import score_on_own_draws as score_on_own_draws
    from ltm_pyro.diagnostics.trust import diagnose as diagnose
    from ltm_pyro.diagnostics.units import loss_by_position as loss_by_position
    from ltm_pyro.diagnostics.units import score_table as score_table
    from ltm_pyro.doors import exclusively as exclusively
    from ltm_pyro.engine.execution import Execution as Execution
    from ltm_pyro.errors import InputError as InputError
    from ltm_pyro.errors import NonFiniteError as NonFiniteError
    from ltm_pyro.export import to_datatree as to_datatree
    from ltm_pyro.inference.clocks.svi import DualRateSVI as DualRateSVI
    from ltm_pyro.inference.guides import LocalGuide as LocalGuide
    from ltm_pyro.inference.guides import build_guide as build_guide
    from ltm_pyro.inference.guides import guide_families as guide_families
    from ltm_pyro.inference.guides import register_guide as register_guide
    from ltm_pyro.inference.guides.contract import check_guide as check_guide
    from ltm_pyro.inference.mcmc import sample_posterior as sample_posterior
    from ltm_pyro.inference.objectives import build_objective as build_objective
    from ltm_pyro.inference.objectives import register_objective as register_objective
    from ltm_pyro.inference.posterior import Posterior as Posterior
    from ltm_pyro.models.base import LatentModel as LatentModel
    from ltm_pyro.models.contract import check_model as check_model
    from ltm_pyro.models.latent_thought import LatentThoughtModel as LatentThoughtModel
    from ltm_pyro.models.linear_gaussian import LinearGaussian as LinearGaussian
    from ltm_pyro.models.priors import build_prior as build_prior
    from ltm_pyro.models.priors import register_prior as register_prior
    from ltm_pyro.models.segmented import SegmentedThoughtModel as SegmentedThoughtModel
    from ltm_pyro.models.segmented import SessionThoughtModel as SessionThoughtModel
    from ltm_pyro.models.simulation import simulate as simulate
    from ltm_pyro.report.model_card import model_card as model_card
    from ltm_pyro.run import Run as Run
    from ltm_pyro.run import RunComparison as RunComparison
    from ltm_pyro.run import compare_runs as compare_runs
    from ltm_pyro.run import load_run as load_run
    from ltm_pyro.run import save_run as save_run
    from ltm_pyro.run import sweep as sweep
    from ltm_pyro.run.hub import from_pretrained as from_pretrained
    from ltm_pyro.run.hub import push_to_hub as push_to_hub
    from ltm_pyro.run.tensorboard import TensorBoard as TensorBoard
    from ltm_pyro.run.watching import watch as watch
    from ltm_pyro.tasks.embedding import embed as embed
    from ltm_pyro.tasks.embedding import interpolate as interpolate
    from ltm_pyro.tasks.filtering import filter_thoughts as filter_thoughts
    from ltm_pyro.tasks.generation import generate as generate


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in ("models", "inference", "data", "diagnostics", "plots"):
        return importlib.import_module(f"ltm_pyro.{name}")
    raise AttributeError(f"module 'ltm_pyro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
