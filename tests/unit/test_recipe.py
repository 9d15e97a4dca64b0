"""The recipe: what it accepts, what it refuses and with which message."""

import datetime
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from packhorse.trainer.config.adapter import ADAPTER_LR
from packhorse.trainer.config.optim import OptimSection
from packhorse.trainer.config.parsing import RENAMED_KEYS
from packhorse.trainer.config.recipe import load_recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {
    "model": {"name": "some/model"},
    "data": {"train": [{"path": "rows.jsonl"}]},
    "run": {"dir": "runs/x"},
}


def with_source(**fields: object) -> dict:
    """Return SMALLEST with more keys in its source."""
    return with_key("data.train", [{"path": "a", **fields}])


def with_key(key: str, value: object) -> dict:
    """Return SMALLEST with a dotted key set."""
    tree = yaml.safe_load(yaml.safe_dump(SMALLEST))
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return tree


def with_scorer(scorer: object, name: str = "mine") -> dict:
    """Return SMALLEST with held-out rows and a scorer."""
    tree = with_key("data.eval", [{"path": "held.jsonl"}])
    return {**tree, "eval": {"generate": {"scorers": {name: scorer}}}}


def growing(*others: dict, train: dict | None = None, **source: object) -> dict:
    """Return SMALLEST with a streamed source, and other sources if given."""
    sources = [{"path": "a", "streaming": True, **source}, *others]
    return {**SMALLEST, "data": {"train": sources}, "train": train or {}}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_designs():
    recipe = parse_recipe(SMALLEST)
    assert (
        recipe.batch.seq_len,
        recipe.batch.global_batch_size,
        recipe.batch.micro_batch_size,
    ) == (8192, 64, 1)
    assert recipe.data.train_on == "assistant"
    assert recipe.data.packing == "bfd"
    assert recipe.data.too_long == "reject"
    assert recipe.max_length == 8192
    assert recipe.loss.weighting == "token"
    optim = recipe.optim
    assert (optim.betas, optim.weight_decay, optim.warmup_ratio, optim.max_grad_norm) == (
        (0.9, 0.95),
        0.1,
        0.03,
        1.0,
    )
    assert (optim.lr_schedule, optim.min_lr_ratio) == ("cosine", 0.1)
    assert recipe.parallel.grad_dtype == "float32"


SCORERS = {
    "format": {"pattern": "x+"},
    "exact": {"extract": "(x)", "ignore": ["case"]},
    "contains": {"ignore": ["case"]},
    "math": {"column": "solution"},
    "choice": {"letters": ["A", "B"], "column": "letter"},
    "json_schema": {"column": "schema"},
    "tool_call": {},
    "refusal": {"expected": "unsafe"},
    "judge": {
        "rubric": "kind",
        "url": "http://judge/v1",
        "model": "m",
        "against": "reference",
    },
    "function": {"function": "mine:score"},
}


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    tree = with_key("data.eval_fraction", 0.1)
    tree["eval"] = {
        "generate": {"scorers": {kind: {"kind": kind, **keys} for kind, keys in SCORERS.items()}}
    }
    recipe = parse_recipe(tree)
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.eval.generate is not None
    assert [scorer.kind for scorer in recipe.eval.generate.scorers.values()] == list(SCORERS)


def test_the_text_of_the_learning_rate_names_an_adapters():
    text = inspect.getsource(OptimSection)
    assert f"With an `adapter` the default is {ADAPTER_LR}." in text


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 2e-5),
        ({"adapter": None}, 2e-5),
        ({"adapter": {}}, 1e-4),
        ({"adapter": {"rank": 8}, "optim": {"max_grad_norm": 0.5}}, 1e-4),
        ({"adapter": {"rank": 8}, "optim": {"lr": 3e-4}}, 3e-4),
    ],
)
def test_an_adapter_has_a_learning_rate_of_its_own(tmp_path, changes, rate):
    recipe = parse_recipe({**SMALLEST, **changes})
    assert recipe.optim.lr == rate
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


def test_an_adapter_may_not_come_go_or_change_on_a_resume():
    """`adapter` is compared as one value: a section that is null has no keys to compare."""
    without, small, large = (
        parse_recipe({**SMALLEST, "optim": {"lr": 1e-4}, "adapter": a}).fixed() for a in ADAPTERS
    )
    for before, now in ((without, small), (small, without), (small, large)):
        assert [name for name in now if now[name] != before.get(name)] == ["adapter"]


