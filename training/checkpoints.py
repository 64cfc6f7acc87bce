"""Training checkpoints: save, verify, find and load them; start or resume a run from them.

A checkpoint is a file log/model_XXXXX.pt or, where no rank holds the whole model, a folder log/model_XXXXX
with the same content (sharded.py), which docs/formats.md lists. Functions here accept both. They compare all
checksums before they load anything, because torch.load ignores checksums."""

import dataclasses
import inspect
import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from huggingface.nanogpt import from_nanogpt, without_code
from model import GPTConfig, GPTLMHeadModel
from tokens.files import check_regular, write_atomically
from tokens.printable import one_line
from training import archives, sharded
from training.archives import CHECKPOINT_FORMAT, CheckpointError, NewerFormatError, is_out_of_memory, reading
from training.flags import check_limits
from training.parallel import like
from training.schema import check_checkpoint
from training.upcycle import upcycle

CHECKPOINT_NAME = re.compile(r"model_(\d{5,})(\.pt)?")  # a file; without the ending, a folder


# ---------------------------------------------------------------------------- WRITE
def save_checkpoint(checkpoint: dict, folder: str | Path) -> Path:
    """Write folder/model_XXXXX.pt (the step); point folder/latest at it. OSError, NotFiniteError."""
    archives.check_finite(archives.DIVERGED.format(checkpoint["step"]), dict(named_tensors(checkpoint)))
    path = checkpoint_path(folder, checkpoint["step"])
    write_atomically(path, lambda file: torch.save({**checkpoint, "format": CHECKPOINT_FORMAT}, file))
    write_atomically(path.with_name("latest"), lambda file: file.write(path.name.encode()))
    return path


def named_tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries, lists and tuples, each with its keys joined by dots."""
    if torch.is_tensor(value):
        return [(name, value)]
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    inner = value.items() if isinstance(value, dict) else ()
    return [pair for key, part in inner for pair in named_tensors(part, f"{name}.{key}".lstrip("."))]


def prune_checkpoints(folder: str | Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` (0: all stay), multiples of `keep_every`, and the best."""
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[keep_last:] if keep_last > 0 else ():
        if path != best and not (keep_every and step_of(path) % keep_every == 0):
            archives.remove(path)


