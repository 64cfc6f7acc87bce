"""Train a GPT, dense or with Mixture-of-Experts layers, from token shards to evaluated checkpoints.

    python train_gpt_moe.py --preset demo                     # two minutes on a laptop, no data needed
    python fineweb.py                                         # the real data, once
    python train_gpt_moe.py                                   # one GPU
    torchrun --nproc_per_node=8 train_gpt_moe.py              # one machine with 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=IP --master_port=29500 --nproc_per_node=8 train_gpt_moe.py
    python train_gpt_moe.py --resume auto                     # go on where a run stopped
    python train_gpt_moe.py --use_moe False --B 8 --max_steps 100 --use_compile False

Change the constants below or give any of them as a flag (--help lists them). A run writes, under log_dir:
log.txt (STEP train LOSS, STEP val LOSS, STEP hella ACC), metrics.jsonl (one object per step, the first one
the settings of the run), tb/ (TensorBoard), model_XXXXX.pt (checkpoint.py says what is in them).
Exit codes: 0 done, 2 bad settings or data, 1 anything else; 130 and 143 stopped by a signal, after saving.

References: GPT-3, arXiv 2005.14165 (batch size, learning rates, schedule); the 124M recipe on FineWeb-Edu and
its numbers: https://github.com/karpathy/build-nanogpt
"""

import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import checkpoint as ckpt
import parallel
from fineweb import DistributedDataLoader, find_shards, prepare_demo, read_meta
from model import GPTConfig, GPTLMHeadModel
from run_log import RunLog, run_record, set_aside

# ---------------------------------------------------------------------------- CONSTANTS


