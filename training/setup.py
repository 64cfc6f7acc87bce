"""Make everything that a run needs from its settings: data, layout, model, optimizer, resumed state, log.
`config` is train_gpt_moe.py's TrainConfig throughout."""

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from fineweb import DataConfig, build
from layers.attention import BACKENDS, choose_backend, positions_in_documents
from model import GPTConfig, GPTLMHeadModel
from tokens.demo import prepare_demo
from tokens.mixtures import MixtureLoader, parse_mixture, parse_named, read_metas
from tokens.packing import DocumentLoader
from tokens.shards import DistributedDataLoader
from training import checkpoints as ckpt
from training import faults, parallel, profiler
from training.diagnostics import Diagnostics
from training.evaluation import can_sample, evaluates_at, table_of_bytes, validation_sets
from training.flags import check_limits
from training.fsdp_init import initial_weights
from training.log import RunLog, run_record
from training.optimizers import build_optimizer
from training.preflight import preflight
from training.terminal import tell


@dataclass
class Run:
    """Everything that a training step and the loop use."""

    config: Any
    layout: parallel.Layout
    model: GPTLMHeadModel
    optimizer: torch.optim.Optimizer
    train_loader: DistributedDataLoader
    accumulation: int = 1  # micro-steps per optimizer step
    dtype: str = "float32"  # of matrix products
    val_sets: dict = field(default_factory=dict)  # {name: (loader, share in val_loss)}, see validation_sets
    resumed: dict = field(default_factory=dict)  # the checkpoint it continues, without weights and moments
    resumed_from: Path | None = None
    log: RunLog | None = None  # on the master only
    hellaswag: bool = False  # whether HellaSwag is scored
    samples: bool = False  # whether text is sampled
    token_bytes: torch.Tensor | None = None  # (vocabulary,) bytes that a token stands for; None if unknown
    trains: bool = True  # False: llm.c's --inference_only
    updating: bool = False  # True while weights and optimizer state belong to different steps
    diagnosis: str = ""  # why the run cannot continue
    say: Callable[[str], None] = tell

    def __post_init__(self):
        device = self.layout.world.device
        self.parallel_model = parallel.wrap(self.model, self.layout, self.accumulation)
        self.health = faults.Health(self.resumed.get("health"))
        self.diagnostics = Diagnostics(self.resumed.get("diagnostics"))
        self.signals = faults.Signals(talkative=self.layout.world.is_master)
        # float16 loses small gradients: the scaler scales the loss up, and adapts (arXiv 1710.03740, 3.2).
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == "float16")
        if self.resumed.get("scaler"):
            self.scaler.load_state_dict(self.resumed["scaler"])

    def autocast(self) -> torch.autocast:
        """Matrix products in self.dtype; parameters, norms, routers and losses stay in fp32."""
        device = self.layout.world.device.type
        return torch.autocast(device, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    def positions(self, x: torch.Tensor) -> torch.Tensor | None:
        """With document_mask: each token's position in its document, (B, T), for inputs x (B, T)."""
        if not self.config.document_mask:
            return None
        return positions_in_documents(x == self.model.config.bos_token_id)  # <|endoftext|> begins documents

    def start_clock(self, say: Callable[[str], None]) -> None:
        """Start the clock of training. From now on the run prints through `say`."""
        before = self.log.elapsed_s if self.log else 0.0  # with the evaluation after the last save
        self.started = time.perf_counter() - max(self.resumed.get("elapsed_s", 0.0), before)
        self.say = say
        if self.log:
            self.log.say = say

    def elapsed(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return time.perf_counter() - self.started


def set_up(config: Any, given: set[str], world: parallel.World) -> Run:
    """Prepare a run, except its log files. given: the settings that flags have set. ValueError, OSError:
    settings, data or files that cannot be used."""
    print0 = tell if world.is_master else lambda text: None
    if not world.is_master:  # the master prints the same warnings
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
    if config.resume not in ("", "auto") and "log_dir" not in given:
        config.log_dir = str(Path(config.resume).parent)
    path, state = ckpt.find_resumed(config, world, print0)
    if state:
        ckpt.keep_settings(config, given, state, path, print0)
    dtype = choose_dtype(config, world.device)
    accumulation = check_config(config, world, None if state else given, print0)
    if config.use_compile:
        parallel.check_compiler(world.device)
    meta = read_data(config, world, print0)
    train_loader, val_sets = build_loaders(config, world, meta)
    world.check_equal("training data", meta | train_loader.state_dict())  # and fingerprints of validation's
    if state:
        world.check_equal("checkpoints", {"step": state["step"]})
    layout = parallel.make_layout(world, config.parallel, config.zero_stage, config.ep_size)
    model = place_model(config, build_model(config, given, meta, state, print0), layout, dtype, state)
    if config.tensorcores and dtype == "float32":  # with bfloat16, TF32 would only make routers less exact
        torch.set_float32_matmul_precision("high")
    optimizer = parallel.share_optimizer(build_optimizer(config, model), layout)
    resumed = {}
    if state:
        ckpt.restore(state, model, optimizer, train_loader, path)
        before = state.get("world_size", world.size)
        if before != world.size:
            print0(f"resume: processes were {before} and are {world.size} from step {state['step']} on")
        print0(f"resumed {path} at step {state['step']}")
        resumed = {k: value for k, value in state.items() if k not in ("model", "optimizer", "index")}
    samples = can_sample(config, model, layout, print0)
    model.loss_chunk = config.loss_chunk
    if not config.flash:
        model.set_attn_implementation("eager")
    agree_on_backend(config, model, world, dtype, print0)
    if config.use_compile:
        parallel.compile_blocks(model, layout)
    return Run(
        config, layout, model, optimizer, train_loader, accumulation, dtype, val_sets, resumed, path,
        hellaswag=config.hellaswag and (model.config.encoding == "gpt2" or bool(config.hellaswag_data)),
        samples=samples, token_bytes=table_of_bytes(meta, layout) if val_sets else None,
    )  # fmt: skip


def open_log(run: Run) -> None:
    """Before the first step the master opens the log files, and prints a table of what the run needs."""
    config, model, world = run.config, run.model, run.layout.world
    world.barrier()  # all ranks have read their files: the master may now move an old run's files
    if world.is_master:
        first_step = run.resumed.get("step", 0)
        files = Path(config.log_dir), run.resumed_from, first_step, config.tensorboard
        wandb = config.wandb_project or (os.environ.get("WANDB_PROJECT", "gpt-moe") if config.wandb else "")
        more = dict(evaluates_first=evaluates_at(first_step, config), say=tell)
        run.log = RunLog(*files, wandb, record=run_record(config, model, world, first_step), **more)
        tokens, kept = run.train_loader.num_tokens, run.train_loader.kept
        val_tokens = min((loader.num_tokens for loader, _ in run.val_sets.values()), default=None)
        left = (config.max_steps - first_step) * config.total_batch_size // config.T  # samples
        more = val_tokens, run.train_loader.progress(run.train_loader.position + left), kept
        table, cautions = preflight(config, model, run.accumulation, world, tokens, run.dtype, *more)
        tell("\n".join([table, *(f"WARNING     {text}" for text in cautions)]))
    if world.device.type == "cuda":  # the peak of the set-up does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)


# ---------------------------------------------------------------------------- SETTINGS
def check_config(config: Any, world: parallel.World, given: set[str] | None = None, say=print) -> int:
    """The number of micro-steps per optimizer step. Fills in settings that follow from others (min_lr, and a
    shorter warmup than the default or preset one, if max_steps is not above it).
    given: the settings that flags have set; None for a resumed run, which keeps its settings. ValueError,
    naming field and value, for settings that cannot work."""
    check_limits(config)
    if not config.log_dir.strip():
        raise ValueError("log_dir='': name a folder, such as --log_dir log")
    check_layout(config, world)
    profiler.parse(config.profile, config.max_steps)
    if config.learning_rate_decay_frac is not None:
        config.min_lr = config.learning_rate_decay_frac * config.max_lr
        config.learning_rate_decay_frac = None
    if config.min_lr is None:
        config.min_lr = float(f"{config.max_lr / 10:.12g}")  # a tenth of 6e-4 is 6e-5, not 5.9999...e-5
    if config.min_lr > config.max_lr:
        raise ValueError(f"min_lr={config.min_lr} is more than max_lr={config.max_lr}; lower --min_lr")
    warmup, steps = config.warmup_steps, config.max_steps
    if 0 < steps <= warmup:
        if given is None or "warmup_steps" in given:
            raise ValueError(f"warmup_steps={warmup} must be below max_steps={steps}; lower --warmup_steps")
        config.warmup_steps = steps // 10  # of a default or preset warmup
        say(f"warmup_steps={config.warmup_steps}, not {warmup}: max_steps={steps} (--warmup_steps sets it)")
    if config.block_size and config.T > config.block_size:
        raise ValueError(f"T={config.T} is more than block_size={config.block_size}; give a smaller --T")
    batch, per_micro_step = config.total_batch_size, config.B * config.T * world.size
    if batch % per_micro_step != 0:
        product = f"B * T * processes = {config.B} * {config.T} * {world.size} = {per_micro_step}"
        nearest = max(1, round(batch / per_micro_step)) * per_micro_step
        mend = f"the nearest that is: --total_batch_size {nearest}"
        raise ValueError(f"total_batch_size={batch} is not a multiple of {product}; {mend}")
    return batch // per_micro_step


def choose_dtype(config: Any, device: torch.device) -> str:
    """The dtype of matrix products. ValueError for one that torch.compile cannot use on this GPU."""
    on_cuda, dtype = device.type == "cuda", config.dtype  # it stays "auto", for a resume on another device
    capability = torch.cuda.get_device_capability(device) if on_cuda else (0, 0)
    if on_cuda and capability < (8, 0) and dtype == "bfloat16" and config.use_compile:
        problem = "needs compute capability 8.0, but this GPU has {}.{}".format(*capability)
        mend = "use --dtype float16, or --use_compile False"
        raise ValueError(f"dtype=bfloat16 with use_compile=True {problem}; {mend}")
    if dtype != "auto":
        return dtype
    if capability >= (8, 0):
        return "bfloat16"
    return "float16" if on_cuda and config.parallel != "fsdp" and config.ep_size == 1 else "float32"


def check_layout(config, world: parallel.World) -> None:
    """ValueError for layouts that cannot be combined, or that this number of processes cannot have."""
    fsdp, zero, ep_size = config.parallel == "fsdp", config.zero_stage > 0, config.ep_size
    shares = ", which already shards the optimizer state; omit --zero_stage" if fsdp else ""
    for is_wrong, text in (
        ((fsdp or zero) and not dist.is_initialized(), f"{'parallel=fsdp' if fsdp else 'zero_stage=1'} needs "
            "processes: type `torchrun --nproc_per_node=1` (or more) in place of `python`"),
        (zero and config.parallel != "ddp",
            f"zero_stage=1 works with --parallel ddp only, but parallel={config.parallel}{shares}"),
        (zero and ep_size > 1,
            f"zero_stage=1 needs the same parameters on all ranks, but with ep_size={ep_size} ranks hold "
            "different experts; use --parallel fsdp with --ep_size to shard the optimizer state too"),
        (config.dtype == "float16" and (fsdp or ep_size > 1),
            "dtype=float16 checks all gradients for overflow, but with --parallel fsdp or --ep_size no rank "
            "holds them all; use --dtype bfloat16"),
        (ep_size > 1 and config.parallel == "none",
            f"ep_size={ep_size} needs several processes, but parallel=none; use --parallel ddp"),
        (world.size % ep_size != 0,
            f"the number of processes, {world.size}, is not a multiple of ep_size={ep_size}"),
    ):  # fmt: skip
        if is_wrong:
            raise ValueError(text)
    if not config.init_from:  # otherwise the loaded model decides about experts
        check_experts(config, ep_size)


def check_experts(config, ep_size: int) -> None:
    """ValueError if ep_size ranks cannot share the experts. config: a run's or a model's."""
    if ep_size > 1 and not config.use_moe:
        raise ValueError(f"ep_size={ep_size} shares experts among ranks, but use_moe=False: there are none")
    if ep_size > 1 and config.num_experts % ep_size != 0:
        raise ValueError(f"num_experts={config.num_experts} is not a multiple of ep_size={ep_size}")


# ---------------------------------------------------------------------------- DATA
def read_data(config: Any, world: parallel.World, say: Callable) -> dict:
    """meta.json of the data; first makes the shards of --text or the demo. FileNotFoundError, ValueError."""
    if config.text and config.input_bin:
        raise ValueError(f"input_bin={config.input_bin!r} and text={config.text!r}: give one of them")
    if config.text:
        config.data_dir = os.path.join(config.log_dir, "data")
        if world.is_master:
            if not (os.path.exists(config.text) or glob(config.text, recursive=True)):
                raise FileNotFoundError(f"text={config.text!r} is no file or folder here")
            try:
                build(DataConfig(source=config.text, encoding="bytes", out=config.data_dir))
            except ValueError as error:
                problem = str(error).replace("another --out", "another --log_dir")
                make = "run `python fineweb.py --source TEXT --encoding bytes --out FOLDER`"
                mend = f"For flags of fineweb.py {make}, then give --data_dir FOLDER"
                raise ValueError(f"text: {problem}. {mend}") from error
            except OSError as error:
                if error.filename or not error.errno:
                    raise
                raise OSError(error.errno, error.strerror, config.data_dir) from error  # a full disk
        world.barrier()
    elif config.preset == "demo" and config.data_dir == "demo_data" and not config.input_bin:
        say("Demo: a small GPT with 8 experts learns the documentation of Python, byte by byte.")
        if world.is_master:
            prepare_demo(config.data_dir)
        world.barrier()
    folders = [config.data_dir] if config.input_bin else parse_mixture(config.data_dir)
    return read_metas([*folders, *parse_named(config.val).values()], config.input_bin, config.vocab_size)


def build_loaders(config: Any, world: parallel.World, meta: dict) -> tuple[DistributedDataLoader, dict]:
    """(training loader, validation_sets). With input_bin alone there is no validation, as in llm.c."""
    weights = {} if config.input_bin else parse_mixture(config.data_dir)  # by folder
    arguments = dict(B=config.B, T=config.T, rank=world.rank, world_size=world.size, device=world.device)
    arguments |= dict(vocab_size=meta["vocab_size"])
    if meta["eot_token"] is None and (config.align or config.document_mask):
        name = "align='documents'" if config.align else "document_mask=True"
        raise ValueError(f"{name}: no token of encoding={meta['encoding']!r} begins a document; omit it")
    order, make = dict(seed=config.seed, shuffle=config.shuffle), DistributedDataLoader
    if config.align == "documents":
        make = functools.partial(DocumentLoader, eot_token=meta["eot_token"])
    if len(weights) > 1:
        train_loader = MixtureLoader(weights, **order, **arguments, make=make)
    else:
        train_loader = make(config.input_bin or config.data_dir, **order, **arguments)
    val_sets = validation_sets(config, weights, arguments)
    for name, (loader, _) in val_sets.items():
        train_loader.watch(loader, f"validation/{name}".rstrip("/"))
    return train_loader, val_sets


# ---------------------------------------------------------------------------- MODEL
def build_model(config, given: set[str], meta: dict, resumed: dict | None, say=print) -> GPTLMHeadModel:
    """The model to train, on the CPU: the resumed checkpoint's, or new, or with the weights of init_from.
    With parallel="fsdp" and no init_from it is on the meta device, without weights, because it may be larger
    than the memory. ValueError for settings that contradict each other, the data, or init_from."""
    names = vars(config).keys() & set(GPTConfig.__annotations__)
    fields = {name: getattr(config, name) for name in names}
    of_data = dict(encoding=meta["encoding"], encoding_size=meta["vocab_size"])
    # Documents begin with <|endoftext|>, and so does an empty prompt.
    of_data |= dict(bos_token_id=meta["eot_token"], eos_token_id=meta["eot_token"])
    if resumed:
        encoding, size = (resumed["config"][name] for name in ("encoding", "vocab_size"))
        if (encoding, size) == ("nanogpt", meta["vocab_size"]):  # the data name the encoding
            resumed["config"] |= of_data
        elif encoding != meta["encoding"]:
            unlike = f"encoding={encoding!r} in the checkpoint, but {meta['encoding']!r} in the data"
            mend = "give the data it was trained with, or start a new run"
            raise ValueError(f"resume: {unlike}; {mend}")
        changed = {name: fields[name] for name in names & ckpt.MAY_CHANGE}
        return new_model(GPTConfig(**(resumed["config"] | changed)), config.parallel)
    fields |= of_data
    if config.ngram_order < 0:
        config.ngram_order = fields["ngram_order"] = 6 if meta["encoding"] == "bytes" else 0
    fields["block_size"] = config.block_size or config.T
    # A multiple of 128 is fast. -1: no padding. The padding's logits change the first loss by 0.001.
    multiple = 1 if config.vocab_size < 0 else 128
    rounded = multiple * math.ceil(meta["vocab_size"] / multiple)
    fields["vocab_size"] = max(config.vocab_size, 0) or rounded
    if fields["vocab_size"] < meta["vocab_size"]:
        theirs = f"the data's encoding {meta['encoding']!r} has {meta['vocab_size']} tokens"
        raise ValueError(f"vocab_size={config.vocab_size}, but {theirs}; omit --vocab_size")
    torch.manual_seed(config.seed)
    if not config.init_from:
        return new_model(GPTConfig(**fields), config.parallel)
    given = {name for name in given if name not in ("vocab_size", "block_size") or getattr(config, name)}
    model = ckpt.begin_from(config.init_from, fields, given, config.T)
    if meta["eot_token"] is not None:  # a model of others may begin documents with another token
        model.config.bos_token_id = meta["eot_token"]
    unlike = []
    for name in sorted(names):  # the settings take the model's values
        before, value = getattr(config, name), getattr(model.config, name)
        setattr(config, name, value)
        unlike += [f"{name}={value!r}"] * (value != before and before not in ckpt.DERIVED.get(name, ()))
    more = "" if config.use_moe or "use_moe" in given else "; --use_moe True turns its MLPs into experts"
    say(f"init_from: settings from the model: {', '.join(unlike) or 'none'}{more}")
    check_experts(model.config, config.ep_size)
    return model


def new_model(config: GPTConfig, parallel: str) -> GPTLMHeadModel:
    """A model with random weights, or with parallel="fsdp" on the meta device, without weights."""
    with torch.device("meta" if parallel == "fsdp" else "cpu"):
        return GPTLMHeadModel(config)


def place_model(config, model: GPTLMHeadModel, layout, dtype: str, resumed: dict | None) -> GPTLMHeadModel:
    """Move the model to this rank's device: all of it, or the part that the layout gives this rank."""
    weights: Iterator = iter(())
    if layout.parallel == "fsdp" and model.device.type != "meta":
        weights, model = iter(model.state_dict().items()), new_model(model.config, "fsdp")
    elif layout.parallel == "fsdp" and resumed is None:  # a resumed run loads its weights later
        weights = initial_weights(model.config, config.seed)
    parallel.place(model, layout, dtype, weights)
    if config.activation_checkpointing == "block":
        newer = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        newer({"use_reentrant": False})
    return model


def agree_on_backend(config: Any, model: GPTLMHeadModel, world: Any, dtype: str, say: Callable) -> None:
    """Set config.attention_backend to the master's choice on all ranks. A resumed run then rounds alike."""
    shape = model.config, config.B, config.T
    if backend := choose_backend(config.attention_backend, *shape, world.device, getattr(torch, dtype)):
        index = torch.tensor(list(BACKENDS).index(backend) * world.is_master, device=world.device)
        config.attention_backend = list(BACKENDS)[world.sum(index).item()]
        say(f"attention   {config.attention_backend}")
