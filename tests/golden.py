"""Run two checkouts of this project with the same seeds and compare what comes out, bit for bit.

    python tests/golden.py OLD NEW                           # two folders: before a change, and after it
    python tests/golden.py OLD NEW --cases moe,resume        # these, and the cases they need
    python tests/golden.py OLD NEW --keep FOLDER             # leaves all outputs in FOLDER/old and FOLDER/new

This guards changes that must not change results, such as a refactoring. It knows only the checkouts' command
lines; CASES lists them. It compares token shards, log files (without times), all that is in the last
checkpoint, sampled texts, and the logits of exported models, and prints every difference as one line.
Exit codes: 0 all is equal, 1 something differs or failed, 2 bad arguments."""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

TINY = """{code}/train_gpt_moe.py --n_layer 2 --n_head 2 --n_embd 32 --T 32 --B 4 --total_batch_size 256
    --max_steps 12 --warmup_steps 2 --max_lr 3e-3 --min_lr 3e-4 --infer_step 4 --val_steps 2 --sample_every 0
    --prompt Return --sample_tokens 4 --hellaswag False --use_compile False --device cpu --checkpoint_every 3
    --plot False --tensorboard False --data_dir {data}/data --log_dir log """
DENSE = "python " + TINY + "--use_moe False "
EXPERTS = f"""{TINY} --num_experts 4 --num_experts_per_tok 2 --dropout 0.1 --router_bias_update_rate 0.01
    --router_z_loss_coef 0.001 """
MOE = "python " + EXPERTS
# Two ranks, with two micro-steps on each.
TWO = f"python -m torch.distributed.run --standalone --nproc_per_node 2 {EXPERTS} --B 2 --max_steps 6 "
CONVERT = "python {code}/checkpoint.py convert log/latest whole.pt"
EXPORT = "python {code}/checkpoint.py export "
LOAD = 'python -P -c "$LOAD_CODE"'
SAMPLE = "python {code}/sample.py --prompt Return --num_samples 2 --max_new_tokens 24 --seed 1 --device cpu "
REWIND = "cp -r {moe}/log log; rm log/model_00009.pt log/model_00012.pt; printf model_00006.pt > log/latest"
RESUME = [REWIND, MOE + "--sample_every 4 --resume auto"]

# The cases run in this order, each in its folder. {code} is the checkout, {moe} the folder of the case moe.
CASES = {
    "data": ["python {code}/fineweb.py --source ../text.txt --encoding bytes --out data --val_tokens 20000"],
    "compile": [MOE + "--moe_every 2 --max_steps 3 --use_compile True"], "moe": [MOE + "--sample_every 4"],
    "muon": [MOE + """--optimizer muon --activation swiglu --position rope --qk_norm True --norm rmsnorm
        --bias False --num_shared_experts 1 --router_score sigmoid --n_kv_head 1 --sliding_window 16"""],
    "dense": [DENSE + """--activation relu2 --schedule wsd --activation_checkpointing block --loss_chunk 16
        --dropout 0.1 --flash False --hellaswag True --hellaswag_data ../questions.jsonl"""],
    "resume": RESUME, "cross_resume": RESUME,
    "sample": [SAMPLE + "--checkpoint {moe}/log/latest > sample.txt"],
    "export": [EXPORT + "{moe}/log/latest model", LOAD, SAMPLE + "--model model > sample.txt"],
    "cross_export": [EXPORT + "{export}/model model", LOAD, SAMPLE + "--model {export}/model > sample.txt"],
    "gpt2": [DENSE + "--max_steps 3 --dtype bfloat16", EXPORT + "log/latest model --format gpt2", LOAD],
    "ddp": [TWO], "zero": [TWO + "--zero_stage 1"], "fsdp": [TWO + "--parallel fsdp", CONVERT],
    "ep": [TWO + "--ep_size 2", CONVERT],
    "fsdp_ep": [TWO + "--parallel fsdp --ep_size 2 --dtype bfloat16", CONVERT],
}  # fmt: skip
# In these, NEW alone goes on from OLD's files. It must arrive where OLD arrived in the other case.
CROSS = {"cross_resume": "resume", "cross_export": "export"}

TIMEOUT_S = 600
CLOCK = {"ms", "tok_per_s", "elapsed_s", "memory"}  # of metrics.jsonl: they differ from run to run
LOAD_CODE = """import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True).eval()
ids = torch.arange(96).reshape(3, 32) * 7 % 256  # (B, T)
with torch.no_grad():
    logits = model(ids).logits  # (B, T, V)
text = model.generate(ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
torch.save({'logits': logits, 'text': text, 'weights': dict(model.state_dict())}, 'loaded.pt')"""


def needs(case: str) -> set[str]:
    """The cases whose outputs a case uses."""
    named = re.findall(r"{(\w+)}", " ".join(CASES[case]))
    return CASES.keys() & {*named, CROSS.get(case)}


