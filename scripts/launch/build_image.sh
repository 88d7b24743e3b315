#!/usr/bin/env bash
# Builds the Dockerfile where there is neither Docker nor a registry of images, on a base that debootstrap makes, and trains
# three steps of the quickstart in the image as its user. Root, Debian's buildah and debootstrap; 15 to 50 minutes, 25 GB.
#
#   bash scripts/launch/build_image.sh FOLDER [option of buildah build and buildah run ...]
#
# FOLDER is for the base and the images; what happens is printed. Where pip needs a mirror, hand its configuration in:
#   --volume=/etc/pip.conf:/etc/pip.conf:ro
# The base is Debian 12 with Python 3.11, for nvidia/cuda's Ubuntu 24.04 with 3.12. Nothing here takes a GPU.
set -euo pipefail
folder=$(realpath -m "${1:?a folder for the base and the images}")
options=(--isolation=chroot "${@:2}")
cd "$(dirname "$0")/../.."
for program in buildah debootstrap; do
  command -v "$program" >/dev/null || { echo "error: $program not found: apt-get install buildah debootstrap" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "error: this takes root" >&2; exit 2; }

mkdir -p "$folder"
export STORAGE_DRIVER=vfs TMPDIR=$folder
b() { buildah --root="$folder/images" --runroot="$folder/run" "$@"; }
step() { echo "== $((SECONDS / 60)) min: $*"; }
commit=$(git rev-parse HEAD)
echo "commit $commit$(git diff --quiet HEAD -- Dockerfile .dockerignore pyproject.toml constraints.txt spattn_olmoe scripts configs || echo ' with changes')"
date --utc +%Y-%m-%d
buildah --version

step "a base"
[ -e "$folder/base/made" ] || {
  debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/base" >"$folder/debootstrap.log"
  touch "$folder/base/made"
}
base=$(b from scratch)
b add --quiet "$base" "$folder/base" / >/dev/null
b commit --quiet "$base" localhost/base >/dev/null
b rm "$base" >/dev/null

step "the Dockerfile on it"
b build "${options[@]}" --pull-never --build-arg BASE=localhost/base --build-arg PYTHON=python3.11 \
  --build-arg COMMIT="$commit" --tag localhost/spattn_olmoe . >"$folder/build.log" 2>&1 || { tail -n 40 "$folder/build.log"; exit 1; }
grep "^STEP" "$folder/build.log"
b images --format '{{.Name}} {{.Size}}'

image=$(b from --pull-never localhost/spattn_olmoe)
trap 'b rm "$image" >/dev/null' EXIT
inside() { b run "${options[@]}" --hostname=localhost "$image" -- tini -s -- "$@"; } # chroot: it is not the first process
step "in the image, as its user"
inside id
inside python -m pip list --format=freeze | grep -iE "^(torch|triton|ai2-olmo-core|numpy|spattn)"
inside python scripts/quickstart_corpus.py data/quickstart/corpus
inside python scripts/prepare_data.py --config configs/data/quickstart.yaml

step "three steps of the quickstart"
inside torchrun --standalone --nproc-per-node=1 scripts/train.py --config configs/quickstart.yaml trainer.hard_stop='{value: 3, unit: steps}'
inside bash -c 'ls -ld runs/quickstart-spattention/step* && tail -n 1 runs/quickstart-spattention/metrics.jsonl'

step "what the image does by itself: check_env, which finds no data and no GPU here"
inside python scripts/check_env.py --config configs/1b7b_spattn.yaml || echo "exit code $?"
step "done"