ADAPTERS = (None, {"rank": 4}, {"rank": 8})


def test_rows_are_held_out_where_sources_or_a_share_say_so():
    assert not parse_recipe(SMALLEST).has_eval
    assert parse_recipe(with_key("data.eval", [{"path": "held.jsonl"}])).has_eval
    assert parse_recipe(with_key("data.eval_fraction", 0.1)).has_eval


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).run.dir


def test_it_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        parse_recipe(SMALLEST).train.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-5", "optim", "lr", 1e-5),  # which YAML itself reads as a text
        ("optim.betas=[0.9, 0.99]", "optim", "betas", (0.9, 0.99)),
        ("train.steps=null", "train", "steps", None),
        ("data.eval=[]", "data", "eval", ()),
        ("run.dir=runs/a=b", "run", "dir", "runs/a=b"),
        ("checkpoint.keep=8", "checkpoint", "keep", 8),  # of a section that the file does not have
    ],
)
def test_overrides(tmp_path, override, section, key, value):
    recipe = load_recipe(written(tmp_path, yaml.safe_dump(SMALLEST)), [override])
    assert getattr(getattr(recipe, section), key) == value


def test_an_override_reaches_into_a_list(tmp_path):
    recipe = load_recipe(
        written(tmp_path, yaml.safe_dump(SMALLEST)), ["data.train.0.path=other.jsonl"]
    )
    assert recipe.data.train[0].path == "other.jsonl"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (with_key("optim.learning_rate", 1), "`optim.learning_rate` is `optim.lr` here"),
        (with_key("optim.weight_decai", 1), "did you mean `optim.weight_decay`?"),
        (with_key("optimisers", {}), "unknown key `optimisers`; keys here: model, adapter, data"),
        (with_key("optimizer", "adamw"), "`optimizer` is `optim.kind`: adamw, adamw_8bit, muon"),
        (with_key("training", {"learning_rate": 1}), "`training.learning_rate` is `optim.lr` here"),
        (with_key("target_modules", ["q"]), "`target_modules` is `adapter.target_modules` here"),
        (with_key("lr", 1), "`lr` is `optim.lr` here"),
        (with_key("filters", {}), "`filters` is `data.train[].filters` here"),
        (with_key("max_seq_length", 1), "`max_seq_length` is `batch.seq_len` here"),
        (with_key("output_dir", "x"), "`output_dir` is `run.dir` here"),
        (with_key("per_device_train_batch_size", 1), "is `batch.micro_batch_size` here"),
        (with_key("r", 8), "`r` is `adapter.rank` here"),
        (with_key("adapter.r", 8), "`adapter.r` is `adapter.rank` here"),
        (with_key("load_in_4bit", True), "`load_in_4bit` is `adapter.base` here (nf4)"),
        (with_key("bf16", True), "`bf16` is `model.dtype` here (bfloat16, float32)"),
        (with_key("fp16", True), "`fp16` is not supported: `model.dtype: bfloat16`"),
        (with_key("deepspeed", "zero3"), "`deepspeed` is `parallel.deepspeed` here"),
        (with_key("max_length", 9), "`max_length` is `batch.seq_len`, the length of a packed"),
        (with_key("adapter", "lora"), "`adapter`: it is a section, of adapter.rank, adapter.alpha"),
        (with_key("optim.zero", 1), "unknown key `optim.zero`; keys here: kind, lr, betas"),
        (with_key("train.max_epochs", 1), "unknown key `train.max_epochs`; keys here: epochs"),
        (with_key("data.train", [{"pth": "x"}]), "did you mean `data.train.0.path`?"),
        (with_key("optim.zzz", 1), "keys here: kind, lr, betas"),
        (with_key("optim.lr", 0), "`optim.lr`: input should be greater than 0 (got 0)"),
        (with_key("optim.lr", float("nan")), "`optim.lr`"),
        (with_key("batch.global_batch_size", 0), "`batch.global_batch_size`"),
        (with_key("batch.seq_len", 1), "`batch.seq_len`"),
        (
            with_key("data.packing", "best"),
            "'none', 'bfd', 'bfd_split', 'wrapped' or 'greedy' (got 'best')",
        ),
        (with_key("data.train", []), "`data.train`"),
        (with_source(group_by="id"), "`train[].group_by` belongs to `eval_fraction`"),
        (with_key("data.eval", [{"path": "a", "group_by": "x"}]), "are held out whole"),
        (with_key("data.eval_fraction", 1), "`data.eval_fraction`"),
        (with_key("data.train", [{}]), "give exactly one of `path` and `name`"),
        (
            with_key("data.train", [{"path": "a", "name": "b"}]),
            "give exactly one of `path` and `name`",
        ),
        (with_source(format="sharegtp"), "'sharegpt'"),
        (
            with_source(function="mine.py"),
            "a function is named as `module:function`, not `mine.py`",
        ),
        (with_source(function="/data/mine:read"), "a function is named as `module:function`"),
        (with_source(function="mine:read", format="text"), "leave out `format` and `columns`"),
        (with_source(filters={"function": "mine"}), "a function is named as `module:function`"),
        (with_source(filters={"pattern": "("}), "`(` is not a regular expression"),
        (with_source(filters={"answer_words": [3, 2]}), "`answer_words` is [fewest, most]"),
        (with_source(filters={"patern": "x"}), "did you mean `data.train.0.filters.pattern`?"),
        (with_key("data.max_length", 9000), "an example must fit in a packed sequence"),
        (
            with_key("data.chat_template_kwargs", {"tokenize": True, "x": 1, "bos_token": ""}),
            "hold bos_token, tokenize",
        ),
        (
            with_key("data.chat_template_kwargs", {"day": datetime.date(2024, 7, 26)}),
            "chat_template_kwargs.day`: input",
        ),
        (with_key("data.split_context", 8), "`split_context` belongs to `too_long: split`"),
        (
            {
                **SMALLEST,
                "data": {
                    **SMALLEST["data"],
                    "too_long": "split",
                    "split_context": 8,
                    "max_length": 9,
                },
            },
            "data.split_context (8) leaves no room",
        ),
        (
            with_key("eval.generate", {}),
            "eval.generate: there are no held-out rows; give data.eval",
        ),
        (
            with_key(
                "eval",
                {"every_steps": 5, "early_stopping": {"metric": "eval_loss", "patience": 1}},
            ),
            "eval.early_stopping: there are no held-out rows; give data.eval",
        ),
        (
            {
                **with_key("batch.micro_batch_size", "auto"),
                "checkpoint": {"mirror": "s3://bucket/run"},
            },
            "batch.micro_batch_size: auto is chosen before checkpoint.mirror",
        ),
        (
            with_scorer({"kind": "exat"}),
            "`eval.generate.scorers.mine`: unknown kind `exat`; did you mean `exact`?",
        ),
        (
            with_scorer({"kind": "bleu"}),
            "unknown kind `bleu`; kinds here: format, exact, contains, math, choice,",
        ),
        (
            with_scorer({"pattern": "x"}),
            "`eval.generate.scorers.mine.kind` is missing; kinds: format, exact,",
        ),
        (with_scorer({"kind": "format"}), "`eval.generate.scorers.mine.pattern` is missing"),
        (
            with_scorer({"kind": "exact", "extrct": "(x)"}, "exact"),
            "unknown key `eval.generate.scorers.exact.extrct`; did you mean "
            "`eval.generate.scorers.exact.extract`?",
        ),
        (
            with_scorer({"kind": "math", "zzz": 1}),
            "unknown key `eval.generate.scorers.mine.zzz`; keys here: column, kind",
        ),
        (
            with_scorer({"kind": "format", "pattern": "("}),
            "`eval.generate.scorers.mine.pattern`: `(` is not a regular",
        ),
        (with_scorer({"kind": "exact", "extract": "x"}), "`extract` has no group"),
        (
            with_scorer({"kind": "choice", "letters": ["A", "A"]}),
            "`letters` must be different texts",
        ),
        (
            with_scorer({"kind": "choice", "letters": ["A"]}),
            "`eval.generate.scorers.mine.letters`: tuple should have",
        ),
        (with_scorer({"kind": "json_schema"}), "give exactly one of `file` and `column`"),
        (
            with_scorer({"kind": "json_schema", "file": "a", "column": "b"}),
            "give exactly one of `file` and `column`",
        ),
        (with_scorer({"kind": "refusal"}), "`eval.generate.scorers.mine.expected` is missing"),
        (
            with_scorer({"kind": "function", "function": "mine.py"}),
            "a function is named as `module:function`",
        ),
        (
            with_scorer({"kind": "judge", "rubric": "x", "ulr": "http://a/v1", "model": "m"}),
            "did you mean `eval.generate.scorers.mine.url`?",
        ),
        (
            with_scorer({"kind": "contains", "text": "x"}),
            "`eval.generate.scorers.mine.text` is now `kind: format` with the pattern",
        ),
        (
            with_scorer({"kind": "json_schema", "tools": True}),
            "`eval.generate.scorers.mine.tools` is now `kind: tool_call`",
        ),
        (
            with_scorer({"kind": "refusal", "column": "unsafe"}),
            "`eval.generate.scorers.mine.column` is now `expected: COLUMN`",
        ),
        (
            with_scorer({"kind": "judge", "endpoint": {"url": "http://a/v1"}}),
            "`eval.generate.scorers.mine.endpoint` is now a part of the scorer",
        ),
        (
            with_key("eval.generator", "vllm"),
            "`eval.generator` is now decided by `eval.server` and `eval.vllm_python`",
        ),
        (with_scorer({"kind": "exact"}, "loss"), "`loss` cannot name a scorer"),
        (with_scorer({"kind": "exact"}, "a b"), "`a b` cannot name a scorer"),
        (with_key("adapter.rank", 0), "`adapter.rank`"),
        (with_key("adapter.modules", ["x"]), "did you mean `adapter.modules_to_save`?"),
        (with_key("adapter.target_modules", []), "`target_modules` names nothing"),
        (with_key("adapter.target_modules", "("), "`(` is not a regular expression"),
        (with_key("adapter.dropout", 1), "`adapter.dropout`"),
        (with_key("adapter.base", "int4"), "`adapter.base`"),
        (
            with_key("adapter", {"base": "nf4", "variants": ["dora"]}),
            "is not tested with `base`",
        ),
        (with_key("adapter.rslora", True), "is now `adapter.variants: [rslora]`"),
        (
            {**SMALLEST, "adapter": {}, "model": {"name": "a", "add_tokens": ["<tool>"]}},
            "an adapter does not hold the embeddings of new tokens",
        ),
        (
            with_key("loss.weighting", "constant"),
            "`loss.weighting`: it is `token`, `example` or a whole number",
        ),
        (with_key("data.max_leakage", 2), "it is `drop` or a share from 0 to 1 (got 2)"),
        (with_key("loss.weighting", 0), "or a whole number above 0"),
        (
            {**with_key("loss.router_aux", 0.1), "model": {"name": "x", "compile": "layers"}},
            "loss.router_aux needs the routers' own forward",
        ),
        (with_key("optim.betas", [0.9, 1.0]), "`optim`: `betas` lie in [0, 1)"),
        (with_key("optim.betas", [-0.1, 0.9]), "`optim`: `betas` lie in [0, 1)"),
        (with_key("loss.weighting", True), "or a whole number above 0"),
        (
            with_key("loss.constant_tokens", 5),
            "`loss.constant_tokens` is now the number itself: `loss.weighting: 4096`",
        ),
        (
            with_scorer({"kind": "contains", "ignore_case": True}),
            "`eval.generate.scorers.mine.ignore_case` is now `ignore: [case]`",
        ),
        (growing(), "say how long to train in train.steps"),
        (growing(train={"steps": 9, "epochs": 2}), "a streamed source has no epochs"),
        (growing({"path": "b"}, train={"steps": 9}), "a streamed source must be the only one"),
        (growing(weight=2, train={"steps": 9}), "leave out `weight` and `rows`"),
        (growing(rows=2, train={"steps": 9}), "leave out `weight` and `rows`"),
        (
            with_key("data.eval", [{"path": "a", "streaming": True}]),
            "a held-out source cannot be streamed",
        ),
        ({**SMALLEST, "run": {}}, "`run.dir` is missing"),
    ],
)
def test_refused_with_a_line_for_the_fault(tree, message):
    with pytest.raises(BadInput) as refused:
        parse_recipe(tree, where="r.yaml")
    assert any(message in line for line in str(refused.value).splitlines())
    assert str(refused.value).startswith("r.yaml: ")


