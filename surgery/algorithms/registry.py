"""The merge algorithms, as one literal table: what each is called, what it takes, who invented it, and where it lives.

The table is data: it imports no torch, so that a plan, a recipe and ``surgery algorithms`` can read it at no cost. The
arithmetic is in the modules that ``kernel`` names, and is imported when it runs.

*Scope* says what an algorithm has to see to make one element, and thereby what it costs:

=============  ====================================================================================================
``element``    the same element of every input: streams, one block at a time
``statistics``  a few numbers of the whole tensor (norms, thresholds) besides: streams twice or thrice
``row``        the whole row (the last dimension): streams in whole rows
``tensor``     the whole tensor, in memory
=============  ====================================================================================================
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.algorithms.kernel import Kernel, Setting

Scope = Literal["element", "statistics", "row", "tensor"]
Base = Literal["required", "optional", "none"]
Number = float | bool
PAPER, MERGEKIT = "paper", "mergekit"
COMPAT = (PAPER, MERGEKIT)
"""Whose semantics: the paper's, or mergekit 0.1.5's where it differs."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an algorithm.

    Args:
        name: what it is called here.
        default: its value where none is given; ``None``: it must be given.
        meaning: one clause.
        low: smallest value.
        high: largest value.
        kind: what values it takes.
        per_model: whether each model has its own value.
        mergekit: what mergekit's recipes call it.
    """

    name: str
    default: Number | None
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    kind: Literal["float", "int", "bool"] = "float"
    per_model: bool = False
    mergekit: str = ""

    @property
    def recipe_name(self) -> str:
        """The name in mergekit's recipes."""
        return self.mergekit or self.name

    def check(self, value: Any) -> Number:
        """Return ``value`` as the parameter's kind.

        Raises:
            UsageError: not a number of that kind, or out of range.
        """
        if self.kind == "bool":
            if value not in (0, 1, True, False):
                raise UsageError(f"{self.name} is true or false, not {value!r}")
            return bool(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{self.name} is a finite number, not {value!r}")
        if self.kind == "int" and value != int(value):
            raise UsageError(f"{self.name} is a whole number, not {value!r}")
        if not self.low <= value <= self.high:
            raise UsageError(f"{self.name} lies in {self.range}, not at {value!r}")
        return int(value) if self.kind == "int" else float(value)

    @property
    def range(self) -> str:
        """The range, for people."""
        if self.kind == "bool":
            return "true, false"
        low = "−∞" if self.low == -math.inf else f"{self.low:g}"
        high = "∞" if self.high == math.inf else f"{self.high:g}"
        return f"{'[' if self.low > -math.inf else '('}{low}, {high}{']' if self.high < math.inf else ')'}"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table.

    Args:
        name: what it is called.
        kernel: where its arithmetic is, ``module:Class`` in :mod:`surgery.algorithms`; for algorithms that are not in the
            table (:mod:`surgery.algorithms.custom`) what makes it.
        title: what it does, in a clause.
        citation: authors, year, arXiv number.
        scope: what it has to see.
        base: whether it takes a base besides the models.
        models: smallest and largest number of models, the base not counted.
        parameters: by order of importance.
        symmetric: whether the order of the models does not matter (beyond rounding).
        random: whether it draws random numbers.
        aliases: other names; mergekit's, where it differs.
        ignored: parameters of mergekit's that change nothing.
    """

    name: str
    kernel: str | Callable[[Setting], Kernel]
    title: str
    citation: str
    scope: Scope
    base: Base
    models: tuple[int, int | None] = (1, None)
    parameters: tuple[Parameter, ...] = ()
    symmetric: bool = True
    random: bool = False
    aliases: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def arity(self) -> str:
        """How many models it takes, for people."""
        low, high = self.models
        count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        return count + {"required": " and a base", "optional": ", a base if you like", "none": ""}[self.base]

    def parameter(self, name: str) -> Parameter:
        """Find a parameter by its name here.

        Raises:
            UsageError: there is none; near ones are named.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        names = [parameter.name for parameter in self.parameters]
        raise UsageError(f"{self.name} has no parameter {name!r}", mend=_near(name, names, "it has"))

    def check_arity(self, models: int, base: bool) -> None:
        """Refuse another number of models, or a base where there is none.

        Raises:
            UsageError: they do not fit.
        """
        low, high = self.models
        if self.base == "required" and not base:
            raise UsageError(f"{self.name} needs a base besides the models")
        if self.base == "none" and base:
            raise UsageError(f"{self.name} takes no base: name the models alone")
        if models < low or (high is not None and models > high):
            raise UsageError(f"{self.name} merges {self.arity}; {models} {'was' if models == 1 else 'were'} given")

    def make(self, setting: Setting) -> Kernel:
        """Import the arithmetic and set it up for one tensor."""
        if not isinstance(self.kernel, str):
            return self.kernel(setting)
        module, _, name = self.kernel.partition(":")
        kernel: Kernel = getattr(importlib.import_module(f"surgery.algorithms.{module}"), name)(setting)
        return kernel


COEFF = Parameter("coeff", 1.0, "the model's coefficient, of any sign", per_model=True, mergekit="weight")
_DENSITY = Parameter("density", 1.0, "the fraction of the task vector that is kept", 0, 1, per_model=True)
_GAMMA = Parameter("gamma", 0.01, "the fraction that is dropped as outliers", 0, 1, per_model=True)
_WINDOW = Parameter("epsilon", 0.15, "keep with probabilities from density − ε to density + ε", 0, 0.5, per_model=True)
_SCALE = Parameter("scale", 1.0, "λ: multiplies the merged task vector", mergekit="lambda")
_BY_L1 = Parameter("rescale", False, "scale what is kept to the L1 norm of the whole", kind="bool")
_BY_CHANCE = Parameter("rescale", True, "divide what is kept by its probability", kind="bool")
_SUM = Parameter("normalize", False, "divide by the sum of the coefficients", kind="bool")
_MEAN = Parameter("normalize", True, "divide by the sum of the coefficients", kind="bool")
_T = Parameter("t", None, "where between the first (0) and the second (1)")
_CHANGED = Parameter("epsilon", 1e-5, "differences up to this count as no change", 0)

_TABLE = (
    Algorithm(
        "linear", "averaging:Linear", "Σ cᵢ xᵢ / Σ cᵢ: the weighted average",
        "Wortsman et al. 2022, arXiv:2203.05482", "element", "none",
        parameters=(COEFF, _MEAN),
    ),
    Algorithm(
        "slerp", "interpolation:Slerp", "along the arc between two models",
        "Shoemake 1985", "statistics", "none", models=(2, 2), symmetric=False,
        parameters=(_T,),
    ),
    Algorithm(
        "nuslerp", "interpolation:NuSlerp", "slerp by coefficients, of models or task vectors, whole or by row or column",
        "mergekit 0.1.5; Shoemake 1985", "row", "optional", models=(2, 2),
        parameters=(
            COEFF,
            Parameter("flatten", True, "one angle for the whole tensor", kind="bool", mergekit="nuslerp_flatten"),
            Parameter("row_wise", False, "without flatten: an angle a row, else a column", kind="bool", mergekit="nuslerp_row_wise"),
        ),
    ),
    Algorithm(
        "multislerp", "interpolation:MultiSlerp", "the mean direction at the mean length, of models or task vectors",
        "Goddard 2025; mergekit 0.1.5", "statistics", "optional",
        parameters=(
            COEFF,
            Parameter("normalize", True, "divide by the sum of the coefficients", kind="bool", mergekit="normalize_weights"),
            Parameter("eps", 1e-8, "mean directions shorter than this are none", 0),
        ),
    ),
    Algorithm(
        "karcher", "interpolation:Karcher", "the Karcher mean of the directions at the mean length",
        "Karcher 1977; arXiv:2603.04972", "statistics", "none",
        parameters=(
            Parameter("max_iter", 10, "iterations at most", 1, kind="int"),
            Parameter("tol", 1e-5, "steps and angles below this are none", 0),
        ),
    ),
    Algorithm(
        "task_arithmetic", "task_vectors:TaskArithmetic", "b + λ Σ cᵢ δᵢ, with δᵢ = xᵢ − b",
        "Ilharco et al. 2023, arXiv:2212.04089", "element", "required",
        parameters=(COEFF, _SCALE, _SUM), ignored=("density", "rescale", "int8_mask"),
    ),
    Algorithm(
        "ties", "task_vectors:Ties", "trim δᵢ to the largest, elect signs, average those that agree",
        "Yadav et al. 2023, arXiv:2306.01708", "statistics", "required",
        parameters=(COEFF, _DENSITY, _SCALE, _MEAN, _BY_L1), ignored=("int8_mask",),
    ),
    Algorithm(
        "dare_linear", "task_vectors:DareLinear", "drop elements of δᵢ at random, enlarge the rest, sum",
        "Yu et al. 2024, arXiv:2311.03099", "element", "required", random=True, symmetric=False,
        parameters=(COEFF, _DENSITY, _SCALE, _SUM, _BY_CHANCE), ignored=("int8_mask",),
    ),
    Algorithm(
        "dare_ties", "task_vectors:DareTies", "drop elements of δᵢ at random, enlarge the rest, sum those of elected sign",
        "Yu et al. 2024, arXiv:2311.03099", "element", "required", random=True, symmetric=False,
        parameters=(COEFF, _DENSITY, _SCALE, _SUM, _BY_CHANCE), ignored=("int8_mask",),
    ),
    Algorithm(
        "della", "task_vectors:Della", "drop small elements of δᵢ sooner, enlarge the rest, average those of elected sign",
        "Deep et al. 2024, arXiv:2406.11617", "row", "required", random=True, symmetric=False,
        parameters=(COEFF, _DENSITY, _WINDOW, _SCALE, _MEAN, _BY_CHANCE), ignored=("int8_mask",),
    ),
    Algorithm(
        "della_linear", "task_vectors:DellaLinear", "drop small elements of δᵢ sooner, enlarge the rest, sum",
        "Deep et al. 2024, arXiv:2406.11617", "row", "required", random=True, symmetric=False,
        parameters=(COEFF, _DENSITY, _WINDOW, _SCALE, _SUM, _BY_CHANCE), ignored=("int8_mask",),
    ),
    Algorithm(
        "breadcrumbs", "task_vectors:BreadcrumbsSum", "drop outliers and the small rest of δᵢ, sum",
        "Davari and Belilovsky 2023, arXiv:2312.06795", "statistics", "required",
        parameters=(COEFF, _DENSITY, _GAMMA, _SCALE, _SUM, _BY_L1), ignored=("int8_mask",),
    ),
    Algorithm(
        "breadcrumbs_ties", "task_vectors:BreadcrumbsTies", "drop outliers and the small rest of δᵢ, sum those of elected sign",
        "Davari and Belilovsky 2023, arXiv:2312.06795", "statistics", "required",
        parameters=(COEFF, _DENSITY, _GAMMA, _SCALE, _SUM, _BY_L1), ignored=("int8_mask",),
    ),
    Algorithm(
        "sce", "sce:Sce", "select what varies between models, weigh by energy, erase minority signs",
        "Wan et al. 2024, arXiv:2408.07990", "statistics", "required",
        parameters=(
            Parameter("density", 1.0, "the fraction of the varying elements that is kept", 0, 1, mergekit="select_topk"),
        ),
        ignored=("int8_mask",),
    ),
    Algorithm(
        "model_stock", "model_stock:ModelStock", "from the base towards the average, as far as angles tell",
        "Jang et al. 2024, arXiv:2403.19522", "row", "required", models=(2, None),
        parameters=(Parameter("filter_wise", False, "a ratio for each filter, not for the tensor", kind="bool"),),
    ),
    Algorithm(
        "nearswap", "interpolation:NearSwap", "step towards a model, by t at most: all the way where it is near",
        "alchemonaut 2024", "element", "required", models=(1, 1),
        parameters=(Parameter("t", None, "the longest step of an element", 0),),
    ),
    Algorithm(
        "arcee_fusion", "arcee_fusion:ArceeFusion", "take over the elements whose importance stands out",
        "Arcee AI, mergekit 0.1.5", "row", "required", models=(1, 1),
    ),
    Algorithm(
        "ram", "reinforced:Ram", "add what one model changed whole, what several changed as their mean",
        "arXiv:2601.13572", "element", "required",
        parameters=(_CHANGED,),
    ),
    Algorithm(
        "ramplus", "reinforced:RamPlus", "ram, with what a model changed alone enlarged by its share",
        "arXiv:2601.13572", "statistics", "required", aliases=("ramplus_tl",),
        parameters=(
            Parameter("r", 0.1, "how much a share enlarges"),
            Parameter("alpha", 0.2, "the largest share", 0),
            _CHANGED,
        ),
    ),
    Algorithm(
        "passthrough", "averaging:Passthrough", "s · x: one model's tensor, scaled",
        "–", "element", "none", models=(1, 1),
        parameters=(Parameter("scale", 1.0, "s: multiplies the tensor"),),
    ),
)  # fmt: skip

ALGORITHMS: Mapping[str, Algorithm] = {algorithm.name: algorithm for algorithm in _TABLE}
"""The table, by name."""
_BY_ALIAS = {alias: algorithm for algorithm in _TABLE for alias in algorithm.aliases}


def find(name: str | Algorithm) -> Algorithm:
    """Find an algorithm by name; ``-`` and ``_`` are the same. One that is found already is returned as it is.

    Raises:
        UsageError: there is none, near ones are named; or a function that declares no scope.

    >>> find("task-arithmetic").base
    'required'
    """
    if isinstance(name, Algorithm):
        return name
    if not isinstance(name, str):
        raise UsageError(
            f"an algorithm is a name, or a function that declares its scope, not {name!r}",
            mend="decorate it: @surgery.algorithms.custom.algorithm(scope='element')",
        )
    spelled = name.replace("-", "_")
    found = ALGORITHMS.get(spelled) or _BY_ALIAS.get(spelled)
    if found is None:
        raise UsageError(f"no algorithm {name!r}", mend=_near(name, list(ALGORITHMS), "there are"))
    return found


def resolve(
    algorithm: Algorithm, count: int, parameters: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]] = ()
) -> tuple[dict[str, Number], dict[str, tuple[Number, ...]]]:
    """Check parameters and fill in defaults.

    Args:
        algorithm: whose parameters they are.
        count: number of models.
        parameters: values for the whole merge; for parameters that each model has, the same value for all.
        per_model: for every model its own values, which go before ``parameters``.

    Returns:
        The values of the merge's parameters, and of the models' (one a model), by name.

    Raises:
        UsageError: an unknown name, a value out of range, one that is missing, or a merge's parameter given to a model.

    >>> resolve(find("linear"), 2, {"normalize": False}, [{"coeff": 0.3}, {}])
    ({'normalize': False}, {'coeff': (0.3, 1.0)})
    """
    own = list(per_model) or [{}] * count
    if len(own) != count:
        raise UsageError(f"parameters for {len(own)} models, but there are {count}")
    for name in {*parameters, *(name for values in own for name in values)}:
        known = algorithm.parameter(name)
        if not known.per_model and any(name in values for values in own):
            raise UsageError(f"{name} belongs to the merge as a whole, not to a model")
    whole: dict[str, Number] = {}
    each: dict[str, tuple[Number, ...]] = {}
    for parameter in algorithm.parameters:
        given = [values.get(parameter.name, parameters.get(parameter.name, parameter.default)) for values in own]
        if not parameter.per_model:
            given = [parameters.get(parameter.name, parameter.default)]
        if any(value is None for value in given):
            raise UsageError(f"{algorithm.name} needs {parameter.name}: {parameter.meaning}")
        checked = tuple(parameter.check(value) for value in given)
        if parameter.per_model:
            each[parameter.name] = checked
        else:
            whole[parameter.name] = checked[0]
    return whole, each


def _near(name: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"{otherwise} {', '.join(known) or 'none'}"
