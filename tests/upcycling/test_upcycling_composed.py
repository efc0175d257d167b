"""Branch-Train-MiX: experts out of several fine-tunes, the rest their mean; equal to what others merge."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.weights import digest
from consilium.cli.main import main
from consilium.config.attention import Rope
from consilium.config.feed_forward import FeedForward
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.config.upcycling import BranchTrainMix, Directions, Embeddings, HiddenStates, Prompts
from consilium.data.corpus import measured_corpus, whole_documents
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import Reading
from consilium.evaluation.walk import passages
from consilium.records.io import read_json
from consilium.records.upcycling import NAME, Lineage
from consilium.upcycling.run import upcycle
from support import relative_error
from upcycling.sources import LLAMA, QWEN3, fine_tuned, saved, text

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for kind, config in (("llama", LLAMA), ("qwen3", QWEN3)):
        saved(config, folder / kind / "base")
        for seed, name in enumerate(NAMES):
            fine_tuned(config, folder / kind / name, seed)
    text(folder / "a.txt")
    return folder


def mixed(home: Path, out: Path, *names: str, kind: str = "llama", **options: Any) -> Lineage:
    sources = [home / kind / name for name in names or NAMES]
    given = {"method": "btx", "top_k": 2, **options}
    upcycle(home / kind / "base", out, sources=sources, data=home / "a.txt", **given)
    return read_json(Lineage, out / NAME)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(store.load(folder).state_dict())


@pytest.mark.parametrize("rest", ["mean", "base"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_experts_are_networks_of_the_sources_and_the_rest_is_their_mean_or_the_base(
    kind: str, rest: Any, home: Path, tmp_path: Path
) -> None:
    mixed(home, tmp_path / "moe", kind=kind, method=BranchTrainMix(rest=rest))
    made, base = weights(tmp_path / "moe"), weights(home / kind / "base")
    sources = [weights(home / kind / name) for name in NAMES]
    for name, values in made.items():
        if ".experts." in name:
            dense = name.replace("moe.experts", "feed_forward") + ".weight"
            assert torch.equal(values, torch.stack([source[dense] for source in sources])), name
        elif ".moe." not in name:
            mean = sum((source[name].double() for source in sources), torch.zeros(())) / len(sources)
            assert relative_error(values, mean if rest == "mean" else base[name]) < 1e-6, name


def test_of_equal_models_the_result_is_that_model(home: Path, tmp_path: Path) -> None:
    lineage = mixed(home, tmp_path / "moe", "base", "base", "base", kind="qwen3")
    assert lineage.certificate.relative < 1e-5
    mixed(home, tmp_path / "whole", "base", "base", kind="llama", shared=1)
    ids_BS = torch.arange(60)[None]
    for folder, base in ((tmp_path / "moe", "qwen3/base"), (tmp_path / "whole", "llama/base")):
        one, other = store.load(folder).eval(), store.load(home / base).eval()
        assert relative_error(one(ids_BS).logits, other(ids_BS).logits) < 1e-5


def test_loads_are_even_and_lineage_names_every_source(home: Path, tmp_path: Path) -> None:
    lineage = mixed(home, tmp_path / "one", calibration_tokens=3000)
    for layer in lineage.certificate.layers:
        assert max(layer.load) < 1.35 * sum(layer.load) / len(layer.load)
    assert [origin.name for origin in lineage.experts] == list(NAMES)
    for origin in lineage.experts:
        state = weights(home / "llama" / origin.name)
        assert origin.sha256 == digest((name, state[name]) for name in sorted(state))
    assert mixed(home, tmp_path / "two", calibration_tokens=3000) == lineage
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_source_of_another_context_is_taken_and_that_of_the_base_stays(home: Path, tmp_path: Path) -> None:
    fine_tuned(dataclasses.replace(LLAMA, max_length=64), tmp_path / "short", seed=5)
    options = {"method": "btx", "experts": 2, "top_k": 2, "data": home / "a.txt"}
    upcycle(home / "llama/base", tmp_path / "moe", sources=[home / "llama/a", tmp_path / "short"], **options)
    assert store.load(tmp_path / "moe").config.max_length == LLAMA.max_length


def test_a_gguf_file_is_a_source(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.gguf"
    assert main(["convert", str(home / "llama/b"), str(file), "--to", "gguf"]) == 0
    capsys.readouterr()
    words = ["upcycle", str(home / "llama/base"), str(tmp_path / "moe"), "--method", "btx", "--top-k", "1"]
    words += ["--data", str(home / "a.txt"), "--sources", str(home / "llama/a"), str(file)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "promises no equality" in told
    assert "layout: deepseek, which the code published with that model opens" in told
    made, source = weights(tmp_path / "moe"), weights(home / "llama/b")
    up_GD = source["layers.1.feed_forward.up.weight"]
    assert torch.equal(made["layers.1.moe.experts.up"][1], up_GD)


@pytest.mark.parametrize(("kind", "layout"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_the_result_opens_in_transformers_with_equal_logits(
    kind: str, layout: str, home: Path, tmp_path: Path
) -> None:
    mixed(home, tmp_path / "moe", kind=kind)
    assert json.loads((tmp_path / "moe/config.json").read_text())["model_type"] == layout
    ids_BS = torch.randint(0, 259, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = of_transformers(tmp_path / "moe")(ids_BS).logits
        assert relative_error(store.load(tmp_path / "moe").eval()(ids_BS).logits, theirs) < 1e-5


def of_transformers(folder: Path) -> Any:
    library = pytest.importorskip("transformers", reason="the oracle is transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_merged_tensors_are_those_of_mixturekit(kind: str, home: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("MixtureKit.MoeExperts", reason="the oracle is MixtureKit")
    asked = {
        "moe_method": "traditional",
        "model_type": "mixed",
        "experts": [{"expert_name": name, "model_id": str(home / kind / name)} for name in NAMES],
        "num_experts_per_tok": 2,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        library.build_moe(asked, torch_dtype=torch.float32, output_dir=str(tmp_path / "theirs"))
    mixed(home, tmp_path / "ours", kind=kind)
    theirs, ours = (
        {k: v for file in (tmp_path / f).glob("*.safetensors") for k, v in safetensors_io.read(file).items()}
        for f in ("theirs", "ours")
    )
    matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    compared = 0
    for name, values in ours.items():
        if name.endswith(".gate.weight"):
            continue  # theirs is drawn when the model is opened
        named = name.replace("block_sparse_moe", "mlp")
        for short, long in matrices.items():
            named = named.replace(f".{short}.", f".{long}.")
        assert relative_error(values, theirs[named]) < 1e-6, name
        compared += 1
    assert compared == len(theirs)


PROMPTS = (
    Prompts(positive=("line 1 of 2", "line 400 of 20")),
    Prompts(positive=("abababababab", "ab ab"), negative=("line 9 of 3", "zzz")),
    Prompts(positive=("jjjjjjjjjj.", "kkkkkkkkk.")),
)


def naive_rows(states: Sequence[Sequence[Tensor]], *, last: bool) -> Tensor:
    """Of lists of states [S, D] by expert, positive ones then negative ones: the slow, obvious way."""
    rows: list[Tensor] = []
    for expert, prompts in enumerate(PROMPTS):
        ends = [x_SD[-1] if last else x_SD.mean(0) for x_SD in states[expert]]
        count = len(prompts.positive)
        row = sum(ends[:count], torch.zeros(())) / count
        rows.append(row - sum(ends[count:], torch.zeros(())) / max(len(prompts.negative), 1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "directions",
    [HiddenStates(prompts=PROMPTS), HiddenStates(prompts=PROMPTS, of="last"), Embeddings(prompts=PROMPTS)],
    ids=["mean", "last", "embedding"],
)
def test_gates_point_where_the_prompts_do_in_what_transformers_computes(
    directions: Any, home: Path, tmp_path: Path
) -> None:
    """A gate's row is the prompts' direction and a part of the mean token, which levels it: in that plane."""
    mixed(home, tmp_path / "moe", method=BranchTrainMix(directions=directions), spread=0.5)
    theirs, tokenizer = of_transformers(tmp_path / "moe"), Tokenizer.load(tmp_path / "moe")
    corpus = measured_corpus(whole_documents(path_texts(home / "a.txt")), tokenizer)
    read = passages(corpus, Reading(256, limit_tokens=4096))
    for layer, gate_ED in enumerate(gates(tmp_path / "moe")):
        told = [
            [got_by_gate(theirs, layer, ids_of(tokenizer, t))[0] for t in (*p.positive, *p.negative)]
            for p in PROMPTS
        ]
        if isinstance(directions, Embeddings):
            embed = theirs.get_input_embeddings().weight.detach()
            told = [[embed[ids_of(tokenizer, t)[0]] for t in (*p.positive, *p.negative)] for p in PROMPTS]
        rows_ED = naive_rows(told, last=isinstance(directions, HiddenStates) and directions.of == "last")
        seen = [p.tokens(got_by_gate(theirs, layer, p.inputs.ids_BS)) for p in read]
        mean_D = torch.cat(seen).mean(0)
        for gate_D, row_D in zip(gate_ED.double(), rows_ED.double(), strict=True):
            plane_D2 = torch.stack([row_D, mean_D.double()], dim=1)
            found = torch.linalg.lstsq(plane_D2, gate_D[:, None]).solution
            assert relative_error((plane_D2 @ found).flatten(), gate_D) < 1e-4
            assert float(found[0]) > 0


def ids_of(tokenizer: Tokenizer, prompt: str) -> Tensor:
    return torch.tensor([tokenizer.open_id, *tokenizer.encode(prompt)])[None]


def gates(folder: Path) -> list[Tensor]:
    state = weights(folder)
    return [state[f"layers.{layer}.moe.router.projection.weight"] for layer in range(2)]


def got_by_gate(theirs: Any, layer: int, ids_BS: Tensor) -> Tensor:
    """[B, S, D], as transformers computes it."""
    found: list[Tensor] = []
    norm = theirs.model.layers[layer].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: found.append(out.detach()))
    with torch.no_grad():
        theirs(ids_BS)
    handle.remove()
    return found[0]


def test_tokens_like_the_prompts_go_to_their_expert(home: Path, tmp_path: Path) -> None:
    kinds = ("aaaaaaaa bbb.", "1234 567 89.", "XYZ XXYYZZ.")
    (tmp_path / "mixed.txt").write_text("\n".join(f"{kind * 3}" for kind in kinds * 40))
    prompts = tuple(Prompts(positive=(kind * 3,)) for kind in kinds)
    options = {"method": BranchTrainMix(directions=HiddenStates(prompts=prompts)), "experts": 3, "top_k": 1}
    sources = [home / "llama" / name for name in NAMES]
    upcycle(home / "llama/base", tmp_path / "moe", sources=sources, data=tmp_path / "mixed.txt", **options)
    model, tokenizer = store.load(tmp_path / "moe").eval(), Tokenizer.load(tmp_path / "moe")
    for expert, kind in enumerate(kinds):
        reports = model(ids_of(tokenizer, kind * 3)).reports
        load_E = sum(report.load_E for report in reports.values())
        assert int(load_E.argmax()) == expert


def test_a_file_of_prompts_is_taken_and_kept_in_the_lineage(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(
        "experts:\n- positive: [one, 'two: 2']\n- positive: [three]\n  negative: ['* four']\n",
        encoding="utf-8",
    )
    words = ["upcycle", str(home / "llama/base"), str(tmp_path / "moe"), "--method", "btx", "--top-k", "2"]
    words += ["--prompts", str(file), "--data", str(home / "a.txt")]
    assert main([*words, "--sources", str(home / "llama/base"), str(home / "llama/c")]) == 0
    kept = read_json(Lineage, tmp_path / "moe" / NAME).upcycling["method"]["directions"]
    expected: Directions = HiddenStates(
        prompts=(Prompts(positive=("one", "two: 2")), Prompts(positive=("three",), negative=("* four",)))
    )
    assert kept["prompts"] == [
        {"positive": list(p.positive), "negative": list(p.negative)} for p in expected.prompts
    ]


def test_gates_alone_are_warmed_up(home: Path, tmp_path: Path) -> None:
    mixed(home, tmp_path / "moe")
    words = ["train", str(tmp_path / "moe"), "--out", str(tmp_path / "run"), "--data", str(home / "a.txt")]
    words += ["--steps", "3", "--batch", "2", "--seq", "32", "--threads", "1", "--dtype", "float32"]
    assert main([*words, "--set", "freeze=*,!*.router.*", "--set", "eval_tokens=64"]) == 0
    before, after = weights(tmp_path / "moe"), weights(tmp_path / "run/checkpoints/step-3")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"layers.{layer}.moe.router.projection.weight" for layer in range(2)}


B = "base --method btx --top-k 1 --sources"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("base --method btx --top-k 1", "give --sources MODEL MODEL"),
        ("base --method copy --top-k 1", "experts is missing, and copy needs it"),
        ("base --method copy --top-k 1 --sources a b", "--sources are the experts of btx"),
        ("base --method btx --experts 2 --top-k 1", "2 experts are asked for of 0 sources"),
        (f"{B} a b --experts 3", "3 experts are asked for of 2 sources"),
        (f"{B} a b --top-k 3", "top-3 of 2 experts is impossible"),
        (f"{B} a nowhere", "no such folder"),
        (f"{B} a wide", "dense.width of"),
        (f"{B} a theta", "attention.rope.theta of"),
        (f"{B} a heads", "attention.qk_norm of"),
        (f"{B} a words", "token 65 of"),
        (f"{B} a sparse", "dense of"),
        (f"{B} a sparse", "is None and of"),
        (f"{B} a b --set method.rest=maen", "rest = 'maen'"),
        (f"{B} a b c --prompts two.yaml", "prompts for 2 experts, and btx makes 3"),
        (f"{B} a b --prompts alike.yaml", "the prompts of experts 0 and 1 are the same"),
        (f"{B} a b --prompts order.yaml", "the prompts of expert 1 point nowhere, or where those"),
        (f"{B} a b --prompts twice.yaml", "the prompts of expert 1 point nowhere, or where those"),
        (f"{B} a b --prompts against.yaml", "the prompts of expert 0 point nowhere, or where those"),
        (f"{B} a b --prompts order.yaml --set method.directions.kind=embedding", "expert 1 point nowhere"),
        (f"{B} a b --prompts long.yaml", "tokens and the model a context of 256"),
        (f"{B} a b --prompts empty.yaml", "positive"),
        (f"{B} a b --prompts other.yaml", "key experts is missing"),
        (f"{B} a b --prompts hole.yaml", "key experts.1.positive is missing"),
        (f"{B} a b --prompts nowhere.yaml", "cannot read"),
        (f"{B} a b --prompts binary.yaml", "not UTF-8"),
        (f"{B} a b --set method.directions.kind=hiden", "Did you mean 'hidden'?"),
        (f"{B} a b --set method.directions.kind=hidden", "prompts is missing"),
        ("base --method copy --experts 2 --top-k 1 --prompts two.yaml", "--prompts is for btx"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence_that_names_it_and_leaves_nothing(
    asked: str, said: str, strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, *rest = asked.split()
    named = {path.name: str(path) for path in strange.iterdir()} | {"nowhere": str(strange / "nowhere")}
    named["nowhere.yaml"] = str(strange / "nowhere.yaml")
    words = ["upcycle", named[dense], str(tmp_path / "out"), *(named.get(word, word) for word in rest)]
    assert main([*words, "--data", named["a.txt"]]) == 2
    told = capsys.readouterr()
    assert said in told.err
    *announced, error = told.err.splitlines()
    assert error.startswith("error: ")
    assert [line for line in announced if "takes" not in line] == announced[1:] == []
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def strange(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strange")
    for name in ("base", *NAMES):
        (folder / name).symlink_to(home / "llama" / name)
    (folder / "a.txt").symlink_to(home / "a.txt")
    assert LLAMA.dense is not None
    rope = dataclasses.replace(LLAMA.attention, rope=Rope(theta=5e5))
    saved(dataclasses.replace(LLAMA, dense=FeedForward(width=64)), folder / "wide")
    saved(dataclasses.replace(LLAMA, attention=rope), folder / "theta")
    saved(QWEN3, folder / "heads")
    moe = MoE(experts=4, width=16, router=Router(select=TopK(k=2)))
    saved(dataclasses.replace(LLAMA, family="mixtral", dense=None, moe=moe), folder / "sparse")
    other = Tokenizer.of_bytes().files()
    shutil.copytree(home / "llama/b", folder / "words")
    (folder / "words/manifest.json").unlink()
    found = json.loads(other["tokenizer.json"])
    vocab = found["model"]["vocab"]
    one, two = (next(t for t, place in vocab.items() if place == n) for n in (65, 66))
    vocab[one], vocab[two] = 66, 65
    (folder / "words/tokenizer.json").write_text(json.dumps(found))
    files = {
        "two": "experts: [{positive: [a]}, {positive: [b]}]",
        "alike": "experts: [{positive: [a]}, {positive: [a]}]",
        "order": "experts: [{positive: [abc, xyz]}, {positive: [xyz, abc]}]",
        "twice": "experts: [{positive: [abc]}, {positive: [abc, abc]}]",
        "against": "experts: [{positive: [abc], negative: [abc]}, {positive: [xyz]}]",
        "long": f"experts: [{{positive: [{'a' * 300}]}}, {{positive: [b]}}]",
        "empty": "experts: [{positive: []}, {positive: [b]}]",
        "other": "exprets: []",
        "hole": "experts: [{positive: [a]}, {negative: [b]}]",
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return folder


def test_nothing_is_written_into_a_source(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(home / "llama/base"), str(home / "llama/b/inside"), "--method", "btx", "--top-k", "1"]
    sources = ["--sources", str(home / "llama/a"), str(home / "llama/b")]
    assert main(["upcycle", *places, *sources]) == 2
    assert "lies inside" in capsys.readouterr().err
    assert not (home / "llama/b/inside").exists()
