#!/usr/bin/env bash
# Makes every number and picture of docs/studies/balance_losses.md, with two runs at a time:
#     bash docs/studies/balance_losses.sh tinyshakespeare.txt [log/study]
# After Ctrl-C the same command goes on. Tiny Shakespeare is data/tinyshakespeare/input.txt of karpathy/char-rnn.
set -euo pipefail
text=$1 out=${2:-log/study}
# The recipe that preset demo had when this was measured.
recipe="--preset demo --max_lr 1e-2 --muon_steps 5 --ngram_order 0 --num_experts_per_tok 2 --moe_every 1
    --muon_experts True --expert_lr_mult 1"
common="$recipe --n_layer 2 --n_head 2 --n_embd 64 --expert_hidden_size 64 --T 64 --B 16
    --total_batch_size 1024 --max_steps 600 --warmup_steps 60 --infer_step 100 --val_steps 50 --sample_every 0
    --checkpoint_every 0 --plot False --tensorboard False"
losses=load_balancing,variance_penalty,entropy_regularization,diversity_regularization

for name in shakespeare python; do
    data=$([ $name = shakespeare ] && echo "--text $text" || echo "--data_dir demo_data")
    sweep() { python -m analysis sweep --log_dir "$out/$name" --jobs 2 --seed 1,2,3 --num_experts 8,32 "$@" -- $common $data; }
    sweep --moe_loss False --router_bias_update_rate 0,0.001
    sweep --moe_loss_type $losses
    for E in 8 32; do
        python -m analysis compare "$out/$name/num_experts=$E,*" --baseline moe_loss=False,router_bias_update_rate=0.0 \
            --csv "$out/${name}_$E.csv" --picture "$out/${name}_$E.png"
    done
done
