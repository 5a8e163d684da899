"""Which function of TRL is replaced by which of ours, and the replacing."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from fusedkd.integrations.trl import hidden, lists, logits


class Seam(NamedTuple):
    """A function of TRL, the attribute `name` of a module or, after the colon, of a class in it, and ours."""

    place: str
    name: str
    ours: Callable[..., Any]
    static: bool = False
    """A static method."""

    def owner(self) -> Any:
        module, _, attribute = self.place.partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found


_STABLE = "trl.trainer.distillation_trainer"
_EXPERIMENTAL = {
    name: f"trl.experimental.{name}.{name}_trainer"
    for name in ("gkd", "gold", "iw_opd", "sdft", "sdpo", "server_distillation", "async_distillation")
}
_IW_OPD, _SERVER = f"{_EXPERIMENTAL['iw_opd']}:IWOPDTrainer", f"{_EXPERIMENTAL['server_distillation']}:"


def _jsd(place: str) -> Seam:
    return Seam(place, "generalized_jsd_loss", logits.generalized_jsd_loss, static=True)


def _served(place: str) -> tuple[Seam, ...]:
    return (
        Seam(place, "_compute_server_forward_kl_loss", lists.server_forward_kl_loss),
        Seam(place, "_compute_sparse_top_1_divergence_loss", lists.sparse_top_1_divergence_loss),
    )


def _self_distillation(place: str) -> tuple[Seam, ...]:
    return (
        Seam(place, "compute_topk_self_distillation_loss", lists.topk_self_distillation_loss),
        Seam(place, "compute_full_logit_self_distillation_loss", logits.full_logit_self_distillation_loss),
    )


SEAMS: dict[str, tuple[Seam, ...]] = {
    "DistillationTrainer": (Seam(_STABLE, "_chunked_divergence_loss", hidden.chunked_divergence_loss),),
    "GKDTrainer": (_jsd(f"{_EXPERIMENTAL['gkd']}:GKDTrainer"),),
    "GOLDTrainer": (_jsd(f"{_EXPERIMENTAL['gold']}:GOLDTrainer"),),
    "IWOPDTrainer": (
        _jsd(_IW_OPD),
        Seam(_IW_OPD, "_compute_local_sparse_top_1_divergence_loss", lists.local_sparse_top_1_divergence_loss),
        *_served(_IW_OPD),
    ),
    "SDFTTrainer": _self_distillation(_EXPERIMENTAL["sdft"]),
    "SDPOTrainer": _self_distillation(_EXPERIMENTAL["sdpo"]),
    "ServerDistillationTrainer": _served(f"{_SERVER}ServerDistillationTrainer"),
    "AsyncDistillationTrainer": (
        Seam(_EXPERIMENTAL["async_distillation"], "_chunked_jsd_loss", hidden.chunked_jsd_loss),
    ),
}
"""For each trainer of TRL, by the name of its class. What is not here remains TRL's: the sampled-token objectives of
IW-OPD, SDFT and SDPO, the self-distillation trainers with a served teacher, and GOLD's comparison of sorted
probabilities.
"""

VERSIONS: dict[str, tuple[str, ...]] = dict.fromkeys(SEAMS, ("1.14.2", "1.15.0", "1.16.0")) | {
    "DistillationTrainer": ("1.16.0",),  # in 1.15.0 its loss needs a GPU; in 1.14.2 it has other parameters
    "AsyncDistillationTrainer": ("1.16.0",),
}
"""Of TRL, with which each trainer was tried: five steps are those of the original."""

_ELSEWHERE = (
    ("distillation_objective", "iw_opd"),
    ("distillation_mode", "sampled_token"),
    ("distillation_weight", 0.0),
    ("use_teacher_server", True),
)
"""Arguments with which a trainer calls none of its seams; IW-OPD's with a served teacher do, by the objective "jsd"."""

_replaced: dict[tuple[str, str], Any] = {}
"""What TRL had at (place, name)."""


