"""Scaling laws with their published constants, under the names by which the command calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from consilium.errors import ConsiliumError, nearest
from consilium.planner.formulas import (
    Abnar,
    Chinchilla,
    Clark,
    Formula,
    Joint,
    Kaplan,
    Krajewski,
    Leverage,
    Power,
    Saturation,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A law and what must be known to read its figures. A name before a colon calls a family."""

    name: str
    paper: str
    counts: str
    """What it means by N."""
    fitted: str
    """What it was fitted to, as far as it is known here."""
    formula: Formula


_BODY = "N is the parameters a token uses, without embeddings"
_USED = "N is the parameters a token uses, embeddings included"
_ALL = "N is all parameters without embeddings, idle experts included"
_ROUTED = "fitted to 15 M to 1.3 B parameters, experts in every other layer, k = 1, 130 B tokens"


def _clark(name: str, formula: Clark) -> Law:
    """One router of Clark et al. table 3."""
    return Law(name=f"clark:{name}", paper="2202.01169", counts=_BODY, fitted=_ROUTED, formula=formula)


def _kaplan(name: str, counts: str, formula: Power | Kaplan) -> Law:
    return Law(
        name=f"kaplan:{name}",
        paper="2001.08361",
        counts=counts,
        fitted="fitted to dense models, so it sees no experts",
        formula=formula,
    )


LAWS: tuple[Law, ...] = (
    _clark(
        "s-base",
        Clark(a=-0.082, b=-0.108, c=0.009, d=1.104, saturation=Saturation(start=1.847, most=314.478)),
    ),
    _clark(
        "rl-r", Clark(a=-0.083, b=-0.126, c=0.012, d=1.111, saturation=Saturation(start=1.880, most=469.982))
    ),
    _clark(
        "hash", Clark(a=-0.087, b=-0.136, c=0.012, d=1.157, saturation=Saturation(start=4.175, most=477.741))
    ),
    Law(
        name="joint",
        paper="2502.05172",
        counts=_USED,
        fitted="fitted to top-1 experts in every layer",
        formula=Joint(
            a=35.91,
            alpha=-0.1889,
            delta=-0.2285,
            gamma=0.0098,
            b=35.98,
            beta=-0.1775,
            omega=0.5529,
            zeta=-0.0259,
            c=1.3637,
            saturation=Saturation(start=2.0732, most=290.4521),
        ),
    ),
    Law(
        name="krajewski",
        paper="2402.07871",
        counts=_ALL,
        fitted="fitted to E = 64 and G = 1 to 16",
        formula=Krajewski(
            a=18.1,
            alpha=0.115,
            b=30.8,
            beta=0.147,
            c=0.47,
            g=2.1,
            gamma=0.58,
            dense=Chinchilla(e=0.47, a=16.3, alpha=0.126, b=26.7, beta=0.127),
        ),
    ),
    Law(
        name="abnar",
        paper="2501.12370",
        counts=_ALL,
        fitted="explains 68 % of the variance of runs held out from the fit",
        formula=Abnar(
            a=16612.50,
            alpha=0.5962,
            b=5455.67,
            beta=0.3954,
            c=0.4598,
            lam=-0.1666,
            d=17.26,
            delta=0.1603,
            gamma=0.1595,
            e=0.94,
        ),
    ),
    Law(
        name="ling",
        paper="2507.17702",
        counts="has no N; G is twice the hidden size over the width of an expert",
        fitted="its bases of logarithms and its G are those that give the paper's examples",
        formula=Leverage(a=1.23, d=-7.61e-2, gamma=1.67e-2, beta=-1.17e-1, start=1.63e-2, most=5.28e16),
    ),
    _kaplan("n", _BODY, Power(of="parameters", constant=8.8e13, exponent=0.076)),
    _kaplan("d", "has no N", Power(of="tokens", constant=5.4e13, exponent=0.095)),
    _kaplan("nd", _BODY, Kaplan(alpha_n=0.076, alpha_d=0.103, n_c=6.4e13, d_c=1.8e13)),
    Law(
        name="chinchilla",
        paper="2203.15556",
        counts=_USED,
        fitted="fitted to dense models, so it sees no experts",
        formula=Chinchilla(e=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28),
    ),
)


def find(name: str) -> tuple[Law, ...]:
    """Return the laws called ``name``, a whole family, or ``all``. Raises ConsiliumError with the nearest."""
    found = tuple(law for law in LAWS if name in {"all", law.name, _family(law)})
    if not found:
        known = {law.name for law in LAWS} | {_family(law) for law in LAWS}
        raise ConsiliumError(f"unknown scaling law {name!r}.{nearest(name, known)}")
    return found


def _family(law: Law) -> str:
    return law.name.partition(":")[0]
