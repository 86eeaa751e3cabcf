"""The compression plan: what every linear becomes, and why. Frozen, and the same after a round trip through JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

from casp_pl.errors import ConfigError, IntegrityError

__all__ = ["CompressionPlan", "Counts", "ModulePlan"]

Counts = Literal["codes", "total"]

_VERSION = 1
_MAX_BITS = 16


@dataclass(frozen=True)
class ModulePlan:
    """What one linear becomes.

    Attributes:
        name: full Hugging Face module name.
        block: number of its decoder block.
        shape: (O, I) of the original weight.
        quantizer: name of the quantizer.
        bits: bits that its codes have; of a low-rank product, the factors' (equal to `factor_bits`).
        rank: inner width of its low-rank product, or None where the weight stays one matrix.
        factor_bits: bits of the two factors, or None without a rank.
        score: how much its distortion counted when bits were given out.
        why: one sentence for the reader of the plan.
        pinned: whether the user gave the bits, so that the allocation had no choice.
    """

    name: str
    block: int
    shape: tuple[int, int]
    quantizer: str
    bits: int
    rank: int | None
    factor_bits: int | None
    score: float
    why: str
    pinned: bool = False

    def __post_init__(self) -> None:
        if self.block < 0 or min(self.shape) < 1:
            raise ConfigError(f"{self.name}: block {self.block} and shape {self.shape} must not be negative or empty.")
        if not 1 <= self.bits <= _MAX_BITS:
            raise ConfigError(f"{self.name}: {self.bits} bits are outside 1 .. {_MAX_BITS}.")
        if self.rank is not None and not 1 <= self.rank <= min(self.shape):
            raise ConfigError(f"{self.name}: rank {self.rank} is outside 1 .. {min(self.shape)} of shape {self.shape}.")
        if self.factor_bits != (None if self.rank is None else self.bits):
            given = f"factor_bits {self.factor_bits}, rank {self.rank}, bits {self.bits}"
            raise ConfigError(f"{self.name}: {given} do not fit together.")

    @property
    def weights(self) -> int:
        """Weights of the original matrix, O I."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CompressionPlan:
    """Every compressed linear of a model, in quantization order, and what the whole costs.

    Attributes:
        model: name of the model that the plan was made for.
        modules: one entry for each linear.
        budget: bits per original weight that were to be spent.
        counts: what the budget counts: `codes` alone, or the `total` with codebooks, scales and zeros.
        bits_per_weight_codes: code bits per original weight of the compressed linears.
        bits_per_weight_total: all stored bits per original weight of the compressed linears.
    """

    model: str
    modules: tuple[ModulePlan, ...]
    budget: float
    counts: Counts
    bits_per_weight_codes: float
    bits_per_weight_total: float

    def __post_init__(self) -> None:
        names = [module.name for module in self.modules]
        if len(set(names)) != len(names):
            raise ConfigError(f"The plan names {next(name for name in names if names.count(name) > 1)} twice.")
        if self.counts not in ("codes", "total"):
            raise ConfigError(f"counts: '{self.counts}' is neither codes nor total.")
        if not self.modules or not self.budget > 0:
            raise ConfigError(f"A plan needs modules and a positive budget, got {len(self.modules)} and {self.budget}.")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that the plan touches, ascending."""
        return tuple(sorted({module.block for module in self.modules}))

    @property
    def weights(self) -> int:
        """Original weights of all its linears."""
        return sum(module.weights for module in self.modules)

    def of_block(self, block: int) -> tuple[ModulePlan, ...]:
        """The linears of one block, in quantization order."""
        return tuple(module for module in self.modules if module.block == block)

    def module(self, name: str) -> ModulePlan:
        """The entry of one linear by its full name.

        Raises:
            KeyError: the plan does not have it.
        """
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """A value for `json.dumps`; `from_json` gives an equal plan back."""
        value = asdict(self)
        value["modules"] = list(value["modules"])
        for module in value["modules"]:
            module["shape"] = list(module["shape"])
            if not module["pinned"]:
                del module["pinned"]
        return {"version": _VERSION, **value}

    @classmethod
    def from_json(cls, value: Any) -> "CompressionPlan":
        """Rebuild a plan from `to_json`.

        Raises:
            IntegrityError: keys are missing or unknown, a value has the wrong type, or the version is another.
            ConfigError: the values do not make a plan, for example a rank of 0.
        """
        table = dict(_table(value, "plan"))
        version = table.pop("version", None)
        if version != _VERSION:
            raise IntegrityError(f"plan: version {version} cannot be read, only {_VERSION}; make the plan again.")
        _check_keys(table, {field.name for field in fields(cls)}, "plan")
        entries = table["modules"]
        if not isinstance(entries, list):
            raise IntegrityError("plan: modules must be a list.")
        return cls(
            model=_typed(table, "model", str, "plan"),
            modules=tuple(_module_from_json(entry) for entry in entries),
            budget=float(_typed(table, "budget", (int, float), "plan")),
            counts=cast(Counts, _typed(table, "counts", str, "plan")),
            bits_per_weight_codes=float(_typed(table, "bits_per_weight_codes", (int, float), "plan")),
            bits_per_weight_total=float(_typed(table, "bits_per_weight_total", (int, float), "plan")),
        )


def _module_from_json(value: Any) -> ModulePlan:
    table = _table(value, "plan module")
    table = {"pinned": False, **table}  # plans name it only where it is true
    _check_keys(table, {field.name for field in fields(ModulePlan)}, f"plan module {table.get('name', '?')}")
    where = f"plan module {table['name']}"
    shape = _typed(table, "shape", list, where)
    if len(shape) != 2 or any(type(size) is not int for size in shape):
        raise IntegrityError(f"{where}: shape must be two integers, got {shape}.")
    return ModulePlan(
        name=_typed(table, "name", str, where),
        block=_typed(table, "block", int, where),
        shape=(shape[0], shape[1]),
        quantizer=_typed(table, "quantizer", str, where),
        bits=_typed(table, "bits", int, where),
        rank=_typed(table, "rank", (int, type(None)), where),
        factor_bits=_typed(table, "factor_bits", (int, type(None)), where),
        score=float(_typed(table, "score", (int, float), where)),
        why=_typed(table, "why", str, where),
        pinned=table["pinned"] is True,
    )


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise IntegrityError(f"{where}: expected an object, got {type(value).__name__}.")
    return value


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    missing, unknown = sorted(known - set(table)), sorted(set(table) - known)
    if missing or unknown:
        raise IntegrityError(f"{where}: missing keys {missing}, unknown keys {unknown}.")


def _typed(table: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise IntegrityError(f"{where}: {key} has the wrong type {type(value).__name__}.")
    return value
