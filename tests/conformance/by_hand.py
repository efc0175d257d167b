"""Six tokens worked by hand, for every system that transformers lacks.

Four experts. The logits are logarithms of small whole numbers, so that a softmax can be read off:

    token   probabilities            best two      of the two   over the sum
    0       4/10 3/10 2/10 1/10      0, 1          4/10 3/10    4/7 3/7
    1       1/10 2/10 3/10 4/10      3, 2          4/10 3/10    4/7 3/7
    2       3/10 4/10 1/10 2/10      1, 0          4/10 3/10    4/7 3/7
    3       6/10 1/10 2/10 1/10      0, 2          6/10 2/10    3/4 1/4
    4       2/10 2/10 5/10 1/10      2, 0 (tie)    5/10 2/10    5/7 2/7
    5       1/4  1/4  1/4  1/4       0, 1 (tie)    1/4  1/4     1/2 1/2

Expert 0 is used by tokens 0, 2, 3, 4 and 5, expert 1 by 0, 2 and 5, expert 2 by 1, 3 and 4, expert 3 by 1:
loads 5, 3, 3, 1 of 12 copies, so f = 4 load / 12 = 5/3, 1, 1, 1/3.

Probabilities summed over the tokens: expert 0: 0.4 + 0.1 + 0.3 + 0.6 + 0.2 + 0.25 = 1.85, expert 1: 1.45,
expert 2: 1.55, expert 3: 1.15, together 6. So the sum of f P is
(5/3 * 1.85 + 1.45 + 1.55 + 1.15 / 3) / 6 = 6.46667 / 6 = 97/90, which is 1 at perfect balance.

With two devices of two experts: mean f = 4/3 and 2/3, summed P = 3.3/6 and 2.7/6, so
4/3 * 0.55 + 2/3 * 0.45 = 31/30.

Weights over the sum, added up by expert, in units of 1/28: expert 0: 16 + 12 + 21 + 8 + 14 = 71,
expert 1: 12 + 16 + 14 = 42, expert 2: 12 + 7 + 20 = 39, expert 3: 16; together 168 = 6 * 28, mean 42.
Squared variation: (29^2 + 0 + 3^2 + 26^2) / 4 / 42^2 = 1526 / 7056 = 109/504.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

Data = dict[str, Any]

COUNTS = ((4, 3, 2, 1), (1, 2, 3, 4), (3, 4, 1, 2), (6, 1, 2, 1), (2, 2, 5, 1), (1, 1, 1, 1))
BEST_TWO = [[0, 1], [3, 2], [1, 0], [0, 2], [2, 0], [0, 1]]
PLAIN = ["4/10 3/10", "4/10 3/10", "4/10 3/10", "6/10 2/10", "5/10 2/10", "1/4 1/4"]
OVER_THE_SUM = ["4/7 3/7", "4/7 3/7", "4/7 3/7", "3/4 1/4", "5/7 2/7", "1/2 1/2"]
LOADS = [5, 3, 3, 1]
EXPERT_LOSS, DEVICE_LOSS, IMPORTANCE = 97 / 90, 31 / 30, 109 / 504
FOUR = {"experts": "4"}
TOP_2_OF_4 = {**FOUR, "router.select.k": "2"}


def worked(system: str) -> Data | None:
    """The case of ``system`` with its expectation and no coefficient in its losses; None where it has none.

    A loss that is not worked here is left out, and plain loops supply it.
    """
    cases = {
        "jacobs": everyone,
        "dense-moe": everyone,
        "shazeer": lambda: case(TOP_2_OF_4, OVER_THE_SUM, importance=IMPORTANCE),
        "shazeer-h": two_levels,
        "gshard": two_choices_and_a_capacity,
        "hash": by_table,
        "expert-choice": by_experts,
        "llama-moe": behind_a_tanh,
        "deepseek-moe": lambda: case(TOP_2_OF_4, PLAIN, switch=EXPERT_LOSS, sequence=EXPERT_LOSS),
        "deepseek-moe-devices": on_two_devices,
        "nemotron-moe": lambda: case(TOP_2_OF_4, PLAIN, switch=EXPERT_LOSS),
        "grok-1": lambda: case(TOP_2_OF_4, PLAIN),
        "skywork-moe": standardised,
    }
    return cases[system]() if system in cases else None


def logarithms(rows: tuple[tuple[int, ...], ...] = COUNTS) -> list[list[float]]:
    return [[math.log(n) for n in row] for row in rows]


def fractions(rows: list[str], scale: float = 1.0) -> list[list[float]]:
    return [[float(Fraction(text)) * scale for text in row.split()] for row in rows]


def case(sizes: dict[str, str], weights: list[str], **losses: float) -> Data:
    """Top-2 of four experts; ``weights`` as fractions in the order of ``BEST_TWO``."""
    return {
        "name": "six tokens by hand",
        "x_TD": logarithms(),
        "sizes": sizes,
        "experts_TK": BEST_TWO,
        "weights_TK": fractions(weights),
        "admitted_TK": [[True, True]] * 6,
        "load_E": LOADS,
        "losses": losses,
    }


def everyone() -> Data:
    """All four experts, weighted by the whole softmax; falling order, ties to the lower number."""
    return case({**FOUR, "router.select.k": "4"}, []) | {
        "experts_TK": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [0, 2, 1, 3], [2, 0, 1, 3], [0, 1, 2, 3]],
        "weights_TK": [
            [0.4, 0.3, 0.2, 0.1],
            [0.4, 0.3, 0.2, 0.1],
            [0.4, 0.3, 0.2, 0.1],
            [0.6, 0.2, 0.1, 0.1],
            [0.5, 0.2, 0.2, 0.1],
            [0.25, 0.25, 0.25, 0.25],
        ],
        "admitted_TK": [[True] * 4] * 6,
        "load_E": [6, 6, 6, 6],
    }


def two_choices_and_a_capacity() -> Data:
    """GShard algorithm 1 with C = 2 * 6 / 4 = 3 places an expert.

    First choices in token order: expert 0 takes tokens 0, 3 and 5 and is full; 3 takes 1, 1 takes 2, 2 takes
    4. Second choices: token 0 goes to 1, 1 to 2, 2 is turned away by 0, 3 goes to 2, 4 is turned away by 0, 5
    goes to 1.
    Loads 3, 3, 3, 1. The loss counts first choices before drops: 3, 1, 1, 1 of 6, so f = 2, 2/3, 2/3, 2/3 and
    the sum of f P is (2 * 1.85 + 2/3 * 4.15) / 6 = 97/90 once more, by chance.
    """
    fits = [[True, True], [True, True], [True, False], [True, True], [True, False], [True, True]]
    sizes = {**FOUR, "admission.group_tokens": "null"}
    first = (2 * 1.85 + 2 / 3 * 4.15) / 6
    return case(sizes, OVER_THE_SUM, switch=first) | {"admitted_TK": fits, "load_E": [3, 3, 3, 1]}


def on_two_devices() -> Data:
    """DeepSeekMoE equations 12 and 15 with two devices of two experts."""
    losses = "[{kind: switch, coefficient: 0.003}, {kind: device, coefficient: 0.05, devices: 2}]"
    return case({**TOP_2_OF_4, "balance.losses": losses}, PLAIN, switch=EXPERT_LOSS, device=DEVICE_LOSS)


def by_table() -> Data:
    """Hash layers: the table alone decides, here token t goes to expert 3 t mod 4; each weight is 1."""
    chosen = [[0], [3], [2], [1], [0], [3]]
    return case({**FOUR, "router.select.vocab_size": "6", "router.select.k": "1"}, ["1"] * 6) | {
        "parameters": {"table": [[0.0], [3.0], [2.0], [1.0], [0.0], [3.0]]},
        "experts_TK": chosen,
        "admitted_TK": [[True]] * 6,
        "load_E": [2, 1, 1, 2],
    }


def by_experts() -> Data:
    """Expert choice: each expert takes its best 2 * 6 / 4 = 3 tokens.

    Down the columns of the table: expert 0 takes 3 (0.6), 0 (0.4) and 2 (0.3); expert 1 takes 2 (0.4),
    0 (0.3) and 5 (0.25); expert 2 takes 4 (0.5), 1 (0.3) and 5; expert 3 takes 1 (0.4), 5 and 2 (0.2).
    """
    return case(FOUR, ["4/10 3/10", "4/10 3/10", "4/10 3/10 2/10", "6/10", "5/10", "1/4 1/4 1/4"]) | {
        "experts_TK": [[0, 1], [3, 2], [1, 0, 3], [0], [2], [1, 2, 3]],
        "admitted_TK": [[True] * n for n in (2, 2, 3, 1, 1, 3)],
        "load_E": [3, 3, 3, 3],
    }


def behind_a_tanh() -> Data:
    """LLaMA-MoE: the gate's hidden layer is a tanh, so x is the inverse tanh of each logit.

    A common factor of a row changes no softmax: with the root of largest times smallest all logits lie within
    half of ln 6 = 0.896. The released scale of 8 = 16 experts / 2 multiplies the weights.
    """
    middle = [math.sqrt(max(row) * min(row)) for row in COUNTS]
    x = [[math.atanh(math.log(n / m)) for n in row] for row, m in zip(COUNTS, middle, strict=True)]
    return case(TOP_2_OF_4, [], importance=IMPORTANCE) | {
        "x_TD": x,
        "weights_TK": fractions(OVER_THE_SUM, scale=8.0),
    }


def standardised() -> Data:
    """Skywork-MoE: scale and offset of a row's logits drop out.

    Each row holds c (3, 1, -1, -3) + d in some order. Mean d; the squares of the rest sum to 20 c^2, and the
    unbiased variance is 20 c^2 / 3, so the standardised logits are (3, 1, -1, -3) / sqrt(20/3) =
    1.161895, 0.387298, -0.387298, -1.161895. Of the best two the first weighs
    1 / (1 + exp(-0.774597)) = 0.684514. The softmax over all four: 0.564586, 0.260212, 0.119929, 0.055274.
    Mean probabilities P follow from the orders below; the loss is the sum of (1/4 - P)^2. A capacity of four
    times the average turns nobody away.
    """
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (0, 2, 1, 3), (2, 0, 3, 1), (0, 1, 3, 2)]
    scales = [(0.5, 0.0), (1.0, 2.0), (2.0, -3.0), (4.0, 0.0), (1.0, 1.0), (2.0, 0.0)]
    steps = (3, 1, -1, -3)
    x = [
        [scale * steps[order.index(e)] + shift for e in range(4)]
        for order, (scale, shift) in zip(orders, scales, strict=True)
    ]
    exps = [math.exp(step / math.sqrt(20 / 3)) for step in steps]
    p = [e / sum(exps) for e in exps]
    mean = [sum(p[order.index(e)] for order in orders) / 6 for e in range(4)]
    first = exps[0] / (exps[0] + exps[1])
    chosen = [list(order[:2]) for order in orders]
    return case({**TOP_2_OF_4, "admission.factor": "4.0"}, []) | {
        "x_TD": x,
        "experts_TK": chosen,
        "weights_TK": [[first, 1 - first]] * 6,
        "load_E": [sum(e in row for row in chosen) for e in range(4)],
        "losses": {"adaptive": sum((0.25 - m) ** 2 for m in mean)},
    }


def two_levels() -> Data:
    """Shazeer 2017 appendix B with two groups of two experts; both groups are kept, one expert in each.

    The primary gate reads the first two inputs, so token 0 gives group 0 4/7 and group 1 3/7; inside the
    groups 4:3 and 2:1, so experts 0 and 2. One kept expert has secondary weight 1, and both groups are kept,
    so the weights are the primary probabilities. The order is that of the products: 4/7 * 4/7 > 3/7 * 2/3.

    Token 1: groups 1/3, 2/3; experts 1 (2/3 of its group) and 3 (4/7): 2/9 < 8/21, so 3, 1.
    Token 2: 3/7, 4/7; 1 (4/7) and 3 (2/3): 12/49 < 8/21, so 3, 1. Token 3: 6/7, 1/7; 0 (6/7), 2 (2/3).
    Token 4: 1/2, 1/2; 0 (1/2) and 2 (5/6): 2, 0. Token 5: all equal, so 0, 2.
    """
    sizes = {**FOUR, "router.select.groups": "2", "router.select.keep": "2", "router.select.k": "1"}
    weights = ["4/7 3/7", "2/3 1/3", "4/7 3/7", "6/7 1/7", "1/2 1/2", "1/2 1/2"]
    return case(sizes, weights) | {
        "experts_TK": [[0, 2], [3, 1], [3, 1], [0, 2], [2, 0], [0, 2]],
        "load_E": [4, 2, 4, 2],
    }