@dataclass
class TrainConfig:
    preset: str = HfArg(default="", help="a named set of settings: demo or gpt2; flags win over it")
    # --- files
    data_dir: str = HfArg(default="edu_fineweb10B", help="folder with the shards that fineweb.py wrote")
    input_bin: str = HfArg(default="", help="pattern of training shards instead of data_dir/train_*.bin")
    input_val_bin: str = HfArg(default="", help="pattern of validation shards instead of data_dir/val_*.bin")
    log_dir: str = HfArg(default="log", help="where everything is written", aliases=["--output_dir"])
    resume: str = HfArg(default="", help="a checkpoint to go on from; auto = the newest good one in log_dir")
    init_from: str = HfArg(default="", help="weights to begin with: a checkpoint, a folder, gpt2 ... gpt2-xl")
    # --- batch: total_batch_size tokens a step, in micro-steps of B sequences of T tokens on each rank
    total_batch_size: int = HfArg(default=524288, help="tokens per optimizer step; 2**19, GPT-3's 0.5M")
    B: int = HfArg(default=16, help="sequences per micro-step and rank", aliases=["--batch_size"])
    T: int = HfArg(default=1024, help="tokens per sequence", aliases=["--sequence_length"])
    # --- length and schedule
    max_steps: int = HfArg(default=19073, help="optimizer steps: 10B tokens", aliases=["--num_iterations"])
    max_lr: float = HfArg(default=6e-4, help="learning rate after warmup", aliases=["--learning_rate"])
    min_lr: float = HfArg(default=6e-5, help="learning rate at the end of the cosine")
    learning_rate_decay_frac: float | None = HfArg(default=None, help="min_lr as a fraction of max_lr")
    warmup_steps: int = HfArg(default=715, help="of linear warmup: 375M tokens", aliases=["--warmup_iters"])
    # --- optimizer
    optimizer: str = HfArg(default="adamw", help="adamw")
    weight_decay: float = HfArg(default=0.1, help="of matrices and embeddings; biases and norms never decay")
    beta1: float = HfArg(default=0.9, help="AdamW's first beta")
    beta2: float = HfArg(default=0.95, help="AdamW's second beta")
    grad_clip: float = HfArg(default=1.0, help="largest norm of the gradient; 0 = no clipping")
    router_lr_mult: float = HfArg(default=1.0, help="learning rate of the routers, relative to the others'")
    expert_lr_mult: float = HfArg(default=1.0, help="learning rate of the experts, relative to the others'")
    # --- evaluation, samples, checkpoints, log
    infer_step: int = HfArg(default=250, help="steps between evaluations", aliases=["--val_loss_every"])
    val_steps: int = HfArg(default=20, help="validation micro-batches per rank", aliases=["--val_max_steps"])
    sample_every: int = HfArg(default=-1, help="sample every so many steps; -1 = every infer_step, 0 = never")
    prompt: str = HfArg(default="Hello, I'm a language model,", help="what samples begin with")
    sample_tokens: int = HfArg(default=32, help="tokens per sample, prompt included")
    checkpoint_every: int = HfArg(default=5000, help="steps between checkpoints; the last step saves too")
    log_every: int = HfArg(default=1, help="print every so many steps (the log files have them all)")
    tensorboard: bool = HfArg(default=True, help="write log_dir/tb")
    # --- machine
    device: str = HfArg(default="", help="cuda, cuda:1, mps, cpu; empty = the best there is")
    dtype: str = HfArg(default="auto", help="of matrix products: float32, bfloat16; auto = bfloat16 on CUDA")
    tensorcores: bool = HfArg(default=True, help="allow TF32 in fp32 matrix products on CUDA")
    use_compile: bool = HfArg(default=True, help="torch.compile every block", aliases=["--compile"])
    parallel: str = HfArg(default="ddp", help="over processes: ddp, or none for a single one")
    seed: int = HfArg(default=1337, help="of weights, sample order and dropout")
    # --- model (model.py and mixture_of_experts.py say more)
    block_size: int = HfArg(default=0, help="longest sequence the model can take; 0 = T")
    vocab_size: int = HfArg(default=0, help="0 = the data's encoding, rounded up to a multiple of 128")
    n_layer: int = HfArg(default=12, help="blocks")
    n_head: int = HfArg(default=12, help="attention heads")
    n_embd: int = HfArg(default=768, help="width")
    dropout: float = HfArg(default=0.0, help="0 is best when data is seen once")
    bias: bool = HfArg(default=True, help="biases in linear layers and norms")
    mlp_hidden_size: int | None = HfArg(default=None, help="of dense feed-forward layers; None = 4 * n_embd")
    use_moe: bool = HfArg(default=True, help="Mixture of Experts in place of the MLP")
    num_experts: int = HfArg(default=2, help="experts per MoE layer")
    num_experts_per_tok: int = HfArg(default=1, help="experts that each token visits")
    moe_every: int = HfArg(default=1, help="an MoE in every k-th block, counted from the last")
    moe_loss: bool = HfArg(default=True, help="add a balance loss")
    moe_loss_type: str = HfArg(
        default="load_balancing",
        help="load_balancing, variance_penalty, entropy_regularization or diversity_regularization",
    )
    moe_loss_coef: float = HfArg(default=0.01, help="weight of the balance loss, summed over layers")
    router_z_loss_coef: float = HfArg(default=0.0, help="weight of the router z-loss; 0.001 is ST-MoE's")
    router_score: str = HfArg(default="softmax", help="softmax or sigmoid")
    norm_topk_prob: bool = HfArg(default=True, help="make the weights of a token's experts sum to 1 (K > 1)")
    router_bias_update_rate: float = HfArg(default=0.0, help="loss-free balancing; 0.001 is its paper's")
    num_shared_experts: int = HfArg(default=0, help="experts that every token visits besides")
    expert_hidden_size: int | None = HfArg(default=None, help="hidden size of an expert; None = 4 * n_embd")
    position: str = HfArg(default="learned", help="learned or rope")
    rope_theta: float = HfArg(default=10000.0, help="base of the rotary frequencies")
    n_kv_head: int | None = HfArg(default=None, help="key/value heads; None = n_head")
    sliding_window: int | None = HfArg(default=None, help="positions a query sees; None = all before it")
    global_every: int | None = HfArg(default=None, help="with a window: every k-th layer sees everything")
    norm: str = HfArg(default="layernorm", help="layernorm or rmsnorm")
    norm_eps: float = HfArg(default=1e-5, help="added to the variance")
    activation: str = HfArg(default="gelu", help="gelu, relu2 or swiglu")
    qk_norm: bool = HfArg(default=False, help="normalise queries and keys")
    logit_softcap: float = HfArg(default=0.0, help="bound of the logits; 0 = none")
    tie_word_embeddings: bool = HfArg(default=True, help="one matrix for token embedding and head")


# Fields of the model that a resumed run may change: they touch nothing that has been learned.
MAY_CHANGE = {"dropout", "infer_step", "use_cache", "moe_loss_coef", "router_z_loss_coef"}

