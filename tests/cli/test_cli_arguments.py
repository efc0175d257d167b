from __future__ import annotations

import itertools
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.cli.arguments import Parser, count, path, size
from consilium.cli.main import VERBS, verb_parser
from consilium.cli.models import full_name, read_model
from consilium.config.io import to_json, to_yaml
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import recipe
from consilium.report.plain import columns, counted, operations, sized


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8M", 8_000_000),
        ("8.1T", 8_100_000_000_000),
        ("32k", 32_000),
        ("15B", 15 * 10**9),
        (" 7 m ", 7 * 10**6),
        ("1", 1),
    ],
)
def test_counts_are_read_exactly(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 mib", 3 * 2**19), ("512b", 512), ("2TiB", 2**41)],
)
def test_sizes_are_read_exactly(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("read", [count, size])
@pytest.mark.parametrize("text", ["", "x", "-3", "0", "1e9", "3 apples", "0.5", "1..5M", "M", "nan", "٣"])
def test_what_is_no_positive_number_is_refused(read: Callable[[str], int], text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is not a positive"):
        read(text)


@given(st.integers(1, 10**15))
def test_plain_numbers_are_themselves(value: int) -> None:
    assert count(str(value)) == size(f"{value}B") == value


def test_a_size_without_a_unit_is_a_slip() -> None:
    with pytest.raises(ArgumentTypeError, match="'80' is not a positive size with its unit"):
        size("80")


def test_an_empty_path_is_not_the_current_folder() -> None:
    assert path("a/b") == Path("a/b")
    with pytest.raises(ArgumentTypeError, match="the path is empty"):
        path("")


@given(st.integers(1, 10**26))
def test_what_is_shown_has_four_digits_of_what_is_meant(value: int) -> None:
    number, _, unit = operations(value).partition(" ")
    power = 1000 ** " kMGTPEZY".index(unit[0] if unit != "FLOP" else " ")
    assert abs(float(number.replace(",", "")) * power / value - 1) <= 5e-4


def test_numbers_are_shown_with_their_units() -> None:
    assert [counted(value) for value in (7, 999, 1000, 37_552_282_624)] == ["7", "999", "1.000 k", "37.55 B"]
    assert [sized(value) for value in (0, 1023, 1536, 24 * 2**30)] == [
        "0 B",
        "1,023 B",
        "1.500 KiB",
        "24.00 GiB",
    ]
    assert operations(250_457_382_912) == "250.5 GFLOP"


def test_columns_are_aligned_and_end_without_blanks() -> None:
    table = columns([("a", "10", "x"), ("bcd", "5", "")], right=(1,), indent="  ")
    assert table == "  a    10  x\n  bcd   5"


def test_a_model_is_named_by_recipe_and_size() -> None:
    assert read_model("deepseek-v3") is recipe("deepseek-v3:671b")
    assert full_name("deepseek-v3") == "deepseek-v3:671b"
    assert full_name("mixtral:8x7b") == "mixtral:8x7b"
    assert full_name("./mixtral") == "./mixtral"


def test_a_model_is_read_from_yaml(tmp_path: Path) -> None:
    model = recipe("mixtral:tiny")
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(model))
    assert read_model(str(file)) == model


def test_the_model_of_a_run_is_read_from_its_folder_or_its_config(tmp_path: Path) -> None:
    model = recipe("deepseek-v3:tiny")
    (tmp_path / "config.yaml").write_text(to_yaml(Training(model=model, steps=3)))
    assert read_model(str(tmp_path)) == model
    assert read_model(str(tmp_path / "config.yaml")) == model


def test_the_model_of_a_checkpoint_is_read_from_its_config(tmp_path: Path) -> None:
    model = recipe("switch:tiny")
    (tmp_path / "config.json").write_text(f'{{"model_type": "consilium", "consilium": {to_json(model)}}}')
    assert read_model(str(tmp_path)) == model


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (None, "there is no"),
        (b"\xff\xfe\x00", r"config\.json"),
        (b"{", r"config\.json"),
        (b"[]", r"config\.json"),
        (b'{"consilium": {"family": "x"}}', "is missing; add it"),
    ],
)
def test_a_folder_that_describes_no_model_is_refused(
    tmp_path: Path, content: bytes | None, answer: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConsiliumError, match=answer):
        read_model(str(tmp_path))


def test_an_unknown_key_of_a_yaml_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(recipe("llama:tiny")) + "hiden_size: 8\n")
    with pytest.raises(ConsiliumError, match=r"unknown key hiden_size.*'hidden_size'"):
        read_model(str(file))


def test_a_name_on_the_hub_is_answered_with_how_to_get_it() -> None:
    with pytest.raises(ConsiliumError, match=r"hf download mistralai/Mixtral-8x7B-v0\.1 --local-dir"):
        read_model("mistralai/Mixtral-8x7B-v0.1")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConsiliumError, match=r"cannot read the configuration nowhere\.yaml: no such file"):
        read_model("nowhere.yaml")


@pytest.mark.parametrize("verb", VERBS)
def test_a_value_below_zero_is_a_value_and_no_option(verb: str) -> None:
    """Named in what is refused, or taken as text: never "expected one argument"."""
    parser = verb_parser(verb)
    taking = [action for action in parser.actions() if action.option_strings and action.nargs is None]
    places = ["x" for other in parser.actions() if not other.option_strings]
    needed = [word for other in taking if other.required for word in (other.option_strings[0], "1")]
    for option, text in itertools.product(taking, ["-1GiB", "-.5m", "-inf"]):
        assert text in _answer(parser, [*places, *needed, option.option_strings[0], text]), option.dest


def _answer(parser: Parser, words: list[str]) -> str:
    try:
        return str(parser.read(words))
    except ConsiliumError as error:
        return str(error)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upcycle", "a", "b", "--methd", "copy"], "unknown option --methd. Did you mean '--method'?"),
        (["upcycle", "a", "b", "--mehtod=copy"], "unknown option --mehtod. Did you mean '--method'?"),
        (["upcycle", "a", "--method", "copy"], "the following arguments are required: OUT"),
        (["upcycle", "--", "a", "--methd"], "the following arguments are required: --method"),
        (["generate", "a", "--prompt", "--methd"], "argument --prompt: expected one argument"),
    ],
)
def test_an_option_that_is_missing_may_be_there_misspelt(words: list[str], said: str) -> None:
    verb, *rest = words
    with pytest.raises(ConsiliumError, match=re.escape(said)):
        verb_parser(verb).read(rest)


def test_what_stands_after_two_dashes_stays_as_it_is() -> None:
    assert verb_parser("plan").read(["--fit", "1GiB", "--", "-3"]).model == "-3"
