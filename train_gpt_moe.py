"""Train a GPT, dense or with Mixture-of-Experts layers, from token shards to evaluated checkpoints.

    python train_gpt_moe.py --preset demo                     # two minutes on a laptop, no data needed
    python fineweb.py                                         # the real data, once
    python train_gpt_moe.py                                   # one GPU
    torchrun --nproc_per_node=8 train_gpt_moe.py              # one machine with 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=IP --master_port=29500 --nproc_per_node=8 train_gpt_moe.py
    python train_gpt_moe.py --resume auto                     # go on where a run stopped
    torchrun --nproc_per_node=8 --max-restarts=3 train_gpt_moe.py --resume auto      # survives a lost process
    python train_gpt_moe.py --use_moe False --B 8 --max_steps 100 --warmup_steps 10

Change the constants below or give any of them as a flag (--help lists them). A run writes, under log_dir:
log.txt (STEP train LOSS, STEP val LOSS, STEP hella ACC), metrics.jsonl (one object per step, the first one
the settings of the run), main.log (llm.c's), tb/ (TensorBoard), training.png, model_XXXXX.pt (checkpoint.py
says what is in them). The flags of llm.c's train_gpt2.py are accepted, in [] with its defaults;
--preset llmc sets all of those.
Exit codes: 0 done, 2 bad settings or data, 1 anything else; 130 and 143 stopped by a signal, after saving
(faults.py says what becomes of signals and errors). A resumed run keeps its settings; flags change those that
can change.

References: GPT-3, arXiv 2005.14165 (batch size, learning rates, schedule); the 124M recipe on FineWeb-Edu and
its numbers: https://github.com/karpathy/build-nanogpt
"""

import contextlib
import dataclasses
import gc
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.hf_argparser import HfArg

from fineweb import DistributedDataLoader, prepare_demo, read_meta
from layers.attention import BACKENDS, choose_backend, prefer_backend
from llmc import files as llmc
from model import GPTLMHeadModel
from plot_log import plot_runs
from training import checkpoints as ckpt
from training import faults, parallel
from training.evaluation import cannot_sample, evaluate, evaluates_at
from training.flags import parse_flags
from training.idle_experts import freeze_idle_experts
from training.preflight import preflight
from training.progress import Progress, tell
from training.run_log import RunLog, expert_load, peak_memory, run_record
from training.setup import (
    build_loaders,
    build_model,
    build_optimizer,
    check_config,
    learning_rate,
    place_model,
)

# ---------------------------------------------------------------------------- CONSTANTS


