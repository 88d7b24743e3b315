#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, prepares text that Python itself carries, trains a small OLMoE with
# SPAttention, and shows what came out. After an interruption, run it again: it resumes.
#
#   bash scripts/quickstart.sh [key=value ...]        for example: bash scripts/quickstart.sh attention.type=standard
set -euo pipefail
cd "$(dirname "$0")/.."
cat <<'END'
This takes 2 to 4 minutes on two idle CPU cores, after an installation of some minutes the first time.
Expect the loss to fall from 7.6 (ln 2048: a uniform guess among 2048 tokens) to about 5.3, and 5.4 on held-out text.

END
source scripts/setup.sh
setup wandb
started=$SECONDS

config=configs/quickstart.yaml
run=$("$PY" scripts/train.py --config "$config" --show trainer.save_folder "$@")

if [ ! -f data/quickstart/shards/manifest.json ]; then
  echo "== 1. text: Python's own documentation =="
  "$PY" scripts/quickstart_corpus.py data/quickstart/corpus
  "$PY" scripts/prepare_data.py --config configs/data/quickstart.yaml
fi

echo "== 2. training =="
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"
"$PY" scripts/train.py --config "$config" "$@"

echo "== 3. pictures =="
"$PY" scripts/plot_loss.py "$run" --out "$run/loss.png"
"$PY" scripts/draw_masks.py --checkpoint "$run" --out "$run/masks.png"
"$PY" scripts/compare.py "$run" --out "$run/report.html"

prompt="Return the"
echo "== 4. a sample: \"$prompt\" is the prompt, the rest is the model's =="
"$PY" scripts/generate.py --checkpoint "$run" --prompt "$prompt" --max-new-tokens 48
cat <<END

Done in $((SECONDS - started)) s, installation not counted.
  checkpoints   $run/step*
  loss          $run/loss.png and $run/metrics.jsonl
  masks         $run/masks.png: what each head of this model attends
  a page        $run/report.html: all of it, to hover over and zoom into
  messages      $run/train.log

Next:
  bash scripts/quickstart.sh attention.type=standard                  # dense attention, same data, same initial weights
  bash scripts/quickstart.sh attention.type=eball                     # any type of README's table
  $PY scripts/compare.py runs/quickstart-* --out report.html          # compare them
  $PY scripts/train.py --config configs/1b7b_spattn.yaml --dry-run    # what the real run would be
END
