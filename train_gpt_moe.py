"""Train a GPT, dense or with Mixture-of-Experts layers, from token shards to evaluated checkpoints.

    python train_gpt_moe.py --preset demo                     # a minute or two on a laptop, no data needed
    python fineweb.py                                         # the real data, once
    python train_gpt_moe.py                                   # one GPU
    torchrun --nproc_per_node=8 train_gpt_moe.py              # one machine with 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=IP --master_port=29500 --nproc_per_node=8 train_gpt_moe.py
    python train_gpt_moe.py --resume auto                     # continue a run that was stopped
    torchrun --nproc_per_node=8 --max-restarts=3 train_gpt_moe.py --resume auto      # survives a lost process
    python train_gpt_moe.py --use_moe False --B 8 --max_steps 100 --warmup_steps 10

Edit the constants below, or give any of them as a flag (--help lists them). Under log_dir a run writes
run.json (the settings), log.txt (STEP train LOSS, STEP val LOSS, STEP hella ACC), metrics.jsonl (a row per
step), main.log (llm.c's log), tb/ (TensorBoard), training.png and checkpoints model_XXXXX.pt.
Exit codes: 0 done, 2 bad settings or data, 1 any other failure, 128 + n stopped by signal n after saving.

The rest of the reading path: training/setup.py, model.py, mixture_of_experts.py, layers/experts.py,
tokens/shards.py.

References: GPT-3, arXiv 2005.14165 (batch size, learning rates, schedule); the 124M recipe on FineWeb-Edu and
its numbers: https://github.com/karpathy/build-nanogpt
"""

import sys

if __name__ == "__main__":  # --help and mistyped flags need not wait for torch
    import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)

    from training.quick_help import answer

    answer(__file__, sys.argv[1:])

import contextlib
import gc
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from layers.attention import BACKENDS, prefer_backend
from layers.mlp import ACTIVATIONS
from llmc import trainer as llmc
from mixture_of_experts import BALANCE_LOSSES, ROUTER_SCORES, sum_totals, update_routers
from tokens.printable import print_error, printable
from training import faults, parallel
from training.archives import is_out_of_memory
from training.checkpoint_writer import RunSaver
from training.checkpoints import resume_command
from training.diagnostics import StepGradients
from training.evaluation import evaluate, evaluates_at, samples_at
from training.flags import parse_flags, setting
from training.idle_experts import freeze_idle_experts
from training.log import expert_load, peak_memory
from training.optimizers import OPTIMIZERS, SCHEDULES, learning_rate
from training.profiler import Profiler
from training.setup import Run, open_log, set_up
from training.terminal import Terminal
from training.transfer import depth_settings

