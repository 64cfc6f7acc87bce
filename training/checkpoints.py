"""Training checkpoints: save, verify, find and load them; start or resume a run from them.

A checkpoint is a file log/model_XXXXX.pt or, where no rank holds the whole model (--parallel fsdp, --ep_size,
sharded.py), a folder log/model_XXXXX with the same content. docs/formats.md lists the content. Functions here
accept both. They compare all checksums before they load anything, because torch.load ignores checksums.
"""

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

from model import GPTConfig, GPTLMHeadModel
from tokens.files import write_atomically
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
    """Write folder/model_XXXXX.pt, XXXXX the step, and point folder/latest at it; returns the path. OSError
    if it cannot be written; NotFiniteError if a value in it is not finite."""
    archives.check_finite(checkpoint["step"], dict(named_tensors(checkpoint)))
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


def prune_checkpoints(folder: str | Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete, and return, all but the newest `keep_last` (0: all stay), the multiples of `keep_every` and the
    one with the lowest validation loss."""
    old = list_checkpoints(folder)[keep_last:] if keep_last > 0 else []
    best = best_checkpoint(folder) if old else None
    old = [path for path in old if not (path == best or (keep_every and step_of(path) % keep_every == 0))]
    for path in old:
        archives.remove(path)
    return old


# ---------------------------------------------------------------------------- READ


def verify_checkpoint(path: str | Path) -> None:
    """Read all of a checkpoint and compare it with its checksums. CheckpointError: it is damaged.
    FileNotFoundError. After any other OSError (see `reading`) the checkpoint may be good."""
    path = Path(path)
    if path.is_dir():
        return sharded.verify(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; `ls {path.parent}/model_*` lists all there are")
    with reading(path, "not a checkpoint, or damaged, or cut off"):
        archives.check_regular(path)
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
    if path.name != "latest" or not path.is_file():
        return path
    name = path.read_bytes().decode(errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):  # such as ../../etc/passwd
        raise CheckpointError(f"{path} holds {name[:40]!r}, no checkpoint's name; give the checkpoint itself")
    return path.with_name(name)


def load_checkpoint(path: str | Path, whole: bool = True, trusted: bool = False) -> dict:
    """The checkpoint, verified, on the CPU; schema.py says what is in it. Errors as in verify_checkpoint.
    whole=False: of a folder, all but weights and moments, which `restore` reads. trusted=True: another rank
    has verified the folder."""
    path = follow_latest(path)
    if not (trusted and path.is_dir()):
        verify_checkpoint(path)
    if path.is_dir():
        return sharded.load(path) if whole else sharded.read_rest(path)
    # Given a file's name instead of an open file, torch.load would hide the system's errors.
    with reading(path, "it is no checkpoint of ours"), open(path, "rb") as file:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        archives.check_format(path, checkpoint)
        checkpoint = check_checkpoint(checkpoint)
        if without := [name for name, tensor in named_tensors(checkpoint) if tensor.is_meta]:
            raise ValueError(f"{without[0]} has no values")
    archives.check_loaded(path, dict(named_tensors(checkpoint)))
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
    return min(known, key=lambda path: losses[step_of(path)], default=None)


def load_newest(folder: str | Path, warn: Callable = print, whole: bool = True) -> tuple[Path, dict] | None:
    """The newest undamaged checkpoint in the folder and its content, or None; warns of each damaged one.
    NewerFormatError and OSError end the search, because the newest checkpoint may be good."""
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
MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}
# A resumed run keeps all settings that no flag sets, except these: folders, device and layout.
LAYOUT_SETTINGS = ("parallel", "zero_stage", "ep_size", "activation_checkpointing")
SETTINGS_NOT_KEPT = {"preset", "config", "run_name", "text", "log_dir", "resume", "init_from", "device"}
SETTINGS_NOT_KEPT |= set(LAYOUT_SETTINGS)
# Fields of the architecture that may change, because no learned weight depends on them.
MAY_CHANGE = {
    "dropout", "infer_step", "use_cache", "moe_loss_coef", "router_z_loss_coef", "router_bias_update_rate",
}  # fmt: skip
# A resumed run cannot change these: they set the order of samples, the optimizer's state, the architecture.
FIXED_SETTINGS = {"T", "seed", "shuffle", "optimizer"} | set(inspect.get_annotations(GPTConfig)) - MAY_CHANGE


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
    """(path, content) of the checkpoint to resume: config.resume, or if "auto" the newest one that rank 0
    sees; (None, None) to start afresh. CheckpointError, FileNotFoundError."""
    resume, log_dir = config.resume, config.log_dir
    if not resume:
        return None, None
    if resume != "auto":
        path = follow_latest(resume)
        return path, load_checkpoint(path, whole=False, trusted=not world.is_master)
    path, state = (load_newest(log_dir, say, whole=False) if world.is_master else None) or (None, None)
    if path is None and world.is_master:
        others = sorted(
            {str(p.parent) for p in Path().glob("log*/**/model_*") if CHECKPOINT_NAME.fullmatch(p.name)}
        )
        where = f"; checkpoints are in {', '.join(others[:9])}; continue the first with: " if others else ""
        where += resume_command(dataclasses.replace(config, log_dir=others[0])) if others else ""
        say(f"resume: no checkpoint in log_dir={log_dir}: a new run starts{where}")
    found = [step_of(path), path.is_dir()] if path else [0, 0]
    step, is_folder = world.sum(torch.tensor(found, device=world.device)).tolist()
    if step > 0 and not world.is_master:
        path = checkpoint_path(log_dir, step, "" if is_folder else ".pt")
        state = load_checkpoint(path, whole=False, trusted=True)
    return path, state


def keep_settings(config: Any, given: set[str], state: dict, path: Path, say: Callable = print) -> None:
    """Copy the checkpoint's settings into a resumed run's config, except `given`, which flags have set.
    CheckpointError if the checkpoint holds no run; ValueError for a flag that a resumed run cannot change."""
    missing = {"optimizer", "loader", "rng", "train_config", "val_loss", "elapsed_s", "health"} - state.keys()
    if missing:
        lacks = f"{path}: no {', '.join(sorted(missing))} in it"
        raise CheckpointError(f"{lacks}: it cannot be resumed; start a new run with --init_from {path}")
    saved = state["train_config"] | {k: v for k, v in state["config"].items() if k in FIXED_SETTINGS}
    with reading(path, "its train_config is none of this program"):
        check_limits(config, saved)
    for name in LAYOUT_SETTINGS:
        now = getattr(config, name)
        if name not in given and saved.get(name, now) != now:
            say(f"resume: {name} was {saved[name]!r} and is {now!r}; --{name} {saved[name]} would keep it")
    unlike = []
    for name in [f.name for f in dataclasses.fields(config) if f.name in saved.keys() - SETTINGS_NOT_KEPT]:
        now = getattr(config, name)
        derived = name in ("block_size", "vocab_size") and now <= 0
        if name not in given or derived:
            setattr(config, name, saved[name])
            if now != saved[name] and name not in FIXED_SETTINGS:
                unlike.append(f"{name}={saved[name]!r}")
        elif now != saved[name] and name in FIXED_SETTINGS:
            text = f"resume: {name}={saved[name]!r} in {path}, but --{name} {now!r} now; omit the flag"
            raise ValueError(f"{text}, or start another run from these weights (--init_from {path})")
        elif now != saved[name]:
            say(f"resume: {name} was {saved[name]!r} and is {now!r} from step {state['step']} on")
    if unlike:
        say(f"resume: settings from the checkpoint: {', '.join(unlike)}; give a flag to change one")
    if config.max_steps == state["step"]:
        longer = resume_command(config, "--max_steps", str(max(2 * state["step"], 1)), resume=path)
        say(f"resume: the run has done all max_steps={config.max_steps} steps; make it longer with: {longer}")
    if config.max_steps < state["step"]:
        done = f"resume: {path} has done {state['step']} steps already, but max_steps={config.max_steps}"
        raise ValueError(f"{done}; give --max_steps {2 * state['step']}, or --resume an earlier checkpoint")


def load_shards(rest: dict, weights: dict[str, torch.Tensor], parameters: list[torch.Tensor]) -> dict:
    """Add the tensors to a folder's checkpoint that was read without them; of a DTensor, this rank's part."""
    index = rest["index"]
    targets = {f"model.{name}": torch.empty_like(t).detach() for name, t in weights.items()}
    if rest["config"].get("tie_word_embeddings"):
        targets.pop("model.lm_head.weight")
    for name, stored in index.metadata.state_dict_metadata.items():
        if name.startswith("optimizer."):
            parameter = parameters[int(name.split(".")[1])]
            targets[name] = torch.empty_like(parameter, dtype=stored.properties.dtype).detach()
    sharded.load_tensors(index, targets)
    return sharded.insert_tensors(targets, rest)


def restore(
    state: dict, model: GPTLMHeadModel, optimizer: torch.optim.Optimizer, loader: Any, path: Path | str = ""
) -> None:
    """Restore weights, moments, routers' statistics, position in the data and random state, but not settings
    such as weight decay. ValueError, naming the checkpoint's path and what differs, if the data or the
    architecture is different."""
    try:
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
            shapes = {name: parameters[number].shape for name in MOMENTS[methods[number]]}
            shapes |= {"step": torch.Size()} if "step" in shapes else {}
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
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            values = optimizer.state.get(parameter, {})
            if "step" in values:  # ZeRO and unfused optimizers save it on the CPU; fused CUDA needs the GPU
                values["step"] = values["step"].to(parameter.device)


# ---------------------------------------------------------------------------- MODELS


def begin_from(init_from: str, fields: dict, given: set[str], T: int) -> GPTLMHeadModel:
    """A model to train, with the weights and the architecture of `init_from` (see load_model).

    fields: the GPTConfig fields of a run without init_from; given: the names that flags have set. If a flag
    sets use_moe=True, a dense model is upcycled. ValueError for a flag that contradicts the architecture:
    only MAY_CHANGE, a shorter block_size and what upcycling needs may differ.
    """
    source = load_model(init_from)
    theirs = source.config
    if theirs.encoding != fields["encoding"]:
        remedy = f"tokenise the text for it: `python fineweb.py --encoding {theirs.encoding} --out new_data`"
        if theirs.encoding == "unknown":
            remedy = 'write the right one into its config.json, as "encoding"'
        here = f"encoding={theirs.encoding!r} in init_from={init_from}"
        raise ValueError(f"{here}, but {fields['encoding']!r} in the data; {remedy}")
    upcycles = "use_moe" in given and fields["use_moe"] and not theirs.use_moe
    may_differ = MAY_CHANGE | {"moe_loss", "moe_loss_type", "block_size"}
    if upcycles:
        may_differ |= {"use_moe", "num_experts", "num_experts_per_tok", "moe_every", "router_score"}
        may_differ |= {"norm_topk_prob", "num_shared_experts", "expert_hidden_size"}
    for name in sorted(given & fields.keys() - may_differ):
        if fields[name] != getattr(theirs, name):
            text = f"{name}={fields[name]!r}, but init_from={init_from} has {name}={getattr(theirs, name)!r}"
            raise ValueError(f"{text}; omit the flag")
    if theirs.block_size < T:
        raise ValueError(f"T={T}, but init_from={init_from} has block_size={theirs.block_size}; lower --T")
    changed = {name: fields[name] for name in given & may_differ & fields.keys() if name != "block_size"}
    changed["infer_step"] = fields["infer_step"]  # a setting of the run, not of the model
    config = GPTConfig(**(theirs.to_dict() | changed))
    if upcycles:
        model = upcycle(source, config)
    else:
        model = GPTLMHeadModel(config)
        learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = source.state_dict()  # without the statistics of the other run's data
        state = {name: state[name] for name in state if name in learned or name.endswith("router_bias")}
        model.load_state_dict(state, strict=False)
    if "block_size" in given:
        model.crop_block_size(fields["block_size"])
    return model.train()


def load_model(source: str | Path) -> GPTLMHeadModel:
    """A model, in evaluation mode on the CPU, from a checkpoint, a folder or a hub name that from_pretrained
    knows. CheckpointError, FileNotFoundError; transformers' errors for a bad folder."""
    path = Path(source)  # drops a slash at the end
    ours = any((path / name).is_file() for name in (sharded.INDEX_FILE, "latest"))
    if not (ours or path.suffix in (".pt", ".pth", ".bin") or path.is_file()):
        return load_pretrained(str(source))
    checkpoint = load_checkpoint(source)
    try:
        model = GPTLMHeadModel(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())
        raise CheckpointError(f"its config and its weights do not fit this model.py: {message}") from error
    return model.eval()


def load_pretrained(source: str) -> GPTLMHeadModel:
    """from_pretrained in evaluation mode. FileNotFoundError if there is neither a folder nor a download."""
    if os.path.exists(source) and not os.path.isdir(source):
        raise CheckpointError(f"{source}: it is no ordinary file")
    missing = f"{source}: no such file or folder (`ls -d log/model_*` lists the checkpoints of a run)"
    if not os.path.isdir(source) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source, re.ASCII):
        raise FileNotFoundError(missing)  # it cannot be a name on the hub
    try:
        model = GPTLMHeadModel.from_pretrained(source)
    except OSError as error:  # transformers raises it after a failed download
        if os.path.exists(source):
            raise
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{missing}, nor a model that can be downloaded: {reason}") from error
    except Exception as error:
        if isinstance(error, ValueError) or is_out_of_memory(error):
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{source}: transformers cannot load it: {problem}") from error
    archives.check_loaded(Path(source), model.state_dict())
    return model.eval()