@dataclass
class TrainConfig:
    """Every setting of a run; a flag of the same name sets it."""

    preset: str = HfArg(default="", help="named settings: demo, gpt2, modern, qwen3 or llmc")
    model: str = HfArg(default="", help="sizes: d12, d24, d36, d48; or weights: gpt2 ... gpt2-xl [gpt2]")
    # --- files
    data_dir: str = HfArg(default="edu_fineweb10B", help="folder with the shards that fineweb.py wrote")
    input_bin: str = HfArg(
        default="", help="pattern of training shards [dev/data/tinyshakespeare/tiny_shakespeare_val.bin]"
    )
    input_val_bin: str = HfArg(default="", help="pattern of validation shards instead of data_dir/val_*.bin")
    log_dir: str = HfArg(default="log", help="where everything is written", aliases=["--output_dir"])
    resume: str = HfArg(default="", help="a checkpoint to go on from; auto = the newest good one in log_dir")
    init_from: str = HfArg(default="", help="weights to begin with: a checkpoint, a folder, gpt2 ... gpt2-xl")
    # --- batch: total_batch_size tokens a step, in micro-steps of B sequences of T tokens on each rank
    total_batch_size: int = HfArg(default=524288, help="tokens per optimizer step; 2**19, GPT-3's 0.5M [256]")
    B: int = HfArg(default=16, help="sequences per micro-step and rank [4]", aliases=["--batch_size"])
    T: int = HfArg(default=1024, help="tokens per sequence [64]", aliases=["--sequence_length"])
    shuffle: bool = HfArg(default=True, help="samples in random order; False = all in the files' [False]")
    overfit_single_batch: bool = HfArg(default=False, help="the first step's samples at every step [1]")
    # --- length and schedule
    max_steps: int = HfArg(default=19073, help="steps: 10B tokens [10]", aliases=["--num_iterations"])
    max_lr: float = HfArg(default=6e-4, help="learning rate after warmup [1e-4]", aliases=["--learning_rate"])
    min_lr: float = HfArg(default=6e-5, help="learning rate at the end of the cosine")
    learning_rate_decay_frac: float | None = HfArg(default=None, help="min_lr as a fraction of max_lr [1.0]")
    warmup_steps: int = HfArg(default=715, help="linear warmup: 375M tokens [0]", aliases=["--warmup_iters"])
    schedule: str = HfArg(default="cosine", help="cosine, or wsd: constant, then a linear decay")
    wsd_decay_frac: float = HfArg(default=0.4, help="wsd: share of max_steps that the decay takes")
    # --- optimizer
    optimizer: str = HfArg(default="adamw", help="adamw, or muon (matrices by Muon, the rest by AdamW)")
    weight_decay: float = HfArg(default=0.1, help="of matrices and embeddings; biases, norms never [0.0]")
    beta1: float = HfArg(default=0.9, help="AdamW's first beta")
    beta2: float = HfArg(default=0.95, help="AdamW's second beta")
    grad_clip: float = HfArg(default=1.0, help="largest norm of the gradient; 0 = no clipping [1.0]")
    router_lr_mult: float = HfArg(default=1.0, help="learning rate of the routers, relative to the others'")
    expert_lr_mult: float = HfArg(default=1.0, help="learning rate of the experts, relative to the others'")
    # --- evaluation, samples, checkpoints, log
    infer_step: int = HfArg(
        default=250, help="steps between evaluations; 0 = only at the end [0]", aliases=["--val_loss_every"]
    )
    val_steps: int = HfArg(default=20, help="validation batches per rank [20]", aliases=["--val_max_steps"])
    sample_every: int = HfArg(default=-1, help="steps between samples; -1 = infer_step, 0 = never [0]")
    hellaswag: bool = HfArg(default=True, help="HellaSwag at every evaluation, with GPT-2's tokens")
    hellaswag_data: str = HfArg(default="", help="its questions; empty = downloaded once")
    hellaswag_limit: int = HfArg(default=0, help="only the first so many questions; 0 = all 10,042")
    prompt: str = HfArg(
        default="Hello, I'm a language model,", help='what samples begin with; "" = <|endoftext|> [""]'
    )
    sample_tokens: int = HfArg(default=32, help="new tokens per sample")
    checkpoint_every: int = HfArg(default=5000, help="steps between checkpoints; 0 = only the last")
    keep_last: int = HfArg(default=0, help="checkpoints to keep, the oldest are deleted; 0 = all")
    keep_every: int = HfArg(default=0, help="with keep_last: keep multiples of so many steps, too; 0 = none")
    save_retry_s: float = HfArg(default=60.0, help="seconds after which a save that failed is tried again")
    max_bad_steps: int = HfArg(default=10, help="stop after so many steps in a row without a finite gradient")
    log_every: int = HfArg(default=1, help="print every so many steps (the log files have them all)")
    plot: bool = HfArg(default=True, help="draw log_dir/training.png at the end")
    plot_every: int = HfArg(default=0, help="draw it every so many steps, too; 0 = never")
    tensorboard: bool = HfArg(default=True, help="write log_dir/tb")
    wandb: bool = HfArg(default=False, help="send the same curves to Weights & Biases, if it is installed")
    inference_only: bool = HfArg(default=False, help="no backward, no update, no checkpoint: to time it [0]")
    write_tensors: bool = HfArg(default=False, help="write llm.c's files at the start, into log_dir [1]")
    c_names: bool = HfArg(default=False, help="write them also under the names its C programs open")
    # --- machine
    device: str = HfArg(default="", help="cuda, cuda:1, mps, cpu; empty = the best there is")
    dtype: str = HfArg(
        default="auto",
        help="of matrix products: float32, bfloat16, float16; auto = bfloat16 on CUDA [float32]",
    )
    tensorcores: bool = HfArg(default=True, help="with float32 on CUDA: allow TF32 [0]")
    flash: bool = HfArg(default=True, help="attention by fused kernels; False = written out [0]")
    use_compile: bool = HfArg(default=True, help="torch.compile every block [0]", aliases=["--compile"])
    loss_chunk: int = HfArg(default=-1, help="rows of logits at a time in the loss; -1 = auto, 0 = all")
    attention_backend: str = HfArg(
        default="auto",
        help="fused attention on CUDA: cudnn, flash, efficient, math; auto = the fastest, timed at the start",
    )
    parallel: str = HfArg(default="ddp", help="over processes: ddp, fsdp, or none for a single one")
    zero_stage: int = HfArg(default=0, help="1 = with ddp, each rank keeps a share of AdamW's moments (ZeRO)")
    ep_size: int = HfArg(default=1, help="ranks that share the experts of a layer (expert parallelism)")
    activation_checkpointing: str = HfArg(default="none", help="none, or block: recompute each in backward")
    seed: int = HfArg(default=1337, help="of weights, sample order and dropout")
    # --- model (model.py and mixture_of_experts.py say more)
    block_size: int = HfArg(default=0, help="longest sequence the model can take; 0 = T")
    vocab_size: int = HfArg(
        default=0, help="0 = the data's, rounded up to a multiple of 128; -1 or write_tensors: exact [50257]"
    )
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
    init: str = HfArg(default="gpt2", help="gpt2, or zero_proj: residual projections begin at zero")
    tie_word_embeddings: bool = HfArg(default=True, help="one matrix for token embedding and head")