# ---------------------------------------------------------------------------- READ
def verify_checkpoint(path: str | Path) -> None:
    """Compare all of a checkpoint with its checksums. CheckpointError: damaged. Other errors: `reading`."""
    path = Path(path)
    if path.is_dir():
        return sharded.verify(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; `ls {path.parent}/model_*` lists all there are")
    with reading(path, "not a checkpoint, or damaged, or cut off"):
        check_regular(path)
        with open(path, "rb") as file:
            archives.check_archive(file)


def checkpoint_path(folder: str | Path, step: int, suffix: str = ".pt") -> Path:
    """Where the checkpoint of a step lies. suffix: "" for a folder."""
    return Path(folder) / f"model_{step:05d}{suffix}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(CHECKPOINT_NAME.fullmatch(path.name)[1])


def follow_latest(path: str | Path) -> Path:
    """The path itself, or for log/latest the checkpoint it names. CheckpointError if it names none."""
    path = Path(path)
    if (path / "latest").is_file() and not (path / sharded.INDEX_FILE).is_file():
        raise CheckpointError(f"{path} is the folder of a run; its newest checkpoint is {path / 'latest'}")
    if path.name not in ("latest", "best") or not path.is_file():
        return path
    name = path.read_bytes().decode(errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):  # such as ../../etc/passwd
        raise CheckpointError(f"{path} holds {name[:40]!r}, no checkpoint's name; give the checkpoint itself")
    return path.with_name(name)


def load_checkpoint(path: str | Path, whole: bool = True, trusted: bool = False) -> dict:
    """The checkpoint, verified, on the CPU; errors as in verify_checkpoint. whole=False: of a folder, all but
    the tensors, which `restore` reads. trusted=True: another rank has verified the folder."""
    path = follow_latest(path)
    if not (trusted and path.is_dir()):
        verify_checkpoint(path)
    if path.is_dir():
        return sharded.load(path) if whole else sharded.read_rest(path)
    # Given a file's name instead of an open file, torch.load would hide the system's errors.
    with reading(path, "it is no checkpoint of ours"), open(path, "rb") as file, without_code():
        checkpoint = from_nanogpt(torch.load(file, map_location="cpu", weights_only=True))
        archives.check_format(path, checkpoint)
        checkpoint = check_checkpoint(checkpoint)
        if odd := [name for name, tensor in named_tensors(checkpoint) if not archives.is_plain(tensor)]:
            raise ValueError(f"{odd[0]} is no plain tensor with values")
    archives.check_finite(f"{path}", dict(named_tensors(checkpoint)), ". Use an earlier checkpoint")
    return checkpoint


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in the folder, newest first; they may be damaged. OSError if it cannot be read."""
    try:  # glob would hide the error
        found = [Path(folder, name) for name in os.listdir(folder) if CHECKPOINT_NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [path for path in found if path.is_dir() != (path.suffix == ".pt")]
    return sorted(found, key=step_of, reverse=True)


def validation_losses(folder: str | Path, word: str = "val") -> dict[int, float]:
    """The validation loss (word val_bpb: in bits per byte) of each evaluated step, from the folder's log.txt;
    {} if there is none."""
    path = Path(folder, "log.txt")
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.findall(rf"^(\d{{1,18}}) {word} (-?\d+\.\d+|nan|-?inf)$", text, re.MULTILINE | re.ASCII)
    return {int(step): float(loss) for step, loss in found}


def best_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the lowest validation loss in the log; None if the log has none of their steps."""
    losses = validation_losses(folder)
    known = [path for path in list_checkpoints(folder) if math.isfinite(losses.get(step_of(path), math.nan))]
    known.reverse()  # of equal losses the earliest counts, as in RunSaver.judge
    return min(known, key=lambda path: losses[step_of(path)], default=None)


def load_newest(folder: str | Path, warn: Callable = print, whole: bool = True) -> tuple[Path, dict] | None:
    """The newest undamaged checkpoint and its content, or None; warns of damaged ones. Raises if unsure."""
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path, whole)
        except NewerFormatError:
            raise
        except (CheckpointError, FileNotFoundError) as error:
            warn(f"WARNING: skipping {one_line(error)}")
    return None


# ---------------------------------------------------------------------------- RESUME
# What an optimizer keeps of each parameter, by the method of the parameter's group.
MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}, "adagrad": {"sum"}}
# A resumed run keeps all settings that no flag sets, except these: folders, device and layout.
LAYOUT_SETTINGS = ("parallel", "zero_stage", "ep_size", "activation_checkpointing")
SETTINGS_NOT_KEPT = {*"preset config run_name text log_dir resume init_from device".split(), *LAYOUT_SETTINGS}
# Fields of the architecture that may change, because no learned weight depends on them.
MAY_CHANGE = {"dropout", "infer_step", "use_cache", "moe_loss_coef", "router_z_loss_coef"}
MAY_CHANGE |= {"router_bias_update_rate"}
# A resumed run cannot change these: they set the order of samples, the optimizer's state, the architecture.
FIXED_SETTINGS = {"T", "seed", "shuffle", "optimizer", "muon_experts", "adagrad_ngrams"}
FIXED_SETTINGS |= set(inspect.get_annotations(GPTConfig)) - MAY_CHANGE
# Values that stand for what the data or other settings say.
DERIVED = {"block_size": [0], "vocab_size": [0, -1], "ngram_order": [-1]}