# ---------------------------------------------------------------------------- CONSTANTS

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainConfig(llmc.Flags):
    """Every setting of a run. A flag of the same name sets it."""

    preset: str = setting("", "demo, gpt2, modern, moe-small, moe-fine, qwen3 or llmc: named settings")
    config: str = setting("", "file of settings, such as the run.json of a run; flags win over it")
    run_name: str = setting("", "write to log/NAME, unless log_dir is given")
    depth: int = setting(0, "layers; sizes, batch, steps, rates follow; 12 = 124M; 0 = as set", least=0)
    model: str = setting("", "sizes d12, d24, d36, d48, or weights gpt2 ... gpt2-xl; without experts")
    # --- files
    text: str = setting("", "train on this text file, or folder of texts, as bytes; 10% of it validates")
    data_dir: str = setting("edu_fineweb10B", "folder of fineweb.py's shards; or a mixture, A:0.7,B:0.3")
    input_bin: str = setting("", "pattern of training shards, instead of data_dir/train_*.bin")
    input_val_bin: str = setting("", "pattern of validation shards, instead of data_dir/val_*.bin")
    log_dir: str = setting("log", "folder that everything is written to", "--output_dir")
    resume: str = setting("", "checkpoint to continue; auto = the newest undamaged one in log_dir")
    init_from: str = setting("", "weights to start from: a checkpoint, a folder, gpt2 ... gpt2-xl")
    # --- batch: total_batch_size tokens a step, in micro-steps of B sequences of T tokens on each rank
    total_batch_size: int = setting(524288, "tokens per optimizer step: 2**19, GPT-3's 0.5M", least=1)
    B: int = setting(16, "sequences per micro-step and rank", "--batch_size", least=1)
    T: int = setting(1024, "tokens per sequence", "--sequence_length", least=1)
    shuffle: bool = setting(True, "read samples in random order; False = in the order of the files")
    align: str = setting("", "documents = rows begin at a document", choices=("", "documents"))
    document_mask: bool = setting(False, "attention and positions stop where a document ends")
    overfit_single_batch: bool = setting(False, "train on the first step's samples at every step")
    # --- length and schedule
    max_steps: int = setting(19073, "optimizer steps; the default is 10B tokens", "--num_iterations", least=0)
    max_lr: float = setting(6e-4, "learning rate after the warmup", "--learning_rate", least=0)
    min_lr: float | None = setting(None, "learning rate at the end; None = a tenth of max_lr", least=0)
    learning_rate_decay_frac: float | None = setting(None, "min_lr as a fraction of max_lr", least=0, most=1)
    warmup_steps: int = setting(715, "steps of linear warmup: 375M tokens", "--warmup_iters", least=0)
    schedule: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES)
    wsd_decay_frac: float = setting(0.4, "wsd: the share of max_steps that decays", above=0, most=1)
    # --- optimizer
    optimizer: str = setting("adamw", "muon trains matrices by Muon, the rest by AdamW", choices=OPTIMIZERS)
    muon_steps: int = setting(5, "Newton-Schulz iterations of Muon", least=1, most=20)
    muon_experts: bool = setting(True, "Muon for experts too; False = AdamW, cheaper if batches are small")
    adagrad_ngrams: bool = setting(False, "with muon: Adagrad for n-grams; False = AdamW, slower on a CPU")
    weight_decay: float = setting(0.1, "for matrices and embeddings, not for biases and norms", least=0)
    beta1: float = setting(0.9, "AdamW's first beta", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's second beta", least=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm after clipping; 0 = no clipping", least=0)
    router_lr_mult: float = setting(1.0, "learning rate of the routers, relative to max_lr", least=0)
    expert_lr_mult: float = setting(1.0, "learning rate of the experts, relative to max_lr", least=0)
    # --- evaluation, samples, checkpoints, log
    infer_step: int = setting(250, "steps between evaluations; 0 = at the end", "--val_loss_every", least=0)
    val_steps: int = setting(20, "validation batches per rank; 0 = the whole set", "--val_max_steps", least=0)
    val: str = setting("", "more validation sets, NAME=FOLDER,NAME=FOLDER")
    sample_every: int = setting(-1, "steps between samples; -1 = infer_step, 0 = never", least=-1)
    hellaswag: bool = setting(True, "score HellaSwag at every evaluation, if the data has GPT-2's tokens")
    hellaswag_data: str = setting("", "file of HellaSwag questions; empty = download it once")
    hellaswag_limit: int = setting(0, "score only so many questions; 0 = all 10,042", least=0)
    prompt: str = setting("Hello, I'm a language model,", 'text that samples continue; "" = <|endoftext|>')
    sample_tokens: int = setting(32, "new tokens per sample", least=1)
    checkpoint_every: int = setting(5000, "steps between checkpoints; 0 = only the last", least=0)
    keep_last: int = setting(0, "keep so many checkpoints, and the best; 0 = keep all", least=0)
    keep_every: int = setting(0, "with keep_last: also keep multiples of so many steps; 0 = none", least=0)
    keep_best: bool = setting(False, "save each step with the lowest validation loss so far; see log/best")
    patience: int = setting(0, "stop after so many evaluations without a lower loss; 0 = never", least=0)
    save_retry_s: float = setting(60.0, "seconds until a save that failed is tried again", least=0, most=1e6)
    max_bad_steps: int = setting(10, "steps in a row with a NaN or infinity that stop the run", least=1)
    log_every: int = setting(1, "print every so many steps; the log files have them all", least=1)
    plot: bool = setting(True, "draw log_dir/training.png at the end")
    plot_every: int = setting(0, "also draw it every so many steps; 0 = never", least=0)
    tensorboard: bool = setting(True, "write log_dir/tb")
    wandb: bool = setting(False, "send the same curves to Weights & Biases, if it is installed")
    wandb_project: str = setting("", "its project; empty = WANDB_PROJECT, or gpt-moe; a name turns wandb on")
    log_norms: bool = setting(False, "also log the gradient norm of each part: norm/experts, ...")
    profile: str = setting("", "A:B = profile the steps A to B - 1: a trace, and the dearest operators")
    # --- machine
    device: str = setting("", "cuda, cuda:1, mps or cpu; empty = the best there is")
    dtype: str = setting("auto", "for matrix products; auto = the best for the device", choices=DTYPES)
    tensorcores: bool = setting(True, "allow TF32 if dtype is float32 on CUDA")
    flash: bool = setting(True, "compute attention by fused kernels; False = by plain products")
    use_compile: bool = setting(True, "torch.compile every block", "--compile")
    loss_chunk: int = setting(-1, "rows of logits that the loss makes at once; -1 = auto, 0 = all", least=-1)
    attention_backend: str = setting("auto", "on CUDA; auto = the fastest", choices=("auto", *BACKENDS))
    parallel: str = setting("ddp", "none = a single process", choices=("ddp", "fsdp", "none"))
    zero_stage: int = setting(0, "1 = with ddp, each rank keeps a share of the moments", choices=(0, 1))
    ep_size: int = setting(1, "ranks that share the experts of a layer (expert parallelism)", least=1)
    activation_checkpointing: str = setting("none", "block = recompute blocks", choices=("none", "block"))
    seed: int = setting(1337, "seed of weights, sample order and dropout", least=0, below=2**63)
    # --- model: GPTConfig in model.py explains and checks these
    block_size: int = setting(0, "longest sequence that the model can take; 0 = T", least=0)
    vocab_size: int = setting(0, "0 = the data's, padded to a multiple of 128; -1 = not padded", least=-1)
    n_layer: int = setting(12, "blocks", least=1, most=10_000)
    n_head: int = setting(12, "attention heads")
    n_embd: int = setting(768, "width")
    dropout: float = setting(0.0, "0 is best when data is seen once")
    bias: bool = setting(True, "biases in linear layers and norms")
    mlp_hidden_size: int | None = setting(None, "width of dense feed-forward layers; None = 4 * n_embd")
    use_moe: bool = setting(True, "Mixture of Experts in place of the MLP")
    num_experts: int = setting(2, "experts per MoE layer")
    num_experts_per_tok: int = setting(1, "experts that each token visits")
    moe_every: int = setting(1, "an MoE in every k-th block, counted from the last")
    moe_loss: bool = setting(True, "add a balance loss")
    moe_loss_type: str = setting("load_balancing", "balance loss", choices=BALANCE_LOSSES)
    # Summed over L layers: a coefficient copied from a Mixtral config is about L/K times as strong here.
    moe_loss_coef: float = setting(0.01, "weight of the balance loss, summed over layers")
    router_z_loss_coef: float = setting(0.0, "weight of the router z-loss; ST-MoE uses 0.001")
    router_score: str = setting("softmax", "turns router logits into scores", choices=ROUTER_SCORES)
    norm_topk_prob: bool = setting(True, "make the weights of a token's experts sum to 1 (K > 1)")
    router_bias_update_rate: float = setting(0.0, "loss-free balancing; its paper uses 0.001")
    num_shared_experts: int = setting(0, "experts that every token visits in addition")
    expert_hidden_size: int | None = setting(None, "hidden size of an expert; None = 4 * n_embd")
    position: str = setting("learned", "position encoding: learned or rope")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    n_kv_head: int | None = setting(None, "key/value heads; None = n_head")
    sliding_window: int | None = setting(None, "positions that a query sees; None = all before it")
    global_every: int | None = setting(None, "with a window: every k-th layer has none")
    norm: str = setting("layernorm", "layernorm or rmsnorm")
    norm_eps: float = setting(1e-5, "added to the variance")
    activation: str = setting("gelu", "in the feed-forward layers", choices=ACTIVATIONS)
    qk_norm: bool = setting(False, "normalise queries and keys")
    logit_softcap: float = setting(0.0, "largest logit, by a tanh; 0 = no limit")
    init: str = setting("gpt2", "gpt2, or zero_proj: projections into the residual stream start at zero")
    ngram_order: int = setting(0, "longest n-gram with embeddings; 0 = none; -1 = 6 for bytes", least=-1)
    ngram_rows: int = setting(8192, "embeddings for each n = 2 .. ngram_order, chosen by a hash")
    tie_word_embeddings: bool = setting(True, "one matrix for token embedding and head")


# Named settings (--preset NAME). A flag overrides them.
MODERN = dict(  # settings that lowered the loss: docs/measurements/recipe_ablation.csv
    optimizer="muon", muon_steps=3, max_lr=5e-3, position="rope", qk_norm=True, activation="relu2",
    ngram_order=-1, ngram_rows=32768, adagrad_ngrams=True,
)  # fmt: skip
PRESETS = {
    "gpt2": dict(use_moe=False),  # GPT-2 124M, dense
    "llmc": llmc.PRESET,  # the defaults of llm.c's train_gpt2.py
    "modern": MODERN | dict(max_lr=2e-3),
    "moe-small": MODERN | dict(  # as many active parameters as the dense model
        max_lr=2e-3, num_experts=8, num_experts_per_tok=2, expert_hidden_size=1536),
    "moe-fine": MODERN | dict(max_lr=2e-3, num_experts=32, num_experts_per_tok=4, expert_hidden_size=768),
    "qwen3": MODERN | dict(  # equal loss; can be exported as a stock Qwen3 or Qwen3-MoE
        max_lr=2e-3, norm="rmsnorm", activation="swiglu", bias=False, mlp_hidden_size=2048,
        expert_hidden_size=2048, ngram_order=0,
    ),
    "demo": MODERN | dict(
        data_dir="demo_data", log_dir="log/demo", n_layer=2, n_head=2, n_embd=128, moe_every=2,
        num_experts=8, num_experts_per_tok=1, expert_hidden_size=128, muon_experts=False, expert_lr_mult=0.3,
        B=16, T=128, total_batch_size=2048, max_steps=720, warmup_steps=40, infer_step=360, val_steps=40,
        ngram_rows=65536, sample_tokens=100, log_every=25, prompt="Return the ",
        use_compile=False,
    ),
}  # fmt: skip


def overrides(config: TrainConfig) -> dict:
    """The settings that --preset, --depth and --model replace. ValueError for unknown names."""
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"preset={config.preset!r}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS.get(config.preset, {})
    model = config.model or preset.get("model", "")
    if model and model not in llmc.MODELS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(llmc.MODELS)}")
    if config.depth:
        defaults = vars(TrainConfig())
        flags = {name: value for name, value in vars(config).items() if value != defaults[name]}
        preset = preset | depth_settings(config.depth, TrainConfig(**preset | flags))
    return preset | (dict(use_moe=False) | llmc.MODELS[model] if model else {})