# Named sets of overrides (--preset NAME); flags win over them.
MODERN = dict(  # what paid in the ablation of BENCHMARKS.md
    optimizer="muon", max_lr=1e-2, min_lr=1e-3, position="rope", qk_norm=True, activation="relu2",
)  # fmt: skip
PRESETS = {
    "gpt2": dict(use_moe=False),  # the faithful 124M
    "llmc": dict(  # the defaults of llm.c's train_gpt2.py; llmc.py says where we differ
        use_moe=False, model="gpt2", B=4, T=64, block_size=1024, vocab_size=-1, total_batch_size=256,
        shuffle=False, overfit_single_batch=True, max_steps=10, max_lr=1e-4, learning_rate_decay_frac=1.0,
        warmup_steps=0, weight_decay=0.0, infer_step=0, sample_every=0, prompt="", hellaswag=False,
        dtype="float32", tensorcores=False, flash=False, use_compile=False, write_tensors=True,
    ),
    "modern": MODERN | dict(max_lr=2e-3, min_lr=2e-4),
    "qwen3": MODERN | dict(  # as good, and a stock Qwen3 (-MoE): checkpoint.py export --format qwen3_moe
        max_lr=2e-3, min_lr=2e-4, norm="rmsnorm", activation="swiglu", bias=False, mlp_hidden_size=2048,
        expert_hidden_size=2048,
    ),
    "demo": MODERN | dict(
        data_dir="demo_data", log_dir="log/demo", n_layer=4, n_head=4, n_embd=128, num_experts=8,
        num_experts_per_tok=2, expert_hidden_size=256, B=16, T=128, total_batch_size=2048, max_steps=500,
        warmup_steps=40, infer_step=250, val_steps=40, sample_tokens=100, log_every=25, prompt="Return the ",
        use_compile=False,
    ),
}  # fmt: skip


# --model NAME, as llm.c's: pretrained weights, or new ones of these sizes; dense unless a flag says more.
MODELS = {name: dict(init_from=name) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
MODELS |= {
    f"d{layers}": dict(n_layer=layers, n_head=heads, n_embd=width, block_size=1024)
    for layers, heads, width in ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
}


def overrides(config: TrainConfig) -> dict:
    """What preset and model, given by flags, put in place of the defaults. ValueError for unknown names."""
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"preset={config.preset!r}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS.get(config.preset, {})
    model = config.model or preset.get("model", "")
    if model and model not in MODELS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(MODELS)}")
    return preset | (dict(use_moe=False) | MODELS[model] if model else {})