class patch(AbstractContextManager["patch"]):
    """Replace the losses of TRL's trainers by the fused ones, for all trainers of that class in this process; left as a
    context manager, it undoes that.

    Args:
        trainers: trainers or their classes: those of :data:`SEAMS`, and subclasses of them.

    Raises:
        ValueError: another class; arguments with which the trainer calls none of the losses: a sampled-token objective.
        RuntimeError: this TRL's function has other parameters than ours; a subclass overrides it.

    Warns:
        UserWarning: a TRL with which that trainer was not tried (:data:`VERSIONS`).
    """

    def __init__(self, *trainers: Any):
        if not trainers:
            raise ValueError(f"patch needs a trainer or its class, one of TRL's {', '.join(SEAMS)}")
        self.seams: list[Seam] = []
        version = importlib.import_module("trl").__version__
        for trainer in trainers:
            name = _known(trainer)
            for seam in SEAMS[name]:
                _check(seam, trainer, version)
                self.seams.append(seam)
            if version not in VERSIONS[name]:
                tried = ", ".join(VERSIONS[name])
                told = f"fusedkd tried the {name} of TRL {tried}, not of {version}: compare a step"
                warnings.warn(told, stacklevel=2)
        self.seams = [seam for seam in self.seams if (seam.place, seam.name) not in _replaced]  # else of a patch before
        for seam in self.seams:
            key, owner = (seam.place, seam.name), seam.owner()
            _replaced[key] = inspect.getattr_static(owner, seam.name)
            setattr(owner, seam.name, staticmethod(seam.ours) if seam.static else seam.ours)

    def __exit__(self, *_: object) -> None:
        _restore(self.seams)


def unpatch(*trainers: Any) -> None:
    """Give TRL's losses back to these trainers, or classes; without an argument to all."""
    every = [seam for seams in SEAMS.values() for seam in seams]
    _restore([seam for trainer in trainers for seam in SEAMS[_known(trainer)]] if trainers else every)


def _restore(seams: list[Seam]) -> None:
    for seam in seams:
        if (seam.place, seam.name) in _replaced:
            setattr(seam.owner(), seam.name, _replaced.pop((seam.place, seam.name)))


def _known(trainer: Any) -> str:
    """Its class of TRL's, by name."""
    bases = inspect.getmro(trainer if isinstance(trainer, type) else type(trainer))
    for base in bases:
        if base.__name__ in SEAMS and base.__module__.startswith("trl."):
            return base.__name__
    raise ValueError(f"trainer must be one of TRL's {', '.join(SEAMS)}, or its class, not {bases[0].__name__}")


def _check(seam: Seam, trainer: Any, version: str) -> None:
    kind = trainer if isinstance(trainer, type) else type(trainer)
    key, owner = (seam.place, seam.name), seam.owner()
    theirs = _replaced.get(key) or inspect.getattr_static(owner, seam.name, None)
    wanted = None if theirs is None else set(inspect.signature(getattr(theirs, "__func__", theirs)).parameters)
    if wanted is None or not wanted <= set(inspect.signature(seam.ours).parameters):
        has = "is not there" if wanted is None else f"has the parameters {', '.join(sorted(wanted))}"
        raise RuntimeError(f"fusedkd has no loss for TRL {version}, whose {seam.name} of {seam.place} {has}")
    if isinstance(owner, type) and inspect.getattr_static(kind, seam.name) is not inspect.getattr_static(
        owner, seam.name
    ):
        raise RuntimeError(f"{kind.__name__} overrides {seam.name}, which patch would not reach")
    given = getattr(trainer, "args", None)
    for name, value in _ELSEWHERE:
        served = name == "use_teacher_server" and hasattr(given, "distillation_objective")
        if getattr(given, name, None) == value and not served:
            raise ValueError(
                f"{kind.__name__} with {name}={value!r} calls no loss that fusedkd has: leave it unpatched"
            )