def parse_config(arguments: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """The settings, and the names of settings that flags (not presets) set. ValueError for a bad flag."""
    return parse_flags(TrainConfig, overrides, arguments, __file__)


# ---------------------------------------------------------------------------- TRAINING


def train_step(run: Run, step: int) -> dict:
    """One optimizer step, on all ranks together. Returns its measurements, equal on all ranks.

    If the loss or the gradient norm is not finite, all ranks skip the update.
    """
    config, layout, model, optimizer = run.config, run.layout, run.model, run.optimizer
    start = time.perf_counter()
    model.train()
    torch.manual_seed(faults.dropout_seed(config.seed, step, layout.world.rank))
    losses = torch.zeros(3, device=layout.world.device)  # sums of cross-entropy, balance loss, z-loss
    micro_losses = []
    gradients = StepGradients(run, step)  # measures only before an evaluation
    with parallel.cast_once(model, layout, run.dtype, run.accumulation):
        for micro_step in range(run.accumulation):
            x, y = faults.next_batch(run.train_loader)  # (B, T), (B, T)
            last = micro_step == run.accumulation - 1
            parallel.sync_gradients(run.parallel_model, last or gradients.reduces)
            with run.autocast():
                output = run.parallel_model(x, targets=y, position_ids=run.positions(x), return_dict=True)
            run.scaler.scale(output.loss / run.accumulation).backward()
            gradients.end_micro_step()
            losses += output.loss_parts()
            micro_losses.append(output.loss.detach())
    parallel.finish_gradients(model, layout)
    run.scaler.unscale_(optimizer)
    norm = parallel.gradient_norms([model.parameters()], layout)[0]
    norms = parallel.norms_of_parts(model, layout) if config.log_norms else {}
    norms |= gradients.norms()
    scale = run.scaler.scale(torch.ones_like(losses[0]))  # 1, except with float16

    # One all-reduce adds up the losses and the signals that the ranks have received, another the routing.
    sums = layout.world.sum(torch.cat([losses, run.signals.take(layout.world.device)]))  # (3 + 6,)
    means, moe_layers = sums[:3] / (layout.world.size * run.accumulation), model.moe_layers()
    totals = sum_totals(moe_layers)
    usage = [moe.step_usage(total) for moe, total in zip(moe_layers, totals, strict=True)]  # each (1 + E,)
    parts = means, norm.to(means.dtype)[None], scale[None], sums[3:], *norms.values(), *usage
    values = torch.cat(parts).tolist()  # waits for the device; nothing else between two forwards does
    run.signals.agree(values[5:11])
    usage = np.reshape(values[11 + len(norms) :], (-1, 1 + model.config.num_experts))  # (MoE layers, 1 + E)
    record = dict(zip(("loss", "balance_loss", "z_loss", "norm"), values[:4], strict=True))
    record |= dict(zip(norms, values[11:], strict=False))
    record |= {"step": step, "lr": learning_rate(step, config)}

    if why := run.health.skips(record["loss"], record["norm"], values[4]):
        record["skipped"] = why
        faults.discard_routing(model)
        if run.health.in_a_row >= config.max_bad_steps:
            run.diagnosis = faults.diagnose(model, micro_losses, run.train_loader)
    else:
        run.updating = True  # weights and optimizer state no longer belong to the same step
        if 0 < config.grad_clip < record["norm"]:
            parallel.clip_gradients(model, config.grad_clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"] * group["lr_mult"]
        update_routers(moe_layers, totals=totals)
        record |= expert_load(usage)
        with freeze_idle_experts(moe_layers, optimizer, usage[:, 1:]):
            optimizer.step()
    run.diagnostics.step(gradients, record, usage, scale=values[4])
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return record | {"seconds": time.perf_counter() - start}


def train(run: Run, one_step: Callable[[Run, int], dict] = train_step) -> int:
    """Train for max_steps steps; one more pass of the loop saves and evaluates. Returns the exit code."""
    config, log, signals = run.config, run.log, run.signals
    step, val_loss = run.resumed.get("step", 0), run.resumed.get("val_loss")
    val_loss_step = run.resumed.get("val_loss_step")
    terminal = Terminal(config, step, run.layout.world.is_master)
    run.start_clock(terminal.say)
    saver, profiler = RunSaver(run), Profiler(run)
    run.model.update_routers()  # from now on routing statistics cover whole optimizer steps
    with terminal, signals, faults.collector_paused(), saver.saving_on_errors():
        while True:
            last_step = step == config.max_steps
            saver.remember(step, val_loss, val_loss_step)

            # ---- CHECKPOINT: saved before the evaluation, so that a failing evaluation cannot lose the run
            if last_step or is_multiple(step, config.checkpoint_every) or signals.save_now or signals.stops:
                saver.save()
            if signals.stops:
                break

            # ---- EVALUATION
            evaluates, samples = evaluates_at(step, config), samples_at(step, config)
            if evaluates or step % 100 == 0:
                gc.collect()
            measured = evaluate(run, step, evaluates, samples, saver.is_urgent, terminal)
            if measured is None:  # interrupted: the next pass saves, then evaluates or stops
                signals.agree(run.layout.world.sum(signals.take(run.layout.world.device)).tolist())
                continue
            if "val_loss" in measured:
                val_loss, val_loss_step = measured["val_loss"], step
                last_step |= saver.judge(step, val_loss)
            if log:
                layers = run.model.moe_layers() if measured and run.trains and step > 0 else []
                load = [moe.last_step_counts().tolist() for moe in layers]
                log.evaluation(step, measured, load, run.elapsed() if last_step else None)
            if last_step:
                saver.save()  # if patience ends the run, its last step is not saved yet
                saver.retry_until_saved()
                break

            # ---- TRAINING
            if config.overfit_single_batch:
                run.train_loader.reset()
            if saver.writer.wants_retry():
                signals.request_save()
            with profiler.recording(step):
                record = one_step(run, step)

            # ---- LOG
            record = step_record(run, record, measured)
            if log:
                log.step(record)
                terminal.step(record)
                if is_multiple(step + 1, config.plot_every):
                    log.draw()
            if run.diagnosis:
                saver.save_before_bad_steps()
                break
            step += 1
    profiler.write()  # if the run ends among the steps that --profile names
    return finish(run, step, saver, terminal)


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 means never."""
    return every > 0 and step % every == 0


def step_record(run: Run, record: dict, measured: dict) -> dict:
    """A step's line of metrics.jsonl: train_step's record, the evaluation before it, speed and memory."""
    config, health, model, seconds = run.config, run.health, run.model, record.pop("seconds")
    sequences = config.total_batch_size / config.T / run.layout.world.size  # per rank
    if record.get("skipped") or not model.moe_layers():
        del record["balance_loss"], record["z_loss"]
    record |= {
        "ms": 1000 * seconds, "tok_per_s": config.total_batch_size / seconds,
        "mfu": model.estimate_mfu(sequences * (1 if run.trains else 1 / 3), seconds, length=config.T),
        "elapsed_s": run.elapsed(), "bad_steps": health.bad_steps, "scale_steps": health.scale_steps,
        "memory": peak_memory(run.layout.world.device) / 2**30, **measured,
    }  # fmt: skip
    record |= {f"epoch/{name}": epochs for name, (_, epochs) in run.train_loader.progress().items()}
    if record.get("skipped") == "scale":
        run.say(f"step {record['step']}: no update: float16's loss scale was too large, and is halved")
    elif record.get("skipped"):
        found = f"loss {record['loss']}, norm {record['norm']}"
        bad = f"{health.in_a_row} in a row, {health.bad_steps} in all"
        run.say(f"step {record['step']}: WARNING: no update: {found} ({bad})")
    elif health.is_spike(record["loss"]):
        record["spike"] = True
        jump = f"{record['loss']:.4f} from a mean of {health.mean:.4f}"
        run.say(f"step {record['step']}: the loss jumped to {jump}")
    return record


def finish(run: Run, step: int, saver: RunSaver, terminal: Terminal) -> int:
    """After the last step: draw the picture, print the results, return the exit code."""
    run.layout.world.barrier()  # a launcher stops all processes as soon as one has ended
    is_master, newest = run.layout.world.is_master, saver.newest()
    go_on = "start it again" if newest == "none" else f"continue with: {resume_command(run.config)}"
    if is_master and run.config.plot:
        problem, command = run.log.draw(wait=True), shlex.join(["python", "plot_log.py", run.config.log_dir])
        hint = f"WARNING: no picture: {problem}; draw it with: {command}"
        terminal.say(hint if problem else f"picture         {run.config.log_dir}/training.png")
    if run.diagnosis:
        bad = f"{run.health.in_a_row} steps in a row without a finite loss and gradient"
        text = f"train_gpt_moe.py: error: stopped at step {step}: {bad}; the newest checkpoint is {newest}"
        text += f"{saver.describe_best()}; {go_on}\n{run.diagnosis}"
        text = text if is_master else run.diagnosis.splitlines()[-1]
        print(printable(text, keep="\n"), file=sys.stderr, flush=True)
        return faults.FAILED
    if saver.failed:
        why = f": {saver.writer.error}" if saver.writer.error else ""
        text = f"some files could not be written{why}; the newest checkpoint is {newest}; {go_on}"
        print_error("train_gpt_moe.py", text)
        return faults.FAILED
    if run.signals.stops:
        terminal.say(f"stopped before step {step}; the newest checkpoint is {newest}\n{go_on}")
        return run.signals.exit_code
    if is_master:
        device, speaks = run.layout.world.device, run.model.config.encoding != "none"
        terminal.summary(peak_memory(device), newest, run.diagnostics.batch_text(run), speaks)
    return faults.OK


def main(arguments: list[str] | None = None) -> int:
    """Set up and train; returns the exit code. Errors that the user can fix print one line, no traceback."""
    config = world = run = None
    in_training = False
    with contextlib.suppress(AttributeError, OSError):  # a stdout that cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # samples may have characters that it cannot print
    try:
        config, given = parse_config(arguments)
        llmc.check_flags(config)
        world = parallel.start(config.device, config.parallel, vars(config))
        run = set_up(config, given, world)
        llmc.prepare(run)
        open_log(run)
        llmc.write_files(run)
        in_training = True
        with prefer_backend(config.attention_backend, world.device):
            code = train(run, train_step if run.trains else llmc.forward_step)
    except (ValueError, OSError) as error:
        if in_training and not isinstance(error, faults.DataError):
            raise  # an error in training does not come from a setting
        return faults.report(error)
    except (RuntimeError, MemoryError) as error:  # gloo, NCCL and torch's allocators raise RuntimeError
        if is_out_of_memory(error):
            return faults.report(error, config)
        if faults.is_compile_error(error):
            return faults.report(error)
        if not (world and world.heartbeat and (lost := world.heartbeat.lost_after_error())):
            raise
        print_error("train_gpt_moe.py", lost)
        return faults.FAILED
    except KeyboardInterrupt:  # before the first step, or after the last: `Signals` does not listen there
        return 130
    run = None  # DDP must be freed before its process group
    parallel.stop(world)
    return code


if __name__ == "__main__":
    sys.exit(main())
