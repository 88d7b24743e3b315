#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, prepares text that Python itself carries, trains a small OLMoE with
# SPAttention, and shows what came out. Run it again to go on after an interruption.
#
#   bash scripts/quickstart.sh [key=value ...]        for example: bash scripts/quickstart.sh attention.type=standard
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup wandb
started=$SECONDS

data=data/quickstart
if [ ! -f "$data/shards/manifest.json" ]; then
  echo "== text: Python's own documentation =="
  "$PY" -m spattn_olmoe.data.stdlib_corpus "$data/corpus"
fi
"$PY" scripts/prepare_data.py --config configs/data/quickstart.yaml

show() { "$PY" scripts/train.py --config configs/quickstart.yaml --show "$@" 2>/dev/null; }
run=$(show trainer.save_folder "$@") || "$PY" scripts/train.py --config configs/quickstart.yaml --dry-run "$@" >/dev/null
echo "== training: $run =="
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PY" -c 'import os; print(os.cpu_count())')}"
"$PY" -m torch.distributed.run --standalone --nproc_per_node=1 scripts/train.py --config configs/quickstart.yaml "$@"

echo "== what came out =="
"$PY" scripts/plot_loss.py "$run" --out "$run/loss.png"
type=$(show attention.type "$@")
options=()
[ "$type" != spattention ] || options=("local_sharing=$(show attention.local_sharing "$@")")
"$PY" scripts/draw_masks.py --type "$type" --heads 8 --band-length 256 "${options[@]}" --out "$run/masks.png"
echo
"$PY" scripts/generate.py --checkpoint "$run" --prompt "Return the" --max-new-tokens 48
cat <<END

$((SECONDS - started)) seconds after installation.
  checkpoints   $run/step*
  loss          $run/loss.png and $run/metrics.jsonl
  masks         $run/masks.png

Next:
  bash scripts/quickstart.sh attention.type=standard                  # the dense baseline, same data, same initial weights
  bash scripts/quickstart.sh attention.type=eball                     # any of the eight types
  $PY scripts/plot_loss.py runs/quickstart-* --out loss.png           # compare them
  $PY scripts/train.py --config configs/1b7b_spattn.yaml --dry-run    # what the real run would be
END