def test_items_with_a_fault_are_not_missing_from_their_list():
    with pytest.raises(BadInput) as refused:
        parse_recipe(with_source(pattern="x"), where="r.yaml")
    assert str(refused.value).splitlines() == [
        "r.yaml: `data.train.pattern` is `data.train[].filters.pattern` here"
    ]


def test_each_fault_has_a_line_and_all_are_told(tmp_path):
    recipe = written(tmp_path, yaml.safe_dump({"model": SMALLEST["model"], "r": 8}))
    with pytest.raises(BadInput) as refused:
        load_recipe(recipe, ["optim.lr", "learning_rate=1", "batch.seq_len=1"])
    first, *lines = str(refused.value).splitlines()
    assert first == f"{recipe}: 6 faults"
    assert sorted(line.split()[0] for line in lines) == sorted(
        ["override", "`r`", "`learning_rate`", "`batch.seq_len`:", "`data`", "`run`"]
    )


def with_old_key(name: str) -> dict:
    """Return SMALLEST with a key of RENAMED_KEYS, which leaves the names of items out."""
    tree = with_scorer({"kind": "exact"})
    node: Any = tree
    *parents, last = name.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if isinstance(node, list):
            node = node[0]
        elif parent == "scorers":
            node = node["mine"]
    node[last] = 1
    return tree


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_refused_with_its_new_name(old, new):
    with pytest.raises(BadInput) as refused:
        parse_recipe(with_old_key(old))
    assert f"{old.rpartition('.')[2]}` is now {new}" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: a}\nmodel: {name: b}", "the key `model` is given twice"),
        ("optim: {lr: 1.0, lr: 2.0}", "the key `lr` is given twice"),
        ("model: [", "not valid YAML"),
        ("- a list", "a recipe is a mapping of sections"),
        ("", "a recipe is a mapping of sections"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_file():
    with pytest.raises(
        BadInput, match=r"nowhere\.yaml: there is no such file; packaged recipes: debug"
    ):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "write key=value"),
        ("=3", "write key=value"),
        ("optim.lr=[", "the value is not valid YAML"),
        ("model.name.x=1", "`name` is a value, not a section"),
        ("data.train.1.path=x", "`1` is not an item of a list of 1"),
        ("optim.lrr=1", "did you mean `optim.lr`?"),
        ("data.columns={a: 1, a: 2}", "the value is not valid YAML"),
    ],
)
def test_overrides_that_are_refused(tmp_path, override, message):
    with pytest.raises(BadInput) as refused:
        load_recipe(written(tmp_path, yaml.safe_dump(SMALLEST)), [override])
    assert message in str(refused.value)