# Named sets of overrides (--preset NAME); flags win over them.
PRESETS = {
    "gpt2": dict(use_moe=False),  # the faithful 124M
    "demo": dict(
        data_dir="demo_data", log_dir="log/demo", n_layer=4, n_head=4, n_embd=128, num_experts=8,
        num_experts_per_tok=2, expert_hidden_size=256, B=16, T=128, total_batch_size=2048, max_steps=750,
        max_lr=2e-3, min_lr=2e-4, warmup_steps=50, infer_step=250, val_steps=40, sample_tokens=100,
        log_every=25, prompt="Return the ", use_compile=False,
    ),
}  # fmt: skip


def parse_config(arguments: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """The settings, and the names of those that a preset or a flag gave. Exits with code 2 on a bad flag."""
    parser = HfArgumentParser(TrainConfig, allow_abbrev=False, description=__doc__.split("\n\n")[0])
    name = parser.parse_args(arguments).preset
    if name and name not in PRESETS:
        parser.error(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS.get(name, {})
    parser.set_defaults(**preset)
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    # A setting was given as a flag if another default would not have changed it.
    marker = object()
    parser.set_defaults(**{field.name: marker for field in dataclasses.fields(TrainConfig)})
    flags = {name for name, value in vars(parser.parse_args(arguments)).items() if value is not marker}
    return config, flags | set(preset)


def check_config(config: TrainConfig, world: parallel.World) -> int:
    """Number of micro-steps per optimizer step. ValueError, naming field and value, for what cannot work."""
    least = dict(
        B=1, T=1, total_batch_size=1, max_steps=0, max_lr=0, min_lr=0, warmup_steps=0, grad_clip=0,
        weight_decay=0, infer_step=0, val_steps=1, sample_every=-1, sample_tokens=1, checkpoint_every=0,
        log_every=1,
        router_lr_mult=0, expert_lr_mult=0, block_size=0, vocab_size=0,
    )  # fmt: skip
    for name, smallest in least.items():
        if not getattr(config, name) >= smallest:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least {smallest}")
    choices = dict(optimizer=["adamw"], parallel=["ddp", "none"], dtype=["auto", "float32", "bfloat16"])
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose one of {', '.join(allowed)}")
    if config.learning_rate_decay_frac is not None:
        config.min_lr = config.learning_rate_decay_frac * config.max_lr
    if config.min_lr > config.max_lr:
        raise ValueError(f"min_lr={config.min_lr} is more than max_lr={config.max_lr}")
    if 0 < config.max_steps <= config.warmup_steps:
        raise ValueError(f"warmup_steps={config.warmup_steps} leaves nothing of max_steps={config.max_steps}")
    if config.block_size and config.T > config.block_size:
        raise ValueError(f"T={config.T} is more than block_size={config.block_size}")
    per_micro_step = config.B * config.T * world.size
    if config.total_batch_size % per_micro_step != 0:
        raise ValueError(
            f"total_batch_size={config.total_batch_size} is not a multiple of B * T * processes = "
            f"{config.B} * {config.T} * {world.size} = {per_micro_step}; the nearest that is: "
            f"{max(1, round(config.total_batch_size / per_micro_step)) * per_micro_step}"
        )
    return config.total_batch_size // per_micro_step


# ---------------------------------------------------------------------------- DATA, MODEL, SCHEDULE


def build_loaders(config: TrainConfig, world: parallel.World, meta: dict):
    """(training loader, validation loader); the latter reads the same batches whenever it is reset."""
    train_files = config.input_bin or find_shards(config.data_dir, "train")
    val_files = config.input_val_bin or find_shards(config.data_dir, "val")
    arguments = dict(
        B=config.B, T=config.T, rank=world.rank, world_size=world.size, device=world.device,
        vocab_size=meta["vocab_size"],
    )  # fmt: skip
    # Shuffled as well, by a seed that never changes: batches then come from all over the validation shard,
    # and are the same for every run, B and number of ranks.
    return (
        DistributedDataLoader(train_files, seed=config.seed, **arguments),
        DistributedDataLoader(val_files, seed=0, **arguments),
    )


def build_model(config: TrainConfig, given: set[str], meta: dict) -> GPTLMHeadModel:
    """The model to train, on the CPU: new, or from init_from, with experts added if use_moe=True was asked
    for.

    With init_from the architecture is the source's; a setting that was given and contradicts it is a
    ValueError, but for dropout, the losses' weights, and what upcycling needs.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)} & set(GPTConfig.__annotations__)
    fields = {name: getattr(config, name) for name in names}
    fields |= dict(
        encoding=meta["encoding"], encoding_size=meta["vocab_size"], eos_token_id=meta["eot_token"]
    )
    fields["block_size"] = config.block_size or config.T
    fields["vocab_size"] = config.vocab_size or 128 * math.ceil(meta["vocab_size"] / 128)
    if fields["vocab_size"] < meta["vocab_size"]:
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the data's encoding has {meta['vocab_size']} tokens"
        )
    torch.manual_seed(config.seed)
    if not config.init_from:
        return GPTLMHeadModel(GPTConfig(**fields))

    source = ckpt.load_model(config.init_from)
    if source.config.encoding != meta["encoding"]:
        raise ValueError(
            f"init_from={config.init_from} speaks {source.config.encoding!r}, the data {meta['encoding']!r}; "
            "tokenise the text again with `python fineweb.py --encoding ...`"
        )
    upcycles = "use_moe" in given and config.use_moe and not source.config.use_moe
    may_differ = {"dropout", "moe_loss", "moe_loss_type", "moe_loss_coef", "router_z_loss_coef"}
    may_differ |= {"router_bias_update_rate", "infer_step", "block_size"}
    if upcycles:
        may_differ |= {"use_moe", "num_experts", "num_experts_per_tok", "moe_every", "router_score"}
        may_differ |= {"norm_topk_prob", "num_shared_experts", "expert_hidden_size"}
    for name in sorted(given & names - may_differ):
        if fields[name] != getattr(source.config, name):
            raise ValueError(
                f"{name}={fields[name]!r}, but init_from={config.init_from} has "
                f"{name}={getattr(source.config, name)!r}; leave the flag away"
            )
    if config.T > source.config.block_size:
        raise ValueError(
            f"T={config.T}, but init_from={config.init_from} has block_size={source.config.block_size}"
        )
    changed = {name: fields[name] for name in given & may_differ if name != "block_size"}
    new_config = GPTConfig(**(source.config.to_dict() | changed))
    if upcycles:
        model = ckpt.upcycle(source, new_config)
    else:
        model = GPTLMHeadModel(new_config)
        model.load_state_dict(source.state_dict())
    if "block_size" in given and config.block_size:
        model.crop_block_size(config.block_size)
    return model


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warmup to max_lr, then half a cosine down to min_lr at max_steps (GPT-3, appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) * (
        config.max_lr - config.min_lr
    )


def resume(config, world, model, optimizer, loader, print0) -> tuple[int, float | None, float]:
    """Take everything over from the checkpoint that config.resume names: (first step, validation loss,
    seconds).

    (0, None, 0.0) if nothing is to be resumed. CheckpointError or FileNotFoundError, and ValueError if the
    data or the model is another one.
    """
    path = ckpt.find_checkpoint(config.log_dir, print0) if config.resume == "auto" else config.resume
    if not path:
        return 0, None, 0.0
    state = ckpt.load_checkpoint(path)
    for name, value in state["config"].items():
        mine = getattr(model.config, name, None)
        if name in GPTConfig.__annotations__ and name not in MAY_CHANGE and value != mine:
            raise ValueError(
                f"resume: {name}={value!r} in {path}, but {mine!r} now; give the same, or --init_from"
            )
    loader.load_state_dict(state["loader"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    print0(f"resumed {path} at step {state['step']}")
    return state["step"], state["val_loss"], state["elapsed_s"]


# ---------------------------------------------------------------------------- EVALUATION


@torch.no_grad()
def validate(
    model: nn.Module, loader: DistributedDataLoader, steps: int, world: parallel.World, autocast
) -> float:
    """Mean cross-entropy, nats per token, of the first `steps` batches of every rank, always the same."""
    model.eval()
    loader.reset()
    total = torch.zeros((), device=world.device)
    for _ in range(steps):
        x, y = loader.next_batch()  # (B, T), (B, T)
        with autocast():
            total += model(x, targets=y, return_dict=True).loss
    return (world.sum(total) / (steps * world.size)).item()


def sample(model: GPTLMHeadModel, config: TrainConfig, step: int, autocast) -> str:
    """Text after the prompt; the same on all ranks, and at every run of the same step."""
    torch.manual_seed(config.seed + step)
    with autocast():
        return model.generate(config.prompt, max_new_tokens=config.sample_tokens, do_sample=True, top_k=50)


def usage_table(model: GPTLMHeadModel) -> str:
    """Percentages of the last step's routed rows, a line per MoE layer and a column per expert."""
    lines = []
    for layer, moe in enumerate(model.moe_layers()):
        counts = moe.last_step_counts().cpu()
        share = counts / counts.sum().clamp(min=1)
        lines.append(
            f"  MoE layer {layer:2d}: " + " ".join(f"{100 * s:5.1f}%" for s in share.tolist())
            + f"   max/mean {share.max() * len(share):.2f}"
        )  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------- MAIN


def main(arguments: list[str] | None = None) -> int:
    """Set up, train, evaluate, save; returns the exit code."""
    config, given = parse_config(arguments)
    try:
        # ---- SET-UP
        world = parallel.start(config.device, config.parallel)
        accumulation = check_config(config, world)
        print0 = print if world.is_master else lambda *args, **kwargs: None
        if config.preset == "demo" and config.data_dir == PRESETS["demo"]["data_dir"]:
            print0(
                "Demo: the documentation that Python carries, as bytes, teaches a small GPT with 8 experts."
            )
            if world.is_master:
                prepare_demo(config.data_dir)
            world.barrier()
        meta = read_meta(
            config.data_dir if not config.input_bin else os.path.dirname(config.input_bin) or "."
        )
        train_loader, val_loader = build_loaders(config, world, meta)
        model = build_model(config, given, meta).to(world.device)
        if config.tensorcores:
            torch.set_float32_matmul_precision("high")
        if config.dtype == "auto":
            config.dtype = "bfloat16" if world.device.type == "cuda" else "float32"
        optimizer = model.configure_optimizers(
            config.weight_decay, config.max_lr, (config.beta1, config.beta2), world.device.type,
            config.router_lr_mult, config.expert_lr_mult,
        )  # fmt: skip
        folder = Path(config.log_dir)
        if world.is_master:
            folder.mkdir(parents=True, exist_ok=True)
        first_step, val_loss, elapsed = resume(config, world, model, optimizer, train_loader, print0)
        if world.is_master:
            aside = set_aside(folder) if first_step == 0 else None
            if aside:
                print(f"moved what an earlier run left in {folder} to {aside}")
            log = RunLog(folder, first_step, config.tensorboard)
            log.record({"run": run_record(config, model, world)})
    except (ValueError, OSError) as error:
        print(f"train_gpt_moe.py: {error}", file=sys.stderr)
        return 2

    def autocast():
        """bf16 matrix products where dtype says so; parameters, norms, routers and losses stay in fp32."""
        return torch.autocast(world.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    if config.use_compile:
        for (
            block
        ) in model.transformer.h:  # they share one graph; the whole model would take four times as long
            block.compile(fullgraph=True)
    parallel_model = parallel.wrap(model, world)
    model.update_routers()  # from here on the routers' statistics are those of whole optimizer steps
    epochs = config.max_steps * config.total_batch_size / train_loader.num_tokens
    print0(f"model   {model.get_num_params(False):,} parameters, {model.get_num_active_params():,} active")
    print0(f"data    {train_loader.num_tokens:,} tokens, seen {epochs:.2f} times in {config.max_steps} steps")
    print0(
        f"step    {config.total_batch_size:,} tokens: {accumulation} micro-steps x B {config.B} x T {config.T} "
        f"x {world.size} processes, {config.dtype} on {world.device}"
    )
    watched = world.is_master and sys.stderr.isatty()
    bar = tqdm(total=config.max_steps, initial=first_step, unit="step", disable=not watched, smoothing=0.05)
    say = bar.write if watched else print0
    begin = time.perf_counter() - elapsed

    for step in range(first_step, config.max_steps + 1):
        last_step = step == config.max_steps
        evaluates = config.infer_step > 0 and step % config.infer_step == 0
        every = config.infer_step if config.sample_every < 0 else config.sample_every
        samples = every > 0 and (step % every == 0 or last_step)
        saves = config.checkpoint_every > 0 and step % config.checkpoint_every == 0 and step > first_step

        # ---- CHECKPOINT: before the evaluation, so that nothing that fails there can lose the run
        if world.is_master and (saves or (last_step and step > first_step)):
            path = ckpt.save_checkpoint(
                {
                    "model": model.state_dict(), "config": model.config.to_dict(), "step": step,
                    "val_loss": val_loss, "optimizer": optimizer.state_dict(),
                    "loader": train_loader.state_dict(), "rng": torch.get_rng_state(),
                    "train_config": dataclasses.asdict(config), "elapsed_s": time.perf_counter() - begin,
                },
                folder,
            )  # fmt: skip
            say(f"step {step}: saved {path}")

        # ---- EVALUATION: eagerly, through the raw model, so that nothing of the training graph is compiled
        # anew
        measured = {}
        with torch.compiler.set_stance("force_eager"):
            if evaluates or last_step:
                val_loss = validate(model, val_loader, config.val_steps, world, autocast)
                measured["val_loss"] = val_loss
                say(f"step {step}: validation loss {val_loss:.4f}")
            if samples:
                say(f"step {step}: sample: {sample(model, config, step, autocast)!r}")
        if world.is_master and measured:
            log.event(step, "val", val_loss)
            log.scalars(step, loss__val=val_loss)
        if last_step:
            break

        # ---- TRAINING
        start = time.perf_counter()
        model.train()
        # Dropout is a function of seed, step and rank, and so the same after a resume.
        torch.manual_seed((config.seed * 1_000_003 + step) * 65_536 + world.rank)
        losses = torch.zeros(3, device=world.device)  # cross-entropy, balance loss, z-loss
        for micro_step in range(accumulation):
            x, y = train_loader.next_batch()  # (B, T), (B, T)
            parallel.sync_gradients(parallel_model, micro_step == accumulation - 1)
            with autocast():
                output = parallel_model(x, targets=y, return_dict=True)
            (output.loss / accumulation).backward()
            parts = (output.cross_entropy, output.balance_loss, output.z_loss)
            losses += torch.stack([losses.new_zeros(()) if p is None else p.detach() for p in parts])
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_routers()

        # ---- LOG
        losses = world.sum(losses) / (world.size * accumulation)
        loss, balance_loss, z_loss, norm = [*losses.tolist(), norm.item()]  # waits for the device
        seconds = time.perf_counter() - start
        tokens_per_second = config.total_batch_size / seconds
        sequences = config.total_batch_size / model.config.block_size / world.size
        mfu = model.estimate_mfu(sequences, seconds)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tok/s", refresh=False)
        if not world.is_master:
            continue
        if not watched and (step % config.log_every == 0 or step == config.max_steps - 1):
            utilisation = "" if mfu is None else f" | mfu {100 * mfu:.1f}%"
            print(
                f"step {step:5d}/{config.max_steps} | loss {loss:.4f} | lr {lr:.3e} | norm {norm:.3f} | "
                f"{1000 * seconds:.1f} ms | {tokens_per_second:,.0f} tok/s{utilisation}",
                flush=True,
            )
        record = {
            "step": step, "loss": loss, "lr": lr, "norm": norm, "ms": 1000 * seconds,
            "tok_per_s": tokens_per_second, "mfu": mfu, "elapsed_s": time.perf_counter() - begin, **measured,
        }  # fmt: skip
        if model.moe_layers():
            counts = torch.stack([moe.last_step_counts() for moe in model.moe_layers()])  # (layers, E)
            share = counts.cpu().double() / counts[0].sum().item()
            record |= {"balance_loss": balance_loss, "z_loss": z_loss, "expert_load": share.tolist()}
            record |= {"max_load": share.max().item() * share.size(1)}
        log.record(record)
        log.event(step, "train", loss)
        log.scalars(
            step, loss__train=loss, loss__balance=record.get("balance_loss"), loss__z=record.get("z_loss"),
            lr=lr, norm=norm, tok_per_s=tokens_per_second, mfu=mfu, max_load=record.get("max_load"),
        )  # fmt: skip

    # ---- THE END
    bar.close()
    if world.is_master:
        if measured:
            log.record({"step": config.max_steps, **measured, "elapsed_s": time.perf_counter() - begin})
        log.close()
        if model.moe_layers():
            print(f"how the last step used the experts (even: {100 / model.config.num_experts:.1f}%)")
            print(usage_table(model))
        print(f"validation loss {val_loss:.4f} nats per token after {config.max_steps} steps")
        for path in ckpt.list_checkpoints(folder)[:1]:
            print(f"checkpoint      {path}")
            print(f"next            python sample.py --checkpoint {path} --prompt {config.prompt!r}")
    return 0


if __name__ == "__main__":
    code = main()
    parallel.stop()
    sys.exit(code)
