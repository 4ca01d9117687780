"""Families of one's own by name: nothing is replaced, mistaken or lost in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltm_pyro.cli import main
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides import MeanField, build_guide, register_guide
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.inference.objectives import (
    OBJECTIVES,
    Objective,
    Terms,
    build_objective,
    register_objective,
)
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.models.priors import StandardNormal, build_prior, register_prior
from ltm_pyro.models.priors.base import PRIORS
from ltm_pyro.registry import Registry, load_plugins

REGISTRIES = (GUIDES, PRIORS, OBJECTIVES)


@pytest.fixture(autouse=True)
def _as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    labels = {cls: (r.label, name) for r in REGISTRIES for name, cls in r._known.items()}
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    yield
    for cls, (label, name) in labels.items():
        assert getattr(cls, str(label)) == name


def oracle() -> LinearGaussian:
    return LinearGaussian([[1.0, 0.5]], noise_scale=0.3, shape=(1, 2))


def test_a_taken_name_is_refused_and_nothing_changes() -> None:
    for register, taken, of in (
        (register_guide, "mean_field", MeanField),
        (register_prior, "standard_normal", StandardNormal),
        (register_objective, "elbo", OBJECTIVES["elbo"]),
    ):
        mine = type("Mine", (of,), {})
        with pytest.raises(InputError, match=f"{taken!r} is taken by .*override=True"):
            register(taken)(mine)
    assert type(build_guide("mean_field", oracle())) is MeanField


def test_override_replaces() -> None:
    mine = register_guide("mean_field", override=True)(type("Mine", (MeanField,), {}))
    assert type(build_guide("mean_field", oracle())) is mine


def test_the_same_class_may_come_twice_but_not_under_two_names() -> None:
    assert register_guide("mean_field")(MeanField) is MeanField
    with pytest.raises(InputError, match="is guide 'mean_field' already: register a subclass"):
        register_guide("alias")(MeanField)
    assert MeanField.family == "mean_field"


def test_a_decorator_without_brackets_says_how() -> None:
    for register in (register_guide, register_prior, register_objective):
        with pytest.raises(InputError, match=f"needs a name: write @{register.__name__}"):
            register(MeanField)


@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "1st", "a" * 65, "a\n", "\x1b[2J"])
def test_names_that_cannot_be_one(name: str) -> None:
    with pytest.raises(InputError, match="must be a letter") as caught:
        register_guide(name)
    assert str(caught.value).isprintable()


def test_what_is_no_family_is_refused() -> None:
    for wrong in (int, StandardNormal, 3, "mean_field", lambda model: None):
        with pytest.raises(InputError, match="must be a subclass of LocalGuide"):
            register_guide("mine")(wrong)  # type: ignore[type-var]
    with pytest.raises(InputError, match="lacks initial_rows, posterior: define it"):
        register_guide("mine")(type("Half", (LocalGuide,), {}))
    with pytest.raises(InputError, match="lacks per_sequence"):
        register_objective("mine")(type("Half", (Objective,), {}))


def test_options_never_collide_with_arguments() -> None:
    with pytest.raises(InputError, match="unknown option of guide 'mean_field' 'name'"):
        build_guide("mean_field", oracle(), name="x")
    with pytest.raises(InputError, match="unknown option of guide 'mean_field' 'model'"):
        build_guide("mean_field", oracle(), model="x")
    with pytest.raises(InputError, match="prior 'standard_normal' has no options"):
        build_prior("standard_normal", 2, 2, n_thoughts=3)
    with pytest.raises(InputError, match="unknown option of objective 'iwae' 'name'"):
        build_objective("iwae", name="x")
    with pytest.raises(InputError, match="unknown option of guide 'mean_field' '1'"):
        GUIDES.build("mean_field", oracle(), options={1: 2})  # type: ignore[dict-item]
    for name in (3, None, ["mean_field"]):
        with pytest.raises(InputError, match=r"guide is .*: must be one of"):
            build_guide(name, oracle())  # type: ignore[arg-type]


def test_options_are_handed_up_to_the_bases_that_know_them() -> None:
    @register_objective("half")
    class Half(Objective):
        def __init__(self, share: float = 0.5, **options: int) -> None:
            super().__init__(**options)
            self.share = share

        def per_sequence(self, terms: Terms) -> Tensor:
            return self.share * terms.log_weight().mean(0)

    assert build_objective("half", particles=3, share=0.1).options == {"particles": 3}
    with pytest.raises(InputError, match=r"unknown option of objective 'half' 'shar'.*'share'"):
        build_objective("half", shar=0.1)
    made: Registry[type] = Registry("thing", "register_thing")
    made.register("needy")(type("Needy", (), {"__init__": lambda self, size: None}))
    with pytest.raises(InputError, match="thing 'needy' needs the option 'size'"):
        made.build("needy", options={})


def test_modules_with_families_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_families.py").write_text(
        "import ltm_pyro as ltm\n"
        "from ltm_pyro.inference.guides import MeanField\n"
        "@ltm.register_guide('from_a_module')\n"
        "class Mine(MeanField): pass\n"
    )
    (tmp_path / "my_mistake.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins(("my_families",))
    assert build_guide("from_a_module", oracle()).family == "from_a_module"
    with pytest.raises(InputError, match=r"'my_mistake' .*no_such_thing"):
        load_plugins(("my_mistake",))
    with pytest.raises(InputError, match=r"'not_there' .*PYTHONPATH"):
        load_plugins(("not_there",))
    assert torch.is_grad_enabled()


def test_commands_know_families_of_an_imported_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_command_guides.py").write_text(
        "import ltm_pyro as ltm\n"
        "from ltm_pyro.inference.guides import MeanField\n"
        "@ltm.register_guide('by_option')\n"
        "class Mine(MeanField): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--import", "my_command_guides", "--no_such_option", "1"]) == 2
    assert "by_option" in GUIDES
    assert main(["fit", "--import"]) == 2
    assert "--import needs the name of a module" in capsys.readouterr().err
    assert main(["fit", "--import=no.such.module"]) == 2
    assert "cannot be imported" in capsys.readouterr().err
