"""The command answers quickly, and names what is wrong with its input in one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from packhorse.trainer import dist
from packhorse.trainer.cli import main
from packhorse.trainer.config.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DEBUG = "recipes/debug.yaml"


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    program = [sys.executable, "-m", "packhorse", *arguments]
    return subprocess.run(
        program, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def packhorse(monkeypatch, capsys):
    """Return a function that runs the command in this process: exit code, stdout and stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    handlers, propagate, level = dist.log.handlers[:], dist.log.propagate, dist.log.level

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["packhorse", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int | None)
        return code or 0, out, err

    yield run
    dist.log.handlers[:], dist.log.propagate = handlers, propagate
    dist.log.setLevel(level)


def test_plan_says_what_fits(packhorse):
    code, out, _ = packhorse("plan", DEBUG, "--gpus", "2", "--host-gib", "1000")
    assert code == 0
    assert "fits: zero0" in out
    assert "good numbers of GPUs: 1, 2, 4" in out
    assert re.search(r"from GPUs +│ +1", out)
    assert re.search(r"s a step, at most +│ +<?0", out)
    assert "this machine has no GPU" in out or torch.cuda.is_available()
    assert out.splitlines()[-1].startswith("recommended: zero0")


def test_a_plan_is_for_no_more_gpus_than_a_step_has_micro_batches(packhorse):
    code, out, err = packhorse("plan", DEBUG, "batch.global_batch_size=2")
    assert code == 0, err
    assert "; 2 GPUs of 80.0 GiB" in out
    assert "moves <0.001 GB" in out


def test_a_plan_takes_the_micro_batch_that_auto_takes_on_such_a_gpu(packhorse):
    auto = ("plan", DEBUG, "batch.micro_batch_size=auto", "batch.global_batch_size=8")
    code, out, err = packhorse(*auto, "--gpus", "1")
    assert code == 0, err
    assert "batch.micro_batch_size: 8, for a GPU of 80 GiB" in out
    assert "tokens in 1 micro-batches" in out