def test_what_may_change_on_a_resume_is_not_fixed():
    free = {
        "run.dir": "runs/y",
        "batch.micro_batch_size": 2,
        "model.activation_checkpointing": "none",
        "model.attention": "reference",
        "data.max_leakage": 0.5,
        "parallel.deepspeed": "zero2",
        "checkpoint.keep": 9,
        "checkpoint.before_timeout_s": 60,
        "guard.hang_timeout_s": 60,
    }
    fixed = {
        "model.name": "other",
        "model.dtype": "float32",
        "data.packing": "none",
        "data.max_leakage": "drop",
        "batch.seq_len": 64,
        "batch.global_batch_size": 3,
        "loss.weighting": "example",
        "optim.lr": 1e-3,
        "train.seed": 7,
        "parallel.grad_dtype": "bfloat16",
    }
    before = parse_recipe(SMALLEST).fixed()
    assert all(parse_recipe(with_key(key, value)).fixed() == before for key, value in free.items())
    for key, value in fixed.items():
        now = parse_recipe(with_key(key, value)).fixed()
        assert [name for name in now if now[name] != before[name]] == [key]


def test_parsing_has_no_side_effects(tmp_path):
    recipe = written(tmp_path, yaml.safe_dump(SMALLEST))
    program = (
        "import sys; from packhorse.trainer.config.recipe import load_recipe\n"
        "load_recipe(sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [recipe]
