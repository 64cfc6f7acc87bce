"""Training checkpoints: save, check, find, load; begin a run from them or from other weights.

A checkpoint log/model_XXXXX.pt is a dictionary that torch.load reads under its safe default
(weights_only=True):
    model         state dict of GPT / GPTLMHeadModel (they are the same), tensors on the CPU
    config        GPTConfig.to_dict(): GPT(checkpoint["config"]) accepts it
    step          number of optimizer steps done
    val_loss      last validation loss before this step, nats per token, or None
    optimizer     its state dict; loader: position in the data; rng: torch's state; train_config: all settings
    elapsed_s     seconds trained so far; health: bad steps, the loss's mean; scaler: float16's; world_size;
                  format: 1

A file appears under its name only when it is whole: it is written beside it, fsynced, renamed, and the folder
is fsynced. A kill, a crash or a full disk at any byte leaves the checkpoints there were. The file is a zip
archive with a CRC-32 for every tensor, which is compared before anything is loaded (torch.load alone does not
look at it): any change of up to 32 bits in a row is found, and others with a probability of 1 - 2**-32.
log/latest holds the name of the newest checkpoint; it never names one that is not there. Where no rank holds
the whole model (--parallel fsdp, --ep_size), a checkpoint is a folder log/model_XXXXX of the same content:
sharded.py. Everything here takes either.

Reference: the zip format, https://pkware.com/appnote (CRC-32, 4.4.7).
"""

import dataclasses
import inspect
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig, GPTLMHeadModel
from tokens.files import write_atomically
from training import sharded
from training.archives import (
    CheckpointError,
    NewerFormatError,
    NotFiniteError,
    check_archive,
    judge,
    out_of_memory,
    remove,
)
from training.sharded import FORMAT
from training.upcycle import upcycle

NAME = re.compile(r"model_(\d{5,})(\.pt)?")  # a file, or without the ending a folder

# ---------------------------------------------------------------------------- WRITE


def save_checkpoint(checkpoint: dict, folder: str | Path) -> Path:
    """Write folder/model_XXXXX.pt, XXXXX the step, and point folder/latest at it.

    OSError if it cannot be written; CheckpointError if a value in it is not finite: such a file would only
    push out good ones.
    """
    for name, tensor in named_tensors(checkpoint):
        if not sharded.finite(tensor):
            raise NotFiniteError(f"step {checkpoint['step']} is not saved: {name} is not finite")
    path = checkpoint_path(folder, checkpoint["step"])
    write_atomically(path, lambda file: torch.save({**checkpoint, "format": FORMAT}, file))
    write_atomically(path.with_name("latest"), lambda file: file.write(path.name.encode()))
    return path


