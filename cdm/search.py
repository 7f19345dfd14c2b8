"""A search, without whoever runs it: (config, parameters of a trial) -> config; what a space may hold; importance.

A trial's parameters are plain: dotted key -> number, text, true/false or, for a whole section, its JSON.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cdm.config import Config, ConfigError, parse_config
from cdm.config_errors import NEAR, put
from cdm.config_search import AnyDistribution, Choice, Int, LogUniform, Search

Parameters = Mapping[str, Any]
SECTIONS = ("corpus", "generation", "teachers", "student", "method")  # the others do not make another student
MAX_PREPARED = 64  # combinations of values that the stages before training read


def search_section(config: Config) -> Search:
    """Raises ConfigError where the config has none."""
    if config.search is None:
        raise ConfigError(["search: missing; this section says which keys are tried with which values"])
    return config.search


def parameter(value: Any) -> Any:
    """A value of a choice as a trial's parameter."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value, sort_keys=True)


def finite_values(distribution: AnyDistribution) -> list[Any] | None:
    """All values, None where they are infinitely many."""
    if isinstance(distribution, Choice):
        return distribution.values
    if isinstance(distribution, Int):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, LogUniform) or distribution.step is None:
        return None
    count = math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
    return [round(distribution.low + i * distribution.step, 12) for i in range(count)]


def config_value(distribution: AnyDistribution, given: Any) -> Any:
    """The config's value for a trial's parameter."""
    values = finite_values(distribution)
    if values is None:
        return float(given)
    if isinstance(distribution, Choice):
        return next(value for value in values if parameter(value) == given and type(parameter(value)) is type(given))
    return min(values, key=lambda value: abs(value - given))


def trial_config(config: Config, parameters: Parameters) -> Config:
    """The config of a trial: an ordinary one, without `search`. Raises ConfigError where values do not go together."""
    space = search_section(config).space
    return with_values(config, {name: config_value(space[name], given) for name, given in parameters.items()})


def exact_parameters(search: Search, parameters: Parameters) -> dict[str, Any]:
    """A searcher's parameters as plain values; steps are exact whatever its arithmetic."""
    return {name: parameter(config_value(search.space[name], given)) for name, given in parameters.items()}


def with_values(config: Config, chosen: Mapping[str, Any]) -> Config:
    """The config with values at dotted keys, without what tries values. Raises ConfigError."""
    values = config.model_dump(mode="json", exclude={"search", "compare"})
    for name in sorted(chosen, key=lambda name: name.count(".")):  # a whole section before the keys in it
        put(values, name, chosen[name], name)
    made = parse_config(values | {"baselines": []})
    return made.model_copy(update={"baselines": [other for other in config.baselines if other != made.method]})


# --- the space ---------------------------------------------------------------------------------------------------


def space_problems(config: Config) -> list[str]:
    """What is wrong with a space, a line each: unknown keys, values that the config does not take, too many values."""
    search = search_section(config)
    found = [
        problem for name, distribution in search.space.items() for problem in _problems(config, name, distribution)
    ]
    if found:
        return found
    if search.searcher == "grid":
        found += [f"search.space.{name}: a grid needs `step`, or a choice" for name in _infinite(search, search.space)]
    early = early_keys(search)
    for name in _infinite(search, early):
        found.append(f"search.space.{name}: stages before training read it, so it needs `step`, or a choice")
    count = math.prod(len(finite_values(search.space[name]) or ()) for name in early)
    if count > MAX_PREPARED:
        found.append(f"search.space: {', '.join(early)} have {count} combinations to prepare, more than {MAX_PREPARED}")
    return found or _grid_problems(config, search)