def test_the_table_of_a_plan_loses_nothing_in_a_terminal_of_80_columns(packhorse, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = packhorse("plan", DEBUG, "--gpus", "2")
    assert code == 0
    table = [line for line in out.splitlines() if line[:1] in "┃│┏└"]
    assert {len(line) for line in table if line} == {80}
    assert "…" not in out
    assert all(f"│ {part} " in out for part in ("communication", "activations", "a node's NVMe"))


COMMANDS = [
    *("train", "convert", "preview", "prepare", "plan", "export", "eval", "compare", "runs"),
    *("report", "chat", "init"),
    "verify-resume",
    *("launch slurm", "launch kubernetes"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_a_summary_in_one_line_and_examples(packhorse, name):
    code, out, _ = packhorse(*name.split(), "--help")
    assert code == 0
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    summary = lines[2 if lines[1].startswith("[") else 1]  # the usage may take two lines
    assert re.fullmatch(r"[A-Z][a-z]+ .*\.", summary), "a sentence that starts with a verb"
    examples = [line for line in lines if line.startswith(f"packhorse {name} ")]
    assert 2 <= len(examples) <= 4
    assert "  [required]" not in out, "an argument without help"


def test_paragraphs_of_the_help_fill_the_terminal(packhorse, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = packhorse("train", "--help")
    lines = [line.split() for line in out.split("╭")[0].splitlines()]
    first = next(number for number, words in enumerate(lines) if words[:1] == ["SIGTERM,"])
    end = lines.index([], first)
    assert end - first > 2
    assert all(len(" ".join(words)) > 60 for words in lines[first : end - 1])
    assert ["packhorse", "train", "recipe.yaml", "--nproc", "2"] in lines, "an example a line"


def test_help_lists_the_commands():
    done = command("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "preview", "prepare", "export"))


def test_the_version(packhorse):
    assert packhorse("--version") == (0, "packhorse 0.1.0\n", "")


def test_bash_gets_a_completion_script_and_completions():
    script = command("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 0, script.stderr
    assert "_PACKHORSE_COMPLETE=complete_bash" in script.stdout
    words = {"COMP_WORDS": "packhorse ver", "COMP_CWORD": "1"}
    done = command(_PACKHORSE_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["verify-resume"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["--show-completion", "bash"],
        ["train", "--help"],
        ["train", "nowhere.yaml"],
        [DEBUG],
    ],
)
def test_answers_and_bad_recipes_import_nothing_heavy(arguments):
    program = (
        "import sys; sys.argv[0] = 'packhorse'\n"
        "from packhorse.trainer.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file; packaged recipes: debug"),
        (["train", DEBUG, "optim.lrr=1"], "did you mean `optim.lr`?"),
        (["train", DEBUG, "batch.global_batch_size=0"], "`batch.global_batch_size`"),
        (["train", DEBUG, "batch.rows_per_step=4"], "is now `batch.global_batch_size`"),
        (["train", DEBUG, "--nnodes", "2"], "2 nodes: name the rendezvous host"),
        (
            ["plan", DEBUG, "--gpus", "3", "--nodes", "2"],
            "all nodes must have the same number of GPUs",
        ),
        (["plan", DEBUG, "--gpus", "2", "--gpu-gib", "1"], "no template fits 2 GPUs of 1.0 GiB"),
        (["train", DEBUG, "--nnodes", "2:1"], "--nnodes 2:1: give a number, or MIN:MAX"),
        (["prepare", DEBUG, "data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["preview", DEBUG, "model.name=recipes/quickstart"], "recipes/quickstart"),
        (["export", "nowhere", "--out", "never"], "nowhere: not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(packhorse, arguments, sentence):
    code, _, err = packhorse(*arguments)
    assert code == 2
    assert err.startswith("packhorse: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_two_faults_are_two_lines(packhorse):
    code, _, err = packhorse("train", DEBUG, "learning_rate=1e-5", "lora_r=8")
    assert code == 2
    assert err == (
        "packhorse: error: recipes/debug.yaml: 2 faults\n"
        "  `learning_rate` is `optim.lr` here\n"
        "  `lora_r` is `adapter.rank` here\n"
    )


def test_a_worker_of_torchrun_finds_bad_input_itself():
    worker = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    done = command(
        "train", DEBUG, "data.train.0.path=nowhere.jsonl", "run.dir=/proc/nowhere", **worker
    )
    assert done.returncode == 2
    assert "process with OMP_NUM_THREADS" not in done.stderr, "it launched workers of its own"
    assert done.stderr.count("packhorse: error: ") == 1


def test_another_failure_is_a_traceback_and_exit_code_1():
    program = (
        "import sys; sys.argv = ['packhorse', 'train', 'r.yaml']\n"
        "import packhorse.trainer.config.recipe\n"
        "def broken(*_): raise RuntimeError('a defect of ours')\n"
        "packhorse.trainer.config.recipe.load_recipe = broken\n"
        "from packhorse.trainer.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a defect of ours" in done.stderr


def test_prepare_shows_what_there_is_to_train(packhorse, tmp_path):
    code, out, err = packhorse("prepare", DEBUG, f"data.cache={tmp_path}")
    assert code == 0, err
    rows = len((ROOT / "recipes/debug/train.jsonl").read_text().splitlines())
    assert f" {rows} " in out
    assert "rejected" in out
    assert "steps" in out


def test_prepare_of_a_source_that_grows_shows_the_shards_there_are(packhorse, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "in" / name).write_text('{"question": "What?", "answer": "That."}\n')
    grows = (
        f"data.train=[{{path: {tmp_path / 'in'}, streaming: true}}]",
        "train.epochs=1",
        "train.steps=5",
    )
    code, out, err = packhorse(
        "prepare", DEBUG, *grows, f"data.cache={tmp_path}", f"run.dir={tmp_path / 'run'}"
    )
    assert code == 0, err
    assert "data.train is streamed: 2 shards exist now; a run of 5 steps" in out
    assert all(name in out for name in ("a.jsonl", "b.jsonl"))
    assert not (tmp_path / "run").exists()


def test_prepare_writes_numbers_and_picture_where_it_is_told(packhorse, tmp_path):
    code, out, err = packhorse(
        "prepare", DEBUG, f"data.cache={tmp_path}/cache", "--out", f"{tmp_path}/report"
    )
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "data.json",
        "data.png",
    ]
    assert out.rstrip().endswith(f"{tmp_path}/report/data.png")
    (tmp_path / "file").touch()
    code, _, err = packhorse(
        "prepare", DEBUG, f"data.cache={tmp_path}/cache", "--out", f"{tmp_path}/file"
    )
    assert code == 2
    assert "cannot be written" in err


def test_prepare_replaces_nothing_but_its_own_report(packhorse, tmp_path):
    report = tmp_path / "report"

    def prepare():
        return packhorse("prepare", DEBUG, f"data.cache={tmp_path}/cache", "--out", str(report))

    assert (prepare()[0], prepare()[0]) == (0, 0)
    (report / "data.json").write_text('{"mine": 1}')
    code, _, err = prepare()
    assert (code, (report / "data.json").read_text()) == (2, '{"mine": 1}')
    assert "data.json: exists, and packhorse did not write it" in err
    (report / "data.json").unlink()
    assert "data.png: exists, and packhorse did not write it" in prepare()[2]


def test_prepare_counts_rejects_by_reason(packhorse, tmp_path):
    rows = (ROOT / "recipes/debug/train.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"question": "What now?", "answer": ""})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    source = f"data.train.0.path={tmp_path / 'rows.jsonl'}"
    code, out, err = packhorse(
        "prepare", DEBUG, source, f"data.cache={tmp_path}", "data.max_rejects=0.5"
    )
    assert code == 0, err
    assert "rejected: " in out


def test_prepare_counts_filtered_rows_by_reason(packhorse, tmp_path):
    filters = "data.train.0.filters.answer_words=[1, 7]"
    code, out, err = packhorse("prepare", DEBUG, filters, f"data.cache={tmp_path}")
    assert code == 0, err
    assert "filtered: answer_words: more than 7" in out


def test_prepare_counts_duplicates_and_rows_that_leak(packhorse, tmp_path):
    rows = (ROOT / "recipes/debug/train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, *rows[:7]]) + "\n")
    (tmp_path / "held.jsonl").write_text("\n".join(rows[:5]) + "\n")
    sources = (
        f"data.train.0.path={tmp_path / 'train.jsonl'}",
        f"data.eval.0.path={tmp_path / 'held.jsonl'}",
    )
    code, _, err = packhorse("prepare", DEBUG, *sources, f"data.cache={tmp_path}")
    assert code == 2
    assert "5 of 5 rows (100.0%) have a near-duplicate in data.train" in err
    code, out, err = packhorse(
        "prepare", DEBUG, *sources, f"data.cache={tmp_path}", "data.max_leakage=1"
    )
    assert code == 0, err
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines()]
    assert ["duplicates", "7"] in cells
    assert ["near-duplicates in train", "5"] in cells


def test_a_dry_run_checks_everything_and_leaves_the_run_folder_alone(packhorse, tmp_path):
    run_dir, cache = tmp_path / "run", f"data.cache={tmp_path / 'cache'}"
    words = ("train", DEBUG, "--dry-run", f"run.dir={run_dir}", cache)
    code, out, err = packhorse(*words, "--nproc", "2")
    assert code == 0, err
    assert re.search(r"bfd +│ +33 │ +256 │ .* 9 │ +18 │", out), "the plan of steps"
    assert re.search(r"a GPU +│ +1.5", out), "the table of memory"
    assert "2 GPUs" in out
    assert not run_dir.exists()
    refused = {
        "near-duplicate in data.train": ["data.eval.0.path=recipes/debug/train.jsonl"],
        "is no run folder": [f"run.dir={tmp_path}"],
        "there is no file mine.json": ["parallel.deepspeed=mine.json"],
        "there is no folder nowhere": ["model.name=./nowhere"],
        "9 ranks, but a step has only 3": ["--nproc", "9"],
    }
    (tmp_path / "metrics.jsonl").touch()
    for sentence, more in refused.items():
        code, _, err = packhorse(*words, *more)
        assert (code, sentence in err) == (2, True), err
    (tmp_path / "file").touch()
    code, _, err = packhorse(*words, f"run.dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert "cannot be written" in err


def test_a_dry_run_is_no_worker_of_torchrun():
    worker = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    done = command("train", DEBUG, "--dry-run", **worker)
    assert done.returncode == 2
    assert "--dry-run starts no ranks" in done.stderr


def test_preview_shows_the_side_that_is_asked_for(packhorse):
    shown = {}
    for split in ("train", "eval"):
        code, out, err = packhorse(
            "preview",
            DEBUG,
            "--rows",
            "200",
            "--split",
            split,
            "data.eval=[]",
            "data.eval_fraction=0.2",
        )
        assert code == 0, err
        shown[split] = set(re.findall(r"train\.jsonl:\d+", out))
    assert len(shown["train"] | shown["eval"]) == 100
    assert not shown["train"] & shown["eval"]
    assert shown["eval"]


def test_preview_on_the_terminal_and_as_a_page(packhorse, tmp_path):
    code, out, err = packhorse("preview", DEBUG, "--rows", "2")
    assert code == 0, err
    assert "train.jsonl:1" in out
    assert "train.jsonl:3" not in out
    page = tmp_path / "page.html"
    cut = ("data.max_length=40", "data.too_long=split", "data.train_on=all")
    code, out, err = packhorse("preview", DEBUG, "--rows", "1", *cut)
    assert code == 0, err
    assert out.count("train.jsonl:1") > 1, "a row is shown as it is cut"
    assert (out.count(" user "), out.count(" assistant ")) == (1, 1)
    code, out, err = packhorse("preview", DEBUG, "--split", "eval", "--html", str(page))
    assert code == 0, err
    assert "eval.jsonl:1" in page.read_text()
    assert packhorse("preview", DEBUG, "--html", str(page))[0] == 0, "it is our own page"
    page.write_text("my page")
    code, _, err = packhorse("preview", DEBUG, "--html", str(page))
    assert (code, page.read_text()) == (2, "my page")
    assert "page.html: exists, and is not as packhorse wrote it" in err


def test_bad_input_is_2_even_where_its_sentence_cannot_be_written():
    """A rank's stderr is a file in the run folder, whose disk may be the full one."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "packhorse", "train", "missing.yaml"]
        assert subprocess.run(command, cwd=ROOT, stderr=full).returncode == 2


def test_an_adapter_on_a_module_that_does_not_exist_is_2_and_names_the_nearest(packhorse):
    code, _, err = packhorse(
        "plan", "recipes/debug.yaml", "adapter.target_modules=[q_porj]", "--gpus", "2"
    )
    assert code == 2
    assert "no module is called `q_porj`; the nearest is `q_proj`" in err


def test_nothing_is_merged_into_a_universal_checkpoint(packhorse, tmp_path):
    code, _, err = packhorse(
        "export", str(tmp_path), "--out", str(tmp_path / "out"), "--universal", "--merge"
    )
    assert code == 2
    assert "--merge: a universal checkpoint" in err


def test_launch_slurm_writes_into_the_run_folder_and_says_what(packhorse, tmp_path):
    folder = tmp_path / "100%"
    code, out, err = packhorse(
        "launch",
        "slurm",
        "recipes/debug.yaml",
        f"run.dir={folder}",
        "--nodes",
        "4-8",
        "--partition",
        "big",
    )
    assert code == 0, err
    assert out.splitlines()[0] == str(folder / "slurm.sh")
    script = folder / "slurm.sh"
    assert os.access(script, os.X_OK)
    lines = (folder / "slurm.sh").read_text().splitlines()
    assert {"#SBATCH --nodes=4-8", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=big"} <= set(
        lines
    )
    assert f"#SBATCH --chdir={ROOT}" in lines
    assert f"#SBATCH --output={tmp_path}/100%%/slurm-%j.log" in lines
    assert "##SBATCH --account=project" in lines
    again = ("launch", "slurm", "recipes/debug.yaml", f"run.dir={folder}")
    assert packhorse(*again)[0] == 0, "nobody has edited it"
    edited = script.read_text().replace("--nodes=1", "--nodes=3")
    script.write_text(edited)
    code, _, err = packhorse(*again)
    assert (code, script.read_text()) == (2, edited)
    assert "slurm.sh: exists, and is not as packhorse wrote it; submit it as it is" in err


def test_launch_slurm_trains_a_copy_of_the_recipe_that_no_edit_changes(packhorse, tmp_path):
    mine, template, folder = tmp_path / "mine.yaml", tmp_path / "zero.json", tmp_path / "run"
    mine.write_text((ROOT / "recipes/debug.yaml").read_text())
    template.write_text((ROOT / "ds_configs/zero2.json").read_text())
    words = ("launch", "slurm", str(mine), f"run.dir={folder}", f"parallel.deepspeed={template}")

    def launched(*more: str) -> Path:
        code, _, err = packhorse(*words, *more, "--qos", "high", "--sbatch", "--comment=mine")
        assert code == 0, err
        lines = (folder / "slurm.sh").read_text().splitlines()
        assert {"#SBATCH --qos=high", "#SBATCH --comment=mine", "overrides=()"} <= {
            line.split("  ")[0] for line in lines
        }
        (recipe,) = (line.removeprefix("recipe=") for line in lines if line.startswith("recipe="))
        return Path(recipe)

    first = launched("optim.lr=0.5")
    kept = load_recipe(first)
    assert kept.optim.lr == 0.5
    mine.write_text("an edit")
    template.write_text("another")
    assert load_recipe(first) == kept
    copy = Path(kept.parallel.deepspeed)
    assert (copy.parent, copy.read_text()) == (folder, (ROOT / "ds_configs/zero2.json").read_text())
    mine.write_text((ROOT / "recipes/debug.yaml").read_text())
    assert launched("optim.lr=0.25") != first, "a job in the queue keeps its own"
    assert load_recipe(first) == kept


def test_launch_slurm_answers_a_changed_recipe_as_train_does(packhorse, tmp_path):
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    saved = load_recipe(ROOT / "recipes/debug.yaml", [f"run.dir={tmp_path}"])
    (tmp_path / "recipe.yaml").write_text(saved.to_yaml())
    words = ("launch", "slurm", "recipes/debug.yaml", f"run.dir={tmp_path}")
    code, _, err = packhorse(*words, "optim.lr=0.5")
    assert code == 2
    assert "holds a run of another recipe: optim.lr was 0.01, is 0.5; give another run.dir" in err
    code, _, err = packhorse(*words, "train.epochs=4")
    assert (code, "add --extend to train on" in err) == (2, True)
    assert not (tmp_path / "slurm.sh").exists()
    code, _, err = packhorse(*words, "train.epochs=4", "--extend")
    assert code == 0, err
    assert "overrides=(--extend)" in (tmp_path / "slurm.sh").read_text()


def test_launch_slurm_refuses_the_packaged_recipe_in_a_container(packhorse, tmp_path):
    code, _, err = packhorse("launch", "slurm", "debug", f"run.dir={tmp_path}", "--container", "x")
    assert code == 2
    assert "files that the container does not have; give a recipe file" in err


def test_launch_slurm_writes_nothing_for_a_recipe_that_cannot_be_used(packhorse, tmp_path):
    code, _, err = packhorse(
        "launch", "slurm", "recipes/debug.yaml", f"run.dir={tmp_path / 'run'}", "optim.lr=-1"
    )
    assert code == 2
    assert "optim.lr" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_a_launcher_still_imports_loses_nothing(name):
    program = (
        "import os, signal, sys, types\n"
        "from packhorse.trainer.cli.main import main\n"
        f"early = lambda *args, **options: os.kill(os.getpid(), signal.{name})\n"
        "sys.modules['packhorse.launch.local'] = types.SimpleNamespace("
        "launch=early, parse_nodes=lambda text: (1, 1))\n"
        f"sys.argv[1:] = ['train', {DEBUG!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert f"{name}: stopped before the workers had started" in done.stderr


def test_a_link_to_itself_is_refused_by_a_sentence(packhorse, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code, _, said = packhorse("train", "recipes/debug.yaml", f"run.dir={tmp_path / 'loop' / 'x'}")
    assert code == 2, said
    assert "loop" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("packhorse: error: ")
