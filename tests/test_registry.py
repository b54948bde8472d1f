"""Components: one written form, read back equal; every mistake is one sentence that names what was meant."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import registry
from ddpm.augmentation import Augmentation
from ddpm.data import Dataset
from ddpm.errors import ConfigError
from ddpm.evaluation.bound import VariationalBound
from ddpm.evaluation.flow import ProbabilityFlow
from ddpm.evaluation.likelihood import Likelihood
from ddpm.formats import Format
from ddpm.guidance import Guidance
from ddpm.losses import Criterion
from ddpm.objectives import Objective
from ddpm.registry import Component, register
from ddpm.samplers import Grid, Sampler, Thresholding
from ddpm.samplers.ddim import DDIM
from ddpm.samplers.grids import Quadratic, Trailing
from ddpm.schedules import Cosine, Linear, Schedule
from ddpm.times import Times
from ddpm.training.ema import EMADecay
from ddpm.variances import Variance
from ddpm.weightings import Weighting

KINDS: list[type[Component]] = [
    Schedule, Objective, Sampler, Grid, Thresholding, Dataset, EMADecay, Variance, Weighting, Times, Criterion,
    Augmentation, Likelihood, Guidance,
    Format,
]  # fmt: skip
NEEDED = {"autoguidance": ":model=runs/a", "classifier": ":model=a.safetensors"}
"""Options without a default."""
REGISTERED = [(kind, name) for kind in KINDS for name in kind.names()]

OUTSIDE = '''
from typing import Annotated

from pydantic import Field

from ddpm.registry import Component, register
from ddpm.samplers import Grid, Sampler, Thresholding


@register("half-clip")
class HalfClip(Thresholding):
    """Clamp to a smaller range."""

    low: Annotated[float, Field(lt=0)] = -0.5
    ends: tuple[float, float] = (0.25, 0.5)

    def apply(self, x0):
        return x0.clamp(self.low, self.ends[1])


@register("stay")
class Stay(Sampler):
    """Does nothing."""

    def step(self, x, level, following, denoise, noise, history):
        return x


class NotRegistered(Stay):
    """Derived, but without a name of its own."""


@register("no-step")
class NoStep(Sampler):
    """Lacks its step."""


number = 3
'''


class Part(Component, kind="part"):
    """A kind of the tests' own, with an option of every type."""


@register("leaf")
class Leaf(Part):
    """No options."""