def write_inputs(root: Path) -> None:
    """Write a made-up text of some 300 kB and four questions. They are the same every time."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    chance, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(500)]
    text = [words[int(500 * chance.random() ** 3)] for _ in range(55_000)]  # some words are frequent
    (root / "text.txt").write_text(" ".join(text))
    os.utime(root / "text.txt", (0, 0))  # meta.json has the time of its last change
    questions = [dict(ctx=text[i], activity_label="a", endings=text[9:13], label=i) for i in range(4)]
    (root / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))


def run_case(case: str, code: Path, root: Path, old: Path) -> None:
    """Run a case's commands with a checkout, in the folder root/case. What they print goes to out.log.
    `old` is OLD's root: both checkouts train on its shards; the case data compares these."""
    folder = root / case
    folder.mkdir()
    source = old if case in CROSS else root
    places = {name: source / name for name in CASES} | {"data": old / "data", "code": code}
    script = "\n".join(re.sub(r"\n +(?=--)", " ", command).format_map(places) for command in CASES[case])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                                "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1",
                                "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": str(folder / "modules"),
                                "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "LOAD_CODE": LOAD_CODE,
                                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    bash, nothing = ["timeout", str(TIMEOUT_S), "bash", "-e", "-c", script], subprocess.DEVNULL
    with open(folder / "out.log", "wb") as log:
        run = subprocess.run(bash, cwd=folder, env=environment, stdin=nothing, stdout=log, stderr=log)
    if run.returncode:
        last = (folder / "out.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {run.returncode}: {' '.join(last)}")


def leaves(value: Any, name: str) -> dict[str, Any]:
    """All tensors and other values in nested dictionaries, lists and tuples, by their paths."""
    parts = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if not isinstance(parts, dict) or not parts:
        return {name: value}
    return {path: leaf for key, part in parts.items() for path, leaf in leaves(part, f"{name}.{key}").items()}


def outcome(folder: Path) -> dict[str, Any]:
    """What a case has made, by name: tensors, other values, and {line or step: content} of files."""
    files = [*folder.glob("sample.txt"), *folder.glob("log/log.txt")]
    files += folder.glob("data/*") if folder.name == "data" else []
    found: dict[str, Any] = {file.name: dict(enumerate(file.read_bytes().split(b"\n"), 1)) for file in files}
    if (folder / "loaded.pt").exists():
        found |= leaves(torch.load(folder / "loaded.pt", weights_only=True), "loaded")
    if not (folder / "log").exists():
        return found
    found |= leaves(json.loads((folder / "log" / "run.json").read_text())["config"], "header")
    for line in (folder / "log" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in [key for key in record if "step" in record and key not in CLOCK]:
            found.setdefault(f"metrics.{key}", {})[record["step"]] = record[key]
    whole, newest = folder / "whole.pt", (folder / "log" / "latest").read_text().strip()
    checkpoint = torch.load(whole if whole.exists() else folder / "log" / newest, weights_only=True)
    checkpoint.pop("elapsed_s")
    return found | leaves(checkpoint, "checkpoint")


def difference(a: Any, b: Any) -> str:
    """In what two values differ; empty if they are equal to the bit."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{a.dtype} {tuple(a.shape)} is now {b.dtype} {tuple(b.shape)}"
        equal = torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))
        return "" if equal else f"largest difference {(a.double() - b.double()).abs().max().item():.3g}"
    if isinstance(a, dict) and isinstance(b, dict):  # {line or step: content}
        texts = ((key, difference(a.get(key, "nothing"), b.get(key, "nothing"))) for key in sorted({*a, *b}))
        return next((f"first at {key}: {text}" for key, text in texts if text), "")
    return "" if repr(a) == repr(b) else f"{a!r:.60} is now {b!r:.60}"


def compare(case: str, old: Path, new: Path) -> bool:
    """Print a line about a case, and one for every difference. Returns whether all is equal."""
    a, b = outcome(old), outcome(new)
    texts = {name: difference(a.get(name, "nothing"), b.get(name, "nothing")) for name in a | b}
    for name in a.keys() ^ b.keys():  # settings may come and go
        texts[name] = "" if name.startswith(("header.", "checkpoint.train_config.")) else texts[name]
    lines = [f"    {case}: {name}: {text}" for name, text in texts.items() if text]
    lines += [] if a else [f"    {case}: nothing to compare"]
    steps, tensors = len(a.get("metrics.loss", ())), sum(map(torch.is_tensor, a.values()))
    title = f"{case:14} {'differs' if lines else 'equal  '} ({steps} steps, {tensors} tensors)"
    print(title, *lines, sep="\n", flush=True)
    return not lines


def run_all(wanted: set[str], checkouts: list[Path], roots: list[Path]) -> int:
    """Run and report the cases, OLD and NEW at the same time. Returns how many are not equal."""
    unequal, (old, new) = 0, roots
    with ThreadPoolExecutor(2) as pool:
        for case in (case for case in CASES if case in wanted):
            sides = list(zip(checkouts, roots, strict=True))[1 if case in CROSS else 0 :]
            futures = [pool.submit(run_case, case, *side, old) for side in sides]
            try:
                for future in futures:
                    future.result()  # raises what the case has raised
                unequal += not compare(case, old / CROSS.get(case, case), new / case)
            except Exception as error:  # the other cases go on
                unequal += 1
                print(f"{case:14} failed   {error!r}", flush=True)
    return unequal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD", help="the checkout to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="the checkout to be checked")
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where outputs are kept")
    options = parser.parse_args()
    wanted = set(options.cases.split(","))
    if unknown := wanted - CASES.keys():
        parser.error(f"--cases: unknown {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    for case in reversed(CASES):  # what a case needs stands before it
        wanted |= needs(case) if case in wanted else set()
    with tempfile.TemporaryDirectory() as scratch:
        roots = [(options.keep or Path(scratch)).resolve() / name for name in ("old", "new")]
        for root in roots:
            write_inputs(root)
        unequal = run_all(wanted, [options.old.resolve(), options.new.resolve()], roots)
    print(f"{unequal} of {len(wanted)} cases differ")
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