def _infinite(search: Search, names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [name for name in names if finite_values(search.space[name]) is None]


def _problems(config: Config, name: str, distribution: AnyDistribution) -> list[str]:
    first = name.split(".")[0]
    if first not in SECTIONS:
        known = ", ".join(SECTIONS)
        near = difflib.get_close_matches(first, SECTIONS, n=1, cutoff=NEAR)
        hint = f"did you mean {near[0]}{name[len(first) :]}?" if near else f"the sections of a search are {known}"
        return [f"search.space.{name}: {'is not searched' if first in Config.model_fields else 'unknown key'}; {hint}"]
    found: dict[str, None] = {}
    for value in _samples(distribution):
        try:
            with_values(config, {name: value})
        except ConfigError as error:
            found |= dict.fromkeys(f"search.space.{problem}" for problem in error.problems)
    return list(found)


def _samples(distribution: AnyDistribution) -> list[Any]:
    """Values that stand for all: each of a choice; of a range both ends and one between that is no whole number."""
    values = finite_values(distribution)
    if values is not None:
        return values if isinstance(distribution, Choice) else [values[0], values[len(values) // 2], values[-1]]
    assert not isinstance(distribution, Choice)
    return [
        distribution.low,
        distribution.low + 0.6180339887 * (distribution.high - distribution.low),
        distribution.high,
    ]


def _grid_problems(config: Config, search: Search) -> list[str]:
    """Points of a grid, or of what is prepared, whose values do not go together."""
    found: dict[str, None] = {}
    for point in _points(search, list(search.space) if search.searcher == "grid" else early_keys(search)):
        try:
            trial_config(config, point)
        except ConfigError as error:
            found |= dict.fromkeys(f"search.space: {problem} (at {_said(point)})" for problem in error.problems)
    return list(found)


def _said(point: Parameters) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _points(search: Search, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = [[parameter(value) for value in finite_values(search.space[name]) or ()] for name in names]
    for values in itertools.product(*columns):
        yield dict(zip(names, values, strict=True))


def trial_count(search: Search) -> int:
    return search.trials or math.prod(len(finite_values(one) or ()) for one in search.space.values())


# --- what trials share -------------------------------------------------------------------------------------------


def early_keys(search: Search) -> list[str]:
    """The keys of a space that stages before training read: each of their combinations is prepared once."""
    return [name for name in search.space if read_before_training(name)]


def read_before_training(name: str) -> bool:
    """Whether a key decides on anything but the loss and the optimisation."""
    section, *rest = name.split(".")
    if section == "method":
        return not rest or rest[0] in ("type", "align", "threshold", "protect")
    if section == "student":
        return not rest or rest[0] in ("model", "max_length", "seed")
    return section != "teachers" or rest[-1:] != ["weight"]


def preparations(search: Search) -> Iterator[dict[str, Any]]:
    """Every combination of the values of `early_keys`; one that is empty where there are none."""
    return _points(search, early_keys(search))


def preparation_key(search: Search, parameters: Parameters) -> str:
    """Which preparation a trial takes."""
    return json.dumps([config_value(search.space[name], parameters[name]) for name in early_keys(search)])


# --- importance --------------------------------------------------------------------------------------------------


def importance(search: Search, trials: Sequence[tuple[Parameters, float]]) -> dict[str, float]:
    """The share of the variance over finished trials that each key explains (fANOVA, by Optuna), the largest first.

    None are known of fewer than three trials, or of trials that are all alike.
    """
    if len(trials) < 3 or len({value for _, value in trials}) == 1:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if search.mode == "min" else "maximize")
    distributions = {name: _optuna(one) for name, one in search.space.items()}
    for parameters, value in trials:
        exact = exact_parameters(search, parameters)
        study.add_trial(optuna.create_trial(params=exact, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _optuna(distribution: AnyDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = finite_values(distribution)
    if isinstance(distribution, Choice):
        return CategoricalDistribution([parameter(value) for value in distribution.values])
    if isinstance(distribution, LogUniform) or values is None:
        return FloatDistribution(distribution.low, distribution.high, log=isinstance(distribution, LogUniform))
    if isinstance(distribution, Int):
        return IntDistribution(values[0], values[-1], step=distribution.step)
    return FloatDistribution(values[0], values[-1], step=distribution.step)
