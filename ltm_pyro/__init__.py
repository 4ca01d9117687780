"""Latent-thought language models as Pyro programs, fitted by dual-rate variational Bayes.

The generative story is in `ltm_pyro.models`, the posterior in `ltm_pyro.inference.guides`. The
names below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "ltm_pyro.data.batches",
    "load_corpus": "ltm_pyro.data.corpus",
    "register_tokenizer": "ltm_pyro.data.tokenizer",
    "ModelConfig": "ltm_pyro.config",
    "FitConfig": "ltm_pyro.config",
    "Fast": "ltm_pyro.config",
    "Slow": "ltm_pyro.config",
    "Execution": "ltm_pyro.engine.execution",
    "InputError": "ltm_pyro.errors",
    "NonFiniteError": "ltm_pyro.errors",
    "exclusively": "ltm_pyro.doors",
    "LatentThoughtModel": "ltm_pyro.models.latent_thought",
    "LatentModel": "ltm_pyro.models.base",
    "SegmentedThoughtModel": "ltm_pyro.models.segmented",
    "SessionThoughtModel": "ltm_pyro.models.segmented",
    "check_model": "ltm_pyro.models.contract",
    "LinearGaussian": "ltm_pyro.models.linear_gaussian",
    "LocalGuide": "ltm_pyro.inference.guides",
    "build_guide": "ltm_pyro.inference.guides",
    "register_guide": "ltm_pyro.inference.guides",
    "guide_families": "ltm_pyro.inference.guides",
    "check_guide": "ltm_pyro.inference.guides.contract",
    "filter_thoughts": "ltm_pyro.tasks.filtering",
    "DualRateSVI": "ltm_pyro.inference.clocks.svi",
    "Callback": "ltm_pyro.inference.callbacks",
    "HeldOutBound": "ltm_pyro.diagnostics.held_out",
    "EarlyStopping": "ltm_pyro.diagnostics.held_out",
    "Posterior": "ltm_pyro.inference.posterior",
    "generate": "ltm_pyro.tasks.generation",
    "embed": "ltm_pyro.tasks.embedding",
    "interpolate": "ltm_pyro.tasks.embedding",
    "evaluate": "ltm_pyro.diagnostics.bounds",
    "score_on_own_draws": "ltm_pyro.diagnostics.published",
    "as_published": "ltm_pyro.diagnostics.published",
    "score_table": "ltm_pyro.diagnostics.units",
    "loss_by_position": "ltm_pyro.diagnostics.units",
    "compare": "ltm_pyro.diagnostics.compare",
    "Comparison": "ltm_pyro.diagnostics.compare",
    "build_objective": "ltm_pyro.inference.objectives",
    "register_objective": "ltm_pyro.inference.objectives",
    "build_prior": "ltm_pyro.models.priors",
    "register_prior": "ltm_pyro.models.priors",
    "simulate": "ltm_pyro.models.simulation",
    "sample_posterior": "ltm_pyro.inference.mcmc",
    "importance_bound": "ltm_pyro.diagnostics.evidence",
    "annealed_bound": "ltm_pyro.diagnostics.evidence",
    "evidence_bracket": "ltm_pyro.diagnostics.evidence",
    "diagnose": "ltm_pyro.diagnostics.trust",
    "sbc": "ltm_pyro.diagnostics.calibration",
    "vsbc": "ltm_pyro.diagnostics.calibration",
    "gap_decomposition": "ltm_pyro.diagnostics.gaps",
    "fast_convergence": "ltm_pyro.diagnostics.convergence",
    "gradient_noise": "ltm_pyro.diagnostics.gradients",
    "information_by_block": "ltm_pyro.diagnostics.information",
    "load_run": "ltm_pyro.run",
    "compare_runs": "ltm_pyro.run",
    "RunComparison": "ltm_pyro.run",
    "sweep": "ltm_pyro.run",
    "save_run": "ltm_pyro.run",
    "Run": "ltm_pyro.run",
    "TensorBoard": "ltm_pyro.run.tensorboard",
    "watch": "ltm_pyro.run.watching",
    "model_card": "ltm_pyro.report.model_card",
    "push_to_hub": "ltm_pyro.run.hub",
    "from_pretrained": "ltm_pyro.run.hub",
    "to_datatree": "ltm_pyro.export",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
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
    from ltm_pyro.inference.callbacks import Callback as Callback
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