def named_tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries, lists and tuples, with their paths."""
    if torch.is_tensor(value):
        return [(name, value)]
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    inner = value.items() if isinstance(value, dict) else ()
    return [pair for key, part in inner for pair in named_tensors(part, f"{name}.{key}".lstrip("."))]


def prune_checkpoints(folder: str | Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete all but the newest `keep_last` (0: delete none) and multiples of `keep_every` steps; which."""
    old = list_checkpoints(folder)[keep_last:] if keep_last > 0 else []
    old = [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]
    for path in old:
        remove(path)
    return old


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, so that training waits only for a copy of its state.

        writer = CheckpointWriter("log", keep_last=3)
        writer.save(checkpoint)     # returns after the copy; the next save waits for this one to be written
        error = writer.wait()       # the last save's exception, or None

    A save that fails (disk full, no memory, values not finite) says so at once through `say`, leaves the
    checkpoints there were, and does not stop the training; wants_retry() says when to try again. Old ones are
    deleted (prune_checkpoints) only after the new one has been read back and found good.

    rank, savers: where rank 0 alone has all that is saved, the other ranks' save() does nothing; with a
    process group for it (Layout.savers) all ranks save together, each its part, to a folder (sharded.py), and
    a save succeeds on all or fails on all, of which the threads learn a moment apart. On CUDA the copy for a
    single file goes to pinned memory, which is kept for the next.
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 0, keep_every: int = 0, say: Callable = print,
        rank: int = 0, savers: Any = None, retry_s: float = 60,
    ):  # fmt: skip
        self.folder, self.keep_last, self.keep_every, self.say = Path(folder), keep_last, keep_every, say
        self.rank = rank
        self.saver = sharded.Saver(savers, self.folder) if savers is not None else None
        self.path: Path | None = None  # the newest checkpoint that was written
        self.error: Exception | None = None  # of the last save
        self.retry_s, self.tried_at, self.tries_left = retry_s, 0.0, 10
        self.seconds = 0.0  # that the last save took in the thread
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: dict, before: Callable[[], None] = lambda: None) -> float:
        """Start writing; before() runs first, in the thread. Returns the seconds training stood still."""
        begin = self.tried_at = time.perf_counter()
        self.wait()
        if self.saver is None and self.rank != 0:
            return 0.0
        try:
            if self.saver is not None:
                write = partial(self.saver.commit, self.saver.stage(checkpoint))
            else:
                used: dict[tuple, torch.Tensor] = {}
                write = partial(save_checkpoint, self._copy(checkpoint, used), self.folder)
                self._buffers = used
        except Exception as error:  # as of those that arise in the thread
            self._failed(checkpoint["step"], error)
            return time.perf_counter() - begin
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pause = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._write, args=(checkpoint["step"], write, before, pause), name="checkpoint"
        )
        self._thread.start()
        return pause

    def wait(self) -> Exception | None:
        """Wait until what is being written is on the disk; the exception of the last save, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error

    def wants_retry(self) -> bool:
        """Whether the last save failed, as on a full disk, and there was no other for retry_s seconds."""
        return self._may_succeed() and time.perf_counter() - self.tried_at > self.retry_s

    def _may_succeed(self) -> bool:
        return self.error is not None and not isinstance(self.error, NotFiniteError)

    def wants_last_retry(self, stop: bool) -> bool:
        """After a run's last save, whether to save once more, for which this has waited until retry_s seconds
        have gone by. Not if `stop`, nor more than ten times."""
        self.wait()
        if stop or self.tries_left == 0 or not self._may_succeed():
            return False
        self.tries_left -= 1
        left = self.retry_s - (time.perf_counter() - self.tried_at)
        self.say(f"without it the run is lost: make room in {self.folder}; next try in {max(left, 0):.0f} s")
        time.sleep(max(left, 0))
        return True

    def _copy(self, value: Any, used: dict) -> Any:
        """`value` with its tensors copied to the host, into the buffers of the last time where they fit.

        Tensors that are the same memory (tied embeddings) share a copy, so that the file has them once.
        """
        if torch.is_tensor(value):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            if key not in used:
                buffer = self._buffers.get(key)
                if buffer is None:
                    buffer = torch.empty_like(
                        value, device="cpu", pin_memory=value.is_cuda, requires_grad=False
                    )
                used[key] = buffer.copy_(value.detach(), non_blocking=value.is_cuda)
            return used[key]
        if isinstance(value, dict):
            return {key: self._copy(inner, used) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(inner, used) for inner in value)
        return value

    def _write(self, step: int, write: Callable[[], Path], before: Callable[[], None], pause: float) -> None:
        begin = time.perf_counter()
        together = self.saver.together if self.saver is not None else lambda work: work()
        try:
            together(before)
            path = write()
            together(partial(self._accept, path))
        except Exception as error:  # whatever it is, training goes on
            return self._failed(step, error)
        self.path, self.error = path, None
        self.seconds = time.perf_counter() - begin
        took = f"{self.seconds:.2f} s, training paused {1000 * pause:.0f} ms"
        if self.rank == 0:
            size = sum(file.stat().st_size for file in (path, *path.glob("*")) if file.is_file())
            self.say(f"step {step}: saved {self.path} ({size / 1e6:.0f} MB in {took})")

    def _accept(self, path: Path) -> None:
        if self.saver is not None and self.rank == 0:
            write_atomically(self.folder / "latest", lambda file: file.write(path.name.encode()))
        if self.keep_last > 0 and self.rank == 0:
            verify_checkpoint(path)
            prune_checkpoints(self.folder, self.keep_last, self.keep_every)

    def _failed(self, step: int, error: Exception) -> None:
        error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold the copy
        self.error = error
        try:
            last = self.path or next(iter(list_checkpoints(self.folder)), "none yet")
        except OSError:  # the disk may be why it failed
            last = "unknown"
        text = str(error) or repr(error)
        self.say(f"step {step}: WARNING: CHECKPOINT NOT WRITTEN: {text}. Training goes on; newest: {last}")


# ---------------------------------------------------------------------------- READ


def verify_checkpoint(path: str | Path) -> None:
    """Read all of a checkpoint and compare it with its checksums.

    CheckpointError: it is damaged; FileNotFoundError; another OSError, naming the file, if it cannot be read
    for want of memory or permission, or because of the disk: that says nothing against it.
    """
    path = Path(path)
    if path.is_dir():
        return sharded.verify(path)
    try:
        with open(path, "rb") as file:
            check_archive(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such checkpoint; `ls {path.parent}/model_*` shows those there are"
        ) from None
    except Exception as error:  # whatever a damaged archive provokes: BadZipFile, zlib.error, struct.error
        raise judge(error, path, "not a checkpoint, or damaged, or cut off") from error


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if it is a file."""
    return Path(folder) / f"model_{step:05d}.pt"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(path.name)[1])


