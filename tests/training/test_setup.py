"""Settings: --help, other projects' names of flags, files of settings; what follows from other settings, and
what a run refuses before it writes anything."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, refuses
from models import dense_model
from processes import STEPS, finish, flags, full_disk, losses, start

import train_gpt_moe
from tokens.hellaswag_files import HellaSwagUnavailable, iterate_examples
from tokens.shards import read_meta
from train_gpt_moe import TrainConfig, parse_config
from training import checkpoints as ckpt
from training import parallel
from training.quick_help import SYNONYMS, read_flags
from training.rendezvous import check_own_gpu
from training.setup import check_config, choose_dtype

ALONE = parallel.World(0, 0, 1, torch.device("cpu"))


# ---------------------------------------------------------------------------- help, flags, files of settings
def script(*arguments) -> subprocess.CompletedProcess:
    """train_gpt_moe.py in a Python that cannot import torch."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path[0] = '.'\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, "train_gpt_moe.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "80"})


def test_help_and_mistyped_flags_do_not_wait_for_torch():
    shown = script("--help")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) <= 45
    assert all(f" --{field.name}" in shown.stdout for field in dataclasses.fields(TrainConfig))
    assert "--no_" not in shown.stdout and "--max-steps" not in shown.stdout
    for arguments, words in ((["--lr", "1"], "--max_lr"), (["--max_step=1"], "did you mean --max_steps?")):
        wrong = script(*arguments)
        assert wrong.returncode == 2 and words in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_flags_that_are_read_are_those_of_the_dataclass():
    groups = read_flags(train_gpt_moe.__file__).values()
    read = {name: also for flags in groups for name, also in flags.items()}
    assert read == {field.name: field.metadata["aliases"] for field in dataclasses.fields(TrainConfig)}
    known = read.keys() | {alias.removeprefix("--") for aliases in read.values() for alias in aliases}
    assert not SYNONYMS.keys() & known and {text.split()[0].strip(",") for text in SYNONYMS.values()} <= known


@pytest.mark.parametrize("name", SYNONYMS)
def test_other_names_are_answered_with_ours(name):
    refuses(f"--{name} is called --{SYNONYMS[name].split()[0]}", parse_config, [f"--{name}", "1"])


def test_help_of_a_word_shows_its_flags_with_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--help", "--moe_loss"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[0].split()[:2] == ["--moe_loss", "True"]
    found = {line.split()[0] for line in lines if line[0] == "-"}
    assert found == {"--moe_loss", "--moe_loss_type", "--moe_loss_coef"}


def test_numbers_may_be_powers():
    words = "--total_batch_size 2**19 --max_steps=5e2 --num_iterations 1e3 --prompt 2**19 --batch-size=8"
    config, _ = parse_config(words.split())
    assert (config.total_batch_size, config.max_steps, config.prompt) == (2**19, 1000, "2**19")
    refuses("B", parse_config, ["--B", "1.5e0"])


def test_the_settings_of_a_run_repeat_it(straight, tmp_path):
    """run.json gives the same losses; flags win over it."""
    arguments = ["--config", str(straight / "run.json"), "--log_dir", str(tmp_path), "--infer_step", "0"]
    assert train_gpt_moe.main([*arguments, "--max_steps", "4", "--checkpoint_every", "0"]) == 0
    repeated = json.loads((tmp_path / "run.json").read_text())["config"]
    assert repeated["max_steps"] == 4 and repeated["n_embd"] == 32 and STEPS > 4
    assert losses(tmp_path)[:2] == losses(straight)[:2]  # the warmup's two steps: the schedule is another one


