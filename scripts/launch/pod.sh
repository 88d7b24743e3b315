#!/usr/bin/env bash
# What a pod of the JobSet runs: torchrun with the given arguments, then the exit code of the ranks, of which torchrun makes 1.
# The failure policies of scripts/launch/kubernetes/jobset.yaml decide by it.
set -euo pipefail

code=${SPATTN_EXIT_CODE:?names a file that all pods see}
flight=${TORCH_FR_DUMP_TEMP_FILE:-}
mkdir -p "$(dirname "$code")"
if [ -n "$flight" ]; then mkdir -p "$(dirname "$flight")"; fi # the flight recorder makes no folder
rm -f "$code" # of an earlier attempt. No rank starts before every pod has come this far: torchrun waits for all

python -m torch.distributed.run "$@" &
torchrun=$!
trap 'kill -TERM "$torchrun"' TERM # the ranks finish their step and save
status=0
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends the wait early
  status=0
  wait "$torchrun" || status=$?
done
[ "$status" != 0 ] || exit 0

for _ in {1..30}; do # another pod's rank may have written it, and a file server tells of it later
  if [ -s "$code" ]; then break; fi
  sleep 1
done
kept=$(cat "$code" 2>/dev/null || true) # none where ranks were killed
exit "${kept:-$status}"