def follow_latest(path: str | Path) -> Path:
    """The path itself, or for log/latest the checkpoint it names. CheckpointError if it names none."""
    path = Path(path)
    if (path / "latest").is_file() and not (path / sharded.INDEX).is_file():
        raise CheckpointError(f"{path} is the folder of a run; its newest checkpoint is {path / 'latest'}")
    if path.name != "latest" or not path.is_file():
        return path
    name = path.read_bytes().decode(errors="replace").strip()
    if not NAME.fullmatch(name):  # a name out of a file is no path before it looks like ours
        raise CheckpointError(f"{path} holds {name[:40]!r}, no checkpoint's name; give the checkpoint itself")
    return path.with_name(name)


def load_checkpoint(path: str | Path, whole: bool = True, trusted: bool = False) -> dict:
    """The verified dictionary, tensors on the CPU; of log/latest that of the checkpoint it names.

    Of a folder, whole=False gives all but the weights and moments, which `restore` reads, each rank its part;
    trusted=True: without reading the folder's files, which another rank has verified. CheckpointError says
    what is wrong with the file; FileNotFoundError, OSError as in verify_checkpoint.
    """
    path = follow_latest(path)
    if not (trusted and path.is_dir()):
        verify_checkpoint(path)
    if path.is_dir():
        return sharded.load(path) if whole else sharded.read_rest(path)
    try:
        with open(path, "rb") as file:  # by its name, torch would hide the system's errors
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets a foreign file in many ways
        raise judge(error, path, "torch.load cannot read it safely") from error
    kinds = {"model": dict, "config": dict, "step": int}
    if not isinstance(checkpoint, dict) or any(
        not isinstance(checkpoint.get(name), kind) for name, kind in kinds.items()
    ):
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt_moe.py: it lacks model, config or step")
    sharded.check_format(path, checkpoint.get("format", FORMAT))
    return checkpoint


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in the folder, newest (most steps) first; they may be damaged.

    OSError if the folder is there but cannot be read: glob would find nothing in it.
    """
    try:
        found = [Path(folder, name) for name in os.listdir(folder) if NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [path for path in found if path.is_dir() != (path.suffix == ".pt")]
    return sorted(found, key=step_of, reverse=True)


def load_newest(folder: str | Path, warn: Callable = print, whole: bool = True) -> tuple[Path, dict] | None:
    """The newest undamaged checkpoint in the folder and its content, or None; warns of each damaged one.
    whole: as in load_checkpoint.

    NewerFormatError, and OSError as in verify_checkpoint: to go on from an older checkpoint because this
    program is old, or memory is short, or the disk does not answer now, would lose work.
    """
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path, whole)
        except NewerFormatError:
            raise
        except (CheckpointError, FileNotFoundError) as error:
            warn(f"WARNING: skipping {error}")
    return None


# ---------------------------------------------------------------------------- RESUME

# A resumed run keeps all settings that are not given anew, except these: where things are, what it runs on.
NOT_KEPT = {
    "preset", "log_dir", "resume", "init_from", "device", "parallel", "zero_stage", "ep_size",
    "activation_checkpointing",
}  # fmt: skip
# Settings that cannot change in the middle of a run: the stream of samples, the optimizer's state, ...
FIXED = {"T", "seed", "shuffle", "optimizer"}
# ... and the architecture, except what touches nothing that has been learned.
MAY_CHANGE = {
    "dropout", "infer_step", "use_cache", "moe_loss_coef", "router_z_loss_coef", "router_bias_update_rate",
}  # fmt: skip
FIXED |= set(inspect.get_annotations(GPTConfig)) - MAY_CHANGE


def find_resumed(resume: str, log_dir: str, world: Any, say: Callable) -> tuple[Path | None, dict | None]:
    """(path, content) of the checkpoint to go on from: `resume`, or if "auto" the newest good one in log_dir.

    (None, None) to start afresh. All ranks take the one that the first has found: others may see an older
    state of a shared disk. CheckpointError, FileNotFoundError.
    """
    if not resume:
        return None, None
    if resume != "auto":
        path = follow_latest(resume)
        return path, load_checkpoint(path, whole=False, trusted=not world.is_master)
    path, state = (load_newest(log_dir, say, whole=False) if world.is_master else None) or (None, None)
    found = [step_of(path), path.is_dir()] if path else [0, 0]
    step, is_folder = world.sum(torch.tensor(found, device=world.device)).tolist()
    if step > 0 and not world.is_master:
        path = checkpoint_path(log_dir, step)
        path = path.with_suffix("") if is_folder else path
        state = load_checkpoint(path, whole=False, trusted=True)
    return path, state


def keep_settings(config: Any, given: set[str], state: dict, path: Path, say: Callable = print) -> None:
    """Make the settings of a resumed run those of its checkpoint, but for flags, where these may change them.

    config: the run's dataclass, changed in place; given: the settings that flags have set. CheckpointError if
    the checkpoint holds no run; ValueError for a flag that would make it another run.
    """
    missing = {"optimizer", "loader", "rng", "train_config", "val_loss", "elapsed_s", "health"} - state.keys()
    if missing:
        raise CheckpointError(
            f"{path}: no {', '.join(sorted(missing))} in it: weights to begin a new run with (--init_from), "
            "not a run to go on with (--resume)"
        )
    saved = state["train_config"] | {name: state["config"][name] for name in FIXED & state["config"].keys()}
    for name in ("parallel", "zero_stage", "ep_size", "activation_checkpointing"):
        now = getattr(config, name)
        if name not in given and saved.get(name, now) != now:
            say(f"resume: {name} was {saved[name]!r} and is {now!r}; --{name} {saved[name]} would keep it")
    unlike = []
    for field in dataclasses.fields(config):
        name, now = field.name, getattr(config, field.name)
        if name in NOT_KEPT or name not in saved:
            continue
        derived = name in ("block_size", "vocab_size") and now <= 0
        if name not in given or derived:
            setattr(config, name, saved[name])
            if now != saved[name] and name not in FIXED:
                unlike.append(f"{name}={saved[name]!r}")
        elif now != saved[name] and name in FIXED:
            raise ValueError(
                f"resume: {name}={saved[name]!r} in {path}, but --{name} {now!r} now; leave the flag away, "
                f"or start another run from these weights (--init_from {path})"
            )
        elif now != saved[name]:
            say(f"resume: {name} was {saved[name]!r} and is {now!r} from step {state['step']} on")
    if unlike:
        say(f"resume: as in the checkpoint, not as here: {', '.join(unlike)}; flags change them")
    if config.max_steps < state["step"]:
        raise ValueError(
            f"resume: {path} has done {state['step']} steps already, but max_steps={config.max_steps}; give "
            "more, or --resume an earlier checkpoint"
        )


def restore(state: dict, model: GPTLMHeadModel, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    """Put weights, moments, routers' statistics, position in the data and random state where they were.

    ValueError, naming what differs, if the data or the architecture is another one; what torch raises if
    memory is short. Learning rate, weight decay and the like stay those the optimizer was made with: flags
    may have changed them.
    """
    loader.load_state_dict(state["loader"])
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        if "folder" in state:
            state = sharded.read_parts(state, model, optimizer)
        model.load_state_dict(sharded.cut_weights(state["model"], model))
        optimizer.load_state_dict(sharded.cut_moments(state["optimizer"], optimizer))
    except (RuntimeError, KeyError, IndexError) as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(f"resume: weights or optimizer state do not fit: {error}") from error
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    if hasattr(optimizer, "optim"):  # ZeroRedundancyOptimizer: the one inside has this rank's share
        optimizer.state.clear()  # a second copy of the moments
        optimizer = optimizer.optim
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            moments = optimizer.state.get(parameter, {})
            if "step" in moments:  # may be on the CPU (ZeRO, or not fused when it was saved): refused on CUDA
                moments["step"] = moments["step"].to(parameter.device)
    torch.set_rng_state(state["rng"])


# ---------------------------------------------------------------------------- MODELS


def begin_from(init_from: str, fields: dict, given: set[str], T: int) -> GPTLMHeadModel:
    """A model to train with the weights of `init_from`, which load_model knows; with experts, each a copy of
    the MLP, if use_moe=True was asked for and it has none.

    The architecture is that of init_from. fields: what GPTConfig would be made of without it; given: those of
    them that flags have set, which may not contradict it, but for dropout, the losses' weights, a shorter
    block_size, and what upcycling needs. ValueError naming the field and both values.
    """
    source = load_model(init_from)
    theirs = source.config
    if theirs.encoding != fields["encoding"]:
        raise ValueError(
            f"encoding={theirs.encoding!r} in init_from={init_from}, but {fields['encoding']!r} in the data; "
            + (
                'write the right one into its config.json, as "encoding"'
                if theirs.encoding == "unknown"
                else f"tokenise the text again with `python fineweb.py --encoding {theirs.encoding}`"
            )
        )
    upcycles = "use_moe" in given and fields["use_moe"] and not theirs.use_moe
    may_differ = MAY_CHANGE | {"moe_loss", "moe_loss_type", "block_size"}
    if upcycles:
        may_differ |= {"use_moe", "num_experts", "num_experts_per_tok", "moe_every", "router_score"}
        may_differ |= {"norm_topk_prob", "num_shared_experts", "expert_hidden_size"}
    for name in sorted(given & fields.keys() - may_differ):
        if fields[name] != getattr(theirs, name):
            raise ValueError(
                f"{name}={fields[name]!r}, but init_from={init_from} has {name}={getattr(theirs, name)!r}; "
                "leave the flag away"
            )
    if theirs.block_size < T:
        raise ValueError(f"T={T}, but init_from={init_from} has block_size={theirs.block_size}; lower --T")
    changed = {name: fields[name] for name in given & may_differ & fields.keys() if name != "block_size"}
    changed["infer_step"] = fields["infer_step"]  # of the run, not of the model
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


def model_from_checkpoint(checkpoint: dict) -> GPTLMHeadModel:
    """The model of a loaded checkpoint, in evaluation mode on the CPU. CheckpointError if they do not fit."""
    try:
        model = GPTLMHeadModel(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        if out_of_memory(error):
            raise
        message = " ".join(str(error).split())
        raise CheckpointError(f"its config and its weights make no model of ours: {message}") from error
    return model.eval()


def load_model(source: str | Path) -> GPTLMHeadModel:
    """A model from a checkpoint file, a folder (any that from_pretrained knows) or a hub name such as "gpt2".

    Evaluation mode, CPU. CheckpointError, FileNotFoundError; what transformers raises for a bad folder or
    name.
    """
    path = Path(source)  # without a slash at the end
    ours = any((path / name).is_file() for name in (sharded.INDEX, "latest"))
    if ours or path.suffix in (".pt", ".pth", ".bin") or path.is_file():
        return model_from_checkpoint(load_checkpoint(source))
    return GPTLMHeadModel.from_pretrained(str(source)).eval()


def convert_checkpoint(source: str | Path, to: str | Path) -> None:
    """Write a checkpoint as a single file (`to` ends with .pt) or as a folder; needs memory for all of it.

    CheckpointError, FileNotFoundError; FileExistsError: nothing is overwritten.
    """
    checkpoint, to = load_checkpoint(source), Path(to)
    if to.exists():
        raise FileExistsError(f"{to}: there is something already; give another name")
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".pt":
        write_atomically(to, lambda file: torch.save(checkpoint, file))
    else:
        sharded.save(checkpoint, to)