def test_own_text_in_one_flag(tmp_path, capsys, refused):
    """Its shards lie in log_dir, which may be moved; a resumed run needs them alone."""
    (tmp_path / "my.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    more = "--max_steps", 2, "--warmup_steps", 1, "--sample_every", 1, "--text", tmp_path / "my.txt"
    assert train_gpt_moe.main(flags("unused", tmp_path / "log", *more)) == 0
    meta = read_meta(tmp_path / "log" / "data")
    assert meta["encoding"] == "bytes" and meta["tokens"] == {"val": 1800, "train": 18001 - 1800}
    assert "step 1: sample\n    Return" in capsys.readouterr().out
    (tmp_path / "my.txt").unlink()
    moved = (tmp_path / "log").rename(tmp_path / "moved")
    resume = ["--log_dir", str(moved), "--resume", "auto", "--max_steps", "3", "--device", "cpu"]
    assert train_gpt_moe.main(resume) == 0 and losses(moved)[-1] > 0
    with full_disk(500):
        assert train_gpt_moe.main(flags("unused", tmp_path / "full", "--text", __file__)) == 1
    assert f"File too large: '{tmp_path}/full/data'" in capsys.readouterr().err
    for text, flag in (("another text", "another --log_dir"), ("\0", "--errors")):
        (tmp_path / "my.txt").write_text(text)
        log_dir = moved if "log" in flag else tmp_path / "new"
        error = refused(train_gpt_moe.main, *flags("unused", log_dir, *more))
        assert flag in error and "fineweb.py --source TEXT" in error and "--data_dir" in error


def test_files_of_settings(tmp_path, monkeypatch):
    file, yaml = tmp_path / "a.json", tmp_path / "a.yaml"
    yaml.write_text("B: 3\nmax_lr: 0.5\nmin_lr: 6e-5\nwandb_project: 12e4f\n")
    config, given = parse_config(["--config", str(yaml), "--max_lr", "2", "--run_name", "x.1", "--text=~/x"])
    assert (config.B, config.max_lr, config.log_dir) == (3, 2.0, "log/x.1") and {"B", "max_lr"} <= given
    assert (config.min_lr, config.wandb_project, config.text[0]) == (6e-5, "12e4f", "/")
    wrong = {"{": "a.json", '{"Bx": 1}': "did you mean --B", '{"B": "1"}': "B='1'", "[1]": "a.json",
             "[" * 10**5: "a.json", '{"preset": []}': "preset="}  # fmt: skip
    for text, words in wrong.items():
        file.write_text(text)
        refuses(words, parse_config, ["--config", str(file)])
    refuses("nowhere", parse_config, ["--config", "nowhere"], error=FileNotFoundError)
    refuses(r"run_name='\.\./x'", parse_config, ["--run_name", "../x"])


# ---------------------------------------------------------------------------- refused
LONG = "x" * 5000
REFUSED = {
    # flags: what the error names (field and value, and the flag or program that mends it)
    "--B": "--B.*argument", "--B eight": "--B.*'eight'", "--use_moe perhaps": "--use_moe.*perhaps",
    "5": "'5'", "--preset huge": "preset='huge'.*demo",
    "--B 0": "B=0.* 1", "--max_steps -1": "max_steps=-1.* 0", "--max_bad_steps 0": "max_bad_steps=0.* 1",
    "--hellaswag_limit -5": "hellaswag_limit=-5.* 0", "--plot_every -1": "plot_every=-1.* 0",
    "--keep_last -1": "keep_last=-1.* 0", "--max_lr nan": "max_lr=nan: must be a finite",
    "--learning_rate_decay_frac 1.5": "learning_rate_decay_frac=1.5.* 1",
    "--learning_rate_decay_frac -0.5": "learning_rate_decay_frac=-0.5",
    "--min_lr 1": "min_lr=1.0.*max_lr=0.003", "--n_embd 33": "n_embd=33.*n_head=2",
    "--T 64 --block_size 32": "T=64.*block_size=32", "--vocab_size 200": "vocab_size=200.*257",
    "--optimizer sgd": "optimizer='sgd'.*adamw",
    "--align document": "one of '', documents", "--dtype int8": "dtype='int8'.*float32",
    "--device quantum": "device='quantum'", "--device cuda:99": "cuda:99.*--device cpu|GPU 99",
    "--write_tensors 1": "write_tensors=True.*use_moe=True.*--use_moe False",
    "--write_tensors 1 --use_moe 0 --parallel fsdp": "write_tensors=True.*parallel=fsdp",
    "--write_tensors 1 --use_moe 0 --bias 0": "write_tensors=True.*bias=False.*--write_tensors 0",
    "--data_dir nowhere": "nowhere.*fineweb.py", "--input_bin nowhere/*.bin": "nowhere",
    "--data_dir NO_VALIDATION": "no val shard.*NO_VALIDATION.*fineweb.py",
    "--text a --input_bin b": "input_bin=.*and text=",
    "--text nope/texts": "text='nope/texts' is no file or folder",
    "--val a=nowhere": "no data folder nowhere", "--val_steps -1": "val_steps=-1.* 0",
    "--log_dir FILE": "log_dir=.*cannot write there.*--log_dir",
    "--log_dir LOCKED": "log_dir=.*cannot write there.*--log_dir",
    "--beta2 1": "beta2=1.0: must be below 1", f"--keep_every {'9' * 5000}": "invalid whole_number",
    f"--seed {2**63}": f"seed={2**63}: it is too large", f"--max_steps {2**70}": f"max_steps={2**70}",
    f"--n_layer {2**40}": f"n_layer={2**40}: must be at most 10000", f"--vocab_size {2**58}": "out of memory",
    f"--n_embd {2**50}": "out of memory with B=4, T=32, n_layer=2",
    "--prompt caf\udce9": r"prompt='caf\\udce9': must be text in UTF-8",
    "--data_dir " + "a\udce9" * 999: r"data_dir='a\\udce9", f"--resume {LONG}.pt": "File name too long",
    f"--input_bin {LONG}": "no data: xxx", f"--log_dir {LONG}": "log_dir=xxx", "--log_dir ' '": "log_dir=''",
    "--input_bin /dev/zero": "no data: /dev/zero is neither a folder nor a file",
    "--init_from /dev/zero": "/dev/zero: it is no ordinary file",
    "--init_from /nope": r"/nope: no such file or folder \(`ls -d log/model_\*`",
    "--init_from nope": "nor a model that can be downloaded",
    f"--init_from {LONG}": "File name too long",
    "--init_from nowhere/model_00001.pt": "nowhere/model_00001.pt: no such checkpoint",
    "--init_from SPEAKS_GPT2.pt": "encoding='gpt2' in init_from=.*'bytes' in the data.*--encoding gpt2",
}  # fmt: skip
REFUSED |= {f"--profile={steps}": f"profile='{steps}'" for steps in "3 3:3 4:2 a:b 11:13 -1:2".split()}


@pytest.fixture(scope="module")
def places(data, tmp_path_factory) -> Path:
    """A folder with the bad files and folders that REFUSED names in capitals."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "FILE").write_text("a file")
    (folder / "LOCKED" / ".lock").mkdir(parents=True)  # a file of that name cannot be opened
    shutil.copytree(data, folder / "NO_VALIDATION", ignore=shutil.ignore_patterns("val*"))
    model = dense_model(vocab_size=384, block_size=32)
    state = {"model": model.state_dict(), "config": model.config.to_dict(), "step": 0}
    ckpt.save_checkpoint(state, folder).rename(folder / "SPEAKS_GPT2.pt")
    return folder


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda text: ascii(text)[1:-1][:60])
def test_bad_settings(arguments, data, places, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line that names cause and cure; nothing is trained, nothing is written."""
    monkeypatch.chdir(tmp_path)
    words = [re.sub(r"^[A-Z_]{4,}\d?", lambda m: str(places / m[0]), word) for word in shlex.split(arguments)]
    common = flags(data, "log")
    if "--init_from" in arguments:  # flags must not contradict that model's sizes
        common = f"--total_batch_size 256 --B 4 --T 16 --device cpu --data_dir {data} --log_dir log"
        common = f"{common} --use_compile False".split()
    before = sorted(places.rglob("*"))
    assert train_gpt_moe.main([*common, *words]) == (1 if "memory" in REFUSED[arguments] else 2)
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and re.search(REFUSED[arguments], error) and len(error) < 2100, error
    assert not any(jargon in error for jargon in ("repo_type", "revision", "Traceback"))
    assert "step" not in out and sorted(places.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value", "message"), [
    ("RANK", "0", "not LOCAL_RANK, WORLD_SIZE"),
    pytest.param("PATH", "nowhere", "No working C.*it needs .*--use_compile False$", marks=pytest.mark.slow),
    pytest.param("PATH", "FOLDER", "omp.h: fatal error: none.*--use_compile False$", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_bad_environment(name, value, message, data, tmp_path):
    """The g++ in FOLDER compiles nothing."""
    script = "#!/bin/sh\n[ $1 = --version ] && echo g++ 12.2.0 || ! echo omp.h: fatal error: none"
    (tmp_path / "g++").write_text(script)
    (tmp_path / "g++").chmod(0o755)
    environment = {name: value.replace("FOLDER", str(tmp_path)), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words = flags(data, tmp_path / "log", "--use_compile", True)
    assert finish(start(words, tmp_path / "out", environment)) == 2 and not (tmp_path / "log").exists()
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert re.search(message, line), line


def test_triton_on_an_old_gpu_names_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("GTX 1080 is too old\nfor Triton")))
    words = r"too old: .*Python.h.*7.0, but.* 6.1; or --use_compile False$"
    refuses(words, parallel.check_compiler, torch.device("cuda", 0))


@pytest.mark.parametrize(("capability", "words", "expected"), [
    ((9, 0), "", "bfloat16"), ((8, 0), "--parallel fsdp", "bfloat16"), ((7, 5), "", "float16"),
    ((7, 5), "--parallel fsdp", "float32"), ((7, 0), "--ep_size 2", "float32"),
    ((7, 5), "--dtype bfloat16 --use_compile False", "bfloat16"), ((7, 5), "--dtype float32", "float32"),
    ((7, 5), "--dtype bfloat16", r"dtype=bfloat16.* 8.0, but .* 7.5; use --dtype float16, or --use_compile"),
    (None, "", "float32"), (None, "--dtype bfloat16", "bfloat16"),
])  # fmt: skip
def test_dtype_auto_is_what_the_device_can(capability, words, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, _ = parse_config(words.split())
    with pytest.raises(ValueError, match=expected) if "," in expected else contextlib.nullcontext():
        assert choose_dtype(config, torch.device("cuda", 0) if capability else ALONE.device) == expected


@pytest.mark.parametrize(("name", "local_rank", "count", "expected"), [
    ("", 0, 1, 0), ("", 3, 4, 3), ("cuda", 2, 3, 2), ("cuda:1", 0, 3, 1), ("", 3, 3, "rank 3 wants GPU 3"),
    ("", 3, 1, 0), ("cuda:1", 0, 1, "GPU 1"),  # srun --gpus-per-task=1 shows each process one GPU
])  # fmt: skip
def test_each_process_takes_its_own_gpu(name, local_rank, count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    fails = isinstance(expected, str)
    with pytest.raises(ValueError, match=expected) if fails else contextlib.nullcontext():
        assert parallel.choose_device(name, local_rank) == torch.device("cuda", expected)


def test_ranks_that_share_a_gpu_are_refused_by_number():
    store, gpus = torch.distributed.HashStore(), ["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-1"]
    for rank, gpu in enumerate(gpus):
        store.set(f"gpu of {rank}", gpu)
    check_own_gpu(store, 2, 4, gpus[2])
    refuses(r"ranks 0, 3 use one GPU \(a GPU-1\); omit --device", check_own_gpu, store, 3, 4, gpus[3])


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_memory_of_gpus_is_allocated_in_segments_that_grow(name):
    """Unless the user has set something. The scripts import tokens.requirements first."""
    main = "import os, sys; sys.modules['__main__'].__file__ = os.path.abspath('train_gpt_moe.py')"
    code = f"{main}; import tokens.requirements; print(os.environ.get('PYTORCH_ALLOC_CONF'), end='')"
    environment = os.environ | ({name: "a:b"} if name else {})
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert said == {"": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "a:b"}.get(name, "None")


def test_pipes_among_the_data_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "meta.json")
    refuses(r"meta.json is damaged .*no ordinary file", read_meta, tmp_path)
    for questions in (tmp_path / "meta.json", "/dev/zero"):
        refuses("it is no ordinary file", next, iterate_examples(data=questions), error=HellaSwagUnavailable)


# ---------------------------------------------------------------------------- derived
def test_min_lr_follows_max_lr_unless_it_is_given():
    for words, expected in ([], 6e-5), (["--max_lr=1e-3"], 1e-4), (["--min_lr=1e-5"], 1e-5):
        config, given = parse_config(words)
        check_config(config, ALONE, given)
        assert config.min_lr == expected


@pytest.mark.parametrize(("steps", "expected"), [(30, 3), (5, 0), (40, 4), (41, 40), (0, 40)])
def test_a_presets_warmup_that_does_not_fit_is_made_shorter(steps, expected):
    said, words = [], ["--preset", "demo", "--max_steps", str(steps)]
    config, given = parse_config(words)
    check_config(config, ALONE, given, said.append)
    assert config.warmup_steps == expected and len(said) == (expected != 40)
    if expected == 40:
        return
    assert re.match(rf"warmup_steps={expected}, not 40: max_steps={steps}.*--warmup_steps", said[0])
    config, given = parse_config([*words, "--warmup_steps", "40"])
    for given_now in (given, None):  # a flag's warmup is refused, and that of a resumed run
        words = f"warmup_steps=40 .*max_steps={steps}; lower --warmup_steps"
        refuses(words, check_config, config, ALONE, given_now)


def main(arguments: list[str]) -> int:
    """What `start(..., script="test_setup")` runs, with these variables: prints a large tensor's faults."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    os.environ.update(dict.fromkeys(arguments, "65536"))
    parallel.start("cpu")
    for _ in range(6):
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
    return 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise(tmp_path):
    """64 MiB are 16,384 pages, and each new page is a fault."""
    for variables in ([], ["MALLOC_MMAP_THRESHOLD_"]):
        assert finish(start(variables, tmp_path / "faults", script="test_setup")) == 0
    kept, given = map(int, (tmp_path / "faults").read_text().split())
    assert kept < given / 4