def resume_command(config: Any, *more: str, resume: str | Path = "auto") -> str:
    """The command that continues a run of `config` (TrainConfig), with what no checkpoint brings: launcher,
    device, layout. It is for the machine on which this process runs. more: further flags."""
    launcher, names = ["python"], {"nproc_per_node": "LOCAL_WORLD_SIZE"}  # which torchrun sets
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # several machines
        names |= {"nnodes": "GROUP_WORLD_SIZE", "node_rank": "GROUP_RANK"}
        names |= {"master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", *(f"--{flag}={os.environ.get(name)}" for flag, name in names.items())]
    words = [*launcher, "train_gpt_moe.py", "--log_dir", config.log_dir, "--resume", str(resume)]
    for name in ("device", *LAYOUT_SETTINGS):
        if (value := getattr(config, name)) != getattr(type(config), name):
            words += [f"--{name}", str(value)]
    return shlex.join([*words, *more])


def find_resumed(config: Any, world: Any, say: Callable) -> tuple[Path | None, dict | None]:
    """(path, content) to resume: config.resume, or for "auto" the newest that rank 0 sees, or two None."""
    resume, log_dir = config.resume, config.log_dir
    if not resume:
        return None, None
    if resume != "auto":
        path = follow_latest(resume)
        return path, load_checkpoint(path, whole=False, trusted=not world.is_master)
    path, state = (load_newest(log_dir, say, whole=False) if world.is_master else None) or (None, None)
    if path is None and world.is_master:
        found = [p for p in Path().glob("log*/**/model_*") if CHECKPOINT_NAME.fullmatch(p.name)]
        others, where = sorted({str(p.parent) for p in found}), ""
        if others:
            command = resume_command(dataclasses.replace(config, log_dir=others[0]))
            where = f"; checkpoints are in {', '.join(others[:9])}; continue the first with: {command}"
        say(f"resume: no checkpoint in log_dir={log_dir}: a new run starts{where}")
    world.barrier()  # rank 0 verifies the whole checkpoint
    found = [1, step_of(path), path.is_dir()] if path else [0, 0, 0]
    resumes, step, is_folder = world.sum(torch.tensor(found, device=world.device)).tolist()
    if resumes and not world.is_master:
        path = checkpoint_path(log_dir, step, "" if is_folder else ".pt")
        state = load_checkpoint(path, whole=False, trusted=True)
    return path, state


def keep_settings(config: Any, given: set[str], state: dict, path: Path, say: Callable = print) -> None:
    """Copy the checkpoint's settings into config, except `given`, which flags have set. ValueError for a flag
    that a resumed run cannot change, and a checkpoint without a run."""
    missing = {"optimizer", "loader", "rng", "train_config", "val_loss", "elapsed_s", "health"} - state.keys()
    if missing:
        lacks = f"cannot be resumed: it lacks {', '.join(sorted(missing))}"
        raise CheckpointError(f"{path} {lacks}; start a new run with --init_from {path}")
    older = vars(type(config)())  # a field that the checkpoint does not know yet had its default's effect
    saved = older | state["train_config"] | {k: v for k, v in state["config"].items() if k in FIXED_SETTINGS}
    with reading(path, "its train_config is none of this program"):
        check_limits(config, saved)
    if saved["data_dir"] == os.path.join(saved["log_dir"], "data"):  # of --text: the data lie beside it
        saved["data_dir"] = str(path.parent / "data")
    for name in LAYOUT_SETTINGS:
        now = getattr(config, name)
        if name not in given and saved.get(name, now) != now:
            say(f"resume: {name} was {saved[name]!r} and is {now!r}; --{name} {saved[name]} would keep it")
    unlike = []
    for name in [f.name for f in dataclasses.fields(config) if f.name in saved.keys() - SETTINGS_NOT_KEPT]:
        now, before = getattr(config, name), saved[name]
        if name not in given or now in DERIVED.get(name, ()):
            setattr(config, name, before)
            if now != before and name not in FIXED_SETTINGS:
                unlike.append(f"{name}={before!r}")
        elif now != before and name in FIXED_SETTINGS:
            text = f"resume: {name}={before!r} in {path}, but --{name} {now!r} now; omit the flag"
            raise ValueError(f"{text}, or start another run from these weights (--init_from {path})")
        elif now != before:
            say(f"resume: {name} was {before!r} and is {now!r} from step {state['step']} on")
    if unlike:
        say(f"resume: settings from the checkpoint: {', '.join(unlike)}; give a flag to change one")
    step, steps = state["step"], config.max_steps
    if steps == step:
        longer = resume_command(config, "--max_steps", str(max(2 * step, 1)), resume=path)
        say(f"resume: the run has done all max_steps={steps} steps; make it longer with: {longer}")
    if steps < step:
        mend = f"give --max_steps {2 * step}, or --resume an earlier checkpoint"
        raise ValueError(f"resume: {path} has done {step} steps already, but max_steps={steps}; {mend}")