@register("tree")
class Tree(Part):
    """Every type of option."""

    ratio: float = 0.1
    count: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.5, 1e-7)
    flag: bool = False
    word: str = "plain"
    child: Part = Leaf()
    maybe: Part | None = None


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in a folder of its own; what it registers is forgotten afterwards."""
    (tmp_path / "their_parts.py").write_text(OUTSIDE)
    for kind in KINDS:
        monkeypatch.setattr(kind, "registered", dict(kind.registered))
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_parts"
    sys.modules.pop("their_parts", None)


@pytest.mark.parametrize(("kind", "name"), REGISTERED, ids=[f"{kind.kind}-{name}" for kind, name in REGISTERED])
def test_every_component_builds_prints_and_parses_back(kind: type[Component], name: str) -> None:
    built = kind.parse(name + NEEDED.get(name, ""))
    assert type(built).__doc__
    assert built.name == name
    assert built.spec == str(built)
    again = kind.parse(built.spec)
    assert again == built
    assert hash(again) == hash(built)
    assert again.spec == built.spec
    assert all(f"{field.name}=" in built.spec for field in dataclasses.fields(built))
    assert kind.parse(built) is built


def test_the_kinds_hold_what_the_documents_name() -> None:
    tables = {"linear", "scaled-linear", "quadratic", "cosine", "sigmoid", "sigmoid-beta", "constant", "jsd", "warmup"}
    assert tables | {"zero-snr", "edm", "ve", "vp", "laplace"} <= set(Schedule.names())
    assert {"eps", "x0", "v", "xprev"} <= set(Objective.names())
    assert {"ddpm", "ddim"} <= set(Sampler.names())
    assert {"trailing", "leading", "linspace", "quadratic", "log-snr", "karras", "custom"} <= set(Grid.names())
    assert {"digits", "fashion-mnist", "mnist", "cifar10", "folder", "npz", "shapes"} <= set(Dataset.names())
    assert {"constant", "warmup"} <= set(EMADecay.names())
    assert {"fixed-large", "fixed-small", "learned", "learned-range", "analytic"} <= set(Variance.names())
    assert {"simple", "vlb", "hybrid"} <= set(Criterion.names())
    assert {VariationalBound.name, ProbabilityFlow.name} == {"vlb", "ode"} <= set(Likelihood.names())
    assert {"uniform", "snr", "truncated-snr", "min-snr", "soft-min-snr", "p2", "edm"} <= set(Weighting.names())
    assert {"uniform", "stratified", "logit-normal", "log-normal", "loss-second-moment"} <= set(Times.names())
    assert {"cfg", "autoguidance", "classifier"} <= set(Guidance.names())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("linear", Linear()),
        (" linear:timesteps=200 ", Linear(timesteps=200)),
        ("cosine: timesteps = 50 , s=0.01", Cosine(timesteps=50, s=0.01)),
        ("linear:scaled=true,timesteps=500", Linear(scaled=True, timesteps=500)),
        ("linear:", Linear()),
    ],
)
def test_specs_are_read(spec: str, expected: Component) -> None:
    assert Schedule.parse(spec) == expected


def test_components_nest() -> None:
    built = Sampler.parse("ddim:grid=quadratic,thresholding=clip,steps=10")
    assert isinstance(built, DDIM)
    assert isinstance(built.grid, Quadratic)
    assert built.spec == "ddim:steps=10,grid=quadratic,thresholding=clip,eta=0.0,eps=derived,analytic=false"
    assert built == DDIM(grid="quadratic", thresholding=Thresholding.parse("clip"), steps=10)
    assert DDIM().grid == Trailing()


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("tree:count=none", "count=none"),
        ("tree:count=4", "count=4"),
        ("tree:sizes=3/4/5", "sizes=3/4/5"),
        ("tree:sizes=7", "sizes=7"),
        ("tree:pair=0.25/1e3", "pair=0.25/1000.0"),
        ("tree:flag=true", "flag=true"),
        ("tree:word=other", "word=other"),
        ("tree:maybe=none", "maybe=none"),
        ("tree:maybe=leaf", ":Leaf"),
        ("tree:child=tree(sizes=8/9,child=tree(ratio=3,flag=true)),count=2", ":Tree(ratio=3.0,"),
    ],
)
def test_options_of_every_type_go_there_and_back(spec: str, written: str) -> None:
    built = Part.parse(spec)
    assert written in built.spec
    assert Part.parse(built.spec) == built


trees = st.recursive(
    st.builds(Leaf),
    lambda inner: st.builds(
        Tree,
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        count=st.none() | st.integers(-(2**70), 2**70),
        sizes=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
        flag=st.booleans(),
        child=inner,
        maybe=st.none() | inner,
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trees)
def test_any_component_parses_back_equal(built: Part) -> None:
    assert Part.parse(built.spec) == built


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("dimpstgren:=,()/.- 0123456789", max_size=24).map(lambda tail: f"ddim{tail}") | st.text(max_size=12))
def test_any_text_is_a_component_or_a_config_error(text: str) -> None:
    try:
        assert Sampler.parse(Sampler.parse(text).spec) == Sampler.parse(text)
    except ConfigError as error:
        assert str(error).endswith(".")


def test_a_class_from_outside_is_named_by_where_it_is(outside: str) -> None:
    built = Thresholding.parse(f"{outside}:HalfClip:low=-0.25,ends=1/2")
    assert built.spec == f"{outside}:HalfClip:low=-0.25,ends=1.0/2.0"
    assert Thresholding.parse(built.spec) == built
    sys.modules.pop(outside)
    del Thresholding.registered["half-clip"]
    del Sampler.registered["stay"], Sampler.registered["no-step"]
    assert Thresholding.parse(built.spec).spec == built.spec


def test_a_class_from_outside_nests(outside: str) -> None:
    built = Sampler.parse(f"ddim:thresholding={outside}:HalfClip(low=-0.75)")
    assert f"thresholding={outside}:HalfClip(low=-0.75,ends=0.25/0.5)" in built.spec
    assert Sampler.parse(built.spec) == built


def test_a_module_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_parts.py").write_text(OUTSIDE.replace("half-clip", "here").replace('"stay"', '"here"'))
    for kind in KINDS:
        monkeypatch.setattr(kind, "registered", dict(kind.registered))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert Thresholding.parse("here_parts:HalfClip").spec.startswith("here_parts:HalfClip:")
    assert sys.path == path
    sys.modules.pop("here_parts")


@pytest.mark.parametrize(
    ("kind", "spec", "fragments"),
    [
        (Schedule, "lineer", ["schedule 'lineer'", "did you mean 'linear'", "cosine"]),
        (Schedule, "xyz", ["'xyz' is not known;", "choose from ", "cosine", "linear"]),
        (Schedule, "linear:timestep=3", ["no option 'timestep'", "did you mean 'timesteps'", "beta_start"]),
        (Schedule, "linear:timesteps=ten", ["timesteps=ten", "integer"]),
        (Schedule, "linear:timesteps=1", ["timesteps=1", "greater than or equal to 2"]),
        (Schedule, "linear:beta_end=1.5", ["beta_end=1.5", "less than 1"]),
        (Schedule, "linear:beta_end=nan", ["beta_end=nan", "finite"]),
        (Schedule, "cosine:s=inf", ["s=inf", "finite"]),
        (Schedule, "linear:scaled=perhaps", ["scaled=perhaps", "boolean"]),
        (Schedule, "linear:timesteps", ["cannot read 'timesteps'", "name:key=value"]),
        (Schedule, "linear:timesteps,s=1", ["cannot read 'timesteps'", "name:key=value"]),
        (Schedule, "linear:=3", ["cannot read '=3'"]),
        (Schedule, "linear:timesteps=3,timesteps=4", ["'timesteps' stands twice"]),
        (Schedule, "linear timesteps=3", ["cannot read the spec", "name:key=value"]),
        (Schedule, "", ["schedule: expected a spec such as 'constant'"]),
        (Schedule, 3, ["schedule: expected a spec", "found 3"]),
        (Schedule, None, ["found None"]),
        (Sampler, "ddim:grid=trailling", ["grid 'trailling'", "did you mean 'trailing'"]),
        (Sampler, "ddim:grid=trailing(x=1)", ["grid 'trailing' has no option 'x'", "its options: none"]),
        (Sampler, "ddim:grid=trailing(", ["unbalanced parentheses"]),
        (Sampler, "ddim:grid=", ["grid: expected a spec"]),
        (Sampler, "ddim:eta=none", ["eta=none", "number"]),
        (Sampler, "ddpm:variance=large", ["variance=large", "fixed-large"]),
        (Sampler, "no_such_module:Thing", ["sampler 'no_such_module:Thing' cannot be imported", "no_such_module"]),
        (Sampler, "ddpm.samplers:Thing", ["cannot be imported", "Thing"]),
        (Sampler, "..:Thing", ["cannot be imported"]),
        (Sampler, "builtins:int", ["'builtins:int' is not a sampler", "ddpm.samplers.base.Sampler", "register"]),
        (Sampler, "ddpm.schedules:Linear", ["'ddpm.schedules:Linear' is not a sampler"]),
        (Sampler, "ddpm.samplers.base:Sampler", ["is not registered", "register"]),
        (Part, "tree:sizes=1/a", ["sizes=1/a", "integer"]),
        (Part, "tree:pair=1/2/3", ["pair=1/2/3", "at most 2"]),
    ],
)
def test_mistakes_get_one_sentence(kind: type[Component], spec: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.parse(spec)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "fragment"),
    [("NotRegistered", "is not registered"), ("NoStep", "also defines step"), ("number", "is not a sampler")],
)
def test_half_made_classes_from_outside_are_refused(outside: str, name: str, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        Sampler.parse(f"{outside}:{name}")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def (:", "SyntaxError: invalid syntax"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first."),
        ("raise KeyError", "KeyError."),
        ("1 / 0", "ZeroDivisionError: division by zero."),
    ],
)
def test_code_that_cannot_be_imported_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    (tmp_path / "broken_parts.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Sampler.parse("broken_parts:Thing")
    assert f"sampler 'broken_parts:Thing' cannot be imported: {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("linear", []),
        ("linear:timesteps=200,scaled=true", []),
        ("ddim:grid=trailing,thresholding=clip", []),
        ("tree:child=tree(sizes=8/9,child=leaf)", []),
        (" a.b:C ", ["a.b:C"]),
        ("a:B:k=1,x=2", ["a:B"]),
        ("ddim:thresholding= a:B (low=1)", ["a:B"]),
        ("ddim:thresholding=a:B:low=1", ["a:B"]),
        ("a:B:k=tree(child=c:D(k=e.f:G))", ["a:B", "c:D", "e.f:G"]),
    ],
)
def test_outside_code_is_found_in_the_written_form(spec: str, named: list[str]) -> None:
    assert registry.outside_code(spec) == named


def test_components_are_frozen_and_keyword_only() -> None:
    built = Linear()
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.timesteps = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Linear(200)  # type: ignore[misc]


def test_direct_construction_is_checked_and_converted_too() -> None:
    assert Linear(timesteps="200") == Linear(timesteps=200)
    with pytest.raises(ConfigError, match="timesteps=0"):
        Linear(timesteps=0)
    with pytest.raises(ConfigError, match="'quadratik'"):
        DDIM(grid="quadratik")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match=r"schedule 'linear' is registered twice\."):

        @register("linear")
        class Again(Linear):
            """A second one."""

    assert Schedule.registered["linear"] is Linear


def test_kinds_do_not_share_names() -> None:
    assert "ddim" not in Schedule.registered
    with pytest.raises(ConfigError, match="schedule 'ddim' is not known"):
        Schedule.parse("ddim")


@pytest.mark.parametrize(
    ("word", "expected"), [("liner", " (did you mean 'linear'?)"), ("qqq", ""), ("cosin", " (did you mean 'cosine'?)")]
)
def test_nearest(word: str, expected: str) -> None:
    assert registry.nearest(word, ["linear", "cosine"]) == expected