def parse_config(arguments: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """The settings, and the names of those that flags gave, not presets. ValueError for a bad flag."""
    return parse_flags(TrainConfig, overrides, arguments, __doc__.split("\n\n")[0])


# ---------------------------------------------------------------------------- SET-UP


@dataclass
class Run:
    """What set_up makes and train uses."""

    config: TrainConfig
    layout: parallel.Layout
    accumulation: int  # micro-steps per optimizer step
    train_loader: DistributedDataLoader
    val_loader: DistributedDataLoader | None  # None with --input_bin alone, as in llm.c
    model: GPTLMHeadModel
    dtype: str  # of matrix products, resolved
    optimizer: torch.optim.Optimizer
    resumed: dict | None  # the checkpoint that it goes on from; once read, without weights and moments
    log: RunLog | None = None  # of the master
    hellaswag: bool = False  # whether its questions are asked
    samples: bool = False  # whether text is sampled


def set_up(config: TrainConfig, given: set[str], world: parallel.World) -> Run:
    """Everything up to the first step. ValueError, OSError: settings, data or files that cannot work."""
    print0 = tell if world.is_master else lambda text: None
    if not world.is_master:  # the master says it already
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
    if config.resume not in ("", "auto") and "log_dir" not in given:
        config.log_dir = str(Path(config.resume).parent)
    path, state = ckpt.find_resumed(config.resume, config.log_dir, world, print0)
    if state:
        ckpt.keep_settings(config, given, state, path, print0)
    accumulation = check_config(config, world, None if state else given, print0)
    if config.use_compile:
        parallel.check_compiler(world.device)
    if config.preset == "demo" and config.data_dir == PRESETS["demo"]["data_dir"]:
        print0("Demo: the documentation that Python carries, as bytes, teaches a small GPT with 8 experts.")
        if world.is_master:
            prepare_demo(config.data_dir)
        world.barrier()
    meta = read_meta(config.data_dir, config.input_bin)
    train_loader, val_loader = build_loaders(config, world, meta)
    dtype = config.dtype  # in checkpoints it stays "auto", for a resume on another device
    if dtype == "auto":
        dtype = "bfloat16" if world.device.type == "cuda" else "float32"
    layout = parallel.make_layout(world, config.parallel, config.zero_stage, config.ep_size)
    model = place_model(config, build_model(config, given, meta, state), layout, dtype, state)
    if config.tensorcores and dtype == "float32":  # with bfloat16 it would only coarsen the routers
        torch.set_float32_matmul_precision("high")
    optimizer = parallel.share_optimizer(build_optimizer(config, model), layout)
    run = Run(config, layout, accumulation, train_loader, val_loader, model, dtype, optimizer, state)
    run.hellaswag = config.hellaswag and (model.config.encoding == "gpt2" or bool(config.hellaswag_data))
    if state:
        ckpt.restore(state, model, optimizer, train_loader)
        before = state.get("world_size", world.size)
        if before != world.size:
            print0(f"resume: processes were {before} and are {world.size} from step {state['step']} on")
        print0(f"resumed {path} at step {state['step']}")
        run.resumed = {name: value for name, value in state.items() if name not in ("model", "optimizer")}
    if config.sample_every != 0:
        problem = cannot_sample(model, config)
        run.samples = not layout.any(bool(problem))
        if not run.samples:
            print0(f"no samples in this run: {problem or 'another process cannot encode the prompt'}")
    model.loss_chunk = config.loss_chunk
    if not config.flash:
        model.set_attn_implementation("eager")
    backend = choose_backend(
        config.attention_backend, model.config, config.B, config.T, world.device, getattr(torch, dtype)
    )
    if backend:  # the master's on all ranks, and in checkpoints, so that a resumed run rounds alike
        index = torch.tensor(list(BACKENDS).index(backend) * world.is_master, device=world.device)
        config.attention_backend = list(BACKENDS)[world.sum(index).item()]
        print0(f"attention   {config.attention_backend}")
    world.barrier()  # the master may now move an old run's files: all have read what they need
    if world.is_master:
        open_log(run, path)
    if world.device.type == "cuda":  # what set-up has tried and written is no part of the run's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    return run


def open_log(run: Run, path: Path | None) -> None:
    """On the master, before the first step: log files, what the run will need, and llm.c's files if wanted.

    path: of the checkpoint that the run goes on from.
    """
    config, model, world = run.config, run.model, run.layout.world
    writes = config.write_tensors and not run.resumed and not config.inference_only
    if writes:  # or else refused, before an earlier run is moved aside
        llmc.check_writable(model.config)
    first_step = run.resumed["step"] if run.resumed else 0
    again = first_step == config.max_steps or evaluates_at(first_step, config)
    run.log = RunLog(Path(config.log_dir), path, first_step, config.tensorboard, config.wandb, again, tell)
    run.log.record({"run": run_record(config, model, world, first_step)})
    train_tokens, val_tokens = run.train_loader.num_tokens, run.val_loader and run.val_loader.num_tokens
    table, cautions = preflight(config, model, run.accumulation, world, train_tokens, run.dtype, val_tokens)
    tell("\n".join([table, *(f"WARNING     {text}" for text in cautions)]))
    if writes:
        files = run.train_loader.files
        x, y = DistributedDataLoader(files, config.B, config.T, shuffle=False).next_batch()
        changed = {name for name, v in MODELS.get(config.model, {}).items() if getattr(config, name) != v}
        names = config.model if config.model and not changed else f"d{model.config.n_layer}"
        for written in llmc.write_all(model, x, y, config.log_dir, names, config.c_names):
            tell(f"wrote {written}")


# ---------------------------------------------------------------------------- TRAINING


def train(run: Run) -> int:
    """Train, evaluate, save; returns the exit code."""
    config, layout, model, optimizer, log = run.config, run.layout, run.model, run.optimizer, run.log
    world = layout.world
    train_loader, accumulation, resumed = run.train_loader, run.accumulation, run.resumed or {}

    def autocast():
        """Matrix products in dtype; parameters, norms, routers and losses stay in fp32."""
        return torch.autocast(world.device.type, getattr(torch, run.dtype), enabled=run.dtype != "float32")

    def snapshot() -> dict:
        """What checkpoint.py documents, as it was when `step` began."""
        return {
            **beginning, "model": model.state_dict(), "config": model.config.to_dict(),
            "optimizer": parallel.optimizer_state(optimizer, layout), "scaler": scaler.state_dict(),
            "train_config": dataclasses.asdict(config),
            "elapsed_s": time.perf_counter() - begin, "world_size": world.size,
        }  # fmt: skip

    def save() -> None:
        """Begin to save what there was when `step` began; on all ranks."""
        if world.is_master or layout.saves_together:
            writer.save(snapshot(), log.sync if log else lambda: None)

    def saving_is_urgent() -> bool:
        """Whether an evaluation is to be left out: this rank or another has been told to save or to stop."""
        unsaved = step > saved_step and not config.inference_only
        return layout.any(signals.stop_requested or (signals.save_requested and unsaved))

    if config.use_compile:
        parallel.compile_blocks(model, layout)
    parallel_model = parallel.wrap(model, layout, accumulation)
    model.update_routers()  # from here on the routers' statistics are those of whole optimizer steps
    first_step = saved_step = resumed.get("step", 0)
    val_loss, begin = resumed.get("val_loss"), time.perf_counter() - resumed.get("elapsed_s", 0.0)
    health = faults.Health(resumed.get("health"))
    progress = Progress(config, first_step, world.is_master)
    say = progress.say
    signals = faults.Signals(talkative=world.is_master)
    keep = (config.keep_last, config.keep_every)
    writer = ckpt.CheckpointWriter(config.log_dir, *keep, say, world.rank, layout.savers, config.save_retry_s)
    if world.is_master:
        log.say = say
    sequences = config.total_batch_size / config.T / world.size  # a step's, on each rank
    share = 1 / 3 if config.inference_only else 1  # of the FLOPs of forward and backward
    # Gradients too small for float16 are scaled up, and the scale adapts (arXiv 1710.03740, section 3.2).
    scaler = torch.amp.GradScaler(world.device.type, enabled=run.dtype == "float16")
    if resumed.get("scaler"):
        scaler.load_state_dict(resumed["scaler"])
    step, intact, diagnosis = first_step, False, ""
    gc.collect()
    gc.freeze()  # what exists by now stays: never look through it again
    gc.disable()  # a collection in mid-step would make all ranks wait for one; evaluations make time for it
    signals.catch()
    try:
        while True:
            beginning = {
                "step": step, "val_loss": val_loss, "loader": train_loader.state_dict(),
                "health": health.state_dict(), "rng": torch.get_rng_state(),
            }  # fmt: skip
            intact = True  # from here to the update, weights and moments belong to this beginning
            if health.in_a_row == 0:
                healthy = beginning  # as they do to this one, as long as all steps since have been sick
            last_step = step == config.max_steps
            evaluates = last_step or evaluates_at(step, config)
            every = config.infer_step if config.sample_every < 0 else config.sample_every
            samples = run.samples and every > 0 and (step % every == 0 or last_step)
            saves = config.checkpoint_every > 0 and step % config.checkpoint_every == 0
            saves = saves or last_step or signals.save_now or signals.exit_code is not None
            saves = saves and not config.inference_only

            # ---- CHECKPOINT: before the evaluation, so that nothing that fails there can lose the run
            if saves and step > saved_step:
                save()
                saved_step = step
            if signals.exit_code is not None:
                break

            # ---- EVALUATION
            if evaluates or step % 100 == 0:
                gc.collect()
            measured = evaluate(run, step, evaluates, samples, autocast, saving_is_urgent, progress)
            if measured is None:  # interrupted; after saving, or when the run is resumed, it is evaluated
                signals.agree(world.sum(signals.take(world.device)).tolist())
                continue
            val_loss, text = measured.get("val_loss", val_loss), measured.pop("sample", "")
            if world.is_master and text:
                log.sample(step, text)
            if world.is_master and measured:
                for kind, name in (("val", "val_loss"), ("hella", "hella_acc_norm")):
                    if name in measured:
                        log.measurement(step, kind, measured[name])
                if model.moe_layers() and step > 0 and not config.inference_only:
                    log.experts(step, expert_load(model)["expert_load"])
                if last_step:
                    log.record({"step": step, "elapsed_s": time.perf_counter() - begin, **measured})
            if last_step:
                while layout.any(writer.wants_last_retry(signals.stop_requested)):
                    save()
                break

            # ---- TRAINING
            start = time.perf_counter()
            model.train()
            if config.overfit_single_batch:
                train_loader.reset()
            # Dropout is a function of seed, step and rank, and so the same after a resume.
            torch.manual_seed(((config.seed * 1_000_003 + step) * 65_536 + world.rank) % 2**63)
            losses = torch.zeros(3, device=world.device)  # cross-entropy, balance loss, z-loss
            batch_losses = []  # of every micro-step
            for micro_step in range(accumulation):
                x, y = faults.next_batch(train_loader)  # (B, T), (B, T)
                parallel.sync_gradients(parallel_model, micro_step == accumulation - 1)
                with autocast(), torch.set_grad_enabled(not config.inference_only):
                    output = parallel_model(x, targets=y, return_dict=True)
                if not config.inference_only:
                    scaler.scale(output.loss / accumulation).backward()
                parts = (output.cross_entropy, output.balance_loss, output.z_loss)
                losses += torch.stack([losses.new_zeros(()) if p is None else p.detach() for p in parts])
                batch_losses.append(output.loss.detach())
            if config.inference_only:
                norm = losses.new_zeros(())
            else:
                parallel.finish_gradients(model, layout)
                scaler.unscale_(optimizer)
                norm = parallel.gradient_norm(model, layout)
            if writer.wants_retry():
                signals.request_save()
            # One collective tells all ranks the losses, and what signals ask of any of them.
            sums = world.sum(torch.cat([losses, signals.take(world.device)]))  # (3 + 3,)
            losses = sums[:3] / (world.size * accumulation)
            read = torch.cat([losses, norm.to(losses.dtype)[None], sums[3:]]).tolist()  # waits for the device
            (loss, balance_loss, z_loss, norm_value), flags = read[:4], read[4:]
            signals.agree(flags)

            # ---- UPDATE: all ranks, or none
            lr, routing = learning_rate(step, config), None
            sick = health.is_sick(loss, norm_value)
            if config.inference_only:
                faults.forget_routing(model)
            elif sick:
                faults.forget_routing(model)
                if health.in_a_row >= config.max_bad_steps:
                    diagnosis = faults.diagnose(model, batch_losses, train_loader, beginning["loader"])
            else:
                intact = False
                if config.grad_clip > 0:
                    parallel.clip_gradients(model, config.grad_clip, norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_mult"]
                model.update_routers()
                if world.is_master and model.moe_layers():
                    routing = expert_load(model)  # now, before the device gets busy again
                with freeze_idle_experts(model.moe_layers(), optimizer):
                    optimizer.step()
            if not config.inference_only:
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            spike = not sick and health.is_spike(loss)

            # ---- LOG
            seconds = time.perf_counter() - start
            if world.is_master:
                record = {
                    "step": step, "loss": loss, "lr": lr, "norm": norm_value, "ms": 1000 * seconds,
                    "tok_per_s": config.total_batch_size / seconds,
                    "mfu": model.estimate_mfu(sequences * share, seconds, length=config.T),
                    "elapsed_s": time.perf_counter() - begin, "bad_steps": health.bad_steps,
                    "memory": peak_memory(world.device) / 2**30, **measured,
                }  # fmt: skip
                if sick:
                    record["skipped"] = True
                    say(
                        f"step {step}: WARNING: no update: loss {loss}, norm {norm_value} "
                        f"({health.in_a_row} in a row, {health.bad_steps} in all)"
                    )
                elif model.moe_layers():
                    record |= {"balance_loss": balance_loss, "z_loss": z_loss} | (routing or {})
                if spike:
                    record["spike"] = True
                    say(f"step {step}: the loss jumped to {loss:.4f} from a mean of {health.mean:.4f}")
                log.step(record)
                progress.step(record)
                if config.plot_every > 0 and step % config.plot_every == config.plot_every - 1:
                    log.draw()
            if diagnosis:
                beginning = healthy  # whoever mends the cause tries all of the sick steps again
                if beginning["step"] > saved_step:
                    save()
                break
            step += 1
    except Exception:
        savable = intact and step > saved_step and not layout.saves_together and not config.inference_only
        if world.is_master and savable:
            faults.forget_routing(model)
            say(f"step {step}: an error; saving what has been trained before it")
            writer.save(snapshot(), log.sync)
        raise
    finally:  # whatever happened, a checkpoint that is being written gets finished
        failed = writer.wait() is not None
        progress.close()
        failed = (log is not None and not log.close()) or failed
        signals.release()
        gc.enable()
        gc.unfreeze()

    # ---- THE END: together, because launchers stop all processes as soon as one has ended
    world.barrier()
    newest = next(iter(ckpt.list_checkpoints(config.log_dir)), "none")
    if world.is_master and config.plot:
        try:
            say(f"picture         {plot_runs([config.log_dir], f'{config.log_dir}/training.png')}")
        except (OSError, ValueError) as error:  # ValueError: not a single step is in the log
            say(f"WARNING: no picture: {error}; python plot_log.py {config.log_dir} draws it")
    if diagnosis:
        stopped = (
            f"stopped at step {step}: {health.in_a_row} steps in a row without a finite loss and gradient"
        )
        text = f"train_gpt_moe.py: {stopped}; the last good checkpoint is {newest}\n{diagnosis}"
        print(text if world.is_master else diagnosis.splitlines()[-1], file=sys.stderr, flush=True)
        return faults.FAILED
    if failed:
        print(
            f"train_gpt_moe.py: not all could be written; the newest checkpoint is {newest}", file=sys.stderr
        )
        return faults.FAILED
    if signals.exit_code is not None:
        say(f"stopped before step {step}; --resume auto goes on from {newest}")
        return signals.exit_code
    if world.is_master:
        progress.summary(model, peak_memory(world.device), val_loss, newest)
    return faults.OK


def main(arguments: list[str] | None = None) -> int:
    """Set up and train; returns the exit code. What a person can mend is told in one line, no traceback."""
    config = world = run = None
    with contextlib.suppress(AttributeError, OSError):  # not every stdout can be told
        sys.stdout.reconfigure(errors="backslashreplace")  # of samples' characters that it does not have
    try:
        config, given = parse_config(arguments)
        world = parallel.start(config.device, config.parallel)
        run = set_up(config, given, world)
        with prefer_backend(config.attention_backend, world.device):
            code = train(run)
    except torch.OutOfMemoryError as error:
        return faults.report(error, config)
    except (ValueError, OSError) as error:
        if run is not None and not isinstance(error, faults.DataError):
            raise  # in training these are nobody's settings
        return faults.report(error)
    except RuntimeError:  # gloo's and NCCL's errors are of this type
        lost = world.lost_rank() if world is not None else ""
        if not lost:
            raise
        print(f"train_gpt_moe.py: {lost}", file=sys.stderr, flush=True)
        return faults.FAILED
    run = None  # DDP before its process group
    parallel.stop(world)
    return code


if __name__ == "__main__":
    sys.exit(main())