def load_shards(rest: dict, weights: dict[str, torch.Tensor], parameters: list[torch.Tensor]) -> dict:
    """Add the tensors to a folder's checkpoint that was read without them; of a DTensor, this rank's part."""
    targets = {f"model.{name}": torch.empty_like(t).detach() for name, t in weights.items()}
    if rest["config"].get("tie_word_embeddings"):
        targets.pop("model.lm_head.weight")
    for name, stored in rest["index"].metadata.state_dict_metadata.items():
        if name.startswith("optimizer."):
            parameter = parameters[int(name.split(".")[1])]
            targets[name] = torch.empty_like(parameter, dtype=stored.properties.dtype).detach()
    return sharded.fill(targets, rest)


def restore(state: dict, model: Any, optimizer: Any, loader: Any, path: Path | str = "") -> None:
    """Restore weights, optimizer state (not its settings), position in the data and random state. ValueError,
    naming path and difference, for other data or another architecture."""
    try:
        if state["loader"].keys() == {"position"}:  # nanoGPT's
            loader.reset(state["loader"]["position"])
        else:
            loader.load_state_dict(state["loader"])
    except ValueError as error:
        raise ValueError(f"resume: {path}: {error}") from error
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    own, parameters = model.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    try:
        if "index" in state:
            state = load_shards(state, own, parameters)
        # `like` takes this rank's part of whole tensors.
        weights = {name: like(v, own[name]) if name in own else v for name, v in state["model"].items()}
        moments = {
            number: {k: like(v, parameters[number]) if torch.is_tensor(v) else v for k, v in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        methods = [group.get("method", "adamw") for group in optimizer.param_groups for _ in group["params"]]
        for number, values in moments.items():
            whole, names = parameters[number].shape, MOMENTS[methods[number]]
            shapes = {name: torch.Size() if name == "step" else whole for name in names}
            if shapes != {name: value.shape for name, value in values.items()}:
                raise KeyError(f"state of parameter {number} of the optimizer")
        model.load_state_dict(weights)
        optimizer.load_state_dict({**state["optimizer"], "state": moments})
        torch.set_rng_state(state["rng"])
    except (RuntimeError, KeyError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"resume: {path}: weights or optimizer state do not fit: {error}") from error
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    if hasattr(optimizer, "optim"):  # ZeroRedundancyOptimizer: the inner optimizer has this rank's share
        optimizer.state.clear()  # free a second copy of the moments
        optimizer = optimizer.optim
    fused = [parameter for g in optimizer.param_groups if g.get("fused") for parameter in g["params"]]
    for parameter in fused:
        values = optimizer.state.get(parameter, {})
        if "step" in values:  # ZeRO and unfused optimizers save it on the CPU; fused CUDA needs the GPU
            values["step"] = values["step"].to(parameter.device)


# ---------------------------------------------------------------------------- MODELS
# What the settings decide about a model that is upcycled.
UPCYCLED = {"use_moe", "num_experts", "num_experts_per_tok", "moe_every", "router_score", "norm_topk_prob"}
UPCYCLED |= {"num_shared_experts", "expert_hidden_size"}


def begin_from(init_from: str, fields: dict, given: set[str], T: int) -> GPTLMHeadModel:
    """A model to train, with the weights and architecture of `init_from`; use_moe=True upcycles a dense one.
    fields: GPTConfig's without init_from; given: what flags have set. ValueError if they contradict it."""
    source = load_model(init_from)
    theirs = source.config
    if (theirs.encoding, theirs.vocab_size) == ("nanogpt", fields["encoding_size"]):
        for name in ("encoding", "encoding_size", "bos_token_id", "eos_token_id"):  # the data name them
            setattr(theirs, name, fields[name])
    if theirs.encoding != fields["encoding"]:
        command = "python fineweb.py --out new_data --source TEXT"
        mend = f"tokenise the text for it: `{command} --encoding {theirs.encoding}`"
        if theirs.encoding.startswith("tokenizer:"):
            export = f"`python checkpoint.py export {init_from} FOLDER`"
            mend = f"{export}, then `{command} --tokenizer FOLDER`"
        if theirs.encoding == "unknown":
            mend = 'write the right one into its config.json, as "encoding"'
        if theirs.encoding == "nanogpt":
            mend = f"give the data it was trained with, of vocab_size={theirs.vocab_size}"
        unlike = f"{theirs.encoding!r} in init_from={init_from}, but {fields['encoding']!r} in the data"
        raise ValueError(f"encoding={unlike}; {mend}")
    upcycles = "use_moe" in given and fields["use_moe"] and not theirs.use_moe
    may_differ = MAY_CHANGE | {"moe_loss", "moe_loss_type", "block_size"} | (UPCYCLED if upcycles else set())
    for name in sorted(given & fields.keys() - may_differ):
        ours, has = fields[name], getattr(theirs, name)
        if ours != has:
            raise ValueError(f"{name}={ours!r}, but init_from={init_from} has {name}={has!r}; omit the flag")
    if theirs.block_size < T:
        raise ValueError(f"T={T}, but init_from={init_from} has block_size={theirs.block_size}; lower --T")
    taken = given & may_differ | (UPCYCLED if upcycles else set())  # a preset, too, decides about experts
    changed = {name: fields[name] for name in taken & fields.keys() if name != "block_size"}
    changed["infer_step"] = fields["infer_step"]  # a setting of the run, not of the model
    config = GPTConfig(**(theirs.to_dict() | changed))
    if upcycles:
        model = upcycle(source, config)
    else:
        model = GPTLMHeadModel(config)
        learned = dict(model.named_parameters(remove_duplicate=False))
        state = source.state_dict().items()  # without the statistics of the other run's data
        kept = {name: value for name, value in state if name in learned or name.endswith("router_bias")}
        model.load_state_dict(kept, strict=False)
    if "block_size" in given:
        model.crop_block_size(fields["block_size"])
    return model.train()


def load_model(source: str | Path) -> GPTLMHeadModel:
    """A model, in evaluation mode on the CPU, from a checkpoint, folder or hub name. ValueError, OSError."""
    path, source = Path(source), str(source)  # Path drops a slash at the end
    is_folder = os.path.isdir(source)
    ours = any((path / name).is_file() for name in (sharded.INDEX_FILE, "latest"))
    if ours or (path.suffix in (".pt", ".pth", ".bin") and not is_folder) or path.is_file():
        checkpoint = load_checkpoint(source)
        with reading(path, "its config and its weights do not fit this model.py"):
            model = GPTLMHeadModel(checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
        return model.eval()
    if os.path.exists(source) and not is_folder:
        raise CheckpointError(f"{source}: it is no ordinary file")
    missing = f"{source}: no such file or folder (`ls -d log/model_*` lists the checkpoints of a run)"
    if not is_folder and not re.fullmatch(r"\w[\w.-]*(/(?!(best|latest)$)[\w.-]+)?", source, re.ASCII):
        raise FileNotFoundError(missing)  # it cannot be a name on the hub
    try:
        model = GPTLMHeadModel.from_pretrained(source)
    except Exception as error:
        if isinstance(error, OSError) and not is_folder:  # transformers raises it after a failed download
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"{missing}, nor a model that can be downloaded: {reason}") from error
        if isinstance(error, ValueError | OSError) or is_out_of_memory(error):
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{source}: transformers cannot load it: {problem}") from error
    archives.check_finite(source, model.state_dict(), ". Use an earlier checkpoint")
    model.config.output_router_logits = False  # TRL saves True: each forward would call the routers twice
    return model.eval()
